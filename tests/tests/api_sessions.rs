//! Sessions of people's browsers over TCP: the link that opens one, the cookie, what by it may be changed and
//! from where, how it ends; and the same rules of origin for other credentials that a browser adds by itself.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use mirrorvm_tests::{Daemon, Reply, Request, daemon_binary, embedded, until, until_some};
use serde_json::{Value, json};

/// A daemon on TCP that logs all it can.
fn on_tcp() -> Daemon {
    Daemon::start_as("a", &[("RUST_LOG", "trace")], |_| {
        ["--listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec()
    })
}

fn open(arguments: &[&str], socket: &Path) -> Output {
    Command::new(daemon_binary())
        .arg("open")
        .args(arguments)
        .arg("--socket")
        .arg(socket)
        .env_remove("MIRRORVM_STATE_DIR")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The address and the code of the link that `mirrorvmd open` prints.
fn link(d: &Daemon) -> (String, String) {
    let said = open(&["--print"], &d.socket());
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    let url = String::from_utf8(said.stdout).unwrap();
    let (page, code) = url.trim_end().split_once('#').unwrap();
    let address = d.listens("tcp:");
    assert_eq!(page, format!("http://{address}/open"));
    (address, code.to_owned())
}

fn opening(code: &str) -> Request {
    Request::new("POST", "/v1/session").json(&json!({"code": code})).header("x-mirrorvm", "1")
}

/// A browser's session: where the daemon is, and what the browser sends as `Cookie`.
struct Session {
    address: String,
    cookie: String,
    id: String,
}

impl Session {
    fn open(d: &Daemon) -> Self {
        let (address, code) = link(d);
        Self::of(&opening(&code).send_tcp(&address).expect(201), address)
    }

    fn of(reply: &Reply, address: String) -> Self {
        let set = reply.header("set-cookie").unwrap();
        let id = reply.json()["session"].as_str().unwrap().to_owned();
        Self { address, cookie: set.split(';').next().unwrap().to_owned(), id }
    }

    fn send(&self, request: Request) -> Reply {
        request.header("cookie", &self.cookie).send_tcp(&self.address)
    }

    /// A change, as the daemon's own pages send it.
    fn change(&self, request: Request) -> Reply {
        self.send(request.header("x-mirrorvm", "1").header("origin", &format!("http://{}", self.address)))
    }

    /// A read whose answer comes bit by bit, until it has said `begins`.
    fn follow(&self, target: &str, begins: &str) -> TcpStream {
        follow(&self.address, &format!("cookie: {}", self.cookie), target, begins)
    }
}

fn follow(address: &str, credential: &str, target: &str, begins: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nhost: {address}\r\n{credential}\r\n\r\n").unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(begins) {
        let mut some = [0; 512];
        let n = stream.read(&mut some).unwrap();
        assert_ne!(n, 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&some[..n]);
    }
    stream
}

/// That the connection ends, whatever else comes before.
fn ends(mut stream: TcpStream) {
    let mut rest = Vec::new();
    // Reset or closed.
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
}

fn whoami() -> Request {
    Request::new("GET", "/v1/whoami")
}

fn refused(reply: &Reply) -> (u16, String) {
    (reply.status, reply.problem())
}

fn is(reply: &Reply, status: u16, code: &str) {
    assert_eq!(refused(reply), (status, code.to_owned()), "{}", reply.text());
}

#[test]
fn a_link_opens_one_session_with_a_cookie_that_scripts_and_other_sites_do_not_get() {
    let d = on_tcp();
    let uid = rustix::process::geteuid().as_raw();
    let (address, code) = link(&d);
    // Whoever fetches the page before the user does uses nothing up.
    for _ in 0..3 {
        let page = Request::new("GET", "/open").send_tcp(&address).expect(200);
        let policy = page.header("content-security-policy").unwrap();
        assert!(
            policy.contains("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"),
            "{policy}"
        );
        assert_eq!(page.header("referrer-policy"), Some("no-referrer"));
        assert_eq!(page.header("cache-control"), Some("no-store"));
        assert!(!page.text().contains("<script>") && !page.text().contains("://"));
        let _ = Request::new("GET", "/open/page.js").send_tcp(&address).expect(200);
    }
    // Nor does a wrong code, nor one that a page of another site sends.
    is(&opening("mvo_x_y").send_tcp(&address), 403, "link_refused");
    let wrong = format!("{}{}", &code[..code.len() - 1], if code.ends_with('0') { '1' } else { '0' });
    is(&opening(&wrong).send_tcp(&address), 403, "link_refused");
    let bare = Request::new("POST", "/v1/session").json(&json!({"code": code}));
    is(&bare.send_tcp(&address), 403, "session_header_required");
    is(&opening(&code).header("origin", "http://127.0.0.1:1").send_tcp(&address), 403, "origin_refused");
    is(&opening(&code).header("sec-fetch-site", "same-site").send_tcp(&address), 403, "origin_refused");
    is(&d.send(&opening(&code)), 403, "forbidden");

    // That one over the Unix socket had the code, but no browser is there: the code is still good.
    let opened = opening(&code).send_tcp(&address).expect(201);
    let host = d.read("/v1/host")["id"].as_str().unwrap().replace('-', "");
    let set = opened.header("set-cookie").unwrap();
    let (name, rest) = set.split_once('=').unwrap();
    let (value, attributes) = rest.split_once("; ").unwrap();
    assert_eq!(name, format!("mirrorvm-session-{host}"));
    assert_eq!(attributes, "Path=/; HttpOnly; SameSite=Strict");
    assert_eq!(opened.headers.iter().filter(|(n, _)| n == "set-cookie").count(), 1);
    assert!(!opened.text().contains(value) && !opened.text().contains(&code));
    is(&opening(&code).send_tcp(&address), 403, "link_refused");

    let session = Session::of(&opened, address.clone());
    let known = session.send(whoami()).expect(200).json();
    assert_eq!(known, opened.json());
    assert_eq!((&known["principal"], &known["role"]), (&json!(format!("unix:{uid}")), &json!("admin")));
    assert_eq!((&known["method"], &known["session"]), (&json!("session"), &json!(session.id)));
    is(&whoami().send_tcp(&address), 401, "unauthenticated");
    // The cookie is none over the Unix socket, where the kernel says who calls.
    assert_eq!(d.send(&whoami().header("cookie", &session.cookie)).json()["method"], "local_user");
    // Another name, another value, the value as a token: nothing.
    for cookie in [
        format!("mirrorvm-session={value}"),
        format!("__Host-{name}={value}"),
        format!("{name}={code}"),
        format!("{name}=\"{value}\""),
        format!("{name}={value}; {name}={value}"),
    ] {
        is(&whoami().header("cookie", &cookie).send_tcp(&address), 401, "unauthenticated");
    }
    is(
        &whoami().header("cookie", &session.cookie).header("cookie", &session.cookie).send_tcp(&address),
        401,
        "unauthenticated",
    );
    is(
        &whoami().header("authorization", &format!("Bearer {value}")).send_tcp(&address),
        401,
        "unauthenticated",
    );
    // The guard against rebinding stays.
    is(&session.send(whoami().header("host", "evil.example")), 403, "origin_refused");

    let log = d.log();
    let secret = |text: &str| text.rsplit('_').next().unwrap().to_owned();
    for text in [&code, value] {
        assert!(!log.contains(&secret(text)), "the log has a secret");
    }
    let audit = d.items("/v1/audit-log");
    assert!(!json!(audit).to_string().contains(&secret(&code)));
    let of = |operation: &str, status: u64| {
        audit.iter().find(|e| e["operation"] == operation && e["status"] == status).unwrap()
    };
    let made = of("session_link_create", 201);
    assert_eq!(made["location"], format!("/v1/tokens/{}", session.id));
    assert_eq!(made["authenticated_by"], "local_user");
    let begun = of("session_create", 201);
    assert_eq!(
        (&begun["principal"], &begun["authenticated_by"], &begun["session"]),
        (&known["principal"], &json!("session"), &json!(session.id))
    );
    assert_eq!(of("session_create", 403)["principal"], Value::Null);
    for entry in std::fs::read_dir(d.state_dir()).unwrap().flatten().filter(|e| e.path().is_file()) {
        let bytes = std::fs::read(entry.path()).unwrap();
        for secret in [secret(&code), secret(value)] {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()), "{:?}", entry.path());
        }
    }
}

