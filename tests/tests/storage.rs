//! A state directory without room: what is refused, what is kept, what comes back; and that the audit log has
//! what was done, whoever hangs up and whatever is killed.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use mirrorvm_tests::{Daemon, Reply, Request, embedded, migration, mounts, until, until_some};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

/// A guest of the software machine: it runs wherever the tests do.
fn emulated(name: &str) -> Value {
    let mut body = embedded(name, 8, 0);
    body["driver"]["kind"] = json!("emulated");
    body
}

fn relabel(d: &Daemon, guest: &str, value: &str) -> Reply {
    let body = json!({"labels": {"n": value}});
    let request = Request::new("PATCH", &format!("/v1/guests/{guest}"));
    d.send(&request.header("content-type", "application/merge-patch+json").body(body.to_string()))
}

fn is_ready(d: &Daemon) -> bool {
    d.get("/readyz").status == 200
}

/// Changes labels until that is refused for want of room; gives the label that was acknowledged last.
fn relabel_until_full(d: &Daemon, guest: &str) -> String {
    let mut last = d.read(&format!("/v1/guests/{guest}"))["labels"]["n"].as_str().unwrap_or("").to_owned();
    for n in 0..20_000 {
        let value = format!("full{n}");
        let reply = relabel(d, guest, &value);
        if reply.status != 200 {
            assert_eq!((reply.status, reply.problem().as_str()), (507, "storage_full"), "{reply:?}");
            return last;
        }
        last = value;
    }
    panic!("the disk never got full");
}

#[test]
fn a_full_disk_refuses_changes_by_name_and_loses_nothing_that_was_acknowledged() {
    if !mounts() {
        return;
    }
    let mut d = Daemon::start_on_disk("a", 4096, &[], &[]);
    let token = furnish(&d);
    let _ = relabel(&d, "g1", "kept").expect(200);
    for round in 0..2 {
        d.disk().fill(0);
        let kept = relabel_until_full(&d, "g1");
        assert_eq!(d.read("/v1/guests/g1")["labels"]["n"], kept.as_str());
        let keyed = Request::new("POST", "/v1/guests").header("idempotency-key", "k").json(&emulated("g4"));
        // Those who watch are told, and what is wrong; reading works.
        nothing_can_be_changed(&d, &token, (507, "storage_full"), "full", "free some");
        if round == 0 {
            // Room comes back: nothing has to be done for the daemon to see it.
            d.disk().free();
            until("the daemon is ready again", 20, || is_ready(&d));
            assert_eq!(
                d.read("/v1/host")["storage"],
                json!({"state": "ok", "failing_ms": 0, "owed_changes": 0})
            );
            let _ = d.send(&keyed).expect(201);
            let _ = d.delete("/v1/guests/g4").expect(204);
            let _ = relabel(&d, "g1", "again").expect(200);
        } else {
            d.kill();
            d.disk().free();
            d.restart();
            assert_eq!(d.read("/v1/guests/g1")["labels"]["n"], kept.as_str());
            let names: Vec<Value> = d.items("/v1/guests").iter().map(|g| g["name"].clone()).collect();
            assert_eq!(names, ["g1", "g2"]);
            assert_eq!(d.items("/v1/tokens").len(), 1);
            let _ = relabel(&d, "g1", "after").expect(200);
            let _ = d.delete("/v1/guests/g1").expect(204);
        }
    }
    // Everything that was acknowledged is in the audit log with its outcome; nothing that was refused is
    // there as done.
    let log = d.items("/v1/audit-log?limit=1000");
    let done = |e: &&Value| e["outcome"]["status"].as_u64().is_some_and(|s| s < 300);
    let of = |operation: &str| log.iter().filter(|e| e["operation"] == operation).filter(done).count();
    assert_eq!(
        (of("guest_delete"), of("token_create"), of("peer_host_create"), of("guest_stop")),
        (2, 1, 0, 0)
    );
}

