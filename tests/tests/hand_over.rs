//! The hand-over of a guest between two daemons, while a disk is full or fails, a daemon dies, or the hosts
//! cannot talk: the guest is never lost, runs at one host, and the records say what is so.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{
    Act, Break, Daemon, Proxy, Request, Way, embedded, migration, mounts, until, until_some,
};
use serde_json::{Value, json};

const GUEST: &str = "g1";
/// Silence that a source takes at most, in the migrations here.
const STALL_MS: u64 = 1500;

/// Two daemons with disks of their own; `a` reaches `b` through a network that can be cut.
struct Hosts {
    a: Daemon,
    b: Daemon,
    to_b: Proxy,
}

impl Hosts {
    fn start() -> Self {
        let [a, b] = ["a", "b"].map(|name| Daemon::start_on_disk(name, 8192, &[], &[]));
        let to_b = Proxy::to(&b.peer_address);
        a.add_peer(&b, &to_b.address());
        b.add_peer(&a, &a.peer_address);
        Self { a, b, to_b }
    }

    /// Runs a guest of the software machine at `a`, under a model of SEV or not.
    fn run_guest(&self, encrypted: bool) {
        let mut body = embedded(GUEST, 16, 1 << 20);
        body["driver"]["kind"] = json!("emulated");
        body["driver"]["sev"] = if encrypted { json!({"policy": 0, "es": false}) } else { Value::Null };
        self.a.run_guest(&body);
        self.a.ticks_beyond(GUEST, 2);
    }

    /// Begins a migration and holds it while pages move; gives its id.
    fn begin(&self, after: &str) -> String {
        self.begin_as("precopy", after)
    }

