//! Two hosts in this process, on loopback, and what tests do with them.

use std::time::{Duration, Instant};

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, Shift, Strategy};
use mirrorvm::host::*;

pub struct Two {
    pub a: Host,
    pub b: Host,
    /// Where their states are.
    pub dirs: (tempfile::TempDir, tempfile::TempDir),
}

/// Where the Linux guest's files are, if they are.
fn linux_images() -> Vec<std::path::PathBuf> {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests");
    let dir = std::env::var_os("MIRRORVM_GUEST_DIR").map_or_else(|| tests.join(".cache/guest"), Into::into);
    std::fs::canonicalize(dir).into_iter().collect()
}

impl Two {
    /// Of hosts that were opened in `dirs`.
    pub fn of(a: Host, b: Host, dirs: (tempfile::TempDir, tempfile::TempDir)) -> Self {
        Self { a, b, dirs }
    }

    /// Shuts both down and gives their directories, to be opened again.
    pub async fn close(self) -> (tempfile::TempDir, tempfile::TempDir) {
        self.a.shutdown().await;
        self.b.shutdown().await;
        self.dirs
    }
}

pub async fn two() -> Two {
    let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = async |dir: &tempfile::TempDir, name: &str| {
        let config = HostConfig {
            state_dir: dir.path().join("state"),
            name: Some(name.into()),
            peer_listen: Some("127.0.0.1:0".parse().unwrap()),
            image_directories: linux_images(),
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
        here.add_peer(spec, &Ask::now()).await.unwrap();
    }
    Two { a, b, dirs }
}

pub const WORKLOAD: WorkloadSpec = WorkloadSpec {
    fill: Fill::Random,
    working_set_bytes: 8 << 20,
    dirty_bytes_per_second: 16 << 20,
    withdraws_readiness_after_ms: None,
};

/// A guest called `g1`; blocks are MiB and where they are plugged.
pub fn guest(driver: DriverSpec, blocks: &[(u64, Option<u64>)]) -> GuestSpec {
    let block = |(i, (mib, gpa)): (usize, &(u64, Option<u64>))| BlockSpec {
        name: format!("ram{i}"),
        size_bytes: mib << 20,
        gpa: gpa.map(Gpa::new),
    };
    let blocks = blocks.iter().enumerate().map(block).collect();
    GuestSpec { name: "g1".into(), driver, blocks, backing: None, labels: Labels::new() }
}

pub const SHIFTED: Strategy = Strategy::Shifted { shift: Shift::FourGib };

pub fn migration(peer: &str, strategy: Strategy, streams: u16) -> MigrationSpec {
    MigrationSpec {
        guest: "g1".into(),
        destination: Destination::Host(peer.into()),
        mode: MigrationMode::Precopy,
        mirror: MirrorChoice::Template(strategy),
        template: MirrorOptions::default(),
        streams,
        stream_transport: StreamTransport::Sealed,
        suite: Suite::Aes256Gcm,
        limits: MigrationLimits::default(),
        source_after: SourceAfter::KeepStopped,
        verify: true,
        audit: AuditMode::After,
    }
}

/// Waits for a condition with the host's own change notices; the deadline only bounds a failure.
pub async fn until<T>(host: &Host, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(300);
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

pub fn ticks(host: &Host) -> Option<(u64, u64)> {
    let text = String::from_utf8(host.console("g1", None, usize::MAX).ok()?.data).unwrap();
    let line = text.lines().rfind(|l| l.starts_with("tick "))?.to_owned();
    let n: Vec<u64> = line.split(' ').filter_map(|w| w.parse().ok()).collect();
    (n.len() == 3).then(|| (n[0], n[2]))
}

/// Waits until the guest's record says that it can be moved: it works a moment before it is known to.
async fn movable(host: &Host) {
    let state = || host.guest("g1").ok().map(|g| g.state);
    until(host, "a guest that can be moved", || {
        state().filter(|s| matches!(s, GuestState::Running | GuestState::Paused))
    })
    .await;
}

/// Defines and starts a guest at `a`; returns when it works.
pub async fn run(two: &Two, spec: GuestSpec) {
    two.a.define_guest(spec, &Ask::now()).await.unwrap();
    two.a.guest_action("g1", GuestAction::Start, &Ask::now()).await.unwrap();
    until(&two.a, "ticks", || ticks(&two.a).filter(|t| t.0 > 20)).await;
    movable(&two.a).await;
}

pub async fn moved(from: &Host, to: &Host, m: MigrationSpec) -> MigrationRecord {
    movable(from).await;
    let id = from.create_migration(m, &Ask::now()).await.unwrap().record.id;
    arrived(from, to, id).await
}

/// Waits for the end of a migration that succeeds, with every page equal at both ends.
pub async fn arrived(from: &Host, to: &Host, id: uuid::Uuid) -> MigrationRecord {
    let end = until(from, "the migration's end", || {
        Some(from.migration(id).unwrap()).filter(|m| m.state.is_terminal())
    })
    .await;
    assert_eq!(end.state, MigrationState::Succeeded, "{:?}", end.error);
    until(to, "the end there", || Some(to.migration(id).unwrap()).filter(|m| m.state.is_terminal())).await;
    let (here, there) = (from.page_digests(id).unwrap(), to.page_digests(id).unwrap());
    assert_eq!(here.digests.len() as u64 * 4096, end.progress.total_bytes);
    assert!(here == there, "every page is equal");
    if end.spec.as_ref().is_some_and(|spec| spec.audit != AuditMode::Never) {
        proven(from, to, id).await;
    }
    end
}

/// Waits for the end of the audit, which found the same: every private page is as the source had it.
pub async fn proven(from: &Host, to: &Host, id: uuid::Uuid) {
    for host in [from, to] {
        let end = until(host, "the audit's end", || {
            let audit = host.migration(id).unwrap().audit.expect("one was asked for");
            (!audit.is_pending()).then_some(audit)
        })
        .await;
        assert_eq!(end.state, AuditState::Proven, "{end:?}");
        assert!(end.compared_pages > 0, "{end:?}");
        until(host, "the guest's word of it", || {
            let Ok(guest) = host.guest("g1") else { return Some(()) };
            (guest.audit?.audit.state == AuditState::Proven).then_some(())
        })
        .await;
    }
}