/// What changes something, one of each kind, for a daemon that has a stopped guest `g1`, a running one `g2`
/// and a token.
fn changes(token: &str) -> Vec<(&'static str, Request)> {
    let patch = |target: &str, body: &Value| {
        Request::new("PATCH", target)
            .header("content-type", "application/merge-patch+json")
            .body(body.to_string())
    };
    let post = |target: &str, body: &Value| Request::new("POST", target).json(body);
    let act = |target: &str| Request::new("POST", target);
    let peer =
        json!({"name": "b", "address": "192.0.2.1:7801", "identity": format!("sha256:{}", "5a".repeat(32))});
    let put = Request::new("PUT", "/v1/guests/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11").json(&emulated("g5"));
    vec![
        ("labels", patch("/v1/guests/g1", &json!({"labels": {"n": "lost"}}))),
        ("deletion", Request::new("DELETE", "/v1/guests/g1")),
        ("stop", act("/v1/guests/g2/stop")),
        ("pause", act("/v1/guests/g2/pause")),
        ("start", act("/v1/guests/g1/start")),
        ("definition", post("/v1/guests", &emulated("g3"))),
        ("definition with a key", post("/v1/guests", &emulated("g4")).header("idempotency-key", "k")),
        ("definition under an id", put),
        ("token", post("/v1/tokens", &json!({"name": "u", "role": "viewer"}))),
        ("withdrawal", Request::new("DELETE", token)),
        ("settings", patch("/v1/host", &json!({"labels": {"x": "y"}}))),
        ("peer", post("/v1/hosts", &peer)),
        ("helper image", post("/v1/helper-images", &json!({"name": "i"}))),
    ]
}

/// Everything that those would change.
fn all_of(d: &Daemon) -> Vec<Value> {
    let mut all: Vec<Value> = ["/v1/guests", "/v1/tokens", "/v1/hosts", "/v1/helper-images"]
        .iter()
        .flat_map(|list| d.items(list))
        .collect();
    all.push(d.read("/v1/host")["labels"].clone());
    all
}

/// Makes what [`changes`] wants; gives the path of its token.
fn furnish(d: &Daemon) -> String {
    let _ = d.post("/v1/guests", &emulated("g1")).expect(201);
    let _ = d.post("/v1/guests", &emulated("g2")).expect(201);
    let _ = d.act("/v1/guests/g2/start").expect(202);
    d.guest_in("g2", "running");
    let token = d.post("/v1/tokens", &json!({"name": "t", "role": "viewer"})).expect(201).json();
    format!("/v1/tokens/{}", token["id"].as_str().unwrap())
}

/// Every change is refused with this status and code, and none is made; readiness says so, and reading goes
/// on.
fn nothing_can_be_changed(d: &Daemon, token: &str, (status, code): (u16, &str), state: &str, word: &str) {
    let before = all_of(d);
    for (what, request) in changes(token) {
        let reply = d.send(&request);
        assert_eq!((reply.status, reply.problem().as_str()), (status, code), "{what}: {reply:?}");
        let problem = reply.json();
        assert_eq!(problem["retryable"], true, "{what}");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{what}: {problem}");
    }
    assert_eq!(before, all_of(d), "what was refused has changed something");
    let ready = d.get("/readyz?verbose=true");
    assert_eq!((ready.status, ready.problem().as_str()), (status, code));
    assert!(ready.json()["detail"].as_str().unwrap().starts_with("database: "), "{ready:?}");
    assert_eq!(d.get("/livez").status, 200);
    assert_eq!(d.read("/v1/host")["storage"]["state"], state);
}

/// The database takes things again: nobody has to do anything, and what was refused can be done.
fn everything_can_be_changed(d: &Daemon) {
    until("the daemon is ready again", 20, || is_ready(d));
    assert!(d.get("/readyz?verbose=true").text().contains("[+] database ok\n"));
    assert_eq!(d.read("/v1/host")["storage"], json!({"state": "ok", "failing_ms": 0, "owed_changes": 0}));
    let _ = relabel(d, "g1", "again").expect(200);
    let _ = d.act("/v1/guests/g2/stop").expect(202);
    d.guest_in("g2", "stopped");
    let _ = d.delete("/v1/guests/g1").expect(204);
    let _ = d.post("/v1/guests", &emulated("g1")).expect(201);
}

