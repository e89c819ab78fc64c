//! Every strategy moves a running guest between two hosts, every page compared: on KVM, and on the software
//! machine with its model of SEV.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::address_space::{PspVia, Shift, Strategy};
use mirrorvm::guest::ReadinessReason;
use mirrorvm::host::*;
use mirrorvm::sev::Policy;

use support::hosts::{SHIFTED, Two, WORKLOAD, guest, migration, moved, run, ticks, two, until};

const IDENTITY: Strategy = Strategy::IdentityCbit;
const DECLARED: Strategy = Strategy::Declared;
const MAX_PHYS: Strategy = Strategy::Shifted { shift: Shift::MaxPhys };
const LAUNCH_UPDATE: Strategy = Strategy::PspCopied { via: PspVia::LaunchUpdate };
const SEND_RECEIVE: Strategy = Strategy::PspCopied { via: PspVia::SendReceive };

fn embedded() -> DriverSpec {
    EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload: WORKLOAD, sev: None })
}

/// A guest below and above 4 GiB, with the hole between.
const BLOCKS: [(u64, Option<u64>); 2] = [(32, Some(0)), (8, Some(0x1_4000_0000))];

/// There and back, counting on, no error found by the guest.
async fn there_and_back(two: &Two, strategy: Strategy, streams: u16) {
    let (a, b) = (&two.a, &two.b);
    let before = ticks(a).unwrap();
    assert_eq!(before.1, 0, "{strategy:?}: the guest found every page as it wrote it, before it moved");
    let end = moved(a, b, migration("b", strategy, streams)).await;
    assert!(end.progress.pages_sealed > 0 && end.progress.pages_shared > 0, "{:?}", end.progress);
    let after = until(b, "ticks there", || ticks(b).filter(|t| t.0 > before.0 + 20)).await;
    assert_eq!(after.1, 0, "{strategy:?}: the guest found every page as it left it");
    moved(b, a, migration("a", strategy, streams)).await;
    let home = until(a, "ticks at home", || ticks(a).filter(|t| t.0 > after.0 + 20)).await;
    assert_eq!(home.1, 0, "{strategy:?}: and back");
}

