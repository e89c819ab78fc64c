//! A guest that ends while it is being migrated: noticed at once at both hosts, whatever the migration is at.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::time::{Duration, Instant};

use mirrorvm_tests::{Daemon, children, kvm, linux_guest, migration, qemu_binary, until, until_some};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const GUEST: &str = "linux";
/// From the guest's end to that of its migration: many times what it takes, and a fraction of what the migration would.
const AT_ONCE: Duration = Duration::from_secs(15);

/// Two daemons, a Linux guest at the first; `None` where it cannot run.
fn hosts(append: &str) -> Option<(Daemon, Daemon)> {
    if !kvm() {
        return None;
    }
    if qemu_binary().is_none() {
        println!("SKIPPED (no qemu-system-x86_64): this test ran nothing");
        return None;
    }
    let linux = linux_guest();
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let definition = json!({
        "name": GUEST,
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": linux.join("vmlinuz"),
            "initrd": linux.join("initrd.gz"), "append": format!("console=ttyS0 panic=-1 {append}")},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256 << 20, "gpa": 0}]},
    });
    a.run_guest(&definition);
    Some((a, b))
}

/// Begins a migration that would take minutes, and waits until pages move.
fn slow(a: &Daemon, b: &Daemon) -> String {
    let mut body = migration(GUEST, "b", "precopy");
    body["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
    let id = a.migrate(&body);
    until("pages move", 60, || {
        let there = b.get(&format!("/v1/migrations/{id}"));
        there.status == 200 && there.json()["state"] == "precopy"
    });
    id
}

fn kill_qemu(d: &Daemon) {
    let qemu = children(d.pid());
    assert_eq!(qemu.len(), 1);
    kill_process(Pid::from_raw(qemu[0] as i32).unwrap(), Signal::KILL).unwrap();
}

/// The migration has ended with the guest, at both hosts, with that reason; gives the guest's record.
fn ended_with_it(a: &Daemon, b: &Daemon, id: &str, since: Instant) -> Value {
    let end = a.migration_end(id);
    assert!(since.elapsed() < AT_ONCE, "{:?} after the guest's end", since.elapsed());
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!("guest_ended")), "{end}");
    assert_eq!(b.migration_end(id)["state"], "failed");
    assert!(since.elapsed() < AT_ONCE, "{:?} at the destination", since.elapsed());
    b.nothing_of(GUEST);
    let guest = a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(guest["migration"], Value::Null, "{guest}");
    assert_eq!(end["guest_state_after"], guest["state"], "{end}");
    assert!(children(a.pid()).is_empty());
    guest
}

/// Waits until the guest has ended by itself, by what its console says; QEMU's end follows at once.
fn until_qemu_ends(a: &Daemon) -> Instant {
    until("QEMU ends", 120, || children(a.pid()).is_empty());
    Instant::now()
}

#[test]
fn a_guest_that_switches_itself_off_ends_its_migration_at_once() {
    let Some((a, b)) = hosts(r#"rdinit=/bin/busybox -- sh -c "sleep 12; poweroff -f""#) else { return };
    let id = slow(&a, &b);
    let guest = ended_with_it(&a, &b, &id, until_qemu_ends(&a));
    assert_eq!((&guest["state"], &guest["error"]), (&json!("stopped"), &Value::Null), "{guest}");
    let _ = a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    a.guest_in(GUEST, "running");
}

#[test]
fn a_guest_that_panics_ends_its_migration_at_once() {
    // Its first process ends: the kernel panics, and `panic=-1` reboots at once.
    let Some((a, b)) = hosts("rdinit=/bin/busybox -- sleep 12") else { return };
    let id = slow(&a, &b);
    let guest = ended_with_it(&a, &b, &id, until_qemu_ends(&a));
    assert_eq!(guest["state"], "stopped", "{guest}");
}

#[test]
fn a_guest_whose_process_is_killed_ends_its_migration_at_once_and_says_how() {
    let Some((a, b)) = hosts("") else { return };
    let id = slow(&a, &b);
    let killed = Instant::now();
    kill_qemu(&a);
    let guest = ended_with_it(&a, &b, &id, killed);
    assert_eq!(
        (&guest["state"], &guest["error"]["code"]),
        (&json!("failed"), &json!("qemu_failed")),
        "{guest}"
    );
    assert!(guest["error"]["detail"].as_str().unwrap().contains("signal 9"), "{guest}");
}

#[test]
fn a_guest_that_ends_while_its_migration_waits_in_the_queue_ends_it() {
    let Some((a, _b)) = hosts("") else { return };
    // The slots are taken.
    let mut others = Vec::new();
    for n in 0..4 {
        let mut body = mirrorvm_tests::embedded(&format!("other{n}"), 16, 0);
        body["driver"]["kind"] = json!("emulated");
        a.run_guest(&body);
        let mut m = migration(&format!("other{n}"), "b", "precopy");
        m["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
        others.push(a.migrate(&m));
    }
    let id = a.migrate(&migration(GUEST, "b", "precopy"));
    assert_eq!(a.read(&format!("/v1/migrations/{id}"))["state"], "queued");
    let killed = Instant::now();
    kill_qemu(&a);
    let end = a.migration_end(&id);
    assert!(killed.elapsed() < AT_ONCE);
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!("guest_ended")), "{end}");
    let guest = a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!((&guest["state"], &guest["migration"]), (&json!("failed"), &Value::Null), "{guest}");
    for other in others {
        let _ = a.act(&format!("/v1/migrations/{other}/cancel"));
        let _ = a.migration_end(&other);
    }
}

#[test]
fn a_destination_whose_machine_is_killed_says_so_and_the_guest_stays() {
    let Some((a, b)) = hosts("") else { return };
    let id = slow(&a, &b);
    let killed = Instant::now();
    kill_qemu(&b);
    let end = a.migration_end(&id);
    assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
    let (code, detail) = (&end["error"]["code"], end["error"]["detail"].as_str().unwrap());
    assert_eq!((&end["state"], code), (&json!("failed"), &json!("destination_failed")), "{end}");
    assert!(
        detail.contains("the machine that waited for the guest ended") && detail.contains("signal 9"),
        "{detail}"
    );
    let there = b.migration_end(&id);
    assert_eq!(there["error"]["code"], "destination_failed", "{there}");
    b.nothing_of(GUEST);
    a.guest_in(GUEST, "running");
    let before = a.console_tail(GUEST, 4096);
    until_some("Linux runs on", 60, || (a.console_tail(GUEST, 4096) != before).then_some(()));
}