#[test]
fn somebody_who_keeps_the_database_locked_is_named_and_nobody_waits_for_him() {
    let mut d = Daemon::start("a");
    let token = furnish(&d);
    let other = rusqlite::Connection::open(d.state_dir().join("mirrorvm.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    // He goes when all of them have been answered: whoever waited for that would wait for ever.
    nothing_can_be_changed(&d, &token, (503, "storage_busy"), "busy", "locked");
    other.execute_batch("ROLLBACK").unwrap();
    everything_can_be_changed(&d);
    // A short look is not noticed.
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    std::thread::scope(|s| {
        let change = s.spawn(|| relabel(&d, "g2", "waited"));
        std::thread::sleep(std::time::Duration::from_millis(100));
        other.execute_batch("ROLLBACK").unwrap();
        let _ = change.join().unwrap().expect(200);
    });
    drop(other);
    d.kill();
    d.restart();
    assert_eq!(d.read("/v1/guests/g2")["labels"]["n"], "waited");
}

/// Files of the daemon's may not grow beyond `bytes` any more; `None`: as far as they like.
fn limit_files(d: &Daemon, bytes: Option<u64>) {
    let pid = Pid::from_raw(d.pid() as i32).unwrap();
    let maximum = getrlimit(Resource::Fsize).maximum;
    let _ = prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes.or(maximum), maximum }).unwrap();
}

#[test]
fn a_disk_that_fails_is_named_and_nothing_is_lost_when_it_works_again() {
    let mut d = Daemon::start("a");
    let token = furnish(&d);
    let _ = relabel(&d, "g1", "kept").expect(200);
    // Every write from here on is an error that is not a full disk: those of the database, and those of the
    // log.
    limit_files(&d, Some(0));
    nothing_can_be_changed(&d, &token, (503, "storage_failed"), "failed", "look at the disk");
    limit_files(&d, None);
    everything_can_be_changed(&d);
    limit_files(&d, Some(0));
    let refused = relabel(&d, "g2", "lost");
    assert_eq!((refused.status, refused.problem().as_str()), (503, "storage_failed"));
    // What was refused is not there after a crash either.
    d.kill();
    d.restart();
    assert_eq!(d.read("/v1/guests/g2")["labels"], json!({}));
    let done = |e: &&Value| e["outcome"]["status"].as_u64().is_some_and(|s| s < 300);
    let log = d.items("/v1/audit-log?limit=1000");
    let of = |operation: &str| log.iter().filter(|e| e["operation"] == operation).filter(done).count();
    assert_eq!((of("guest_update"), of("guest_create"), of("guest_delete"), of("guest_stop")), (2, 3, 1, 1));
}

