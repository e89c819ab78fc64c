//! The audit of a migration over REST, between two daemons: what was found is in guest, migration, events and
//! metrics at both hosts, and survives a restart.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{Daemon, Request, embedded, migration, until};
use serde_json::{Value, json};

const GUEST: &str = "g1";

fn pair() -> (Daemon, Daemon) {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    (a, b)
}

/// A guest of the software machine, so that every machine runs this.
fn run(daemon: &Daemon, mib: u64) {
    let mut body = embedded(GUEST, mib, 1 << 20);
    body["driver"]["kind"] = json!("emulated");
    body["driver"]["sev"] = Value::Null;
    daemon.run_guest(&body);
    daemon.ticks_beyond(GUEST, 2);
}

fn moved(from: &Daemon, to: &Daemon, audit: &str) -> String {
    let mut body = migration(GUEST, &to.name, "precopy");
    body["audit"] = json!(audit);
    let id = from.migrate(&body);
    let end = from.migration_end(&id);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(end["request"]["audit"], audit);
    to.migration_end(&id);
    id
}

/// The end of an audit as this daemon's migration and guest have it.
fn ended(daemon: &Daemon, id: &str) -> Value {
    let over = |v: &Value| v["audit"]["state"].is_string() && v["audit"]["state"] != "pending";
    let migration = daemon.follow(&format!("/v1/migrations/{id}"), 60, over)["audit"].clone();
    let guest = daemon.follow(&format!("/v1/guests/{GUEST}"), 60, over);
    assert_eq!(guest["audit"], migration, "guest and migration say the same");
    assert_eq!(migration["migration"], id);
    let condition = &guest["conditions"][0];
    assert_eq!(condition["type"], "MemoryProven", "{guest}");
    let status = match migration["state"].as_str().unwrap() {
        "proven" => "true",
        "mismatch" => "false",
        _ => "unknown",
    };
    assert_eq!(condition["status"], status, "{guest}");
    migration
}

fn counted(daemon: &Daemon, state: &str) -> bool {
    let line = format!("mirrorvm_memory_audits{{state=\"{state}\"}} 1");
    daemon.get("/metrics").expect(200).text().lines().any(|l| l == line)
}

#[test]
fn memory_that_crossed_whole_is_proven_at_both_hosts_and_stays_so() {
    let (mut a, b) = pair();
    run(&a, 32);
    let id = moved(&a, &b, "after");
    for daemon in [&a, &b] {
        let audit = ended(daemon, &id);
        assert_eq!(audit["state"], "proven", "{audit}");
        assert!(audit["compared_pages"].as_u64().unwrap() > 8000, "{audit}");
        assert_eq!((&audit["pages"], &audit["why"]), (&Value::Null, &Value::Null), "{audit}");
        assert_eq!(audit["first_ram_addrs"], json!([]));
        assert!(counted(daemon, "proven"));
    }
    assert_eq!(a.read(&format!("/v1/guests/{GUEST}"))["moved_to"], "b");
    // What was found outlives the daemon, and the guest's next start forgets it.
    let before = a.read(&format!("/v1/migrations/{id}"))["audit"].clone();
    a.terminate();
    a.restart();
    assert_eq!(a.read(&format!("/v1/migrations/{id}"))["audit"], before);
    assert_eq!(a.read(&format!("/v1/guests/{GUEST}"))["audit"], before);
}

#[test]
fn before_commit_it_is_part_of_the_pause_and_never_means_never() {
    let (a, b) = pair();
    run(&a, 32);
    let id = moved(&a, &b, "before_commit");
    // Over by the end of the migration.
    for daemon in [&a, &b] {
        let audit = daemon.read(&format!("/v1/migrations/{id}"))["audit"].clone();
        assert_eq!(audit["state"], "proven", "{audit}");
        assert_eq!(ended(daemon, &id), audit);
    }
    b.ticks_on(GUEST);
    let id = moved(&b, &a, "never");
    for daemon in [&a, &b] {
        assert_eq!(daemon.read(&format!("/v1/migrations/{id}"))["audit"], Value::Null);
        let guest = daemon.read(&format!("/v1/guests/{GUEST}"));
        assert_eq!((&guest["audit"], &guest["conditions"]), (&Value::Null, &json!([])));
    }
}

#[test]
fn an_audit_that_takes_too_long_or_is_in_the_way_is_given_up_with_its_reason() {
    let (a, b) = pair();
    // Several requests of the helper's, of which each takes longer than the limit.
    run(&a, 160);
    let mut body = migration(GUEST, "b", "precopy");
    body["verify"] = json!(false);
    body["limits"] = json!({"audit_timeout_ms": 1});
    let id = a.migrate(&body);
    assert_eq!(a.migration_end(&id)["state"], "succeeded");
    b.migration_end(&id);
    for daemon in [&a, &b] {
        let audit = ended(daemon, &id);
        assert_eq!((&audit["state"], &audit["why"]), (&json!("not_run"), &json!("timeout")), "{audit}");
    }
    // It has ended: its limit means nothing any more.
    let patch = Request::new("PATCH", &format!("/v1/migrations/{id}"));
    let patch = patch.header("content-type", "application/merge-patch+json");
    let _ = a.send(&patch.body(json!({"limits": {"audit_timeout_ms": 9}}).to_string())).expect(409);

    // A guest that leaves again at once: whatever its audit was at, it moves, and nobody waits for ever.
    let first = moved(&b, &a, "after");
    let second = moved(&a, &b, "after");
    for daemon in [&a, &b] {
        ended(daemon, &second);
        let told =
            daemon.follow(&format!("/v1/migrations/{first}"), 60, |m| m["audit"]["state"] != "pending");
        let audit = &told["audit"];
        let whole = audit["state"] == "proven";
        assert!(whole || audit["why"] == "mirror_needed", "{audit}");
    }
    b.ticks_on(GUEST);
    // Nothing of it stays behind.
    let _ = a.delete(&format!("/v1/guests/{GUEST}")).expect(204);
    until("the guest is gone", 30, || a.guest_state(GUEST) == "absent");
}