#[test]
fn a_change_by_session_needs_our_header_and_is_its_openers() {
    let d = on_tcp();
    let session = Session::open(&d);
    let create = |name: &str| Request::new("POST", "/v1/guests").json(&embedded(name, 8, 0));
    let made = session.change(create("g1")).expect(201);
    let bare = session.send(create("g2"));
    is(&bare, 403, "session_header_required");
    assert_eq!(bare.json()["errors"][0]["header"], "x-mirrorvm");
    is(&session.send(create("g2").header("x-mirrorvm", "true")), 403, "session_header_required");
    for (method, target) in [
        ("POST", "/v1/guests/g1/start"),
        ("POST", "/v1/guests/g1/address-space-plans"),
        ("DELETE", "/v1/guests/g1"),
        ("PATCH", "/v1/guests/g1"),
        ("PUT", "/v1/guests/g1"),
        ("DELETE", "/v1/session"),
    ] {
        is(&session.send(Request::new(method, target)), 403, "session_header_required");
    }
    // A page of another origin cannot add the header; and if it could, it would be seen.
    for (name, value) in [
        ("origin", "http://evil.example"),
        ("origin", "null"),
        ("origin", "http://127.0.0.1:1"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
    ] {
        let forged = create("g2").header("x-mirrorvm", "1").header(name, value);
        is(&session.send(forged), 403, "origin_refused");
    }
    // No answer lets a page of another origin ask at all.
    let preflight = Request::new("OPTIONS", "/v1/guests")
        .header("origin", "http://127.0.0.1:1")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "x-mirrorvm");
    for reply in [preflight.send_tcp(&session.address), made.clone(), session.send(whoami())] {
        assert!(reply.headers.iter().all(|(n, _)| !n.starts_with("access-control-")), "{:?}", reply.headers);
    }
    assert_eq!(d.items("/v1/guests").len(), 1);

    let audit = d.items("/v1/audit-log?operation=guest_create");
    let of = |reply: &Reply| {
        audit.iter().find(|e| e["request_id"] == reply.header("x-request-id").unwrap()).unwrap()
    };
    let uid = rustix::process::geteuid().as_raw();
    for (reply, status) in [(&made, 201), (&bare, 403)] {
        let entry = of(reply);
        assert_eq!((&entry["principal"], &entry["status"]), (&json!(format!("unix:{uid}")), &json!(status)));
        assert_eq!((&entry["authenticated_by"], &entry["session"]), (&json!("session"), &json!(session.id)));
    }
    // A token says itself what it may; the cookie beside it does not count, nor does a wrong token fall back
    // to it.
    let viewer = d.post("/v1/tokens", &json!({"name": "v", "role": "viewer"})).expect(201).json();
    let bearer = format!("Bearer {}", viewer["secret"].as_str().unwrap());
    assert_eq!(session.send(whoami().header("authorization", &bearer)).expect(200).json()["method"], "token");
    is(&session.change(create("g2").header("authorization", &bearer)), 403, "forbidden");
    is(&session.send(whoami().header("authorization", "Bearer mvm_x_y")), 401, "unauthenticated");
    // An empty one is none.
    for empty in ["Bearer", "Bearer "] {
        assert_eq!(
            session.send(whoami().header("authorization", empty)).expect(200).json()["method"],
            "session"
        );
        is(&whoami().header("authorization", empty).send_tcp(&session.address), 401, "unauthenticated");
    }
}

