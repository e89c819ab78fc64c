//! The audit of a migration over REST, between two daemons: what was found is in guest, migration, events and
//! metrics at both hosts, and survives a restart.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{
    Act, Break, Daemon, MemoryGroup, Pair, Request, Way, emulated, kvm, linux_guest, migration, qemu_binary,
    two_daemons, until,
};
use serde_json::{Value, json};

const GUEST: &str = "g1";

/// A guest of the software machine, so that every machine runs this.
fn run(daemon: &Daemon, mib: u64) {
    daemon.run_guest(&emulated(GUEST, mib, 1 << 20, &Value::Null));
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
    let (mut a, b) = two_daemons();
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
    let (a, b) = two_daemons();
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
    let (a, b) = two_daemons();
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

/// A guest whose memory is seen among its daemon's descriptors.
fn counted_guest() -> Value {
    let mut body = emulated(GUEST, 32, 1 << 20, &Value::Null);
    body["memory"]["backing"] = json!("memfd");
    body
}

/// A guest has moved from `a` to `b`, and its audit is pending for as long as a test wants: what the source
/// says after START does not arrive, and nobody's patience ends before the test does.
struct Pending {
    pair: Pair,
    id: String,
}

impl Pending {
    fn of(definition: &Value) -> Self {
        Self::between(Pair::start(), definition)
    }

    fn between(pair: Pair, definition: &Value) -> Self {
        let (a, b) = (&pair.a, &pair.b);
        a.run_guest(definition);
        if definition["driver"]["kind"] == "qemu" {
            // What has to cross of it must not change from one time to the next.
            let _ = a.act(&format!("/v1/guests/{GUEST}/pause")).expect(202);
            a.guest_in(GUEST, "paused");
        } else {
            a.ticks_beyond(GUEST, 2);
        }
        let moved = |from: &Daemon, to: &Daemon, audit: &str| {
            let mut body = migration(GUEST, &to.name, "stop_and_copy");
            (body["audit"], body["verify"]) = (json!(audit), json!(false));
            body["limits"] = json!({"audit_timeout_ms": 3_600_000, "stall_timeout_ms": 600_000});
            let id = from.migrate(&body);
            let ends = [from, to].map(|daemon| daemon.migration_end(&id));
            assert!(ends.iter().all(|end| end["state"] == "succeeded"), "{ends:?}");
            id
        };
        // Up to START a source says the same every time; without an audit only the goodbye follows.
        pair.to_b.watch();
        moved(a, b, "never");
        let said = pair.to_b.wait_ended(0, 60).up;
        moved(b, a, "never");
        let after_start = Break { connection: 0, way: Way::Up, records: said - 1, bytes: 0, act: Act::Stall };
        pair.to_b.arm(after_start);
        let id = moved(a, b, "after");
        pair.to_b.wait_broken(60);
        let this = Self { pair, id };
        this.goes_on(&this.pair.a);
        this.goes_on(&this.pair.b);
        this
    }

    fn migration(&self, daemon: &Daemon) -> Value {
        daemon.read(&format!("/v1/migrations/{}", self.id))
    }

    fn goes_on(&self, daemon: &Daemon) {
        for shown in [self.migration(daemon), guest(daemon)] {
            assert_eq!(shown["audit"]["state"], "pending", "{shown}");
        }
    }

    /// It ends at this daemon without a verdict, for this reason, and that is all that changes: both records
    /// are as they were `before` but for the audit.
    fn ended_as(&self, daemon: &Daemon, why: &str, before: &[Value; 2]) {
        let audit = ended(daemon, &self.id);
        assert_eq!((&audit["state"], &audit["why"]), (&json!("not_run"), &json!(why)), "{audit}");
        assert!(counted(daemon, "not_run"));
        assert_eq!(&self.but_for_the_audit(daemon), before);
    }

    /// The network is whole again after the source gave up for this reason, and the destination hears it, or
    /// has its verdict when all that it takes was on its way by then.
    fn heard_there(&self, why: &str, before: &[Value; 2]) {
        let there = &self.pair.b;
        // It waits for what it has not heard, and invents nothing.
        self.goes_on(there);
        self.pair.to_b.mend();
        let audit = ended(there, &self.id);
        assert!(audit["state"] == "proven" || audit["why"] == why, "{audit}");
        assert_eq!(&self.but_for_the_audit(there), before);
        there.ticks_on(GUEST);
    }

    /// Migration and guest as they are, without what an audit's end changes.
    fn but_for_the_audit(&self, daemon: &Daemon) -> [Value; 2] {
        [self.migration(daemon), guest(daemon)].map(without_audit)
    }
}

fn guest(daemon: &Daemon) -> Value {
    daemon.read(&format!("/v1/guests/{GUEST}"))
}

fn without_audit(mut shown: Value) -> Value {
    for changes in ["audit", "conditions", "generation"] {
        shown[changes].take();
    }
    shown
}

#[test]
fn an_audit_whose_memory_another_guest_needs_is_given_up_for_it_and_for_none_that_gets_none() {
    const MIB: u64 = 1 << 20;
    let without_content = |name: &str, mib: u64| {
        let mut body = emulated(name, mib, 0, &Value::Null);
        body["driver"]["workload"]["fill"] = json!("zero");
        body
    };
    let audit = Pending::of(&without_content(GUEST, 256));
    let (a, b) = (&audit.pair.a, &audit.pair.b);
    let before = [a, b].map(|daemon| audit.but_for_the_audit(daemon));
    // Room for half of the guest that left; with what its audit keeps, for more than all of it.
    a.limit_memory(Some(128 * MIB));
    let start = |name: &str, query: &str| a.act(&format!("/v1/guests/{name}/start{query}"));
    // For this one there is none in any case.
    let _ = a.post("/v1/guests", &without_content("large", 2048)).expect(201);
    assert_eq!(start("large", "").problem(), "no_memory");
    audit.goes_on(a);
    let _ = a.post("/v1/guests", &without_content("other", 224)).expect(201);
    assert!(start("other", "?dry_run=true").status < 300, "looking costs nothing");
    audit.goes_on(a);
    let _ = start("other", "").expect(202);
    a.guest_in("other", "running");
    audit.ended_as(a, "memory_needed", &before[0]);
    audit.heard_there("memory_needed", &before[1]);
    a.ticks_on("other");
}

#[test]
fn what_an_audit_keeps_is_as_much_as_the_same_guest_needs_its_program_included() {
    const MIB: u64 = 1 << 20;
    if qemu_binary().is_none() || !kvm() {
        return;
    }
    let images = linux_guest();
    let definition = |name: &str| {
        json!({
            "name": name,
            "driver": {"kind": "qemu", "vcpus": 1, "kernel": images.join("vmlinuz"), "accel": "tcg"},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": 128 * MIB, "gpa": 0}]},
        })
    };
    // Room for one of them: QEMU needs about as much for itself.
    let Some(group) = MemoryGroup::new(320 * MIB) else { return };
    let pair = Pair::start();
    group.take(pair.a.pid());
    let audit = Pending::between(pair, &definition(GUEST));
    let (a, b) = (&audit.pair.a, &audit.pair.b);
    let _ = a.post("/v1/guests", &definition("other")).expect(201);
    assert!(a.act("/v1/guests/other/start?dry_run=true").status < 300, "looking costs nothing");
    audit.goes_on(a);
    let _ = a.act("/v1/guests/other/start").expect(202);
    a.guest_in("other", "running");
    assert_eq!(ended(a, &audit.id)["why"], "memory_needed");
    audit.goes_on(b);
}

#[test]
fn whoever_removes_a_guest_that_left_ends_its_audit_and_has_its_memory_back() {
    let audit = Pending::of(&counted_guest());
    let (a, b) = (&audit.pair.a, &audit.pair.b);
    let before = [a, b].map(|daemon| audit.but_for_the_audit(daemon));
    assert!(a.census().memfds > 0, "what the audit keeps");
    let _ = a.delete(&format!("/v1/guests/{GUEST}?dry_run=true")).expect(200);
    audit.goes_on(a);
    let _ = a.delete(&format!("/v1/guests/{GUEST}")).expect(204);
    assert_eq!(a.census().memfds, 0, "free as soon as the guest is gone");
    let over = |m: &Value| m["audit"]["state"] != "pending";
    let told = a.follow(&format!("/v1/migrations/{}", audit.id), 60, over);
    let why = json!("memory_needed");
    assert_eq!((&told["audit"]["state"], &told["audit"]["why"]), (&json!("not_run"), &why), "{told}");
    assert_eq!(without_audit(told), before[0][0]);
    audit.heard_there("memory_needed", &before[1]);
    assert_eq!(a.guest_state(GUEST), "absent", "the end of its audit does not bring it back");
}

#[test]
fn a_source_that_ends_while_its_audit_is_pending_says_so_when_it_is_back() {
    let mut audit = Pending::of(&counted_guest());
    let before = [&audit.pair.a, &audit.pair.b].map(|daemon| audit.but_for_the_audit(daemon));
    audit.pair.a.kill();
    // The digests that were on their way go, too.
    audit.pair.to_b.cut();
    audit.pair.a.restart();
    let (a, b) = (&audit.pair.a, &audit.pair.b);
    // From its first answer on.
    assert_eq!(guest(a)["audit"]["why"], "host_restarted");
    audit.ended_as(a, "host_restarted", &before[0]);
    assert_eq!((guest(a)["moved_to"].as_str(), a.census().memfds), (Some("b"), 0));
    audit.ended_as(b, "peer_lost", &before[1]);
    b.ticks_on(GUEST);
}

#[test]
fn a_destination_that_ends_while_its_audit_is_pending_says_so_when_it_is_back() {
    let mut audit = Pending::of(&counted_guest());
    let before = [&audit.pair.a, &audit.pair.b].map(|daemon| audit.but_for_the_audit(daemon));
    assert!(audit.pair.a.census().memfds > 0, "what the audit keeps");
    audit.pair.b.kill();
    audit.ended_as(&audit.pair.a, "peer_lost", &before[0]);
    assert_eq!(audit.pair.a.census().memfds, 0, "what the audit kept");
    audit.pair.b.restart();
    let b = &audit.pair.b;
    let (told, shown) = (ended(b, &audit.id), guest(b));
    assert_eq!((&told["state"], &told["why"]), (&json!("not_run"), &json!("host_restarted")), "{told}");
    assert_eq!(without_audit(audit.migration(b)), before[1][0]);
    // The guest went with the daemon, as any guest does.
    assert_eq!((&shown["state"], &shown["error"]["code"]), (&json!("stopped"), &json!("daemon_restarted")));
    // Its next life has nothing to do with that audit.
    let _ = b.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    b.ticks_on(GUEST);
    assert_eq!((&guest(b)["audit"], &guest(b)["conditions"]), (&Value::Null, &json!([])));
}
