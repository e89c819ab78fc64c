//! Pages of a host's lists, whatever became of its resources: every filter gives what a search through all
//! gives.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::host::events::{Change, EventBody};
use mirrorvm::host::lists::{Order, PageRequest, Selector};
use mirrorvm::host::*;
use uuid::Uuid;

use support::hosts::{SHIFTED, WORKLOAD, guest, migration, moved, run, two};

fn emulated(name: &str, tier: &str) -> GuestSpec {
    let workload = WorkloadSpec { dirty_bytes_per_second: 0, working_set_bytes: 1 << 20, ..WORKLOAD };
    let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None });
    let labels = Labels::from([("tier".to_owned(), tier.to_owned())]);
    GuestSpec { name: name.into(), labels, ..guest(driver, &[(64, Some(0))]) }
}

/// Everything that pages of one item, put together, give.
fn all<T>(page: impl Fn(&PageRequest) -> lists::Page<T>) -> Vec<T> {
    let (order, mut all) = (Order::default(), Vec::new());
    let mut asked = PageRequest { limit: 1, order, after: None };
    loop {
        let (items, next) = page(&asked);
        all.extend(items);
        match next {
            Some(next) => asked.after = Some(next),
            None => return all,
        }
    }
}

fn ids(all: impl IntoIterator<Item = Uuid>) -> Vec<Uuid> {
    all.into_iter().collect()
}

