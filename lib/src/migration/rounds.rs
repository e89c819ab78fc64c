//! Convergence: after each round, whether to go on, to slow the guest, to switch over, or to give up. Pure.

use std::time::Duration;

use crate::addr::PAGE_SIZE;
use crate::host::{MigrationLimits, OnTimeout};

/// What the last round has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Pages that moved in it.
    pub moved_pages: u64,
    /// How long it took.
    pub duration: Duration,
    /// How long it took to find the pages that wait now: the pause begins with another such look.
    pub look: Duration,
    /// Pages that wait to be sent now.
    pub dirty_pages: u64,
    /// Of these, pages that the guest wrote meanwhile; the others are left over from a round that was cut.
    pub written_pages: u64,
    /// Since the migration began to move pages.
    pub elapsed: Duration,
    /// Whether somebody asks for the switchover now, whatever it costs.
    pub asked: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the guest runs.
    Round {
        /// Share of their time that the guest's vCPUs are held meanwhile, percent.
        throttle_percent: u8,
        /// The pause that switching over now would cost.
        expected: Duration,
    },
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
/// Rounds of fewer pages say little about the rate: hand-shakes and wake-ups are most of them.
const TELLING_PAGES: u64 = 2048;
/// Steps in which a guest is slowed; the last is as slow as it gets.
const THROTTLE: [u8; 6] = [20, 40, 60, 80, 95, 99];
/// Rounds in a row that shrink too little before the next step.
const STUCK_ROUNDS: u32 = 2;

/// What earlier rounds have shown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Convergence {
    /// Pages that move per second.
    rate: Option<f64>,
    /// Rounds in a row after which more than half of what moved was dirty again.
    stuck: u32,
    throttle_percent: u8,
}

impl Convergence {
    /// Predicts the pause and decides.
    pub fn decide(&mut self, seen: &Observation, limits: &MigrationLimits) -> Decision {
        let seconds = seen.duration.as_secs_f64().max(1e-6);
        let by_link = self.note_rate(seen.moved_pages, seconds);
        let by_limit =
            limits.bandwidth_bytes_per_second.map_or(f64::INFINITY, |b| b as f64 / PAGE_SIZE as f64);
        let rate = by_link.min(by_limit).max(1.0);
        let dirty_rate = seen.written_pages as f64 / (seconds + seen.look.as_secs_f64());
        let expected = FIXED + seen.look + Duration::from_secs_f64((seen.dirty_pages as f64 / rate).min(1e9));
        let short = expected <= Duration::from_millis(limits.downtime_ms) || seen.dirty_pages <= FEW_PAGES;
        if short || seen.asked {
            return Decision::Switchover { expected };
        }
        self.stuck = if dirty_rate > rate / 2.0 { self.stuck + 1 } else { 0 };
        let late = seen.elapsed >= Duration::from_millis(limits.timeout_ms);
        match limits.on_timeout {
            OnTimeout::Force if late => return Decision::Switchover { expected },
            OnTimeout::Throttle if late && !self.is_hopeless() => self.slow_down(),
            OnTimeout::Cancel | OnTimeout::Throttle if late => {
                return Decision::NotConverging {
                    dirty_pages_per_second: dirty_rate as u64,
                    pages_per_second: rate as u64,
                };
            }
            OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Throttle if limits.auto_throttle => {
                self.slow_down()
            }
            OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Throttle => {}
        }
        Decision::Round { throttle_percent: self.throttle_percent, expected }
    }

    /// Small rounds count only while there is nothing better.
    fn note_rate(&mut self, moved_pages: u64, seconds: f64) -> f64 {
        let now = moved_pages as f64 / seconds;
        let telling = moved_pages >= TELLING_PAGES;
        let rate = match self.rate {
            Some(before) if telling => f64::midpoint(before, now),
            Some(before) => before.max(now),
            None => now,
        };
        self.rate = Some(rate);
        rate
    }

    fn slow_down(&mut self) {
        if self.stuck >= STUCK_ROUNDS
            && let Some(next) = THROTTLE.iter().find(|t| **t > self.throttle_percent)
        {
            self.throttle_percent = *next;
            self.stuck = 0;
        }
    }

