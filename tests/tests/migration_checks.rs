//! A look at a migration and the migration itself go by the same: what the look lets pass is let in, and what
//! it names is what the migration would fail with.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::path::Path;
use std::sync::Arc;

use mirrorvm::migration::wire::{self, Abilities, Hello, HelloAck, Purpose, kind};
use mirrorvm::transport::{Identity, Link, ListenerLimits, PeerListener};
use mirrorvm_tests::{Daemon, Request, embedded, kvm, linux_guest, migration, mounts, qemu_binary};
use serde_json::{Value, json};

/// A guest of the software machine: it runs wherever the tests do.
fn emulated(name: &str) -> Value {
    let mut body = embedded(name, 8, 0);
    body["driver"]["kind"] = json!("emulated");
    body
}

fn pair() -> (Daemon, Daemon) {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    know(&a, &b);
    (a, b)
}

fn know(a: &Daemon, b: &Daemon) {
    a.add_peer(b, &b.peer_address);
    b.add_peer(a, &a.peer_address);
}

fn check(a: &Daemon, wanted: &Value) -> Value {
    a.post("/v1/migration-checks", wanted).expect(200).json()
}

fn codes(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|f| f["code"].as_str().unwrap().to_owned()).collect()
}

/// The look says no with `code`, a dry run says no, and the migration fails with the same code. Nothing is
/// left of any of them.
fn all_refuse(a: &Daemon, wanted: &Value, code: &str) -> Value {
    let found = check(a, wanted);
    assert_eq!(found["migratable"], false, "{code}: {found}");
    assert!(codes(&found["blockers"]).iter().any(|c| c == code), "{code}: {found}");
    for blocker in found["blockers"].as_array().unwrap() {
        assert!(
            !blocker["detail"].as_str().unwrap().is_empty() && !blocker["fix"].as_str().unwrap().is_empty()
        );
    }
    let before = a.items("/v1/migrations").len();
    let dry = a.post("/v1/migrations?dry_run=true", wanted);
    match dry.status {
        409 => {
            assert_eq!(dry.problem(), "destination_refuses", "{}", dry.text());
            assert!(codes(&dry.json()["blocked_reasons"]).iter().any(|c| c == code), "{}", dry.text());
        }
        502 | 504 => assert!(dry.json()["detail"].as_str().unwrap().starts_with(code), "{}", dry.text()),
        _ => panic!("{code}: {}", dry.text()),
    }
    assert_eq!(a.items("/v1/migrations").len(), before, "a dry run begins nothing");
    let id = a.migrate(wanted);
    let end = a.migration_end(&id);
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!(code)), "{end}");
    // The catalogue explains it, and the record says the same, whatever else helps at the destination.
    let kind = a.read(&format!("/v1/problems/{code}"));
    let (fix, said) = (kind["fix"].as_str().unwrap(), end["error"]["fix"].as_str().unwrap());
    assert!(said.starts_with(fix), "{said}");
    assert!(!kind["cause"].as_str().unwrap().is_empty(), "{kind}");
    found
}

fn all_pass(a: &Daemon, wanted: &Value) {
    let found = check(a, wanted);
    assert_eq!((&found["migratable"], &found["blockers"]), (&json!(true), &json!([])), "{found}");
    let dry = a.post("/v1/migrations?dry_run=true", wanted).expect(200).json();
    assert_eq!(dry["preview"]["warnings"], json!([]), "the destination was asked");
    let end = a.migration_end(&a.migrate(wanted));
    assert_eq!(end["state"], "succeeded", "{end}");
}

fn set_maintenance(d: &Daemon, on: bool) {
    let request = Request::new("PATCH", "/v1/host").header("content-type", "application/merge-patch+json");
    let _ = d.send(&request.body(json!({"maintenance": on}).to_string())).expect(200);
}