/// Sets every filter against a search.
fn check(host: &Host) {
    let (guests, migrations, mirrors) = (host.guests(), host.migrations(), host.mirrors());
    let of = |id: Uuid| guests.iter().find(|g| g.id == id).map(|g| g.spec.labels.clone());
    let label = |value: Option<&str>| vec![Selector { key: "tier".into(), value: value.map(Into::into) }];
    for having in [Vec::new(), label(None), label(Some("test")), label(Some("prod")), label(Some("none"))] {
        let holds = |labels: &Labels| Selector::all_hold(&having, labels);
        for state in GuestState::ALL.iter().map(|s| vec![*s]).chain([Vec::new()]) {
            let found = ids(all(|asked| host.guest_page(asked, &state, &having)).iter().map(|g| g.id));
            let is_one = |g: &&std::sync::Arc<GuestRecord>| {
                (state.is_empty() || state.contains(&g.state)) && holds(&g.spec.labels)
            };
            assert_eq!(found, ids(guests.iter().filter(is_one).map(|g| g.id)), "{state:?} {having:?}");
        }
        let names = [None, Some("g1"), Some("g2")].map(|name| name.map(ToOwned::to_owned));
        let by_id = guests.iter().map(|g| Some(g.id.to_string()));
        for guest in names.into_iter().chain(by_id) {
            let is_of =
                |id: Uuid, name: &str| guest.as_ref().is_none_or(|g| *g == id.to_string() || *g == name);
            for state in MigrationState::ALL.iter().map(|s| vec![*s]).chain([Vec::new()]) {
                let page =
                    |asked: &PageRequest| host.migration_page(asked, guest.as_deref(), &state, &having);
                let is_one = |m: &&MigrationRecord| {
                    (state.is_empty() || state.contains(&m.state))
                        && is_of(m.guest, &m.guest_name)
                        && (having.is_empty() || holds(&of(m.guest).unwrap_or_else(|| m.labels.clone())))
                };
                let wanted = ids(migrations.iter().filter(is_one).map(|m| m.id));
                assert_eq!(ids(all(page).iter().map(|m| m.id)), wanted, "{guest:?} {state:?} {having:?}");
            }
            for state in MirrorState::ALL.iter().map(|s| vec![*s]).chain([Vec::new()]) {
                let page = |asked: &PageRequest| host.mirror_page(asked, guest.as_deref(), &state, &having);
                let name = |id| guests.iter().find(|g| g.id == id).map_or("", |g| g.spec.name.as_str());
                let is_one = |m: &&MirrorRecord| {
                    (state.is_empty() || state.contains(&m.state))
                        && is_of(m.guest, name(m.guest))
                        && (having.is_empty() || holds(&of(m.guest).unwrap_or_default()))
                };
                let wanted = ids(mirrors.iter().filter(is_one).map(|m| m.id));
                assert_eq!(ids(all(page).iter().map(|m| m.id)), wanted, "{guest:?} {state:?} {having:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_filter_gives_what_a_search_gives_whatever_happens() {
    let two = two().await;
    let both = || [&two.a, &two.b].into_iter().for_each(check);
    both();
    run(&two, emulated("g1", "test")).await;
    two.a.define_guest(emulated("g2", "prod"), &Ask::now()).await.unwrap();
    both();
    let options = MirrorOptions::default();
    let spec = MirrorSpec { guest: "g1".into(), strategy: SHIFTED, workers: 1, options };
    let mirror = two.a.create_mirror(spec, &Ask::now()).await.unwrap();
    both();
    two.a.delete_mirror(mirror.id, &Ask::now()).await.unwrap();
    let prod = |_: &Labels| Labels::from([("tier".into(), "prod".into()), ("more".into(), "x".into())]);
    two.a.change_labels("g1", prod, &Ask::now()).await.unwrap();
    both();
    // It leaves a migration behind at both ends, and its definition at the first.
    let spec = MigrationSpec { audit: AuditMode::Never, ..migration("b", SHIFTED, 1) };
    let there = moved(&two.a, &two.b, spec).await;
    both();
    assert_eq!(
        two.b
            .migration_page(
                &PageRequest { limit: 5, order: Order::default(), after: None },
                Some("g1"),
                &[MigrationState::Succeeded],
                &[],
            )
            .0
            .len(),
        1
    );
    // A guest that is gone is found by the labels that it left with.
    two.a.delete_guest("g1", &Ask::now()).await.unwrap();
    two.b.change_labels("g1", |_| Labels::new(), &Ask::now()).await.unwrap();
    both();
    two.b.guest_action("g1", GuestAction::Stop, &Ask::now()).await.unwrap();
    support::hosts::until(&two.b, "the stop", || {
        (two.b.guest("g1").unwrap().state == GuestState::Stopped).then_some(())
    })
    .await;
    both();
    two.a.delete_migration(there.id, &Ask::now()).await.unwrap();
    two.b.delete_guest("g1", &Ask::now()).await.unwrap();
    both();
    // One that is on its way, whose state nobody has stored; it would take half a minute.
    let workload = WorkloadSpec { dirty_bytes_per_second: 0, working_set_bytes: 32 << 20, ..WORKLOAD };
    let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None });
    run(&two, GuestSpec { name: "g1".into(), ..guest(driver, &[(64, Some(0))]) }).await;
    let limits = MigrationLimits { bandwidth_bytes_per_second: Some(1 << 20), ..MigrationLimits::default() };
    let spec = MigrationSpec { limits, ..migration("b", SHIFTED, 1) };
    let leaving = two.a.create_migration(spec, &Ask::now()).await.unwrap().record.id;
    support::hosts::until(&two.a, "its pages move", || {
        (two.a.migration(leaving).unwrap().state == MigrationState::Precopy).then_some(())
    })
    .await;
    check(&two.a);
    two.a.cancel_migration(leaving, &Ask::now()).await.unwrap();
    support::hosts::until(&two.a, "its end", || {
        two.a.migration(leaving).unwrap().state.is_terminal().then_some(())
    })
    .await;
    check(&two.a);
    two.a.shutdown().await;
    two.b.shutdown().await;
}

/// The event stands for whatever happens while somebody looks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_during_a_look_comes_after_it() {
    let two = two().await;
    let before = two.a.events().latest();
    let (seen, cursor) = two.a.listed(|host| {
        let body = EventBody::new(ResourceKind::Guest, Change::Created, Uuid::now_v7(), 1);
        host.events().emit(&body);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while host.events().latest() == before {
            assert!(std::time::Instant::now() < deadline, "the event is not written");
            std::thread::yield_now();
        }
        host.guests().len()
    });
    assert_eq!((seen, cursor), (0, before));
    two.a.shutdown().await;
    two.b.shutdown().await;
}
