//! Convergence: after each round, whether to go on, to slow the guest, to switch over, or to give up. Pure.
//!
//! A limit of the pause holds up to what is stated here. The guest is paused only when the whole pause is
//! predicted to fit: leaving, the last look, the last pages, arriving. What a pause costs without a page is
//! assumed at first, and learnt from pauses that turned out too long: such a pause is broken off while it can
//! be (until START), the guest goes on where it was, and the next attempt waits, longer each time. After
//! START nothing can be broken off; what the destination then takes beyond the prediction, and [`tolerance`],
//! are all that a pause may exceed its limit by.

use std::time::{Duration, Instant};

use super::{MigrationLimits, OnTimeout};
use crate::addr::PAGE_SIZE;

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
#[derive(Clone, Copy, Debug, PartialEq)]
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
        /// What the pause must keep to; `None`: it was asked for, or is forced, and takes what it takes.
        bound: Option<Bound>,
    },
    /// The deadline has passed and the rest is too much.
    NotConverging {
        /// Pages that move per second.
        pages_per_second: u64,
    },
}

/// What a pause costs whatever the number of pages, the last look apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed {
    /// Stopping the guest and saving its state.
    pub leave: Duration,
    /// From the last page to the destination's word that it has them all.
    pub settle: Duration,
    /// Sending the state, setting it there, noting the hand-over at both hosts.
    pub arrive: Duration,
}

impl Fixed {
    /// What to assume before anything was measured: of a machine in this process, or in one of its own, whose
    /// monitor is spoken to and whose devices are saved and set.
    pub const fn assumed(own_process: bool) -> Self {
        let (leave, arrive) = if own_process { (10, 15) } else { (1, 5) };
        let ms = Duration::from_millis;
        Self { leave: ms(leave), settle: ms(2), arrive: ms(arrive) }
    }

    /// All of it.
    pub fn total(&self) -> Duration {
        self.leave + self.settle + self.arrive
    }
}

/// What a pause is to keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    limit: Duration,
    pages_per_second: f64,
    settle: Duration,
    arrive: Duration,
}

impl Bound {
    /// Whether a pause that has taken `spent` so far will end within the limit and its `tolerance`, `pages`
    /// being left.
    pub fn holds(&self, spent: Duration, pages: u64) -> bool {
        let rest =
            if pages == 0 { Duration::ZERO } else { self.settle + moving(pages, self.pages_per_second) };
        spent + rest + self.arrive <= self.limit + tolerance(self.limit)
    }
}

/// By how much a pause may miss its limit and is still not broken off: a tenth, at least 5 ms.
pub fn tolerance(limit: Duration) -> Duration {
    (limit / 10).max(Duration::from_millis(5))
}

/// When a live round has to end even if pages are left; `None`: the guest is only slowed then.
pub fn ends_at(begun: Instant, limits: &MigrationLimits) -> Option<Instant> {
    match limits.on_timeout {
        OnTimeout::Cancel | OnTimeout::Force => begun.checked_add(Duration::from_millis(limits.timeout_ms)),
        OnTimeout::Throttle => None,
    }
}

fn moving(pages: u64, pages_per_second: f64) -> Duration {
    Duration::from_secs_f64((pages as f64 / pages_per_second.max(1.0)).min(1e9))
}

/// Rounds of fewer pages say little about the rate: hand-shakes and wake-ups are most of them.
const TELLING_PAGES: u64 = 2048;
/// Steps in which a guest is slowed; the last is as slow as it gets.
const THROTTLE: [u8; 6] = [20, 40, 60, 80, 95, 99];
/// Rounds in a row that shrink too little before the next step.
const STUCK_ROUNDS: u32 = 2;
/// Time after a pause that was broken off before the next is tried: from, doubled each time, and to.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Pauses that are tried on the first assumption, whatever those before took: one that was long may have been
/// a hiccup of the machine. After as many, the shortest of them counts.
const HOPEFUL: u32 = 8;

