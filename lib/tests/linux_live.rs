//! A stock Linux that is busy writing moves live between two hosts: QEMU shows nobody its dirty log, the
//! helper's scan finds what changed.
//!
//! Needs KVM for the helper, QEMU, and the packages that `tests/guest/build-linux-guest` fetches.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorvm::address_space::{PspVia, Strategy};
use mirrorvm::host::*;

use support::hosts::{SHIFTED, Two, guest, migration, moved, two, until};

const MIB: u64 = 256;
/// Pages of a file in tmpfs that the guest rewrites as fast as it can, always with other content.
const BUSY_PAGES: u64 = 512;

fn guest_dir() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests");
    let out =
        std::env::var_os("MIRRORVM_GUEST_DIR").map_or_else(|| tests.join(".cache/guest"), PathBuf::from);
    // Does nothing when it is there and of this script.
    let built = Command::new(tests.join("guest/build-linux-guest")).arg(&out).status().unwrap();
    assert!(built.success(), "the guest could not be built");
    out
}

/// What the tests need; says so when it is missing.
fn linux(append: &str) -> Option<GuestSpec> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|d| d.join("qemu-system-x86_64").is_file()) {
        println!("SKIPPED (no qemu): this test ran nothing");
        return None;
    }
    support::kvm()?;
    let dir = guest_dir();
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let driver = QemuDriver::spec(&QemuGuest::of_kernel(
        file("vmlinuz"),
        Some(file("initrd.gz")),
        format!("console=ttyS0 no_timer_check quiet panic=-1 {append}"),
    ));
    Some(guest(driver, &[(MIB, Some(0))]))
}

/// A complete line of the guest's: its number, the checksum of a file in its RAM, its own monotonic clock in
/// seconds.
#[derive(Clone, Debug)]
struct Tick {
    number: u64,
    sum: String,
    uptime: f64,
}

fn ticks(host: &Host) -> Vec<Tick> {
    let Ok(console) = host.console("g1", None, usize::MAX) else { return Vec::new() };
    let text = String::from_utf8_lossy(&console.data).into_owned();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| {
        let mut words = line.trim().strip_prefix("tick ")?.split(' ');
        let number = words.next()?.parse().ok()?;
        let sum = words.next()?.strip_prefix("sum=")?.to_owned();
        let uptime = words.next()?.strip_prefix("uptime=")?.parse().ok()?;
        Some(Tick { number, sum, uptime })
    };
    complete.lines().filter_map(parse).collect()
}

fn assert_no_gap(ticks: &[Tick]) {
    assert!(ticks.len() > 10, "{ticks:?}");
    for pair in ticks.windows(2) {
        assert_eq!(pair[1].number, pair[0].number + 1, "a tick is missing or doubled: {ticks:?}");
        assert_eq!(pair[1].sum, pair[0].sum, "the file in RAM changed: {ticks:?}");
        assert!(pair[1].uptime >= pair[0].uptime, "time went back: {ticks:?}");
    }
}

/// How far the guest's clock lags behind ours: it stands still while the guest is paused. A tick that we see
/// late makes the lag look larger, never smaller, so the smallest of several ticks counts.
struct Clock<'a> {
    begun: Instant,
    two: &'a Two,
}

impl Clock<'_> {
    async fn lag(&self, host: &Host) -> f64 {
        let mut last = ticks(host).last().map_or(0, |t| t.number);
        let mut lag = f64::INFINITY;
        for _ in 0..10 {
            let tick = loop {
                if let Some(tick) = ticks(host).into_iter().find(|t| t.number > last) {
                    break tick;
                }
                assert!(self.begun.elapsed() < Duration::from_secs(240), "no ticks at {}", host.info().name);
                tokio::time::sleep(Duration::from_millis(2)).await;
            };
            lag = lag.min(self.begun.elapsed().as_secs_f64() - tick.uptime);
            last = tick.number;
        }
        lag
    }

    /// Moves the guest live and checks what the record says against what the guest's own clock shows.
    async fn moves(&self, from: &Host, to: &Host, strategy: Strategy, streams: u16) -> MigrationRecord {
        let before = self.lag(from).await;
        let mut spec = migration(&to.info().name, strategy, streams);
        // One pause, however loaded the machine: under TCG the scan alone may take a while.
        spec.limits.downtime_ms = 60_000;
        let end = moved(from, to, spec).await;
        let paused = self.lag(to).await - before;
        let p = &end.progress;
        println!(
            "{} to {}, {streams} stream(s): the guest's clock stood still for {:.0} ms; downtime {:?} ms, verify {:?} ms",
            from.info().name,
            to.info().name,
            paused * 1e3,
            p.downtime_ms,
            p.verify_ms,
        );
        for r in &end.rounds {
            println!("  {r:?}");
        }
        let all = MIB << 8;
        assert_eq!(end.rounds[0].pages_sealed, all, "all of RAM goes once, while the guest runs");
        let last = end.rounds.last().unwrap();
        assert!(end.rounds.len() >= 2 && last.paused && end.rounds.iter().filter(|r| r.paused).count() == 1);
        // It writes without a break: whatever is found after a round is at least its file, and far from all
        // of RAM.
        for live in end.rounds.iter().filter(|r| !r.paused) {
            assert!((BUSY_PAGES..all / 2).contains(&live.dirtied_pages), "{live:?}");
        }
        assert!(last.pages_sealed < all / 4, "{last:?}");
        assert!(p.dirty_pages_per_second > 0);
        let reported = (p.downtime_ms.unwrap() + p.verify_ms.unwrap()) / 1e3;
        // What the record calls the pause begins before QEMU stops and ends after it goes on. How late a tick
        // is seen is the machine's load.
        assert!(paused < reported + 1.0, "the guest was held for {paused} s, the record says {reported} s");
        let there = ticks(to);
        assert_no_gap(&there);
        end
    }

    async fn over(&self) {
        self.two.a.shutdown().await;
        self.two.b.shutdown().await;
    }
}

