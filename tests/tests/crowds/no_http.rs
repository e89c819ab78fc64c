//! What is answered to those who send no HTTP, or none that is let in.

use super::*;

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
