//! Which events tell of whom: so that what is told of one resource costs what there is of it, not what there
//! is of all.
//!
//! Owns: the numbers of the events that tell of an id or a name. Must not know: what they tell, the log.
//!
//! In memory, and learned from the log by those who ask: a host whose events nobody asks for by resource
//! spends nothing on it, and neither does a start.

use std::borrow::Cow;
use std::collections::HashMap;

/// Events that are not kept any more and may still be noted.
const OLD: u64 = 10_000;

/// What was learned of the log: of all its events from some on.
#[derive(Debug, Default)]
pub(super) struct Mentions {
    by: HashMap<Box<str>, Vec<u64>>,
    /// The last event that was learned of.
    seen: u64,
    /// Nothing before it is noted.
    oldest: u64,
}

impl Mentions {
    /// The last event that was learned of; 0: none.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Notes whom the event `seq` tells of. Events come in order.
    pub fn note<'a>(&mut self, seq: u64, whom: impl Iterator<Item = Cow<'a, str>>) {
        for who in whom {
            let noted = match self.by.get_mut(&*who) {
                Some(noted) => noted,
                None => self.by.entry(who.into()).or_default(),
            };
            // Id and name may be the same text.
            if noted.last() != Some(&seq) {
                noted.push(seq);
            }
        }
        self.seen = seq;
    }

    /// Everything up to `seq` was looked at.
    pub fn saw(&mut self, seq: u64) {
        self.seen = self.seen.max(seq);
    }

    /// Only events from `oldest` on are kept.
    pub fn forget_before(&mut self, oldest: u64) {
        if oldest <= self.oldest + OLD {
            return;
        }
        self.oldest = oldest;
        self.by.retain(|_, noted| {
            noted.drain(..noted.partition_point(|seq| *seq < oldest));
            noted.shrink_to(noted.len() * 2);
            !noted.is_empty()
        });
    }

    /// Up to `most` events after `after` that tell of one of `whom`, in order.
    pub fn of(&self, whom: &[String], after: u64, most: usize) -> Vec<u64> {
        let later = |noted: &'_ Vec<u64>| noted.partition_point(|seq| *seq <= after);
        let of_each = whom.iter().filter_map(|who| self.by.get(&**who));
        let mut found: Vec<u64> =
            of_each.flat_map(|noted| noted[later(noted)..].iter().take(most).copied()).collect();
        found.sort_unstable();
        found.dedup();
        found.truncate(most);
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is noted is what a search through all events finds, in pieces of any size, also when old
        /// events go.
        #[test]
        fn what_is_found_is_what_a_search_finds(
            events in prop::collection::vec(prop::collection::vec(0u8..5, 0..3), 0..60),
            whom in prop::collection::vec(0u8..7, 1..3),
            most in 1usize..8,
            kept in 1u64..80,
        ) {
            let text = |n: &u8| format!("g{n}");
            let mut mentions = Mentions::default();
            // Far apart: old ones are forgotten in one go.
            let seq_of = |i: usize| (i as u64 + 1) * OLD;
            for (i, of) in events.iter().enumerate() {
                mentions.note(seq_of(i), of.iter().map(|n| Cow::Owned(text(n))));
            }
            let oldest = seq_of(events.len()).saturating_sub(kept * OLD);
            mentions.forget_before(oldest);
            let tells = |i: &usize| events[*i].iter().any(|n| whom.contains(n));
            let wanted: Vec<u64> = (0..events.len()).filter(tells).map(seq_of).filter(|s| *s >= oldest).collect();
            let whom: Vec<String> = whom.iter().map(text).collect();
            let (mut seen, mut after) = (Vec::new(), oldest.saturating_sub(1));
            loop {
                let found = mentions.of(&whom, after, most);
                prop_assert!(found.len() <= most);
                match found.last() {
                    Some(last) => after = *last,
                    None => break,
                }
                seen.extend(found);
            }
            prop_assert_eq!(seen, wanted);
            prop_assert!(mentions.by.values().all(|noted| !noted.is_empty()));
            // Who asks never sees them: they would be kept for nothing.
            prop_assert!(mentions.by.values().flatten().all(|seq| *seq >= oldest));
        }
    }
}
