//! A guest that ends: its record says what ended it, and a migration of it ends at once at both hosts,
//! whatever it is at.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use mirrorvm_tests::{
    Daemon, children, embedded, kvm, linux_guest, migration, qemu_binary, until, until_some,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const GUEST: &str = "linux";
/// From the guest's end to that of its migration: many times what it takes, and a fraction of what the
/// migration would.
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
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&linux(GUEST, 256, append));
    Some((a, b))
}

/// A Linux in QEMU with this on its command line.
fn linux(name: &str, mib: u64, append: &str) -> Value {
    let built = linux_guest();
    json!({
        "name": name,
        "driver": {"kind": "qemu", "vcpus": 1, "on_reboot": "stop", "kernel": built.join("vmlinuz"),
            "initrd": built.join("initrd.gz"), "append": format!("console=ttyS0 no_timer_check panic=-1 {append}")},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": mib << 20, "gpa": 0}]},
    })
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

/// A guest's state and what ended it.
fn ended_as(guest: &Value) -> (&str, &str) {
    (guest["state"].as_str().unwrap(), guest["error"]["code"].as_str().unwrap_or("none"))
}

/// Waits until the guest has ended by itself, by what its console says; QEMU's end follows at once.
fn until_qemu_ends(a: &Daemon) -> Instant {
    until("QEMU ends", 120, || children(a.pid()).is_empty());
    Instant::now()
}

#[test]
fn a_guest_that_switches_itself_off_ends_its_migration_at_once() {
    let Some((a, b)) = hosts(r#"rdinit=/bin/busybox -- sh -c "sleep 12; /bin/busybox poweroff -f""#) else {
        return;
    };
    let id = slow(&a, &b);
    let guest = ended_with_it(&a, &b, &id, until_qemu_ends(&a));
    assert_eq!(ended_as(&guest), ("stopped", "guest_powered_off"), "{guest}");
    let told = a.read(&format!("/v1/migrations/{id}"));
    assert!(told["error"]["detail"].as_str().unwrap().contains("switched itself off"), "{told}");
    let _ = a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    assert_eq!(a.guest_in(GUEST, "running")["error"], Value::Null, "what is over is not told any more");
}

#[test]
fn a_guest_that_panics_ends_its_migration_at_once() {
    // Its first process ends: the kernel panics, and `panic=-1` reboots at once.
    let Some((a, b)) = hosts("rdinit=/bin/busybox -- sleep 12") else { return };
    let id = slow(&a, &b);
    let guest = ended_with_it(&a, &b, &id, until_qemu_ends(&a));
    assert_eq!(ended_as(&guest), ("stopped", "guest_reset"), "{guest}");
}

#[test]
fn what_ended_a_guest_is_in_its_record_and_its_event() {
    if !kvm() {
        return;
    }
    if qemu_binary().is_none() {
        println!("SKIPPED (no qemu-system-x86_64): this test ran nothing");
        return;
    }
    let d = Daemon::start("d");
    let ends = [
        (
            "off",
            r#"quiet rdinit=/bin/busybox -- sh -c "/bin/busybox poweroff -f""#,
            "stopped",
            "guest_powered_off",
            "itself off",
        ),
        (
            "again",
            r#"quiet rdinit=/bin/busybox -- sh -c "/bin/busybox reboot -f""#,
            "stopped",
            "guest_reset",
            "start it again",
        ),
        ("killed", "quiet guest=killed", "failed", "qemu_failed", "signal 9"),
        ("asked", "quiet guest=asked", "failed", "qemu_failed", "host-signal"),
    ];
    for (name, append, ..) in ends {
        let _ = d.post("/v1/guests", &linux(name, 128, append)).expect(201);
        let _ = d.act(&format!("/v1/guests/{name}/start")).expect(202);
    }
    // By hand, and politely: QEMU's own word is that it was told to by a signal.
    for (name, signal) in [("killed", Signal::KILL), ("asked", Signal::TERM)] {
        d.guest_in(name, "running");
        let qemu = of_guest(&d, name);
        kill_process(Pid::from_raw(qemu as i32).unwrap(), signal).unwrap();
    }
    for (name, _, state, code, word) in ends {
        let guest = d.follow(&format!("/v1/guests/{name}"), 90, |g| g["error"] != Value::Null);
        assert_eq!(ended_as(&guest), (state, code), "{guest}");
        let detail = guest["error"]["detail"].as_str().unwrap();
        assert!(detail.contains(word), "{detail}");
        let events = d.items(&format!("/v1/events?resource={name}&type=guest.state_changed"));
        let last = &events.last().unwrap()["data"];
        assert_eq!((&last["state"], &last["error"]), (&json!(state), &json!(code)), "{last}");
    }
    assert!(children(d.pid()).is_empty());
}

/// The process of a guest, which has its name on the kernel's command line.
fn of_guest(d: &Daemon, name: &str) -> u32 {
    until_some("the guest's QEMU", 20, || {
        children(d.pid()).into_iter().find(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.contains(&format!("guest={name}")))
        })
    })
}

#[test]
fn a_workload_guest_whose_memory_is_garbage_fails_and_says_that_its_vcpu_stopped() {
    let d = Daemon::start("d");
    let drivers = if kvm() { &["embedded", "emulated"][..] } else { &["emulated"] };
    for driver in drivers {
        let mut guest = embedded(driver, 16, 1 << 20);
        guest["driver"]["kind"] = json!(driver);
        guest["memory"]["blocks"][0]["name"] = json!(format!("ram-{driver}"));
        guest["memory"]["backing"] = json!("memfd");
        d.run_guest(&guest);
        until("it works", 60, || !d.console_tail(driver, 64).is_empty());
        let ram = memory_of(&d, &format!("/memfd:ram-{driver}"));
        // `ud2`, wherever it goes on; and whatever it looks up is nonsense.
        let garbage = [0x0f, 0x0b].repeat(1 << 19);
        for mib in 0..16 {
            ram.write_all_at(&garbage, mib << 20).unwrap();
        }
        let ended = d.guest_in(driver, "failed");
        assert_eq!(ended_as(&ended), ("failed", "guest_crashed"), "{ended}");
        let detail = ended["error"]["detail"].as_str().unwrap();
        assert!(detail.contains("a vCPU stopped: triple fault"), "{detail}");
        let events = d.items(&format!("/v1/events?resource={driver}&type=guest.state_changed"));
        assert_eq!(events.last().unwrap()["data"]["error"], "guest_crashed");
        // What broke is over: it stops, and starts anew.
        let _ = d.act(&format!("/v1/guests/{driver}/stop")).expect(202);
        assert_eq!(d.guest_in(driver, "stopped")["error"], Value::Null);
        let _ = d.act(&format!("/v1/guests/{driver}/start")).expect(202);
        d.guest_in(driver, "running");
    }
}

/// The memory file of a daemon that has this name.
fn memory_of(d: &Daemon, name: &str) -> std::fs::File {
    let dir = format!("/proc/{}/fd", d.pid());
    let found = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).find(|path| {
        std::fs::read_link(path)
            .is_ok_and(|link| link.to_string_lossy().trim_end_matches(" (deleted)") == name)
    });
    std::fs::File::options().write(true).open(found.unwrap()).unwrap()
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
