//! A state directory without room: what is refused, what is kept, what comes back; and that the audit log has what was done,
//! whoever hangs up and whatever is killed.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use mirrorvm_tests::{Daemon, Reply, Request, embedded, until, until_some};
use serde_json::{Value, json};

/// A file system of its own for a state directory, unmounted in the end.
#[derive(Default)]
struct Small {
    at: Option<PathBuf>,
}

impl Small {
    fn mount(&mut self, at: &Path, kib: u32) {
        std::fs::create_dir(at).unwrap();
        let options = format!("size={kib}k,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        assert!(mounted.unwrap().success(), "tmpfs cannot be mounted at {}", at.display());
        self.at = Some(at.to_owned());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Some(at) = &self.at {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
    }
}

/// Whether file systems can be mounted here; says so loudly when not.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED (not root: no file system can be mounted): this test ran nothing");
    }
    root
}

/// Takes all the room there is.
fn fill(d: &Daemon) {
    let mut file = std::fs::File::create(d.state_dir().join("filler")).unwrap();
    let block = [0x5a; 4096];
    while file.write_all(&block).is_ok() {}
}

fn free(d: &Daemon) {
    std::fs::remove_file(d.state_dir().join("filler")).unwrap();
}

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
    if !root() {
        return;
    }
    let mut small = Small::default();
    let mut d = Daemon::start_as("a", &[], |dir| {
        small.mount(&dir.join("state"), 4096);
        Vec::new()
    });
    let _ = d.post("/v1/guests", &emulated("g1")).expect(201);
    let _ = d.post("/v1/guests", &emulated("g2")).expect(201);
    let _ = d.act("/v1/guests/g2/start").expect(202);
    d.guest_in("g2", "running");
    let token = d.post("/v1/tokens", &json!({"name": "t", "role": "viewer"})).expect(201).json();
    let token = format!("/v1/tokens/{}", token["id"].as_str().unwrap());
    let _ = relabel(&d, "g1", "kept").expect(200);
    for round in 0..2 {
        fill(&d);
        let kept = relabel_until_full(&d, "g1");
        let before = (d.read("/v1/guests/g1"), d.read("/v1/guests/g2"), d.read("/v1/host")["labels"].clone());
        assert_eq!(before.0["labels"]["n"], kept.as_str());
        let patch = |target: &str, body: &Value| {
            let request = Request::new("PATCH", target);
            d.send(&request.header("content-type", "application/merge-patch+json").body(body.to_string()))
        };
        let keyed = Request::new("POST", "/v1/guests").header("idempotency-key", "k").json(&emulated("g4"));
        let put =
            Request::new("PUT", "/v1/guests/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11").json(&emulated("g5"));
        let peer = json!({"name": "b", "address": "192.0.2.1:7801", "identity": format!("sha256:{}", "5a".repeat(32))});
        for (what, reply) in [
            ("labels", relabel(&d, "g1", "lost")),
            ("deletion", d.delete("/v1/guests/g1")),
            ("stop", d.act("/v1/guests/g2/stop")),
            ("pause", d.act("/v1/guests/g2/pause")),
            ("start", d.act("/v1/guests/g1/start")),
            ("definition", d.post("/v1/guests", &emulated("g3"))),
            ("definition with a key", d.send(&keyed)),
            ("definition under an id", d.send(&put)),
            ("token", d.post("/v1/tokens", &json!({"name": "u", "role": "viewer"}))),
            ("withdrawal", d.delete(&token)),
            ("settings", patch("/v1/host", &json!({"labels": {"x": "y"}}))),
            ("peer", d.post("/v1/hosts", &peer)),
            ("helper image", d.post("/v1/helper-images", &json!({"name": "i"}))),
        ] {
            assert_eq!((reply.status, reply.problem().as_str()), (507, "storage_full"), "{what}: {reply:?}");
            let problem = reply.json();
            assert_eq!(problem["retryable"], true, "{what}");
            assert!(problem["detail"].as_str().unwrap().contains("free some"), "{what}: {problem}");
        }
        let after = (d.read("/v1/guests/g1"), d.read("/v1/guests/g2"), d.read("/v1/host")["labels"].clone());
        assert_eq!(before, after, "what was refused has changed something");
        assert_eq!(d.items("/v1/guests").len(), 2);
        assert_eq!(d.items("/v1/tokens").len(), 1);
        assert!(d.items("/v1/hosts").is_empty());
        // Those who watch are told, and what is wrong; reading works.
        let ready = d.get("/readyz?verbose=true");
        assert_eq!((ready.status, ready.problem().as_str()), (507, "storage_full"));
        assert!(ready.json()["detail"].as_str().unwrap().contains("no space is left"));
        assert_eq!(d.get("/livez").status, 200);
        assert_eq!(d.read("/v1/host")["storage"]["state"], "full");
        if round == 0 {
            // Room comes back: nothing has to be done for the daemon to see it.
            free(&d);
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
            free(&d);
            d.restart();
            assert_eq!(d.read("/v1/guests/g1")["labels"]["n"], kept.as_str());
            let names: Vec<Value> = d.items("/v1/guests").iter().map(|g| g["name"].clone()).collect();
            assert_eq!(names, ["g1", "g2"]);
            assert_eq!(d.items("/v1/tokens").len(), 1);
            let _ = relabel(&d, "g1", "after").expect(200);
            let _ = d.delete("/v1/guests/g1").expect(204);
        }
    }
    // Everything that was acknowledged is in the audit log with its outcome; nothing that was refused is there as done.
    let log = d.items("/v1/audit-log?limit=1000");
    let done = |e: &&Value| e["outcome"]["status"].as_u64().is_some_and(|s| s < 300);
    let of = |operation: &str| log.iter().filter(|e| e["operation"] == operation).filter(done).count();
    assert_eq!(
        (of("guest_delete"), of("token_create"), of("peer_host_create"), of("guest_stop")),
        (2, 1, 0, 0)
    );
}

/// Sends a request and hangs up at once.
fn hang_up(d: &Daemon, method: &str, target: &str, headers: &str, body: &Value) {
    let body = body.to_string();
    let mut socket = UnixStream::connect(d.socket()).unwrap();
    // The daemon may have closed already.
    let _ = write!(
        socket,
        "{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
}

#[test]
fn callers_that_hang_up_leave_an_entry_and_an_outcome_of_everything_that_was_done() {
    const CALLS: usize = 120;
    let d = Daemon::start("a");
    for n in 0..CALLS {
        let key = if n % 3 == 0 { format!("idempotency-key: k{n}\r\n") } else { String::new() };
        hang_up(&d, "POST", "/v1/guests", &key, &emulated(&format!("g{n}")));
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
    println!("{} of {CALLS} were begun", made.len());
    assert!(!made.is_empty());
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
fn a_daemon_that_is_killed_leaves_no_change_without_an_entry_and_no_outcome_without_its_change() {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x6175_6469_7420_6c6f);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    let mut d = Daemon::start("a");
    let (mut acknowledged, mut unfinished) = (BTreeSet::new(), 0);
    for round in 0..6 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
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
                            Some(reply.header("location").unwrap().to_owned())
                        });
                        made.collect::<Vec<_>>()
                    })
                })
                .collect();
            // At a random moment of their work.
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
    println!("{} guests, {unfinished} entries without an outcome", acknowledged.len());
}
