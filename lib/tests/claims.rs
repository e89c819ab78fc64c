//! Looking and taking are one step: a guest has one migration at a time, from the queue to the end.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::host::ResourceKind;
use mirrorvm::host::*;
use uuid::Uuid;

use support::hosts::{SHIFTED, Two, guest, migration, two, until};

const QUIET: WorkloadSpec = WorkloadSpec {
    fill: Fill::Random,
    working_set_bytes: 1 << 20,
    dirty_bytes_per_second: 0,
    withdraws_readiness_after_ms: None,
};

async fn runs(two: &Two, name: &str) {
    let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload: QUIET, sev: None });
    let spec = GuestSpec { name: name.into(), ..guest(driver, &[(16, Some(0))]) };
    two.a.define_guest(spec, &Ask::now()).await.unwrap();
    two.a.guest_action(name, GuestAction::Start, &Ask::now()).await.unwrap();
    until(&two.a, "the guest runs", || {
        let record = two.a.guest(name).unwrap();
        (record.state == GuestState::Running && record.readiness.is_some_and(|r| r.ready)).then_some(())
    })
    .await;
}

fn leaving(name: &str) -> MigrationSpec {
    let limits = MigrationLimits { bandwidth_bytes_per_second: Some(1 << 20), ..MigrationLimits::default() };
    MigrationSpec { guest: name.into(), limits, verify: false, ..migration("b", SHIFTED, 1) }
}

/// Two hosts whose only slot at `a` is taken for longer than any test here lasts; gives the migration that
/// has it.
async fn with_a_full_queue() -> (Two, Uuid) {
    let two = two().await;
    two.a.change_settings(|s| s.migration_slots = 1, &Ask::now()).unwrap();
    runs(&two, "first").await;
    runs(&two, "g1").await;
    let first = two.a.create_migration(leaving("first"), &Ask::now()).await.unwrap().record.id;
    until(&two.a, "the slot is taken", || {
        (two.a.migration(first).unwrap().state == MigrationState::Precopy).then_some(())
    })
    .await;
    (two, first)
}

