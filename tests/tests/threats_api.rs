//! The list of threats to the API, row by row: every test's name begins with its row. What other programs
//! show of a row is named here too.
//!
//! | row | shown by |
//! |---|---|
//! | 52, who connects | `row_52_the_api_lets_no_wrong_certificate_in`, `row_52_the_peer_port_lets_nobody_in_but_known_hosts`; `api_access`: `over_tls_callers_are_their_certificates_or_tokens`; the library's `transport/tests/refusals.rs` |
//! | 53, slow and large | `row_53_a_client_of_one_byte_at_a_time_is_cut`, `row_53_bodies_and_heads_beyond_the_bounds_are_refused`, `row_53_a_thousand_idle_connections_keep_nobody_out`; `api_access`: `slow_and_greedy_clients_hurt_themselves_alone` |
//! | 54, ids | `row_54_ids_that_are_none_reach_no_file`; `api_access`: `each_role_may_do_what_is_its_own_and_no_more` (another tenant's id) |
//! | 55, other users | `row_55_another_user_on_the_socket_is_refused_and_logged`, `row_55_a_reader_that_asks_for_changes_is_refused_and_logged` |
//! | 56, overrides | `row_56_overrides_of_a_migration_need_the_role_of_what_they_do`, `row_56_headers_do_not_change_what_is_asked_or_who_asks` |
//! | 57, links at start | `row_57_links_in_place_of_the_daemons_files_are_refused_at_start` |
//! | 58, secrets | `row_58_secrets_are_in_no_log_answer_metric_or_environment`, `row_58_the_daemon_and_its_children_dump_no_core`; `api_access`: `tokens_are_told_once_withdrawn_and_expire` |
//! | 59, system calls | of the daemon, not the API: its unit has no system call filter, and nothing here claims one |
//! | 60, any bad field | `row_60_every_body_of_the_document_is_checked_field_by_field`, `row_60_methods_that_a_path_does_not_have_are_refused`; by hand and exactly: `bad_input` |
//! | 61, dependencies | `row_61_every_dependency_is_vetted` |

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_tests::{AnyServer, Daemon, Reply, Request, daemon_binary, embedded, kvm, repository, until};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, SignatureScheme};
use serde_json::{Map, Value, json};

/// No pace: these tests send more than a person would.
const HURRIED: (&str, &str) = ("MIRRORVM_LIMITS_REQUESTS_PER_SECOND", "0");
const LONG: Duration = Duration::from_secs(20);

fn token(d: &Daemon, role: &str) -> String {
    let mut body = json!({"name": role, "role": role, "expires_in_seconds": 600});
    if role == "vmm" {
        body["guest"] = json!("g1");
    }
    d.post("/v1/tokens", &body).expect(201).json()["secret"].as_str().unwrap().to_owned()
}

fn bearing(request: Request, secret: &str) -> Request {
    request.header("authorization", &format!("Bearer {secret}"))
}

/// The entry of the audit log about `reply`.
fn audited(d: &Daemon, reply: &Reply) -> Value {
    let id = reply.header("x-request-id").unwrap();
    let log = d.items("/v1/audit-log?limit=1000");
    log.into_iter().find(|e| e["request_id"] == id).unwrap_or_else(|| panic!("no entry of {id}"))
}

// ---- 52

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

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2099, 1, 1);
    params
}

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

// ---- 53

/// The daemon's socket, and `text` sent to it.
fn open(d: &Daemon, text: &[u8]) -> UnixStream {
    let mut socket = UnixStream::connect(d.socket()).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.set_write_timeout(Some(LONG)).unwrap();
    let _ = socket.write_all(text);
    socket
}

