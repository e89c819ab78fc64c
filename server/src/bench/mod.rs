//! `mirrorvmd bench`: what the parts that matter cost, as ratios measured in one run.
//!
//! Owns: scenarios and their options. Must not know: the library's inside. These machines are noisy: every
//! figure is a median of several runs with its smallest and largest beside it, and is set against the raw
//! operation, QEMU or libvirt in the same run, turn by turn.
//!
//! - [`report`]: medians, targets, the table. [`setting`]: RAM, mirrors, the machine's description.
//! - [`pair`]: two hosts of this process and a guest. [`qemu`]: two QEMUs and a guest. [`certificates`]: what
//!   QEMU's TLS wants.
//! - [`daemon`]: a daemon as a child, and connections to it. [`threads`]: what threads compute. [`writer`]: a
//!   guest for QEMU.
//! - One module per scenario: [`seal`], [`audit`], [`scan`], [`create`], [`plan`], [`migrate`], [`versus`],
//!   [`downtime`], [`footprint`], [`breakdown`], [`qemu_live`], [`api`] with
//!   [`many`].

mod api;
mod audit;
mod breakdown;
mod certificates;
mod create;
mod daemon;
mod downtime;
mod footprint;
mod lxd;
mod many;
mod migrate;
mod pair;
mod plan;
mod qemu;
mod qemu_live;
mod report;
mod scan;
mod seal;
mod setting;
mod threads;
mod versus;
mod writer;

use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use report::{Report, Row, Target, ratios};

/// Options of `mirrorvmd bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write JSON to this file as well.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,
    /// End with failure when a target is missed.
    #[arg(long)]
    check: bool,
    /// With --check: how many times better than promised figures must be. For tests of the check itself.
    #[arg(long, hide = true, default_value_t = 1.0)]
    strictness: f64,
    /// As small and short as it can be: shows that every scenario runs, and gives no figures worth keeping.
    #[arg(long)]
    smoke: bool,
    /// Runs of every figure [default: 5; 1 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// RAM of the guests of seal, scan, create and migrate, in MiB [default: 256; 64 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u64).range(64..=65536))]
    memory_mib: Option<u64>,
    /// RAM of the guests of vs-qemu, in MiB [default: 1024,2048,4096; 64,128 with --smoke].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(64..=65536))]
    sizes_mib: Option<Vec<u64>>,
    /// Streams of our migrations in vs-qemu, downtime, memory and stages [default: one per core, at most 8].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: Option<u16>,
    /// What to measure [default: everything].
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
}

impl BenchArgs {
    fn runs(&self) -> u32 {
        self.runs.unwrap_or(if self.smoke { 1 } else { 5 })
    }

    fn bytes(&self) -> u64 {
        self.memory_mib.unwrap_or(if self.smoke { 64 } else { 256 }) << 20
    }

    /// Bytes of RAM of the guests that are compared with QEMU's, smallest first.
    fn sizes(&self) -> Vec<u64> {
        let default: &[u64] = if self.smoke { &[64, 128] } else { &[1024, 2048, 4096] };
        let mut sizes: Vec<_> =
            self.sizes_mib.as_deref().unwrap_or(default).iter().map(|mib| mib << 20).collect();
        sizes.sort_unstable();
        sizes
    }

