//! Row 53: clients that are slow, large or many.

use super::*;

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
