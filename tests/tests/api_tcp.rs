//! Who calls over TCP: nobody, until a credential says so. The admin token that a start writes, the Unix
//! socket beside.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Command, Stdio};

use mirrorvm_tests::{Daemon, Request, daemon_binary, embedded, until, until_some};
use serde_json::{Value, json};

/// A daemon on TCP at these addresses of loopback, port and all.
fn on_tcp(addresses: &[&str]) -> Daemon {
    Daemon::start_as("a", &[], |_| {
        addresses.iter().flat_map(|a| ["--listen".to_owned(), format!("tcp:{a}")]).collect()
    })
}

fn bearing(request: Request, secret: &str) -> Request {
    request.header("authorization", &format!("Bearer {secret}"))
}

fn whoami() -> Request {
    Request::new("GET", "/v1/whoami")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Every operation of the document with path and method, its parameters filled in, and whether anybody may
/// call it.
fn operations(d: &Daemon) -> Vec<(String, String, bool)> {
    let document = d.read("/v1/openapi.json");
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let path = path.replace(['{', '}'], "");
            found.push((method.to_uppercase(), path, operation["security"] == json!([])));
        }
    }
    found
}

#[test]
fn nobody_is_known_over_tcp_without_a_credential() {
    // One of each family; where there is no IPv6, one.
    let there_is_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    let d = on_tcp(if there_is_v6 { &["127.0.0.1:0", "[::1]:0"] } else { &["127.0.0.1:0"] });
    let addresses: Vec<&str> = d.ready.split(' ').filter_map(|w| w.strip_prefix("tcp:")).collect();
    assert_eq!(addresses.len(), if there_is_v6 { 2 } else { 1 }, "{}", d.ready);
    let token = d.admin_token();
    let operations = operations(&d);
    assert!(operations.iter().filter(|o| !o.2).count() > 50, "{}", operations.len());
    for address in addresses {
        // This process is the daemon's own user, root maybe: that does not count.
        for (method, path, public) in &operations {
            let reply = Request::new(method, path).send_tcp(address);
            if *public {
                assert_ne!(reply.status, 401, "{method} {path}");
            } else {
                assert_eq!(
                    (reply.status, reply.problem().as_str()),
                    (401, "unauthenticated"),
                    "{method} {path}"
                );
            }
        }
        let known = bearing(whoami(), &token).send_tcp(address).expect(200).json();
        assert_eq!((&known["role"], &known["method"]), (&json!("admin"), &json!("token")));
        // A token is a header's and nothing else's.
        for target in ["access_token", "token", "authorization"].map(|n| format!("/v1/whoami?{n}={token}")) {
            let _ = Request::new("GET", &target).send_tcp(address).expect(401);
        }
        let _ = whoami().header("host", "evil.example").send_tcp(address).expect(403);
    }
    // Whoever opens a session is not known before; nothing else gets as far as to be refused for another
    // reason.
    let nobodys = |e: &&Value| e["principal"].is_null() && e["operation"] != "session_create";
    let audit = d.items("/v1/audit-log?limit=1000");
    assert!(audit.iter().filter(nobodys).all(|e| e["status"] == 401));
    assert!(audit.iter().filter(|e| e["operation"] == "session_create").all(|e| e["status"] == 403));
}