    fn streams(&self) -> u16 {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.streams.unwrap_or(cores.clamp(1, 8) as u16)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Loopback migration of paused guests of 1, 2 and 4 GiB against QEMU's, in turns.
    VsQemu,
    /// The pause of a guest that rewrites 50 MiB/s, against QEMU's.
    Downtime,
    /// The helper's seal and open rate on a mirror vCPU against ring on a host thread.
    Seal,
    /// The helper's scan for changed pages, and what their digests cost an export.
    Scan,
    /// Mirror creation up to "helper ready" against the raw KVM calls.
    Create,
    /// What the audit after a hand-over costs: a paused guest moves without and with one.
    Audit,
    /// What two daemons need beyond the guest's RAM during a migration.
    Memory,
    /// Where the time of a migration goes: fault, seal, headers, socket, open.
    Stages,
    /// Plans, page tables, translations and encryption status of guests up to 1 TiB.
    Plan,
    /// A running guest over loopback between two hosts, one stream and two.
    Migrate,
    /// A stock Linux in QEMU: its pause when it moves live by scans, against stop and copy. Needs
    /// MIRRORVM_GUEST_DIR.
    QemuLive,
    /// The REST API against libvirt's RPC and LXD: one guest, lists, durable definitions, ten thousand
    /// guests, many connections and followers, memory and restart.
    Api,
}

impl Scenario {
    const fn needs_kvm(self) -> bool {
        match self {
            Self::VsQemu
            | Self::Downtime
            | Self::Seal
            | Self::Scan
            | Self::Create
            | Self::Audit
            | Self::Memory
            | Self::Stages
            | Self::QemuLive
            | Self::Migrate => true,
            Self::Plan | Self::Api => false,
        }
    }
}

/// Anything that keeps a scenario from being measured.
type BenchError = Box<dyn std::error::Error + Send + Sync>;

/// What a scenario found.
#[derive(Default)]
struct Found {
    rows: Vec<Row>,
    /// Conditions that only it has.
    conditions: Vec<(&'static str, String)>,
    /// What it left out, and why.
    skipped: Vec<String>,
}

impl From<Vec<Row>> for Found {
    fn from(rows: Vec<Row>) -> Self {
        Self { rows, ..Self::default() }
    }
}

impl Found {
    fn and(mut self, more: Self) -> Self {
        self.rows.extend(more.rows);
        self.conditions.extend(more.conditions);
        self.skipped.extend(more.skipped);
        self
    }
}

/// Runs what was asked for and prints it.
pub(crate) fn run(args: &BenchArgs) -> Result<(), BenchError> {
    let wanted: &[Scenario] =
        if args.scenarios.is_empty() { Scenario::value_variants() } else { &args.scenarios };
    let mut report = Report { conditions: setting::conditions(args), rows: Vec::new(), skipped: Vec::new() };
    for scenario in wanted {
        let name = scenario.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
        let _ = writeln!(std::io::stderr(), "{name} ...");
        if scenario.needs_kvm() && !setting::has_kvm() {
            report.skipped.push(format!("{name}: no /dev/kvm"));
            continue;
        }
        let found = match scenario {
            Scenario::VsQemu => versus::measure(args),
            Scenario::Downtime => downtime::measure(args),
            Scenario::Seal => seal::measure(args).map(Found::from),
            Scenario::Scan => scan::measure(args).map(Found::from),
            Scenario::Create => create::measure(args).map(Found::from),
            Scenario::Audit => audit::measure(args).map(Found::from),
            Scenario::Memory => footprint::measure(args).map(Found::from),
            Scenario::Stages => breakdown::measure(args),
            Scenario::Plan => plan::measure(args).map(Found::from),
            Scenario::Migrate => migrate::measure(args).map(Found::from),
            Scenario::QemuLive => qemu_live::measure(args),
            Scenario::Api => api::measure(args).and_then(|found| Ok(found.and(many::measure(args)?))),
        }
        .map_err(|e| format!("{name}: {e}"))?;
        report.rows.extend(found.rows);
        report.conditions.extend(found.conditions.into_iter().map(|(k, v)| (k.to_owned(), v.into())));
        report.skipped.extend(found.skipped.into_iter().map(|what| format!("{name}: {what}")));
    }
    setting::after(&mut report.conditions);
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &args.json_file {
        std::fs::write(path, &json)?;
    }
    let text = if args.json { json } else { report.table() };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    let missed: Vec<_> = report.missed(args.strictness).map(|r| r.name.as_str()).collect();
    if args.check && !missed.is_empty() {
        return Err(format!("targets missed: {}", missed.join("; ")).into());
    }
    Ok(())
}