#[test]
fn what_a_destination_has_against_a_guest_is_found_before_and_all_at_once() {
    let (a, b) = pair();
    let id = a.run_guest(&emulated("g1"));
    let wanted = migration("g1", "b", "precopy");
    // Its name, its id.
    let other = b.post("/v1/guests", &emulated("g1")).expect(201).json()["id"].as_str().unwrap().to_owned();
    all_refuse(&a, &wanted, "name_taken");
    let same = Request::new("PUT", &format!("/v1/guests/{id}")).json(&emulated("another"));
    let _ = b.send(&same).expect(201);
    all_refuse(&a, &wanted, "guest_exists");
    // Three reasons, none of which hides another.
    set_maintenance(&b, true);
    let found = all_refuse(&a, &wanted, "maintenance");
    assert_eq!(codes(&found["blockers"]), ["maintenance", "guest_exists", "name_taken"], "{found}");
    for there in [&other, &id] {
        let _ = b.delete(&format!("/v1/guests/{there}")).expect(204);
    }
    let found = all_refuse(&a, &wanted, "maintenance");
    assert_eq!(codes(&found["blockers"]), ["maintenance"], "{found}");
    set_maintenance(&b, false);
    // A look keeps nothing: no guest, no migration, no claim on either side.
    assert!(b.items("/v1/guests").is_empty() && b.items("/v1/migrations").is_empty());
    all_pass(&a, &wanted);
    assert_eq!(b.guest_state("g1"), "running");
}

/// Nothing else may look into a guest that leaves. The look says so before, and how the mirror is of use.
#[test]
fn a_mirror_that_is_there_already_is_in_the_way_unless_it_is_named() {
    let (a, b) = pair();
    let _ = a.run_guest(&emulated("g1"));
    let wanted = migration("g1", "b", "precopy");
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror = a.post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy})).expect(201).json();
    let found = check(&a, &wanted);
    assert_eq!(codes(&found["blockers"]), ["in_use"], "{found}");
    let blocker = &found["blockers"][0];
    assert!(blocker["detail"].as_str().unwrap().contains(mirror["id"].as_str().unwrap()), "{blocker}");
    assert!(blocker["fix"].as_str().unwrap().contains("\"kind\": \"existing\""), "{blocker}");
    for path in ["/v1/migrations?dry_run=true", "/v1/migrations"] {
        let refused = a.post(path, &wanted).expect(409);
        assert_eq!(refused.problem(), "in_use", "{path}: {}", refused.text());
    }
    assert!(a.items("/v1/migrations").is_empty() && b.items("/v1/guests").is_empty());
    // As the fix says.
    let mut named = wanted;
    named["mirror"] = json!({"kind": "existing", "mirror": mirror["id"]});
    all_pass(&a, &named);
    assert_eq!(b.guest_state("g1"), "running");
}

#[test]
fn this_host_s_reasons_and_the_destination_s_are_told_together() {
    let (a, b) = pair();
    let _ = a.post("/v1/guests", &emulated("g1")).expect(201);
    set_maintenance(&b, true);
    let found = check(&a, &migration("g1", "b", "precopy"));
    assert_eq!(codes(&found["blockers"]), ["state_conflict", "maintenance"], "{found}");
}

#[test]
fn a_guest_is_not_moved_to_where_it_is() {
    let a = Daemon::start("a");
    a.run_guest(&emulated("g1"));
    // A ticket of its own is the way to name oneself under another address.
    let leave = json!({"source": {"name": "x", "identity": a.identity}, "expires_in_seconds": 300});
    let given = a.post("/v1/incoming-migrations", &leave).expect(201).json();
    let mut wanted = migration("g1", "b", "precopy");
    wanted["destination"] = json!({"kind": "ticket", "ticket": given["ticket"]});
    let found = check(&a, &wanted);
    assert_eq!(found["migratable"], false);
    assert_eq!(codes(&found["blockers"])[0], "destination_is_self", "{found}");
    for target in ["/v1/migrations?dry_run=true", "/v1/migrations"] {
        let problem = a.post(target, &wanted).expect(422).json();
        let error = &problem["errors"][0];
        assert_eq!(
            (&error["pointer"], &error["code"]),
            (&json!("/destination"), &json!("destination_is_self")),
            "{problem}"
        );
    }
    assert!(a.items("/v1/migrations").is_empty());
    assert_eq!(a.guest_state("g1"), "running");
}

