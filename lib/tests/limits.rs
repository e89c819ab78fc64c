//! Limits of a migration: kept, changed while it runs, and what happens when they cannot be met.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::codes::Code;
use mirrorvm::host::*;
use mirrorvm::memory::Backing;

use support::hosts::{SHIFTED, Two, WORKLOAD, arrived, guest, migration, moved, run, ticks, two, until};

const MIB: u64 = 1 << 20;

/// A guest of 48 MiB that rewrites 16 MiB about twenty times a second, or writes almost nothing.
fn spec(busy: bool) -> GuestSpec {
    let workload = WorkloadSpec {
        working_set_bytes: 16 * MIB,
        dirty_bytes_per_second: if busy { 300 * MIB } else { 0 },
        ..WORKLOAD
    };
    guest(EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }), &[(48, Some(0))])
}

fn limited(limits: MigrationLimits) -> MigrationSpec {
    MigrationSpec { limits, ..migration("b", SHIFTED, 2) }
}

async fn end(two: &Two, id: uuid::Uuid) -> MigrationRecord {
    until(&two.a, "the end", || Some(two.a.migration(id).unwrap()).filter(|m| m.state.is_terminal())).await
}

async fn close(two: Two) {
    two.a.shutdown().await;
    two.b.shutdown().await;
}

/// The rate is never above the limit by more than a twentieth, in any round that is long enough to say so.
/// That it is not below either is a matter of the machine: `mirrorvmd bench migrate` prints it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_bandwidth_limit_holds_over_all_streams() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    run(&two, spec(false)).await;
    let rate = 64 * MIB;
    let limits = MigrationLimits { bandwidth_bytes_per_second: Some(rate), ..Default::default() };
    let end = moved(&two.a, &two.b, limited(limits)).await;
    let first = &end.rounds[0];
    assert!(first.bytes > 40 * MIB, "{first:?}");
    let measured = first.bytes as f64 / (first.duration_us as f64 / 1e6);
    println!("{measured:.0} bytes/s of {rate}");
    assert!(measured <= rate as f64 * 1.05, "{measured} is above {rate}");
    close(two).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn limits_change_while_it_runs_and_a_switchover_can_be_asked_for() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    run(&two, spec(true)).await;
    // An hour at this rate; nothing else would end it.
    let slow =
        MigrationLimits { bandwidth_bytes_per_second: Some(MIB), downtime_ms: 1, ..Default::default() };
    let id = two.a.create_migration(limited(slow), &Ask::now()).await.unwrap().record.id;
    until(&two.a, "pages that moved", || {
        two.a.migration(id).ok().filter(|m| m.state == MigrationState::Precopy && m.progress.pages_sealed > 0)
    })
    .await;
    let now = Ask::now();
    let stays =
        two.a.limit_migration(id, MigrationLimits { bandwidth_bytes_per_second: Some(1), ..slow }, &now);
    assert!(matches!(stays, Err(HostError::Invalid(_))), "{stays:?}");
    // The switchover comes although the round has hardly begun and the guest writes faster than pages move.
    let asked = two.a.switch_over_migration(id, &now).unwrap();
    assert_eq!(asked.state, MigrationState::Precopy);
    let free = MigrationLimits { bandwidth_bytes_per_second: None, ..slow };
    let shown = two.a.limit_migration(id, free, &now).unwrap();
    assert_eq!(shown.spec.unwrap().limits, free);
    let end = end(&two, id).await;
    assert_eq!(end.state, MigrationState::Succeeded, "{:?}", end.error);
    let (first, last) = (&end.rounds[0], end.rounds.last().unwrap());
    assert!(first.pages_sealed < 48 * 256 / 2, "the first round was cut short: {first:?}");
    assert!(last.paused && last.pages_sealed > 48 * 256 / 2, "the rest went in the pause: {last:?}");
    let late = two.a.switch_over_migration(id, &now);
    assert!(matches!(late, Err(HostError::WrongState { current: "succeeded", .. })), "{late:?}");
    // Limits mean something for as long as the audit goes on.
    support::hosts::proven(&two.a, &two.b, id).await;
    let late = two.a.limit_migration(id, slow, &now);
    assert!(matches!(late, Err(HostError::WrongState { current: "succeeded", .. })), "{late:?}");
    let after = until(&two.b, "ticks there", || ticks(&two.b)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");
    close(two).await;
}