#[test]
fn a_session_ends_at_once_when_it_is_withdrawn_and_what_it_reads_with_it() {
    let d = on_tcp();
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let (one, other) = (Session::open(&d), Session::open(&d));
    let listed = d.items("/v1/tokens");
    let of = |s: &Session| listed.iter().find(|t| t["id"] == json!(s.id)).unwrap().clone();
    for session in [&one, &other] {
        let entry = of(session);
        assert_eq!(
            (&entry["origin"], &entry["role"], entry.get("secret")),
            (&json!("session"), &json!("admin"), None)
        );
    }
    let etag = d.get("/v1/guests/g1").header("etag").unwrap().to_owned();
    let poll = |s: &Session| {
        let (address, cookie) = (s.address.clone(), s.cookie.clone());
        let request = Request::new("GET", "/v1/guests/g1?wait=60s").header("if-none-match", &etag);
        std::thread::spawn(move || request.header("cookie", &cookie).send_tcp(&address))
    };
    let streams = || {
        let metrics = d.get("/metrics").text();
        metrics.lines().find_map(|l| l.strip_prefix("mirrorvm_event_streams ")?.parse::<f64>().ok())
    };
    let ended = (one.follow("/v1/events/stream", ": mirrorvm events"), poll(&one));
    let stays = other.follow("/v1/events/stream", ": mirrorvm events");
    let before = streams();
    let _ = d.delete(&format!("/v1/tokens/{}", one.id)).expect(204);
    is(&one.send(whoami()), 401, "unauthenticated");
    ends(ended.0);
    is(&ended.1.join().unwrap(), 401, "unauthenticated");
    until("the stream's place is free again", 30, || streams() == before.map(|n| n - 1.0));
    let _ = other.send(whoami()).expect(200);

    // By itself, too: the browser is told to forget the cookie.
    let waiting = poll(&other);
    let gone = other.change(Request::new("DELETE", "/v1/session")).expect(204);
    let name = other.cookie.split('=').next().unwrap();
    let forgotten = format!("{name}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0");
    assert_eq!(gone.header("set-cookie"), Some(forgotten.as_str()));
    ends(stays);
    is(&waiting.join().unwrap(), 401, "unauthenticated");
    is(&other.send(whoami()), 401, "unauthenticated");
    is(&d.delete("/v1/session"), 404, "not_found");
    assert!(d.items("/v1/tokens").iter().all(|t| t["origin"] != "session"));

    // A link can be withdrawn before it is used, by the session's id.
    let made = d.act("/v1/session-links").expect(201);
    let code = made.json()["urls"][0].as_str().unwrap().split_once('#').unwrap().1.to_owned();
    let _ = d.delete(made.header("location").unwrap()).expect(204);
    is(&opening(&code).send_tcp(&one.address), 403, "link_refused");
    // A browser that opens another session has one.
    let first = Session::open(&d);
    let second = first.send(opening(&link(&d).1)).expect(201);
    is(&first.send(whoami()), 401, "unauthenticated");
    let second = Session::of(&second, first.address);
    let _ = second.send(whoami()).expect(200);
}

