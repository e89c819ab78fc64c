//! Events over REST: order, cursors, filters, streams with resume, what a restart and `kill -9` leave.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use mirrorvm_client::blocking::{Client, Events};
use mirrorvm_tests::{Daemon, Request, embedded, until};
use serde_json::{Value, json};

/// An event of a stream: id, type, data.
#[derive(Clone, Debug, PartialEq)]
struct Sent {
    id: String,
    kind: String,
    data: Value,
}

/// A reader of `/v1/events/stream`.
struct Stream(Events);

impl Stream {
    /// When it is open, nothing is missed from here on.
    fn open(d: &Daemon, query: &str, last: Option<&str>) -> Self {
        let request = mirrorvm_client::Request::get(format!("/v1/events/stream{query}"));
        let request = match last {
            Some(id) => request.header("last-event-id", id),
            None => request,
        };
        let client = Client::new(mirrorvm_client::Client::local(d.socket())).unwrap();
        Self(client.events(&request).unwrap())
    }

    /// The next event; `None` at the end.
    fn next(&mut self) -> Option<Sent> {
        let event = self.0.next().unwrap()?;
        let data = event.json().unwrap();
        Some(Sent { id: event.id.unwrap(), kind: event.kind, data })
    }
}

fn define(d: &Daemon, name: &str, labels: Value) -> String {
    let mut body = embedded(name, 8, 0);
    body["labels"] = labels;
    d.post("/v1/guests", &body).expect(201).json()["id"].as_str().unwrap().to_owned()
}

fn kinds(items: &[Value]) -> Vec<String> {
    items.iter().map(|e| e["type"].as_str().unwrap().to_owned()).collect()
}

/// Events on disk up to `count` of a filter.
fn wait_for(d: &Daemon, query: &str, count: usize) -> Value {
    let mut page = Value::Null;
    until("the events", 20, || {
        page = d.read(&format!("/v1/events?{query}"));
        page["items"].as_array().unwrap().len() >= count
    });
    page
}

#[test]
fn events_are_numbered_filtered_and_kept_through_restarts() {
    let mut d = Daemon::start("a");
    let g1 = define(&d, "g1", json!({"rack": "r1"}));
    let g2 = define(&d, "g2", json!({"rack": "r2"}));
    let etag = d.get("/v1/guests/g1").header("etag").unwrap().to_owned();
    let patch = Request::new("PATCH", "/v1/guests/g1").json(&json!({"labels": {"rack": "r9"}}));
    let _ = d.send(&patch.header("if-match", &etag)).expect(200);
    let _ = d.delete("/v1/guests/g2").expect(204);

    let page = wait_for(&d, "type=guest.*", 4);
    let items = page["items"].as_array().unwrap().clone();
    assert_eq!(kinds(&items), ["guest.created", "guest.created", "guest.updated", "guest.deleted"]);
    let event = &items[2];
    assert_eq!((&event["data"]["id"], &event["data"]["name"]), (&json!(g1), &json!("g1")));
    assert_eq!(event["subject"], json!(format!("/v1/guests/{g1}")));
    assert_eq!(event["data"]["labels"]["rack"], "r9");
    assert_eq!(items[3]["data"]["id"], json!(g2));
    let all = d.read("/v1/events");
    assert_eq!(all["items"][0]["type"], "host.started");
    assert_eq!(all["next_cursor"], all["items"].as_array().unwrap().last().unwrap()["id"]);

    // Numbers go up by one, in one epoch.
    let ids: Vec<&str> = all["items"].as_array().unwrap().iter().map(|e| e["id"].as_str().unwrap()).collect();
    let (epoch, first) = ids[0].split_once('-').unwrap();
    let first: u64 = first.parse().unwrap();
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(*id, format!("{epoch}-{}", first + i as u64));
    }

    // Filters, and pages that continue beyond what they left out.
    assert_eq!(d.items("/v1/events?label=rack=r2").len(), 2);
    assert_eq!(d.items("/v1/events?resource=g1&type=guest.updated").len(), 1);
    assert_eq!(d.items(&format!("/v1/events?resource={g2}")).len(), 2);
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = d.read(&format!("/v1/events?type=guest.*&limit=1{after}"));
        seen.extend(page["items"].as_array().unwrap().clone());
        after = format!("&after={}", page["next_cursor"].as_str().unwrap());
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(seen, items);

    // A long poll: answered by what happens, and not before.
    let last = all["next_cursor"].as_str().unwrap();
    let begun = std::time::Instant::now();
    let quiet = d.read(&format!("/v1/events?after={last}&wait=1s"));
    assert!(quiet["items"].as_array().unwrap().is_empty() && begun.elapsed().as_millis() >= 950);
    std::thread::scope(|s| {
        let poll = s.spawn(|| d.read(&format!("/v1/events?after={last}&wait=30s")));
        define(&d, "g3", json!({}));
        assert_eq!(kinds(poll.join().unwrap()["items"].as_array().unwrap()), ["guest.created"]);
    });

    // The same after an orderly end and after none.
    let before = d.items("/v1/events?type=guest.*");
    assert!(d.terminate().success());
    d.restart();
    d.kill();
    d.restart();
    assert_eq!(d.items("/v1/events?type=guest.*"), before);
    let host = d.items(&format!("/v1/events?type=host.*&after={last}"));
    assert_eq!(
        kinds(&host),
        ["host.stopping", "host.started", "host.started"],
        "a start is told before it answers"
    );
}