/// A guest of 8 MiB that rewrites half of it as fast as it can, and limits that it cannot converge under.
///
/// By the numbers, not by how fast the machine is: at 2 MiB/s its set takes two seconds to move, and a pause
/// of 200 ms takes a tenth of it. It writes too fast if it rewrites 1 MiB in a second, of the 300 that it is
/// told to.
fn too_fast() -> (GuestSpec, MigrationLimits) {
    let workload = WorkloadSpec { working_set_bytes: 4 * MIB, dirty_bytes_per_second: 300 * MIB, ..WORKLOAD };
    let slow =
        MigrationLimits { bandwidth_bytes_per_second: Some(2 * MIB), downtime_ms: 200, ..Default::default() };
    (guest(EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }), &[(8, Some(0))]), slow)
}

/// A guest that cannot converge, under each of the three ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_that_writes_too_fast_gets_a_verdict_or_is_forced_or_slowed() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    let (spec, slow) = too_fast();
    run(&two, spec).await;
    // The first round takes four seconds: the deadline comes early in the second.
    let late = MigrationLimits { timeout_ms: 4_500, ..slow };

    let id = two.a.create_migration(limited(late), &Ask::now()).await.unwrap().record.id;
    let verdict = end(&two, id).await;
    assert_eq!(verdict.state, MigrationState::Failed);
    assert_eq!(verdict.error.as_ref().unwrap().code, Code::NotConverging);
    let detail = &verdict.error.as_ref().unwrap().detail;
    assert!(detail.contains("pages/s"), "it says the rates: {detail}");
    assert!(verdict.progress.dirty_pages_per_second > 0, "{verdict:#?}");
    assert_eq!(verdict.progress.downtime_ms, None, "{verdict:#?}");
    assert_eq!(verdict.guest_state_after, Some(GuestState::Running));
    let before = ticks(&two.a).unwrap();
    until(&two.a, "ticks at home", || ticks(&two.a).filter(|t| t.0 > before.0)).await;

    let throttled = MigrationLimits { auto_throttle: true, timeout_ms: 600_000, ..slow };
    slowed(&two.a, &two.b, limited(throttled)).await;
    let there = until(&two.b, "ticks there", || ticks(&two.b)).await;
    // Nobody holds it back where it is now.
    let after = until(&two.b, "more ticks", || ticks(&two.b).filter(|t| t.0 > there.0 + 20)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");

    let forced = MigrationLimits { on_timeout: OnTimeout::Force, ..late };
    let end = moved(&two.b, &two.a, MigrationSpec { limits: forced, ..migration("a", SHIFTED, 1) }).await;
    let last = end.rounds.last().unwrap();
    assert!(last.paused && last.bytes > MIB, "more than the limit allows: {last:?}");
    assert_eq!(end.progress.throttle_percent, 0);

    let by_deadline = MigrationLimits { on_timeout: OnTimeout::Throttle, timeout_ms: 1, ..slow };
    slowed(&two.a, &two.b, limited(by_deadline)).await;
    close(two).await;
}

/// Moves a guest that has to be slowed; once it is, with four times the bandwidth, so that what a guest
/// writes that is slowed as much as can be, a hundredth, is certain to be less than what moves.
async fn slowed(from: &Host, to: &Host, spec: MigrationSpec) {
    let limits = spec.limits;
    let id = from.create_migration(spec, &Ask::now()).await.unwrap().record.id;
    until(from, "a throttle", || from.migration(id).ok().filter(|m| m.progress.throttle_percent >= 20)).await;
    let faster = limits.bandwidth_bytes_per_second.map(|b| 4 * b);
    let limits = MigrationLimits { bandwidth_bytes_per_second: faster, ..limits };
    from.limit_migration(id, limits, &Ask::now()).unwrap();
    let end = arrived(from, to, id).await;
    let most = end.rounds.iter().map(|r| r.dirtied_pages).max().unwrap();
    println!(
        "throttled to {} % after {} rounds; {most} pages at most, {} at the end",
        end.progress.throttle_percent,
        end.rounds.len(),
        end.rounds.last().unwrap().pages_sealed
    );
    assert!(end.progress.throttle_percent >= 20, "{:?}", end.progress);
}