async fn ended(host: &Host, id: Uuid) -> MigrationRecord {
    until(host, "the end", || Some(host.migration(id).unwrap()).filter(|m| m.state.is_terminal())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_several_migrations_that_ask_at_once_one_gets_the_guest() {
    let (two, first) = with_a_full_queue().await;
    let asked: Vec<_> = (0..5)
        .map(|_| {
            let host = two.a.clone();
            tokio::spawn(async move { host.create_migration(leaving("g1"), &Ask::now()).await })
        })
        .collect();
    let (mut got, mut refused) = (Vec::new(), Vec::new());
    for one in asked {
        match one.await.unwrap() {
            Ok(begun) => got.push(begun.record.id),
            Err(HostError::GuestMigrating { migration }) => refused.push(migration),
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((got.len(), refused.len()), (1, 4));
    let has = got[0];
    assert!(refused.iter().all(|m| *m == has), "the refusals name the one that has it");
    assert_eq!(
        two.a.migrations().iter().filter(|m| m.guest_name == "g1").count(),
        1,
        "no record of the others"
    );

    // While it waits, the guest is the migration's, and says so.
    assert_eq!(two.a.migration(has).unwrap().state, MigrationState::Queued);
    assert_eq!(two.a.guest("g1").unwrap().migration, Some(has));
    let conflict = |e: HostError| matches!(e, HostError::GuestMigrating { migration } if migration == has);
    assert!(conflict(two.a.guest_action("g1", GuestAction::Stop, &Ask::now()).await.unwrap_err()));
    assert!(conflict(two.a.guest_action("g1", GuestAction::Stop, &Ask::dry_run()).await.unwrap_err()));
    assert!(conflict(two.a.create_migration(leaving("g1"), &Ask::dry_run()).await.unwrap_err()));
    let mirror =
        MirrorSpec { guest: "g1".into(), strategy: SHIFTED, workers: 1, options: MirrorOptions::default() };
    assert!(conflict(two.a.create_mirror(mirror, &Ask::now()).await.unwrap_err()));

    // Called off in the queue: the guest is free at once, for the next one, too.
    two.a.cancel_migration(has, &Ask::now()).await.unwrap();
    assert_eq!(ended(&two.a, has).await.state, MigrationState::Canceled);
    let free = two.a.guest("g1").unwrap();
    assert_eq!((free.migration, free.state), (None, GuestState::Running));
    let next = two.a.create_migration(leaving("g1"), &Ask::now()).await.unwrap().record.id;
    two.a.cancel_migration(first, &Ask::now()).await.unwrap();
    assert_eq!(ended(&two.a, first).await.state, MigrationState::Canceled);
    until(&two.a, "the next one's turn", || {
        (two.a.migration(next).unwrap().state == MigrationState::Precopy).then_some(())
    })
    .await;
    two.a.cancel_migration(next, &Ask::now()).await.unwrap();
    assert_eq!(ended(&two.a, next).await.state, MigrationState::Canceled);
    two.a.guest_action("g1", GuestAction::Stop, &Ask::now()).await.unwrap();
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_mirror_that_a_queued_migration_waits_with_is_in_use() {
    let (two, first) = with_a_full_queue().await;
    let spec =
        MirrorSpec { guest: "g1".into(), strategy: SHIFTED, workers: 1, options: MirrorOptions::default() };
    let mirror = two.a.create_mirror(spec.clone(), &Ask::now()).await.unwrap().id;
    let wanted = MigrationSpec { mirror: MirrorChoice::Existing(mirror), ..leaving("g1") };
    // Another mirror is in the way of a template: told at the request, not when a slot is free.
    let refused = two.a.create_migration(leaving("g1"), &Ask::now()).await.unwrap_err();
    assert!(matches!(refused, HostError::InUse { kind: ResourceKind::Guest, .. }), "{refused:?}");
    let queued = two.a.create_migration(wanted, &Ask::now()).await.unwrap().record.id;
    let refused = two.a.delete_mirror(mirror, &Ask::now()).await.unwrap_err();
    assert!(matches!(refused, HostError::InUse { kind: ResourceKind::Mirror, .. }), "{refused:?}");
    two.a.cancel_migration(queued, &Ask::now()).await.unwrap();
    ended(&two.a, queued).await;
    two.a.delete_mirror(mirror, &Ask::now()).await.unwrap();
    two.a.cancel_migration(first, &Ask::now()).await.unwrap();
    ended(&two.a, first).await;
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_id_is_taken_once_and_one_expected_generation_is_met_once() {
    let (two, first) = with_a_full_queue().await;
    runs(&two, "g2").await;
    let id = Uuid::now_v7();
    let asked: Vec<_> = ["g1", "g2"]
        .into_iter()
        .map(|name| {
            let host = two.a.clone();
            tokio::spawn(
                async move { host.create_migration(leaving(name), &Ask::now().with_id(Some(id))).await },
            )
        })
        .collect();
    let mut got = 0;
    for one in asked {
        match one.await.unwrap() {
            Ok(begun) => got += u32::from(begun.record.id == id),
            Err(HostError::IdTaken { kind: ResourceKind::Migration }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(got, 1);
    let claimed = ["g1", "g2"].map(|g| two.a.guest(g).unwrap().migration);
    assert_eq!(claimed.iter().flatten().count(), 1, "the loser's guest is free: {claimed:?}");

    // Several changes that expect what is there now: one is made.
    let generation = two.a.migration(id).unwrap().generation;
    let changed: Vec<_> = (0..4)
        .map(|i| {
            let host = two.a.clone();
            tokio::task::spawn_blocking(move || {
                let limits = MigrationLimits { downtime_ms: 100 + i, ..leaving("g1").limits };
                host.limit_migration(id, limits, &Ask::now().at(Expected::one_of(vec![generation])))
            })
        })
        .collect();
    let mut made = 0;
    for one in changed {
        match one.await.unwrap() {
            Ok(_) => made += 1,
            Err(HostError::GenerationMismatch { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(made, 1);
    for id in [id, first] {
        two.a.cancel_migration(id, &Ask::now()).await.unwrap();
        ended(&two.a, id).await;
    }
    two.a.shutdown().await;
    two.b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_host_that_goes_with_a_full_queue_comes_back_with_its_guests_free() {
    let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = async |dir: &tempfile::TempDir, name: &str| {
        let config = HostConfig {
            state_dir: dir.path().join("state"),
            name: Some(name.into()),
            peer_listen: Some("127.0.0.1:0".parse().unwrap()),
            ..HostConfig::default()
        };
        Host::open(config).await.unwrap()
    };
    let (a, b) = (open(&dirs.0, "a").await, open(&dirs.1, "b").await);
    for (here, there) in [(&a, &b), (&b, &a)] {
        let info = there.info();
        let (name, address) = (info.name, info.peer_address.unwrap());
        let spec = PeerSpec { name, address, identity: info.identity, labels: Labels::new() };
        here.add_peer(spec, &Ask::now()).await.unwrap();
    }
    let two = Two::of(a, b, dirs);
    two.a.change_settings(|s| s.migration_slots = 1, &Ask::now()).unwrap();
    for name in ["first", "g1"] {
        runs(&two, name).await;
    }
    let ids = [
        two.a.create_migration(leaving("first"), &Ask::now()).await.unwrap().record.id,
        two.a.create_migration(leaving("g1"), &Ask::now()).await.unwrap().record.id,
    ];
    two.a.shutdown().await;
    let dirs = two.close().await;
    let a = open(&dirs.0, "a").await;
    for id in ids {
        assert!(a.migration(id).unwrap().state.is_terminal());
    }
    for name in ["first", "g1"] {
        let record = a.guest(name).unwrap();
        assert_eq!((record.migration, record.state), (None, GuestState::Stopped));
    }
    a.guest_action("g1", GuestAction::Start, &Ask::now()).await.unwrap();
    until(&a, "it runs again", || (a.guest("g1").unwrap().state == GuestState::Running).then_some(())).await;
    a.shutdown().await;
}

/// Limits that are changed again and again until the migration has ended; what the last answer was.
async fn limit_until_the_end(host: &Host, id: Uuid) -> Option<HostError> {
    for n in 0.. {
        let limits = MigrationLimits { downtime_ms: 200 + n % 100, ..leaving("g1").limits };
        let host = host.clone();
        let asked = tokio::spawn(async move { host.limit_migration(id, limits, &Ask::now()) });
        match asked.await.unwrap() {
            Ok(shown) => assert_eq!(shown.spec.unwrap().limits.downtime_ms, limits.downtime_ms),
            Err(error) => return Some(error),
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_that_come_while_a_migration_ends_stop_nobody_and_bring_no_ended_one_back() {
    let two = two().await;
    runs(&two, "g1").await;
    let mut ends = Vec::new();
    for _ in 0..12 {
        let id = two.a.create_migration(leaving("g1"), &Ask::now()).await.unwrap().record.id;
        let asking: Vec<_> = (0..3)
            .map(|_| {
                let host = two.a.clone();
                tokio::spawn(async move { limit_until_the_end(&host, id).await })
            })
            .collect();
        until(&two.a, "pages that move", || {
            (two.a.migration(id).unwrap().state == MigrationState::Precopy).then_some(())
        })
        .await;
        two.a.cancel_migration(id, &Ask::now()).await.unwrap();
        let end = ended(&two.a, id).await;
        assert_eq!(end.state, MigrationState::Canceled);
        for asked in asking {
            let last = asked.await.unwrap();
            assert!(matches!(last, Some(HostError::WrongState { .. })), "{last:?}");
        }
        // Whoever comes later is served.
        two.a.change_labels("g1", |_| Labels::new(), &Ask::now()).await.unwrap();
        ends.push(id);
    }
    // What is on disk is what was shown: nobody wrote an earlier state over an end.
    let shown: Vec<_> = ends.iter().map(|id| two.a.migration(*id).unwrap()).collect();
    let dirs = two.close().await;
    let config = HostConfig {
        state_dir: dirs.0.path().join("state"),
        name: Some("a".into()),
        ..HostConfig::default()
    };
    let again = Host::open(config).await.unwrap();
    for before in shown {
        let after = again.migration(before.id).unwrap();
        assert_eq!((after.state, after.spec, after.error), (before.state, before.spec, before.error));
    }
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_asks_a_guest_that_goes_is_answered() {
    let two = two().await;
    for turn in 0..20 {
        let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload: QUIET, sev: None });
        let spec = GuestSpec { name: "g".into(), ..guest(driver, &[(4, Some(0))]) };
        two.a.define_guest(spec, &Ask::now()).await.unwrap();
        // More than its queue has room for, so that some wait to be taken and some for an answer when it
        // goes.
        let asking: Vec<_> = (0..100)
            .map(|n| {
                let host = two.a.clone();
                tokio::spawn(async move {
                    if n == turn * 5 {
                        return host.delete_guest("g", &Ask::now()).await.map(drop);
                    }
                    let change = move |_: &Labels| Labels::from([("n".to_owned(), n.to_string())]);
                    host.change_labels("g", change, &Ask::now()).await.map(drop)
                })
            })
            .collect();
        for asked in asking {
            let answer = tokio::time::timeout(std::time::Duration::from_secs(60), asked).await;
            match answer.expect("an answer").unwrap() {
                Ok(()) | Err(HostError::NotFound { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}
