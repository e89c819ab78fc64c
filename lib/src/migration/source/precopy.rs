//! Rounds while the guest runs. Why no page is missed is in docs/rounds.md.

use std::time::{Duration, Instant};

use super::{Course, Ends, whole_ms};
use crate::migration::finder::Finder;
use crate::migration::rounds::{Bound, Convergence, Decision, Observation, ends_at};
use crate::migration::{MigrationFault, MigrationLimits, MigrationState};
use crate::pages::PageSet;

/// How long rounds that would only cost are put off.
const REST: Duration = Duration::from_millis(500);

impl Course<'_, '_> {
    /// Rounds while the guest runs, until what is left fits the downtime limit, or must go anyway. Gives what
    /// the pause has to keep to.
    pub(super) fn precopy(
        &mut self,
        ends: &mut Ends,
        left: &mut PageSet,
        finder: &Finder,
        begun: Instant,
        course: &mut Convergence,
    ) -> Result<Option<Bound>, MigrationFault> {
        let control = self.out.control;
        control.enter(MigrationState::Precopy);
        loop {
            self.check()?;
            let (mut round, settled) = self.round(ends, left, Some(begun))?;
            course.settled(settled);
            let duration = Duration::from_micros(round.duration_us);
            let mut seen = Observation {
                moved_pages: round.pages_sealed + round.pages_shared,
                duration,
                look: Duration::ZERO,
                dirty_pages: left.len(),
                written_pages: 0,
                elapsed: begun.elapsed(),
                asked: control.wants_switchover(),
            };
            // What is left already may be the verdict: no scan of all RAM beyond the deadline then.
            let mut already = *course;
            if finder.is_slow()
                && let Decision::NotConverging { pages_per_second, .. } =
                    already.decide(&seen, &control.limits())
            {
                return Err(self.not_converging(pages_per_second));
            }
            let (streams, epoch) = (ends.streams.len(), ends.sent.epoch);
            let look = finder.look(self.machine, self.mirror, streams, epoch, control, left)?;
            seen.look = look.took;
            seen.dirty_pages = left.len();
            seen.written_pages = look.written_pages;
            seen.elapsed = begun.elapsed();
            seen.asked = control.wants_switchover();
            round.dirtied_pages = seen.written_pages;
            let limits = control.limits();
            let decision = course.decide(&seen, &limits);
            let floor = course.floor(seen.look);
            control.update(|l| {
                l.progress.dirty_pages_per_second = course.dirty_rate();
                l.progress.downtime_floor_ms = Some(whole_ms(floor));
                if let Decision::Round { expected, .. } | Decision::Switchover { expected, .. } = decision {
                    l.progress.expected_downtime_ms = Some(whole_ms(expected));
                }
                l.push_round(round);
            });
            match decision {
                Decision::Round { throttle_percent, .. } => self.throttle(throttle_percent)?,
                Decision::Switchover { bound, .. } => return Ok(bound),
                Decision::NotConverging { pages_per_second, .. } => {
                    return Err(self.not_converging(pages_per_second));
                }
            }
            if course.may_rest(&seen, &limits) {
                self.rest(begun, &limits);
            }
        }
    }

    /// A verdict with what was seen last.
    pub(super) fn not_converging(&self, pages_per_second: u64) -> MigrationFault {
        let (p, limit) = (self.out.control.live().progress, self.out.control.limits().downtime_ms);
        MigrationFault::NotConverging {
            dirty_pages_per_second: p.dirty_pages_per_second,
            pages_per_second,
            floor_ms: p.downtime_floor_ms.filter(|floor| *floor > limit),
        }
    }

    /// Waits where rounds would only cost, until something changes: at most half a second.
    fn rest(&self, begun: Instant, limits: &MigrationLimits) {
        let control = self.out.control;
        let by = Instant::now() + REST;
        let by = ends_at(begun, limits).map_or(by, |at| at.min(by));
        let changed = || {
            control.is_cancelled()
                || control.wants_switchover()
                || control.limits() != *limits
                || self.machine.ended().is_some()
        };
        while Instant::now() < by && !changed() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn throttle(&mut self, percent: u8) -> Result<(), MigrationFault> {
        // Such limits are refused before the start; those of a record from before that was so change nothing
        // here.
        if percent > 0 && !self.machine.can_throttle() {
            return Ok(());
        }
        if self.out.control.live().progress.throttle_percent != percent {
            self.machine.throttle(percent)?;
            self.out.control.update(|l| l.progress.throttle_percent = percent);
        }
        Ok(())
    }
}
