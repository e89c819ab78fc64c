//! Everyone who must not get in, and what the listener does about crowds.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;

use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ED25519};
use rustls::AlertDescription;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};

use super::*;

fn refused(listener: &PeerListener, client: &Identity, server: &Identity) -> LinkError {
    Link::connect(listener.local_addr(), client, server.pin(), deadlines()).unwrap_err()
}

/// Shuts the listener down, which waits for every connection's thread, and asserts that none reached the
/// handler.
fn assert_nobody_in(listener: PeerListener, accepted: &Receiver<Link>) {
    listener.shutdown();
    assert!(accepted.try_recv().is_err(), "a refused peer reached the handler");
}

#[test]
fn a_server_that_is_not_the_expected_one_is_refused() {
    let (server, client, meant) = (identity(), identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    match refused(&listener, &client, &meant) {
        LinkError::PeerRefused(CertRefusal::WrongPeer { expected, presented }) => {
            assert_eq!((expected, presented), (*meant.pin(), *server.pin()));
        }
        other => panic!("{other:?}"),
    }
    assert_nobody_in(listener, &accepted);
}

#[test]
fn a_client_that_is_not_pinned_is_refused_and_told() {
    let (server, client, stranger) = (identity(), identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    // Several times: the alert must not lose the race against the connection's end.
    for _ in 0..20 {
        let error = refused(&listener, &stranger, &server);
        assert!(matches!(&error, LinkError::Unknown { own } if own == stranger.pin()), "{error:?}");
        // Its own identity is what is to be registered over there.
        assert!(error.to_string().contains(&stranger.pin().to_string()), "{error}");
    }
    assert_nobody_in(listener, &accepted);
}

#[test]
fn dates_of_a_certificate_decide_nothing_on_either_side() {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    let (good, now) = (identity(), SystemTime::now());
    for (from, until) in [(now - 11 * YEAR, now - YEAR), (now + YEAR, now + 11 * YEAR)] {
        let (certificate, key) = dated(from, until);
        let odd = Identity::from_pem(certificate.as_bytes(), key.as_bytes()).unwrap();
        for (server, client) in [(&good, &odd), (&odd, &good)] {
            let (listener, accepted) = listen(server, &[client], limits());
            let link = Link::connect(listener.local_addr(), client, server.pin(), deadlines()).unwrap();
            assert_eq!(accepted.recv_timeout(LONG).unwrap().peer(), client.pin());
            assert_eq!(link.peer(), server.pin());
        }
    }
}

/// Takes every server, to be a client that our server has to turn away.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// How a plain rustls client fares that shows `chain` and speaks `alpn`.
fn outsider(
    listener: &PeerListener,
    chain: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    alpn: &[&[u8]],
) -> std::io::Error {
    let config = ClientConfig::builder_with_provider(Arc::new(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone));
    let mut config = match chain {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let mut tls = ClientConnection::new(Arc::new(config), "x".try_into().unwrap()).unwrap();
    let mut tcp = TcpStream::connect(listener.local_addr()).unwrap();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    // The early write is what an eager peer would do: it must reach nobody.
    match stream.write_all(&FrameHeader { kind: 1, len: 0 }.encode()) {
        Ok(()) => stream.read(&mut [0]).map_or_else(|error| error, |_| panic!("was admitted")),
        Err(error) => error,
    }
}

/// A certificate for `key`, self-signed or signed by `issuer`.
fn certificate(key: &KeyPair, issuer: Option<&Issuer<'_, &KeyPair>>, ca: bool) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(vec!["host.example".into()]).unwrap();
    if ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    match issuer {
        Some(issuer) => params.signed_by(key, issuer).unwrap().der().clone(),
        None => params.self_signed(key).unwrap().der().clone(),
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).unwrap()
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

#[test]
fn certificate_tricks_do_not_help() {
    let server = identity();
    let (good, other) = (key(), key());
    let pin = tls::identity_of(&certificate(&good, None, false)).unwrap();
    let (links, accepted) = channel();
    let handler = Arc::new(move |link| links.send(link).unwrap_or(()));
    let admits: PeerFilter = Arc::new(move |peer: &PeerIdentity| *peer == pin);
    let listener = PeerListener::bind(LOOPBACK, &server, admits, limits(), handler).unwrap();
    let issuer = Issuer::new(CertificateParams::new(vec!["host.example".into()]).unwrap(), &good);
    let own = certificate(&good, None, true);
    let alpn = [tls::ALPN];
    // Nothing shown; a stranger's; one the good key signed, alone and with the good one behind it; the good
    // one with something behind it.
    let signed = certificate(&other, Some(&issuer), false);
    let alert = |error: std::io::Error| match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::AlertReceived(alert)) => Some(*alert),
        _ if error.kind() == std::io::ErrorKind::WouldBlock => panic!("left waiting"),
        _ => None,
    };
    let refusal = AlertDescription::CertificateUnknown;
    for (what, chain, expected) in [
        ("none", None, AlertDescription::CertificateRequired),
        ("stranger", Some((vec![certificate(&other, None, true)], private(&other))), refusal),
        ("signed by the good key", Some((vec![signed.clone()], private(&other))), refusal),
        ("signed, with its signer", Some((vec![signed, own.clone()], private(&other))), refusal),
        ("good with a chain", Some((vec![own.clone(), own.clone()], private(&good))), refusal),
    ] {
        assert_eq!(alert(outsider(&listener, chain, &alpn)), Some(expected), "{what}");
    }
    // The right certificate, but another application protocol, or none.
    let shown = || Some((vec![own.clone()], private(&good)));
    let wrong = outsider(&listener, shown(), &[b"mirrorvm/0"]);
    assert_eq!(alert(wrong), Some(AlertDescription::NoApplicationProtocol));
    assert_eq!(alert(outsider(&listener, shown(), &[])), None);
    assert_nobody_in(listener, &accepted);
}

#[test]
fn showing_another_hosts_certificate_without_its_key_does_not_help() {
    let (server, client) = (identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    let thief = key();
    // rustls would notice the mismatch on our side: sign with our own key under their certificate.
    #[derive(Debug)]
    struct Stolen(Arc<rustls::sign::CertifiedKey>);
    impl rustls::client::ResolvesClientCert for Stolen {
        fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(self.0.clone())
        }
        fn has_certs(&self) -> bool {
            true
        }
    }
    let signer = rustls::crypto::ring::sign::any_supported_type(&private(&thief)).unwrap();
    let stolen = rustls::sign::CertifiedKey::new(client.certified().cert.clone(), signer);
    let mut config = ClientConfig::builder_with_provider(Arc::new(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_client_cert_resolver(Arc::new(Stolen(Arc::new(stolen))));
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    let mut tls = ClientConnection::new(Arc::new(config), "x".try_into().unwrap()).unwrap();
    let mut tcp = TcpStream::connect(listener.local_addr()).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    let error = stream.write_all(b"x").and_then(|()| stream.read(&mut [0])).unwrap_err();
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    assert_eq!(alert, Some(&rustls::Error::AlertReceived(AlertDescription::DecryptError)), "{error:?}");
    assert_nobody_in(listener, &accepted);
}

/// What the listener answers to raw bytes, up to its closing the connection.
fn answer(listener: &PeerListener, bytes: &[u8]) -> Vec<u8> {
    let mut tcp = TcpStream::connect(listener.local_addr()).unwrap();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    // Either may fail when the listener has made up its mind already.
    let _ = tcp.write_all(bytes);
    let _ = tcp.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    match tcp.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("left waiting"),
        _ => answer,
    }
}

/// A TLS 1.2 ClientHello: no supported_versions extension, an ECDHE-ECDSA suite.
fn tls12_hello() -> Vec<u8> {
    let extensions = [
        [0, 10, 0, 4, 0, 2, 0, 29].as_slice(),
        &[0, 13, 0, 6, 0, 4, 4, 3, 8, 7],
        &[0, 11, 0, 2, 1, 0],
        &[0, 23, 0, 0],
    ]
    .concat();
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2c, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    let mut record = vec![22, 3, 1];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);
    record
}

#[test]
fn plain_tcp_and_older_tls_are_refused() {
    let (server, client) = (identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    // A fatal alert (level 2) of protocol_version (70).
    assert_eq!(answer(&listener, &tls12_hello()), [21, 3, 3, 0, 2, 2, 70]);
    for bytes in
        [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &FrameHeader { kind: 1, len: 0 }.encode(), &[22; 100_000]]
    {
        let answer = answer(&listener, bytes);
        // Nothing, or an alert.
        assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    }
    assert_nobody_in(listener, &accepted);
}

/// The first flight of a good client.
fn tls13_hello() -> Vec<u8> {
    let mut connection = tls::client(tls::provider(), &identity(), *identity().pin()).unwrap();
    let mut hello = vec![0; 4096];
    let rustls::unbuffered::ConnectionState::EncodeTlsData(mut data) =
        connection.process_tls_records(&mut []).state.unwrap()
    else {
        panic!("a client begins by speaking")
    };
    let len = data.encode(&mut hello).unwrap();
    hello.truncate(len);
    hello
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Damaged hellos, whole or in two pieces, followed by anything: errors, no panic, no wait.
    #[test]
    fn any_hello_ends_in_an_error(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        behind in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let listener = std::net::TcpListener::bind(LOOPBACK).unwrap();
        let mut tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = socket::Socket::new(listener.accept().unwrap().0).unwrap();
        let config = tls::server_config(tls::provider(), &identity(), Arc::new(|_| true)).unwrap();
        let mut bytes = tls13_hello();
        for (at, value) in damage {
            *at.get_mut(&mut bytes) = value;
        }
        bytes.extend(behind);
        tcp.set_nodelay(true).unwrap();
        let server = thread::spawn(move || Link::accept(socket, config, deadlines()).map(|_| ()));
        let (head, tail) = bytes.split_at(cut.index(bytes.len()));
        // Either may fail when the server has made up its mind already.
        let _ = tcp.write_all(head).and_then(|()| tcp.write_all(tail));
        let _ = tcp.shutdown(std::net::Shutdown::Write);
        let ended = server.join().expect("the server panicked");
        prop_assert!(!matches!(ended, Ok(()) | Err(LinkError::Deadline(_))), "{:?}", ended);
    }

    /// The same for what follows a good handshake.
    #[test]
    fn any_ciphertext_after_the_handshake_ends_in_an_error(
        kind in prop_oneof![20u8..25, any::<u8>()],
        body in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let (mut near, mut far) = pair();
        near.send(1, b"good").unwrap();
        let mut record = vec![kind, 3, 3, 0, body.len() as u8];
        record.extend(body);
        near.send_ciphertext(&record);
        drop(near);
        prop_assert_eq!(far.recv(10).unwrap().unwrap().payload, b"good");
        let ended = far.recv(10);
        let expected = matches!(ended, Err(LinkError::Tls(_) | LinkError::Truncated { .. }));
        prop_assert!(expected, "{:?}", ended);
        let broken = matches!(far.send(1, b""), Err(LinkError::Broken));
        prop_assert!(broken);
    }
}

#[test]
fn a_handshake_that_dawdles_is_cut() {
    let (server, client) = (identity(), identity());
    let handshake_timeout = Duration::from_millis(200);
    let (listener, accepted) = listen(&server, &[&client], ListenerLimits { handshake_timeout, ..limits() });
    // One says nothing, one drips a hello; both see the end.
    let mut silent = TcpStream::connect(listener.local_addr()).unwrap();
    let mut dripping = TcpStream::connect(listener.local_addr()).unwrap();
    dripping.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    silent.set_read_timeout(Some(LONG)).unwrap();
    let started = std::time::Instant::now();
    let mut ended = false;
    for byte in tls12_hello() {
        let wrote = dripping.write_all(&[byte]);
        ended |= wrote.is_err() || matches!(dripping.read(&mut [0]), Ok(0));
        if ended || started.elapsed() > LONG {
            break;
        }
    }
    assert!(ended, "the dripping client was never cut");
    assert!(!matches!(silent.read(&mut [0]), Ok(1..)));
    assert!(started.elapsed() < LONG);
    assert_nobody_in(listener, &accepted);
}

#[test]
fn a_client_does_not_wait_for_a_silent_server() {
    let silent = std::net::TcpListener::bind(LOOPBACK).unwrap();
    let (client, server) = (identity(), identity());
    let deadlines = Deadlines { handshake: Duration::from_millis(100), ..deadlines() };
    let error = Link::connect(silent.local_addr().unwrap(), &client, server.pin(), deadlines).unwrap_err();
    assert!(matches!(error, LinkError::Deadline(Waiting::Handshake)), "{error:?}");
    let addr = silent.local_addr().unwrap();
    drop(silent);
    let error = Link::connect(addr, &client, server.pin(), deadlines).unwrap_err();
    assert!(matches!(error, LinkError::Connect { .. }), "{error:?}");
}

#[test]
fn the_cap_turns_the_next_one_away_and_frees_up() {
    let (server, client) = (identity(), identity());
    let pin = *client.pin();
    let (started, running) = channel();
    // Each handler stays until its peer says something or leaves.
    let handler = Arc::new(move |mut link: Link| {
        let _ = started.send(());
        let _ = link.recv(10);
    });
    let admits: PeerFilter = Arc::new(move |peer: &PeerIdentity| *peer == pin);
    let limits = ListenerLimits { max_links: 2, reserved_links_per_peer: 0, ..limits() };
    let listener = PeerListener::bind(LOOPBACK, &server, admits, limits, handler).unwrap();
    let connect = || Link::connect(listener.local_addr(), &client, server.pin(), deadlines());
    let (mut first, _second) = (connect().unwrap(), connect().unwrap());
    (0..2).for_each(|_| running.recv_timeout(LONG).unwrap());
    assert!(matches!(connect(), Err(LinkError::RefusedByPeer { alert: None })));
    first.send(1, b"bye").unwrap();
    // The handler returns, then its place is free.
    let third = loop {
        match connect() {
            Ok(link) => break link,
            Err(LinkError::RefusedByPeer { .. }) => thread::yield_now(),
            Err(other) => panic!("{other:?}"),
        }
    };
    drop(third);
}

#[test]
fn shutdown_ends_handlers_and_handshakes() {
    let (server, client) = (identity(), identity());
    let pin = *client.pin();
    let (results, ended) = channel();
    let handler = Arc::new(move |mut link: Link| results.send(link.recv(10).map(|_| ())).unwrap_or(()));
    let admits: PeerFilter = Arc::new(move |peer: &PeerIdentity| *peer == pin);
    let listener = PeerListener::bind(LOOPBACK, &server, admits, limits(), handler).unwrap();
    let addr = listener.local_addr();
    let mut near = Link::connect(addr, &client, server.pin(), deadlines()).unwrap();
    let _half = TcpStream::connect(addr).unwrap();
    let started = std::time::Instant::now();
    drop(listener);
    assert!(started.elapsed() < LONG / 2);
    assert!(matches!(ended.try_recv(), Ok(Err(LinkError::Cancelled))));
    assert!(near.recv(10).is_err());
    assert!(TcpStream::connect(addr).is_err());
}

#[test]
fn a_handler_that_panics_gives_its_place_back() {
    let (server, client) = (identity(), identity());
    let pin = *client.pin();
    let handler = Arc::new(|_: Link| panic!("expected by the test"));
    let admits: PeerFilter = Arc::new(move |peer: &PeerIdentity| *peer == pin);
    let limits = ListenerLimits { max_links: 1, reserved_links_per_peer: 0, ..limits() };
    let listener = PeerListener::bind(LOOPBACK, &server, admits, limits, handler).unwrap();
    for _ in 0..3 {
        // The place may take a moment to be free again.
        while Link::connect(listener.local_addr(), &client, server.pin(), deadlines()).is_err() {
            thread::yield_now();
        }
    }
}
