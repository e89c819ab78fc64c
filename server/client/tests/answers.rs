//! What a client makes of answers: whole ones, endless ones, broken ones, late ones, refusals.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod common;

use std::io::Write as _;
use std::sync::mpsc;

use mirrorvm_client::{Awaited, Client, ClientError, Credential, Limits, Place, Request, blocking};
use serde_json::json;

use common::{LONG, SHORT, Talk, answer, hang_up, head, on_tcp, on_unix, patient, request, run, saying};

fn get() -> Request {
    Request::get("/v1/host")
}

/// An error with its causes, as people see it.
fn told(error: &ClientError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text
}

#[test]
fn an_answer_that_comes_byte_by_byte_is_whole() {
    let sized = "HTTP/1.1 200 OK\r\nx-a: 1\r\ncontent-length: 7\r\n\r\n{\"a\":1}";
    let chunked = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-A: 1\r\ntransfer-encoding: chunked\r\n\r\n\
        3;x=y\r\n{\"a\r\n1\r\n\"\r\n3\r\n:1}\r\n0\r\nx-trailer: z\r\n\r\n";
    let to_the_end = "HTTP/1.0 200 OK\r\nx-a: 1\r\n\r\n{\"a\":1}";
    for text in [sized, chunked, to_the_end] {
        let serve = move |mut stream: Box<dyn Talk>| {
            request(&mut stream)?;
            text.as_bytes()
                .iter()
                .try_for_each(|byte| stream.write_all(&[*byte]).and_then(|()| stream.flush()))
        };
        for server in [on_unix(serve), on_tcp(serve)] {
            let answer = server.blocking().send(&get()).unwrap();
            assert_eq!(
                (answer.header("x-a"), answer.json().unwrap()),
                (Some("1"), json!({"a": 1})),
                "{text}"
            );
        }
    }
}

#[test]
fn an_answer_without_end_is_refused_and_left() {
    let head = "HTTP/1.1 200 OK\r\n";
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n");
    let announced = format!("{head}content-length: 9223372036854775807\r\n\r\n");
    let to_the_end = format!("{head}\r\n");
    let endless: [(String, &str); 4] = [
        (chunked, "a\r\n0123456789\r\n"),
        (announced, "x"),
        (to_the_end, "0123456789"),
        (head.to_owned(), "x-filling: 0123456789\r\n"),
    ];
    for (begin, again) in endless {
        let (left, gone) = mpsc::channel();
        let what = begin.clone();
        let server = on_unix(move |mut stream| {
            request(&mut stream)?;
            stream.write_all(begin.as_bytes())?;
            let piece = again.repeat(1000);
            while stream.write_all(piece.as_bytes()).is_ok() {}
            left.send(()).unwrap();
            Ok(())
        });
        let error = server.limited(Limits { body: 100_000, ..patient() }).send(&get()).unwrap_err();
        match error {
            ClientError::TooLarge { limit: 100_000, .. } => assert!(what.ends_with("\r\n\r\n")),
            ClientError::NotHttp { .. } => assert_eq!(what, head),
            other => panic!("{what}: {other:?}"),
        }
        gone.recv_timeout(LONG).expect("the client hangs up");
    }
}

#[test]
fn a_body_as_long_as_the_bound_is_taken_and_a_request_may_have_its_own() {
    let server = saying(answer("200 OK", "", &"x".repeat(1000)));
    let client = server.limited(Limits { body: 999, ..patient() });
    assert!(matches!(client.send(&get()), Err(ClientError::TooLarge { limit: 999, .. })));
    let answer = client.send(&get().answered_up_to(1000)).unwrap();
    assert_eq!(answer.into_body().len(), 1000);
    assert!(matches!(client.send(&get().answered_up_to(7)), Err(ClientError::TooLarge { limit: 7, .. })));
}

#[test]
fn what_is_no_http_or_breaks_off_is_told_apart() {
    let of = |bytes: &[u8]| saying(bytes).blocking().exchange(&get()).unwrap_err();
    for text in [
        &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
        b"\x15\x03\x03\x00\x02\x02\x46",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: ten\r\n\r\n",
        b"<html></html>\r\n\r\n",
    ] {
        let error = of(text);
        assert!(matches!(error, ClientError::NotHttp { .. }), "{error:?}");
    }
    for text in [
        &b""[..],
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        let error = of(text);
        assert!(matches!(error, ClientError::Broken { .. }), "{error:?}");
        assert!(!error.is_without_effect());
    }
}

#[test]
fn nobody_there_is_said_with_the_place_and_is_without_effect() {
    let server = saying("");
    let endpoint = server.endpoint.clone();
    drop(server);
    let client = blocking::Client::new(Client::new(endpoint.clone()).unwrap()).unwrap();
    let error = client.send(&get()).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }) && error.is_without_effect(), "{error:?}");
    assert!(error.to_string().contains(&endpoint.to_string()), "{error}");
}

