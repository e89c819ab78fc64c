//! Two hosts on loopback: a running guest moves from one to the other and goes on.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::time::{Duration, Instant};

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, Shift, Strategy};
use mirrorvm::host::*;

struct Two {
    a: Host,
    b: Host,
    _dirs: (tempfile::TempDir, tempfile::TempDir),
}

async fn two() -> Two {
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
        let spec = PeerSpec {
            name: info.name,
            address: info.peer_address.unwrap(),
            identity: info.identity,
            labels: Labels::new(),
        };
        here.add_peer(spec).await.unwrap();
    }
    Two { a, b, _dirs: dirs }
}

fn spec(mib: u64, dirty: u64) -> GuestSpec {
    GuestSpec {
        name: "g1".into(),
        driver: DriverSpec::Embedded {
            vcpus: 1,
            workload: WorkloadSpec {
                fill: Fill::Random,
                working_set_bytes: 8 << 20,
                dirty_bytes_per_second: dirty,
            },
        },
        blocks: vec![BlockSpec { name: "ram0".into(), size_bytes: mib << 20, gpa: Some(Gpa::new(0)) }],
        labels: Labels::new(),
    }
}

fn migration(peer: &str, streams: u16) -> MigrationSpec {
    MigrationSpec {
        guest: "g1".into(),
        destination: Destination::Host(peer.into()),
        mode: MigrationMode::Precopy,
        mirror: MirrorChoice::Template(Strategy::Shifted { shift: Shift::FourGib }),
        streams,
        limits: MigrationLimits::default(),
        source_after: SourceAfter::KeepStopped,
        verify: true,
    }
}

/// Waits for a condition with the host's own change notices; the deadline only bounds a failure.
async fn until<T>(host: &Host, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut changes = host.changes();
    loop {
        changes.borrow_and_update();
        if let Some(t) = found() {
            return t;
        }
        assert!(Instant::now() < deadline, "{what} did not happen");
        // Consoles do not count as changes: look again soon in any case.
        let _ = tokio::time::timeout(Duration::from_millis(20), changes.changed()).await;
    }
}

fn ticks(host: &Host) -> Option<(u64, u64)> {
    let text = String::from_utf8(host.console("g1", None, usize::MAX).ok()?.data).unwrap();
    let line = text.lines().rfind(|l| l.starts_with("tick "))?.to_owned();
    let n: Vec<u64> = line.split(' ').filter_map(|w| w.parse().ok()).collect();
    (n.len() == 3).then(|| (n[0], n[2]))
}

async fn run(two: &Two, mib: u64, dirty: u64) {
    two.a.define_guest(spec(mib, dirty)).await.unwrap();
    two.a.guest_action("g1", GuestAction::Start).await.unwrap();
    until(&two.a, "ticks", || ticks(&two.a).filter(|t| t.0 > 20)).await;
}

async fn moved(from: &Host, to: &Host, m: MigrationSpec) -> MigrationRecord {
    let id = from.create_migration(m).await.unwrap().id;
    let end =
        until(from, "the end", || Some(from.migration(id).unwrap()).filter(|m| m.state.is_terminal())).await;
    assert_eq!(end.state, MigrationState::Succeeded, "{:?}", end.error);
    until(to, "the end there", || Some(to.migration(id).unwrap()).filter(|m| m.state.is_terminal())).await;
    let (here, there) = (from.page_digests(id).unwrap(), to.page_digests(id).unwrap());
    assert_eq!(here.digests.len() as u64 * 4096, end.progress.total_bytes);
    assert!(here == there, "every page is equal");
    end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_running_guest_moves_and_moves_back() {
    if support::kvm().is_none() {
        return;
    }
    let two = two().await;
    run(&two, 64, 16 << 20).await;
    let before = ticks(&two.a).unwrap();
    let end = moved(&two.a, &two.b, migration("b", 2)).await;
    println!("{:#?}", end.progress);
    assert!(end.progress.pages_sealed > 0 && end.progress.pages_shared > 0);
    assert_eq!(two.a.guest("g1").unwrap().state, GuestState::Stopped);
    assert_eq!(two.a.guest("g1").unwrap().moved_to.as_deref(), Some("b"));
    let refused = two.a.guest_action("g1", GuestAction::Start).await;
    assert!(matches!(refused, Err(HostError::GuestMoved { .. })));
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 50)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");

    moved(&two.b, &two.a, migration("a", 1)).await;
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
    run(&two, 32, 16 << 20).await;
    two.a.guest_action("g1", GuestAction::Pause).await.unwrap();
    let before = ticks(&two.a).unwrap();
    moved(&two.a, &two.b, migration("b", 1)).await;
    assert_eq!(two.b.guest("g1").unwrap().state, GuestState::Paused);
    assert_eq!(ticks(&two.b), Some(before), "its console came along and nothing was added");
    two.b.guest_action("g1", GuestAction::Resume).await.unwrap();
    let after = until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > before.0 + 20)).await;
    assert_eq!(after.1, 0, "the guest found every page as it left it");
    two.a.shutdown().await;
    two.b.shutdown().await;
}
