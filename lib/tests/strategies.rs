//! Every strategy moves a running guest between two hosts, every page compared: on KVM, and on the software machine with
//! its model of SEV.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::address_space::{PspVia, Shift, Strategy};
use mirrorvm::host::*;
use mirrorvm::sev::Policy;

use support::hosts::{SHIFTED, Two, WORKLOAD, guest, migration, moved, run, ticks, two, until};

const IDENTITY: Strategy = Strategy::IdentityCbit;
const DECLARED: Strategy = Strategy::Declared;
const MAX_PHYS: Strategy = Strategy::Shifted { shift: Shift::MaxPhys };
const LAUNCH_UPDATE: Strategy = Strategy::PspCopied { via: PspVia::LaunchUpdate };
const SEND_RECEIVE: Strategy = Strategy::PspCopied { via: PspVia::SendReceive };

const EMBEDDED: DriverSpec = DriverSpec::Embedded { vcpus: 1, workload: WORKLOAD, sev: None };

/// A guest below and above 4 GiB, with the hole between.
const BLOCKS: [(u64, Option<u64>); 2] = [(32, Some(0)), (8, Some(0x1_4000_0000))];

/// There and back, counting on, no error found by the guest.
async fn there_and_back(two: &Two, strategy: Strategy, streams: u16) {
    let (a, b) = (&two.a, &two.b);
    let before = ticks(a).unwrap();
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
    each(EMBEDDED, &[SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_strategy_moves_an_unencrypted_guest_on_the_software_machine() {
    let driver = DriverSpec::Emulated { vcpus: 2, workload: WORKLOAD, sev: None };
    each(driver, &[SHIFTED, MAX_PHYS, IDENTITY, DECLARED, LAUNCH_UPDATE]).await;
}

fn modelled(policy: u32, es: Option<LaunchMirror>) -> DriverSpec {
    let sev = SevSpec {
        policy: Policy(policy),
        es: es.is_some(),
        mirror: es.unwrap_or(LaunchMirror { strategy: SHIFTED, workers: 1 }),
    };
    DriverSpec::Emulated { vcpus: 1, workload: WORKLOAD, sev: Some(sev) }
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