#[test]
fn an_answer_that_does_not_come_meets_its_deadline() {
    for begin in ["", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\na"] {
        let (left, gone) = mpsc::channel();
        let server = on_unix(move |mut stream| {
            request(&mut stream)?;
            stream.write_all(begin.as_bytes())?;
            hang_up(&mut stream)?;
            left.send(()).unwrap();
            Ok(())
        });
        let client = server.limited(Limits { answer: SHORT, ..patient() });
        let error = client.send(&get()).unwrap_err();
        let late = |error: &ClientError| matches!(error, ClientError::Late { awaited: Awaited::Answer, limit, .. } if *limit == SHORT);
        assert!(late(&error) && !error.is_without_effect(), "{error:?}");
        gone.recv_timeout(LONG).expect("the client hangs up");
        let own = server.blocking().send(&get().answered_within(SHORT)).unwrap_err();
        assert!(late(&own), "{own:?}");
    }
}

#[test]
fn a_refusal_is_a_problem_with_its_values() {
    let body = json!({
        "type": "/v1/problems/validation_failed", "title": "Values", "status": 422, "code": "validation_failed",
        "detail": "/name: this is missing", "request_id": "r-7", "retryable": true,
        "errors": [{"pointer": "/name", "code": "missing", "detail": "this is missing"}],
        "blocked_reasons": [{"code": "migration_active", "detail": "it moves"}],
    });
    let more = "content-type: application/problem+json; charset=utf-8\r\nretry-after: 3\r\netag: \"7\"\r\n";
    let server = saying(answer("422 Unprocessable Content", more, &body.to_string()));
    let client = server.blocking();
    let error = client.send(&get()).unwrap_err();
    assert_eq!(error.to_string(), "/name: this is missing (422 validation_failed)");
    assert!(error.is_without_effect());
    let problem = error.problem().unwrap();
    assert_eq!((problem.status, problem.code.as_str()), (422, "validation_failed"));
    assert_eq!((problem.retry_after.unwrap().as_secs(), problem.retryable), (3, true));
    assert_eq!((problem.request_id.as_deref(), problem.etag.as_deref()), (Some("r-7"), Some("\"7\"")));
    assert_eq!(problem.errors[0].place, Place::Pointer("/name".into()));
    assert_eq!(problem.blocked_reasons[0].code, "migration_active");
    assert_eq!(problem.document, body);
    // Whoever wants the answer as it is has it.
    let whole = client.exchange(&get()).unwrap();
    assert_eq!((whole.status().as_u16(), whole.problem().as_ref()), (422, Some(problem)));
}

#[test]
fn a_refusal_that_is_no_problem_is_told_by_its_status() {
    let html = "content-type: text/html\r\n";
    let json = "content-type: application/problem+json\r\n";
    for text in
        [answer("502 Bad Gateway", html, "<html>"), answer("500 Oh", json, "{}"), answer("404 No", "", "")]
    {
        let error = saying(text).blocking().send(&get()).unwrap_err();
        assert!(matches!(error, ClientError::Status { .. }) && error.problem().is_none(), "{error:?}");
    }
}

#[test]
fn a_good_answer_that_is_no_json_is_not_of_this_api() {
    let answer = saying(answer("200 OK", "", "<html>")).blocking().send(&get()).unwrap();
    let error = answer.json().unwrap_err();
    assert!(matches!(error, ClientError::Answer { .. }), "{error:?}");
}

#[test]
fn redirects_are_not_followed() {
    let (asked, requests) = mpsc::channel();
    let server = on_unix(move |mut stream| {
        asked.send(request(&mut stream)?).unwrap();
        stream
            .write_all(answer("307 Temporary Redirect", "location: http://evil.example/\r\n", "").as_bytes())
    });
    let answer = server.blocking().send(&get()).unwrap();
    assert_eq!((answer.status().as_u16(), answer.location()), (307, Some("http://evil.example/")));
    assert_eq!(requests.iter().take(1).count(), 1);
    assert!(requests.try_recv().is_err());
}

#[test]
fn an_answer_that_comes_before_the_body_is_taken_counts() {
    let refuse = |mut stream: Box<dyn Talk>| {
        head(&mut stream)?;
        stream.write_all(answer("413 Content Too Large", "connection: close\r\n", "no").as_bytes())
    };
    let server = on_unix(refuse);
    let long = Request::post("/v1/helper-images").body("application/json", vec![b' '; 8 << 20]);
    for _ in 0..20 {
        let answer = server.blocking().exchange(&long).unwrap();
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (413, &b"no"[..]));
    }
}