fn rest(mut socket: &UnixStream) -> String {
    let mut text = Vec::new();
    let _ = socket.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Sends `bytes` one by one, each when nothing came back for a tenth of a second, until the server ends it;
/// what it said.
fn dribble(mut socket: UnixStream, bytes: &[u8]) -> String {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut said = Vec::new();
    for byte in bytes {
        if socket.write_all(&[*byte]).is_err() {
            break;
        }
        let mut piece = [0; 4096];
        match socket.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(&piece[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(_) => break,
        }
        let _ = socket.set_read_timeout(Some(LONG));
        let _ = socket.read_to_end(&mut said);
        break;
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn row_53_a_client_of_one_byte_at_a_time_is_cut() {
    let d = Daemon::start_with(
        "a",
        &[("MIRRORVM_LIMITS_HEADER_SECONDS", "1"), ("MIRRORVM_LIMITS_BODY_SECONDS", "1"), HURRIED],
    );
    // Ten bytes a second for a minute, were they let.
    let begun = Instant::now();
    let said = dribble(open(&d, b""), &[b"GET /livez HTTP/1.1\r\nx: ", &[b'y'; 600][..]].concat());
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    let head = b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 600\r\n\r\n";
    let said = dribble(open(&d, head), &[b' '; 600]);
    assert!(said.starts_with("HTTP/1.1 408") && said.contains("request_timeout"), "{said}");
    // In chunks of one byte that have no end.
    let chunked = b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let said = dribble(open(&d, chunked), &b"1\r\n \r\n".repeat(100));
    assert!(said.starts_with("HTTP/1.1 408"), "{said}");
    // Three deadlines of one second.
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    let _ = d.get("/livez").expect(200);
    assert_eq!(d.items("/v1/guests"), [] as [Value; 0]);
}

#[test]
fn row_53_bodies_and_heads_beyond_the_bounds_are_refused() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let head = |more: &str| {
        format!("POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}\r\n")
    };
    // Said beforehand, and found out on the way.
    for length in [(64 << 10) + 1, u64::MAX] {
        let answer = rest(&open(&d, head(&format!("content-length: {length}\r\n")).as_bytes()));
        let status = answer.split(' ').nth(1).unwrap_or_default().to_owned();
        assert!(["413", "400", "431"].contains(&status.as_str()), "{length}: {answer}");
    }
    let socket = open(&d, head("transfer-encoding: chunked\r\n").as_bytes());
    let chunk = [b"4000\r\n".to_vec(), vec![b' '; 0x4000], b"\r\n".to_vec()].concat();
    let mut sent = 0;
    while (&socket).write_all(&chunk).is_ok() {
        sent += chunk.len();
        assert!(sent < 64 << 20, "an endless body is read on and on");
    }
    let answer = rest(&socket);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    for large in [
        // One header of 1 MiB; many; a target.
        [b"GET /livez HTTP/1.1\r\nhost: x\r\nx: ".to_vec(), vec![b'y'; 1 << 20]].concat(),
        [b"GET /livez HTTP/1.1\r\nhost: x\r\n".to_vec(), b"a: b\r\n".repeat(180_000)].concat(),
        [b"GET /".to_vec(), vec![b'y'; 1 << 20]].concat(),
    ] {
        let answer = rest(&open(&d, &[&large[..], b"\r\n\r\n"].concat()));
        let status = answer.split(' ').nth(1).unwrap_or("cut").to_owned();
        assert!(["431", "414", "cut"].contains(&status.as_str()), "{answer}");
        let _ = d.get("/livez").expect(200);
    }
}

#[test]
fn row_53_a_thousand_idle_connections_keep_nobody_out() {
    let d = Daemon::start_with(
        "a",
        &[("MIRRORVM_LIMITS_HEADER_SECONDS", "2"), ("MIRRORVM_LIMITS_CONNECTIONS", "1000"), HURRIED],
    );
    // As many as there may be, some silent, some with half a head.
    let idle: Vec<UnixStream> =
        (0..1000).map(|n| open(&d, if n % 2 == 0 { b"" } else { b"GET / HTTP/1.1\r\nx: " })).collect();
    let begun = Instant::now();
    for _ in 0..10 {
        let _ = d.get("/readyz").expect(200);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // Every one is cut by the server, and nothing of them stays.
    for socket in &idle {
        let _ = rest(socket);
    }
    drop(idle);
    until("the idle ones' descriptors are gone", 10, || d.census().fds < 100);
}

// ---- 54

/// The document as it is committed.
fn document() -> Value {
    serde_json::from_slice(&std::fs::read(repository().join("openapi/v1.json")).unwrap()).unwrap()
}

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// Every operation: method in capitals, path, its definition.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in METHODS {
            if let Some(operation) = item.get(method) {
                found.push((method.to_ascii_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    found
}

/// The media type and an example of an operation's body, if it has one.
fn body_of(document: &Value, operation: &Value) -> Option<(String, Value)> {
    let (kind, media) = operation["requestBody"]["content"].as_object()?.iter().next()?;
    let schema = match media["schema"]["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => &media["schema"],
    };
    let example = media.get("example").or_else(|| schema.get("example")).cloned().unwrap_or(Value::Null);
    Some((kind.clone(), example))
}

/// Paths, sizes and times of change of everything below `dir`, but for what every request may write: the
/// database and what belongs to it.
fn listing(dir: &Path) -> BTreeSet<(PathBuf, u64, i64)> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            let database = path.file_name().unwrap().to_string_lossy().starts_with("mirrorvm.");
            if meta.is_dir() {
                open.push(path.clone());
            }
            let (size, time) = if database {
                (0, 0)
            } else {
                (meta.len(), meta.mtime() * 1_000_000_000 + meta.mtime_nsec())
            };
            found.insert((path, size, time));
        }
    }
    found
}

#[test]
fn row_54_ids_that_are_none_reach_no_file() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    // Beside the state directory: what a climbing path would reach.
    std::fs::write(d.directory().join("secret"), "canary-of-row-54").unwrap();
    let document = document();
    let before = listing(&d.state_dir());
    let long = "x".repeat(300);
    let ids = [
        "..",
        ".",
        "../..",
        "../secret",
        "..%2f..%2fsecret",
        "%2e%2e",
        "%2e%2e%2fsecret",
        "%2e",
        "..%5c..%5csecret",
        "%2fetc%2fpasswd",
        "g1%00",
        "%00",
        "g1%0a",
        "g1%20",
        "%ff%fe",
        "%c0%ae%c0%ae%c0%afsecret",
        "g%D1%96",
        "%EF%BD%871",
        "g1%E2%80%8B",
        "G1",
        "g1;a=b",
        "g1%3f",
        "%25",
        "mirrorvm.db",
        "'%20or%201=1--",
        long.as_str(),
    ];
    let (mut sent, mut wrong) = (0, Vec::new());
    for (method, path, operation) in operations(&document) {
        let parameters: Vec<&str> =
            path.split('/').filter_map(|p| p.strip_prefix('{')?.strip_suffix('}')).collect();
        let body = body_of(&document, &operation);
        for at in &parameters {
            for id in ids {
                // The other parameters name what is there.
                let mut target = path.replace(&format!("{{{at}}}"), id);
                for other in &parameters {
                    target = target
                        .replace(&format!("{{{other}}}"), if *other == "guest" { "g1" } else { "ram0" });
                }
                let mut request = Request::new(&method, &target);
                match &body {
                    Some((kind, Value::Null)) => {
                        request = request.header("content-type", kind).body(vec![0; 64])
                    }
                    Some((kind, example)) => {
                        request = request.header("content-type", kind).body(example.to_string());
                    }
                    None => {}
                }
                let reply = d.send(&request);
                sent += 1;
                // An id that the caller chooses is a value like others.
                let refused = if method == "PUT" { 422 } else { 404 };
                if ![400, 404, refused].contains(&reply.status) || reply.text().contains("canary-of-row-54") {
                    wrong.push(format!("{method} {target:.80}: {} {:.200}", reply.status, reply.text()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{sent} requests");
    assert!(sent > 1000);
    assert_eq!(listing(&d.state_dir()), before, "a file was touched");
    assert_eq!(d.items("/v1/guests").len(), 1);
}

// ---- 55

/// Status and body of what curl gets as the user `uid`; `None`, said loudly, where that cannot be tried.
fn as_user(uid: u32, socket: &Path, arguments: &[&str]) -> Option<(u16, String)> {
    let run = |uid: u32, arguments: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid", &uid.to_string(), "--regid", &uid.to_string(), "--clear-groups", "curl", "-s"])
            .args(["-w", "\n%{http_code}", "--unix-socket"])
            .arg(socket)
            .args(arguments)
            .output()
    };
    if !rustix::process::geteuid().is_root()
        || !run(0, &["http://localhost/livez"]).is_ok_and(|o| o.status.success())
    {
        println!("SKIPPED (not root, or no setpriv or curl): another user on the socket");
        return None;
    }
    let text = String::from_utf8(run(uid, arguments).unwrap().stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    Some((status.parse().unwrap(), body.to_owned()))
}

/// Opens the way to a daemon's socket to everybody, as an administrator may.
fn open_the_way(d: &Daemon) {
    for (path, mode) in [(d.directory().to_owned(), 0o711), (d.state_dir(), 0o711), (d.socket(), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn row_55_another_user_on_the_socket_is_refused_and_logged() {
    let d = Daemon::start("a");
    let socket = d.socket();
    let make = |name: &str| {
        let body = embedded(name, 8, 0).to_string();
        let words = ["-H", "content-type: application/json", "-d", &body, "http://localhost/v1/guests"];
        as_user(65534, &socket, &words)
    };
    // As it is made, the socket is nobody else's at all: no connection, so no status.
    let Some((closed, _)) = make("g1") else { return };
    assert_eq!(closed, 0);
    open_the_way(&d);
    let (status, body) = make("g1").unwrap();
    assert_eq!(status, 403, "{body}");
    for target in ["/v1/guests", "/v1/tokens", "/v1/audit-log", "/metrics", "/v1/whoami", "/v1/events/stream"]
    {
        let (status, body) = as_user(65534, &socket, &[&format!("http://localhost{target}")]).unwrap();
        assert_eq!(status, 403, "{target}: {body}");
        assert!(body.contains("\"forbidden\""), "{target}: {body}");
    }
    let log = d.items("/v1/audit-log");
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(
        (&log[0]["operation"], &log[0]["status"], &log[0]["code"]),
        (&json!("guest_create"), &json!(403), &json!("forbidden"))
    );
    assert_eq!(d.items("/v1/guests"), [] as [Value; 0]);
}

#[test]
fn row_55_a_reader_that_asks_for_changes_is_refused_and_logged() {
    let d = Daemon::start_as("a", &[HURRIED], |dir| {
        let config = dir.join("config.toml");
        std::fs::write(&config, "[access.users]\n65534 = \"viewer\"\n").unwrap();
        vec!["--config".into(), config.to_str().unwrap().into()]
    });
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let secret = token(&d, "viewer");
    let document = document();
    let mut refused = 0;
    for (method, path, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap();
        let secrets = ["token_list", "audit_log_list"].contains(&id);
        // These two compute and change nothing.
        if (method == "GET" && !secrets)
            || ["address_space_plan_create", "migration_check_create"].contains(&id)
            // Everybody's own: who has a link's code, and who has a session.
            || ["session_create", "session_delete"].contains(&id)
        {
            continue;
        }
        let mut target = path.clone();
        for (name, value) in [("guest", "g1"), ("block", "ram0")] {
            target = target.replace(&format!("{{{name}}}"), value);
        }
        let target = target
            .split('/')
            .map(|p| if p.starts_with('{') { "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11" } else { p });
        let target = target.collect::<Vec<_>>().join("/");
        let mut request = bearing(Request::new(&method, &target), &secret);
        if let Some((kind, example)) = body_of(&document, &operation) {
            request = request.header("content-type", &kind).body(example.to_string());
        }
        let reply = d.send(&request);
        assert_eq!((reply.status, reply.problem().as_str()), (403, "forbidden"), "{id}");
        if method != "GET" {
            let entry = audited(&d, &reply);
            assert_eq!(
                (&entry["operation"], &entry["role"], &entry["status"], &entry["code"]),
                (&json!(id), &json!("viewer"), &json!(403), &json!("forbidden")),
                "{entry}"
            );
        }
        refused += 1;
    }
    assert!(refused > 25, "{refused}");
    assert_eq!(d.items("/v1/guests").len(), 1);
    // The same by user id.
    open_the_way(&d);
    let socket = d.socket();
    let Some((status, body)) = as_user(65534, &socket, &["http://localhost/v1/guests/g1"]) else { return };
    assert_eq!(status, 200, "{body}");
    let (status, body) = as_user(65534, &socket, &["-X", "DELETE", "http://localhost/v1/guests/g1"]).unwrap();
    assert_eq!(status, 403, "{body}");
    let last = &d.items("/v1/audit-log?operation=guest_delete")[0];
    assert_eq!((&last["principal"], &last["status"]), (&json!("unix:65534"), &json!(403)));
}

// ---- 56

#[test]
fn row_56_overrides_of_a_migration_need_the_role_of_what_they_do() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let base = json!({"guest": "g1", "destination": {"kind": "host", "host": "b"}});
    let with = |name: &str, value: Value| {
        let mut body = base.clone();
        body[name] = value;
        body
    };
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let overrides = [
        ("plain", base.clone()),
        (
            "helper image",
            with("mirror", json!({"kind": "template", "strategy": strategy, "helper_image": "other"})),
        ),
        (
            "placement",
            with("mirror", json!({"kind": "template", "strategy": strategy, "placement": {"cpus": [0]}})),
        ),
        ("where to", with("destination", json!({"kind": "ticket", "ticket": "mvmt1.AAAA"}))),
        ("limits", with("limits", json!({"on_timeout": "force"}))),
        ("what becomes of the source", with("on_success", json!({"source": "delete"}))),
        ("nothing that there is", json!({"policy": 0})),
    ];
    let id = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    let secrets: Vec<(&str, String)> = ["vmm", "peer", "viewer"].map(|r| (r, token(&d, r))).into();
    for (role, secret) in &secrets {
        for (what, body) in &overrides {
            for (method, target) in [
                ("POST", "/v1/migrations".to_owned()),
                ("POST", "/v1/migrations?dry_run=true".to_owned()),
                ("PUT", format!("/v1/migrations/{id}")),
                ("PATCH", format!("/v1/migrations/{id}")),
            ] {
                let reply = d.send(&bearing(Request::new(method, &target), secret).json(body));
                let got = (reply.status, reply.problem());
                // Before a field is looked at: who may not ask learns nothing of what would do.
                assert_eq!(got, (403, "forbidden".into()), "{role}, {what}: {method} {target}");
                let entry = audited(&d, &reply);
                assert_eq!((&entry["role"], &entry["status"]), (&json!(role), &json!(403)));
            }
        }
    }
    // Policy, addresses and files are no fields of a migration: hosts and images are made known by an
    // administrator.
    let operator = token(&d, "operator");
    for (name, value) in [
        ("policy", json!(0)),
        ("address", json!("192.0.2.1:1")),
        ("identity", json!("sha256:")),
        ("helper_image_path", json!("/etc/passwd")),
        ("force", json!(true)),
    ] {
        let reply =
            d.send(&bearing(Request::new("POST", "/v1/migrations"), &operator).json(&with(name, value)));
        let body = reply.expect(422).json();
        let pointers: Vec<&str> =
            body["errors"].as_array().unwrap().iter().filter_map(|e| e["pointer"].as_str()).collect();
        assert!(pointers.contains(&format!("/{name}").as_str()), "{body}");
    }
    for (method, target, body) in [
        (
            "POST",
            "/v1/hosts",
            json!({"name": "b", "address": "192.0.2.1:1", "identity": format!("sha256:{}", "ab".repeat(32))}),
        ),
        ("POST", "/v1/helper-images", json!({"name": "other"})),
        ("PATCH", "/v1/host", json!({"migration_slots": 16})),
        ("POST", "/v1/tokens", json!({"name": "more", "role": "admin"})),
    ] {
        let reply = d.send(&bearing(Request::new(method, target), &operator).json(&body));
        assert_eq!((reply.status, reply.problem().as_str()), (403, "forbidden"), "{method} {target}");
    }
    assert_eq!(d.items("/v1/migrations"), [] as [Value; 0]);
}

#[test]
fn row_56_headers_do_not_change_what_is_asked_or_who_asks() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let viewer = token(&d, "viewer");
    for (name, value) in [
        ("x-http-method-override", "DELETE"),
        ("x-method-override", "DELETE"),
        ("x-original-url", "/v1/tokens"),
        ("x-rewrite-url", "/v1/tokens"),
        ("x-forwarded-user", "root"),
        ("x-remote-user", "root"),
        ("x-forwarded-for", "127.0.0.1"),
    ] {
        let read = bearing(Request::new("GET", "/v1/guests/g1"), &viewer).header(name, value);
        assert_eq!(d.send(&read).expect(200).json()["name"], "g1", "{name}");
        let write = bearing(Request::new("DELETE", "/v1/guests/g1"), &viewer).header(name, value);
        let _ = d.send(&write).expect(403);
        let who = bearing(Request::new("GET", "/v1/whoami"), &viewer).header(name, value);
        assert_eq!(d.send(&who).expect(200).json()["role"], "viewer", "{name}");
    }
    // Two credentials are none.
    let two = bearing(bearing(Request::new("GET", "/v1/whoami"), &viewer), &token(&d, "admin"));
    let reply = d.send(&two);
    assert!(reply.status == 401 || reply.status == 400, "{}", reply.text());
    let _ = d.get("/v1/guests/g1").expect(200);
}

// ---- 57

/// How a daemon ends that does not come to serving: whether it did, and what it said.
fn refused_start(arguments: &[&std::ffi::OsStr]) -> (bool, String) {
    let mut child = Command::new(daemon_binary())
        .arg("serve")
        .args(arguments)
        .env_remove("MIRRORVM_STATE_DIR")
        .stdin(Stdio::piped())
        .arg("--exit-with-stdin")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that serves after all would end here, in order.
    let stdin = child.stdin.take();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        mirrorvm_tests::until_some("the end of a start that must fail", 20, || child.try_wait().unwrap())
    }));
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    (ended.is_ok_and(|s| !s.success()), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn row_57_links_in_place_of_the_daemons_files_are_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let start = |state: &Path, more: &[&str]| {
        let mut words = vec!["--state-dir".as_ref(), state.as_os_str()];
        words.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        refused_start(&words)
    };
    let make = |path: PathBuf| {
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path
    };
    // The state directory is a link, to an empty directory and to nowhere: refused, and nothing is made at
    // its end.
    let target = make(at("elsewhere"));
    symlink(&target, at("state-link")).unwrap();
    let (refused, said) = start(&at("state-link"), &[]);
    assert!(refused, "{said}");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0, "something was made where the link led");
    symlink(at("nowhere"), at("dangling")).unwrap();
    let (refused, said) = start(&at("dangling"), &[]);
    assert!(refused && !at("nowhere").exists(), "{said}");
    // One that others may write.
    let open = make(at("open"));
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let (refused, said) = start(&open, &[]);
    assert!(refused, "{said}");

    // Of a daemon that has run, each file in turn is a symbolic link to, or a second name of, the file
    // itself.
    let mut d = Daemon::start("a");
    assert!(d.terminate().success());
    for file in ["mirrorvm.db", "identity", "identity/host-key.pem", "identity/host-certificate.pem"] {
        let path = d.state_dir().join(file);
        let away = d.directory().join("away");
        std::fs::rename(&path, &away).unwrap();
        symlink(&away, &path).unwrap();
        let (refused, said) = start(&d.state_dir(), &[]);
        assert!(refused, "{file} as a symbolic link: {said}");
        std::fs::remove_file(&path).unwrap();
        if away.is_file() {
            std::fs::hard_link(&away, &path).unwrap();
            let (refused, said) = start(&d.state_dir(), &[]);
            assert!(refused, "{file} with a second name: {said}");
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::rename(&away, &path).unwrap();
    }
    // The socket's path, and its lock's.
    let victim = at("victim");
    std::fs::write(&victim, "precious").unwrap();
    for (what, name) in [("socket", "s"), ("lock", "s.lock")] {
        for hard in [false, true] {
            if hard && what == "lock" {
                // Opened, never written: a second name of it does no harm.
                continue;
            }
            let place = at(name);
            if hard {
                std::fs::hard_link(&victim, &place).unwrap()
            } else {
                symlink(&victim, &place).unwrap()
            }
            let listen = format!("unix:{}", at("s").display());
            let (refused, said) = start(&d.state_dir(), &["--listen", &listen]);
            assert!(refused, "{what}, hard: {hard}: {said}");
            assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
            std::fs::remove_file(&place).unwrap();
        }
        let _ = std::fs::remove_file(at("s.lock"));
    }
    // And it was nothing else: as it was, it starts, with the identity that it had.
    d.restart();
    let _ = d.get("/readyz").expect(200);
}

// ---- 58

#[test]
fn row_58_secrets_are_in_no_log_answer_metric_or_environment() {
    let d = Daemon::start_with("a", &[("RUST_LOG", "trace"), HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let admin = token(&d, "admin");
    let identity = format!("sha256:{}", "5a".repeat(32));
    let leave = json!({"source": {"name": "x", "identity": identity}});
    let ticket =
        d.post("/v1/incoming-migrations", &leave).expect(201).json()["ticket"].as_str().unwrap().to_owned();
    let key = std::fs::read_to_string(d.state_dir().join("identity/host-key.pem")).unwrap();
    let key: Vec<&str> = key.lines().filter(|l| !l.starts_with("-----")).collect();
    let canary = "canary-3f1c9d0b7a";
    let canaries = [admin.as_str(), admin.rsplit('_').next().unwrap(), &ticket, key[0], canary];
    let mut answers = String::new();
    let mut send = |request: Request| {
        let reply = d.send(&request);
        answers.push_str(&format!("{:?}{}", reply.headers, reply.text()));
        reply.status
    };
    assert_eq!(send(bearing(Request::new("GET", "/v1/whoami"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/tokens"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/audit-log"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/guests/none"), &admin)), 404);
    // Wrong credentials and secrets in the wrong place are not told back.
    for wrong in [
        format!("Bearer {canary}"),
        format!("Basic {canary}"),
        canary.to_owned(),
        format!("Bearer mvm_{canary}_x"),
    ] {
        assert_eq!(send(Request::new("GET", "/v1/whoami").header("authorization", &wrong)), 401, "{wrong}");
    }
    let body = json!({"guest": "g1", "destination": {"kind": "ticket", "ticket": format!("mvmt1.{canary}")}});
    assert_eq!(send(Request::new("POST", "/v1/migrations").json(&body)), 422);
    let spent = json!({"guest": "g1", "destination": {"kind": "ticket", "ticket": ticket}});
    assert!(send(Request::new("POST", "/v1/migrations").json(&spent)) >= 400);
    assert_eq!(send(Request::new("GET", "/metrics")), 200);
    assert_eq!(send(Request::new("GET", "/v1/events")), 200);
    let log = d.log();
    assert!(log.contains("DEBUG"), "the log says all that it has");
    let proc = |name: &str| std::fs::read(format!("/proc/{}/{name}", d.pid())).unwrap();
    let environ = String::from_utf8_lossy(&proc("environ")).into_owned();
    assert!(environ.contains("RUST_LOG=trace"), "it is the daemon's environment");
    let cmdline = String::from_utf8_lossy(&proc("cmdline")).into_owned();
    for secret in canaries {
        for (place, text) in
            [("log", &log), ("answers", &answers), ("environment", &environ), ("command line", &cmdline)]
        {
            assert!(!text.contains(secret), "{secret:.12}... is in the {place}");
        }
    }
}

#[test]
fn row_58_the_daemon_and_its_children_dump_no_core() {
    let d = Daemon::start("a");
    let dumps_nothing = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"], "{line}");
        // Where dumps are piped to a program the limit does not count, and this does.
        match std::fs::read_to_string(format!("/proc/{pid}/coredump_filter")) {
            Ok(filter) => assert_eq!(u64::from_str_radix(filter.trim(), 16), Ok(0), "{filter}"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::NotFound),
        }
    };
    dumps_nothing(d.pid());
    if mirrorvm_tests::qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no QEMU): core dumps of children");
        return;
    }
    let linux = mirrorvm_tests::linux_guest();
    let guest = json!({
        "name": "q1",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": linux.join("vmlinuz"), "initrd": linux.join("initrd.gz")},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256 << 20, "gpa": 0}]},
    });
    let _ = d.post("/v1/guests", &guest).expect(201);
    let _ = d.act("/v1/guests/q1/start").expect(202);
    d.guest_in("q1", "running");
    let children = mirrorvm_tests::children(d.pid());
    assert!(!children.is_empty());
    children.into_iter().for_each(dumps_nothing);
}

// ---- 60

/// Every place in `value` that has something wrong with it in `mutate`d form: where, and the whole body.
fn mutations(base: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    let mut places = vec![String::new()];
    while let Some(at) = places.pop() {
        let value = base.pointer(&at).unwrap().clone();
        let mut put = |what: &str, wrong: Value| {
            let mut body = base.clone();
            *body.pointer_mut(&at).unwrap() = wrong;
            found.push((at.clone(), what.to_owned(), body));
        };
        let wrong: Vec<(&str, Value)> = match &value {
            Value::Object(_) => {
                vec![("an array", json!([])), ("a string", json!("x")), ("a number", json!(7))]
            }
            Value::Array(_) => vec![("an object", json!({})), ("a string", json!("x"))],
            Value::String(_) => vec![
                ("a number", json!(7)),
                ("an object", json!({})),
                ("true", json!(true)),
                ("empty", json!("")),
                ("long", json!("x".repeat(5000))),
                ("with NUL", json!("a\u{0}b")),
            ],
            Value::Number(_) => vec![
                ("a string", json!("1")),
                ("negative", json!(-1)),
                ("beyond u64", serde_json::from_str("18446744073709551616").unwrap()),
                ("far beyond u64", serde_json::from_str("1e40").unwrap()),
                ("a fraction", json!(1.5)),
                ("an array", json!([1])),
            ],
            Value::Bool(_) => vec![("a number", json!(1)), ("a string", json!("true"))],
            Value::Null => vec![],
        };
        // What a text names need not be there, which is another answer than a field's; and a label may be
        // empty. Of a code nobody is told what is wrong with it.
        let names = at.ends_with("/guest") || at.ends_with("/host") || at == "/confirm" || at == "/code";
        let label = at.starts_with("/labels/");
        for (what, wrong) in wrong {
            let text = wrong.as_str();
            if value.is_string() && text.is_some_and(|t| names || label && t.is_empty()) {
                continue;
            }
            put(what, wrong);
        }
        match value {
            Value::Object(map) => {
                let mut more = base.clone();
                more.pointer_mut(&at).unwrap()["zz_extra"] = json!(7);
                found.push((format!("{at}/zz_extra"), "an extra field".into(), more));
                places.extend(map.keys().map(|k| format!("{at}/{k}")));
            }
            Value::Array(list) => places.extend((0..list.len()).map(|i| format!("{at}/{i}"))),
            _ => {}
        }
    }
    found
}

/// The schema of `name`d component with its references followed.
fn resolved<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

#[test]
fn row_60_every_body_of_the_document_is_checked_field_by_field() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let everything = || {
        ["/v1/guests", "/v1/mirrors", "/v1/migrations", "/v1/hosts", "/v1/helper-images"].map(|p| d.items(p))
    };
    let before = everything();
    let document = document();
    let (mut sent, mut bodies, mut wrong) = (0, 0, Vec::new());
    for (method, path, operation) in operations(&document) {
        let Some((kind, example)) = body_of(&document, &operation) else { continue };
        if !kind.contains("json") {
            continue;
        }
        let id = operation["operationId"].as_str().unwrap();
        assert!(example.is_object(), "{id} has no example of its body");
        bodies += 1;
        // An existing guest, but for the operation that makes one of the caller's id.
        let guest = if id == "guest_put" { "{guest}" } else { "g1" };
        let target = path.replace("{guest}", guest).replace("{block}", "ram0");
        let target: Vec<&str> = target
            .split('/')
            .map(|p| if p.starts_with('{') { "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11" } else { p })
            .collect();
        let target = target.join("/");
        let mut cases = mutations(&example);
        let schema = resolved(&document, &operation["requestBody"]["content"][&kind]["schema"]);
        // A variant's kind is required of all of them.
        let variants = schema["oneOf"].as_array().map(|_| vec![json!("kind")]);
        let required = schema["required"].as_array().cloned().or(variants).unwrap_or_default();
        for field in required.iter().map(|f| f.as_str().unwrap()) {
            let mut missing: Map<String, Value> = example.as_object().unwrap().clone();
            missing.remove(field);
            cases.push((format!("/{field}"), "missing".into(), Value::Object(missing.clone())));
            missing.insert(field.to_owned(), Value::Null);
            cases.push((format!("/{field}"), "null".into(), Value::Object(missing)));
        }
        for (at, what, body) in cases {
            let request = Request::new(&method, &target).header("content-type", &kind).body(body.to_string());
            // A session is only made for who sends it.
            let reply = d.send(&request.header("x-mirrorvm", "1"));
            sent += 1;
            let said = reply.json();
            let errors = said["errors"].as_array().cloned().unwrap_or_default();
            // At the place, in it, or (of what a union cannot be) right above it.
            let named = errors.iter().filter_map(|e| e["pointer"].as_str()).any(|p| {
                let above = at.rsplit_once('/').map_or("", |(above, _)| above);
                p == at || p.starts_with(&format!("{at}/")) || p == above && !above.is_empty()
            });
            if reply.status != 422 || !named {
                wrong.push(format!("{id} {at} {what}: {} {:.300}", reply.status, reply.text()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{sent} bodies of {bodies} operations");
    assert!(bodies >= 20 && sent > 500, "{sent} bodies of {bodies} operations");
    assert_eq!(everything(), before, "something changed");
}

#[test]
fn row_60_methods_that_a_path_does_not_have_are_refused() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let document = document();
    for (path, item) in document["paths"].as_object().unwrap() {
        let target: Vec<&str> = path.split('/').map(|p| if p.starts_with('{') { "g1" } else { p }).collect();
        for method in METHODS.into_iter().chain(["trace", "options", "connect", "propfind", "x"]) {
            if item.get(method).is_some() {
                continue;
            }
            let reply = d.send(&Request::new(&method.to_ascii_uppercase(), &target.join("/")));
            assert!((400..500).contains(&reply.status), "{method} {path}: {} {}", reply.status, reply.text());
            if METHODS.contains(&method) {
                assert_eq!(
                    (reply.status, reply.problem().as_str()),
                    (405, "method_not_allowed"),
                    "{method} {path}"
                );
                let allowed = reply.header("allow").unwrap().to_ascii_lowercase();
                let has = |m: &&str| allowed.split([',', ' ']).any(|a| a == *m);
                let documented: Vec<&str> = METHODS.into_iter().filter(|m| item.get(m).is_some()).collect();
                assert_eq!(
                    METHODS.iter().filter(|m| has(m)).copied().collect::<Vec<_>>(),
                    documented,
                    "{path}"
                );
            }
        }
    }
}

// ---- 61

/// Whether an SPDX expression of `OR`, `AND` and brackets around the first is one that may be.
fn licence_is_good(expression: &str, allowed: &[&str]) -> bool {
    // The old way to write OR.
    let text = expression.replace(" / ", " OR ").replace('/', " OR ");
    text.split(" AND ").all(|part| {
        part.trim_matches(['(', ')', ' '])
            .split(" OR ")
            .any(|l| allowed.contains(&l.trim_matches(['(', ')', ' '])))
    })
}

#[test]
fn row_61_every_dependency_is_vetted() {
    let root = repository();
    let text = std::fs::read_to_string(root.join("deny.toml")).unwrap();
    let deny: toml::Table = text.parse().unwrap();
    let allowed: Vec<&str> =
        deny["licenses"]["allow"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
    let good = |expression: &str| licence_is_good(expression, &allowed);
    // And it does look.
    assert!(good("(MIT OR GPL-3.0) AND Unicode-3.0") && good("Apache-2.0/MIT"));
    assert!(!good("GPL-3.0-only") && !good("MIT AND SSPL-1.0") && !good(""));

    let list = std::fs::read_to_string(root.join("tests/vetted-dependencies.txt")).unwrap();
    let vetted: BTreeSet<&str> = list.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
    let lock: toml::Table = std::fs::read_to_string(root.join("Cargo.lock")).unwrap().parse().unwrap();
    let mut found = BTreeSet::new();
    for package in lock["package"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        match package.get("source").and_then(toml::Value::as_str) {
            // The workspace's own.
            None => assert!(name.starts_with("mirrorvm"), "{name} comes from a path"),
            Some(source) => {
                assert_eq!(source, "registry+https://github.com/rust-lang/crates.io-index", "{name}");
                assert!(package.get("checksum").is_some(), "{name} has no checksum");
                assert!(
                    vetted.contains(name),
                    "{name} is in Cargo.lock and not in tests/vetted-dependencies.txt"
                );
                found.insert(name);
            }
        }
    }
    let gone: Vec<_> = vetted.difference(&found).collect();
    assert!(gone.is_empty(), "vetted, and used no more: {gone:?}");

    // Licences are in the manifests, of which a build for this platform has all that it needs.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("");
        assert!(good(licence), "{} has the licence {licence:?}", package["name"]);
    }
}