async fn started(two: &Two, spec: GuestSpec) {
    two.a.define_guest(spec, &Ask::now()).await.unwrap();
    two.a.guest_action("g1", GuestAction::Start, &Ask::now()).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(240);
    while ticks(&two.a).len() < 5 {
        assert!(Instant::now() < deadline, "Linux does not tick");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_busy_linux_moves_live_there_and_back() {
    let Some(spec) = linux(&format!("busy={BUSY_PAGES}")) else { return };
    let two = two().await;
    started(&two, spec).await;
    let clock = Clock { begun: Instant::now(), two: &two };
    clock.moves(&two.a, &two.b, SHIFTED, 2).await;
    clock.moves(&two.b, &two.a, Strategy::PspCopied { via: PspVia::LaunchUpdate }, 1).await;
    clock.over().await;
}

/// A migration that never ends by itself: every pause would be too long.
fn endless(to: &str) -> MigrationSpec {
    let mut spec = migration(to, SHIFTED, 2);
    spec.limits.downtime_ms = 0;
    spec
}

async fn in_its_rounds(host: &Host, id: uuid::Uuid, rounds: u32) {
    until(host, "rounds", || {
        let m = host.migration(id).unwrap();
        assert!(!m.state.is_terminal(), "{:?}", m.error);
        (m.progress.iteration >= rounds).then_some(())
    })
    .await;
}

async fn goes_on_at(host: &Host, last: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while ticks(host).last().is_none_or(|t| t.number < last + 5) {
        assert!(Instant::now() < deadline, "Linux does not go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_no_gap(&ticks(host));
    assert_eq!(host.guest("g1").unwrap().state, GuestState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_migration_by_scans_can_be_called_off_lost_and_refused() {
    let Some(spec) = linux(&format!("busy={BUSY_PAGES}")) else { return };
    let two = two().await;
    started(&two, spec).await;

    // The deadline: a named verdict with the rates, and the guest was never paused.
    let spec = endless("b");
    let late = MigrationLimits { timeout_ms: 1, ..spec.limits };
    let id = two.a.create_migration(spec, &Ask::now()).await.unwrap().record.id;
    in_its_rounds(&two.a, id, 3).await;
    two.a.limit_migration(id, late, &Ask::now()).unwrap();
    let end =
        until(&two.a, "the verdict", || Some(two.a.migration(id).unwrap()).filter(|m| m.state.is_terminal()))
            .await;
    let fault = end.error.unwrap();
    assert_eq!((end.state, fault.code.as_str()), (MigrationState::Failed, "not_converging"), "{fault:?}");
    println!("{}", fault.detail);
    assert!(fault.detail.contains("raise limits.downtime_ms"), "what would help: {}", fault.detail);
    assert!(end.rounds.len() > 1 && end.rounds.iter().all(|r| !r.paused), "{:?}", end.rounds);
    goes_on_at(&two.a, ticks(&two.a).last().unwrap().number).await;

    // Called off in the middle of rounds, which are scans for the most part.
    let id = two.a.create_migration(endless("b"), &Ask::now()).await.unwrap().record.id;
    in_its_rounds(&two.a, id, 3).await;
    let last = ticks(&two.a).last().unwrap().number;
    two.a.cancel_migration(id, &Ask::now()).await.unwrap();
    let end =
        until(&two.a, "the end", || Some(two.a.migration(id).unwrap()).filter(|m| m.state.is_terminal()))
            .await;
    assert_eq!(end.state, MigrationState::Canceled);
    goes_on_at(&two.a, last).await;
    until(&two.b, "nothing there", || two.b.guest("g1").is_err().then_some(())).await;

    // The peer goes away.
    let id = two.a.create_migration(endless("b"), &Ask::now()).await.unwrap().record.id;
    in_its_rounds(&two.a, id, 3).await;
    let last = ticks(&two.a).last().unwrap().number;
    let (end, _) = tokio::join!(
        until(&two.a, "the end", || Some(two.a.migration(id).unwrap()).filter(|m| m.state.is_terminal())),
        two.b.shutdown(),
    );
    assert_eq!(end.state, MigrationState::Failed, "{:?}", end.error);
    println!("{:?}", end.error);
    goes_on_at(&two.a, last).await;
    two.a.shutdown().await;
}
