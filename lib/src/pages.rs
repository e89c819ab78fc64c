//! Sets of pages: dirty pages, shared pages, what is left of a round.
//!
//! Owns: bitmaps over [`RamPage`]. Must not know: where the pages are or who wrote them.

use crate::addr::{PAGE_SIZE, PageRange, RamPage};

/// A set of pages as a bitmap; grows as needed up to what is inserted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    len: u64,
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { words: Vec::new(), len: 0 }
    }

    /// Pages in the set.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `page` is in.
    pub fn contains(&self, page: RamPage) -> bool {
        let p = page.get();
        self.words.get((p / 64) as usize).is_some_and(|w| w >> (p % 64) & 1 != 0)
    }

    /// Whether `count` pages from number `first` on are all in.
    pub fn contains_all(&self, first: u64, count: u64) -> bool {
        let Some(last) = count.checked_sub(1).and_then(|c| first.checked_add(c)) else { return count == 0 };
        let (low, high) = (first / 64, last / 64);
        if high >= self.words.len() as u64 {
            return false;
        }
        (low..=high).all(|i| {
            let mask = mask(if i == low { first % 64 } else { 0 }, if i == high { last % 64 } else { 63 });
            self.words[i as usize] & mask == mask
        })
    }

    /// Puts `page` in; true when it is new.
    pub fn insert(&mut self, page: RamPage) -> bool {
        let (word, bit) = self.slot(page);
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// Takes `page` out; true when it was in.
    pub fn remove(&mut self, page: RamPage) -> bool {
        let (word, bit) = self.slot(page);
        let was = *word & bit != 0;
        *word &= !bit;
        self.len -= u64::from(was);
        was
    }

    /// Puts every page of a range of RAM in.
    pub fn insert_range(&mut self, range: PageRange) {
        let (first, last) = (range.start() / PAGE_SIZE, range.end() / PAGE_SIZE);
        (first..last).for_each(|p| {
            self.insert(RamPage::new(p));
        });
    }

    /// Puts in the pages whose bits are set in `log`, bit 0 being page `first`. What KVM's dirty log gives.
    pub fn insert_log(&mut self, first: RamPage, log: &[u64]) {
        for (i, word) in log.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = u64::from(left.trailing_zeros());
                self.insert(RamPage::new(first.get() + i as u64 * 64 + bit));
                left &= left - 1;
            }
        }
    }

    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        self.insert_log(RamPage::new(0), &other.words);
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = RamPage> + '_ {
        self.words.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(|(i, w)| {
            (0..64u64).filter(move |b| w >> b & 1 != 0).map(move |b| RamPage::new(i as u64 * 64 + b))
        })
    }

    /// Fills `batch` with up to `max` pages from `cursor` on and moves the cursor behind them. A cursor starts at 0.
    pub fn next_batch(&self, cursor: &mut u64, max: usize, batch: &mut Vec<RamPage>) {
        batch.clear();
        while batch.len() < max {
            let index = (*cursor / 64) as usize;
            let Some(word) = self.words.get(index) else { return };
            let left = word >> (*cursor % 64);
            if left == 0 {
                *cursor = (index as u64 + 1) * 64;
                continue;
            }
            *cursor += u64::from(left.trailing_zeros());
            batch.push(RamPage::new(*cursor));
            *cursor += 1;
        }
    }

    /// Runs of neighbouring pages: first page, pages.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in self.iter().map(RamPage::get) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        runs
    }

    fn slot(&mut self, page: RamPage) -> (&mut u64, u64) {
        let index = (page.get() / 64) as usize;
        if index >= self.words.len() {
            self.words.resize(index + 1, 0);
        }
        (&mut self.words[index], 1 << (page.get() % 64))
    }
}

/// Bits `from` to `to`, both included, of a word.
const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (63 - to)) & (u64::MAX << from)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in prop::collection::vec((any::<bool>(), 0u64..300), 0..200), log: [u64; 3], first in 0u64..100) {
            let mut set = PageSet::new();
            let mut model = BTreeSet::new();
            for (insert, p) in ops {
                if insert {
                    prop_assert_eq!(set.insert(RamPage::new(p)), model.insert(p));
                } else {
                    prop_assert_eq!(set.remove(RamPage::new(p)), model.remove(&p));
                }
            }
            set.insert_log(RamPage::new(first), &log);
            for bit in 0..192 {
                if log[bit / 64] >> (bit % 64) & 1 != 0 {
                    model.insert(first + bit as u64);
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            let (mut cursor, mut batch, mut all) = (0, Vec::new(), Vec::new());
            loop {
                set.next_batch(&mut cursor, 7, &mut batch);
                if batch.is_empty() { break; }
                all.extend(batch.iter().map(|p| p.get()));
            }
            prop_assert_eq!(&all, &model.iter().copied().collect::<Vec<_>>());
            let unrolled: Vec<u64> = set.runs().into_iter().flat_map(|(f, n)| f..f + n).collect();
            prop_assert_eq!(&unrolled, &all);
            prop_assert_eq!(set.iter().map(RamPage::get).collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
