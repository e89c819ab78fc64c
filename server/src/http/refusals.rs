//! Entries of the audit log that whoever is refused can cause, kept few.
//!
//! Owns: how many refusals of one principal, or of all that nobody knows together, have an entry of their
//! own, and how many had none since. Must not know: who may do what, what entries look like.
//!
//! The audit log keeps a number of entries: whoever could add as many as he likes could push out those of
//! others, at the cost of a sync of the disk for each.

use mirrorvm::sync::Locked;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How many refusals in a row get entries of their own.
const AT_ONCE: u32 = 200;
/// After that, how long it takes until the next one does.
const EVERY: Duration = Duration::from_secs(5);
/// How many principals are remembered at most. Further ones share the budget of unknown callers.
const PRINCIPALS_MAX: usize = 4096;

/// How many entries each principal has caused lately.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<HashMap<Option<String>, Bucket>>);

#[derive(Debug)]
struct Bucket {
    left: u32,
    filled: Instant,
    left_out: u64,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, filled: now, left_out: 0 }
    }

    fn take(&mut self, now: Instant) -> Option<u64> {
        self.fill(now);
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }

    fn fill(&mut self, now: Instant) {
        let more = now.duration_since(self.filled).as_secs() / EVERY.as_secs();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.filled += EVERY.saturating_mul(more);
        self.left = self.left.saturating_add(more).min(AT_ONCE);
    }
}

impl Refusals {
    /// Counts a refusal of `principal` (`None`: an unknown caller). Gives `Some(refusals left out since the
    /// last entry)` if this one gets an entry of its own.
    pub fn take(&self, principal: Option<&str>) -> Option<u64> {
        self.take_at(principal, Instant::now())
    }

    fn take_at(&self, principal: Option<&str>, now: Instant) -> Option<u64> {
        let mut buckets = self.0.locked();
        let mut key = principal.map(str::to_owned);
        if buckets.len() >= PRINCIPALS_MAX && !buckets.contains_key(&key) {
            buckets.retain(|_, bucket| {
                bucket.fill(now);
                bucket.left < AT_ONCE || bucket.left_out > 0
            });
            if buckets.len() >= PRINCIPALS_MAX {
                key = None;
            }
        }
        buckets.entry(key).or_insert_with(|| Bucket::new(now)).take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_has_few_entries_and_each_is_counted() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let own = |principal: Option<&str>, at| refusals.take_at(principal, at);
        for _ in 0..AT_ONCE {
            assert_eq!(own(None, begin), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(own(None, begin + EVERY / 2), None);
        }
        assert_eq!(own(Some("token:1"), begin), Some(0), "others have their own");
        assert_eq!(own(None, begin + EVERY), Some(1000));
        assert_eq!(own(None, begin + EVERY), None);
        assert_eq!(own(None, begin + EVERY * 1000), Some(1));
        // As many again, and no more.
        assert_eq!(
            (0..1000).filter(|_| own(None, begin + EVERY * 1000).is_some()).count() as u32,
            AT_ONCE - 1
        );
    }

    #[test]
    fn more_principals_than_are_remembered_share_what_nobody_has() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        for n in 0..PRINCIPALS_MAX + AT_ONCE as usize {
            assert_eq!(refusals.take_at(Some(&format!("token:{n}")), now), Some(0));
        }
        assert_eq!(refusals.take_at(Some("token:new"), now), None);
        assert!(refusals.0.lock().unwrap().len() <= PRINCIPALS_MAX + 1);
    }
}
