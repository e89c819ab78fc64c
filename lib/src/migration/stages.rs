//! Where the time of migrations goes, stage by stage.
//!
//! Owns: process-wide totals that stream threads add to once per batch, and the clock that they keep. Must
//! not know: what a stage does, which migration it was (totals only grow; who wants one run's share takes the
//! difference of two readings). A lap costs two clock readings, well below a microsecond beside a batch of
//! hundreds of microseconds.
//!
//! ```ignore
//! let mut clock = Clock::start();
//! let done = lane.wait()?;
//! clock.lap(Stage::Seal);
//! link.send_span(kind, &header, &lane.payload(done.slot, done.len))?;
//! clock.lap(Stage::Send);
//! ```

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::named::named;

named! {
    /// What a stream's thread is at.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Stage {
        /// Source: choosing pages and putting requests into the helper's ring.
        Submit = "submit",
        /// Source: waiting for the helper to seal.
        Seal = "seal",
        /// Source: masking the headers of sealed records, or copying records out of the mailbox where they go
        /// through TLS.
        Hide = "hide",
        /// Source: the socket, TLS where it is asked for, waiting for the destination included.
        Send = "send",
        /// Destination: the socket, TLS where it is asked for, waiting for the source included.
        Receive = "receive",
        /// Destination: showing and walking the headers of sealed records.
        Show = "show",
        /// Destination: waiting for the helper to open.
        Open = "open",
        /// Destination: touching RAM ahead of what arrives.
        Fault = "fault",
    }
}

/// Time spent in one stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// From the beginning to the end of it, waiting included, summed over threads.
    pub wall: Duration,
    /// What the threads themselves computed. Where cores are shared this is what a stage costs, and wall time
    /// is not.
    pub cpu: Duration,
}

/// Totals of all stages at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading([Spent; Stage::ALL.len()]);

impl Reading {
    /// The total of one stage.
    #[must_use]
    pub const fn of(&self, stage: Stage) -> Spent {
        self.0[stage as usize]
    }

    /// What came since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = *self;
        for (now, then) in difference.0.iter_mut().zip(&earlier.0) {
            now.wall = now.wall.saturating_sub(then.wall);
            now.cpu = now.cpu.saturating_sub(then.cpu);
        }
        difference
    }
}

#[derive(Debug)]
struct Total {
    wall_ns: AtomicU64,
    cpu_ns: AtomicU64,
}

static TOTALS: [Total; Stage::ALL.len()] =
    [const { Total { wall_ns: AtomicU64::new(0), cpu_ns: AtomicU64::new(0) } }; Stage::ALL.len()];

/// The totals of this process.
#[must_use]
pub fn read() -> Reading {
    let mut reading = Reading::default();
    for (spent, total) in reading.0.iter_mut().zip(&TOTALS) {
        spent.wall = Duration::from_nanos(total.wall_ns.load(Relaxed));
        spent.cpu = Duration::from_nanos(total.cpu_ns.load(Relaxed));
    }
    reading
}

/// One thread's clock. It belongs to the thread that started it: CPU time is a thread's.
#[derive(Debug)]
pub struct Clock {
    wall: Instant,
    cpu: Duration,
}

impl Clock {
    /// Starts a lap.
    #[must_use]
    pub fn start() -> Self {
        Self { wall: Instant::now(), cpu: thread_cpu() }
    }

    /// Ends a lap, which was spent in `stage`, and starts the next.
    pub fn lap(&mut self, stage: Stage) {
        let now = Self::start();
        let total = &TOTALS[stage as usize];
        total.wall_ns.fetch_add((now.wall - self.wall).as_nanos() as u64, Relaxed);
        total.cpu_ns.fetch_add(now.cpu.saturating_sub(self.cpu).as_nanos() as u64, Relaxed);
        *self = now;
    }

    /// Starts a lap anew; what was since the last belongs to no stage.
    pub fn skip(&mut self) {
        *self = Self::start();
    }
}

/// What this thread has computed so far.
fn thread_cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever other tests add meanwhile only makes totals larger, and none of them waits that busily.
    #[test]
    fn computing_is_counted_as_both_and_waiting_as_wall_time_alone() {
        let before = read();
        let mut clock = Clock::start();
        let busy = thread_cpu();
        while thread_cpu() - busy < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        clock.lap(Stage::Hide);
        let (_tell, told) = std::sync::mpsc::channel::<()>();
        assert!(told.recv_timeout(Duration::from_millis(30)).is_err());
        clock.lap(Stage::Seal);
        let spent = read().since(&before);
        let (hide, seal) = (spent.of(Stage::Hide), spent.of(Stage::Seal));
        assert!(hide.cpu >= Duration::from_millis(20) && hide.wall >= hide.cpu, "{hide:?}");
        assert!(seal.wall >= Duration::from_millis(30), "{seal:?}");
        assert!(seal.cpu < Duration::from_millis(20), "waiting costs no CPU time: {seal:?}");
    }

    #[test]
    fn stages_are_in_order_and_named_apart() {
        for (index, stage) in Stage::ALL.iter().enumerate() {
            assert_eq!(*stage as usize, index);
        }
        let names: std::collections::BTreeSet<_> = Stage::ALL.iter().map(|s| s.name()).collect();
        assert_eq!(names.len(), Stage::ALL.len());
    }
}