#[test]
fn no_text_has_the_credential() {
    const SECRET: &str = "mvm_5ecret_of_this_test";
    // It answers with what it was sent: in a problem, in a cookie, in the middle of nothing.
    let echo = |mut stream: Box<dyn Talk>| {
        let asked = request(&mut stream)?;
        let body =
            json!({"code": "internal", "detail": asked, "title": asked, "errors": [{"detail": asked}]});
        let more = format!("content-type: application/problem+json\r\nset-cookie: a={SECRET}\r\n");
        stream.write_all(answer("500 Oh", &more, &body.to_string()).as_bytes())
    };
    let garble = |mut stream: Box<dyn Talk>| {
        let asked = request(&mut stream)?;
        stream.write_all(asked.as_bytes())
    };
    let session = format!("mirrorvm-session-1={SECRET}");
    for credential in [Credential::bearer(SECRET).unwrap(), Credential::session(&session).unwrap()] {
        for server in [on_unix(echo), on_tcp(echo), on_unix(garble)] {
            let client =
                Client::builder(server.endpoint.clone()).credential(credential.clone()).limits(patient());
            let mut shown = format!("{client:?}");
            let client = client.build().unwrap();
            run(async {
                let mut connection = client.connect().await.unwrap();
                let error = client.send(&Request::post("/v1/guests").once()).await.unwrap_err();
                shown.push_str(&format!("{error:?} {}", told(&error)));
                if let Some(problem) = error.problem() {
                    assert!(problem.detail.contains("***"), "the credential was sent: {problem:?}");
                    shown.push_str(&format!("{problem:?} {problem} {}", problem.document));
                }
                shown.push_str(&format!("{:?} {connection:?} {client:?}", connection.exchange(&get()).await));
                let events = client.events(&Request::get("/v1/events/stream")).await;
                shown.push_str(&format!("{events:?}"));
            });
            let blocking = blocking::Client::new(client).unwrap();
            shown.push_str(&format!("{blocking:?} {:?}", blocking.exchange(&get())));
            assert!(!shown.contains(SECRET), "{shown}");
        }
    }
}

#[test]
fn a_kept_connection_serves_many_and_is_over_after_a_failure() {
    let server = on_unix(|mut stream| {
        for n in 0.. {
            let asked = request(&mut stream)?;
            assert!(!asked.contains("connection: close"), "{asked}");
            if asked.starts_with("GET /late ") {
                return hang_up(&mut stream);
            }
            let status = if asked.starts_with("GET /no ") { "404 No" } else { "200 OK" };
            stream.write_all(answer(status, "", &n.to_string()).as_bytes())?;
        }
        Ok(())
    });
    let mut connection = server.blocking().connect().unwrap();
    for n in 0..3 {
        assert_eq!(connection.send(&get()).unwrap().json().unwrap(), n);
    }
    // A refusal is an answer.
    assert!(matches!(connection.send(&Request::get("/no")), Err(ClientError::Status { .. })));
    // What cannot be sent is not sent.
    assert!(matches!(connection.send(&Request::get("no")), Err(ClientError::Request(_))));
    assert_eq!(connection.send(&get()).unwrap().json().unwrap(), 4);
    let late = connection.send(&Request::get("/late").answered_within(SHORT)).unwrap_err();
    assert!(matches!(late, ClientError::Late { .. }), "{late:?}");
    let over = connection.send(&get()).unwrap_err();
    assert!(matches!(over, ClientError::Over(_)) && over.is_without_effect(), "{over:?}");
}

#[test]
fn a_call_that_is_dropped_hangs_up() {
    let (told, events) = mpsc::channel();
    let server = on_unix(move |mut stream| {
        request(&mut stream)?;
        told.send("asked").unwrap();
        hang_up(&mut stream)?;
        told.send("gone").unwrap();
        Ok(())
    });
    let client = server.client();
    run(async {
        let request = get();
        let mut call = Box::pin(client.send(&request));
        while events.try_recv().is_err() {
            let step = tokio::time::timeout(std::time::Duration::from_millis(5), &mut call).await;
            assert!(step.is_err(), "{step:?}");
        }
    });
    assert_eq!(events.recv_timeout(LONG), Ok("gone"));
}

#[test]
fn several_threads_share_a_blocking_client() {
    let server = on_unix(|mut stream| {
        let asked = request(&mut stream)?;
        let path = asked.split(' ').nth(1).unwrap().to_owned();
        stream.write_all(answer("200 OK", "", &path).as_bytes())
    });
    let client = server.blocking();
    std::thread::scope(|s| {
        for thread in 0..8 {
            let client = client.clone();
            s.spawn(move || {
                for n in 0..50 {
                    let path = format!("/{thread}/{n}");
                    assert_eq!(client.send(&Request::get(&path)).unwrap().into_body(), path);
                }
            });
        }
    });
}
