//! What takes more than one answer: lists of many pages, a resource as it changes, events.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod common;

use std::io::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use mirrorvm_client::{Awaited, ClientError, Limits, Request};
use serde_json::{Value, json};

use common::{LONG, SHORT, Server, answer, hang_up, on_unix, patient, request, run, saying};

/// A server that gives one answer after the other, and checks the target of each request.
fn story(parts: Vec<(&'static str, String)>) -> Server {
    let parts = Mutex::new(parts.into_iter());
    on_unix(move |mut stream| {
        let asked = request(&mut stream)?;
        let (target, answer) = parts.lock().unwrap().next().expect("no more requests");
        let said = if asked.starts_with(target) { answer } else { common::answer("400 Bad", "", &asked) };
        stream.write_all(said.as_bytes())
    })
}

fn page(items: &Value, next: Option<&str>) -> String {
    let mut body = json!({ "items": items });
    if let Some(next) = next {
        body["next_page_token"] = json!(next);
    }
    answer("200 OK", "", &body.to_string())
}

#[test]
fn a_list_is_followed_to_its_last_page() {
    let server = story(vec![
        ("GET /v1/guests?limit=2 ", page(&json!([1, 2]), Some("t/1"))),
        ("GET /v1/guests?limit=2&page_token=t%2F1 ", page(&json!([3, 4]), Some("t2"))),
        ("GET /v1/guests?limit=2&page_token=t2 ", page(&json!([]), None)),
    ]);
    let mut pages = server.client().pages(Request::get("/v1/guests?limit=2"));
    run(async {
        assert_eq!(pages.next().await.unwrap().unwrap(), [1, 2]);
        assert_eq!(pages.all(10).await.unwrap(), [3, 4]);
    });
}

#[test]
fn a_list_that_goes_in_circles_or_on_for_ever_is_refused() {
    let server = saying(page(&json!([1]), Some("t")));
    let all = |most| run(server.client().pages(Request::get("/v1/guests")).all(most));
    let error = all(10).unwrap_err();
    assert!(error.to_string().contains("whose next page is itself"), "{error}");
    assert!(matches!(all(0), Err(ClientError::Answer { .. })), "more than nothing");
    for body in ["{}", "[]", r#"{"items": 1}"#, r#"{"items": [], "next_page_token": 1}"#] {
        let error =
            run(saying(answer("200 OK", "", body)).client().pages(Request::get("/")).next()).unwrap_err();
        assert!(matches!(error, ClientError::Answer { .. }), "{body}: {error:?}");
    }
}

#[test]
fn a_page_that_did_not_come_is_asked_for_again() {
    let server = story(vec![
        ("GET /v1/guests ", page(&json!([1]), Some("t"))),
        ("GET /v1/guests?page_token=t ", String::new()),
        ("GET /v1/guests?page_token=t ", page(&json!([2]), None)),
    ]);
    let mut pages = server.client().pages(Request::get("/v1/guests"));
    run(async {
        assert_eq!(pages.next().await.unwrap().unwrap(), [1]);
        assert!(matches!(pages.next().await, Err(ClientError::Broken { .. })));
        assert_eq!(pages.next().await.unwrap().unwrap(), [2]);
        assert_eq!(pages.next().await.unwrap(), None);
    });
}

#[test]
fn a_resource_is_given_when_it_is_another() {
    let (asked, requests) = std::sync::mpsc::channel();
    let answers = Mutex::new(
        vec![
            answer("200 OK", "etag: \"1\"\r\n", r#"{"n": 1}"#),
            "HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\n\r\n".to_owned(),
            answer("503 Busy", "", ""),
            answer("200 OK", "etag: \"2\"\r\n", r#"{"n": 2}"#),
            answer("200 OK", "", r#"{"n": 3}"#),
            answer("200 OK", "etag: \"4\"\r\n", r#"{"n": 4}"#),
        ]
        .into_iter(),
    );
    let server = on_unix(move |mut stream| {
        asked.send(request(&mut stream)?).unwrap();
        let answer = answers.lock().unwrap().next().expect("no more requests");
        stream.write_all(answer.as_bytes())
    });
    let mut watch = server.client().watch(Request::get("/v1/guests/g"), Duration::from_secs(600));
    run(async {
        assert_eq!(watch.changed().await.unwrap().unwrap()["n"], 1);
        assert_eq!(watch.changed().await.unwrap(), None);
        assert!(watch.changed().await.is_err());
        for n in 2..5 {
            assert_eq!(watch.changed().await.unwrap().unwrap()["n"], n);
        }
    });
    let requests: Vec<String> = requests.try_iter().collect();
    assert!(requests.iter().all(|r| r.starts_with("GET /v1/guests/g?wait=60s ")), "{requests:?}");
    let tags: Vec<Option<&str>> =
        requests.iter().map(|r| r.lines().find_map(|l| l.strip_prefix("if-none-match: "))).collect();
    // Without an ETag there is nothing to hold the next one against.
    assert_eq!(tags, [None, Some("\"1\""), Some("\"1\""), Some("\"1\""), Some("\"2\""), None]);
}

const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

#[test]
fn events_come_as_they_are_sent_and_end_with_the_stream() {
    let server = saying(
        [
            STREAM,
            &chunk(": mirrorvm events\n\nid: e-1\nevent: guest.cre"),
            &chunk("ated\ndata: {\"n\": 1}\n\nid: e-2\nevent: bookmark\ndata: {}\n\n"),
            "0\r\n\r\n",
        ]
        .concat(),
    );
    let mut events =
        server.blocking().events(&Request::get("/v1/events/stream").query("type", "guest.*")).unwrap();
    assert_eq!(events.last_id(), None);
    let first = events.next().unwrap().unwrap();
    assert_eq!((first.kind.as_str(), first.json()), ("guest.created", Some(json!({"n": 1}))));
    assert_eq!(events.last_id(), Some("e-1"));
    assert_eq!(events.next().unwrap().unwrap().kind, "bookmark");
    assert_eq!(events.next().unwrap(), None);
    assert_eq!(events.last_id(), Some("e-2"));
}

#[test]
fn a_stream_that_is_refused_or_none_is_told() {
    let problem = json!({"code": "no_resources", "detail": "2 event streams"}).to_string();
    let refused = answer("503 Busy", "content-type: application/problem+json\r\n", &problem);
    let error = saying(refused).blocking().events(&Request::get("/v1/events/stream")).unwrap_err();
    assert_eq!(error.problem().unwrap().code, "no_resources");
    for text in [
        answer("200 OK", "content-type: application/json\r\n", "{}"),
        answer("200 OK", "", ""),
        answer("304 No", "", ""),
    ] {
        let error = saying(text).blocking().events(&Request::get("/v1/events/stream")).unwrap_err();
        assert!(matches!(error, ClientError::Answer { .. }), "{error:?}");
    }
}

#[test]
fn a_stream_that_falls_silent_breaks_or_has_no_end_of_an_event_is_told() {
    let silent = on_unix(|mut stream| {
        request(&mut stream)?;
        stream.write_all([STREAM, &chunk("data: 1\n\ndata: 2\n")].concat().as_bytes())?;
        hang_up(&mut stream)
    });
    let open =
        |server: &Server, limits| server.limited(limits).events(&Request::get("/v1/events/stream")).unwrap();
    let mut events = open(&silent, Limits { silence: SHORT, answer: LONG, ..patient() });
    assert_eq!(events.next().unwrap().unwrap().data, "1");
    let late = events.next().unwrap_err();
    assert!(matches!(late, ClientError::Late { awaited: Awaited::Event, .. }), "{late:?}");

    let mut events = open(&saying([STREAM, &chunk("data: 1\n\n")].concat()), patient());
    assert_eq!(events.next().unwrap().unwrap().data, "1");
    assert!(matches!(events.next(), Err(ClientError::Broken { .. })));

    let endless = on_unix(|mut stream| {
        request(&mut stream)?;
        stream.write_all(STREAM.as_bytes())?;
        while stream.write_all(chunk(&"x".repeat(1000)).as_bytes()).is_ok() {}
        Ok(())
    });
    let error = open(&endless, Limits { body: 10_000, ..patient() }).next().unwrap_err();
    assert!(matches!(error, ClientError::TooLarge { limit: 10_000, .. }), "{error:?}");
}
