//! The limit of a pause, with a real QEMU: it holds, or it is said why it cannot; a pause that turns out
//! longer is broken off, and the guest goes on where it was until one fits.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::time::Duration;

use mirrorvm_tests::{Daemon, Request, children, kvm, linux_guest, migration, qemu_binary, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Longest pause that would do, and how long the guest's process does not answer: longer than that and what
/// is tolerated, and less than QEMU is given for a command.
const LIMIT_MS: u64 = 3_000;
const SILENT: Duration = Duration::from_secs(6);

/// The states that the guest was in, one after the other.
fn states(d: &Daemon) -> Vec<String> {
    let events = d.items("/v1/events?resource=q&type=guest.state_changed&limit=1000");
    events.iter().map(|e| e["data"]["state"].as_str().unwrap().to_owned()).collect()
}

fn converging(m: &Value) -> &Value {
    m["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Converging").unwrap()
}

#[test]
fn a_pause_that_is_too_long_is_broken_off_and_the_guest_goes_on_until_one_fits() {
    if !kvm() {
        return;
    }
    if qemu_binary().is_none() {
        println!("SKIPPED (no qemu-system-x86_64): this test ran nothing");
        return;
    }
    let images = linux_guest();
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&json!({
        "name": "q",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": images.join("vmlinuz"),
            "initrd": images.join("initrd.gz"), "accel": "tcg", "append": "console=ttyS0 no_timer_check quiet panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 128u64 << 20, "gpa": 0}], "backing": "memfd"},
    }));
    let ticks = |d: &Daemon| d.console_tail("q", 100 << 10).matches("tick ").count();
    until("Linux ticks", 120, || ticks(&a) > 3);
    let [qemu] = children(a.pid())[..] else { panic!("one QEMU") };
    let qemu = Pid::from_raw(qemu as i32).unwrap();

    // No pause is that short: none is tried, and which limit would do is said as long as it goes on.
    let mut wanted = migration("q", "b", "precopy");
    wanted["verify"] = json!(false);
    wanted["limits"] = json!({"downtime_ms": 10});
    let id = a.migrate(&wanted);
    let path = format!("/v1/migrations/{id}");
    let told = a.follow(&path, 60, |m| {
        m["progress"]["downtime_floor_ms"].is_u64() && m["progress"]["memory"]["iteration"].as_u64() > Some(3)
    });
    assert!(told["progress"]["downtime_floor_ms"].as_u64() > Some(10), "{told}");
    assert_eq!(converging(&told)["status"], "false", "{told}");
    assert_eq!(converging(&told)["reason"], "downtime_limit_below_floor", "{told}");
    assert!(converging(&told)["detail"].as_str().unwrap().contains("limits.downtime_ms"), "{told}");
    assert!(!states(&a).iter().any(|s| s == "paused"), "{:?}", states(&a));

    // A pause fits the limit now by all that is known, but the process does not stop its guest in time.
    kill_process(qemu, Signal::STOP).unwrap();
    let patch = Request::new("PATCH", &path).header("content-type", "application/merge-patch+json");
    let _ = a.send(&patch.body(json!({"limits": {"downtime_ms": LIMIT_MS}}).to_string())).expect(200);
    a.follow(&path, 60, |m| m["state"] == "switchover");
    // The delay is what is tested; nothing waits for it.
    std::thread::sleep(SILENT);
    kill_process(qemu, Signal::CONT).unwrap();
    let end = a.migration_end(&id);
    assert_eq!(end["state"], "succeeded", "{end}");
    let after = states(&a);
    let resumed = after.windows(2).filter(|w| w[0] == "paused" && w[1] == "running").count();
    println!("{resumed} pauses were broken off: {after:?}");
    assert!(resumed >= 1, "{after:?}");
    // What counts is the pause that fitted: up to START within limit and tolerance, and the arrival.
    let pause = end["progress"]["downtime_ms"].as_f64().unwrap();
    let floor = end["progress"]["downtime_floor_ms"].as_u64().unwrap();
    println!("{pause} ms in the end, the shortest {floor}");
    assert!(floor as f64 <= pause + 1.0, "what was had can be had: {end}");
    assert!(pause < SILENT.as_millis() as f64, "the pause that was broken off is not the one that counts");
    let before = ticks(&a);
    until("Linux ticks on there", 60, || ticks(&b) > before + 2);
    b.guest_in("q", "running");
}
