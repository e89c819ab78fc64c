//! What the audit after a hand-over costs: a paused guest moves without one and with one, in turns.

use mirrorvm::host::{AuditMode, AuditState};

use super::pair::{Course, Pair};
use super::threads::{Sampler, is_helper};
use super::{BenchArgs, BenchError, Row, Target, ratios};

/// Most processor time of both helpers a GiB that an audit may cost, seconds.
const MOST: f64 = 0.25;

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let bytes = args.sizes().first().copied().ok_or("no size")?;
    let gib = bytes as f64 / f64::from(1 << 30);
    let (mut more, mut source, mut destination) = (Vec::new(), Vec::new(), Vec::new());
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..args.runs() {
        let mut spent = Vec::new();
        for audit in [AuditMode::Never, AuditMode::After] {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let course = Course { audit, ..Course::paused(bytes, args.streams()) };
            let (moved, audits, threads) = runtime.block_on(async {
                let pair = Pair::new(course).await?;
                let sampler = Sampler::start()?;
                let moved = pair.migrate().await?;
                let audits = match audit {
                    AuditMode::Never => None,
                    AuditMode::After | AuditMode::BeforeCommit => Some(pair.audits(&moved).await?),
                };
                let threads = sampler.finish()?;
                pair.end().await;
                Ok::<_, BenchError>((moved, audits, threads))
            })?;
            let helpers = threads.iter().filter(|thread| is_helper(thread));
            spent.push(helpers.map(|thread| thread.user + thread.system).sum::<f64>() / gib);
            let Some((here, there)) = audits else {
                without.push(moved.seconds);
                continue;
            };
            if (&here.state, &there.state) != (&AuditState::Proven, &AuditState::Proven) {
                return Err(format!("the audit ended as {:?} and {:?}", here.state, there.state).into());
            }
            with.push(moved.seconds);
            source.push(here.cpu_us as f64 / 1e6 / gib);
            destination.push(there.cpu_us as f64 / 1e6 / gib);
        }
        // Below what two migrations differ by themselves it is nothing.
        more.push((spent[1] - spent[0]).max(0.0));
    }
    let name = |what: &str| format!("audit of {} MiB: {what}", bytes >> 20);
    Ok(vec![
        Row::new(name("processor time of both helpers a GiB, beyond a migration without"), "s", more)
            .promised(Target::AtMost(MOST)),
        Row::new(name("of that, the source's after START"), "s", source),
        Row::new(name("of that, the destination's after START"), "s", destination),
        Row::new(name("time of the migration, with / without"), "ratio", ratios(&with, &without)),
    ])
}
