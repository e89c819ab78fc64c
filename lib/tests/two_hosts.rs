//! Two hosts on loopback: a running guest moves from one to the other and goes on.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::host::*;

use support::hosts::{SHIFTED, WORKLOAD, guest, migration, moved, run, ticks, two, until};

fn embedded(mib: u64) -> GuestSpec {
    guest(DriverSpec::Embedded { vcpus: 1, workload: WORKLOAD, sev: None }, &[(mib, Some(0))])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_running_guest_moves_and_moves_back() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    run(&two, embedded(64)).await;
    let before = ticks(&two.a).unwrap();
    let end = moved(&two.a, &two.b, migration("b", SHIFTED, 2)).await;
    println!("{:#?}", end.progress);
    assert!(end.progress.pages_sealed > 0 && end.progress.pages_shared > 0);
    assert_eq!(two.a.guest("g1").unwrap().state, GuestState::Stopped);
    assert_eq!(two.a.guest("g1").unwrap().moved_to.as_deref(), Some("b"));
    let refused = two.a.guest_action("g1", GuestAction::Start).await;
    assert!(matches!(refused, Err(HostError::GuestMoved { .. })));
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 50)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");

    moved(&two.b, &two.a, migration("a", SHIFTED, 1)).await;
    let home = until(&two.a, "ticks at home", || ticks(&two.a).filter(|t| t.0 > after.0 + 50)).await;
    assert_eq!(home.1, 0);
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_paused_guest_arrives_paused() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    run(&two, embedded(32)).await;
    two.a.guest_action("g1", GuestAction::Pause).await.unwrap();
    let before = ticks(&two.a).unwrap();
    moved(&two.a, &two.b, migration("b", SHIFTED, 1)).await;
    assert_eq!(two.b.guest("g1").unwrap().state, GuestState::Paused);
    assert_eq!(ticks(&two.b), Some(before), "its console came along and nothing was added");
    two.b.guest_action("g1", GuestAction::Resume).await.unwrap();
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 20)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");
    two.a.shutdown().await;
    two.b.shutdown().await;
}
