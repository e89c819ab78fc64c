//! The real thing: a stock Debian kernel with a busybox init, in QEMU, moves between two daemons.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::path::Path;

use mirrorvm_tests::{
    Act, Break, Daemon, Pair, Way, children, kvm, linux_guest, migration, qemu_binary, until, until_some,
};
use serde_json::{Value, json};

/// Ticks that are complete lines: number, checksum of a file in the guest's RAM, uptime in seconds.
fn ticks(text: &str) -> Vec<(u64, String, f64)> {
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| {
        let mut words = line.trim().strip_prefix("tick ")?.split(' ');
        let number = words.next()?.parse().ok()?;
        let sum = words.next()?.strip_prefix("sum=")?.to_owned();
        let uptime = words.next()?.strip_prefix("uptime=")?.parse().ok()?;
        Some((number, sum, uptime))
    };
    complete.lines().filter_map(parse).collect()
}

fn console(d: &Daemon) -> Vec<(u64, String, f64)> {
    ticks(&d.console_tail("linux", 512 << 10))
}

fn assert_no_gap(ticks: &[(u64, String, f64)]) {
    assert!(ticks.len() > 10, "{ticks:?}");
    for pair in ticks.windows(2) {
        assert_eq!(pair[1].0, pair[0].0 + 1, "a tick is missing or doubled: {ticks:?}");
        assert_eq!(pair[1].1, pair[0].1, "the file in RAM changed: {ticks:?}");
        assert!(pair[1].2 >= pair[0].2, "time went back: {ticks:?}");
    }
}

fn definition(kernel: &Path, initrd: &Path) -> Value {
    json!({
        "name": "linux",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": kernel, "initrd": initrd,
            "append": "console=ttyS0 no_timer_check quiet panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256 << 20, "gpa": 0}]},
    })
}

fn moves(from: &Daemon, to: &Daemon, strategy: &Value, mode: &str) {
    let last = console(from).last().unwrap().clone();
    let process = children(from.pid());
    assert_eq!(process.len(), 1, "one QEMU at the source");
    let mut body = migration("linux", &to.name, mode);
    body["mirror"] = json!({"kind": "template", "strategy": strategy});
    let m = from.migrate(&body);
    let end = from.migration_end(&m);
    assert_eq!(end["state"], "succeeded", "{end}");
    println!("{} to {}, {mode}: {}", from.name, to.name, end["progress"]);
    let rounds = from.read(&format!("/v1/migrations/{m}/rounds"));
    println!("{rounds}");
    // Live, only what Linux changed goes in the pause, and the pause is the last round's.
    let sealed: Vec<u64> =
        rounds["items"].as_array().unwrap().iter().map(|r| r["pages_encrypted"].as_u64().unwrap()).collect();
    if mode == "precopy" {
        assert!(sealed.len() > 1 && sealed[0] == 65536 && *sealed.last().unwrap() < 65536 / 4, "{sealed:?}");
    } else {
        assert_eq!(sealed, [65536]);
    }
    assert_eq!(to.migration_end(&m)["state"], "succeeded");
    let digests = |d: &Daemon| d.get(&format!("/v1/migrations/{m}/page-digests")).expect(200).body;
    assert_eq!(digests(from).len(), (256 << 20) / 4096 * 16);
    assert!(digests(from) == digests(to), "every page is equal");
    // Until then the source keeps both.
    let audited = |now: &serde_json::Value| now["audit"]["state"] != "pending";
    let audit = from.follow(&format!("/v1/migrations/{m}"), 60, audited)["audit"].clone();
    assert_eq!(audit["state"], "proven", "{audit}");
    println!("{audit}");
    until("the source's QEMU is gone", 20, || children(from.pid()).is_empty());
    assert_eq!(children(to.pid()).len(), 1, "one QEMU at the destination");
    assert_ne!(children(to.pid()), process);
    let there = until_some("Linux ticks on there", 90, || {
        let there = console(to);
        there.last().is_some_and(|t| t.0 > last.0 + 10).then_some(there)
    });
    assert_no_gap(&there);
    assert!(there.contains(&last), "what the source printed came along");
    let stopped = from.read("/v1/guests/linux");
    assert_eq!((&stopped["state"], &stopped["moved_to"]), (&json!("stopped"), &json!(to.name)));
    let memory = from.census();
    assert_eq!(memory.memfds, 0, "the source's memory is gone");
}