#[test]
fn a_withdrawn_token_reads_no_further_either() {
    let d = on_tcp();
    let address = d.listens("tcp:");
    let made = d.post("/v1/tokens", &json!({"name": "v", "role": "viewer"})).expect(201).json();
    let brief = d
        .post("/v1/tokens", &json!({"name": "b", "role": "viewer", "expires_in_seconds": 2}))
        .expect(201)
        .json();
    let stream = |token: &Value| {
        let credential = format!("authorization: Bearer {}", token["secret"].as_str().unwrap());
        follow(&address, &credential, "/v1/events/stream", ": mirrorvm events")
    };
    let (withdrawn, expiring) = (stream(&made), stream(&brief));
    let bearer = format!("Bearer {}", made["secret"].as_str().unwrap());
    let poll = Request::new("GET", "/v1/events?wait=60s&type=no.such").header("authorization", &bearer);
    let theirs = address.clone();
    let poll = std::thread::spawn(move || poll.send_tcp(&theirs));
    let _ = d.delete(&format!("/v1/tokens/{}", made["id"].as_str().unwrap())).expect(204);
    ends(withdrawn);
    is(&poll.join().unwrap(), 401, "unauthenticated");
    ends(expiring);
}

#[test]
fn sessions_end_with_the_daemon() {
    let mut d = on_tcp();
    let session = Session::open(&d);
    let unused = link(&d).1;
    assert!(d.terminate().success());
    d.restart();
    let address = d.listens("tcp:");
    let again = whoami().header("cookie", &session.cookie).send_tcp(&address);
    is(&again, 401, "unauthenticated");
    is(&opening(&unused).send_tcp(&address), 403, "link_refused");
    assert!(d.items("/v1/tokens").iter().all(|t| t["origin"] != "session"));
}

