//! Row 52: who connects, by TLS, to the API and to the peer port.

use super::*;

/// Shows a chain whether or not the key belongs to it, as a thief would that has the certificate alone.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl rustls::client::ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

type Shows = Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>;

/// What a client gets that shows these certificates and sends a request at once: the first bytes of an
/// answer, or the error that the connection ended with. `None`: neither within the time, so the handshake
/// held and the server waits for more.
fn tls(address: &str, alpn: &[u8], shows: Shows, first: &[u8]) -> Option<std::io::Result<Vec<u8>>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match shows {
        Some((chain, key)) => {
            let key = provider.key_provider.load_private_key(key).unwrap();
            config.with_client_cert_resolver(Arc::new(Shown(Arc::new(CertifiedKey::new(chain, key)))))
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let mut session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    let mut answer = vec![0; 4096];
    let got = stream.write_all(first).and_then(|()| stream.read(&mut answer));
    match got {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        Err(e) => Some(Err(e)),
        Ok(n) => {
            answer.truncate(n);
            Some(Ok(answer))
        }
    }
}

const WHOAMI: &[u8] = b"GET /v1/whoami HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

/// A certificate of `params` from `issuer`, and its key.
fn issued(issuer: &Authority, params: &CertificateParams) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap().der().clone(), key)
}

/// One that nobody signed but its own key.
fn self_signed(params: &CertificateParams) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().der().clone(), key)
}

fn hello_of_tls12(address: &str) -> Vec<u8> {
    // A ClientHello of TLS 1.2 as RFC 5246 section 7.4.1.2 has it, without the extension that offers 1.3.
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0xc0, 0x2f], &[1, 0], &[0, 0]].concat();
    let mut hello = vec![22, 3, 1, 0, (body.len() + 4) as u8, 1, 0, 0, body.len() as u8];
    hello.extend(body);
    raw(address, &hello)
}

/// What is answered to these bytes over plain TCP.
fn raw(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset ends it as well as a close.
    let _ = socket.read_to_end(&mut answer);
    answer
}