#[test]
fn cursors_that_lead_nowhere_are_named() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_EVENTS_KEPT", "10")]);
    for n in 0..8 {
        define(&d, &format!("g{n}"), json!({}));
        let _ = d.delete(&format!("/v1/guests/g{n}")).expect(204);
    }
    until("old events go", 20, || d.items("/v1/events")[0]["type"] != "host.started");
    let page = d.read("/v1/events");
    let newest = page["next_cursor"].as_str().unwrap();
    let (epoch, last) = newest.split_once('-').unwrap();
    let beyond = format!("{epoch}-{}", last.parse::<u64>().unwrap() + 1);
    for cursor in [format!("{epoch}-1"), format!("{}-5", "0".repeat(16)), beyond] {
        for path in ["/v1/events", "/v1/events/stream"] {
            let gone = d.get(&format!("{path}?after={cursor}")).expect(410);
            assert_eq!(gone.problem(), "event_cursor_expired");
            let problem = gone.json();
            assert_eq!(problem["latest"], newest);
            // What it says can be continued from.
            let oldest = problem["oldest"].as_str().unwrap();
            assert_eq!(d.items(&format!("/v1/events?after={oldest}")).len(), 10);
        }
    }
    for bad in ["x", "1-2", "-"] {
        assert_eq!(d.get(&format!("/v1/events?after={bad}")).expect(422).problem(), "validation_failed");
    }
    let header = Request::new("GET", "/v1/events/stream").header("last-event-id", "x");
    assert_eq!(d.send(&header).expect(422).json()["errors"][0]["header"], "last-event-id");
}

#[test]
fn a_stream_resumes_where_it_was_cut_and_ends_with_a_word() {
    let mut d = Daemon::start("a");
    let mut stream = Stream::open(&d, "?type=guest.*", None);
    define(&d, "g1", json!({}));
    define(&d, "g2", json!({}));
    let first = stream.next().unwrap();
    assert_eq!((first.kind.as_str(), &first.data["data"]["name"]), ("guest.created", &json!("g1")));
    assert_eq!(first.data["id"], json!(first.id));
    // Cut in the middle; meanwhile things happen.
    drop(stream);
    define(&d, "g3", json!({}));
    let mut resumed = Stream::open(&d, "?type=guest.*", Some(&first.id));
    let names: Vec<Value> = (0..2).map(|_| resumed.next().unwrap().data["data"]["name"].clone()).collect();
    assert_eq!(names, ["g2", "g3"], "nothing twice, nothing left out");
    // A quiet stream says where it is.
    let bookmark = resumed.next().unwrap();
    assert_eq!(bookmark.kind, "bookmark");
    assert_eq!(d.items(&format!("/v1/events?after={}", bookmark.id)).len(), 0);
    // It ends with a word, and the daemon does not wait for it.
    let waiting = std::thread::spawn(move || {
        let last = resumed.next().unwrap();
        (last, resumed.next())
    });
    assert!(d.terminate().success());
    let (last, end) = waiting.join().unwrap();
    assert_eq!((last.kind.as_str(), end), ("closing", None));
    assert_eq!(last.id, bookmark.id);
}

