//! Log lines that somebody else can cause, kept few.
//!
//! Owns: when the next line may be written and how many were left out. Must not know: what they say.

use crate::sync::Locked;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// At least this long passes between two lines of a kind.
const WINDOW: Duration = Duration::from_secs(10);

/// One kind of line: the first is written, then one for each [`WINDOW`], with the number of those left out.
#[derive(Debug, Default)]
pub(crate) struct LogBudget(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl LogBudget {
    /// For a kind that nothing was logged of yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State { last: None, left_out: 0 }))
    }

    /// `Some(lines left out since the last one)` if a line may be written now.
    pub fn take(&self) -> Option<u64> {
        self.0.locked().take(Instant::now())
    }
}

impl State {
    fn take(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < WINDOW) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each_window_tells_how_many_were_left_out() {
        let mut state = State::default();
        let begin = Instant::now();
        assert_eq!(state.take(begin), Some(0));
        for at in 0..1000 {
            assert_eq!(state.take(begin + Duration::from_millis(at)), None);
        }
        assert_eq!(state.take(begin + WINDOW), Some(1000));
        assert_eq!(state.take(begin + WINDOW * 2), Some(0));
    }
}