#[test]
fn row_52_the_api_lets_no_wrong_certificate_in() {
    let (ca, foreign) = (authority("test authority"), authority("another authority"));
    let server = issued(&ca, &named("localhost"));
    let d = Daemon::start_as("a", &[], |dir| {
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        std::fs::write(at("ca.pem"), ca.pem()).unwrap();
        let pem = issued_pem(&server.0);
        std::fs::write(at("server.pem"), pem).unwrap();
        std::fs::write(at("server.key"), server.1.serialize_pem()).unwrap();
        std::fs::set_permissions(at("server.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        let config =
            "[access.certificates]\n\"dns:ops.example\" = \"operator\"\n[limits]\nhandshake_seconds = 1\n";
        std::fs::write(at("config.toml"), config).unwrap();
        let socket = format!("unix:{}", at("state/mirrorvmd.sock"));
        let words = [
            ["--config", &at("config.toml")],
            ["--listen", "tls:127.0.0.1:0"],
            ["--listen", &socket],
            ["--tls-certificate", &at("server.pem")],
            ["--tls-key", &at("server.key")],
            ["--tls-client-ca", &at("ca.pem")],
        ];
        words.concat().iter().map(ToString::to_string).collect()
    });
    let address = d.listens("tls:");
    let ask = |shows: Shows| tls(&address, b"http/1.1", shows, WHOAMI).expect("an answer or an end");
    let text = |shows: Shows| String::from_utf8(ask(shows).unwrap()).unwrap();

    // Who may, may: a refusal below is not one of everybody.
    let (ops, ops_key) = issued(&ca, &named("ops.example"));
    assert!(text(Some((vec![ops.clone()], private(&ops_key)))).starts_with("HTTP/1.1 200"));
    // With neither certificate nor token, nothing but who one is not is told.
    assert!(text(None).starts_with("HTTP/1.1 401"));
    // Of the same authority, and somebody else: refused by role.
    let (other, other_key) = issued(&ca, &named("other-host.example"));
    assert!(text(Some((vec![other.clone()], private(&other_key)))).starts_with("HTTP/1.1 403"));

    let mut old = named("ops.example");
    old.not_after = rcgen::date_time_ymd(2020, 1, 2);
    let mut early = named("ops.example");
    early.not_before = rcgen::date_time_ymd(2098, 1, 1);
    // A leaf that signs: its own issuer never let it.
    let leaf = CertifiedIssuer::signed_by(named("ops.example"), KeyPair::generate().unwrap(), &ca).unwrap();
    let (below, below_key) = issued(&leaf, &named("ops.example"));
    let (alone, alone_key) = self_signed(&named("ops.example"));
    let (strange, strange_key) = issued(&foreign, &named("ops.example"));
    let (expired, expired_key) = issued(&ca, &old);
    let (unborn, unborn_key) = issued(&ca, &early);
    let refused: [(&str, Vec<CertificateDer<'static>>, &KeyPair); 7] = [
        ("self-signed", vec![alone], &alone_key),
        ("of another authority", vec![strange.clone(), foreign.der().clone()], &strange_key),
        ("expired", vec![expired], &expired_key),
        ("not yet valid", vec![unborn], &unborn_key),
        ("signed by a leaf", vec![below.clone(), leaf.der().clone()], &below_key),
        (
            "signed by a leaf, above it the authority",
            vec![below, leaf.der().clone(), ca.der().clone()],
            &below_key,
        ),
        ("another's certificate without its key", vec![ops.clone()], &other_key),
    ];
    for (what, chain, key) in refused {
        let end = ask(Some((chain, private(key))));
        assert!(end.is_err(), "{what}: {:?}", String::from_utf8_lossy(&end.unwrap()));
    }
    for (what, answer) in [("plain", raw(&address, WHOAMI)), ("TLS 1.2", hello_of_tls12(&address))] {
        // At most an alert: a record of type 21.
        assert!(answer.is_empty() || answer[0] == 21, "{what}: {answer:?}");
    }
    // None of them was a request: what was answered above is all that was asked.
    let metrics = d.get("/metrics").expect(200).text();
    let count = |status: &str| {
        let line = format!("mirrorvm_http_requests_total{{operation=\"whoami_get\",status=\"{status}\"}} ");
        metrics.lines().find_map(|l| l.strip_prefix(&line)?.parse::<u64>().ok()).unwrap_or(0)
    };
    assert_eq!((count("2xx"), count("4xx")), (1, 2), "{metrics}");
    assert!(text(Some((vec![ops], private(&ops_key)))).starts_with("HTTP/1.1 200"));
}

fn issued_pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|c| std::str::from_utf8(c).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// The keys of a daemon, as whoever has its state directory would have them.
fn keys_of(d: &Daemon) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let dir = d.state_dir().join("identity");
    let certificate = CertificateDer::from_pem_file(dir.join("host-certificate.pem")).unwrap();
    (vec![certificate], PrivateKeyDer::from_pem_file(dir.join("host-key.pem")).unwrap())
}

#[test]
fn row_52_the_peer_port_lets_nobody_in_but_known_hosts() {
    let (a, known, stranger) = (Daemon::start("a"), Daemon::start("b"), Daemon::start("c"));
    a.add_peer(&known, &known.peer_address);
    // Sends what is no frame: whoever is let in is heard, and cut for it.
    let ask = |shows: Shows| tls(&a.peer_address, b"mirrorvm/1", shows, &[0xff; 64]);
    let (ca, foreign) = (authority("test authority"), authority("other"));
    let (of_ca, of_ca_key) = issued(&ca, &named("b"));
    let (alone, alone_key) = self_signed(&named("b"));
    let mut old = named("b");
    old.not_after = rcgen::date_time_ymd(2020, 1, 2);
    let (expired, expired_key) = self_signed(&old);
    let leaf = CertifiedIssuer::signed_by(named("b"), KeyPair::generate().unwrap(), &foreign).unwrap();
    let (below, below_key) = issued(&leaf, &named("b"));
    let (shown, _) = keys_of(&known);
    let refused: [(&str, Shows); 7] = [
        ("no certificate", None),
        ("self-signed", Some((vec![alone], private(&alone_key)))),
        ("expired", Some((vec![expired], private(&expired_key)))),
        ("of an authority", Some((vec![of_ca, ca.der().clone()], private(&of_ca_key)))),
        ("signed by a leaf", Some((vec![below, leaf.der().clone()], private(&below_key)))),
        ("a good host that is not known here", Some(keys_of(&stranger))),
        ("a known host's certificate without its key", Some((shown, private(&alone_key)))),
    ];
    for (what, shows) in refused {
        let alert = match ask(shows) {
            Some(Err(e)) => e.to_string(),
            other => panic!("{what}: {other:?}"),
        };
        assert!(alert.contains("alert") || alert.contains("reset"), "{what}: {alert}");
    }
    for (what, answer) in
        [("plain", raw(&a.peer_address, WHOAMI)), ("TLS 1.2", hello_of_tls12(&a.peer_address))]
    {
        assert!(answer.is_empty() || answer[0] == 21, "{what}: {answer:?}");
    }
    // The known one is let in: the end that it is given is one of the protocol above, not of the handshake.
    let let_in = ask(Some(keys_of(&known)));
    if let Some(Err(e)) = &let_in {
        assert!(!e.to_string().contains("alert"), "{e}");
    }
    assert_eq!(a.items("/v1/migrations"), [] as [Value; 0]);
    let _ = a.get("/livez").expect(200);
}
