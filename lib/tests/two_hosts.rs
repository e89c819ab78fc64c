//! Two hosts on loopback: a running guest moves from one to the other and goes on.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::host::events::{EventBody, EventCursor};
use mirrorvm::host::*;

use support::hosts::{SHIFTED, Two, WORKLOAD, guest, migration, moved, run, ticks, two, until};

fn embedded(mib: u64) -> GuestSpec {
    guest(EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload: WORKLOAD, sev: None }), &[(mib, Some(0))])
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
    let refused = two.a.guest_action("g1", GuestAction::Start, &Ask::now()).await;
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
    two.a.guest_action("g1", GuestAction::Pause, &Ask::now()).await.unwrap();
    let before = ticks(&two.a).unwrap();
    moved(&two.a, &two.b, migration("b", SHIFTED, 1)).await;
    assert_eq!(two.b.guest("g1").unwrap().state, GuestState::Paused);
    assert_eq!(ticks(&two.b), Some(before), "its console came along and nothing was added");
    two.b.guest_action("g1", GuestAction::Resume, &Ask::now()).await.unwrap();
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 20)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");
    two.a.shutdown().await;
    two.b.shutdown().await;
}

fn emulated(mib: u64) -> GuestSpec {
    let workload = WorkloadSpec { dirty_bytes_per_second: 0, working_set_bytes: 1 << 20, ..WORKLOAD };
    guest(EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }), &[(mib, Some(0))])
}

/// So slow that there is time to look; it goes over when it is asked to.
fn slowly() -> MigrationSpec {
    let limits = MigrationLimits { bandwidth_bytes_per_second: Some(1 << 20), ..MigrationLimits::default() };
    MigrationSpec { limits, verify: false, ..migration("b", SHIFTED, 1) }
}

fn labels(value: u64) -> Labels {
    Labels::from([("n".to_owned(), value.to_string())])
}

async fn begun(two: &Two) -> uuid::Uuid {
    let id = two.a.create_migration(slowly(), &Ask::now()).await.unwrap().record.id;
    until(&two.a, "copying", || {
        (two.a.migration(id).unwrap().state == MigrationState::Precopy).then_some(())
    })
    .await;
    id
}