/// Pauses that were broken off before the shortest of them is taken for what a pause costs: of one it is not
/// known whether the machine had a hiccup.
const TELLING_PAUSES: u32 = 2;

/// How long a guest's writes are remembered where their rate is told.
const LATELY: Duration = Duration::from_secs(1);

/// What earlier rounds have shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Convergence {
    /// Pages that move per second.
    rate: Option<f64>,
    /// Rounds in a row after which more than half of what moved was dirty again.
    stuck: u32,
    throttle_percent: u8,
    assumed: Fixed,
    /// The least that a pause of this migration took to leave.
    left_in: Option<Duration>,
    /// Pauses that were broken off.
    pauses: u32,
    /// The least that an epoch took to settle.
    settled_in: Option<Duration>,
    /// Pauses that were broken off since the limit was last raised.
    broken_off: u32,
    /// The limit then.
    under_ms: u64,
    /// Since the first page: before that no other pause is tried.
    not_before: Duration,
    /// Pages that the guest wrote lately, and the time that it took to.
    written: (f64, Duration),
}

impl Convergence {
    /// Before the first round.
    pub const fn new(assumed: Fixed) -> Self {
        Self {
            rate: None,
            stuck: 0,
            throttle_percent: 0,
            assumed,
            left_in: None,
            pauses: 0,
            settled_in: None,
            broken_off: 0,
            under_ms: 0,
            not_before: Duration::ZERO,
            written: (0.0, Duration::ZERO),
        }
    }

    /// Pages per second that the guest wrote lately. A round that a deadline cuts to a few milliseconds may
    /// meet a guest between two of its writes: it says nothing of the guest by itself.
    pub fn dirty_rate(&self) -> u64 {
        let (pages, within) = self.written;
        if within.is_zero() { 0 } else { (pages / within.as_secs_f64()) as u64 }
    }

    fn note_written(&mut self, pages: u64, within: Duration) {
        let (before, took) = self.written;
        // What is older than that counts as that long only, at the rate that it had.
        let kept = took.min(LATELY);
        let share = if took.is_zero() { 0.0 } else { kept.as_secs_f64() / took.as_secs_f64() };
        self.written = (before * share + pages as f64, kept + within);
    }

    /// Notes how long an epoch took from its last page to the destination's word.
    pub fn settled(&mut self, took: Duration) {
        self.settled_in = Some(self.settled_in.map_or(took, |before| before.min(took)));
    }

    /// Notes a pause that was broken off after `leave` for stopping and saving.
    pub fn went_back(&mut self, leave: Duration, elapsed: Duration, limits: &MigrationLimits) {
        self.left_in = Some(self.left_in.map_or(leave, |before| before.min(leave)));
        self.pauses += 1;
        self.under_ms = limits.downtime_ms;
        let wait = AGAIN.0.saturating_mul(1 << self.broken_off.min(10)).min(AGAIN.1);
        self.broken_off += 1;
        self.not_before = elapsed + wait;
    }

    fn fixed(&self) -> Fixed {
        let left_in = self.left_in.filter(|_| self.pauses >= TELLING_PAUSES);
        Fixed {
            leave: left_in.unwrap_or(self.assumed.leave),
            settle: self.settled_in.unwrap_or(self.assumed.settle),
            // Setting a state takes about as long as saving it.
            arrive: self.assumed.arrive.max(left_in.unwrap_or_default()),
        }
    }

    /// What the next attempt is measured by.
    fn hoped(&self) -> Fixed {
        if self.broken_off >= HOPEFUL {
            return self.fixed();
        }
        Fixed { settle: self.fixed().settle, ..self.assumed }
    }

    /// The shortest pause that can be had when a look takes that long, with no page left to send, as far as
    /// is known.
    pub fn floor(&self, look: Duration) -> Duration {
        self.fixed().total() + look
    }

