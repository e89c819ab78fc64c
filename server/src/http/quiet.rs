//! Lines of the log that strangers cause are bounded: nobody fills the disk by being refused.
//!
//! Owns: how many lines of each kind are written, and the count of those that are not. Must not know: what
//! the lines say.

use mirrorvm::sync::Locked;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How many lines of one kind may be written at once.
const BURST: f64 = 50.0;
/// How many lines of one kind may be written per second after that.
const PER_SECOND: f64 = 1.0;
/// How often the number of lines left out is logged.
pub const SUM_UP: Duration = Duration::from_secs(30);

static LOG: Quiet = Quiet::new();

/// Whether a line of `kind` may be written now: then, how many of its kind were left out before it. Kinds are
/// the program's own, such as the codes of problems, so that a flood of one kind does not hide another.
pub fn admits(kind: &'static str) -> Option<u64> {
    LOG.admits_at(kind, Instant::now())
}

/// Logs how many lines were left out since the last time, with one line for each kind.
pub fn sum_up() {
    for (kind, left_out) in LOG.left_out() {
        tracing::info!(kind, left_out, "lines were left out of the log");
    }
}

/// Bounds the lines of each kind.
#[derive(Debug)]
struct Quiet(Mutex<BTreeMap<&'static str, Level>>);

#[derive(Debug)]
struct Level {
    left: f64,
    at: Instant,
    left_out: u64,
}

impl Quiet {
    const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn admits_at(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut levels = self.0.locked();
        let level = levels.entry(kind).or_insert(Level { left: BURST, at: now, left_out: 0 });
        let passed = now.saturating_duration_since(level.at).as_secs_f64();
        level.left = (level.left + passed * PER_SECOND).min(BURST);
        level.at = now;
        if level.left < 1.0 {
            level.left_out += 1;
            return None;
        }
        level.left -= 1.0;
        Some(std::mem::take(&mut level.left_out))
    }

    fn left_out(&self) -> Vec<(&'static str, u64)> {
        let mut levels = self.0.locked();
        let counts = levels.iter_mut().map(|(kind, level)| (*kind, std::mem::take(&mut level.left_out)));
        counts.filter(|(_, left_out)| *left_out > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_kind_is_cut_and_counted_and_hides_no_other() {
        let (quiet, now) = (Quiet::new(), Instant::now());
        let said = (0..10_000).filter(|_| quiet.admits_at("flood", now).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(quiet.admits_at("other", now), Some(0));
        let later = now + Duration::from_secs(1);
        assert_eq!(quiet.admits_at("flood", later), Some(10_000 - BURST as u64));
        assert_eq!(quiet.admits_at("flood", later), None);
        assert_eq!(quiet.left_out(), [("flood", 1)]);
        assert_eq!(quiet.left_out(), []);
        assert_eq!(quiet.admits_at("flood", later + Duration::from_secs(1)), Some(0), "each is counted once");
    }
}