#[test]
fn a_reader_that_takes_nothing_is_disconnected_and_others_go_on() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_STREAM_STALL_SECONDS", "1")]);
    define(&d, "g1", json!({"padding": "x".repeat(255)}));
    let begin = d.items("/v1/events")[0]["id"].as_str().unwrap().to_owned();
    let mut stalled = UnixStream::connect(d.socket()).unwrap();
    let head = format!("GET /v1/events/stream?after={begin} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stalled.write_all(head.as_bytes()).unwrap();
    let streams = |n: u64| d.get("/metrics").text().contains(&format!("mirrorvm_event_streams {n}\n"));
    until("the stream is open", 20, || streams(1));
    let connections = d.census().fds;
    // More than the socket and the daemon buffer.
    for n in 0..2500 {
        let patch = json!({"labels": {"padding": format!("{n:0255}")}});
        let _ = d.send(&Request::new("PATCH", "/v1/guests/g1").json(&patch)).expect(200);
    }
    until("the stalled reader is given up", 20, || streams(0));
    until("the stalled reader's descriptor goes", 20, || d.census().fds < connections);
    let mut reader = Stream::open(&d, &format!("?after={begin}&type=guest.updated"), None);
    for n in 0..2500 {
        assert_eq!(reader.next().unwrap().data["data"]["labels"]["padding"], format!("{n:0255}"));
    }
}

