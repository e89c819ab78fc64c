//! Memory that is promised is there: what the host, a control group or the reserved huge pages cannot give is
//! refused by name, whoever asks, and everybody else lives.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use mirrorvm_tests::{
    Daemon, MemoryGroup, Pair, children, embedded, kvm, linux_guest, migration, qemu_binary, until,
    until_some,
};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 << 20;

/// Tests that count or change the host's huge pages, or have a guest that takes some when there are, one at a
/// time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest that touches little of its memory: addresses, not pages, are what it has.
fn sparse(name: &str, mib: u64) -> Value {
    let mut guest = embedded(name, mib, 0);
    guest["driver"]["workload"]["fill"] = json!("zero");
    guest
}

fn on_huge_pages(name: &str, mib: u64) -> Value {
    let mut guest = sparse(name, mib);
    guest["memory"]["backing"] = json!("hugetlb");
    guest
}

/// A Linux in QEMU whose memory lies on whatever the daemon chooses.
fn linux(name: &str) -> Value {
    let images = linux_guest();
    json!({
        "name": name,
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": images.join("vmlinuz"),
            "initrd": images.join("initrd.gz"), "accel": "tcg", "append": "console=ttyS0 no_timer_check quiet panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 128 * MIB, "gpa": 0}]},
    })
}

fn define(d: &Daemon, guest: &Value) {
    let _ = d.post("/v1/guests", guest).expect(201);
}

/// A start that must be refused for want of memory; the guest stays as it was. Gives the problem.
fn refused(d: &Daemon, guest: &str) -> Value {
    let path = format!("/v1/guests/{guest}");
    let before = d.read(&path);
    for target in [format!("{path}/start?dry_run=true"), format!("{path}/start")] {
        let reply = d.act(&target);
        assert_eq!(reply.problem(), "no_memory", "{target}");
        assert_eq!(d.read(&path), before, "{target}");
    }
    let problem = d.act(&format!("{path}/start")).json();
    let error = &problem["errors"][0];
    assert!(error["value"].as_u64().unwrap() > error["bound"].as_u64().unwrap(), "{problem}");
    problem
}

struct HugePages(u64);

impl HugePages {
    const COUNT: &'static str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn number(file: &str) -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
        std::fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    }

    fn free() -> u64 {
        Self::number("free_hugepages").saturating_sub(Self::number("resv_hugepages"))
    }

    /// Sees to it that `count` are free; `None`, said loudly, where nobody may.
    fn with(count: u64) -> Option<Self> {
        let before = Self::number("nr_hugepages");
        let this = Self(before);
        let wanted = before + count.saturating_sub(Self::free());
        let asked = std::fs::write(Self::COUNT, wanted.to_string());
        if asked.is_ok() && Self::free() == count {
            return Some(this);
        }
        println!("SKIPPED (huge pages cannot be reserved): this test ran nothing");
        None
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::COUNT, self.0.to_string());
    }
}

#[test]
fn a_guest_on_huge_pages_that_are_not_there_is_refused_by_name_and_the_others_live() {
    if !kvm() {
        return;
    }
    let _one = alone();
    let d = Daemon::start("d");
    d.run_guest(&embedded("bystander", 16, 0));
    let before = d.census();
    let mib = HugePages::free() * 2 + 16;
    define(&d, &on_huge_pages("huge", mib));
    let problem = refused(&d, "huge");
    let error = &problem["errors"][0];
    assert_eq!((&error["what"], &error["value"]), (&json!("huge_pages"), &json!(mib * MIB)), "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    for word in [format!("{mib} MiB"), "vm.nr_hugepages".into(), "another backing".into()] {
        assert!(detail.contains(&word), "{detail}");
    }
    // Without KVM it is the same.
    let mut emulated = on_huge_pages("emulated", mib);
    emulated["driver"]["kind"] = json!("emulated");
    define(&d, &emulated);
    assert_eq!(refused(&d, "emulated")["errors"][0]["what"], "huge_pages");
    d.ticks_on("bystander");
    let after = d.census();
    assert_eq!((after.memfds, after.kvm), (before.memfds, before.kvm));
}