/// At the rate that is the least there is, with many streams: what is taken when the deadline comes is soon
/// gone. By bytes, so that it does not depend on how fast the machine is.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_deadline_under_a_low_rate_is_kept_to_within_a_batch() {
    let two = two().await;
    let workload = WorkloadSpec { dirty_bytes_per_second: 0, ..WORKLOAD };
    run(
        &two,
        guest(EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }), &[(32, Some(0))]),
    )
    .await;
    for (streams, timeout_ms) in [(1, 1_000), (4, 1_500)] {
        let limits =
            MigrationLimits { bandwidth_bytes_per_second: Some(MIB), timeout_ms, ..Default::default() };
        let spec = MigrationSpec { limits, ..migration("b", SHIFTED, streams) };
        let id = two.a.create_migration(spec, &Ask::now()).await.unwrap().record.id;
        let verdict = end(&two, id).await;
        assert_eq!(verdict.error.as_ref().map(|e| e.code.as_str()), Some("not_converging"), "{verdict:?}");
        let sent = verdict.progress.processed_bytes;
        // A quarter of a second's worth is what streams have in their hands and what a late wait may make up
        // for.
        let allowed = MIB * (timeout_ms + 250) / 1000;
        println!("{streams} streams: {sent} bytes of {allowed} allowed, {} ms", verdict.progress.elapsed_ms);
        assert!(sent > 0 && sent <= allowed, "{sent} of {allowed}");
        assert_eq!(verdict.guest_state_after, Some(GuestState::Running));
    }
    // A deadline that is set while it runs counts as well: an hour before.
    let slow = MigrationLimits { bandwidth_bytes_per_second: Some(MIB), ..Default::default() };
    let id = two
        .a
        .create_migration(MigrationSpec { limits: slow, ..migration("b", SHIFTED, 2) }, &Ask::now())
        .await
        .unwrap()
        .record
        .id;
    until(&two.a, "pages that moved", || {
        two.a.migration(id).ok().filter(|m| m.state == MigrationState::Precopy && m.progress.pages_sealed > 0)
    })
    .await;
    let now = MigrationLimits { timeout_ms: 1, ..slow };
    two.a.limit_migration(id, now, &Ask::now()).unwrap();
    let verdict = end(&two, id).await;
    assert_eq!(verdict.error.unwrap().code, Code::NotConverging);
    assert!(verdict.progress.processed_bytes < 16 * MIB, "the round was cut");
    close(two).await;
}

/// No pause fits: the guest is never paused, and the answer names the limit that would do.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_limit_that_no_pause_fits_is_never_exceeded_and_the_shortest_pause_is_named() {
    let two = two().await;
    let workload = WorkloadSpec { dirty_bytes_per_second: 0, ..WORKLOAD };
    run(
        &two,
        guest(EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }), &[(32, Some(0))]),
    )
    .await;
    let limits = MigrationLimits { downtime_ms: 1, timeout_ms: 600_000, ..Default::default() };
    let spec = MigrationSpec { limits, ..migration("b", SHIFTED, 1) };
    let check = two.a.check_migration(spec.clone()).await.unwrap();
    let named = check.warnings.iter().find(|w| w.code == "downtime_limit_below_floor").unwrap();
    let floor = check.estimate.unwrap().downtime_floor_ms;
    assert!(floor > 1 && named.fix.contains(&floor.to_string()), "{named:?}");
    let id = two.a.create_migration(spec, &Ask::now()).await.unwrap().record.id;
    let told = until(&two.a, "a floor", || {
        two.a.migration(id).ok().filter(|m| m.rounds.len() > 1 && m.progress.downtime_floor_ms.is_some())
    })
    .await;
    assert!(told.progress.downtime_floor_ms.unwrap() > 1 && !told.state.is_terminal());
    // Late: the verdict says what would help.
    let now = MigrationLimits { timeout_ms: 1, ..limits };
    two.a.limit_migration(id, now, &Ask::now()).unwrap();
    let verdict = end(&two, id).await;
    let detail = verdict.error.unwrap().detail;
    assert!(detail.contains("raise limits.downtime_ms"), "{detail}");
    assert!(verdict.rounds.iter().all(|r| !r.paused), "the guest was never paused");
    // What helps: a limit that a pause fits, given while it runs.
    let id = two
        .a
        .create_migration(MigrationSpec { limits, ..migration("b", SHIFTED, 1) }, &Ask::now())
        .await
        .unwrap()
        .record
        .id;
    until(&two.a, "a floor", || two.a.migration(id).ok().filter(|m| m.progress.downtime_floor_ms.is_some()))
        .await;
    let roomy = MigrationLimits { downtime_ms: 60_000, ..limits };
    two.a.limit_migration(id, roomy, &Ask::now()).unwrap();
    let end = end(&two, id).await;
    assert_eq!(end.state, MigrationState::Succeeded, "{:?}", end.error);
    close(two).await;
}