    fn begin_as(&self, mode: &str, after: &str) -> String {
        let mut body = migration(GUEST, "b", mode);
        body["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20, "stall_timeout_ms": STALL_MS});
        body["on_success"] = json!({"source": after});
        let id = self.a.migrate(&body);
        let at = format!("/v1/migrations/{id}");
        until("pages move", 30, || {
            let there = self.b.get(&at);
            there.status == 200 && there.json()["state"] == "precopy"
        });
        id
    }

    /// Lets it come to its end.
    fn let_go(&self, id: &str) {
        let body = json!({"limits": {"bandwidth_bytes_per_second": null, "downtime_ms": 10_000}});
        let request = Request::new("PATCH", &format!("/v1/migrations/{id}"));
        let request = request.header("content-type", "application/merge-patch+json").body(body.to_string());
        let _ = self.a.send(&request).expect(200);
    }

    /// A migration whose COMMIT is minted while the destination's disk takes nothing.
    fn committing(&self, after: &str) -> String {
        let id = self.begin(after);
        self.b.limit_files(Some(0));
        self.let_go(&id);
        let here = self.a.follow(&format!("/v1/migrations/{id}"), 60, |m| m["committing"] == true);
        assert_eq!(here["state"], "finishing", "{here}");
        id
    }

    fn records(&self, id: &str) -> [Value; 2] {
        [&self.a, &self.b].map(|d| d.read(&format!("/v1/migrations/{id}")))
    }

    fn states(&self) -> [String; 2] {
        [self.a.guest_state(GUEST), self.b.guest_state(GUEST)]
    }

    /// The guest has moved, and both hosts say so.
    fn moved(&self, id: &str, at_source: &str) {
        let end = self.a.migration_end(id);
        assert_eq!((&end["state"], &end["committing"]), (&json!("succeeded"), &json!(false)), "{end}");
        self.b.guest_in(GUEST, "running");
        assert_eq!(self.b.migration_end(id)["state"], "succeeded");
        assert_eq!(self.a.guest_state(GUEST), at_source);
        if at_source == "stopped" {
            assert_eq!(self.a.read(&format!("/v1/guests/{GUEST}"))["moved_to"], "b");
        }
        let before = self.b.ticks(GUEST).map_or(0, |t| t.number);
        self.b.ticks_beyond(GUEST, before + 5);
    }

    /// The guest has stayed, and both hosts say so.
    fn stayed(&self) {
        self.a.guest_in(GUEST, "running");
        let before = self.a.ticks(GUEST).map_or(0, |t| t.number);
        self.a.ticks_beyond(GUEST, before + 5);
        self.b.nothing_of(GUEST);
        let guest = self.a.read(&format!("/v1/guests/{GUEST}"));
        assert_eq!((&guest["migration"], &guest["moved_to"]), (&Value::Null, &Value::Null), "{guest}");
    }
}

fn code(m: &Value) -> &str {
    m["error"]["code"].as_str().unwrap_or("-")
}

#[test]
fn a_destination_without_room_for_the_hand_over_s_records_refuses_at_once_and_by_name() {
    if !mounts() {
        return;
    }
    let hosts = Hosts::start();
    hosts.run_guest(true);
    hosts.b.disk().fill(32 << 10);
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    let end = hosts.a.migration_end(&id);
    assert_eq!((end["state"].as_str(), code(&end)), (Some("failed"), "storage_full"), "{end}");
    let detail = end["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("the destination") && detail.contains("disk space"), "{detail}");
    hosts.stayed();
    hosts.b.disk().free();
    // The same of the source's own disk.
    hosts.a.disk().fill(256 << 10);
    let refused = hosts.a.post("/v1/migrations", &migration(GUEST, "b", "precopy")).expect(507);
    assert_eq!(refused.problem(), "storage_full", "{}", refused.text());
    hosts.stayed();
    hosts.a.disk().free();
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

#[test]
fn a_disk_that_fills_up_between_prepare_and_commit_does_not_hold_up_the_guest() {
    if !mounts() {
        return;
    }
    for encrypted in [false, true] {
        let mut hosts = Hosts::start();
        hosts.run_guest(encrypted);
        let id = hosts.begin("keep_stopped");
        hosts.b.disk().fill(0);
        hosts.let_go(&id);
        hosts.moved(&id, "stopped");
        // What was told is on disk, although the database took none of it: a daemon that dies now has not
        // forgotten.
        assert_eq!(hosts.b.read("/v1/host")["storage"]["state"], "full");
        hosts.b.kill();
        hosts.b.disk().free();
        hosts.b.restart();
        let there = hosts.b.read(&format!("/v1/migrations/{id}"));
        assert_eq!(there["state"], "succeeded", "{there}");
        let guest = hosts.b.read(&format!("/v1/guests/{GUEST}"));
        assert_eq!((guest["state"].as_str(), code(&guest)), (Some("stopped"), "daemon_restarted"), "{guest}");
        assert_eq!(hosts.a.read(&format!("/v1/guests/{GUEST}"))["moved_to"], "b");
        // It is this host's: started anew here, and nowhere else.
        let _ = hosts.b.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
        hosts.b.guest_in(GUEST, "running");
        assert_eq!(hosts.a.act(&format!("/v1/guests/{GUEST}/start")).expect(409).problem(), "guest_moved");
    }
}

#[test]
fn a_disk_that_fills_up_while_an_import_fails_keeps_its_end() {
    if !mounts() {
        return;
    }
    let mut hosts = Hosts::start();
    hosts.run_guest(true);
    let id = hosts.begin("keep_stopped");
    hosts.b.disk().fill(0);
    let _ = hosts.a.act(&format!("/v1/migrations/{id}/cancel"));
    assert_eq!(hosts.a.migration_end(&id)["state"], "canceled");
    hosts.stayed();
    let ended = hosts.b.migration_end(&id);
    assert_ne!(ended["state"], "succeeded", "{ended}");
    hosts.b.kill();
    hosts.b.disk().free();
    hosts.b.restart();
    let there = hosts.b.read(&format!("/v1/migrations/{id}"));
    assert_eq!((&there["state"], code(&there)), (&ended["state"], code(&ended)), "{there}");
    assert_eq!(hosts.b.guest_state(GUEST), "absent");
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

#[test]
fn the_end_of_an_import_that_nothing_took_is_stored_as_soon_as_that_works() {
    if !mounts() {
        return;
    }
    let mut hosts = Hosts::start();
    hosts.run_guest(true);
    let id = hosts.begin("keep_stopped");
    // Neither the database nor the space that was set aside.
    hosts.b.limit_files(Some(0));
    let _ = hosts.a.act(&format!("/v1/migrations/{id}/cancel"));
    assert_eq!(hosts.a.migration_end(&id)["state"], "canceled");
    hosts.stayed();
    let (at, token) = (format!("/v1/migrations/{id}"), format!("/v1/migrations/{id}/hand-over-token"));
    let ended = hosts.b.migration_end(&id);
    // It is kept a moment after the end is shown.
    let abort = until_some("ABORT is kept", 20, || {
        let there = hosts.b.get(&token);
        (there.status == 200).then(|| there.json())
    });
    hosts.b.limit_files(None);
    until("the destination's disk works again", 20, || {
        hosts.b.read("/v1/host")["storage"]["owed_changes"] == 0
    });
    hosts.b.kill();
    hosts.b.restart();
    let there = hosts.b.read(&at);
    assert_eq!((&there["state"], code(&there)), (&ended["state"], code(&ended)), "{there}");
    assert_eq!(hosts.b.read(&token), abort, "ABORT is not forgotten");
    assert_eq!(hosts.b.guest_state(GUEST), "absent");
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

#[test]
fn a_source_whose_disk_fills_up_after_start_tells_the_end_and_keeps_it() {
    if !mounts() {
        return;
    }
    for after in ["keep_stopped", "delete"] {
        let mut hosts = Hosts::start();
        hosts.run_guest(true);
        let id = hosts.committing(after);
        hosts.a.disk().fill(0);
        hosts.b.limit_files(None);
        let left = if after == "delete" { "absent" } else { "stopped" };
        hosts.moved(&id, left);
        hosts.a.kill();
        hosts.a.disk().free();
        hosts.a.restart();
        let here = hosts.a.read(&format!("/v1/migrations/{id}"));
        assert_eq!(here["state"], "succeeded", "{here}");
        hosts.moved(&id, left);
    }
}

#[test]
fn a_source_that_cannot_store_start_keeps_the_guest() {
    if !mounts() {
        return;
    }
    let hosts = Hosts::start();
    hosts.run_guest(true);
    // Comes to START by itself: changes could not be noted either.
    let id = hosts.begin_as("stop_and_copy", "keep_stopped");
    hosts.a.limit_files(Some(0));
    let end = hosts.a.migration_end(&id);
    assert_eq!((end["state"].as_str(), code(&end)), (Some("failed"), "journal"), "{end}");
    hosts.stayed();
    hosts.a.limit_files(None);
    until("the source's disk works again", 20, || hosts.a.get("/readyz").status == 200);
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

#[test]
fn a_destination_whose_disk_fails_holds_the_guest_and_its_source_waits_until_commit_is_stored() {
    if !mounts() {
        return;
    }
    for encrypted in [false, true] {
        let hosts = Hosts::start();
        hosts.run_guest(encrypted);
        let id = hosts.committing("keep_stopped");
        let begun = hosts.records(&id)[0]["progress"]["elapsed_ms"].as_u64().unwrap();
        // Longer than the silence that the source takes: it hears that somebody tries.
        until_some("the wait outlasts two stall timeouts", 60, || {
            let [here, there] = hosts.records(&id);
            for m in [&here, &there] {
                assert_eq!((&m["state"], &m["committing"]), (&json!("finishing"), &json!(true)), "{m}");
                let stalled = m["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Stalled");
                assert_eq!(stalled.unwrap()["reason"], "committing", "{m}");
            }
            assert_eq!(hosts.states(), ["paused", "incoming"], "nobody runs it, and both say so");
            (here["progress"]["elapsed_ms"].as_u64().unwrap() > begun + 2 * STALL_MS).then_some(())
        });
        let cancel = hosts.a.act(&format!("/v1/migrations/{id}/cancel"));
        assert_eq!(cancel.expect(409).problem(), "past_point_of_no_return");
        hosts.b.limit_files(None);
        hosts.moved(&id, "stopped");
    }
}

/// A migration whose destination is gone before COMMIT was stored.
fn in_doubt(encrypted: bool) -> (Hosts, String) {
    let mut hosts = Hosts::start();
    hosts.run_guest(encrypted);
    let id = hosts.committing("keep_stopped");
    hosts.b.kill();
    hosts.a.follow(&format!("/v1/migrations/{id}"), 30, |m| m["state"] == "in_doubt");
    (hosts, id)
}

#[test]
fn a_destination_that_dies_before_commit_is_stored_never_had_the_guest() {
    if !mounts() {
        return;
    }
    let (mut hosts, id) = in_doubt(false);
    assert_eq!(hosts.a.guest_state(GUEST), "in_doubt");
    hosts.b.restart();
    // Hosts are trusted at this level: the journal's word is enough.
    let end = hosts.a.migration_end(&id);
    assert_eq!(end["state"], "failed", "{end}");
    hosts.stayed();
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

/// An encrypted guest whose destination died before COMMIT was stored: only a helper could say that it never
/// was, and that is gone.
fn doubt_without_end() -> (Hosts, String) {
    let (mut hosts, id) = in_doubt(true);
    let at = format!("/v1/migrations/{id}");
    hosts.b.restart();
    assert_eq!(hosts.b.guest_state(GUEST), "absent");
    assert_eq!(hosts.b.get(&format!("{at}/hand-over-token")).status, 404);
    assert_eq!(hosts.a.read(&at)["state"], "in_doubt");
    (hosts, id)
}

fn word(outcome: &str) -> Value {
    json!({"kind": "word", "outcome": outcome, "reason": "host b lost its memory", "confirm": GUEST})
}

#[test]
fn an_administrator_s_word_ends_a_doubt_is_confirmed_and_kept() {
    if !mounts() {
        return;
    }
    let (hosts, id) = doubt_without_end();
    let at = format!("/v1/migrations/{id}");
    let resolve = format!("{at}/resolution");
    let mut unconfirmed = word("never_committed");
    unconfirmed["confirm"] = json!("g2");
    let refused = hosts.a.post(&resolve, &unconfirmed).expect(422).json();
    assert_eq!(refused["errors"][0]["pointer"], "/confirm", "{refused}");
    let mut silent = word("never_committed");
    silent["reason"] = json!(" ");
    assert_eq!(hosts.a.post(&resolve, &silent).expect(422).json()["errors"][0]["pointer"], "/reason");
    let only = json!({"kind": "word", "outcome": "never_committed"});
    assert_eq!(hosts.a.post(&resolve, &only).expect(422).json()["errors"].as_array().unwrap().len(), 2);
    let operator = hosts.a.post("/v1/tokens", &json!({"name": "op", "role": "operator"})).expect(201).json();
    let operator = format!("Bearer {}", operator["secret"].as_str().unwrap());
    let request = Request::new("POST", &resolve).header("authorization", &operator).json(&word("committed"));
    assert_eq!(hosts.a.send(&request).expect(403).problem(), "forbidden");
    let dry = hosts.a.post(&format!("{resolve}?dry_run=true"), &word("never_committed")).expect(200).json();
    assert_eq!(dry["state"], "in_doubt");
    assert_eq!(hosts.states(), ["in_doubt", "absent"], "what was refused or tried has changed nothing");
    let _ = hosts.a.post(&resolve, &word("never_committed")).expect(202);
    let end = hosts.a.migration_end(&id);
    assert_eq!((end["state"].as_str(), code(&end)), (Some("failed"), "resolved"), "{end}");
    assert_eq!(end["resolution"]["outcome"], "never_committed");
    assert_eq!(end["resolution"]["reason"], "host b lost its memory");
    hosts.stayed();
    let log = hosts.a.items("/v1/audit-log?limit=100");
    let said: Vec<_> =
        log.iter().filter(|e| e["operation"] == "migration_resolve" && e["status"] == 202).collect();
    assert_eq!(said.len(), 1, "{log:?}");
    assert_eq!(said[0]["path"], resolve.as_str());
    // Settled is settled.
    assert_eq!(hosts.a.post(&resolve, &word("committed")).expect(409).problem(), "state_conflict");
    let id = hosts.a.migrate(&migration(GUEST, "b", "precopy"));
    hosts.moved(&id, "stopped");
}

#[test]
fn an_administrator_s_word_that_it_moved_lets_go_of_the_guest_also_after_a_restart() {
    if !mounts() {
        return;
    }
    let (mut hosts, id) = doubt_without_end();
    hosts.to_b.cut();
    hosts.a.kill();
    hosts.a.restart();
    let at = format!("/v1/migrations/{id}");
    assert_eq!(hosts.a.read(&at)["state"], "in_doubt");
    // The helper that could check it went with the daemon.
    let token = json!({"kind": "token", "migration": id, "outcome": "committed", "token": "AAAA"});
    let refused = hosts.a.post(&format!("{at}/resolution"), &token).expect(422).json();
    assert_eq!(refused["errors"][0]["code"], "not_checkable", "{refused}");
    let _ = hosts.a.post(&format!("{at}/resolution"), &word("committed")).expect(202);
    let end = hosts.a.migration_end(&id);
    assert_eq!((&end["state"], &end["resolution"]["outcome"]), (&json!("succeeded"), &json!("committed")));
    let guest = hosts.a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!((&guest["state"], &guest["moved_to"]), (&json!("stopped"), &json!("b")), "{guest}");
}

#[test]
fn a_token_that_is_carried_by_hand_ends_a_doubt_and_no_other_does() {
    if !mounts() {
        return;
    }
    let hosts = Hosts::start();
    hosts.run_guest(true);
    let id = hosts.committing("keep_stopped");
    hosts.to_b.cut();
    let at = format!("/v1/migrations/{id}");
    hosts.a.follow(&at, 30, |m| m["state"] == "in_doubt");
    hosts.b.limit_files(None);
    hosts.b.guest_in(GUEST, "running");
    assert_eq!(hosts.a.guest_state(GUEST), "in_doubt");
    let token = hosts.b.read(&format!("{at}/hand-over-token"));
    assert_eq!((&token["outcome"], &token["migration"]), (&json!("committed"), &json!(id)), "{token}");
    let resolve = format!("{at}/resolution");
    let mut other = token.clone();
    other["migration"] = json!("0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11");
    assert_eq!(hosts.a.post(&resolve, &other).expect(422).json()["errors"][0]["code"], "wrong_id");
    let mut turned = token.clone();
    turned["outcome"] = json!("never_committed");
    assert_eq!(hosts.a.post(&resolve, &turned).expect(422).json()["errors"][0]["code"], "token_refused");
    let mut forged = token.clone();
    let text = token["token"].as_str().unwrap();
    let first = if text.starts_with('A') { "B" } else { "A" };
    forged["token"] = json!(format!("{first}{}", &text[1..]));
    assert_eq!(hosts.a.post(&resolve, &forged).expect(422).json()["errors"][0]["code"], "token_refused");
    assert_eq!(hosts.states(), ["in_doubt", "running"]);
    let _ = hosts.a.post(&resolve, &token).expect(202);
    hosts.moved(&id, "stopped");
}

#[test]
fn a_source_whose_link_stalls_after_start_says_that_it_holds_the_guest() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    let to_b = Proxy::to(&b.peer_address);
    a.add_peer(&b, &to_b.address());
    b.add_peer(&a, &a.peer_address);
    let mut body = embedded(GUEST, 16, 0);
    body["driver"]["kind"] = json!("emulated");
    a.run_guest(&body);
    let mut request = migration(GUEST, "b", "stop_and_copy");
    request["limits"] = json!({"stall_timeout_ms": 3000});
    // An audit would have more to say behind COMMIT.
    request["audit"] = json!("never");
    // What the destination says in a whole migration, the same every time; the last record closes the link.
    to_b.watch();
    let id = a.migrate(&request);
    assert_eq!(a.migration_end(&id)["state"], "succeeded");
    b.guest_in(GUEST, "running");
    let said = to_b.traffic()[0].down;
    request["destination"]["host"] = json!("a");
    let id = b.migrate(&request);
    assert_eq!(b.migration_end(&id)["state"], "succeeded");
    a.guest_in(GUEST, "running");
    request["destination"]["host"] = json!("b");
    to_b.arm(Break { connection: 0, way: Way::Down, records: said - 2, bytes: 0, act: Act::Stall });
    let id = a.migrate(&request);
    // From the moment that the copy runs, for as long as the source hears nothing, and while it is in doubt.
    b.guest_in(GUEST, "running");
    let mut seen = std::collections::BTreeSet::new();
    until("the source is in doubt", 60, || {
        let (guest, state) = (a.guest_state(GUEST), a.read(&format!("/v1/migrations/{id}"))["state"].clone());
        assert!(["paused", "in_doubt"].contains(&guest.as_str()), "{guest} at the source, and the copy runs");
        seen.insert(guest.clone());
        guest == "in_doubt" && state == "in_doubt"
    });
    assert!(seen.contains("paused"), "{seen:?}");
    to_b.mend();
    assert_eq!(a.migration_end(&id)["state"], "succeeded");
    assert_eq!(a.read(&format!("/v1/guests/{GUEST}"))["moved_to"], "b");
}

#[test]
fn a_destination_that_gives_up_in_the_midst_of_a_round_says_why() {
    if !mounts() {
        return;
    }
    let hosts = Hosts::start();
    hosts.run_guest(true);
    let id = hosts.begin("keep_stopped");
    let _ = hosts.b.act(&format!("/v1/migrations/{id}/cancel")).expect(202);
    let end = hosts.a.migration_end(&id);
    assert_eq!((end["state"].as_str(), code(&end)), (Some("failed"), "canceled"), "{end}");
    assert!(end["error"]["detail"].as_str().unwrap().starts_with("the peer refuses"), "{end}");
    assert_eq!(hosts.b.migration_end(&id)["state"], "canceled");
    hosts.stayed();
}

/// Puts a host's state back to what it is now, after `meanwhile`; the daemon has ended then.
fn put_back(d: &mut Daemon, meanwhile: impl FnOnce(&mut Daemon)) {
    let state = d.state_dir().to_string_lossy().into_owned();
    let file = d.state_dir().with_file_name("backup").to_string_lossy().into_owned();
    let (code, _, said) = d.command_line(&["state", "backup", &state, &file]);
    assert_eq!(code, 0, "{said}");
    meanwhile(d);
    let (code, _, said) = d.command_line(&["state", "restore", &file, &state]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_guest_in_doubt_of_a_source_that_was_put_back_runs_nowhere_before_the_doubt_is_settled() {
    if !mounts() {
        return;
    }
    let (mut hosts, id) = in_doubt(false);
    put_back(&mut hosts.a, Daemon::kill);
    hosts.a.restart();
    let path = format!("/v1/guests/{GUEST}");
    let guest = hosts.a.read(&path);
    assert_eq!((&guest["state"], &guest["unconfirmed"]), (&json!("in_doubt"), &json!(true)), "{guest}");
    for action in ["start", "resume"] {
        let refused = hosts.a.act(&format!("{path}/{action}"));
        assert_eq!(refused.status, 409, "{action}: {}", refused.text());
        let dry = hosts.a.act(&format!("{path}/{action}?dry_run=true"));
        assert_eq!(dry.status, 409, "{action}: {}", dry.text());
    }
    assert_eq!(hosts.a.post("/v1/migrations", &migration(GUEST, "b", "precopy")).status, 409);
    assert_eq!(hosts.a.delete(&path).status, 409);
    hosts.b.restart();
    let end = hosts.a.migration_end(&id);
    assert_eq!(end["state"], "failed", "{end}");
    let guest = hosts.a.follow(&path, 60, |g| g["unconfirmed"] == false);
    assert_eq!((&guest["state"], &guest["moved_to"]), (&json!("stopped"), &Value::Null), "{guest}");
    assert_eq!(hosts.b.guest_state(GUEST), "absent");
    let _ = hosts.a.act(&format!("{path}/start")).expect(202);
    hosts.stayed();
}

#[test]
fn a_destination_that_was_put_back_into_an_import_does_not_start_what_the_source_may_have() {
    if !mounts() {
        return;
    }
    let mut hosts = Hosts::start();
    hosts.run_guest(false);
    let id = hosts.committing("keep_stopped");
    put_back(&mut hosts.b, Daemon::kill);
    let at = format!("/v1/migrations/{id}");
    hosts.a.follow(&at, 30, |m| m["state"] == "in_doubt");
    hosts.b.restart();
    // It may have committed after the backup, for all that it knows: it does not say that it never did.
    let path = format!("/v1/guests/{GUEST}");
    let said = |d: &Daemon, action: &str| {
        let refused = d.act(&format!("{path}/{action}")).expect(409);
        (refused.problem(), refused.json()["blocked_reasons"].to_string())
    };
    until("b has asked a", 60, || said(&hosts.b, "start").1.contains("a does not know yet"));
    for action in ["start", "resume"] {
        assert_eq!(said(&hosts.b, action).0, "guest_unconfirmed");
    }
    assert_eq!(hosts.a.read(&at)["state"], "in_doubt");
    assert_eq!(hosts.a.act(&format!("{path}/resume")).status, 409);
    let _ = hosts.a.post(&format!("{at}/resolution"), &word("never_committed")).expect(202);
    assert_eq!(hosts.a.migration_end(&id)["state"], "failed");
    hosts.a.guest_in(GUEST, "running");
    let guest = hosts.b.follow(&path, 60, |g| g["unconfirmed"] == false);
    assert_eq!((&guest["state"], &guest["moved_to"]), (&json!("stopped"), &json!("a")), "{guest}");
    assert_eq!(said(&hosts.b, "start").0, "guest_moved");
}