#[test]
fn a_guest_that_comes_for_huge_pages_finds_them_or_is_refused_before_it_leaves() {
    if !kvm() {
        return;
    }
    let _one = alone();
    // Enough for the guest once.
    let Some(_pages) = HugePages::with(12) else { return };
    let pair = Pair::start();
    pair.b.run_guest(&embedded("bystander", 16, 0));
    pair.a.run_guest(&on_huge_pages("huge", 16));
    let blocks = pair.a.read("/v1/guests/huge/ram-blocks");
    assert_eq!(blocks["items"][0]["backing"], "hugetlb", "{blocks}");
    assert_eq!(HugePages::number("free_hugepages"), 4, "they are the guest's from its start on");
    let wanted = migration("huge", "b", "precopy");
    let look = || pair.a.post("/v1/migration-checks", &wanted).expect(200).json();
    let found = look();
    let blockers = found["blockers"].as_array().unwrap();
    assert_eq!((&found["migratable"], blockers.len()), (&json!(false), 1), "{found}");
    assert_eq!(blockers[0]["code"], "no_memory", "{found}");
    assert!(blockers[0]["detail"].as_str().unwrap().contains("vm.nr_hugepages"), "{found}");
    let dry = pair.a.post("/v1/migrations?dry_run=true", &wanted).expect(409);
    assert_eq!(dry.problem(), "destination_refuses");
    assert_eq!(dry.json()["blocked_reasons"][0]["code"], "no_memory", "{}", dry.text());
    let end = pair.a.migration_end(&pair.a.migrate(&wanted));
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!("no_memory")), "{end}");
    let detail = end["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("16 MiB") && detail.contains("vm.nr_hugepages"), "{detail}");
    pair.a.ticks_on("huge");
    pair.b.ticks_on("bystander");
    assert_eq!(pair.b.guest_state("huge"), "absent");
    // Enough for it twice; what there was before comes back at the end.
    let Some(more) = HugePages::with(8) else { return };
    std::mem::forget(more);
    assert_eq!(look()["migratable"], true);
    let end = pair.a.migration_end(&pair.a.migrate(&migration("huge", "b", "precopy")));
    assert_eq!(end["state"], "succeeded", "{end}");
    pair.b.ticks_on("huge");
    let _ = pair.b.act("/v1/guests/huge/stop").expect(202);
    pair.b.guest_in("huge", "stopped");
    until("the pages are free again", 20, || HugePages::number("resv_hugepages") == 0);
}

#[test]
fn of_two_guests_that_race_for_huge_pages_the_one_that_gets_none_gets_other_memory() {
    if qemu_binary().is_none() || !kvm() {
        return;
    }
    let _one = alone();
    // For one of the two, and a little.
    let Some(_pages) = HugePages::with(72) else { return };
    let d = Daemon::start("d");
    for name in ["one", "two"] {
        define(&d, &linux(name));
    }
    std::thread::scope(|s| {
        let d = &d;
        for name in ["one", "two"] {
            s.spawn(move || d.act(&format!("/v1/guests/{name}/start")).expect(202));
        }
    });
    let mut backings = ["one", "two"].map(|name| {
        let guest = until_some("the start ends", 60, || {
            Some(d.read(&format!("/v1/guests/{name}"))).filter(|g| g["state"] != "starting")
        });
        assert_eq!(guest["state"], "running", "{guest}");
        let blocks = d.read(&format!("/v1/guests/{name}/ram-blocks"));
        blocks["items"][0]["backing"].as_str().unwrap().to_owned()
    });
    backings.sort();
    assert_eq!(backings, ["hugetlb", "memfd"]);
    assert_eq!(HugePages::number("free_hugepages"), 72 - 128 * MIB / HUGE);
}

#[test]
fn whoever_takes_over_a_qemu_cannot_take_its_huge_pages_from_under_the_daemon() {
    if qemu_binary().is_none() || !kvm() {
        return;
    }
    let _one = alone();
    let Some(_pages) = HugePages::with(72) else { return };
    let d = Daemon::start("d");
    define(&d, &linux("q"));
    let _ = d.act("/v1/guests/q/start").expect(202);
    d.guest_in("q", "running");
    let [qemu] = children(d.pid())[..] else { panic!("one QEMU") };
    // What QEMU has open, as itself would open it.
    let memory = std::fs::File::options().read(true).write(true).open(format!("/proc/{qemu}/fd/0")).unwrap();
    assert_eq!(memory.metadata().unwrap().len(), 128 * MIB);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&memory, punch, 0, HUGE), Err(Errno::PERM));
    assert!(memory.set_len(0).is_err());
    assert_eq!(HugePages::number("free_hugepages"), 72 - 128 * MIB / HUGE);
}

