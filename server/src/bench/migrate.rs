//! A running guest over loopback between two hosts of this process, every page compared in every run.

use super::pair::{Course, once};
use super::{BenchArgs, BenchError, Row, Target};

/// What the guest rewrites a second.
const RATE: u64 = 16 << 20;

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let bytes = args.bytes();
    let mut rows = Vec::new();
    for streams in [1, 2] {
        let (mut rate, mut downtime, mut total) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..args.runs() {
            let load = Some(((bytes / 4).min(64 << 20), RATE));
            let moved = runtime.block_on(once(Course { load, ..Course::paused(bytes, streams) }))?;
            let moving: u64 = moved.record.rounds.iter().map(|r| r.duration_us).sum();
            rate.push(moved.record.progress.processed_bytes as f64 / moving as f64);
            downtime.push(moved.record.progress.downtime_ms.unwrap_or(f64::NAN));
            total.push(moved.seconds * 1e3);
        }
        let name = |what: &str| format!("migration, {streams} stream(s), 16 MiB/s dirtied: {what}");
        rows.push(Row::new(name("page content"), "MB/s", rate));
        rows.push(Row::new(name("downtime"), "ms", downtime));
        rows.push(Row::new(name("total"), "ms", total));
    }
    rows.push(runtime.block_on(limited(args))?);
    Ok(rows)
}

/// A bandwidth limit, and how far the first round is from it: two streams together, a third of what they
/// would move.
async fn limited(args: &BenchArgs) -> Result<Row, BenchError> {
    let (bytes, limit) = (args.bytes(), 200 << 20);
    let mut off = Vec::new();
    for _ in 0..args.runs() {
        let course = Course { load: Some((1 << 20, 0)), bandwidth: Some(limit), ..Course::paused(bytes, 2) };
        let moved = once(course).await?;
        let round = moved.record.rounds.first().ok_or("no round")?;
        let rate = round.bytes as f64 / (round.duration_us as f64 / 1e6);
        off.push((rate / limit as f64 - 1.0).abs() * 100.0);
    }
    let name = "bandwidth limit of 200 MiB/s over 2 streams: kept within";
    Ok(Row::new(name, "%", off).promised(Target::AtMost(5.0)))
}