/// A change of something that belongs to a guest, a mirror or a migration that runs, by name.
type Acts = Vec<(&'static str, Request)>;

#[test]
fn on_a_full_disk_nothing_of_what_runs_is_changed_without_being_stored() {
    if !mounts() {
        return;
    }
    let (a, b) = (Daemon::start_on_disk("a", 8192, &[], &[]), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let mut moving = emulated("moving");
    moving["memory"]["blocks"][0]["size_bytes"] = json!(96 << 20);
    a.run_guest(&moving);
    a.run_guest(&emulated("g2"));
    let _ = a.post("/v1/guests", &emulated("g1")).expect(201);
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror = a.post("/v1/mirrors", &json!({"guest": "g2", "strategy": strategy})).expect(201).json();
    let mirror = format!("/v1/mirrors/{}", mirror["id"].as_str().unwrap());
    let mut slow = migration("moving", "b", "precopy");
    slow["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
    let id = a.migrate(&slow);
    let of = format!("/v1/migrations/{id}");
    a.follow(&of, 30, |m| m["state"] == "precopy");
    let leave = json!({"source": {"name": "x", "identity": b.identity}, "expires_in_seconds": 300});
    let ticket = a.post("/v1/incoming-migrations", &leave).expect(201).json();
    a.disk().fill(0);
    relabel_until_full(&a, "g1");
    let patch = |target: &str, body: &Value| {
        Request::new("PATCH", target)
            .header("content-type", "application/merge-patch+json")
            .body(body.to_string())
    };
    let post = |target: &str, body: &Value| Request::new("POST", target).json(body);
    let word =
        json!({"kind": "word", "outcome": "never_committed", "reason": "b is gone", "confirm": "moving"});
    let acts: Acts = vec![
        ("a mirror", post("/v1/mirrors", &json!({"guest": "g2", "strategy": strategy}))),
        ("a mirror's placement", patch(&mirror, &json!({"placement": {"cpus": [0]}}))),
        ("a mirror's end", Request::new("DELETE", &mirror)),
        ("a migration", post("/v1/migrations", &migration("g2", "b", "precopy"))),
        ("limits", patch(&of, &json!({"limits": {"downtime_ms": 5}}))),
        ("cancel", Request::new("POST", &format!("{of}/cancel"))),
        ("switchover", Request::new("POST", &format!("{of}/switchover"))),
        ("resolution", post(&format!("{of}/resolution"), &word)),
        ("a ticket", post("/v1/incoming-migrations", &leave)),
        (
            "a ticket's end",
            Request::new("DELETE", &format!("/v1/migrations/{}", ticket["migration"].as_str().unwrap())),
        ),
        ("a session", Request::new("POST", "/v1/session-links")),
        (
            "a RAM block",
            post("/v1/guests/g1/ram-blocks", &json!({"name": "r", "size_bytes": 4096, "gpa": 1u64 << 32})),
        ),
        ("a host's word", post("/v1/guests/g1/confirm", &json!({"confirm": "g1"}))),
    ];
    let shown = || -> Vec<Value> {
        // What their threads have done meanwhile is no change.
        let mirror = |m: &Value| json!([m["id"], m["placement"], m["generation"]]);
        let mut all: Vec<Value> = a.items("/v1/mirrors").iter().map(mirror).collect();
        all.extend(a.items("/v1/guests/g1/ram-blocks"));
        let migration = a.read(&of);
        all.extend(["limits", "cancel_requested_at", "resolution"].map(|field| migration[field].clone()));
        all.push(a.items("/v1/migrations").len().into());
        all
    };
    let before = shown();
    for (what, request) in &acts {
        let reply = a.send(request);
        assert_eq!((reply.status, reply.problem().as_str()), (507, "storage_full"), "{what}: {reply:?}");
    }
    assert_eq!(before, shown(), "what was refused has changed something");
    a.disk().free();
    until("the daemon is ready again", 20, || is_ready(&a));
    // What was refused can be done, and it went on meanwhile.
    assert!(["precopy", "queued", "preparing"].iter().any(|s| a.read(&of)["state"] == *s), "{}", a.read(&of));
    let _ = a.act(&format!("{of}/cancel")).expect(202);
    assert_eq!(a.migration_end(&id)["state"], "canceled");
    a.guest_in("moving", "running");
    let _ = a.delete(&mirror).expect(204);
}

/// When a caller hangs up.
#[derive(Clone, Copy, PartialEq)]
enum HangsUp {
    /// As soon as the request is sent: whether it is ever read is a race.
    AtOnce,
    /// As the answer begins to come.
    Answered,
}

/// Sends a request and hangs up, over the Unix socket or (`tcp`: the address) over TCP.
fn hang_up(d: &Daemon, tcp: Option<&str>, request: Request, when: HangsUp) {
    fn go(mut socket: impl Read + Write, bytes: &[u8], when: HangsUp) {
        // The daemon may have closed already.
        let sent = socket.write_all(bytes);
        if when == HangsUp::Answered {
            sent.and_then(|()| socket.read_exact(&mut [0])).expect("an answer");
        }
    }
    match tcp {
        None => go(UnixStream::connect(d.socket()).unwrap(), &request.bytes("localhost"), when),
        Some(address) => go(TcpStream::connect(address).unwrap(), &request.bytes(address), when),
    }
}

#[test]
fn callers_that_hang_up_leave_an_entry_and_an_outcome_of_everything_that_was_done() {
    const CALLS: usize = 240;
    let d = Daemon::start_as("a", &[], |_| vec!["--listen".to_owned(), "tcp:127.0.0.1:0".to_owned()]);
    let (address, token) = (d.listens("tcp:"), format!("Bearer {}", d.admin_token()));
    for n in 0..CALLS {
        let over_tcp = n % 2 == 1;
        let name = format!("{}{n}", if over_tcp { "t" } else { "g" });
        let mut request = Request::new("POST", "/v1/guests").json(&emulated(&name));
        if n % 3 == 0 {
            request = request.header("idempotency-key", &format!("k{n}"));
        }
        if over_tcp {
            request = request.header("authorization", &token);
        }
        let when = if n % 8 < 2 { HangsUp::Answered } else { HangsUp::AtOnce };
        hang_up(&d, over_tcp.then_some(address.as_str()), request, when);
    }
    // Bodies that never come begin nothing.
    for _ in 0..10 {
        let mut socket = UnixStream::connect(d.socket()).unwrap();
        let _ = write!(
            socket,
            "POST /v1/guests HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{{"
        );
    }
    let entries = || d.items("/v1/audit-log?operation=guest_create&limit=1000");
    // Whatever was read of them is over: this caller's is the only connection left.
    until("nobody else is served", 60, || {
        let metrics = d.get("/metrics").expect(200);
        let text = String::from_utf8(metrics.body).unwrap();
        text.lines().any(|l| l == "mirrorvm_http_connections 1")
    });
    let mut before = 0;
    let log = until_some("every entry has its outcome, and no other comes", 60, || {
        let log = entries();
        let same = std::mem::replace(&mut before, log.len()) == log.len();
        (same && log.iter().all(|e| !e["outcome"].is_null())).then_some(log)
    });
    let made: BTreeSet<String> = d
        .items("/v1/guests?limit=1000")
        .iter()
        .map(|g| format!("/v1/guests/{}", g["id"].as_str().unwrap()))
        .collect();
    let noted: BTreeSet<String> = log
        .iter()
        .filter(|e| e["status"] == 201)
        .map(|e| e["location"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(made, noted, "what was made and what the log says was made");
    let over_tcp = log.iter().filter(|e| e["authenticated_by"] == "token").count();
    println!("{} of {CALLS} were made; {over_tcp} came over TCP", made.len());
    assert!(over_tcp >= CALLS / 8 && log.len() - over_tcp >= CALLS / 8, "who got an answer is in the log");
    for entry in &log {
        let outcome = &entry["outcome"];
        assert_eq!(outcome["recorded"], entry["status"] == 201, "{entry}");
        assert!(entry["status"] == 201 || entry["code"] == "malformed_request", "{entry}");
    }
    let seqs: Vec<u64> =
        d.items("/v1/audit-log?limit=1000").iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).rev().collect::<Vec<_>>(), "numbers have no gaps");
    // What was asked for with a key is made once, and answered as it was.
    let again = Request::new("POST", "/v1/guests").header("idempotency-key", "k0").json(&emulated("g0"));
    let first = d.send(&again).expect(201);
    let reply = d.send(&again).expect(201);
    assert_eq!((reply.header("idempotency-replayed"), &reply.body), (Some("true"), &first.body));
    assert_eq!(reply.header("location"), first.header("location"));
    assert_eq!(
        (&entries()[0]["outcome"]["replayed"], &entries()[0]["outcome"]["recorded"]),
        (&json!(true), &json!(false))
    );
}

#[test]
fn of_every_kind_of_act_whose_caller_hangs_up_the_log_says_what_was_done() {
    const ROUNDS: usize = 8;
    let d = Daemon::start("a");
    let patch = |target: &str, body: &Value| {
        Request::new("PATCH", target)
            .header("content-type", "application/merge-patch+json")
            .body(body.to_string())
    };
    let post = |target: &str, body: &Value| Request::new("POST", target).json(body);
    for n in 0..ROUNDS {
        for kind in ["label", "gone", "block", "start"] {
            let _ = d.post("/v1/guests", &emulated(&format!("{kind}{n}"))).expect(201);
        }
        d.run_guest(&emulated(&format!("stop{n}")));
    }
    let last = d.items("/v1/audit-log?limit=1000").iter().map(|e| e["seq"].as_u64().unwrap()).max().unwrap();
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    for n in 0..ROUNDS {
        let identity = format!("sha256:{}", format!("{n:02x}").repeat(32));
        let peer = json!({"name": format!("p{n}"), "address": format!("192.0.2.1:{}", 7801 + n), "identity": identity});
        let leave = json!({"source": {"name": "x", "identity": identity}, "expires_in_seconds": 300});
        let block = json!({"name": "more", "size_bytes": 1 << 20, "gpa": 1u64 << 32});
        let acts = [
            patch(&format!("/v1/guests/label{n}"), &json!({"labels": {"n": "x"}})),
            Request::new("DELETE", &format!("/v1/guests/gone{n}")),
            post(&format!("/v1/guests/block{n}/ram-blocks"), &block),
            Request::new("POST", &format!("/v1/guests/start{n}/start")),
            Request::new("POST", &format!("/v1/guests/stop{n}/stop")),
            post("/v1/mirrors", &json!({"guest": format!("stop{n}"), "strategy": strategy})),
            post("/v1/tokens", &json!({"name": format!("t{n}"), "role": "viewer"})),
            post("/v1/hosts", &peer),
            post("/v1/helper-images", &json!({"name": format!("i{n}")})),
            post("/v1/incoming-migrations", &leave),
            patch("/v1/host", &json!({"labels": {"n": n.to_string()}})),
        ];
        let when = if n % 2 == 0 { HangsUp::Answered } else { HangsUp::AtOnce };
        acts.into_iter().for_each(|request| hang_up(&d, None, request, when));
    }
    until("nobody else is served", 60, || {
        let text = String::from_utf8(d.get("/metrics").expect(200).body).unwrap();
        text.lines().any(|l| l == "mirrorvm_http_connections 1")
    });
    let mut before = 0;
    let log = until_some("every entry has its outcome, and no other comes", 60, || {
        let log = d.items("/v1/audit-log?limit=1000");
        let same = std::mem::replace(&mut before, log.len()) == log.len();
        (same && log.iter().all(|e| !e["outcome"].is_null())).then_some(log)
    });
    let log: Vec<&Value> = log.iter().filter(|e| e["seq"].as_u64().unwrap() > last).collect();
    let done = |operation: &str| -> BTreeSet<&str> {
        let of = log.iter().filter(|e| e["operation"] == operation);
        of.filter(|e| e["outcome"]["status"].as_u64().unwrap() < 300)
            .map(|e| e["path"].as_str().unwrap())
            .collect()
    };
    let count = |operation: &str| {
        let of = log.iter().filter(|e| e["operation"] == operation);
        of.filter(|e| e["outcome"]["status"].as_u64().unwrap() < 300).count()
    };
    let (mut changed, mut tried) = (0, 0);
    for n in 0..ROUNDS {
        let guest = |kind: &str| format!("/v1/guests/{kind}{n}");
        let said = [
            ("guest_update", guest("label"), d.read(&guest("label"))["labels"]["n"] == "x"),
            ("guest_delete", guest("gone"), d.get(&guest("gone")).status == 404),
            (
                "ram_block_create",
                format!("{}/ram-blocks", guest("block")),
                d.items(&format!("{}/ram-blocks", guest("block"))).iter().any(|b| b["name"] == "more"),
            ),
            (
                "guest_start",
                format!("{}/start", guest("start")),
                d.guest_state(&format!("start{n}")) != "stopped",
            ),
            (
                "guest_stop",
                format!("{}/stop", guest("stop")),
                d.guest_state(&format!("stop{n}")) != "running",
            ),
        ];
        for (operation, path, is_so) in said {
            assert_eq!(done(operation).contains(path.as_str()), is_so, "{operation} {path}");
            changed += usize::from(is_so);
            tried += 1;
        }
    }
    for (operation, list) in [
        ("token_create", "/v1/tokens"),
        ("peer_host_create", "/v1/hosts"),
        ("helper_image_create", "/v1/helper-images"),
    ] {
        let there = d.items(list).iter().filter(|i| i["built_in"] != true).count();
        assert_eq!(count(operation), there, "{operation}");
        (changed, tried) = (changed + there, tried + ROUNDS);
    }
    println!("{changed} of {tried} acts were done");
    assert!(changed >= tried / 2, "what was answered was done");
    let seqs: Vec<u64> =
        d.items("/v1/audit-log?limit=1000").iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).rev().collect::<Vec<_>>(), "numbers have no gaps");
}

#[test]
fn a_daemon_that_is_killed_leaves_no_change_without_an_entry_and_no_outcome_without_its_change() {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x6175_6469_7420_6c6f);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    let mut d = Daemon::start("a");
    let (mut acknowledged, mut unfinished) = (BTreeSet::new(), 0);
    // One of the kills falls between an entry and what comes of it, sooner or later.
    for round in 0..18 {
        if round >= 6 && unfinished > 0 {
            break;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let answered = &AtomicBool::new(false);
        std::thread::scope(|s| {
            let calls: Vec<_> = (0..8)
                .map(|c| {
                    let socket = d.socket();
                    s.spawn(move || {
                        let made = (0..).map_while(|n| {
                            let request = Request::new("POST", "/v1/guests")
                                .header("idempotency-key", &format!("{round}-{c}-{n}"))
                                .json(&emulated(&format!("r{round}-{c}-{n}")));
                            let reply = request.try_send(&socket).ok().filter(|r| r.status == 201)?;
                            answered.store(true, Ordering::Relaxed);
                            Some(reply.header("location").unwrap().to_owned())
                        });
                        made.collect::<Vec<_>>()
                    })
                })
                .collect();
            // At a random moment of their work, which a slow machine is slow to begin.
            until("an answer", 60, || answered.load(Ordering::Relaxed));
            std::thread::sleep(std::time::Duration::from_millis(20 + random % 150));
            d.kill();
            calls.into_iter().for_each(|c| acknowledged.extend(c.join().unwrap()));
        });
        d.restart();
        let there = d.items("/v1/guests?limit=1000");
        let there: BTreeSet<String> =
            there.iter().map(|g| format!("/v1/guests/{}", g["id"].as_str().unwrap())).collect();
        let log = d.items("/v1/audit-log?operation=guest_create&limit=1000");
        let recorded = log.iter().filter(|e| e["outcome"]["recorded"] == true);
        let recorded: BTreeSet<String> =
            recorded.map(|e| e["location"].as_str().unwrap().to_owned()).collect();
        assert!(acknowledged.is_subset(&there), "round {round}: an acknowledged guest is lost");
        assert_eq!(there, recorded, "round {round}: guests, and outcomes that say so");
        unfinished = log.iter().filter(|e| e["outcome"].is_null() && e["status"] == 0).count();
        let replayed = log.iter().filter(|e| e["replayed"] == true).count();
        assert_eq!(log.len() - recorded.len() - replayed, unfinished, "round {round}: {log:#?}");
        // Who asks again with the key gets what was made, and nothing is made twice.
        let first = Request::new("POST", "/v1/guests")
            .header("idempotency-key", &format!("{round}-0-0"))
            .json(&emulated(&format!("r{round}-0-0")));
        let location = d.send(&first).expect(201).header("location").unwrap().to_owned();
        acknowledged.insert(location);
    }
    assert!(acknowledged.len() > 6, "{}", acknowledged.len());
    assert!(unfinished > 0, "no kill fell between an entry and its outcome: nothing was seen of that");
    println!("{} guests, {unfinished} entries without an outcome", acknowledged.len());
}
