//! Two hosts of this process, a guest on the first, its migration to the second, every page compared.
//!
//! Owns: that course. Must not know: what is measured with it. It is a client of the library's front door
//! alone.

use std::time::{Duration, Instant};

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, Shift, Strategy};
use mirrorvm::host::{
    Ask, Audit, AuditMode, AuditState, Destination, EmbeddedDriver, Fill, GuestAction, GuestSpec, Host,
    HostConfig, Labels, MigrationLimits, MigrationMode, MigrationRecord, MigrationSpec, MigrationState,
    MirrorChoice, PeerSpec, SourceAfter, StreamTransport, Suite, WorkloadGuest, WorkloadSpec,
};
use mirrorvm_abi::PAGE_BYTES as PAGE;

use super::BenchError;
use super::setting::warm;

/// A guest and how it moves. Its RAM is one block of random data, backed as the host does by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course {
    pub bytes: u64,
    pub streams: u16,
    /// What the guest rewrites over and over, and how fast, bytes and bytes per second; `None`: it is paused.
    pub load: Option<(u64, u64)>,
    /// Longest pause that pre-copy aims for.
    pub downtime_ms: u64,
    /// Most page content a second; `None`: as fast as it goes.
    pub bandwidth: Option<u64>,
    /// Whether its RAM is compared afterwards.
    pub audit: AuditMode,
}

impl Course {
    /// A guest that is paused, moves as fast as it goes, and is not audited.
    pub const fn paused(bytes: u64, streams: u16) -> Self {
        Self { bytes, streams, load: None, downtime_ms: 300, bandwidth: None, audit: AuditMode::Never }
    }
}

/// How a migration went; every page was compared.
#[derive(Debug)]
pub(super) struct Moved {
    /// From the request to the guest's commitment at the destination, in seconds. The digests' time is not in
    /// it.
    pub seconds: f64,
    pub record: MigrationRecord,
}

/// Two hosts and a guest that is ready to move. RAM and state directories go with this value.
pub(super) struct Pair {
    course: Course,
    source: Host,
    destination: Host,
    _dirs: (tempfile::TempDir, tempfile::TempDir),
}