#[test]
fn streams_and_upgrades_are_for_pages_of_this_origin_alone() {
    let d = on_tcp();
    let session = Session::open(&d);
    let token = format!("Bearer {}", d.admin_token());
    let ours = format!("http://{}", session.address);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    for target in
        ["/v1/events/stream", "/v1/events?wait=1s", "/v1/guests/g1/console", "/v1/guests/g1?wait=1s"]
    {
        for foreign in ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:1"] {
            let read = Request::new("GET", target).header("origin", foreign);
            is(&session.send(read.clone()), 403, "origin_refused");
            is(&read.header("authorization", &token).send_tcp(&session.address), 403, "origin_refused");
        }
        for site in ["same-site", "cross-site"] {
            is(
                &session.send(Request::new("GET", target).header("sec-fetch-site", site)),
                403,
                "origin_refused",
            );
            // A link of another page to what the browser has a cookie for.
            let followed = Request::new("GET", target)
                .header("sec-fetch-site", site)
                .header("sec-fetch-mode", "navigate")
                .header("sec-fetch-dest", "document");
            is(&session.send(followed), 403, "origin_refused");
        }
    }
    drop(session.follow("/v1/events/stream", ": mirrorvm events"));
    // Whatever an answer holds, a browser that is led to it runs none of it, and gives it to no other page.
    for target in ["/v1/guests/g1", "/v1/nothing", "/v1/guests/g1/console"] {
        let reply = session.send(Request::new("GET", target));
        let policy = reply.header("content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none';") && !policy.contains("script-src"),
            "{target}: {policy}"
        );
        assert_eq!(reply.header("cross-origin-resource-policy"), Some("same-origin"), "{target}");
    }
    let upgrade = |target: &str| Request::new("GET", target).header("upgrade", "websocket");
    is(&session.send(upgrade("/v1/guests/g1/console")), 403, "origin_refused");
    is(
        &session.send(upgrade("/v1/guests/g1/console").header("origin", "http://evil.example")),
        403,
        "origin_refused",
    );
    let _ = session.send(upgrade("/v1/guests/g1/console").header("origin", &ours)).expect(200);
    // The page of a link is nothing that another page leads to.
    let led = Request::new("GET", "/open")
        .header("sec-fetch-site", "cross-site")
        .header("sec-fetch-mode", "navigate")
        .header("sec-fetch-dest", "document");
    is(&led.send_tcp(&session.address), 403, "origin_refused");
    let typed = Request::new("GET", "/open").header("sec-fetch-site", "none");
    let _ = typed.send_tcp(&session.address).expect(200);
}

#[test]
fn a_credential_in_the_query_is_none_and_the_answer_says_so() {
    let d = on_tcp();
    let session = Session::open(&d);
    let value = session.cookie.split_once('=').unwrap().1;
    for secret in [d.admin_token().as_str(), value] {
        for name in ["access_token", "token", "Authorization"] {
            let reply =
                Request::new("GET", &format!("/v1/whoami?{name}={secret}")).send_tcp(&session.address);
            is(&reply, 401, "unauthenticated");
            let detail = reply.json()["detail"].as_str().unwrap().to_owned();
            assert!(detail.contains("query") && detail.contains("Authorization: Bearer"), "{detail}");
            assert!(!reply.text().contains(secret));
        }
    }
    assert!(!d.log().contains(value.rsplit('_').next().unwrap()));
}