async fn ended(host: &Host, id: uuid::Uuid) -> MigrationState {
    let end =
        until(host, "the end", || Some(host.migration(id).ok()?.state).filter(|s| s.is_terminal())).await;
    until(host, "the guest is let go", || host.guest("g1").ok()?.migration.is_none().then_some(())).await;
    end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn labels_that_were_acknowledged_on_the_way_arrive_with_the_guest() {
    let two = two().await;
    run(&two, emulated(16)).await;
    let defined = two.a.guest("g1").unwrap().created_at;

    // Called off: they stay, and can change again.
    let id = begun(&two).await;
    two.a.change_labels("g1", move |_| labels(1), &Ask::now()).await.unwrap();
    two.a.cancel_migration(id, &Ask::now()).await.unwrap();
    assert_eq!(ended(&two.a, id).await, MigrationState::Canceled);
    assert_eq!(two.a.guest("g1").unwrap().spec.labels, labels(1));
    two.a.change_labels("g1", move |_| labels(2), &Ask::now()).await.unwrap();

    // Somebody changes them without a pause, over the switchover and beyond. What is acknowledged of the
    // guest, and not of what it leaves behind, arrives; whoever comes too late for that is told so.
    let id = begun(&two).await;
    let host = two.a.clone();
    let changes = tokio::spawn(async move {
        let mut last = 2;
        for n in 3.. {
            match host.change_labels("g1", move |_| labels(n), &Ask::now()).await {
                Ok(record) if record.migration == Some(id) => last = n,
                Ok(record) => {
                    assert_eq!((record.state, record.moved_to.as_deref()), (GuestState::Stopped, Some("b")));
                    break;
                }
                Err(HostError::GuestMigrating { migration }) => {
                    assert_eq!(migration, id);
                    let dry = host.change_labels("g1", move |_| labels(n), &Ask::dry_run()).await;
                    assert!(dry.is_err() || host.guest("g1").unwrap().migration.is_none(), "{dry:?}");
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        last
    });
    two.a.limit_migration(id, MigrationLimits::default(), &Ask::now()).unwrap();
    assert_eq!(ended(&two.a, id).await, MigrationState::Succeeded);
    let last = changes.await.unwrap();
    assert_eq!(ended(&two.b, id).await, MigrationState::Succeeded);
    let arrived = two.b.guest("g1").unwrap();
    println!("{last} changes were acknowledged before the guest left");
    assert_eq!(arrived.spec.labels, labels(last));
    assert_eq!(arrived.created_at, defined, "the guest is as old as it was");
    assert!(arrived.started_at.is_some_and(|t| t > defined), "when it came is said, too");
    two.a.shutdown().await;
    two.b.shutdown().await;
}

/// Follows the events in a task of its own, and looks up each at the moment that it can be read, up to the
/// `count`th of this kind. `holds`: whether what it tells is so.
fn watched(
    host: &Host,
    (kind, count): (&'static str, usize),
    holds: impl Fn(&Host, &EventBody) -> bool + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    let (host, mut news) = (host.clone(), host.events().watch());
    let mut at: EventCursor = host.events().latest();
    tokio::spawn(async move {
        let mut seen = 0;
        while seen < count {
            news.mark_unchanged();
            let page = host.events().page(Some(&at), 100, &[], |body| body.kind() == kind).unwrap();
            for event in &page.events {
                assert!(holds(&host, &event.body), "{:?} was told before it could be read", event.body);
            }
            seen += page.events.len();
            at = page.next;
            if page.events.is_empty() && !page.more {
                news.changed().await.unwrap();
            }
        }
    })
}

/// Otherwise who lists after an event that is told already could miss what it told.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_an_event_tells_can_be_read_when_the_event_can() {
    const TIMES: usize = 300;
    let two = two().await;
    let a = &two.a;
    // Peers come and go.
    let peer = |n: usize| PeerSpec {
        name: format!("p{n}"),
        address: format!("127.0.0.1:{}", 10_000 + n).parse().unwrap(),
        identity: format!("sha256:{n:064x}"),
        labels: Labels::new(),
    };
    let known = |host: &Host, body: &EventBody| host.peer(&body.id.to_string()).is_ok();
    let reader = watched(a, ("peer_host.created", TIMES), known);
    for n in 0..TIMES {
        a.add_peer(peer(n), &Ask::now()).await.unwrap();
    }
    reader.await.unwrap();
    let reader = watched(a, ("peer_host.deleted", TIMES), move |host, body| !known(host, body));
    for n in 0..TIMES {
        a.delete_peer(&format!("p{n}"), &Ask::now()).await.unwrap();
    }
    reader.await.unwrap();
    // The host's settings.
    let set = |host: &Host, body: &EventBody| host.settings().generation >= body.generation;
    let reader = watched(a, ("host.updated", TIMES), set);
    for n in 0..TIMES {
        a.change_settings(|settings| settings.maintenance = n % 2 == 0, &Ask::now()).unwrap();
    }
    reader.await.unwrap();
    // Migrations that were forgotten: those of a guest that ends for want of a destination.
    a.define_guest(emulated(16), &Ask::now()).await.unwrap();
    a.guest_action("g1", GuestAction::Start, &Ask::now()).await.unwrap();
    until(a, "a guest that runs", || Some(a.guest("g1").unwrap()).filter(|g| g.state == GuestState::Running))
        .await;
    let nobody = PeerSpec { address: "127.0.0.1:9".parse().unwrap(), ..peer(1) };
    a.add_peer(nobody, &Ask::now()).await.unwrap();
    let mut ended = Vec::new();
    for _ in 0..40 {
        let id = a.create_migration(migration("p1", SHIFTED, 1), &Ask::now()).await.unwrap().record.id;
        assert!(a.migrations().iter().any(|m| m.id == id), "who is told of it finds it");
        let state = || a.migration(id).unwrap().state;
        until(a, "the end", || (state() == MigrationState::Failed).then_some(())).await;
        // Its guest may still be on its way back.
        until(a, "the guest", || a.guest("g1").unwrap().migration.is_none().then_some(())).await;
        ended.push(id);
    }
    let gone = |host: &Host, body: &EventBody| !host.migrations().iter().any(|m| m.id == body.id);
    let reader = watched(a, ("migration.deleted", ended.len()), gone);
    for id in ended {
        a.delete_migration(id, &Ask::now()).await.unwrap();
    }
    reader.await.unwrap();
    two.a.shutdown().await;
    two.b.shutdown().await;
}
