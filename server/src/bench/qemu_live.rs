//! How long a stock Linux in QEMU is paused: live by scans against all in one go, the same guest in turn,
//! every page compared.

use std::path::PathBuf;

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, Shift, Strategy};
use mirrorvm::host::{
    Ask, AuditMode, Destination, GuestAction, GuestSpec, Host, Labels, MigrationLimits, MigrationMode,
    MigrationRecord, MigrationSpec, MigrationState, MirrorChoice, QemuDriver, QemuGuest, SourceAfter,
    StreamTransport, Suite,
};

use super::pair::{compare, introduce, open, until};
use super::{BenchArgs, BenchError, Found, Row, Target};

/// Ticks of the guest before it counts as booted.
const BOOTED: usize = 10;

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let Some((kernel, initrd)) = guest() else {
        let why = "MIRRORVM_GUEST_DIR names no directory with vmlinuz and initrd.gz (tests/guest/build-linux-guest)";
        return Ok(Found { skipped: vec![why.to_owned()], ..Found::default() });
    };
    if let Some(why) = super::qemu::missing() {
        return Ok(Found { skipped: vec![why], ..Found::default() });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(both(args, kernel, initrd))?.into())
}

fn guest() -> Option<(PathBuf, PathBuf)> {
    let dir = PathBuf::from(std::env::var_os("MIRRORVM_GUEST_DIR")?).canonicalize().ok()?;
    let (kernel, initrd) = (dir.join("vmlinuz"), dir.join("initrd.gz"));
    (kernel.is_file() && initrd.is_file()).then_some((kernel, initrd))
}

/// One guest goes there live and comes back in one go, again and again.
async fn both(args: &BenchArgs, kernel: PathBuf, initrd: PathBuf) -> Result<Vec<Row>, BenchError> {
    let dirs = (tempfile::tempdir()?, tempfile::tempdir()?);
    let images: Vec<PathBuf> = kernel.parent().map(PathBuf::from).into_iter().collect();
    let (a, b) = (open(dirs.0.path(), "a", &images).await?, open(dirs.1.path(), "b", &images).await?);
    introduce(&a, &b).await?;
    introduce(&b, &a).await?;
    // Linux and its initial RAM disk need some of it.
    let bytes = args.memory_mib.map_or(if args.smoke { 256 } else { 1024 }, |mib| mib.max(256)) << 20;
    a.define_guest(
        GuestSpec {
            name: "g".into(),
            driver: QemuDriver::spec(&QemuGuest::of_kernel(
                kernel.to_string_lossy(),
                Some(initrd.to_string_lossy().into_owned()),
                "console=ttyS0 no_timer_check quiet panic=-1",
            )),
            blocks: vec![BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) }],
            backing: None,
            labels: Labels::new(),
        },
        &Ask::now(),
    )
    .await?;
    a.guest_action("g", GuestAction::Start, &Ask::now()).await?;
    until(|| (ticks(&a) >= BOOTED).then_some(())).await?;
    let mut found: [Vec<f64>; 5] = Default::default();
    for _ in 0..args.runs() {
        let live = one(&a, &b, bytes, MigrationMode::Precopy).await?;
        let whole = one(&b, &a, bytes, MigrationMode::StopAndCopy).await?;
        let pause = |m: &MigrationRecord| m.progress.downtime_ms.unwrap_or(f64::NAN);
        let last = live.rounds.last().map_or(0, |r| r.pages_sealed);
        found[0].push(pause(&live));
        found[1].push(pause(&whole));
        found[2].push(pause(&whole) / pause(&live));
        found[3].push(last as f64);
        found[4].push(live.rounds.len() as f64);
    }
    a.shutdown().await;
    b.shutdown().await;
    let [live, whole, ratio, pages, rounds] = found;
    let ratio = Row::new("stop and copy / live", "ratio", ratio);
    // Smaller guests have little but the fixed costs of both.
    let ratio = if bytes >= 1 << 30 { ratio.promised(Target::AtLeast(5.0)) } else { ratio };
    Ok(vec![
        Row::new("Linux in QEMU, mostly idle, 2 streams: pause, live by scans", "ms", live),
        Row::new("the same guest, stop and copy: pause", "ms", whole),
        ratio,
        Row::new("pages that moved in the live pause", "pages", pages),
        Row::new("rounds, the paused one included", "rounds", rounds),
    ])
}

async fn one(from: &Host, to: &Host, bytes: u64, mode: MigrationMode) -> Result<MigrationRecord, BenchError> {
    let before = ticks(from);
    let spec = MigrationSpec {
        guest: "g".into(),
        destination: Destination::Host(to.info().name),
        mode,
        mirror: MirrorChoice::Template(Strategy::Shifted { shift: Shift::FourGib }),
        template: mirrorvm::host::MirrorOptions::default(),
        streams: 2,
        stream_transport: StreamTransport::Sealed,
        suite: Suite::Aes256Gcm,
        limits: MigrationLimits::default(),
        source_after: SourceAfter::KeepStopped,
        verify: true,
        audit: AuditMode::Never,
    };
    let id = from.create_migration(spec, &Ask::now()).await?.record.id;
    let end = until(|| from.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
    if end.state != MigrationState::Succeeded {
        return Err(format!("the migration ended as {}: {:?}", end.state.name(), end.error).into());
    }
    until(|| to.migration(id).ok().filter(|m| m.state.is_terminal())).await?;
    compare(&from.page_digests(id)?.digests, &to.page_digests(id)?.digests, bytes)?;
    // It goes on there before it moves again, so that every move is of a guest that runs.
    until(|| (ticks(to) > before + BOOTED).then_some(())).await?;
    Ok(end)
}

fn ticks(host: &Host) -> usize {
    let text = host.console("g", None, usize::MAX).map(|c| c.data).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter(|l| l.starts_with("tick ")).count()
}
