//! Crowds at the peer port of real daemons: strangers that are silent, slow, or have keys of their own, and
//! peers that announce more than they send. Migrations go on, doubts are settled, memory stays.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mirrorvm::chain::chain;
use mirrorvm::migration::wire::{self, Hello, Purpose, kind};
use mirrorvm::transport::{FrameHeader, Identity, PeerIdentity};
use mirrorvm_tests::{AnyServer, Daemon, embedded, kvm, migration, until};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::json;

const GUEST: &str = "g1";

/// A connection from a loopback address of its own.
fn connect_from(last: u8, to: SocketAddr) -> TcpStream {
    let fd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&fd, &SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0)).unwrap();
    rustix::net::connect(&fd, &to).unwrap();
    TcpStream::from(fd)
}

fn many_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
}

fn metric(daemon: &Daemon, name: &str) -> u64 {
    let reply = daemon.get("/metrics").expect(200);
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse().unwrap())
}

/// A key that a test has, to speak to a daemon as no link of ours would.
struct Speaker {
    config: Arc<ClientConfig>,
    pin: PeerIdentity,
}

type Raw = StreamOwned<ClientConnection, TcpStream>;

impl Speaker {
    fn new(dir: &Path) -> Self {
        let pin = *Identity::create(dir).unwrap().pin();
        let certificate = CertificateDer::from_pem_file(dir.join("host-certificate.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(dir.join("host-key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        config.alpn_protocols = vec![b"mirrorvm/1".to_vec()];
        Self { config: Arc::new(config), pin }
    }

    /// TLS as far as this end is concerned: the client's part of the handshake is sent.
    fn handshake(&self, stream: TcpStream) -> Option<Raw> {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let connection = ClientConnection::new(Arc::clone(&self.config), "x".try_into().unwrap()).unwrap();
        let mut tls = StreamOwned::new(connection, stream);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock).ok()?;
        }
        Some(tls)
    }

    /// A link that says hello to start a migration, announces `announced` bytes and sends eight.
    fn boaster(&self, stream: TcpStream, announced: u32) -> Option<Raw> {
        let mut tls = self.handshake(stream)?;
        let mut frame = [0; 8];
        tls.read_exact(&mut frame).ok()?;
        assert_eq!(frame, FrameHeader { kind: 0, len: 0 }.encode(), "admitted");
        let hello = Hello {
            protocol_versions: wire::PROTOCOL_VERSIONS.to_vec(),
            host: "us".into(),
            purpose: Purpose::Migrate {},
        };
        let hello = serde_json::to_vec(&hello).unwrap();
        let header = FrameHeader { kind: kind::HELLO, len: hello.len() as u32 };
        tls.write_all(&[&header.encode()[..], &hello].concat()).ok()?;
        tls.read_exact(&mut frame).ok()?;
        let answer = FrameHeader::decode(frame, 1 << 16).unwrap();
        assert_eq!(answer.kind, kind::HELLO_ACK);
        tls.read_exact(&mut vec![0; answer.len as usize]).ok()?;
        let boast = FrameHeader { kind: kind::PREPARE, len: announced };
        tls.write_all(&[&boast.encode()[..], &[b'['; 8]].concat()).ok()?;
        Some(tls)
    }
}

/// A session that the daemon does not know: told so, it was reached, and would have settled a doubt.
fn ask_what_became(daemon: &Daemon, us: &Identity) {
    let at: SocketAddr = daemon.peer_address.parse().unwrap();
    let peer = (at.into(), daemon.identity.parse().unwrap());
    let session = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11".parse().unwrap();
    let told = mirrorvm::migration::resolve(&peer, us, "us", session).unwrap_err();
    assert_eq!(told.code().as_str(), "unknown_session", "{}", chain(&told));
}

