//! The pause of a guest that rewrites a working set, against QEMU's for a guest that does the same, in turns.
//!
//! Ours is the built-in workload, QEMU's is `writer.s`: both rewrite whole pages of a working set in order,
//! in steps of 10 ms, and halt between; both wish for the same downtime. QEMU's figure is its own
//! (`query-migrate`).

use std::collections::BTreeMap;

use super::{BenchArgs, BenchError, Found, Row, Target, pair, qemu, ratios, writer::Writer};
use qemu::Mode;

/// How QEMU moves: its default, and what comes closest to ours.
const MODES: [Mode; 2] = [Mode { channels: 0, tls: false }, Mode { channels: 2, tls: true }];
/// What both are told.
const LIMIT_MS: u64 = 50;
/// Most milliseconds of our median.
const MOST_MS: f64 = 60.0;

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let mib = 1u64 << 20;
    let (bytes, set, rate) =
        if args.smoke { (128 * mib, 32 * mib, 8 * mib) } else { (1024 * mib, 256 * mib, 50 * mib) };
    let writer = Writer { working_set: bytes / 2..bytes / 2 + set, bytes_per_second: rate };
    let mut found = Found::default();
    let missing = qemu::missing();
    let (mut ours, mut theirs) = (Vec::new(), BTreeMap::<Mode, Vec<f64>>::new());
    for _ in 0..args.runs() {
        let course = pair::Course {
            load: Some((set, rate)),
            downtime_ms: LIMIT_MS,
            ..pair::Course::paused(bytes, args.streams())
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let moved = runtime.block_on(pair::once(course))?;
        drop(runtime);
        ours.push(moved.record.progress.downtime_ms.ok_or("no downtime")?);
        for mode in MODES.iter().filter(|_| missing.is_none()) {
            let course = qemu::Course { bytes, mode: *mode, writer: Some(&writer), downtime_ms: LIMIT_MS };
            let moved = qemu::migrate(&course).map_err(|e| format!("QEMU, {}: {e}", mode.name()))?;
            theirs.entry(*mode).or_default().push(moved.downtime_ms);
        }
    }
    let what = format!("{} MiB, {} MiB/s of {} MiB rewritten", bytes >> 20, rate >> 20, set >> 20);
    found.rows.push(
        Row::new(format!("downtime, {what}: ours"), "ms", ours.clone()).promised(Target::AtMost(MOST_MS)),
    );
    for (mode, times) in &theirs {
        found.rows.push(Row::new(format!("downtime, the same: QEMU, {}", mode.name()), "ms", times.clone()));
    }
    let median = |times: &Vec<f64>| Row::new("", "ms", times.clone()).median;
    if let Some((mode, times)) = theirs.iter().min_by(|(_, a), (_, b)| median(a).total_cmp(&median(b))) {
        let name = format!("downtime: ours / QEMU's {}", mode.name());
        found.rows.push(Row::new(name, "ratio", ratios(&ours, times)).promised(Target::AtMost(1.0)));
    }
    found.skipped.extend(missing);
    found.conditions.push((
        "QEMU's guest of downtime",
        format!("bare-metal writer under TCG, whole pages in steps of 10 ms; downtime limit {LIMIT_MS} ms for both"),
    ));
    Ok(found)
}