#[test]
fn a_session_has_the_role_of_who_opened_it_and_no_session_or_token_makes_a_link() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED (not root): a viewer's session");
        return;
    }
    let viewer = 65_534;
    let d = Daemon::start_as("a", &[], |dir| {
        let file = dir.join("config.toml");
        std::fs::write(&file, format!("[access.users]\n{viewer} = \"viewer\"\n")).unwrap();
        ["--listen", "tcp:127.0.0.1:0", "--config", file.to_str().unwrap()].map(str::to_owned).to_vec()
    });
    // The socket is the daemon's user's; whoever else is to call is let at it by the administrator.
    use std::os::unix::fs::PermissionsExt as _;
    for (path, mode) in [(d.directory(), 0o711), (&d.state_dir(), 0o711), (&d.socket(), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let said = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["curl", "-sS", "-X", "POST", "http://localhost/v1/session-links", "--unix-socket"])
        .arg(d.socket())
        .output();
    let Ok(said) = said else {
        println!("SKIPPED (no setpriv): a viewer's session");
        return;
    };
    let made: Value = serde_json::from_slice(&said.stdout).unwrap_or_else(|e| panic!("{e}: {said:?}"));
    assert_eq!(made["role"], "viewer", "{made}");
    let code = made["urls"][0].as_str().unwrap().split_once('#').unwrap().1;
    let address = d.listens("tcp:");
    let session = Session::of(&opening(code).send_tcp(&address).expect(201), address.clone());
    let known = session.send(whoami()).expect(200).json();
    assert_eq!((&known["role"], &known["principal"]), (&json!("viewer"), &json!(format!("unix:{viewer}"))));
    let _ = session.send(Request::new("GET", "/v1/guests")).expect(200);
    is(&session.change(Request::new("POST", "/v1/guests").json(&embedded("g1", 8, 0))), 403, "forbidden");
    is(&session.send(Request::new("GET", "/v1/tokens")), 403, "forbidden");
    is(&session.change(Request::new("POST", "/v1/session-links")), 403, "forbidden");
    let token = format!("Bearer {}", d.admin_token());
    let by_token = Request::new("POST", "/v1/session-links").header("authorization", &token);
    is(&by_token.send_tcp(&address), 403, "forbidden");
    is(&d.send(&by_token), 403, "forbidden");
}

#[test]
fn links_are_for_who_waits_for_them_few_at_a_time_and_where_there_is_something_to_open() {
    let d = on_tcp();
    let answers: Vec<Reply> = (0..9).map(|_| d.act("/v1/session-links")).collect();
    assert!(answers[..8].iter().all(|a| a.status == 201));
    is(&answers[8], 429, "too_many_requests");
    let said = open(&[], &d.socket());
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success() && text.contains("links"), "{text}");
    // One of them is used, and there is room again; an answer that is repeated for a key has no code.
    let code = answers[0].json()["urls"][0].as_str().unwrap().split_once('#').unwrap().1.to_owned();
    let _ = opening(&code).send_tcp(&d.listens("tcp:")).expect(201);
    let keyed = Request::new("POST", "/v1/session-links").header("idempotency-key", "k");
    let first = d.send(&keyed).expect(201).json();
    let again = d.send(&keyed).expect(201);
    assert_eq!((again.header("idempotency-replayed"), &again.json()["id"]), (Some("true"), &first["id"]));
    assert_eq!(again.json()["urls"], json!([]));

    let alone = Daemon::start("b");
    let said = open(&["--print"], &alone.socket());
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    assert!(text.contains("no_network_listener"), "{text}");
    let said = open(&["--print"], &alone.directory().join("nothing.sock"));
    assert!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    // With what it says beside the link, whose session it will be.
    let other = on_tcp();
    let said = open(&[], &other.socket());
    let uid = rustix::process::geteuid().as_raw();
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(
        said.status.success() && text.contains(&format!("unix:{uid}")) && text.contains("admin"),
        "{said:?}"
    );
}

#[test]
fn what_a_person_opens_is_used_by_a_real_browser() {
    let browser = ["chromium", "chromium-browser"].into_iter().find(|name| {
        Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    });
    let Some(browser) = browser else {
        println!("SKIPPED (no chromium): a session in a browser");
        return;
    };
    let d = on_tcp();
    let (address, code) = link(&d);
    let profile = tempfile::tempdir().unwrap();
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .arg("--remote-debugging-port=0")
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{address}/open#{code}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let opened = until_some("the browser has opened its session", 120, || {
        d.items("/v1/audit-log?operation=session_create").into_iter().find(|e| e["status"] == 201)
    });
    assert!(d.items("/v1/tokens").iter().any(|t| t["id"] == opened["session"]));
    is(&opening(&code).send_tcp(&address), 403, "link_refused");
    // It goes on to the page, which reads the document.
    until("the browser has read the document", 120, || {
        let metrics = d.get("/metrics").text();
        metrics.lines().any(|l| {
            l.contains("operation=\"openapi_3_0_get\"") && l.contains("requests") && !l.ends_with(" 0")
        })
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!d.log().contains(code.rsplit('_').next().unwrap()));
}
