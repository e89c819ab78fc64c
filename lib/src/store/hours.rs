//! How much time has passed: what is good for a while goes by it, and by no clock that somebody sets.
//!
//! Owns: the count of time, and how it goes on over restarts. Must not know: what ends when.
//!
//! Within one boot of the machine its clock since boot counts: nobody sets it, and it goes on while the
//! machine sleeps. For how long a machine was off only the wall clock can say, and that may have been set
//! meanwhile. So there are two counts. At least so much has passed: what must not be forgotten early goes by
//! it. At most so much: what must not be good for too long goes by that, so that a clock that goes back over
//! a boot makes nothing good again.

use std::time::Duration;

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

use super::form::{form, unchanged};

/// Key of the document with the counts as of the last time that they were noted.
pub(super) const KEY: &str = "hours";
/// Between two notes, also while nothing else is written: what a machine that loses its power forgets at
/// most.
pub(super) const NOTE_EVERY: Duration = Duration::from_secs(3600);

/// The clocks of the machine.
pub(super) trait Clocks: Send + Sync {
    /// What only this boot of the machine has.
    fn boot(&self) -> Option<String>;
    /// Milliseconds since then, those that it slept included.
    fn since_boot(&self) -> i64;
    /// Milliseconds since 1970, as far as anybody knows.
    fn wall(&self) -> i64;
}

/// Those of the kernel.
pub(super) struct Kernel;

impl Clocks for Kernel {
    fn boot(&self) -> Option<String> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty())
    }

    fn since_boot(&self) -> i64 {
        let t = clock_gettime(ClockId::Boottime);
        t.tv_sec.saturating_mul(1000).saturating_add(t.tv_nsec / 1_000_000)
    }

    fn wall(&self) -> i64 {
        Timestamp::now().as_millisecond()
    }
}

/// Which of the two counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    /// So much has passed, if not more.
    AtLeast,
    /// No more has passed.
    AtMost,
}

/// The counts at one moment, in milliseconds, and what the clocks said then. Both began with the wall clock's
/// milliseconds since 1970, which is what earlier builds have noted as ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    at_least: i64,
    at_most: i64,
    boot: Option<String>,
    since_boot: i64,
    wall: i64,
}

form! {
    NoteForm of Note, version 5 by unchanged {
        at_least: i64,
        at_most: i64,
        boot: Option<String>,
        since_boot: i64,
        wall: i64,
    }
}

impl Note {
    /// The note of a database that has none yet.
    fn first(clocks: &dyn Clocks) -> Self {
        let wall = clocks.wall();
        Self { at_least: wall, at_most: wall, boot: clocks.boot(), since_boot: clocks.since_boot(), wall }
    }

    /// The counts now, from those of an earlier daemon.
    fn go_on(&self, clocks: &dyn Clocks) -> Self {
        let (boot, since_boot, wall) = (clocks.boot(), clocks.since_boot(), clocks.wall());
        let went = since_boot.saturating_sub(self.since_boot);
        let (least, most) = match (&self.boot, &boot) {
            (Some(then), Some(now)) if then == now && went >= 0 => (went, went),
            // Another boot: all of it came after the note.
            (Some(then), Some(now)) if then != now => {
                let least = since_boot.max(0);
                (least, wall.saturating_sub(self.wall).max(least))
            }
            // A machine that was put back to an earlier moment, or one that does not tell its boots apart.
            _ => (0, wall.saturating_sub(self.wall).max(0)),
        };
        Self {
            at_least: self.at_least.saturating_add(least),
            at_most: self.at_most.saturating_add(most),
            boot,
            since_boot,
            wall,
        }
    }
}

/// Time as this daemon counts it.
pub(super) struct Hours {
    began: Note,
    clocks: Box<dyn Clocks>,
}

impl Hours {
    /// Goes on from what an earlier daemon noted.
    pub fn new(noted: Option<&Note>, clocks: Box<dyn Clocks>) -> Self {
        let began = noted.map_or_else(|| Note::first(&*clocks), |noted| noted.go_on(&*clocks));
        Self { began, clocks }
    }

    /// What an end is compared with.
    pub fn now(&self, count: Count) -> i64 {
        let passed = self.clocks.since_boot().saturating_sub(self.began.since_boot).max(0);
        match count {
            Count::AtLeast => self.began.at_least.saturating_add(passed),
            Count::AtMost => self.began.at_most.saturating_add(passed),
        }
    }

    /// The end of what is good for `life` from now on.
    pub fn end_of(&self, count: Count, life: Duration) -> i64 {
        self.now(count).saturating_add(i64::try_from(life.as_millis()).unwrap_or(i64::MAX))
    }

    /// How long something is good that ends at `end`.
    pub fn left(&self, count: Count, end: i64) -> Duration {
        Duration::from_millis(u64::try_from(end.saturating_sub(self.now(count))).unwrap_or(0))
    }