#[test]
fn a_ticket_is_looked_at_and_not_used_up() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.run_guest(&emulated("g1"));
    let leave = json!({"source": {"name": "a", "identity": a.identity}, "expires_in_seconds": 300});
    let given = b.post("/v1/incoming-migrations", &leave).expect(201).json();
    let mut wanted = migration("g1", "b", "precopy");
    wanted["destination"] = json!({"kind": "ticket", "ticket": given["ticket"]});
    for _ in 0..2 {
        assert_eq!(check(&a, &wanted)["migratable"], true);
    }
    all_pass(&a, &wanted);
    // Now it is.
    let _ = a.delete(&format!("/v1/migrations/{}", given["migration"].as_str().unwrap())).expect(204);
    let found = check(&a, &wanted);
    assert_eq!(found["migratable"], false);
    assert!(codes(&found["blockers"]).contains(&"session_exists".into()), "{found}");
}

#[test]
fn a_destination_that_cannot_be_reached_is_no_yes() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.run_guest(&emulated("g1"));
    // One that does not know this host, and nobody at all.
    a.add_peer(&b, &b.peer_address);
    all_refuse(&a, &migration("g1", "b", "precopy"), "peer_identity");
    let free = mirrorvm_tests::nobody();
    let body =
        json!({"name": "c", "address": free.to_string(), "identity": format!("sha256:{}", "cd".repeat(32))});
    let _ = a.post("/v1/hosts", &body).expect(201);
    all_refuse(&a, &migration("g1", "c", "precopy"), "peer_unreachable");
}