    /// As slow as it gets, and still too fast.
    fn is_hopeless(&self) -> bool {
        self.stuck >= STUCK_ROUNDS && THROTTLE.last().is_some_and(|t| *t <= self.throttle_percent)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(moved_pages: u64, ms: u64, dirty_pages: u64, elapsed: u64) -> Observation {
        Observation {
            moved_pages,
            duration: Duration::from_millis(ms),
            look: Duration::ZERO,
            dirty_pages,
            written_pages: dirty_pages,
            elapsed: Duration::from_millis(elapsed),
            asked: false,
        }
    }

    fn on_timeout() -> impl Strategy<Value = OnTimeout> {
        prop_oneof![Just(OnTimeout::Cancel), Just(OnTimeout::Force), Just(OnTimeout::Throttle)]
    }

    proptest! {
        #[test]
        fn switchover_keeps_the_limit_and_the_deadline_ends_it(
            moved in 0u64..1 << 28, ms in 0u64..100_000, dirty in 0u64..1 << 28, elapsed in 0u64..100_000,
            downtime in 0u64..10_000, timeout in 0u64..100_000, bandwidth in prop::option::of(1u64 << 20..1 << 34),
            auto_throttle: bool, on_timeout in on_timeout(), asked: bool,
        ) {
            let seen = Observation { asked, ..seen(moved, ms, dirty, elapsed) };
            let limits = MigrationLimits {
                downtime_ms: downtime, timeout_ms: timeout, bandwidth_bytes_per_second: bandwidth,
                auto_throttle, on_timeout, ..Default::default()
            };
            let late = elapsed >= timeout;
            match Convergence::default().decide(&seen, &limits) {
                Decision::Switchover { expected } => prop_assert!(
                    dirty <= FEW_PAGES
                        || expected <= Duration::from_millis(downtime)
                        || asked
                        || (late && on_timeout == OnTimeout::Force)
                ),
                Decision::NotConverging { .. } => {
                    prop_assert!(late && dirty > FEW_PAGES && !asked && on_timeout == OnTimeout::Cancel);
                }
                Decision::Round { throttle_percent, .. } => {
                    prop_assert!(dirty > FEW_PAGES && !asked && (!late || on_timeout == OnTimeout::Throttle));
                    prop_assert_eq!(throttle_percent, 0, "one round is no reason yet");
                }
            }
        }

        /// A guest whose writes are proportional to the time that it may run, and a link of constant rate.
        #[test]
        fn a_throttled_guest_ends_in_a_switchover_within_the_limit_or_in_a_verdict(
            pages in 10_000u64..1_000_000, dirty_rate in 1_000.0f64..2_000_000.0, rate in 10_000.0f64..1_000_000.0,
            downtime_ms in 20u64..2_000, late: bool,
        ) {
            let limits = MigrationLimits {
                downtime_ms,
                timeout_ms: if late { 0 } else { u64::MAX },
                on_timeout: if late { OnTimeout::Throttle } else { OnTimeout::Cancel },
                auto_throttle: !late,
                ..Default::default()
            };
            let (mut course, mut left, mut throttle, mut before) = (Convergence::default(), pages, 0, 0);
            for round in 0.. {
                prop_assert!(round < 2_000, "it goes on for ever");
                let seconds = left as f64 / rate;
                let written = dirty_rate * f64::from(100 - throttle) / 100.0 * seconds;
                let written = (written as u64).min(pages);
                let mut seen = seen(left, 0, written, round);
                seen.duration = Duration::from_secs_f64(seconds.max(1e-6));
                match course.decide(&seen, &limits) {
                    Decision::Switchover { expected } => {
                        prop_assert!(expected <= Duration::from_millis(downtime_ms) || written <= FEW_PAGES);
                        break;
                    }
                    Decision::NotConverging { .. } => {
                        prop_assert!(late && throttle == 99, "given up at {}", throttle);
                        break;
                    }
                    Decision::Round { throttle_percent, .. } => {
                        prop_assert!(throttle_percent >= before, "a guest is never hastened");
                        (throttle, before) = (throttle_percent, throttle_percent);
                    }
                }
                // Without a deadline a guest that is too fast even at one percent goes on: that is what timeouts are for.
                if !late && throttle == 99 && course.stuck > 10 {
                    break;
                }
                left = written.max(1);
            }
        }
    }

    #[test]
    fn an_idle_guest_switches_over_at_once() {
        let limits = MigrationLimits { downtime_ms: 0, ..Default::default() };
        let decision = Convergence::default().decide(&seen(1 << 18, 1000, 0, 1000), &limits);
        assert!(matches!(decision, Decision::Switchover { .. }));
    }

    #[test]
    fn looking_for_pages_is_a_part_of_the_pause() {
        let limits = MigrationLimits { downtime_ms: 100, ..Default::default() };
        let quick = seen(100_000, 1000, 5_000, 1000);
        let slow = Observation { look: Duration::from_millis(60), ..quick };
        let decide = |seen| Convergence::default().decide(&seen, &limits);
        let Decision::Switchover { expected } = decide(quick) else { panic!("50 ms of pages") };
        let Decision::Round { expected: with_look, .. } = decide(slow) else { panic!("110 ms and more") };
        assert_eq!(with_look, expected + Duration::from_millis(60));
    }

    #[test]
    fn a_short_round_does_not_spoil_the_rate() {
        let limits = MigrationLimits { downtime_ms: 20, ..Default::default() };
        let mut course = Convergence::default();
        // 1 GiB in a second, then a few pages that mostly waited for hand-shakes: 2,000 more would still take 8 ms.
        course.decide(&seen(262_144, 1000, 100_000, 1000), &limits);
        let decision = course.decide(&seen(100, 10, 2_000, 1010), &limits);
        assert!(matches!(decision, Decision::Switchover { .. }), "{decision:?}");
    }
}
