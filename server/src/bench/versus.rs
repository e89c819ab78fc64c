//! Loopback migration of paused guests with random RAM, sealed end to end, against QEMU's between two QEMUs,
//! in turns.
//!
//! Every mode of QEMU's is run at the smallest size; at the others the best number of channels there, with
//! TLS and without.

use std::collections::BTreeMap;

use super::{BenchArgs, BenchError, Found, Row, Target, pair, qemu, ratios};
use qemu::Mode;

/// Numbers of multifd channels that are tried.
const CHANNELS: [u16; 2] = [2, 4];
/// Least of QEMU's time over ours, with multifd and TLS, and with multifd alone.
const TARGETS: [(bool, f64); 2] = [(true, 4.0), (false, 3.0)];
/// By how much the cost of a GiB may grow over the smallest size.
const FLAT: f64 = 1.1;

/// Seconds by run.
type Times = Vec<f64>;

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let mut found = Found::default();
    let missing = qemu::missing();
    if let Some(why) = &missing {
        found.skipped.push(why.clone());
    }
    let mut modes = vec![];
    if missing.is_none() {
        for tls in [false, true] {
            modes.extend([0].into_iter().chain(CHANNELS).map(|channels| Mode { channels, tls }));
        }
    }
    let mut per_gib = Vec::new();
    for bytes in args.sizes() {
        let (ours, theirs) = in_turns(args, bytes, &modes)?;
        if per_gib.is_empty() {
            modes.retain(|m| m.channels > 0 && best(&theirs, m.tls) == Some(*m));
        }
        let gib = bytes as f64 / f64::from(1 << 30);
        per_gib.push((bytes, ours.iter().map(|t| t / gib).collect::<Vec<_>>()));
        found.rows.extend(rows(bytes, &ours, &theirs));
    }
    if let Some(((_, smallest), larger)) = per_gib.split_first() {
        for (bytes, times) in larger {
            let name = format!("ours: cost per GiB, {} / {}", size(*bytes), size(per_gib[0].0));
            found.rows.push(Row::new(name, "ratio", ratios(times, smallest)).promised(Target::AtMost(FLAT)));
        }
    }
    Ok(found)
}

/// Ours and every mode of QEMU's, one after the other, as often as was asked for.
fn in_turns(
    args: &BenchArgs,
    bytes: u64,
    modes: &[Mode],
) -> Result<(Times, BTreeMap<Mode, Times>), BenchError> {
    let (mut ours, mut theirs) = (Times::new(), BTreeMap::<_, Times>::new());
    for _ in 0..args.runs() {
        let course = pair::Course::paused(bytes, args.streams());
        // A runtime of its own: its threads, and all that they hold, are gone before QEMU runs.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        ours.push(runtime.block_on(pair::once(course))?.seconds);
        drop(runtime);
        for mode in modes {
            let course = qemu::Course { bytes, mode: *mode, writer: None, downtime_ms: 300 };
            let moved = qemu::migrate(&course).map_err(|e| format!("QEMU, {}: {e}", mode.name()))?;
            theirs.entry(*mode).or_default().push(moved.seconds);
        }
    }
    Ok((ours, theirs))
}

/// The mode with several channels whose median is the smallest.
fn best(theirs: &BTreeMap<Mode, Times>, tls: bool) -> Option<Mode> {
    let median = |times: &Times| Row::new("", "s", times.clone()).median;
    theirs
        .iter()
        .filter(|(m, _)| m.tls == tls && m.channels > 0)
        .min_by(|(_, a), (_, b)| median(a).total_cmp(&median(b)))
        .map(|(m, _)| *m)
}

fn rows(bytes: u64, ours: &[f64], theirs: &BTreeMap<Mode, Times>) -> Vec<Row> {
    let size = size(bytes);
    let rate = |times: &[f64]| times.iter().map(|t| bytes as f64 / t / 1e6).collect::<Vec<_>>();
    let mut rows = vec![
        Row::new(format!("{size} paused: ours, sealed end to end"), "s", ours.to_vec()),
        Row::new(format!("{size} paused: ours"), "MB/s", rate(ours)),
    ];
    for (mode, times) in theirs {
        rows.push(Row::new(format!("{size} paused: QEMU, {}", mode.name()), "MB/s", rate(times)));
    }
    for (tls, least) in TARGETS {
        if let Some(mode) = best(theirs, tls) {
            let name = format!("{size} paused: ours against QEMU's {}", mode.name());
            rows.push(Row::new(name, "x", ratios(&theirs[&mode], ours)).promised(Target::AtLeast(least)));
        }
    }
    rows
}

fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) {
        format!("{} GiB", bytes >> 30)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn theirs() -> BTreeMap<Mode, Times> {
        let mode = |channels, tls| Mode { channels, tls };
        [
            (mode(0, false), vec![1.0]),
            (mode(2, false), vec![4.0, 4.0, 9.0]),
            (mode(4, false), vec![3.0, 5.0, 6.0]),
            (mode(2, true), vec![8.0]),
            (mode(4, true), vec![7.0]),
        ]
        .into()
    }

    #[test]
    fn the_best_of_the_modes_with_channels_counts() {
        assert_eq!(best(&theirs(), false), Some(Mode { channels: 2, tls: false }));
        assert_eq!(best(&theirs(), true), Some(Mode { channels: 4, tls: true }));
        assert_eq!(best(&BTreeMap::new(), true), None);
    }

    #[test]
    fn ratios_are_theirs_over_ours_and_can_miss() {
        let rows = rows(1 << 30, &[2.0], &theirs());
        let of = |what: &str| rows.iter().find(|r| r.name.ends_with(what)).unwrap();
        let tls = of("QEMU's multifd 4 + TLS");
        assert!((tls.median - 3.5).abs() < 1e-9);
        assert_eq!(tls.met, Some(false));
        assert_eq!(of("QEMU's multifd 2").met, Some(false));
        let rows = super::rows(1 << 30, &[1.0], &theirs());
        assert!(rows.iter().filter(|r| r.target.is_some()).all(|r| r.met == Some(true)));
        assert!(rows[1].name.starts_with("1 GiB") && rows[1].unit == "MB/s");
    }
}
