//! Who may call: local users, tokens with roles, TLS with client certificates, the audit log; and what a slow
//! or greedy client does to others. Rows 52 to 55, 57, 58 and 60 of the list of bad input.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorvm_tests::{Daemon, Reply, Request, embedded, until};
use serde_json::{Value, json};

fn token(d: &Daemon, role: &str, guest: Option<&str>) -> (String, String) {
    let mut body = json!({"name": role, "role": role, "expires_in_seconds": 600});
    if let Some(guest) = guest {
        body["guest"] = json!(guest);
    }
    let made = d.post("/v1/tokens", &body).expect(201).json();
    (made["id"].as_str().unwrap().to_owned(), made["secret"].as_str().unwrap().to_owned())
}

fn as_bearer(request: Request, secret: &str) -> Request {
    request.header("authorization", &format!("Bearer {secret}"))
}

#[test]
fn each_role_may_do_what_is_its_own_and_no_more() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let _ = d.post("/v1/guests", &embedded("g2", 8, 0)).expect(201);
    let identity = format!("sha256:{}", "5a".repeat(32));
    let leave = json!({"source": {"name": "x", "identity": identity}});
    // One request of each kind of access, and the roles that may send it.
    let requests: Vec<(Request, &[&str])> = vec![
        (Request::new("GET", "/v1/whoami"), &["vmm", "peer", "viewer", "operator", "admin"]),
        (Request::new("GET", "/v1/guests"), &["viewer", "operator", "admin"]),
        (Request::new("GET", "/v1/events"), &["viewer", "operator", "admin"]),
        (Request::new("GET", "/metrics"), &["viewer", "operator", "admin"]),
        (Request::new("POST", "/v1/guests/g1/stop"), &["operator", "admin"]),
        (Request::new("POST", "/v1/guests?dry_run=true").json(&embedded("g3", 8, 0)), &["operator", "admin"]),
        (Request::new("GET", "/v1/tokens"), &["admin"]),
        (Request::new("GET", "/v1/audit-log"), &["admin"]),
        (Request::new("PATCH", "/v1/host").json(&json!({})), &["admin"]),
        (
            Request::new("POST", "/v1/incoming-migrations?dry_run=true").json(&leave),
            &["peer", "operator", "admin"],
        ),
        (Request::new("GET", "/v1/guests/g1/encryption-status"), &["vmm", "operator", "admin"]),
        (Request::new("GET", "/v1/guests/g2/encryption-status"), &["operator", "admin"]),
        (Request::new("GET", "/v1/guests/nothing/encryption-status"), &["operator", "admin"]),
    ];
    for role in ["vmm", "peer", "viewer", "operator", "admin"] {
        let (_, secret) = token(&d, role, (role == "vmm").then_some("g1"));
        assert_eq!(d.send(&as_bearer(Request::new("GET", "/v1/whoami"), &secret)).json()["role"], role);
        for (request, may) in &requests {
            let reply = d.send(&as_bearer(request.clone(), &secret));
            if may.contains(&role) {
                assert!(![401, 403].contains(&reply.status), "{role} {request:?}: {}", reply.text());
            } else {
                assert_eq!(
                    (reply.status, reply.problem().as_str()),
                    (403, "forbidden"),
                    "{role} {request:?}"
                );
            }
        }
    }
}