#[test]
fn a_destination_that_cannot_be_asked_makes_it_unknown() {
    let a = Daemon::start("a");
    let mut plain = emulated("g1");
    plain["driver"]["sev"] = Value::Null;
    a.run_guest(&plain);
    let helper: Vec<u8> = {
        let text = a.read("/v1/host/capabilities")["helper_measurement"].as_str().unwrap().to_owned();
        let hex = text.strip_prefix("sha256:").unwrap().to_owned();
        (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
    };
    let oldest = wire::PROTOCOL_VERSIONS[0];
    let abilities = Abilities {
        drivers: vec!["emulated".into()],
        strategies: vec!["shifted".into()],
        helper_abi: (3, 3),
        helper_measurement: helper.try_into().unwrap(),
        suites: vec!["aes-256-gcm".into()],
        protocol_versions: vec![oldest],
        max_phys_bits: 52,
        c_bit: None,
        phys_bit_reduction: 0,
        slot_budget: 509,
        missing: Vec::new(),
    };
    // An older build: it ends a link whose purpose it does not know.
    let dir = tempfile::tempdir().unwrap();
    let own = Identity::create(&dir.path().join("id")).unwrap();
    let pin = own.pin().to_string();
    let says = move |mut link: Link| {
        let (_, payload) = wire::expect(&mut link, &[kind::HELLO], 64 << 10).unwrap();
        let hello: Hello = wire::parse(&payload).unwrap();
        if hello.purpose != (Purpose::Ask {}) {
            let _ = link.close();
            return;
        }
        let ack = HelloAck { protocol: oldest, protocol_versions: Some(vec![oldest]), host: "old".into() };
        wire::send(&mut link, kind::HELLO_ACK, &ack).unwrap();
        let _ = wire::send(&mut link, kind::ABILITIES, &abilities).map(|()| link.close());
    };
    let any = "127.0.0.1:0".parse().unwrap();
    let limits = ListenerLimits::default();
    let listener = PeerListener::bind(any, &own, Arc::new(|_| true), limits, Arc::new(says)).unwrap();
    let body = json!({"name": "old", "address": listener.local_addr().to_string(), "identity": pin});
    let _ = a.post("/v1/hosts", &body).expect(201);
    let wanted = migration("g1", "old", "precopy");
    let found = check(&a, &wanted);
    assert_eq!((&found["migratable"], &found["blockers"]), (&json!(false), &json!([])), "{found}");
    assert_eq!(codes(&found["unknowns"]), ["destination_not_asked"], "{found}");
    let dry = a.post("/v1/migrations?dry_run=true", &wanted).expect(200).json();
    assert_eq!(codes(&dry["preview"]["warnings"]), ["destination_not_asked"], "{dry}");
    // What is known of such a build from what it says of itself.
    assert!(oldest < wire::EVIDENCE_SINCE);
    for (name, demanded, blockers) in [("g2", true, vec!["evidence_missing"]), ("g3", false, vec![])] {
        let mut guest = emulated(name);
        guest["driver"]["sev"] = json!({"attestation": {"demanded": demanded}});
        a.run_guest(&guest);
        let found = check(&a, &migration(name, "old", "precopy"));
        assert_eq!(codes(&found["blockers"]), blockers, "{found}");
        assert_eq!(codes(&found["unknowns"]), ["destination_not_asked"], "{found}");
        assert_eq!(found["migratable"], false, "{found}");
    }
}

/// A QEMU guest with these files; it need not have booted to be moved.
fn linux(kernel: &Path, initrd: &Path) -> Value {
    json!({
        "name": "q",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": kernel, "initrd": initrd, "accel": "tcg",
            "append": "console=ttyS0 no_timer_check quiet panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256u64 << 20, "gpa": 0}], "backing": "memfd"},
    })
}

#[test]
fn files_and_programs_that_a_destination_lacks_are_found_before() {
    if qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no qemu): files that a destination lacks");
        return;
    }
    let images = linux_guest();
    let (kernel, initrd) = (images.join("vmlinuz"), images.join("initrd.gz"));
    let a = Daemon::start("a");
    // None listed; listed and missing there; no QEMU.
    let none = Daemon::start_with("none", &[("MIRRORVM_IMAGE_DIRECTORIES", "")]);
    let elsewhere = tempfile::tempdir().unwrap();
    let elsewhere = elsewhere.path().canonicalize().unwrap();
    let other = Daemon::start_with("other", &[("MIRRORVM_IMAGE_DIRECTORIES", elsewhere.to_str().unwrap())]);
    let bare = Daemon::start_with("bare", &[("PATH", "/nonexistent")]);
    let definition = linux(&kernel, &initrd);
    let _ = a.post("/v1/guests", &definition).expect(201);
    let _ = a.act("/v1/guests/q/start").expect(202);
    a.guest_in("q", "running");
    for (there, code, says) in [
        (&none, "invalid", "image_directories"),
        (&other, "invalid", "/driver/kernel"),
        (&bare, "capability_missing", "qemu"),
    ] {
        know(&a, there);
        let mut wanted = migration("q", &there.name, "stop_and_copy");
        wanted["verify"] = json!(false);
        let found = all_refuse(&a, &wanted, code);
        let details = found["blockers"].to_string();
        assert!(details.contains(says), "{says}: {found}");
        if code == "invalid" {
            assert!(details.contains("/driver/initrd"), "each file by itself: {found}");
        }
        assert_eq!(a.guest_state("q"), "running", "it goes on where it was");
    }
}

#[test]
fn a_destination_without_disk_space_is_found_before() {
    if !mounts() {
        return;
    }
    let (a, b) = (Daemon::start("a"), Daemon::start_on_disk("b", 8192, &[], &[]));
    know(&a, &b);
    a.run_guest(&emulated("g1"));
    let wanted = migration("g1", "b", "precopy");
    assert_eq!(check(&a, &wanted)["migratable"], true);
    b.disk().fill(0);
    all_refuse(&a, &wanted, "storage_full");
    b.disk().free();
    all_pass(&a, &wanted);
}

