//! Convergence: after each round, whether to go on, to switch over, or to give up. Pure.

use std::time::Duration;

use crate::addr::PAGE_SIZE;
use crate::host::MigrationLimits;

/// What the rounds so far have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Pages that moved in the last round.
    pub moved_pages: u64,
    /// How long it took.
    pub duration: Duration,
    /// How long it took to find the pages that wait now: the pause begins with another such look.
    pub look: Duration,
    /// Pages that wait to be sent now.
    pub dirty_pages: u64,
    /// Since the migration began to move pages.
    pub elapsed: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the guest runs.
    Round,
    /// Pause and send the rest.
    Switchover {
        /// The pause that this will cost, as predicted.
        expected: Duration,
    },
    /// The deadline has passed and the rest is too much.
    NotConverging {
        /// Pages the guest dirties per second.
        dirty_pages_per_second: u64,
        /// Pages that move per second.
        pages_per_second: u64,
    },
}

/// What pausing, state and tokens cost whatever the number of pages.
const FIXED: Duration = Duration::from_millis(8);
/// So few pages are never worth another round.
const FEW_PAGES: u64 = 64;

/// Predicts the pause and decides.
pub fn decide(seen: &Observation, limits: &MigrationLimits) -> Decision {
    let seconds = seen.duration.as_secs_f64().max(1e-6);
    let by_link = seen.moved_pages as f64 / seconds;
    let by_limit = limits.bandwidth_bytes_per_second.map_or(f64::INFINITY, |b| b as f64 / PAGE_SIZE as f64);
    let rate = by_link.min(by_limit).max(1.0);
    let expected = FIXED + seen.look + Duration::from_secs_f64((seen.dirty_pages as f64 / rate).min(1e9));
    let short = expected <= Duration::from_millis(limits.downtime_ms) || seen.dirty_pages <= FEW_PAGES;
    if short {
        Decision::Switchover { expected }
    } else if seen.elapsed >= Duration::from_millis(limits.timeout_ms) {
        Decision::NotConverging {
            dirty_pages_per_second: (seen.dirty_pages as f64 / (seconds + seen.look.as_secs_f64())) as u64,
            pages_per_second: rate as u64,
        }
    } else {
        Decision::Round
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn switchover_keeps_the_limit_and_the_deadline_ends_it(
            moved in 0u64..1 << 28, ms in 0u64..100_000, look in 0u64..2_000, dirty in 0u64..1 << 28, elapsed in 0u64..100_000,
            downtime in 0u64..10_000, timeout in 0u64..100_000, bandwidth in prop::option::of(1u64 << 20..1 << 34),
        ) {
            let seen = Observation {
                moved_pages: moved, duration: Duration::from_millis(ms), look: Duration::from_millis(look), dirty_pages: dirty,
                elapsed: Duration::from_millis(elapsed),
            };
            let limits = MigrationLimits {
                downtime_ms: downtime, timeout_ms: timeout, bandwidth_bytes_per_second: bandwidth,
                ..Default::default()
            };
            match decide(&seen, &limits) {
                Decision::Switchover { expected } => prop_assert!(
                    dirty <= FEW_PAGES || expected <= Duration::from_millis(downtime)
                ),
                Decision::NotConverging { .. } => prop_assert!(elapsed >= timeout && dirty > FEW_PAGES),
                Decision::Round => prop_assert!(elapsed < timeout && dirty > FEW_PAGES),
            }
        }
    }

    #[test]
    fn an_idle_guest_switches_over_at_once() {
        let seen = Observation {
            moved_pages: 1 << 18,
            duration: Duration::from_secs(1),
            look: Duration::ZERO,
            dirty_pages: 0,
            elapsed: Duration::from_secs(1),
        };
        let limits = MigrationLimits { downtime_ms: 0, ..Default::default() };
        assert!(matches!(decide(&seen, &limits), Decision::Switchover { .. }));
    }
}