#[test]
fn tokens_are_told_once_withdrawn_and_expire() {
    let mut d = Daemon::start("a");
    let (id, secret) = token(&d, "viewer", None);
    let get = |d: &Daemon, secret: &str| d.send(&as_bearer(Request::new("GET", "/v1/guests"), secret));
    let _ = get(&d, &secret).expect(200);
    let listed = d.items("/v1/tokens");
    assert_eq!((listed.len(), listed[0].get("secret")), (1, None));
    // Neither the database, the log nor a replayed answer has it.
    let keyed = Request::new("POST", "/v1/tokens")
        .json(&json!({"name": "n", "role": "peer"}))
        .header("idempotency-key", "k");
    let first = d.send(&keyed).expect(201).json();
    let again = d.send(&keyed).expect(201).json();
    assert_eq!((&again["id"], again.get("secret")), (&first["id"], None));
    let bare = [&secret, first["secret"].as_str().unwrap()].map(|s| s.rsplit('_').next().unwrap().to_owned());
    for entry in std::fs::read_dir(d.state_dir()).unwrap().flatten().filter(|e| e.path().is_file()) {
        let bytes = std::fs::read(entry.path()).unwrap();
        for secret in &bare {
            assert!(!bytes.windows(64).any(|w| w == secret.as_bytes()), "{:?} has a secret", entry.path());
        }
    }
    assert!(bare.iter().all(|s| !d.log().contains(s.as_str())), "the log has a secret");
    for wrong in ["x", "mvm_x_y", &secret[..secret.len() - 1], &format!("{}0", &secret[..secret.len() - 1])] {
        let reply = get(&d, wrong);
        if *wrong != *secret {
            assert_eq!((reply.status, reply.problem().as_str()), (401, "unauthenticated"), "{wrong}");
            assert!(reply.header("www-authenticate").unwrap().starts_with("Bearer"));
        }
    }
    let basic = Request::new("GET", "/v1/guests").header("authorization", "Basic eDp5");
    assert_eq!(d.send(&basic).expect(401).problem(), "unauthenticated");
    let _ = get(&d, &secret).expect(200);
    assert!(d.terminate().success());
    d.restart();
    let _ = get(&d, &secret).expect(200);
    let _ = d.delete(&format!("/v1/tokens/{id}")).expect(204);
    assert_eq!(get(&d, &secret).expect(401).problem(), "unauthenticated");
    assert_eq!(d.delete(&format!("/v1/tokens/{id}")).expect(404).problem(), "not_found");
    let brief = d
        .post("/v1/tokens", &json!({"name": "brief", "role": "viewer", "expires_in_seconds": 1}))
        .expect(201)
        .json();
    until("it expires", 10, || get(&d, brief["secret"].as_str().unwrap()).status == 401);
    for (body, place) in [
        (json!({"name": "", "role": "viewer"}), "/name"),
        (json!({"name": "x", "role": "root"}), "/role"),
        (json!({"name": "x", "role": "vmm"}), "/guest"),
        (json!({"name": "x", "role": "viewer", "guest": "g"}), "/guest"),
        (json!({"name": "x", "role": "viewer", "expires_in_seconds": 0}), "/expires_in_seconds"),
    ] {
        let refused = d.post("/v1/tokens", &body).expect(422).json();
        assert_eq!(refused["errors"][0]["pointer"], place, "{body}");
    }
}

#[test]
fn every_change_is_in_the_audit_log() {
    let mut d = Daemon::start("a");
    let (_, viewer) = token(&d, "viewer", None);
    let made = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let _ = d.post("/v1/guests?dry_run=true", &embedded("g2", 8, 0)).expect(200);
    let refused = d.send(&as_bearer(Request::new("POST", "/v1/guests/g1/start"), &viewer)).expect(403);
    let unknown = d.send(&as_bearer(Request::new("DELETE", "/v1/guests/g1"), "mvm_x_y")).expect(401);
    let _ = d.get("/v1/guests");
    let log = d.items("/v1/audit-log");
    let of = |reply: &Reply| {
        let id = reply.header("x-request-id").unwrap();
        log.iter().find(|e| e["request_id"] == id).cloned().unwrap()
    };
    let entry = of(&made);
    let uid = rustix::process::geteuid().as_raw();
    assert_eq!(
        (&entry["operation"], &entry["principal"]),
        (&json!("guest_create"), &json!(format!("unix:{uid}")))
    );
    assert_eq!((&entry["status"], &entry["role"]), (&json!(201), &json!("admin")));
    assert_eq!(entry["location"].as_str(), made.header("location"));
    let entry = of(&refused);
    assert_eq!((&entry["code"], &entry["role"]), (&json!("forbidden"), &json!("viewer")));
    assert_eq!((&of(&unknown)["principal"], &of(&unknown)["status"]), (&Value::Null, &json!(401)));
    assert_eq!(log.len(), 5, "reading is not in it: {log:#?}");
    assert_eq!(log.iter().filter(|e| e["dry_run"] == true).count(), 1);
    assert_eq!(d.items("/v1/audit-log?operation=token_create").len(), 1);
    // What was answered survives.
    d.kill();
    d.restart();
    assert_eq!(d.items("/v1/audit-log"), log);
    let page = d.read("/v1/audit-log?limit=2");
    let older = d.read(&format!("/v1/audit-log?before={}", page["next_before"]));
    assert_eq!(older["items"].as_array().unwrap().len(), 3);
}