#[test]
fn there_are_only_so_many_streams_and_half_of_them_for_one_principal() {
    let d = Daemon::start_with("a", &[("MIRRORVM_LIMITS_STREAMS", "4")]);
    let (one, _two) = (Stream::open(&d, "", None), Stream::open(&d, "", None));
    let refused = d.get("/v1/events/stream").expect(503);
    assert_eq!(refused.problem(), "no_resources");
    assert!(refused.text().contains("2 event streams, as many as one principal may"), "{}", refused.text());
    drop(one);
    until("its place is free", 20, || {
        define(&d, "g", json!({}));
        let _ = d.delete("/v1/guests/g").expect(204);
        let mut socket = UnixStream::connect(d.socket()).unwrap();
        socket.write_all(b"GET /v1/events/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut lines = BufReader::new(socket).lines().map(Result::unwrap);
        let is_open = lines.next().is_some_and(|status| status.starts_with("HTTP/1.1 200"));
        // The comment that opens a stream.
        is_open && lines.any(|line| line == ": mirrorvm events")
    });
}

#[test]
fn what_was_acknowledged_has_its_event_after_a_kill() {
    let mut d = Daemon::start("a");
    for round in 0..8 {
        let name = format!("g{round}");
        let made = d.post("/v1/guests", &embedded(&name, 8, 0)).expect(201).json();
        // Nothing in between: the answer is all that the caller has.
        d.kill();
        d.restart();
        let id = made["id"].as_str().unwrap();
        let page = d.read("/v1/events?limit=1000");
        let events = page["items"].as_array().unwrap();
        let found = events.iter().filter(|e| e["data"]["id"] == id || e["subject"].to_string().contains(id));
        assert!(found.count() >= 1, "no event of {name} in {page}");
        assert_eq!(d.read(&format!("/v1/guests/{id}"))["name"], name.as_str());
    }
}

/// What a follower holds: ids, by what the list and the events say.
struct Held {
    cursor: String,
    ids: BTreeSet<String>,
}

impl Held {
    /// Reads the list in pages; the cursor of the first counts.
    fn list(d: &Daemon, path: &str) -> Self {
        let mut page = d.read(&format!("{path}?limit=3"));
        let cursor = page["events_cursor"].as_str().unwrap().to_owned();
        let mut ids = BTreeSet::new();
        loop {
            ids.extend(
                page["items"].as_array().unwrap().iter().map(|i| i["id"].as_str().unwrap().to_owned()),
            );
            let Some(token) = page["next_page_token"].as_str() else { return Self { cursor, ids } };
            page = d.read(&format!("{path}?limit=3&page_token={token}"));
            assert!(page["events_cursor"].is_string());
        }
    }

    /// Takes what has happened up to `end`.
    fn follow(&mut self, d: &Daemon, kind: &str, end: &str) {
        let number = |cursor: &str| cursor.split_once('-').unwrap().1.parse::<u64>().unwrap();
        while number(&self.cursor) < number(end) {
            let page = d.read(&format!("/v1/events?type={kind}.*&wait=5s&after={}", self.cursor));
            for event in page["items"].as_array().unwrap() {
                let id = event["data"]["id"].as_str().unwrap();
                match event["type"].as_str().unwrap().rsplit('.').next().unwrap() {
                    "deleted" => _ = self.ids.remove(id),
                    _ => _ = self.ids.insert(id.to_owned()),
                }
            }
            self.cursor = page["next_cursor"].as_str().unwrap().to_owned();
        }
    }
}

/// However a list and what is written meanwhile fall together: who follows from its cursor ends with what the
/// daemon has.
#[test]
fn a_list_and_what_follows_its_cursor_have_no_gap() {
    let d = Daemon::start("a");
    let identity = |n: usize| format!("sha256:{n:064x}");
    let kinds = [("/v1/guests", "guest"), ("/v1/hosts", "peer_host")];
    let mut held = std::thread::scope(|scope| {
        let write = |writer: usize| {
            let (d, identity) = (&d, &identity);
            scope.spawn(move || {
                for n in 0..40 {
                    let name = format!("w{writer}-{n}");
                    define(d, &name, json!({}));
                    let number = 1 + writer * 1000 + n;
                    let address = format!("127.0.0.1:{}", 10_000 + number);
                    let host = json!({"name": name, "address": address, "identity": identity(number)});
                    let _ = d.post("/v1/hosts", &host).expect(201);
                    if n % 3 != 0 {
                        let _ = d.delete(&format!("/v1/guests/{name}")).expect(204);
                        let _ = d.delete(&format!("/v1/hosts/{name}")).expect(204);
                    }
                }
            })
        };
        let writers = [0, 1, 2].map(write);
        let mut held: Vec<(&str, &str, Held)> = Vec::new();
        // However they end.
        while writers.iter().any(|writer| !writer.is_finished()) {
            held.extend(kinds.map(|(path, kind)| (path, kind, Held::list(&d, path))));
            // On a slow machine there are many, and each is followed by itself: some from all the while are
            // kept.
            if held.len() > 60 {
                let mut n = 0;
                held.retain(|_| {
                    n += 1;
                    n % 4 < 2
                });
            }
        }
        held
    });
    let end = d.read("/v1/events?after=latest")["next_cursor"].as_str().unwrap().to_owned();
    assert!(held.len() > 4, "{}", held.len());
    for (path, _) in kinds {
        let there: BTreeSet<String> = Held::list(&d, path).ids;
        assert_eq!(there.len(), 3 * 14, "{path}");
        for (_, kind, held) in held.iter_mut().filter(|(of, ..)| *of == path) {
            held.follow(&d, kind, &end);
            assert_eq!(held.ids, there, "{path}");
        }
    }
}

#[test]
fn a_follower_may_begin_with_what_comes_next() {
    let d = Daemon::start("a");
    define(&d, "g1", json!({}));
    let page = d.read("/v1/events?after=latest");
    assert_eq!((&page["items"], &page["more"]), (&json!([]), &json!(false)));
    assert_eq!(page["next_cursor"], d.read("/v1/guests")["events_cursor"]);
    let mut stream = Stream::open(&d, "?after=latest", None);
    let id = define(&d, "g2", json!({}));
    let event = stream.next().unwrap();
    assert_eq!((event.kind.as_str(), &event.data["data"]["id"]), ("guest.created", &json!(id)));
    let after = format!("/v1/events?after={}", page["next_cursor"].as_str().unwrap());
    assert_eq!(d.items(&after)[0]["data"]["id"], json!(id));
    let refused = d.get("/v1/events?after=newest").expect(422).json();
    assert!(refused["errors"][0]["detail"].as_str().unwrap().contains("latest"), "{refused}");
    // Where there is nothing to follow, none is promised: no event tells of tokens.
    assert_eq!(d.read("/v1/tokens").get("events_cursor"), None);
}
