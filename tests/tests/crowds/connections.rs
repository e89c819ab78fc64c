//! Many connections, and those who wait on them.

use super::*;

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
    let started = d.read("/v1/events?limit=1");
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