/// A limit hardly above the shortest pause: on most machines some pauses turn out longer and are broken off.
/// Whatever happens, the guest goes on, arrives, and has every page.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_whose_pauses_are_broken_off_goes_on_and_loses_no_page() {
    let mirror = LaunchMirror { strategy: SHIFTED, workers: 1 };
    let policy = mirrorvm::sev::Policy(SevSpec::DEFAULT_POLICY | mirrorvm::sev::Policy::ES);
    for sev in [None, Some(SevSpec { policy, es: true, mirror, attestation: None })] {
        let two = two().await;
        let workload =
            WorkloadSpec { dirty_bytes_per_second: 4 * MIB, working_set_bytes: 2 * MIB, ..WORKLOAD };
        run(&two, guest(EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev }), &[(16, Some(0))]))
            .await;
        until(&two.a, "readiness", || two.a.guest("g1").unwrap().readiness.filter(|r| r.ready)).await;
        let limits = MigrationLimits {
            downtime_ms: 9,
            timeout_ms: 2_500,
            on_timeout: OnTimeout::Force,
            ..Default::default()
        };
        let mut broken_off = 0;
        let mut last = 0;
        for (from, to) in [(&two.a, &two.b), (&two.b, &two.a)] {
            let spec = MigrationSpec { limits, ..migration(&to.info().name, SHIFTED, 1) };
            let end = moved(from, to, spec).await;
            let seen: Vec<u32> = end.rounds.iter().map(|r| r.number).collect();
            assert!(seen.windows(2).all(|w| w[0] < w[1]), "{seen:?}");
            assert!(end.rounds.last().unwrap().paused);
            broken_off += end.rounds.iter().filter(|r| r.paused).count() - 1;
            let after = until(to, "ticks there", || ticks(to).filter(|t| t.0 > last + 10)).await;
            assert_eq!(after.1, 0, "the guest found every page as it left it");
            last = after.0;
        }
        println!("at least {broken_off} pauses were broken off");
        close(two).await;
    }
}

/// A throttled guest that stays here after all runs freely again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_that_stays_is_not_held_back_any_more() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    let (spec, slow) = too_fast();
    run(&two, spec).await;
    let limits = MigrationLimits { downtime_ms: 0, auto_throttle: true, ..slow };
    let id = two.a.create_migration(limited(limits), &Ask::now()).await.unwrap().record.id;
    until(&two.a, "a throttle", || two.a.migration(id).ok().filter(|m| m.progress.throttle_percent >= 40))
        .await;
    two.a.cancel_migration(id, &Ask::now()).await.unwrap();
    let end = end(&two, id).await;
    assert!(matches!(end.state, MigrationState::Canceled | MigrationState::Succeeded), "{:?}", end.error);
    if end.state == MigrationState::Canceled {
        assert_eq!(end.progress.throttle_percent, 0, "shown as it is");
        let now = ticks(&two.a).unwrap();
        until(&two.a, "ticks at home", || ticks(&two.a).filter(|t| t.0 > now.0 + 50)).await;
    }
    close(two).await;
}

/// Every backing, both transports, many streams: there and back.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_backing_and_transport_moves_every_page() {
    if support::kvm().is_none() {
        return;
    }
    for (backing, transport, streams) in [
        (Some(Backing::Memfd), StreamTransport::Sealed, 5),
        (Some(Backing::Anonymous), StreamTransport::Tls, 3),
        (None, StreamTransport::Sealed, 16),
    ] {
        let two = two().await;
        let spec = GuestSpec { backing, ..spec(false) };
        run(&two, spec).await;
        let blocks = two.a.ram_blocks("g1").unwrap();
        assert_eq!(blocks[0].backing, backing.unwrap_or(Backing::Anonymous));
        let there = MigrationSpec { stream_transport: transport, ..migration("b", SHIFTED, streams) };
        let first = moved(&two.a, &two.b, there).await;
        assert_eq!(first.rounds[0].pages_sealed + first.rounds[0].pages_shared, 48 * 256);
        assert_eq!(two.b.ram_blocks("g1").unwrap()[0].backing, backing.unwrap_or(Backing::Anonymous));
        let before = until(&two.b, "ticks there", || ticks(&two.b)).await;
        let home = MigrationSpec { stream_transport: transport, ..migration("a", SHIFTED, 1) };
        moved(&two.b, &two.a, home).await;
        let after = until(&two.a, "ticks at home", || ticks(&two.a).filter(|t| t.0 > before.0 + 20)).await;
        assert_eq!(after.1, 0, "the guest found every page as it left it");
        close(two).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backings_that_cannot_be_are_refused_by_name() {
    let two = two().await;
    let odd = GuestSpec { backing: Some(Backing::Hugetlb), ..guest(spec(false).driver, &[(3, Some(0))]) };
    let refused = two.a.define_guest(odd, &Ask::now()).await.unwrap_err();
    let HostError::Invalid(fields) = refused else { panic!("{refused:?}") };
    assert!(
        fields.iter().any(|f| f.pointer == "/memory/blocks/0/size_bytes" && f.code == "misaligned"),
        "{fields:?}"
    );
    close(two).await;
}