/// Keys of a small authority.
struct Keys {
    ca: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Keys {
    fn new(name: &str) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap();
        Self { ca, issuer: rcgen::Issuer::new(params, key) }
    }

    /// A certificate for `name` and its key, in `dir`; `days` until its end.
    fn issue(&self, dir: &Path, file: &str, name: &str, days: i64) {
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("leaf {name}"));
        let now = rcgen::date_time_ymd(2026, 1, 1);
        params.not_before = now;
        params.not_after =
            if days < 0 { rcgen::date_time_ymd(2026, 1, 2) } else { rcgen::date_time_ymd(2099, 1, 1) };
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join(format!("{file}.pem")), certificate.pem()).unwrap();
        let path = dir.join(format!("{file}.key"));
        std::fs::write(&path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
}

/// A browser's session over TLS: the link goes to a name of the certificate, and the cookie is of this host
/// alone.
fn session_over_tls(d: &Daemon, port: &str) {
    let link = Command::new(mirrorvm_tests::daemon_binary())
        .args(["open", "--print", "--socket"])
        .arg(d.socket())
        .output()
        .unwrap();
    let link = String::from_utf8(link.stdout).unwrap();
    let (page, code) = link.trim_end().split_once('#').unwrap();
    let origin = format!("https://localhost:{port}");
    assert_eq!(page, format!("{origin}/open"));
    let curl = |arguments: &[&str]| {
        let ca = d.directory().join("ca.pem");
        let output =
            Command::new("curl").args(["-s", "-m", "10", "-i", "--cacert"]).arg(ca).args(arguments).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let (json, mark) = ("content-type: application/json", "x-mirrorvm: 1");
    let body = json!({"code": code}).to_string();
    let opened = curl(&["-H", json, "-H", mark, "-d", &body, &format!("{origin}/v1/session")]);
    assert!(opened.starts_with("HTTP/1.1 201"), "{opened}");
    let set = opened.lines().find_map(|l| l.strip_prefix("set-cookie: ")).unwrap();
    let (cookie, attributes) = set.split_once("; ").unwrap();
    assert!(cookie.starts_with("__Host-mirrorvm-session-"), "{cookie}");
    assert_eq!(attributes, "Path=/; HttpOnly; SameSite=Strict; Secure");
    let whoami = format!("{origin}/v1/whoami");
    let known = curl(&["-H", &format!("cookie: {cookie}"), &whoami]);
    assert!(known.contains("\"session\"") && known.contains("\"admin\""), "{known}");
    // What a page could have set in the clear does not count here.
    let bare = format!("cookie: {}", cookie.trim_start_matches("__Host-"));
    assert!(curl(&["-H", &bare, &whoami]).contains("\"unauthenticated\""));
    let forged = ["-H", &format!("cookie: {cookie}"), "-X", "DELETE", &format!("{origin}/v1/session")];
    assert!(curl(&forged).contains("\"session_header_required\""));
    assert!(curl(&[&forged[..], &["-H", mark]].concat()).starts_with("HTTP/1.1 204"));
    assert!(curl(&["-H", &format!("cookie: {cookie}"), &whoami]).contains("\"unauthenticated\""));
}

#[test]
fn over_tls_callers_are_their_certificates_or_tokens() {
    if Command::new("curl").arg("--version").output().is_err() {
        println!("SKIPPED (no curl): the API over TLS");
        return;
    }
    let (keys, others) = (Keys::new("test authority"), Keys::new("another authority"));
    let d = Daemon::start_as("a", &[], |dir| {
        std::fs::write(dir.join("ca.pem"), keys.ca.pem()).unwrap();
        keys.issue(dir, "server", "localhost", 1);
        keys.issue(dir, "ops", "ops.example", 1);
        keys.issue(dir, "nobody", "nobody.example", 1);
        keys.issue(dir, "old", "ops.example", -1);
        others.issue(dir, "foreign", "ops.example", 1);
        let config =
            "[access.certificates]\n\"dns:ops.example\" = \"operator\"\n[limits]\nhandshake_seconds = 1\n";
        std::fs::write(dir.join("config.toml"), config).unwrap();
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        [
            ["--config", &at("config.toml")],
            ["--listen", "tls:127.0.0.1:0"],
            ["--tls-certificate", &at("server.pem")],
            ["--tls-key", &at("server.key")],
            ["--tls-client-ca", &at("ca.pem")],
        ]
        .concat()
        .iter()
        .map(ToString::to_string)
        .collect()
    });
    let address = d.listens("tls:");
    let port = address.rsplit(':').next().unwrap();
    let dir = d.directory();
    // What curl prints, and whether it got through at all.
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args(["-s", "-m", "10", "--cacert"])
            .arg(dir.join("ca.pem"))
            .args(arguments)
            .arg(format!("https://localhost:{port}/v1/whoami"))
            .current_dir(dir)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let with = |name: &str| curl(&["--cert", &format!("{name}.pem"), "--key", &format!("{name}.key")]);
    let (_, ops) = with("ops");
    assert!(ops.contains("\"principal\":\"cert:dns:ops.example\"") && ops.contains("\"operator\""), "{ops}");
    assert!(with("nobody").1.contains("\"forbidden\""), "a good certificate without a role");
    assert!(curl(&[]).1.contains("\"unauthenticated\""), "neither certificate nor token");
    let (_, secret) = token(&d, "viewer", None);
    let bearer = format!("authorization: Bearer {secret}");
    assert!(curl(&["-H", &bearer]).1.contains("\"viewer\""));
    let (_, both) = curl(&["--cert", "ops.pem", "--key", "ops.key", "-H", &bearer]);
    assert!(both.contains("\"viewer\""), "a token counts before a certificate: {both}");
    // A browser shows its certificate to whatever page has it ask: the page's origin counts.
    let ops = ["--cert", "ops.pem", "--key", "ops.key", "-H"];
    for foreign in ["origin: https://evil.example", "origin: null", "sec-fetch-site: cross-site"] {
        let (_, said) = curl(&[&ops[..], &[foreign]].concat());
        assert!(said.contains("\"origin_refused\""), "{foreign}: {said}");
    }
    let own = format!("origin: https://localhost:{port}");
    assert!(curl(&[&ops[..], &[own.as_str()]].concat()).1.contains("\"operator\""));
    session_over_tls(&d, port);
    // Refused before a byte is read.
    for bad in ["old", "foreign"] {
        assert!(!with(bad).0, "{bad}: {:?}", with(bad));
    }
    assert!(!curl(&["--tls-max", "1.2"]).0, "TLS 1.2");
    let mut plain = TcpStream::connect(("127.0.0.1", port.parse::<u16>().unwrap())).unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    plain.write_all(b"GET /v1/whoami HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "plain text: {answer:?}");
    // Somebody who connects and says nothing is cut, and keeps nobody else from getting through.
    let begun = Instant::now();
    let mut silent: Vec<TcpStream> =
        (0..20).map(|_| TcpStream::connect(("127.0.0.1", port.parse::<u16>().unwrap())).unwrap()).collect();
    assert!(with("ops").0);
    for socket in &mut silent {
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = socket.read(&mut [0; 16]);
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[test]
fn slow_and_greedy_clients_hurt_themselves_alone() {
    let d = Daemon::start_with(
        "a",
        &[
            ("MIRRORVM_LIMITS_HEADER_SECONDS", "1"),
            ("MIRRORVM_LIMITS_BODY_SECONDS", "1"),
            ("MIRRORVM_LIMITS_CONNECTIONS", "40"),
        ],
    );
    let open = |text: &[u8]| {
        let mut socket = UnixStream::connect(d.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        socket.write_all(text).unwrap();
        socket
    };
    let rest = |mut socket: UnixStream| {
        let mut text = Vec::new();
        let _ = socket.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    };
    // A body that does not come.
    let head = b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{";
    assert!(rest(open(head)).contains("request_timeout"));
    // Heads that do not end, and connections that say nothing, as many as there may be.
    let idle: Vec<UnixStream> =
        (0..40).map(|n| open(if n % 2 == 0 { b"" } else { b"GET / HTTP/1.1\r\nx: " })).collect();
    let begun = Instant::now();
    let _ = d.get("/livez").expect(200);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(idle);
    // A head and a body that are too large.
    let mut large = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: ".to_vec();
    large.resize(1 << 20, b'y');
    let mut socket = UnixStream::connect(d.socket()).unwrap();
    socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = socket.write_all(&large);
    let answer = rest(socket);
    assert!(answer.starts_with("HTTP/1.1 431") || answer.is_empty(), "{answer}");
    let endless = b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut socket = open(endless);
    let chunk = [b"4000\r\n".to_vec(), vec![b' '; 0x4000], b"\r\n".to_vec()].concat();
    while socket.write_all(&chunk).is_ok() {}
    let _ = d.get("/livez").expect(200);
}

#[test]
fn a_principal_that_asks_too_often_waits() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_REQUESTS_PER_SECOND", "20")]);
    let refused = (0..200).map(|_| d.get("/v1/host")).find(|r| r.status == 429).expect("one too many");
    assert_eq!((refused.problem().as_str(), refused.header("retry-after")), ("too_many_requests", Some("1")));
    let _ = d.get("/livez").expect(200);
}

#[test]
fn a_daemon_may_insist_on_conditions() {
    let d = Daemon::start_with("a", &[("MIRRORVM_REQUIRE_IF_MATCH", "true")]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    assert_eq!(d.act("/v1/guests/g1/stop").expect(428).problem(), "precondition_required");
    assert_eq!(d.delete("/v1/guests/g1").expect(428).problem(), "precondition_required");
    let _ = d.send(&Request::new("DELETE", "/v1/guests/g1").header("if-match", "\"1\"")).expect(204);
}

#[test]
fn metrics_readiness_and_traces_are_there() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let metrics = d.get("/metrics").expect(200);
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let text = metrics.text();
    for line in [
        "mirrorvm_guests{state=\"stopped\"} 1",
        "mirrorvm_http_requests_total{operation=\"guest_create\",status=\"2xx\"} 1",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    assert!(!text.contains("g1"), "no names in labels");
    let ready = d.get("/readyz?verbose").expect(200).text();
    assert!(ready.contains("[+] database ok") && ready.ends_with("ok\n"), "{ready}");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request =
        Request::new("GET", "/livez").header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
    let reply = d.send(&request);
    assert!(reply.header("traceparent").unwrap().contains(trace));
    let refused =
        Request::new("GET", "/v1/guests/x").header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
    let _ = d.send(&refused).expect(404);
    assert!(d.log().contains(trace), "the log has the caller's trace");
}