async fn each(driver: DriverSpec, strategies: &[Strategy]) {
    for (strategy, streams) in strategies.iter().zip([2, 1].into_iter().cycle()) {
        let two = two().await;
        run(&two, guest(driver.clone(), &BLOCKS)).await;
        there_and_back(&two, *strategy, streams).await;
        two.a.shutdown().await;
        two.b.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_strategy_moves_a_guest_on_kvm() {
    if support::kvm().is_none() {
        return;
    }
    each(embedded(), &[SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_strategy_moves_an_unencrypted_guest_on_the_software_machine() {
    let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 2, workload: WORKLOAD, sev: None });
    each(driver, &[SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE]).await;
}

fn modelled(policy: u32, es: Option<LaunchMirror>) -> DriverSpec {
    let sev = SevSpec {
        policy: Policy(policy),
        es: es.is_some(),
        mirror: es.unwrap_or(LaunchMirror { strategy: SHIFTED, workers: 1 }),
        attestation: None,
    };
    EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload: WORKLOAD, sev: Some(sev) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_strategy_moves_an_encrypted_guest() {
    let all = [SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE, SEND_RECEIVE];
    each(modelled(Policy::NODBG, None), &all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_strategy_moves_a_guest_with_encrypted_registers() {
    for strategy in [SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE] {
        let mirror = LaunchMirror { strategy, workers: 2 };
        each(modelled(Policy::NODBG | Policy::ES, Some(mirror)), &[strategy]).await;
    }
}

/// What a guest's state says to a strategy, and the host's words for it.
async fn refused(two: &Two, strategy: Strategy) -> HostError {
    let error = two.a.create_migration(migration("b", strategy, 1), &Ask::now()).await.unwrap_err();
    assert_eq!(two.a.guest("g1").unwrap().state, GuestState::Running, "nothing changed");
    assert!(two.a.migrations().iter().all(|m| m.state.is_terminal()));
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn unplugged_ram_moves_with_its_content_where_the_helper_goes_by_ram_addr() {
    let drivers = [
        modelled(Policy::NODBG, None),
        EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload: WORKLOAD, sev: None }),
    ];
    let kvm = support::kvm().map(|_| embedded());
    for driver in drivers.into_iter().chain(kvm) {
        for strategy in [SHIFTED, MAX_PHYS, DECLARED, LAUNCH_UPDATE] {
            unplugged(driver.clone(), strategy).await;
        }
    }
}

async fn unplugged(driver: DriverSpec, strategy: Strategy) {
    const HOME: u64 = 0x1_4000_0000;
    let two = two().await;
    run(&two, guest(driver, &BLOCKS)).await;
    // The guest has filled the block and checks it all the time; it lets go of it, and it has no address any
    // more.
    let block = two.a.plug("g1", "ram1", None, &Ask::now()).await.unwrap();
    assert_eq!(
        (block.block.gpa(), block.private_bytes),
        (None, 8 << 20),
        "{strategy:?}: private and unplugged"
    );
    let extents = two.a.encryption_extents("g1", mirrorvm::addr::RamAddr::new(0), 99).unwrap().unwrap();
    assert_eq!(
        extents.iter().map(|e| e.range.len()).sum::<u64>(),
        two.a.guest("g1").unwrap().layout.ram_bytes()
    );
    // Addressed by GPA it cannot be named: refused, with the range.
    let HostError::PlanRefused(list) = refused(&two, IDENTITY).await else {
        panic!("a refusal by the planner")
    };
    let at = two.a.guest("g1").unwrap().layout.block("ram1").unwrap().ram_addr.get();
    assert!(
        list.iter().any(|r| (r.code.as_str(), r.value, r.bound) == ("unplugged_private", at, Some(8 << 20))),
        "{list:?}"
    );
    moved(&two.a, &two.b, migration("b", strategy, 2)).await;
    assert_eq!(two.b.guest("g1").unwrap().layout.block("ram1").unwrap().plugs, [], "it arrives unplugged");
    let block = two.b.plug("g1", "ram1", Some(mirrorvm::addr::Gpa::new(HOME)), &Ask::now()).await.unwrap();
    assert_eq!(block.block.gpa().map(mirrorvm::addr::Gpa::get), Some(HOME));
    // The guest uses it again, and goes through it: a page in error would be counted.
    let before = ticks(&two.b).unwrap();
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 100)).await;
    assert_eq!(after.1, 0, "{strategy:?}: the block's content is what it was");
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn blocks_are_plugged_and_unplugged_by_the_rules() {
    use mirrorvm::addr::Gpa;
    use mirrorvm::guest::PlugError as P;
    let two = two().await;
    run(&two, guest(modelled(Policy::NODBG, None), &[(32, Some(0)), (8, Some(0x1_4000_0000)), (8, None)]))
        .await;
    let a = &two.a;
    let plug = async |name: &str, gpa: u64| match a.plug("g1", name, Some(Gpa::new(gpa)), &Ask::now()).await {
        Err(HostError::PlugRefused(e)) => Some(e),
        Ok(_) => None,
        Err(e) => panic!("{e:?}"),
    };
    let unplug = async |name: &str| match a.plug("g1", name, None, &Ask::now()).await {
        Err(HostError::PlugRefused(e)) => Some(e),
        Ok(_) => None,
        Err(e) => panic!("{e:?}"),
    };
    assert_eq!(unplug("ram0").await, Some(P::Needed), "the guest runs from it");
    assert_eq!(unplug("mirrorvm.helper").await, Some(P::Needed));
    assert_eq!(plug("ram1", 0x1_8000_0000).await, Some(P::Elsewhere { gpa: Gpa::new(0x1_4000_0000) }));
    assert!(matches!(plug("ram2", 0x1_4000_0000).await, Some(P::Layout(_))), "another block is there");
    assert!(matches!(plug("ram2", 0x1_8000_0001).await, Some(P::Layout(_))), "no multiple of a page");
    assert!(matches!(plug("ram2", u64::MAX - 4095).await, Some(P::Layout(_))), "past 2^64");
    assert!(matches!(
        a.plug("g1", "ram9", Some(Gpa::new(0)), &Ask::now()).await,
        Err(HostError::NotFound { .. })
    ));
    assert_eq!(plug("ram2", 0x1_8000_0000).await, None);
    assert_eq!(plug("ram2", 0x1_8000_0000).await, None, "again changes nothing");
    assert_eq!((unplug("ram2").await, unplug("ram2").await), (None, None));
    // A paused guest cannot let go of what it uses.
    a.guest_action("g1", GuestAction::Pause, &Ask::now()).await.unwrap();
    assert_eq!(unplug("ram1").await, Some(P::InUse));
    assert_eq!(a.guest("g1").unwrap().layout.block("ram1").unwrap().plugs.len(), 1, "it stays");
    a.guest_action("g1", GuestAction::Resume, &Ask::now()).await.unwrap();
    assert_eq!(unplug("ram1").await, None);
    let mirror =
        MirrorSpec { guest: "g1".into(), strategy: SHIFTED, workers: 1, options: MirrorOptions::default() };
    a.create_mirror(mirror, &Ask::now()).await.unwrap();
    assert!(
        matches!(a.plug("g1", "ram2", None, &Ask::now()).await, Err(HostError::InUse { .. })),
        "a mirror shows what was plugged"
    );
    a.guest_action("g1", GuestAction::Stop, &Ask::now()).await.unwrap();
    assert!(matches!(a.plug("g1", "ram1", None, &Ask::now()).await, Err(HostError::WrongState { .. })));
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_policy_is_obeyed_before_anything_is_made() {
    for (policy, mirrors) in
        [(Policy::NOSEND | Policy::NODBG, true), (Policy::DOMAIN, false), (Policy::NOKS, false)]
    {
        let two = two().await;
        run(&two, guest(modelled(policy, None), &BLOCKS)).await;
        let error = refused(&two, SHIFTED).await;
        assert!(matches!(error, HostError::PolicyForbids { .. }), "{policy:#x}: {error:?}");
        let spec = MirrorSpec {
            guest: "g1".into(),
            strategy: SHIFTED,
            workers: 1,
            options: MirrorOptions::default(),
        };
        let mirror = two.a.create_mirror(spec, &Ask::now()).await;
        assert_eq!(mirror.is_ok(), mirrors, "{policy:#x}: {mirror:?}");
        two.a.shutdown().await;
        two.b.shutdown().await;
    }
    // NOKS alone closes one way only.
    let two = two().await;
    run(&two, guest(modelled(Policy::NODBG | Policy::NOKS, None), &BLOCKS)).await;
    let error = refused(&two, SEND_RECEIVE).await;
    assert!(matches!(error, HostError::PolicyForbids { .. }), "{error:?}");
    moved(&two.a, &two.b, migration("b", LAUNCH_UPDATE, 1)).await;
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readiness_that_is_lost_is_explained_and_stops_a_migration() {
    let both: [fn(WorkloadGuest) -> DriverSpec; 2] =
        [|w| EmulatedDriver::spec(&w), |w| EmbeddedDriver::spec(&w)];
    for driver in &both[..if support::kvm().is_some() { 2 } else { 1 }] {
        // The guest waits for nobody: where it withdrew its word before that was looked at, it takes longer
        // the next time.
        let mut after_ms = 300;
        let (two, announced) = loop {
            let two = two().await;
            let workload = WorkloadSpec { withdraws_readiness_after_ms: Some(after_ms), ..WORKLOAD };
            let spec = guest(driver(WorkloadGuest { vcpus: 1, workload, sev: None }), &BLOCKS);
            two.a.define_guest(spec, &Ask::now()).await.unwrap();
            two.a.guest_action("g1", GuestAction::Start, &Ask::now()).await.unwrap();
            let known = || {
                let guest = two.a.guest("g1").unwrap();
                let readiness = guest.readiness.filter(|r| r.declaration.is_some())?;
                (guest.state == GuestState::Running).then_some((guest.generation, readiness))
            };
            let known = until(&two.a, "the guest's word", known).await;
            if known.1.ready {
                break (two, known);
            }
            two.a.shutdown().await;
            two.b.shutdown().await;
            assert!(after_ms < 60_000, "{known:?}");
            after_ms *= 4;
        };
        let (generation, announced) = announced;
        assert_eq!(announced.reason, ReadinessReason::Announced);
        assert!(announced.declaration.unwrap().tuples().len() > 1, "in several pieces");
        let readiness = || two.a.guest("g1").unwrap().readiness;
        let lost = until(&two.a, "the loss", || readiness().filter(|r| !r.ready)).await;
        assert_eq!(lost.reason, ReadinessReason::Withdrawn);
        until(&two.a, "a new generation", || {
            Some(two.a.guest("g1").unwrap().generation).filter(|g| *g > generation)
        })
        .await;
        let HostError::GuestNotReady { why } = refused(&two, SHIFTED).await else { panic!("not ready") };
        assert!(why.contains("CPU goes offline"), "{why}");
        two.a.shutdown().await;
        two.b.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_mirror_of_a_guest_with_encrypted_registers_comes_with_its_launch() {
    let two = two().await;
    let driver = modelled(Policy::NODBG | Policy::ES, Some(LaunchMirror { strategy: DECLARED, workers: 1 }));
    run(&two, guest(driver, &BLOCKS)).await;
    let a = &two.a;
    let mirrors = a.mirrors();
    assert_eq!(mirrors.iter().map(|m| m.strategy).collect::<Vec<_>>(), [DECLARED]);
    let spec =
        MirrorSpec { guest: "g1".into(), strategy: SHIFTED, workers: 1, options: MirrorOptions::default() };
    assert!(matches!(a.create_mirror(spec, &Ask::now()).await, Err(HostError::MirrorAtLaunch)));
    assert!(matches!(a.delete_mirror(mirrors[0].id, &Ask::now()).await, Err(HostError::MirrorAtLaunch)));
    // Another strategy than the launched one finds no mirror, which is said when it is asked for.
    let other = a.create_migration(migration("b", SHIFTED, 1), &Ask::now()).await;
    assert!(matches!(other, Err(HostError::MirrorAtLaunch)), "{other:?}");
    moved(a, &two.b, migration("b", DECLARED, 1)).await;
    assert_eq!(two.b.mirrors().len(), 1, "and arrives with one");
    two.a.shutdown().await;
    two.b.shutdown().await;
}
