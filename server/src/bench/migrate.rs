//! A running guest over loopback between two hosts of this process, every page compared in every run.

use std::time::Duration;

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, Shift, Strategy};
use mirrorvm::host::{
    Destination, DriverSpec, Fill, GuestAction, GuestSpec, Host, HostConfig, Labels, MigrationLimits,
    MigrationMode, MigrationRecord, MigrationSpec, MigrationState, MirrorChoice, PeerSpec, SourceAfter,
    StreamTransport, WorkloadSpec,
};

use super::{BenchArgs, BenchError, Row};

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for streams in [1, 2] {
        let (mut rate, mut downtime, mut total) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..args.runs {
            let end = runtime.block_on(one(args.memory_mib << 20, streams))?;
            let moving: u64 = end.rounds.iter().map(|r| r.duration_us).sum();
            rate.push(end.progress.processed_bytes as f64 / moving as f64);
            downtime.push(end.progress.downtime_ms.unwrap_or(f64::NAN));
            total.push(end.progress.elapsed_ms as f64);
        }
        let name = |what: &str| format!("migration, {streams} stream(s), 16 MiB/s dirtied: {what}");
        rows.push(Row::new(name("page content"), "MB/s", rate));
        rows.push(Row::new(name("downtime"), "ms", downtime));
        rows.push(Row::new(name("total, check included"), "ms", total));
    }
    Ok(rows)
}

async fn one(bytes: u64, streams: u16) -> Result<MigrationRecord, BenchError> {
    let dirs = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (a, b) = (open(dirs.0.path(), "a").await?, open(dirs.1.path(), "b").await?);
    introduce(&a, &b).await?;
    introduce(&b, &a).await?;
    let workload = WorkloadSpec {
        fill: Fill::Random,
        working_set_bytes: (bytes / 4).min(64 << 20),
        dirty_bytes_per_second: 16 << 20,
        withdraws_readiness_after_ms: None,
    };
    a.define_guest(GuestSpec {
        name: "g".into(),
        driver: DriverSpec::Embedded { vcpus: 1, workload, sev: None },
        blocks: vec![BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) }],
        backing: None,
        labels: Labels::new(),
    })
    .await?;
    a.guest_action("g", GuestAction::Start).await?;
    until(|| {
        let text = a.console("g", None, usize::MAX).map(|c| c.data).unwrap_or_default();
        String::from_utf8_lossy(&text).contains("tick ").then_some(())
    })
    .await?;
    let spec = MigrationSpec {
        guest: "g".into(),
        destination: Destination::Host("b".into()),
        mode: MigrationMode::Precopy,
        mirror: MirrorChoice::Template(Strategy::Shifted { shift: Shift::FourGib }),
        streams,
        stream_transport: StreamTransport::Sealed,
        limits: MigrationLimits::default(),
        source_after: SourceAfter::KeepStopped,
        verify: true,
    };
    let id = a.create_migration(spec).await?.id;
    let end = until(|| a.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
    if end.state != MigrationState::Succeeded {
        return Err(format!("the migration ended as {}: {:?}", end.state.name(), end.error).into());
    }
    until(|| b.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
    if a.page_digests(id)? != b.page_digests(id)? {
        return Err("pages differ".into());
    }
    a.shutdown().await;
    b.shutdown().await;
    Ok(end)
}

pub(super) async fn open(dir: &std::path::Path, name: &str) -> Result<Host, BenchError> {
    let peer_listen = Some(std::net::SocketAddr::from(([127, 0, 0, 1], 0)));
    Ok(Host::open(HostConfig {
        state_dir: dir.join("state"),
        name: Some(name.into()),
        peer_listen,
        ..HostConfig::default()
    })
    .await?)
}

pub(super) async fn introduce(here: &Host, there: &Host) -> Result<(), BenchError> {
    let info = there.info();
    let address = info.peer_address.ok_or("no peer listener")?;
    here.add_peer(PeerSpec { name: info.name, address, identity: info.identity, labels: Labels::new() })
        .await?;
    Ok(())
}

pub(super) async fn until<T>(mut found: impl FnMut() -> Option<T>) -> Result<T, BenchError> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(300);
    loop {
        if let Some(t) = found() {
            return Ok(t);
        }
        if tokio::time::Instant::now() > deadline {
            return Err("a run did not end in 300 s".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
