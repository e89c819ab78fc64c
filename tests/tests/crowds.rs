//! Crowds: many who connect, wait or are refused keep nobody else out; and what is said to those who send no
//! HTTP.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_tests::{AnyServer, Daemon, Reply, Request, daemon_binary, until};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(20);
const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// A daemon on TCP, with counters on TCP beside.
fn on_tcp(environment: &[(&str, &str)]) -> Daemon {
    Daemon::start_as("a", environment, |_| {
        ["--listen", "tcp:127.0.0.1:0", "--metrics-listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec()
    })
}

/// A connection to `to` from an address of this machine.
fn from(address: [u8; 4], to: &str) -> TcpStream {
    let flags = SocketFlags::CLOEXEC;
    let descriptor = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    bind(&descriptor, &SocketAddr::from((address, 0))).unwrap();
    connect(&descriptor, &to.parse::<SocketAddr>().unwrap()).unwrap();
    let stream = TcpStream::from(descriptor);
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

/// The first answer on a connection that stays open, its head alone where there is no length.
fn first(stream: &mut impl Read) -> String {
    let mut text = Vec::new();
    let mut byte = [0; 1];
    while !text.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

/// A connection, in the clear or not.
trait Talk: Read + Write {}
impl<T: Read + Write> Talk for T {}

/// A client of the API over TLS, which brings no certificate.
fn tls_client() -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_no_client_auth();
    Arc::new(config)
}

fn over_tls(config: &Arc<ClientConfig>, address: &str) -> StreamOwned<ClientConnection, TcpStream> {
    let connection = ClientConnection::new(Arc::clone(config), "localhost".try_into().unwrap()).unwrap();
    StreamOwned::new(connection, from([127, 0, 0, 1], address))
}

/// A request whose body the daemon waits for by now; of it this much has come, and not the end.
fn slow_body(mut stream: Box<dyn Talk>, head: &str, framing: &str, body: &str) -> Box<dyn Talk> {
    let head = format!(
        "{head} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n{framing}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let answer = first(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 100"), "{answer}");
    stream.write_all(body.as_bytes()).unwrap();
    stream.flush().unwrap();
    stream
}

/// The number behind a line of the counters.
fn count(d: &Daemon, line: &str) -> u64 {
    let text = d.get("/metrics").expect(200).text();
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or(0)
}

/// Asks often; the middle one of the times that it took.
fn usual(ask: impl Fn()) -> Duration {
    let mut times: Vec<Duration> = (0..15)
        .map(|_| {
            let begun = Instant::now();
            ask();
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

/// Lets this process have as many descriptors as it may.
fn lift_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}

#[test]
fn kept_connections_of_one_address_keep_no_other_out() {
    let d = on_tcp(&[]);
    let address = d.listens("tcp:");
    let mut crowd: Vec<TcpStream> = (0..512).map(|_| from([127, 0, 0, 2], &address)).collect();
    for stream in &mut crowd {
        stream.write_all(LIVEZ).unwrap();
    }
    for stream in &mut crowd {
        assert!(first(stream).starts_with("HTTP/1.1 200"));
    }
    // All of them are open and silent now; another address is answered at once, and so is everybody else.
    let begun = Instant::now();
    let mut other = from([127, 0, 0, 3], &address);
    other.write_all(LIVEZ).unwrap();
    assert!(first(&mut other).starts_with("HTTP/1.1 200"));
    assert!(begun.elapsed() < LONG / 4, "it waited for the silent ones' end: {:?}", begun.elapsed());
    let _ = d.get("/readyz").expect(200);
    let _ = Request::new("GET", "/livez").send_tcp(&d.listens("metrics:tcp:")).expect(200);
    assert!(count(&d, "mirrorvm_http_listener_full_total{what=\"replaced\"}") >= 1);
    assert!(d.log().contains("a listener is full"), "{}", d.log());
    // One of the crowd had to go, the longest silent.
    assert_eq!(crowd[0].read(&mut [0; 1]).unwrap(), 0);
    // Whoever goes on asking keeps the place, however many come.
    for n in 0..600 {
        if n % 100 == 0 {
            other.write_all(LIVEZ).unwrap();
            assert!(first(&mut other).starts_with("HTTP/1.1 200"), "{n}");
        }
        crowd.push(from([127, 0, 0, 2], &address));
    }
}

#[test]
fn thousands_that_connect_and_say_nothing_slow_nobody() {
    let many = (lift_descriptors() / 2).min(4000) as usize;
    let d = on_tcp(&[]);
    let address = d.listens("tcp:");
    let watched = d.listens("metrics:tcp:");
    // The first come, stay and say nothing, or half of something.
    let mut crowd = Vec::new();
    for n in 0..many {
        let mut stream = TcpStream::connect(if n % 4 == 0 { &watched } else { &address }).unwrap();
        if n % 2 == 0 {
            let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nx: ");
        }
        crowd.push(stream);
    }
    let unix = usual(|| _ = d.get("/v1/host").expect(200));
    assert!(unix < Duration::from_secs(1), "the Unix socket: {unix:?}");
    let monitoring = usual(|| _ = Request::new("GET", "/livez").send_tcp(&watched).expect(200));
    assert!(monitoring < Duration::from_secs(1), "monitoring: {monitoring:?}");
    let tcp = usual(|| _ = Request::new("GET", "/livez").send_tcp(&address).expect(200));
    assert!(tcp < Duration::from_secs(1), "TCP: {tcp:?}");
    println!("beside {many} silent connections: unix {unix:?}, monitoring {monitoring:?}, tcp {tcp:?}");
    // They hold what they may and no more.
    let census = d.census();
    assert!(census.fds < 2 * (512 + 3 * 16) + 100, "{census:?}");
    drop(crowd);
    until("the crowd's descriptors are gone", 20, || d.census().fds < 100);
}

#[test]
fn few_descriptors_are_shared_out_and_not_used_up() {
    // As many shells start programs: few by default, and here no more to be had.
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "ulimit -n 256; exec {} serve --state-dir {} --listen tcp:127.0.0.1:0",
        daemon_binary().display(),
        dir.path().join("state").display()
    );
    let mut child = std::process::Command::new("sh")
        .args(["-c", &script])
        .env_remove("MIRRORVM_STATE_DIR")
        .stdout(std::process::Stdio::piped())
        .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut ready)
        .unwrap();
    let address =
        ready.split_whitespace().find_map(|w| w.strip_prefix("tcp:")).unwrap_or_else(|| panic!("{ready}"));
    let crowd: Vec<TcpStream> = (0..400).map(|_| TcpStream::connect(address).unwrap()).collect();
    let socket = dir.path().join("state/mirrorvmd.sock");
    let body = json!({"name": "l", "role": "viewer"});
    let _ = Request::new("POST", "/v1/tokens").json(&body).send(&socket).expect(201);
    let _ = Request::new("GET", "/livez").send_tcp(address).expect(200);
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("fewer connections") && !log.contains("cannot accept"), "{log}");
    drop(crowd);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn viewer(d: &Daemon) -> String {
    let body = json!({"name": "v", "role": "viewer"});
    d.post("/v1/tokens", &body).expect(201).json()["secret"].as_str().unwrap().to_owned()
}

#[test]
fn long_polls_have_a_share_of_their_own_and_those_of_one_principal_half_of_it() {
    lift_descriptors();
    let d = on_tcp(&[("MIRRORVM_LIMITS_HEADER_SECONDS", "60")]);
    let address = d.listens("tcp:");
    let other = viewer(&d);
    let latest = d.read("/v1/events?limit=1000")["next_cursor"].as_str().unwrap().to_owned();
    let poll = |secret: &str| {
        let text = format!(
            "GET /v1/events?after={latest}&wait=60s HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {secret}\r\n\r\n",
        );
        let mut stream = from([127, 0, 0, 1], &address);
        stream.write_all(text.as_bytes()).unwrap();
        stream
    };
    let refused = || count(&d, "mirrorvm_http_problems_total{code=\"too_many_long_polls\"}");
    let mut waiting: Vec<TcpStream> = (0..520).map(|_| poll(&d.admin_token())).collect();
    // A quarter of the listener waits. The others were told why not at once.
    until("as many of one principal wait as may", 20, || count(&d, "mirrorvm_long_polls") == 128);
    until("the others have their answers", 20, || refused() == 520 - 128);
    let mut surplus: Vec<String> = Vec::new();
    for stream in &mut waiting {
        stream.set_nonblocking(true).unwrap();
        let mut byte = [0; 1];
        match stream.peek(&mut byte) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            // Its place was given to one of the later ones, after the answer.
            Err(_) | Ok(0) => surplus.push(String::new()),
            Ok(_) => {
                stream.set_nonblocking(false).unwrap();
                surplus.push(first(stream));
            }
        }
    }
    let told: Vec<&String> = surplus.iter().filter(|s| !s.is_empty()).collect();
    assert!(surplus.len() == 520 - 128 && told.len() > 200, "{} {}", surplus.len(), told.len());
    for answer in told {
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1\r\n"), "{answer}");
        assert!(answer.contains("\"code\":\"too_many_long_polls\"") && answer.contains("problem+json"));
        assert!(answer.contains("128 long polls of token:"), "{answer}");
    }
    // Neither liveness nor work waits for them, nor do others who wait; nor does the log grow with each.
    let _ = Request::new("GET", "/livez").send_tcp(&address).expect(200);
    let bearer = format!("Bearer {}", d.admin_token());
    let host = Request::new("GET", "/v1/host").header("authorization", &bearer);
    let _ = host.send_tcp(&address).expect(200);
    let brief = format!("/v1/events?after={latest}&wait=1s");
    assert_eq!(d.read(&brief)["items"], json!([]), "over the Unix socket");
    let theirs: Vec<TcpStream> = (0..128).map(|_| poll(&other)).collect();
    until("another principal waits beside them", 20, || count(&d, "mirrorvm_long_polls") == 256);
    assert_eq!(refused(), 520 - 128);
    // All places are taken by now: that is told, and everything else is done.
    let full = d.get(&brief).expect(503);
    assert_eq!(full.problem(), "too_many_long_polls");
    assert!(full.text().contains("as many callers wait for changes as may"), "{}", full.text());
    let _ = d.read("/v1/host");
    let lines = d.log().lines().filter(|l| l.contains("too_many_long_polls")).count();
    assert!((1..=80).contains(&lines), "{lines} lines");
    drop((waiting, theirs));
    until("their places are free again", 20, || count(&d, "mirrorvm_long_polls") == 0);
}

