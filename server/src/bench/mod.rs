//! `mirrorvmd bench`: what the parts that matter cost, as ratios measured in one run.
//!
//! Owns: scenarios, medians, the table. Must not know: the library's inside. These machines are noisy: every figure is
//! a median of several runs with its smallest and largest beside it, and is set against the raw operation in the same run.

mod api;
mod create;
mod migrate;
mod plan;
mod qemu_live;
mod scan;
mod seal;
mod setting;

use std::io::Write as _;

use clap::{Args, ValueEnum};

/// Options of `mirrorvmd bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Runs of every figure.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// RAM of the guests, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..=65536))]
    memory_mib: u64,
    /// What to measure [default: everything].
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// The helper's seal and open rate on a mirror vCPU against ring on a host thread.
    Seal,
    /// The helper's scan for changed pages, and what their digests cost an export.
    Scan,
    /// Mirror creation up to "helper ready" against the raw KVM calls.
    Create,
    /// Plans, page tables, translations and encryption status of guests up to 1 TiB.
    Plan,
    /// A running guest over loopback between two hosts, every page compared.
    Migrate,
    /// A stock Linux in QEMU: its pause when it moves live by scans, against stop and copy. Needs MIRRORVM_GUEST_DIR.
    QemuLive,
    /// The REST API against libvirt's RPC: one guest, a list of 1,000, durable definitions.
    Api,
}

/// One figure.
#[derive(Debug, serde::Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    min: f64,
    median: f64,
    max: f64,
}

impl Row {
    fn new(name: impl Into<String>, unit: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        let (min, median, max) = (at(0), at(values.len() / 2), at(values.len().saturating_sub(1)));
        Self { name: name.into(), unit, min, median, max }
    }
}

/// Anything that keeps a scenario from being measured.
type BenchError = Box<dyn std::error::Error + Send + Sync>;

/// Runs what was asked for and prints it.
pub(crate) fn run(args: &BenchArgs) -> Result<(), BenchError> {
    let all = [
        Scenario::Seal,
        Scenario::Scan,
        Scenario::Create,
        Scenario::Plan,
        Scenario::Migrate,
        Scenario::QemuLive,
        Scenario::Api,
    ];
    let wanted: &[Scenario] = if args.scenarios.is_empty() { &all } else { &args.scenarios };
    let mut rows = Vec::new();
    for scenario in wanted {
        rows.extend(match scenario {
            Scenario::Seal => seal::measure(args)?,
            Scenario::Scan => scan::measure(args)?,
            Scenario::Create => create::measure(args)?,
            Scenario::Plan => plan::measure(args)?,
            Scenario::Migrate => migrate::measure(args)?,
            Scenario::QemuLive => qemu_live::measure(args)?,
            Scenario::Api => api::measure(args)?,
        });
    }
    let conditions = setting::conditions(args);
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::json!({ "conditions": conditions, "rows": rows }))?;
        return Ok(());
    }
    writeln!(out, "{conditions}\n")?;
    writeln!(out, "{:<68} {:>9} {:>9} {:>9}  unit", "", "min", "median", "max")?;
    for r in &rows {
        writeln!(out, "{:<68} {:>9.2} {:>9.2} {:>9.2}  {}", r.name, r.min, r.median, r.max, r.unit)?;
    }
    Ok(())
}
