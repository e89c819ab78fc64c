//! Bodies that come slowly, or not at all.

use super::*;

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

/// Most clients send all of a body before they look for an answer, without `Expect`.
#[test]
fn who_sends_all_of_a_body_that_is_too_large_reads_so_and_finds_no_broken_connection() {
    let d = on_tcp(&[]);
    let (address, bearer) = (d.listens("tcp:"), format!("authorization: Bearer {}", d.admin_token()));
    let body = vec![b' '; 20 << 20];
    let pieces: Vec<u8> = body
        .chunks(1 << 20)
        .flat_map(|piece| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat())
        .chain(b"0\r\n\r\n".iter().copied())
        .collect();
    let length = format!("content-length: {}", body.len());
    for (framing, body) in [(length.as_str(), &body), ("transfer-encoding: chunked", &pieces)] {
        for target in ["POST /v1/guests", "POST /v1/migrations", "PATCH /v1/host", "POST /v1/nothing"] {
            let streams: [Box<dyn Talk>; 2] = [
                Box::new(UnixStream::connect(d.socket()).unwrap()),
                Box::new(from([127, 0, 0, 1], &address)),
            ];
            for mut stream in streams {
                let head = format!(
                    "{target} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{bearer}\r\n{framing}\r\n\r\n"
                );
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(body).unwrap();
                stream.flush().unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                let wanted = match target {
                    "POST /v1/nothing" => (404, "route_not_found".to_owned()),
                    _ => (413, "payload_too_large".to_owned()),
                };
                assert_eq!(problem(&answer, target), wanted, "{framing}: {answer}");
            }
        }
    }
    // It has an end all the same, before anybody loses patience who sends for ever.
    let mut stream = UnixStream::connect(d.socket()).unwrap();
    let head = "POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut sent = 0;
    while stream.write_all(&body[..1 << 20]).is_ok() {
        sent += 1;
        assert!(sent < 1000, "{sent} MiB were taken of what is refused");
    }
}