#[test]
fn a_flood_of_refusals_does_not_push_others_out_of_the_audit_log_and_is_counted() {
    let d = on_tcp(&["127.0.0.1:0"]);
    let address = d.listens("tcp:");
    let token = d.admin_token();
    let flood = |n: usize| {
        for _ in 0..n {
            let _ = Request::new("POST", "/v1/guests").body("{}").send_tcp(&address).expect(401);
        }
    };
    flood(700);
    // Whoever is known is noted in any case.
    let mut guest = embedded("g", 16, 0);
    guest["driver"]["kind"] = json!("emulated");
    let made = bearing(Request::new("POST", "/v1/guests"), &token).json(&guest).send_tcp(&address);
    let _ = made.expect(201);
    let audit = || d.items("/v1/audit-log?limit=1000");
    let entries = audit();
    let of_nobody = entries.iter().filter(|e| e["principal"].is_null()).count();
    assert!((200..300).contains(&of_nobody), "{of_nobody}");
    assert!(entries.iter().any(|e| e["operation"] == "guest_create" && e["status"] == 201));
    // The next entry counts those before it that have none.
    let whole = until_some("an entry that counts", 60, || {
        flood(1);
        let entries = audit();
        let nobodys = entries.iter().filter(|e| e["principal"].is_null());
        let left_out = nobodys.clone().map(|e| e["left_out"].as_u64().unwrap()).sum::<u64>();
        (left_out > 0).then(|| left_out + nobodys.count() as u64)
    });
    assert!(whole >= 700, "{whole}");
}

/// What connects, sends and is gone before the daemon looks: 300 times, as a user that has no role.
const STRANGER: &str = r#"
import os, socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = sys.stdin.buffer.read()
for _ in range(count):
    with socket.create_connection((host, port)) as s:
        s.sendall(request)
print("sent", os.geteuid())
"#;

#[test]
fn a_stranger_who_hangs_up_at_once_makes_nothing() {
    let d = on_tcp(&["127.0.0.1:0"]);
    let address = d.listens("tcp:");
    let (host, port) = address.rsplit_once(':').unwrap();
    let mut stranger = Command::new("setpriv");
    if is_root() {
        stranger.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    }
    let child = stranger
        .args(["/usr/bin/python3", "-c", STRANGER, host, port, "300"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("SKIPPED (no setpriv): a stranger who hangs up");
        return;
    };
    let request = Request::new("POST", "/v1/guests").json(&embedded("stolen", 8, 0)).bytes(&address);
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &request).unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    if said.is_empty() {
        println!("SKIPPED (no python3): a stranger who hangs up");
        return;
    }
    assert!(said.starts_with("sent"), "{said}");
    // Connections are taken in order: when one of ours that came later is answered, all of those have been
    // looked at.
    until("all were taken", 30, || {
        let entries = d.items("/v1/audit-log?operation=guest_create&limit=1000");
        let whole = bearing(whoami(), &d.admin_token()).send_tcp(&address).status == 200;
        assert!(entries.iter().all(|e| e["principal"].is_null() && e["status"] == 401), "{entries:?}");
        whole && (entries.len() == 300 || quiet(&d))
    });
    assert_eq!(d.items("/v1/guests"), [] as [Value; 0]);
}

/// Whether no connection but the asking one is open; hyper may drop a request whose sender is gone already.
fn quiet(d: &Daemon) -> bool {
    let metrics = d.get("/metrics").expect(200).text();
    let open =
        metrics.lines().find_map(|l| l.strip_prefix("mirrorvm_http_connections ")?.parse::<f64>().ok());
    open == Some(1.0)
}