#[test]
fn a_control_group_bounds_what_is_promised_and_bystanders_keep_their_memory() {
    if !kvm() {
        return;
    }
    let Some(group) = MemoryGroup::new(320 * MIB) else { return };
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    group.take(b.pid());
    // It has touched next to nothing of what it was promised.
    b.run_guest(&sparse("bystander", 128));
    define(b, &sparse("second", 256));
    let problem = refused(b, "second");
    assert_eq!(problem["errors"][0]["what"], "control_group", "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains(group.limit_file()) && detail.contains("mirrorvm-t"), "{detail}");

    // What comes from elsewhere is held to the same.
    a.run_guest(&sparse("coming", 256));
    let end = a.migration_end(&a.migrate(&migration("coming", "b", "precopy")));
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!("no_memory")), "{end}");
    assert_eq!(end["progress"]["downtime_ms"], Value::Null);
    a.ticks_on("coming");
    b.ticks_on("bystander");
    assert_eq!(b.guest_state("coming"), "absent");

    // What a guest had is there again when it ends, and what a group is given counts at once.
    let _ = b.act("/v1/guests/bystander/stop").expect(202);
    b.guest_in("bystander", "stopped");
    group.resize(352 * MIB);
    until("there is room", 20, || b.act("/v1/guests/second/start").status == 202);
    b.ticks_on("second");
    assert_eq!(refused(b, "bystander")["errors"][0]["what"], "control_group");
    b.ticks_on("second");
}

#[test]
fn of_starts_at_once_only_as_many_are_taken_as_there_is_memory_for() {
    if !kvm() {
        return;
    }
    let Some(group) = MemoryGroup::new(448 * MIB) else { return };
    let d = Daemon::start("d");
    group.take(d.pid());
    let names = ["g0", "g1", "g2", "g3"];
    for name in names {
        define(&d, &sparse(name, 160));
    }
    let mut statuses = std::thread::scope(|s| {
        let d = &d;
        let starts = names.map(|name| s.spawn(move || d.act(&format!("/v1/guests/{name}/start")).status));
        starts.map(|start| start.join().unwrap())
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [202, 202, 503, 503]);
    let states = || names.map(|name| d.guest_state(name));
    until("two run", 60, || states().iter().filter(|s| *s == "running").count() == 2);
    assert_eq!(states().iter().filter(|s| *s == "stopped").count(), 2);
    for name in names.iter().filter(|name| d.guest_state(name) == "running") {
        d.ticks_on(name);
    }
}

#[test]
fn a_small_control_group_holds_a_linux_and_refuses_what_would_be_too_much() {
    if qemu_binary().is_none() || !kvm() {
        return;
    }
    // Its guest would take the huge pages that another has made ready for itself.
    let _one = alone();
    let Some(group) = MemoryGroup::new(320 * MIB) else { return };
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    group.take(a.pid());
    let mut large = linux("large");
    large["memory"]["blocks"][0]["size_bytes"] = json!(256 * MIB);
    for guest in [linux("small"), large] {
        define(a, &guest);
    }
    let ticks = |d: &Daemon| d.console_tail("small", 100 << 10).matches("tick ").count();
    let _ = a.act("/v1/guests/small/start").expect(202);
    a.guest_in("small", "running");
    assert_eq!(refused(a, "large")["errors"][0]["what"], "control_group");
    until("Linux ticks", 120, || ticks(a) > 3);
    assert_eq!(refused(a, "large")["errors"][0]["what"], "control_group");
    // There is room for it to leave, and to come back.
    for (from, to) in [(a, b), (b, a)] {
        let before = ticks(from);
        let end = from.migration_end(&from.migrate(&migration("small", &to.name, "precopy")));
        assert_eq!(end["state"], "succeeded", "{end}");
        until("Linux ticks on", 60, || ticks(to) > before + 2);
    }
    assert_eq!(refused(a, "large")["errors"][0]["what"], "control_group");
    assert_eq!(children(a.pid()).len(), 1);
    println!("at most {} MiB were used", group.peak() / MIB);
}