#[test]
fn a_linux_guest_moves_there_and_back() {
    if qemu_binary().is_none() {
        println!("SKIPPED (no qemu): this test ran nothing");
        return;
    }
    // The helper needs KVM even where QEMU does not.
    if !kvm() {
        return;
    }
    let built = linux_guest();
    // Beneath a directory that both hosts have listed.
    let dir = tempfile::tempdir_in(&built).unwrap();
    let (kernel, hidden) = (dir.path().join("vmlinuz"), dir.path().join("hidden"));
    std::fs::copy(built.join("vmlinuz"), &kernel).unwrap();
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    let begun = std::time::Instant::now();
    a.run_guest(&definition(&kernel, &built.join("initrd.gz")));
    until("Linux ticks", 180, || console(a).len() >= 5);
    println!("booted to five ticks in {:?}; {}", begun.elapsed(), a.read("/v1/host/capabilities")["qemu"]);

    // A destination that has not the kernel refuses before the guest is paused.
    std::fs::rename(&kernel, &hidden).unwrap();
    let m = a.migrate(&migration("linux", "b", "stop_and_copy"));
    let failed = a.migration_end(&m);
    assert_eq!(
        (&failed["state"], &failed["error"]["code"]),
        (&json!("failed"), &json!("invalid")),
        "{failed}"
    );
    assert!(failed["error"]["detail"].as_str().unwrap().contains("/driver/kernel"), "{failed}");
    assert!(!failed["error"]["detail"].as_str().unwrap().contains(dir.path().to_str().unwrap()), "{failed}");
    assert_eq!(b.guest_state("linux"), "absent");
    assert!(children(b.pid()).is_empty());
    let before = console(a).last().unwrap().0;
    until("Linux goes on at the source", 60, || console(a).last().unwrap().0 > before + 3);
    std::fs::rename(&hidden, &kernel).unwrap();

    // What a Linux guest does not do for its helper is refused by name.
    let plans = "/v1/guests/linux/address-space-plans";
    for (kind, code) in [("identity-cbit", "helper_unplugged"), ("declared", "no_declaration")] {
        let refused = a.post(plans, &json!({"strategy": {"kind": kind}})).expect(422).json();
        assert!(refused["errors"].as_array().unwrap().iter().any(|e| e["code"] == code), "{kind}: {refused}");
    }
    moves(a, b, &json!({"kind": "shifted", "shift": {"kind": "4gib"}}), "precopy");
    moves(b, a, &json!({"kind": "psp-copied", "via": "launch-update"}), "stop_and_copy");

    // A paused guest whose migration breaks down after its state was saved stays paused, and can be tried
    // again.
    let _ = a.act("/v1/guests/linux/pause").expect(202);
    for _ in 0..2 {
        pair.to_b.arm(Break { connection: 1, way: Way::Up, records: 100, bytes: 0, act: Act::Cut });
        let m = a.migrate(&migration("linux", "b", "stop_and_copy"));
        let end = a.migration_end(&m);
        pair.to_b.mend();
        assert_eq!(
            (&end["error"]["code"], &end["guest_state_after"]),
            (&json!("peer_lost"), &json!("paused")),
            "{end}"
        );
        b.nothing_of("linux");
    }
    let last = console(a).last().unwrap().clone();
    let _ = a.act("/v1/guests/linux/resume").expect(202);
    until("Linux goes on after its pause", 60, || console(a).last().unwrap().0 > last.0 + 3);
    assert_no_gap(&console(a));
    let _ = a.act("/v1/guests/linux/stop").expect(202);
    a.guest_in("linux", "stopped");
    until("no QEMU is left", 20, || children(a.pid()).is_empty() && children(b.pid()).is_empty());
    let run = a.state_dir().join("run");
    let left: Vec<_> = std::fs::read_dir(run)
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|d| std::fs::read_dir(d.path()).into_iter().flatten().flatten())
        .map(|e| e.file_name())
        .collect();
    assert!(left.is_empty(), "left in the run directory: {left:?}");
}