#[test]
fn the_unix_socket_is_there_whatever_else_is_listened_on() {
    let uid = rustix::process::geteuid().as_raw();
    let d = Daemon::start_as("a", &[], |dir| {
        let other = format!("unix:{}", dir.join("other.sock").display());
        ["--listen", "tcp:127.0.0.1:0", "--listen", &other].map(str::to_owned).to_vec()
    });
    let who = d.read("/v1/whoami");
    assert_eq!((&who["principal"], &who["method"]), (&json!(format!("unix:{uid}")), &json!("local_user")));
    let other = whoami().send(&d.directory().join("other.sock")).expect(200).json();
    assert_eq!(other, who);
    assert_eq!(std::fs::metadata(d.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    // Named as well, and by a detour: one socket all the same.
    let d = Daemon::start_as("b", &[], |dir| {
        let own = format!("unix:{}", dir.join("state/../state/mirrorvmd.sock").display());
        vec!["--listen".to_owned(), own]
    });
    assert_eq!(d.ready.matches("unix:").count(), 1, "{}", d.ready);
    let _ = d.get("/v1/whoami").expect(200);
}

#[test]
fn the_default_socket_is_missing_only_where_somebody_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, "default_socket = false\n").unwrap();
    let file = file.to_string_lossy().into_owned();
    for (arguments, there) in [
        (vec!["--listen", "tcp:127.0.0.1:0"], true),
        (vec!["--config", &file, "--default-socket", "true"], true),
        (vec!["--listen", "tcp:127.0.0.1:0", "--default-socket", "false"], false),
        (vec!["--listen", "tcp:127.0.0.1:0", "--config", &file], false),
    ] {
        let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
        let d = Daemon::start_as("a", &[], |_| arguments.clone());
        assert_eq!((d.socket().exists(), d.ready.contains("unix:")), (there, there), "{arguments:?}");
    }
    // Where nothing else is served there would be no way in.
    let d = Daemon::start("a");
    let (code, _, said) =
        d.command_line(&["serve", "--state-dir", "/nonexistent", "--default-socket", "false"]);
    assert!(code != 0 && said.contains("default_socket") && said.contains("listen"), "{said}");
}

#[test]
fn a_name_is_served_at_all_its_addresses_of_this_host() {
    let d = on_tcp(&["localhost:0"]);
    let addresses: Vec<&str> = d.ready.split(' ').filter_map(|w| w.strip_prefix("tcp:")).collect();
    assert!(!addresses.is_empty(), "{}", d.ready);
    for address in addresses {
        assert!(address.parse::<std::net::SocketAddr>().unwrap().ip().is_loopback(), "{address}");
        assert_eq!(whoami().send_tcp(address).status, 401);
        assert_eq!(Request::new("GET", "/readyz").send_tcp(address).status, 200);
    }
    // RFC 6761: nobody has an answer for these.
    let state = d.directory().join("another").to_string_lossy().into_owned();
    for (option, value) in [
        ("--listen", "tcp:no-such-host.invalid:8080"),
        ("--listen", "tls:no-such-host.invalid:8080"),
        ("--metrics-listen", "tcp:no-such-host.invalid:8080"),
        ("--peer-listen", "no-such-host.invalid:8080"),
    ] {
        let (code, _, said) = d.command_line(&["serve", "--state-dir", &state, option, value]);
        assert!(code != 0 && said.contains("no-such-host.invalid:8080: the name"), "{said}");
    }
}

#[test]
fn each_start_writes_another_admin_token_and_the_last_one_is_good_for_nothing() {
    let mut d = on_tcp(&["127.0.0.1:0"]);
    let path = d.state_dir().join("admin.token");
    let mut seen = Vec::new();
    for round in 0..3 {
        let token = d.admin_token();
        let address = d.listens("tcp:");
        let mode = std::fs::symlink_metadata(&path).unwrap();
        assert!(mode.is_file() && mode.permissions().mode() & 0o777 == 0o600, "{mode:?}");
        assert!(!seen.contains(&token));
        let _ = bearing(whoami(), &token).send_tcp(&address).expect(200);
        for old in &seen {
            let _ = bearing(whoami(), old).send_tcp(&address).expect(401);
            let _ = d.send(&bearing(whoami(), old)).expect(401);
        }
        seen.push(token);
        if round == 0 {
            // An orderly end takes the file away.
            assert!(d.terminate().success());
            assert!(!path.exists());
        } else {
            d.kill();
            assert!(path.exists());
        }
        if round == 1 {
            // A link that somebody put there leads nowhere.
            let victim = d.directory().join("victim");
            std::fs::write(&victim, "theirs").unwrap();
            std::fs::remove_file(&path).unwrap();
            symlink(&victim, &path).unwrap();
            d.restart();
            assert_eq!(std::fs::read_to_string(&victim).unwrap(), "theirs");
        } else if round == 0 {
            d.restart();
        }
    }
    // It is nowhere but in its file: not in the database, not in the log.
    let hidden: Vec<&str> = seen.iter().map(|t| t.rsplit('_').next().unwrap()).collect();
    for entry in
        std::fs::read_dir(d.state_dir()).unwrap().flatten().filter(|e| e.path().is_file() && e.path() != path)
    {
        let bytes = std::fs::read(entry.path()).unwrap();
        for secret in &hidden {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()), "{:?}", entry.path());
        }
    }
    assert!(hidden.iter().all(|s| !d.log().contains(s)));
}

