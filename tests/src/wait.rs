//! Waiting for conditions.

use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until `found` gives something; panics with `what` after `seconds`.
pub fn until_some<T>(what: &str, seconds: u64, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(t) = found() {
            return t;
        }
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::sleep(LOOK);
    }
}

/// Waits until `holds`; panics with `what` after `seconds`.
pub fn until(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    until_some(what, seconds, || holds().then_some(()));
}