    /// Predicts the pause and decides.
    pub fn decide(&mut self, seen: &Observation, limits: &MigrationLimits) -> Decision {
        let seconds = seen.duration.as_secs_f64().max(1e-6);
        let by_link = self.note_rate(seen.moved_pages, seconds);
        let by_limit =
            limits.bandwidth_bytes_per_second.map_or(f64::INFINITY, |b| b as f64 / PAGE_SIZE as f64);
        let rate = by_link.min(by_limit).max(1.0);
        let dirty_rate = seen.written_pages as f64 / (seconds + seen.look.as_secs_f64());
        self.note_written(seen.written_pages, seen.duration + seen.look);
        let limit = Duration::from_millis(limits.downtime_ms);
        let floor = self.floor(seen.look);
        let expected = floor + moving(seen.dirty_pages, rate);
        // Whoever raises the limit wants another attempt.
        if limits.downtime_ms > self.under_ms {
            (self.broken_off, self.not_before) = (0, Duration::ZERO);
        }
        if seen.asked {
            return Decision::Switchover { expected, bound: None };
        }
        let hoped = self.hoped();
        let expected_at_best = hoped.total() + seen.look + moving(seen.dirty_pages, rate);
        if expected_at_best <= limit && seen.elapsed >= self.not_before {
            let (expected, Fixed { settle, arrive, .. }) = (expected_at_best, hoped);
            let bound = Some(Bound { limit, pages_per_second: rate, settle, arrive });
            return Decision::Switchover { expected, bound };
        }
        self.stuck = if dirty_rate > rate / 2.0 { self.stuck + 1 } else { 0 };
        let late = seen.elapsed >= Duration::from_millis(limits.timeout_ms);
        match limits.on_timeout {
            OnTimeout::Force if late => return Decision::Switchover { expected, bound: None },
            OnTimeout::Throttle if late && !self.is_hopeless() && floor <= limit => self.slow_down(),
            OnTimeout::Cancel | OnTimeout::Throttle if late => {
                return Decision::NotConverging { pages_per_second: rate as u64 };
            }
            OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Throttle if limits.auto_throttle => {
                self.slow_down()
            }
            OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Throttle => {}
        }
        Decision::Round { throttle_percent: self.throttle_percent, expected }
    }