#[test]
fn the_admin_token_is_listed_and_can_be_withdrawn() {
    let d = on_tcp(&["127.0.0.1:0"]);
    let (address, token) = (d.listens("tcp:"), d.admin_token());
    let _ = d.post("/v1/tokens", &json!({"name": "other", "role": "viewer"})).expect(201);
    let listed = d.items("/v1/tokens");
    let of = |name: &str| listed.iter().find(|t| t["name"] == name).unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!((&of("admin.token")["origin"], &of("other")["origin"]), (&json!("admin_file"), &json!("api")));
    assert_eq!(of("admin.token")["created_by"], "daemon");
    // Page by page, too.
    let first = d.read("/v1/tokens?limit=1");
    let next =
        d.read(&format!("/v1/tokens?limit=1&page_token={}", first["next_page_token"].as_str().unwrap()));
    assert_eq!((&first["items"][0], &next["items"][0]), (&listed[0], &listed[1]));
    let target = format!("/v1/tokens/{}", of("admin.token")["id"].as_str().unwrap());
    let _ = d.delete(&format!("{target}?dry_run=true")).expect(200);
    let _ = bearing(whoami(), &token).send_tcp(&address).expect(200);
    let _ = bearing(Request::new("DELETE", &target), &token).send_tcp(&address).expect(204);
    let _ = bearing(whoami(), &token).send_tcp(&address).expect(401);
    assert_eq!(d.delete(&target).expect(404).problem(), "not_found");
    assert!(!d.state_dir().join("admin.token").exists());
    assert_eq!(d.items("/v1/tokens").len(), 1);
}

#[test]
fn where_no_network_is_served_there_is_no_admin_token() {
    let mut d = on_tcp(&["127.0.0.1:0"]);
    let state = d.state_dir();
    d.kill();
    assert!(state.join("admin.token").exists());
    let mut child = Command::new(daemon_binary())
        .args(["serve", "--state-dir"])
        .arg(&state)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it serves", 60, || {
        Request::new("GET", "/readyz").try_send(&state.join("mirrorvmd.sock")).is_ok_and(|r| r.status == 200)
    });
    assert!(!state.join("admin.token").exists());
    let tokens = Request::new("GET", "/v1/tokens").send(&state.join("mirrorvmd.sock")).json();
    assert_eq!(tokens["items"], json!([]));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The protocol of sd_listen_fds(3) by hand.
#[test]
fn a_tcp_socket_that_is_passed_on_wants_credentials_too() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let script = "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    let mut daemon = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(daemon_binary())
        .args(["serve", "--listen", "systemd", "--state-dir"])
        .arg(&state)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let token = until_some("the token", 60, || std::fs::read_to_string(state.join("admin.token")).ok());
    until("it is ready", 60, || {
        Request::new("GET", "/readyz").try_send_tcp(&address).is_ok_and(|r| r.status == 200)
    });
    assert_eq!(whoami().send_tcp(&address).expect(401).problem(), "unauthenticated");
    assert_eq!(bearing(whoami(), token.trim()).send_tcp(&address).expect(200).json()["role"], "admin");
    assert_eq!(whoami().send(&state.join("mirrorvmd.sock")).expect(200).json()["method"], "local_user");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