#[test]
fn streams_leave_room_on_their_listener() {
    let d = on_tcp(&[("MIRRORVM_LIMITS_CONNECTIONS", "16")]);
    let address = d.listens("tcp:");
    // Of two principals: one alone has half of the places.
    let open = [d.admin_token(), viewer(&d)].map(|secret| {
        format!("GET /v1/events/stream HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {secret}\r\n\r\n")
    });
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut refused = 0;
    for open in open.iter().flat_map(|open| [open; 6]) {
        let mut stream = from([127, 0, 0, 1], &address);
        stream.write_all(open.as_bytes()).unwrap();
        let answer = first(&mut stream);
        if answer.starts_with("HTTP/1.1 200") {
            streams.push(stream);
        } else {
            assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1\r\n"), "{answer}");
            refused += 1;
        }
    }
    assert_eq!((streams.len(), refused), (4, 8));
    let _ = Request::new("GET", "/livez").send_tcp(&address).expect(200);
}

#[test]
fn a_full_listener_still_says_that_the_daemon_lives() {
    let d = on_tcp(&[("MIRRORVM_LIMITS_CONNECTIONS", "2")]);
    let address = d.listens("tcp:");
    let bearer = format!("Bearer {}", d.admin_token());
    // What the daemon works at is not silent: a stream and a long poll hold what there is.
    // Behind the event of the start, which may still be on its way.
    let started = d.read("/v1/events?wait=60s&limit=1");
    assert_eq!(started["items"][0]["type"], "host.started");
    let latest = started["next_cursor"].as_str().unwrap().to_owned();
    let busy =
        ["/v1/events/stream".to_owned(), format!("/v1/events?after={latest}&wait=60s")].map(|target| {
            let mut stream = from([127, 0, 0, 1], &address);
            let head = format!("GET {target} HTTP/1.1\r\nhost: localhost\r\nauthorization: {bearer}\r\n\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            stream
        });
    until("both are served", 20, || {
        (count(&d, "mirrorvm_event_streams"), count(&d, "mirrorvm_long_polls")) == (1, 1)
    });
    let host = Request::new("GET", "/v1/host").header("authorization", &bearer);
    let refused = host.send_tcp(&address);
    assert_eq!((refused.status, refused.problem().as_str()), (503, "too_many_connections"));
    assert_eq!((refused.header("retry-after"), refused.header("connection")), (Some("1"), Some("close")));
    for target in ["/livez", "/readyz", "/metrics"] {
        let _ = Request::new("GET", target).header("authorization", &bearer).send_tcp(&address).expect(200);
    }
    let _ = d.get("/v1/host").expect(200);
    assert!(count(&d, "mirrorvm_http_listener_full_total{what=\"reserved\"}") >= 4);
    drop(busy);
    until("there is room again", 20, || host.send_tcp(&address).status == 200);
}

#[test]
fn bodies_that_do_not_come_hold_no_listener_whoever_sends_them() {
    lift_descriptors();
    let d = on_tcp(&[("MIRRORVM_LIMITS_BODY_SECONDS", "300")]);
    let address = d.listens("tcp:");
    let bearer = format!("Bearer {}", d.admin_token());
    let host = Request::new("GET", "/v1/host").header("authorization", &bearer);
    let before = d.items("/v1/helper-images");
    for (head, more) in [
        ("POST /v1/session", "x-mirrorvm: 1".to_owned()),
        ("POST /v1/helper-images", format!("authorization: {bearer}")),
    ] {
        let mut crowd = Vec::new();
        for n in 0..700 {
            // What came of each would do, were it all.
            let body = format!("{{\"name\": \"n{n}\"}}");
            let (framing, body) = if n % 2 == 0 {
                ("content-length: 100", body)
            } else {
                ("transfer-encoding: chunked", format!("{:x}\r\n{body}\r\n", body.len()))
            };
            let stream = Box::new(from([127, 0, 0, 1], &address));
            crowd.push(slow_body(stream, head, &format!("{more}\r\n{framing}"), &body));
        }
        for n in 0..20 {
            let _ = host.send_tcp(&address).expect(200);
            let token = json!({"name": format!("t{n}"), "role": "viewer"});
            let change = Request::new("POST", "/v1/tokens").json(&token).header("authorization", &bearer);
            let _ = change.send_tcp(&address).expect(201);
        }
        // They have made room one by one, and the others are still there.
        let mut gone = 0;
        for stream in &mut crowd[..100] {
            gone += usize::from(match stream.read(&mut [0; 1]) {
                Ok(read) => read == 0,
                Err(e) => e.kind() == ErrorKind::ConnectionReset,
            });
        }
        assert_eq!(gone, 100);
        drop(crowd);
        until("the crowd is gone", 20, || count(&d, "mirrorvm_http_connections") < 10);
    }
    assert_eq!(d.items("/v1/helper-images"), before, "of a request that is cut off nothing is done");
    assert!(count(&d, "mirrorvm_http_listener_full_total{what=\"replaced\"}") >= 2 * (700 - 512));
    assert_eq!(count(&d, "mirrorvm_http_listener_full_total{what=\"refused\"}"), 0);
    // At the place for monitoring no body is waited for.
    let watched = d.listens("metrics:tcp:");
    let crowd: Vec<TcpStream> = (0..600)
        .map(|_| {
            let mut stream = from([127, 0, 0, 1], &watched);
            stream.write_all(b"GET /livez HTTP/1.1\r\ncontent-length: 100\r\n\r\n{").unwrap();
            assert!(first(&mut stream).starts_with("HTTP/1.1 200"));
            stream
        })
        .collect();
    for _ in 0..20 {
        let _ = Request::new("GET", "/readyz").send_tcp(&watched).expect(200);
    }
    drop(crowd);
}

#[test]
fn over_tls_neither_handshakes_nor_bodies_that_do_not_come_hold_the_listener() {
    let environment = [
        ("MIRRORVM_LIMITS_BODY_SECONDS", "300"),
        ("MIRRORVM_LIMITS_HANDSHAKE_SECONDS", "300"),
        ("MIRRORVM_LIMITS_CONNECTIONS", "32"),
    ];
    let d = Daemon::start_as("a", &environment, |dir| {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        std::fs::write(at("c.pem"), made.cert.pem()).unwrap();
        std::fs::write(at("k.pem"), made.signing_key.serialize_pem()).unwrap();
        std::fs::set_permissions(at("k.pem"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let arguments =
            ["--listen", "tls:127.0.0.1:0", "--tls-certificate", &at("c.pem"), "--tls-key", &at("k.pem")];
        arguments.map(str::to_owned).to_vec()
    });
    let (address, config) = (d.listens("tls:"), tls_client());
    let mut crowd: Vec<Box<dyn Talk>> = Vec::new();
    for n in 0..60 {
        crowd.push(Box::new(from([127, 0, 0, 1], &address)));
        if n % 2 == 0 {
            let stream = Box::new(over_tls(&config, &address));
            crowd.push(slow_body(stream, "POST /v1/session", "x-mirrorvm: 1\r\ncontent-length: 100", "{"));
        }
    }
    for _ in 0..5 {
        let mut stream = over_tls(&config, &address);
        let bearer = format!("authorization: Bearer {}", d.admin_token());
        write!(stream, "GET /v1/host HTTP/1.1\r\nhost: localhost\r\n{bearer}\r\n\r\n").unwrap();
        let answer = first(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    drop(crowd);
}

#[test]
fn answers_that_are_not_read_hold_no_listener() {
    let d = on_tcp(&[("MIRRORVM_LIMITS_STREAM_STALL_SECONDS", "300"), ("MIRRORVM_LIMITS_CONNECTIONS", "64")]);
    let bearer = format!("Bearer {}", d.admin_token());
    for (listener, target, times, asks) in
        [("tcp:", "/v1/openapi.json", 20, "/v1/host"), ("metrics:tcp:", "/metrics", 1000, "/readyz")]
    {
        let address = d.listens(listener);
        let text = format!("GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n").repeat(times);
        let crowd: Vec<TcpStream> = (0..80)
            .map(|_| {
                let socket =
                    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
                sockopt::set_socket_recv_buffer_size(&socket, 2048).unwrap();
                connect(&socket, &address.parse::<SocketAddr>().unwrap()).unwrap();
                let mut stream = TcpStream::from(socket);
                stream.write_all(text.as_bytes()).unwrap();
                stream
            })
            .collect();
        let ask = || Request::new("GET", asks).header("authorization", &bearer).send_tcp(&address).status;
        // As soon as nothing more goes out to them.
        until("somebody else is answered", 60, || ask() == 200);
        for _ in 0..20 {
            until("and goes on being answered", 60, || ask() == 200);
        }
        drop(crowd);
    }
}

#[test]
fn a_request_that_the_end_cuts_off_is_not_taken_for_whole() {
    let mut d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_DRAIN_SECONDS", "0")]);
    let before = d.items("/v1/helper-images");
    let crowd: Vec<Box<dyn Talk>> = (0..20)
        .map(|n| {
            let stream = UnixStream::connect(d.socket()).unwrap();
            let body = format!("{{\"name\": \"n{n}\"}}");
            slow_body(Box::new(stream), "POST /v1/helper-images", "content-length: 100", &body)
        })
        .collect();
    assert!(d.terminate().success());
    d.restart();
    assert_eq!(d.items("/v1/helper-images"), before);
    drop(crowd);
}

#[test]
fn requests_that_are_refused_do_not_fill_the_log() {
    let d = on_tcp(&[]);
    let address = d.listens("tcp:");
    let before = d.log().len();
    let mut stream = from([127, 0, 0, 1], &address);
    for _ in 0..3000 {
        stream.write_all(b"GET /v1/guests HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        assert!(first(&mut stream).starts_with("HTTP/1.1 401"));
    }
    // One kind of refusal hides no other.
    let _ = d.get("/v1/guests/nothing").expect(404);
    let log = d.log();
    let lines = |code: &str| log.lines().filter(|l| l.contains("refused") && l.contains(code)).count();
    assert!((50..=150).contains(&lines("unauthenticated")), "{}", lines("unauthenticated"));
    assert_eq!(lines("not_found"), 1, "{log}");
    assert!(log.len() - before < 60_000, "{}", log.len() - before);
    // What was left out is counted, at the latest at the end.
    let mut d = d;
    assert!(d.terminate().success());
    let log = d.log();
    let left_out: u64 = log
        .lines()
        .filter(|l| l.contains("unauthenticated"))
        .filter_map(|l| l.split("left_out=").nth(1)?.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    let written = log.lines().filter(|l| l.contains("refused") && l.contains("unauthenticated")).count();
    assert_eq!(left_out + written as u64, 3000, "{log}");
}

/// What is answered to these bytes on the Unix socket, whole.
fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    let _ = stream.write_all(bytes);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Status and code of an answer that must be a problem as all are.
fn problem(answer: &str, what: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{what}: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{what}: {e}: {answer}"));
    let header = |name: &str| head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
    assert_eq!(header("content-type"), Some("application/problem+json"), "{what}: {answer}");
    assert_eq!(header("x-request-id"), body["request_id"].as_str(), "{what}: {answer}");
    assert_eq!(body["status"], status, "{what}: {answer}");
    let code = body["code"].as_str().unwrap().to_owned();
    assert_eq!(body["type"], format!("/v1/problems/{code}"), "{what}");
    assert!(!body["title"].as_str().unwrap().is_empty() && !body["detail"].as_str().unwrap().is_empty());
    (status, code)
}

#[test]
fn what_is_no_request_is_answered_with_a_problem() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_HEADER_SECONDS", "1")]);
    let many = "a: b\r\n".repeat(65);
    let malformed: [(&str, &[u8]); 16] = [
        ("no HTTP at all", b"hello\r\n\r\n"),
        ("no version", b"GET /livez\r\n\r\n"),
        ("another version", b"GET /livez HTTP/3.0\r\nhost: x\r\n\r\n"),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("a method with a space", b"G ET /livez HTTP/1.1\r\nhost: x\r\n\r\n"),
        ("a target with a space", b"GET /li vez HTTP/1.1\r\nhost: x\r\n\r\n"),
        ("a control character in the target", b"GET /li\x01vez HTTP/1.1\r\nhost: x\r\n\r\n"),
        ("a header without a colon", b"GET /livez HTTP/1.1\r\nhost: x\r\nnothing\r\n\r\n"),
        ("a header with a space in its name", b"GET /livez HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n"),
        ("a NUL in a header", b"GET /livez HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n"),
        ("a header over two lines", b"GET /livez HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n"),
        ("a length that is none", b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-length: ten\r\n\r\n"),
        (
            "two lengths",
            b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        ),
        ("TLS where there is none", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00\r\n\r\n"),
        (
            "a transfer coding that is not known",
            b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ntransfer-encoding: zip\r\n\r\n",
        ),
        ("no host", b"GET /livez HTTP/1.1\r\n\r\n"),
    ];
    for (what, bytes) in malformed {
        let answer = raw(&d.socket(), bytes);
        assert_eq!(problem(&answer, what), (400, "malformed_request".into()), "{what}: {answer}");
    }
    let many = format!("GET /livez HTTP/1.1\r\nhost: x\r\n{many}\r\n");
    assert_eq!(
        problem(&raw(&d.socket(), many.as_bytes()), "many headers"),
        (431, "headers_too_large".into())
    );
    let slow = raw(&d.socket(), b"GET /livez HTTP/1.1\r\nx: ");
    assert_eq!(problem(&slow, "a head that does not end"), (408, "request_timeout".into()));
    // Nothing of a request at all is no error to tell anybody of.
    assert_eq!(raw(&d.socket(), b""), "");
    // It is logged and counted as every other.
    assert!(count(&d, "mirrorvm_http_problems_total{code=\"malformed_request\"}") >= 16);
    assert!(d.log().contains("malformed_request"));
}

#[test]
fn a_transfer_coding_beside_chunked_is_refused_and_not_passed_over() {
    let d = on_tcp(&[]);
    let of = |codings: &str| {
        let text = format!(
            "POST /v1/helper-images HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{codings}\
             connection: close\r\n\r\nd\r\n{{\"name\": \"x\"}}\r\n0\r\n\r\n"
        );
        raw(&d.socket(), text.as_bytes())
    };
    for codings in [
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: identity, chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    ] {
        let (status, code) = problem(&of(codings), codings);
        assert!(
            [(415, "unsupported_media_type"), (400, "malformed_request")].contains(&(status, &code)),
            "{codings}: {status} {code}"
        );
    }
    assert_eq!(problem(&of("transfer-encoding: gzip, chunked\r\n"), "gzip").0, 415);
    let taken = of("transfer-encoding: Chunked\r\n");
    assert!(taken.starts_with("HTTP/1.1 201"), "{taken}");
    // Monitoring as well, where nobody reads a body.
    let mut stream = from([127, 0, 0, 1], &d.listens("metrics:tcp:"));
    stream.write_all(b"GET /livez HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n").unwrap();
    let answer = first(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
}

#[test]
fn a_head_has_64_kib_and_not_a_byte_more() {
    let d = Daemon::start("a");
    let fixed = "GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: \r\n\r\n".len();
    let head = |bytes: usize| {
        let filling = "y".repeat(bytes - fixed);
        format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: {filling}\r\n\r\n")
    };
    let max = 64 << 10;
    assert_eq!(head(max).len(), max);
    assert!(
        raw(&d.socket(), head(max).as_bytes()).starts_with("HTTP/1.1 200"),
        "exactly as long as it may be"
    );
    for bytes in [max + 1, max + 2, 70_000, 80_000, 200_000, 1 << 20] {
        let answer = raw(&d.socket(), head(bytes).as_bytes());
        assert_eq!(problem(&answer, &bytes.to_string()), (431, "headers_too_large".into()), "{bytes}");
    }
    // In pieces it is as long as in one, and so it is when it comes after another on the same connection.
    for (bytes, status) in [(max, "200"), (max + 1, "431")] {
        let text = head(bytes);
        let mut stream = UnixStream::connect(d.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(LIVEZ).unwrap();
        assert!(first(&mut stream).starts_with("HTTP/1.1 200"));
        for piece in text.as_bytes().chunks(1000) {
            let _ = stream.write_all(piece);
        }
        let answer = first(&mut stream);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{bytes}: {answer}");
    }
    // Behind another without waiting for its answer.
    for (bytes, status) in [(max, "200"), (70_000, "431")] {
        let answers = raw(&d.socket(), &[LIVEZ, head(bytes).as_bytes()].concat());
        let last = answers.rfind("HTTP/1.1 ").map(|at| answers[at + 9..at + 12].to_owned());
        assert_eq!(last.as_deref(), Some(status), "{bytes}: {answers}");
    }
    // A target as long as that is one, too.
    let target = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(max));
    let (status, code) = problem(&raw(&d.socket(), target.as_bytes()), "a target");
    assert!(
        [(414, "uri_too_long"), (431, "headers_too_large")].contains(&(status, &code)),
        "{status} {code}"
    );
}

#[test]
fn http_1_1_names_its_host_once() {
    let d = on_tcp(&[]);
    let of = |head: &str| raw(&d.socket(), format!("{head}connection: close\r\n\r\n").as_bytes());
    for head in [
        "GET /livez HTTP/1.1\r\n",
        "GET /livez HTTP/1.1\r\nhost: a\r\nhost: a\r\n",
        "GET /livez HTTP/1.1\r\nhost: a b\r\n",
        "GET /livez HTTP/1.0\r\nhost: a\r\nhost: b\r\n",
    ] {
        assert_eq!(problem(&of(head), head), (400, "malformed_request".into()), "{head}");
    }
    for head in [
        "GET /livez HTTP/1.0\r\n",
        "GET /livez HTTP/1.1\r\nhost: a:1\r\n",
        "GET /livez HTTP/1.1\r\nhost:\r\n",
    ] {
        assert!(
            of(head).starts_with("HTTP/1.1 200") || of(head).starts_with("HTTP/1.0 200"),
            "{head}: {}",
            of(head)
        );
    }
}

#[test]
fn monitoring_asks_nobody_under_which_name_it_is_known() {
    let d = on_tcp(&[]);
    let address = d.listens("metrics:tcp:");
    let of = |text: &str| {
        let mut stream = from([127, 0, 0, 1], &address);
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for target in ["/livez", "/readyz", "/readyz?verbose", "/metrics"] {
        for rest in [
            "HTTP/1.0\r\n\r\n",
            "HTTP/1.0\r\nhost: scraper.example\r\n\r\n",
            "HTTP/1.1\r\nconnection: close\r\n\r\n",
            "HTTP/1.1\r\nhost: metrics.example:9090\r\nconnection: close\r\n\r\n",
            "HTTP/1.1\r\nhost: 192.0.2.7\r\norigin: http://board.example\r\nconnection: close\r\n\r\n",
            "HTTP/1.1\r\nhost: a\r\nauthorization: Basic eDp5\r\nconnection: close\r\n\r\n",
        ] {
            let answer = of(&format!("GET {target} {rest}"));
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert_eq!(status, "200", "{target} {rest}: {answer}");
        }
    }
    // The API itself asks; and here is nothing of it, under whatever name.
    let foreign = Request::new("GET", "/livez").header("host", "evil.example");
    assert_eq!(foreign.send_tcp(&d.listens("tcp:")).problem(), "origin_refused");
    let bearer = format!("Bearer {}", d.admin_token());
    for (method, target) in [
        ("GET", "/v1/guests"),
        ("POST", "/v1/guests"),
        ("GET", "/v1/version"),
        ("GET", "/docs/"),
        ("GET", "/"),
    ] {
        let reply = Request::new(method, target).header("authorization", &bearer).send_tcp(&address);
        assert_eq!((reply.status, reply.problem().as_str()), (404, "route_not_found"), "{method} {target}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let reply = Request::new(method, "/metrics").send_tcp(&address);
        assert_eq!((reply.status, reply.problem().as_str()), (405, "method_not_allowed"), "{method}");
    }
}

/// Memory of its own that a daemon has, in KiB.
fn memory(d: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", d.pid())).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap()
    };
    of("RssAnon:")
}

#[test]
fn a_body_takes_memory_as_it_comes_and_not_as_it_is_announced() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_BODY_SECONDS", "60")]);
    let _: Reply = d.post("/v1/helper-images", &json!({"name": "h"})).expect(201);
    let before = memory(&d);
    let length = 16 << 20;
    let head = |target: &str, kind: &str, length: usize| {
        format!(
            "{target} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n12345678"
        )
    };
    let image = head("PUT /v1/helper-images/h/content", "application/octet-stream", length);
    let crowd: Vec<UnixStream> = (0..200)
        .map(|_| {
            let mut stream = UnixStream::connect(d.socket()).unwrap();
            stream.write_all(image.as_bytes()).unwrap();
            stream
        })
        .collect();
    until("all of them are open", 20, || count(&d, "mirrorvm_http_connections") == 201);
    let grown = memory(&d).saturating_sub(before);
    // 3.2 GB were announced, 1600 bytes came.
    assert!(grown < 40 << 10, "{grown} KiB");
    drop(crowd);
    // Only where such a body belongs is it read at all: what ends like it is something else.
    for target in
        ["PATCH /v1/guests/content", "POST /v1/guests/imports/start", "PUT /v1/guests/address-space-plans"]
    {
        let answer = raw(&d.socket(), head(target, "application/json", 100_000).as_bytes());
        assert_eq!(problem(&answer, target), (413, "payload_too_large".into()), "{answer}");
    }
}