    /// Whether the next round can wait a little: it would move next to nothing, and no pause is tried after
    /// it.
    pub fn may_rest(&self, seen: &Observation, limits: &MigrationLimits) -> bool {
        let waits = self.floor(seen.look) > Duration::from_millis(limits.downtime_ms)
            || seen.elapsed < self.not_before;
        waits && seen.dirty_pages < TELLING_PAGES
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

    /// The shortest pause of a machine in this process, before anything was measured.
    const FLOOR: Duration = Duration::from_millis(8);

    fn fresh() -> Convergence {
        Convergence::new(Fixed::assumed(false))
    }

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
            match Convergence::new(Fixed::assumed(false)).decide(&seen, &limits) {
                Decision::Switchover { expected, bound: Some(bound) } => {
                    prop_assert!(expected <= Duration::from_millis(downtime) && !asked);
                    prop_assert!(bound.holds(Duration::ZERO, dirty), "what is predicted to fit is begun");
                    prop_assert!(!bound.holds(Duration::from_millis(downtime + downtime / 10 + 6), 0));
                }
                Decision::Switchover { bound: None, .. } => {
                    prop_assert!(asked || (late && on_timeout == OnTimeout::Force));
                }
                Decision::NotConverging { .. } => {
                    prop_assert!(late && !asked && on_timeout != OnTimeout::Force);
                    let floor = FLOOR > Duration::from_millis(downtime);
                    prop_assert!(on_timeout == OnTimeout::Cancel || floor, "no throttling helps against it");
                }
                Decision::Round { throttle_percent, expected } => {
                    prop_assert!(!asked && (!late || on_timeout == OnTimeout::Throttle));
                    prop_assert!(expected > Duration::from_millis(downtime));
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
            let (mut course, mut left, mut throttle, mut before) = (Convergence::new(Fixed::assumed(false)), pages, 0, 0);
            for round in 0.. {
                prop_assert!(round < 2_000, "it goes on for ever");
                let seconds = left as f64 / rate;
                let written = dirty_rate * f64::from(100 - throttle) / 100.0 * seconds;
                let written = (written as u64).min(pages);
                let mut seen = seen(left, 0, written, round);
                seen.duration = Duration::from_secs_f64(seconds.max(1e-6));
                match course.decide(&seen, &limits) {
                    Decision::Switchover { expected, .. } => {
                        prop_assert!(expected <= Duration::from_millis(downtime_ms));
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
                // Without a deadline a guest that is too fast even at one percent goes on: that is what
                // timeouts are for.
                if !late && throttle == 99 && course.stuck > 10 {
                    break;
                }
                left = written.max(1);
            }
        }
    }

    #[test]
    fn an_idle_guest_switches_over_at_once_if_any_pause_fits_the_limit() {
        for (downtime_ms, switches) in [(0, false), (7, false), (8, true), (300, true)] {
            let limits = MigrationLimits { downtime_ms, ..Default::default() };
            let decision = fresh().decide(&seen(1 << 18, 1000, 0, 1000), &limits);
            assert_eq!(
                matches!(decision, Decision::Switchover { .. }),
                switches,
                "{downtime_ms}: {decision:?}"
            );
        }
    }

    #[test]
    fn a_limit_below_the_shortest_pause_is_named_with_it() {
        let limits = MigrationLimits { downtime_ms: 10, timeout_ms: 5_000, ..Default::default() };
        let mut course = Convergence::new(Fixed::assumed(true));
        let idle = |elapsed| Observation { look: Duration::from_millis(60), ..seen(100, 10, 0, elapsed) };
        let Decision::Round { expected, .. } = course.decide(&idle(1_000), &limits) else {
            panic!("too long")
        };
        assert!(course.may_rest(&idle(1_000), &limits), "rounds would only cost");
        assert_eq!(expected, course.floor(Duration::from_millis(60)));
        assert!(matches!(course.decide(&idle(5_000), &limits), Decision::NotConverging { .. }));
        assert_eq!(expected, Duration::from_millis(87));
        // What it names would do.
        let raised = MigrationLimits { downtime_ms: 87, ..limits };
        assert!(matches!(course.decide(&idle(5_000), &raised), Decision::Switchover { bound: Some(_), .. }));
    }

    #[test]
    fn a_pause_that_was_broken_off_is_learnt_from_and_tried_again_later_and_later() {
        let ms = Duration::from_millis;
        let limits = MigrationLimits { downtime_ms: 50, ..Default::default() };
        let idle = |elapsed| seen(100, 10, 0, elapsed);
        let mut course = fresh();
        let mut at = 1_000;
        for wait in [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000] {
            assert!(matches!(course.decide(&idle(at), &limits), Decision::Switchover { .. }), "at {at}");
            // A hiccup of the machine: leaving alone took 20 ms, twice of which may fit.
            course.went_back(ms(20), ms(at), &limits);
            assert!(matches!(course.decide(&idle(at + wait - 1), &limits), Decision::Round { .. }));
            assert!(course.may_rest(&idle(at + wait - 1), &limits));
            at += wait;
        }
        // A higher limit is worth another attempt at once.
        course.went_back(ms(20), ms(at), &limits);
        let raised = MigrationLimits { downtime_ms: 60, ..limits };
        assert!(matches!(course.decide(&idle(at), &raised), Decision::Switchover { .. }));
        // One that cannot be kept is tried a few times, and then not again.
        let mut course = fresh();
        for n in 0..u64::from(HOPEFUL) {
            let decision = course.decide(&idle(1_000 + n * 20_000), &limits);
            assert!(matches!(decision, Decision::Switchover { .. }), "{decision:?}");
            course.went_back(ms(30 + n), ms(1_000 + n * 20_000), &limits);
        }
        let decision = course.decide(&idle(1_000_000), &limits);
        assert!(matches!(decision, Decision::Round { expected, .. } if expected > ms(60)), "{decision:?}");
    }

    #[test]
    fn one_long_pause_does_not_say_that_no_shorter_one_can_be_had() {
        let ms = Duration::from_millis;
        let limits = MigrationLimits { downtime_ms: 300, ..Default::default() };
        let mut course = Convergence::new(Fixed::assumed(true));
        let before = course.floor(ms(60));
        course.went_back(ms(6_000), ms(1_000), &limits);
        assert_eq!(course.floor(ms(60)), before);
        // Two say it, the shorter of them.
        course.went_back(ms(200), ms(2_000), &limits);
        assert_eq!(course.floor(ms(60)), ms(200 + 2 + 200 + 60));
    }

    proptest! {
        /// Whatever pauses really cost: none that keeps to its bound lasts longer than limit and tolerance,
        /// arriving as predicted, and the number of attempts is bounded by the time.
        #[test]
        fn no_pause_goes_beyond_its_limit_before_start(
            downtime_ms in 0u64..500, leave in 0u64..400, look in 0u64..200, pages in 0u64..20_000, rate in 1_000u64..1_000_000,
        ) {
            let ms = Duration::from_millis;
            let limits = MigrationLimits { downtime_ms, ..Default::default() };
            let (mut course, mut elapsed, mut attempts) = (Convergence::new(Fixed::assumed(true)), 0, 0);
            while elapsed < 60_000 {
                let mut now = seen(rate, 1_000, pages, elapsed);
                now.look = ms(look);
                elapsed += 100;
                let Decision::Switchover { bound: Some(bound), .. } = course.decide(&now, &limits) else { continue };
                attempts += 1;
                let spent = ms(leave + look);
                if bound.holds(spent, pages) {
                    let all = spent + bound.settle + moving(pages, rate as f64) + bound.arrive;
                    let limit = ms(downtime_ms);
                    prop_assert!(pages == 0 || all <= limit + tolerance(limit) + ms(1), "{:?}", all);
                    break;
                }
                course.went_back(ms(leave), ms(elapsed), &limits);
            }
            prop_assert!(attempts <= 14, "{} attempts in a minute", attempts);
        }
    }

    #[test]
    fn looking_for_pages_is_a_part_of_the_pause() {
        let limits = MigrationLimits { downtime_ms: 100, ..Default::default() };
        let quick = seen(100_000, 1000, 5_000, 1000);
        let slow = Observation { look: Duration::from_millis(60), ..quick };
        let decide = |seen| Convergence::new(Fixed::assumed(false)).decide(&seen, &limits);
        let Decision::Switchover { expected, .. } = decide(quick) else { panic!("50 ms of pages") };
        let Decision::Round { expected: with_look, .. } = decide(slow) else { panic!("110 ms and more") };
        assert_eq!(with_look, expected + Duration::from_millis(60));
    }

    #[test]
    fn a_verdict_tells_what_the_guest_wrote_lately_however_short_the_last_round_was() {
        let limits = MigrationLimits { downtime_ms: 10, timeout_ms: 3_000, ..Default::default() };
        let mut course = fresh();
        assert_eq!(course.dirty_rate(), 0, "nothing was seen");
        course.decide(&seen(20_000, 1_500, 4_096, 1_500), &limits);
        course.decide(&seen(4_096, 1_490, 4_096, 2_990), &limits);
        let rate = course.dirty_rate();
        assert!((2_700..2_800).contains(&rate), "{rate}");
        // The deadline cuts a round, between two writes.
        let cut = Observation { written_pages: 0, ..seen(50, 10, 4_046, 3_000) };
        assert!(matches!(course.decide(&cut, &limits), Decision::NotConverging { .. }));
        assert!(course.dirty_rate() > rate * 9 / 10, "{}", course.dirty_rate());
        // A guest that has become quiet is told so soon.
        for at in 0..5 {
            course.decide(&Observation { written_pages: 0, ..seen(50, 1_000, 4_046, 4_000 + at) }, &limits);
        }
        assert!(course.dirty_rate() < rate / 20, "{}", course.dirty_rate());
    }

    #[test]
    fn a_short_round_does_not_spoil_the_rate() {
        let limits = MigrationLimits { downtime_ms: 20, ..Default::default() };
        let mut course = Convergence::new(Fixed::assumed(false));
        // 1 GiB in a second, then a few pages that mostly waited for hand-shakes: 2,000 more would still take
        // 8 ms.
        course.decide(&seen(262_144, 1000, 100_000, 1000), &limits);
        let decision = course.decide(&seen(100, 10, 2_000, 1010), &limits);
        assert!(matches!(decision, Decision::Switchover { .. }), "{decision:?}");
    }

    #[test]
    fn a_live_round_ends_with_the_time_unless_the_guest_is_only_slowed_then() {
        let begun = Instant::now();
        let of = |on_timeout| MigrationLimits { on_timeout, timeout_ms: 1_234, ..Default::default() };
        let end = Some(begun + Duration::from_millis(1_234));
        assert_eq!(ends_at(begun, &of(OnTimeout::Cancel)), end);
        assert_eq!(ends_at(begun, &of(OnTimeout::Force)), end);
        assert_eq!(ends_at(begun, &of(OnTimeout::Throttle)), None);
    }

    #[test]
    fn the_shortest_that_an_epoch_took_to_settle_is_what_settling_takes() {
        let mut course = fresh();
        assert_eq!(course.floor(Duration::ZERO), FLOOR);
        // Assumed were 2 ms.
        for (took, floor) in [(10, 16), (4, 10), (20, 10)] {
            course.settled(Duration::from_millis(took));
            assert_eq!(course.floor(Duration::ZERO), Duration::from_millis(floor), "after {took} ms");
        }
    }

    /// 100 pages a second cross; the guest wrote `written` in a second and the half that a look took.
    fn slow(written_pages: u64) -> Observation {
        let look = Duration::from_millis(500);
        Observation { look, written_pages, ..seen(100, 1_000, 10_000, 1_000) }
    }

    #[test]
    fn a_round_shrinks_too_little_when_more_than_half_of_what_moved_is_written_again() {
        let stuck = |written| {
            let mut course = fresh();
            course.decide(&slow(written), &MigrationLimits::default());
            course.stuck
        };
        // 75 in one and a half seconds are 50 a second.
        assert_eq!([0, 60, 75, 76, 1_000].map(stuck), [0, 0, 0, 1, 1]);
    }

    #[test]
    fn a_guest_is_slowed_only_where_somebody_wants_it_slowed() {
        for on_timeout in [OnTimeout::Cancel, OnTimeout::Force, OnTimeout::Throttle] {
            for auto_throttle in [false, true] {
                let limits = MigrationLimits { on_timeout, auto_throttle, ..Default::default() };
                let mut course = fresh();
                let slowed = (0..4).map(|_| match course.decide(&slow(1_000), &limits) {
                    Decision::Round { throttle_percent, .. } => throttle_percent,
                    other => panic!("it is early: {other:?}"),
                });
                assert_eq!(slowed.max(), Some(if auto_throttle { 40 } else { 0 }), "{limits:?}");
            }
        }
    }

    #[test]
    fn a_guest_that_is_as_slow_as_it_gets_and_still_too_fast_is_given_up() {
        // A look takes half a second: below that no guest is slow enough.
        let downtime_ms = 600;
        let on_timeout = OnTimeout::Throttle;
        let limits = MigrationLimits { on_timeout, timeout_ms: 0, downtime_ms, ..Default::default() };
        let mut course = fresh();
        let steps: Vec<_> = std::iter::from_fn(|| match course.decide(&slow(1_000), &limits) {
            Decision::Round { throttle_percent, .. } => Some(throttle_percent),
            Decision::NotConverging { pages_per_second } => {
                assert_eq!(pages_per_second, 100);
                None
            }
            other @ Decision::Switchover { .. } => panic!("{other:?}"),
        })
        .collect();
        // Two rounds that do not shrink, before each step and before the verdict.
        assert_eq!(steps, [0, 20, 20, 40, 40, 60, 60, 80, 80, 95, 95, 99, 99]);
    }

    #[test]
    fn a_pause_is_predicted_by_what_the_bandwidth_lets_through_and_an_epoch_took_to_settle() {
        let limits = MigrationLimits {
            bandwidth_bytes_per_second: Some(1_000 * PAGE_SIZE),
            downtime_ms: 150,
            ..Default::default()
        };
        let mut course = fresh();
        course.settled(Duration::from_millis(30));
        let decision = course.decide(&seen(100_000, 1_000, 100, 1_000), &limits);
        let Decision::Switchover { expected, bound: Some(bound) } = decision else { panic!("{decision:?}") };
        // Leaving 1 ms, 100 pages at 1,000 a second, settling 30, arriving 5.
        assert_eq!(expected, Duration::from_millis(136));
        assert_eq!((bound.settle, bound.pages_per_second), (Duration::from_millis(30), 1_000.0));
        let tight = MigrationLimits { downtime_ms: 135, ..limits };
        assert!(matches!(course.decide(&seen(100_000, 1_000, 100, 1_000), &tight), Decision::Round { .. }));
    }

    #[test]
    fn a_round_of_many_pages_halves_what_was_known_of_the_rate_and_one_of_few_only_raises_it() {
        let mut course = fresh();
        let rates = [(8_000, 8_000.0), (4_000, 6_000.0), (2_047, 6_000.0), (2_048, 4_024.0)];
        for (moved, rate) in rates {
            assert_eq!(course.note_rate(moved, 1.0), rate, "{moved} pages");
        }
        assert_eq!(course.note_rate(500, 0.1), 5_000.0);
    }

    #[test]
    fn a_round_rests_only_while_no_pause_is_near_and_little_is_left() {
        let limits = |downtime_ms| MigrationLimits { downtime_ms, ..Default::default() };
        let left = |pages, elapsed| seen(100_000, 1_000, pages, elapsed);
        let course = fresh();
        // The floor of a machine in this process is 8 ms.
        assert!(course.may_rest(&left(TELLING_PAGES - 1, 0), &limits(7)));
        assert!(!course.may_rest(&left(TELLING_PAGES, 0), &limits(7)), "there is something to send");
        assert!(!course.may_rest(&left(0, 0), &limits(8)), "a pause may come");
        let mut course = fresh();
        course.went_back(Duration::from_millis(1), Duration::from_millis(1_000), &limits(100));
        assert!(course.may_rest(&left(0, 1_199), &limits(100)), "the next pause is not due");
        assert!(!course.may_rest(&left(0, 1_200), &limits(100)));
    }

    #[test]
    fn a_pause_is_broken_off_past_the_limit_and_a_tenth_and_not_before() {
        let ms = Duration::from_millis;
        assert_eq!(
            [0, 49, 50, 51, 1_000].map(|limit| tolerance(ms(limit))).map(|t| t.as_micros()),
            [5_000, 5_000, 5_000, 5_100, 100_000]
        );
        let bound = Bound { limit: ms(100), pages_per_second: 1_000.0, settle: ms(2), arrive: ms(5) };
        let more = Duration::from_nanos(1);
        // 100 and 10: arriving takes 5, a page 1, and pages take 2 to settle.
        assert!(bound.holds(ms(105), 0) && !bound.holds(ms(105) + more, 0));
        assert!(bound.holds(ms(102), 1) && !bound.holds(ms(102) + more, 1));
        assert!(bound.holds(ms(53), 50) && !bound.holds(ms(53), 51));
    }
}