    /// What the next daemon goes on from.
    pub fn note(&self) -> Note {
        self.began.go_on(&*self.clocks)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;

    const HOUR: i64 = 3_600_000;
    const YEAR: i64 = 365 * 24 * HOUR;
    /// 2026, about.
    const BEGAN: i64 = 56 * YEAR;

    /// Clocks that a test sets.
    #[derive(Clone, Debug)]
    pub struct Hands {
        pub boot: Option<&'static str>,
        pub since_boot: i64,
        pub wall: i64,
    }

    #[derive(Clone)]
    pub struct Set(pub Arc<Mutex<Hands>>);

    impl Set {
        pub fn new() -> Self {
            Self(Arc::new(Mutex::new(Hands { boot: Some("one"), since_boot: 5 * HOUR, wall: BEGAN })))
        }

        pub fn change(&self, change: impl FnOnce(&mut Hands)) {
            change(&mut self.0.lock().unwrap());
        }

        /// Time passes while the machine is on.
        pub fn pass(&self, milliseconds: i64) {
            self.change(|h| {
                h.since_boot += milliseconds;
                h.wall += milliseconds;
            });
        }

        /// The machine is off for a while, and starts again.
        pub fn reboot(&self, boot: &'static str, off: i64) {
            self.change(|h| *h = Hands { boot: Some(boot), since_boot: 1000, wall: h.wall + off });
        }
    }

    impl Clocks for Set {
        fn boot(&self) -> Option<String> {
            self.0.lock().unwrap().boot.map(str::to_owned)
        }

        fn since_boot(&self) -> i64 {
            self.0.lock().unwrap().since_boot
        }

        fn wall(&self) -> i64 {
            self.0.lock().unwrap().wall
        }
    }

    fn both(hours: &Hours) -> (i64, i64) {
        (hours.now(Count::AtLeast) - BEGAN, hours.now(Count::AtMost) - BEGAN)
    }

    fn again(hours: &Hours, set: &Set) -> Hours {
        Hours::new(Some(&hours.note()), Box::new(set.clone()))
    }

    #[test]
    fn a_wall_clock_that_is_set_neither_takes_nor_gives_time() {
        let set = Set::new();
        let hours = Hours::new(None, Box::new(set.clone()));
        for step in [11 * YEAR, -30 * YEAR, HOUR] {
            set.change(|h| h.wall += step);
            assert_eq!(both(&hours), (0, 0));
            assert_eq!(both(&again(&hours, &set)), (0, 0), "the daemon is started again");
        }
        set.pass(2 * HOUR);
        assert_eq!(both(&hours), (2 * HOUR, 2 * HOUR));
        let end = hours.end_of(Count::AtMost, Duration::from_secs(60));
        assert_eq!(hours.left(Count::AtMost, end), Duration::from_secs(60));
        set.pass(HOUR);
        assert_eq!(hours.left(Count::AtMost, end), Duration::ZERO);
    }

    #[test]
    fn a_daemon_that_was_away_counts_the_time_that_it_was() {
        let set = Set::new();
        let note = Hours::new(None, Box::new(set.clone())).note();
        set.pass(9 * HOUR);
        set.change(|h| h.wall -= 20 * YEAR);
        let later = Hours::new(Some(&note), Box::new(set));
        assert_eq!(both(&later), (9 * HOUR, 9 * HOUR));
    }

    #[test]
    fn over_a_boot_what_was_promised_is_kept_and_what_is_good_is_not_good_for_longer() {
        let set = Set::new();
        let note = Hours::new(None, Box::new(set.clone())).note();
        set.reboot("two", 10 * HOUR);
        let hours = Hours::new(Some(&note), Box::new(set.clone()));
        assert_eq!(both(&hours), (1000, 10 * HOUR));
        // Its battery is empty: the clock begins anew.
        set.reboot("three", -40 * YEAR);
        assert_eq!(both(&again(&hours, &set)), (2000, 10 * HOUR + 1000), "noted on the way");
        let hours = Hours::new(Some(&note), Box::new(set.clone()));
        assert_eq!(both(&hours), (1000, 1000), "not noted");
        // Ahead, and right again: nobody can say that it was not so, and what is made now is good for as long
        // as it should be.
        set.reboot("four", 60 * YEAR);
        let hours = again(&hours, &set);
        set.change(|h| h.wall -= 20 * YEAR);
        let end = hours.end_of(Count::AtMost, Duration::from_secs(3600));
        set.pass(HOUR - 1);
        assert_eq!(hours.left(Count::AtMost, end), Duration::from_millis(1));
        let (least, most) = both(&hours);
        assert!(least < 2 * HOUR && most > 19 * YEAR, "{least} {most}");
    }

    #[test]
    fn a_machine_that_does_not_tell_its_boots_apart_takes_no_time_from_anybody() {
        let set = Set::new();
        set.change(|h| h.boot = None);
        let note = Hours::new(None, Box::new(set.clone())).note();
        set.pass(HOUR);
        assert_eq!(both(&Hours::new(Some(&note), Box::new(set))), (0, HOUR));
        // Put back to an earlier moment of the same boot.
        let set = Set::new();
        let note = Hours::new(None, Box::new(set.clone())).note();
        set.change(|h| h.since_boot -= 2 * HOUR);
        assert_eq!(both(&Hours::new(Some(&note), Box::new(set))), (0, 0));
    }

    proptest! {
        #[test]
        fn no_count_ever_goes_back_and_neither_is_past_what_has_passed(
            steps in proptest::collection::vec((0_u8..4, 0_i64..100 * HOUR, any::<bool>()), 1..20),
        ) {
            let set = Set::new();
            let mut hours = Hours::new(None, Box::new(set.clone()));
            let (mut passed, mut before) = (0, (0, 0));
            for (n, (what, time, back)) in steps.into_iter().enumerate() {
                match what {
                    0 => {
                        set.pass(time);
                        passed += time;
                    }
                    1 => set.change(|h| h.wall += if back { -time } else { time }),
                    2 => hours = again(&hours, &set),
                    _ => {
                        let note = hours.note();
                        set.reboot(["a", "b"][n % 2], time);
                        passed += time;
                        hours = Hours::new(Some(&note), Box::new(set.clone()));
                    }
                }
                let now = both(&hours);
                prop_assert!(now.0 >= before.0 && now.1 >= before.1 && now.0 <= now.1);
                prop_assert!(now.0 <= passed + 1000 * (n as i64 + 1), "{now:?} of {passed}");
                before = now;
            }
        }
    }
}