#[test]
fn no_crowd_of_strangers_stops_a_migration_or_the_settling_of_a_doubt() {
    if !kvm() {
        return;
    }
    many_descriptors();
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let dir = tempfile::tempdir().unwrap();
    let us = Identity::create(&dir.path().join("us")).unwrap();
    let known = json!({"name": "us", "address": "127.0.0.1:1", "identity": us.pin().to_string()});
    for daemon in [&a, &b] {
        let _ = daemon.post("/v1/hosts", &known).expect(201);
    }
    let stranger = Speaker::new(&dir.path().join("stranger"));
    a.run_guest(&embedded(GUEST, 16, 1 << 20));

    let at = |daemon: &Daemon| daemon.peer_address.parse::<SocketAddr>().unwrap();
    let crowd = |count: usize, addresses: u8, to: &Daemon| {
        (0..count).map(|n| connect_from(1 + n as u8 % addresses, at(to))).collect::<Vec<_>>()
    };
    // Each guest's way leads through another crowd, at the destination's port.
    let mut way = [(&a, &b), (&b, &a)].into_iter().cycle();
    let mut go = |what: &str| {
        let (from, to) = way.next().unwrap();
        let id = from.migrate(&migration(GUEST, &to.name, "precopy"));
        let end = from.migration_end(&id);
        assert_eq!(end["state"], "succeeded", "{what}: {end}");
        ask_what_became(to, &us);
    };

    let silent = crowd(32, 1, &b);
    go("32 silent connections from one address");
    drop(silent);
    let silent = crowd(512, 8, &a);
    go("512 silent connections from eight addresses");
    drop(silent);
    let mut slow = crowd(200, 4, &b);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter().chain(std::iter::repeat(7));
            for byte in hello.take(300) {
                // Whoever gave way does not take it.
                slow.iter_mut().for_each(|stream| drop(stream.write(&[byte])));
                if done.load(Ordering::Acquire) {
                    return;
                }
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        go("200 connections that send a byte a second");
        done.store(true, Ordering::Release);
    });
    drop(slow);
    let with_keys: Vec<_> =
        (0..100).filter_map(|n| stranger.handshake(connect_from(1 + n % 4, at(&a)))).collect();
    go("strangers with keys of their own");
    drop(with_keys);
    for daemon in [&a, &b] {
        assert!(metric(daemon, "mirrorvm_peer_connections_turned_away_total{reason=\"gave_way\"}") > 0);
        let lines = daemon.log().matches("peer connection refused").count();
        assert!(lines < 60, "{lines} lines of the log about strangers");
        until("nothing of the crowds stays", 60, || metric(daemon, "mirrorvm_peer_handshakes") == 0);
        until("nor of the migrations", 60, || metric(daemon, "mirrorvm_peer_links") == 0);
    }
    let refused = "mirrorvm_peer_connections_turned_away_total{reason=\"not_admitted\"}";
    assert!(metric(&a, refused) >= 50, "{}", metric(&a, refused));
}

/// A line of /proc/PID/status, in bytes.
fn status(daemon: &Daemon, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn two_hundred_peers_that_announce_much_and_send_little_cost_little_and_are_shown() {
    const LINKS: u64 = 200;
    // Half of it is the stack of the thread that waits, and TLS.
    const EACH: u64 = 96 << 10;
    many_descriptors();
    let b = Daemon::start("b");
    let dir = tempfile::tempdir().unwrap();
    let us = Identity::create(&dir.path().join("us")).unwrap();
    let boasters: Vec<Speaker> = (0..4).map(|n| Speaker::new(&dir.path().join(format!("b{n}")))).collect();
    let mut known: Vec<_> = boasters.iter().map(|s| s.pin).collect();
    known.push(*us.pin());
    for (at, pin) in known.iter().enumerate() {
        let host = json!({"name": format!("h{at}"), "address": "127.0.0.1:1", "identity": pin.to_string()});
        let _ = b.post("/v1/hosts", &host).expect(201);
    }
    ask_what_became(&b, &us);
    // The peak counts, not what is left when somebody comes to look.
    std::fs::write(format!("/proc/{}/clear_refs", b.pid()), "5").unwrap();
    let before = status(&b, "VmHWM");
    let (at, most) = (b.peer_address.parse().unwrap(), AtomicU64::new(0));
    let opened: usize = std::thread::scope(|scope| {
        let open = |boaster| {
            let open = move || {
                let links = (0..LINKS / 4).map(|_| Speaker::boaster(boaster, connect_from(1, at), 16 << 20));
                links.flatten().collect::<Vec<_>>()
            };
            scope.spawn(open)
        };
        let threads: Vec<_> = boasters.iter().map(open).collect();
        while !threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            most.fetch_max(metric(&b, "mirrorvm_peer_links"), Ordering::Relaxed);
        }
        let links: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        most.fetch_max(metric(&b, "mirrorvm_peer_links"), Ordering::Relaxed);
        ask_what_became(&b, &us);
        links.len()
    });
    assert_eq!(opened as u64, LINKS);
    let (grown, most) = (status(&b, "VmHWM") - before, most.into_inner());
    println!("{most} links at once, {} KiB each", grown / 1024 / most.max(1));
    assert!(grown < LINKS * EACH, "{LINKS} links cost {grown} bytes");
    // They are given ten seconds; on a slow machine the first are gone before the last have come.
    assert!(most >= 20, "only {most} links were there at once");
    until("links that do not go on end", 60, || metric(&b, "mirrorvm_peer_links") == 0);
    assert_eq!(metric(&b, "mirrorvm_peer_message_bytes"), 0);
}