#[test]
fn a_source_without_disk_space_is_found_before() {
    if !mounts() {
        return;
    }
    let (a, b) = (Daemon::start_on_disk("a", 8192, &[], &[]), Daemon::start("b"));
    know(&a, &b);
    a.run_guest(&emulated("g1"));
    let wanted = migration("g1", "b", "precopy");
    for left in [200 << 10, 600 << 10, 1100 << 10] {
        a.disk().fill(left);
        let found = check(&a, &wanted);
        assert_eq!(codes(&found["blockers"]), ["storage_full"], "{left}: {found}");
        for target in ["/v1/migrations?dry_run=true", "/v1/migrations"] {
            let refused = a.post(target, &wanted).expect(507);
            assert_eq!(refused.problem(), "storage_full", "{left} {target}: {}", refused.text());
        }
        assert!(a.items("/v1/migrations").is_empty());
        assert_eq!(a.read("/v1/guests/g1")["migration"], Value::Null, "nobody has claimed it");
        a.disk().free();
    }
    // What the look lets pass goes through, whatever room there is: it is tried with less and less.
    let mut there = (&a, "b", &b, "a");
    for left in [2400 << 10, 2000 << 10, 1600 << 10, 1500 << 10, 1400 << 10, 1300 << 10, 1200 << 10] {
        let (from, to, next, back) = there;
        let wanted = migration("g1", to, "precopy");
        a.disk().fill(left);
        let able = check(from, &wanted)["migratable"] == true;
        assert_eq!(from.post("/v1/migrations?dry_run=true", &wanted).status == 200, able, "{left}");
        if able {
            let end = from.migration_end(&from.migrate(&wanted));
            assert_eq!(end["state"], "succeeded", "{left}: {end}");
            next.guest_in("g1", "running");
            there = (next, back, from, to);
        }
        a.disk().free();
    }
}

/// Leaves `a` one slot, which a slow migration of `g1` to `b` takes; gives its id and what was asked for.
fn the_one_slot_taken(a: &Daemon) -> (String, Value) {
    let one = Request::new("PATCH", "/v1/host").header("content-type", "application/merge-patch+json");
    let _ = a.send(&one.body(json!({"migration_slots": 1}).to_string())).expect(200);
    let mut slow = migration("g1", "b", "precopy");
    slow["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
    let id = a.migrate(&slow);
    a.follow(&format!("/v1/migrations/{id}"), 30, |m| m["state"] == "precopy");
    (id, slow)
}

#[test]
fn a_migration_that_waits_for_a_slot_has_its_room_already() {
    if !mounts() {
        return;
    }
    let (a, b) = (Daemon::start_on_disk("a", 8192, &[], &[]), Daemon::start("b"));
    know(&a, &b);
    for name in ["g1", "g2"] {
        a.run_guest(&emulated(name));
    }
    let (first, _) = the_one_slot_taken(&a);
    let second = a.migrate(&migration("g2", "b", "precopy"));
    // Room for a few records more, and for no other hand-over.
    a.disk().fill(700 << 10);
    let _ = a.act(&format!("/v1/migrations/{first}/cancel"));
    a.migration_end(&first);
    let end = a.migration_end(&second);
    assert_eq!(end["state"], "succeeded", "{end}");
}

#[test]
fn a_migration_that_would_wait_for_a_slot_is_told_to_wait_and_not_refused() {
    let (a, _b) = pair();
    for name in ["g1", "g2"] {
        a.run_guest(&emulated(name));
    }
    let (id, slow) = the_one_slot_taken(&a);
    let found = check(&a, &migration("g2", "b", "precopy"));
    assert_eq!(found["migratable"], true, "{found}");
    assert!(codes(&found["warnings"]).contains(&"queued".into()), "{found}");
    // The one that is on its way is not to be had twice.
    let found = check(&a, &slow);
    assert!(codes(&found["blockers"]).contains(&"guest_migrating".into()), "{found}");
    let _ = a.act(&format!("/v1/migrations/{id}/cancel"));
    a.migration_end(&id);
}