impl Pair {
    /// Makes hosts and guest; the guest has filled its RAM, and works or is paused.
    pub async fn new(course: Course) -> Result<Self, BenchError> {
        let dirs = (tempfile::tempdir()?, tempfile::tempdir()?);
        let (source, destination) =
            (open(dirs.0.path(), "a", &[]).await?, open(dirs.1.path(), "b", &[]).await?);
        introduce(&source, &destination).await?;
        introduce(&destination, &source).await?;
        let (working_set_bytes, dirty_bytes_per_second) = course.load.unwrap_or((PAGE as u64, 0));
        let workload = WorkloadSpec {
            fill: Fill::Random,
            working_set_bytes,
            dirty_bytes_per_second,
            withdraws_readiness_after_ms: None,
        };
        source
            .define_guest(
                GuestSpec {
                    name: "g".into(),
                    driver: EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }),
                    blocks: vec![BlockSpec {
                        name: "ram0".into(),
                        size_bytes: course.bytes,
                        gpa: Some(Gpa::new(0)),
                    }],
                    backing: None,
                    labels: Labels::new(),
                },
                &Ask::now(),
            )
            .await?;
        source.guest_action("g", GuestAction::Start, &Ask::now()).await?;
        // Its first report comes when RAM is filled.
        until(|| {
            let text = source.console("g", None, usize::MAX).map(|c| c.data).unwrap_or_default();
            String::from_utf8_lossy(&text).contains("tick ").then_some(())
        })
        .await?;
        if course.load.is_none() {
            source.guest_action("g", GuestAction::Pause, &Ask::now()).await?;
        }
        Ok(Self { course, source, destination, _dirs: dirs })
    }

    /// Moves the guest and compares every page.
    pub async fn migrate(&self) -> Result<Moved, BenchError> {
        let (a, b) = (&self.source, &self.destination);
        let spec = MigrationSpec {
            guest: "g".into(),
            destination: Destination::Host("b".into()),
            mode: MigrationMode::Precopy,
            mirror: MirrorChoice::Template(Strategy::Shifted { shift: Shift::FourGib }),
            template: mirrorvm::host::MirrorOptions::default(),
            streams: self.course.streams,
            stream_transport: StreamTransport::Sealed,
            suite: Suite::Aes256Gcm,
            limits: MigrationLimits {
                downtime_ms: self.course.downtime_ms,
                bandwidth_bytes_per_second: self.course.bandwidth,
                ..MigrationLimits::default()
            },
            source_after: SourceAfter::KeepStopped,
            verify: true,
            audit: self.course.audit,
        };
        warm(self.course.bytes)?;
        let asked = Instant::now();
        let id = a.create_migration(spec, &Ask::now()).await?.record.id;
        // Its own clock starts where the mirror is there: what came before is counted here.
        let waiting = |m: &MigrationRecord| m.state != MigrationState::Queued;
        until(|| a.migration(id).ok().filter(waiting)).await?;
        let before = asked.elapsed();
        let end = until(|| a.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
        if end.state != MigrationState::Succeeded {
            return Err(format!("the migration ended as {}: {:?}", end.state.name(), end.error).into());
        }
        until(|| b.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
        let (sent, arrived) = (a.page_digests(id)?, b.page_digests(id)?);
        compare(&sent.digests, &arrived.digests, self.course.bytes)?;
        let p = &end.progress;
        p.verify_ms.ok_or("the migration was not verified")?;
        // Its record ends when the source has digested its pages, too, which no migration has to wait for: up
        // to the first page, the rounds while the guest ran, the pause.
        let rounds: u64 = end.rounds.iter().filter(|r| !r.paused).map(|r| r.duration_us).sum();
        let pause = p.downtime_ms.ok_or("a migration without a pause")?;
        let own = p.setup_ms as f64 / 1e3 + rounds as f64 / 1e6 + pause / 1e3;
        Ok(Moved { seconds: before.as_secs_f64() + own, record: end })
    }

    /// What came of a migration's audit: the source's word and the destination's.
    pub async fn audits(&self, moved: &Moved) -> Result<(Audit, Audit), BenchError> {
        let id = moved.record.id;
        let ended = |host: &Host| host.migration(id).ok()?.audit.filter(|a| a.state != AuditState::Pending);
        Ok((until(|| ended(&self.source)).await?, until(|| ended(&self.destination)).await?))
    }

    /// Ends both hosts; memory is free when this returns.
    pub async fn end(self) {
        self.source.shutdown().await;
        self.destination.shutdown().await;
    }
}

/// Whole migration of a fresh pair.
pub(super) async fn once(course: Course) -> Result<Moved, BenchError> {
    let pair = Pair::new(course).await?;
    let moved = pair.migrate().await;
    pair.end().await;
    moved
}

/// Every page of RAM has a digest at both ends, and the same.
pub(super) fn compare(sent: &[[u8; 16]], arrived: &[[u8; 16]], bytes: u64) -> Result<(), BenchError> {
    let pages = (bytes / PAGE as u64) as usize;
    if sent.len() != pages || arrived.len() != pages {
        return Err(format!("{} and {} pages were digested, not {pages}", sent.len(), arrived.len()).into());
    }
    match sent.iter().zip(arrived).position(|(a, b)| a != b) {
        Some(page) => Err(format!("page {page} differs at the destination").into()),
        None => Ok(()),
    }
}

pub(super) async fn open(
    dir: &std::path::Path,
    name: &str,
    images: &[std::path::PathBuf],
) -> Result<Host, BenchError> {
    let peer_listen = Some(std::net::SocketAddr::from(([127, 0, 0, 1], 0)));
    Ok(Host::open(HostConfig {
        state_dir: dir.join("state"),
        name: Some(name.into()),
        peer_listen,
        image_directories: images.to_vec(),
        ..HostConfig::default()
    })
    .await?)
}

pub(super) async fn introduce(here: &Host, there: &Host) -> Result<(), BenchError> {
    let info = there.info();
    let address = info.peer_address.ok_or("no peer listener")?;
    here.add_peer(
        PeerSpec { name: info.name, address, identity: info.identity, labels: Labels::new() },
        &Ask::now(),
    )
    .await?;
    Ok(())
}

/// Looks every millisecond: what is timed begins or ends with it.
pub(super) async fn until<T>(mut found: impl FnMut() -> Option<T>) -> Result<T, BenchError> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(300);
    loop {
        if let Some(t) = found() {
            return Ok(t);
        }
        if tokio::time::Instant::now() > deadline {
            return Err("a run did not end in 300 s".into());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_differs_or_is_missing_is_found() {
        let (a, mut b) = (vec![[1; 16]; 4], vec![[1; 16]; 4]);
        compare(&a, &b, 4 * 4096).unwrap();
        assert!(compare(&a, &b, 5 * 4096).is_err());
        assert!(compare(&a, &b[..3], 4 * 4096).is_err());
        b[3][15] = 2;
        assert!(compare(&a, &b, 4 * 4096).unwrap_err().to_string().contains("page 3"));
    }
}
