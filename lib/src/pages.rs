//! Sets of pages: dirty pages, shared pages, what is left of a round.
//!
//! Owns: bitmaps over [`RamPage`]. Must not know: where the pages are or who wrote them.

use crate::addr::{PAGE_SIZE, PageRange, RamPage};

/// A set of pages as a bitmap; grows as needed up to what is inserted.
#[derive(Clone, Debug, Default)]
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
        let Some(end) = first.checked_add(count) else { return false };
        if count > 0 && (end - 1) / 64 >= self.words.len() as u64 {
            return false;
        }
        pieces(first, end).all(|(word, mask)| self.words[word] & mask == mask)
    }

    /// Puts `page` in; true when it is new.
    pub fn insert(&mut self, page: RamPage) -> bool {
        let (index, bit) = ((page.get() / 64) as usize, 1 << (page.get() % 64));
        if index >= self.words.len() {
            self.words.resize(index + 1, 0);
        }
        let new = self.words[index] & bit == 0;
        self.words[index] |= bit;
        self.len += u64::from(new);
        new
    }

    /// Takes `page` out; true when it was in.
    pub fn remove(&mut self, page: RamPage) -> bool {
        let Some(word) = self.words.get_mut((page.get() / 64) as usize) else { return false };
        let bit = 1 << (page.get() % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.len -= u64::from(was);
        was
    }

    /// Puts every page of a range of RAM in.
    pub fn insert_range(&mut self, range: PageRange) {
        let (first, end) = (range.start() / PAGE_SIZE, range.end() / PAGE_SIZE);
        // What is new is written once, as it must be: first zeroes, then whole words, then the rest by the
        // loop below.
        let known = self.words.len() as u64;
        let (from, to) = (first.div_ceil(64).max(known), end / 64);
        if to > known {
            self.words.reserve((end.div_ceil(64) - known) as usize);
            self.words.resize(from as usize, 0);
            self.words.resize(to.max(from) as usize, u64::MAX);
            self.len += to.saturating_sub(from) * 64;
        }
        if end.div_ceil(64) > self.words.len() as u64 {
            self.words.resize(end.div_ceil(64) as usize, 0);
        }
        // Up to where the new whole words begin, and behind them.
        let fresh = if to > known { from..to } else { 0..0 };
        for (index, mask) in pieces(first, end).filter(|(i, _)| !fresh.contains(&(*i as u64))) {
            let word = &mut self.words[index];
            self.len += u64::from((mask & !*word).count_ones());
            *word |= mask;
        }
    }

    /// Takes every page of a range of RAM out.
    pub fn remove_range(&mut self, range: PageRange) {
        let known = self.words.len() as u64 * 64;
        let (first, end) = (range.start() / PAGE_SIZE, (range.end() / PAGE_SIZE).min(known));
        for (index, mask) in pieces(first, end) {
            let word = &mut self.words[index];
            self.len -= u64::from((mask & *word).count_ones());
            *word &= !mask;
        }
    }

    /// Puts in the pages whose bits are set in `log`, bit 0 being page `first`. What KVM's dirty log gives.
    pub fn insert_log(&mut self, first: RamPage, log: &[u64]) {
        let Some(last) = log.iter().rposition(|w| *w != 0) else { return };
        let (index, shift) = ((first.get() / 64) as usize, first.get() % 64);
        // A word of the log lies in two of ours when `first` is in the middle of one.
        let needed = index + last + 1 + usize::from(shift != 0 && log[last] >> (64 - shift) != 0);
        if needed > self.words.len() {
            self.words.resize(needed, 0);
        }
        for (i, word) in log[..=last].iter().enumerate().filter(|(_, w)| **w != 0) {
            self.or(index + i, word << shift);
            if shift != 0 && word >> (64 - shift) != 0 {
                self.or(index + i + 1, word >> (64 - shift));
            }
        }
    }

    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        self.insert_log(RamPage::new(0), &other.words);
    }

    /// Takes out all that are in `other`, too, and gives them.
    pub fn take(&mut self, other: &Self) -> Self {
        let mut taken = Self { words: vec![0; self.words.len().min(other.words.len())], len: 0 };
        for ((mine, theirs), taken) in self.words.iter_mut().zip(&other.words).zip(&mut taken.words) {
            *taken = *mine & theirs;
            *mine &= !theirs;
        }
        taken.len = taken.words.iter().map(|w| u64::from(w.count_ones())).sum();
        self.len -= taken.len;
        taken
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = RamPage> + '_ {
        self.words.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(|(i, w)| {
            let mut left = *w;
            std::iter::from_fn(move || {
                let bit = u64::from(left.trailing_zeros());
                left &= left.wrapping_sub(1);
                (bit < 64).then(|| RamPage::new(i as u64 * 64 + bit))
            })
        })
    }

    /// A range of RAM cut where membership changes: spans, and whether their pages are in. Takes no memory,
    /// however the pages lie.
    pub fn extents(&self, range: PageRange) -> impl Iterator<Item = (PageRange, bool)> + '_ {
        let (mut at, end) = (range.start() / PAGE_SIZE, range.end() / PAGE_SIZE);
        std::iter::from_fn(move || {
            let first = at;
            let inside = (first < end).then(|| self.contains(RamPage::new(first)))?;
            at = self.next_change(first, end, inside);
            let span = PageRange::new(first * PAGE_SIZE, (at - first) * PAGE_SIZE);
            Some((span.expect("a part of a range is one"), inside))
        })
    }

    /// The first page from `at` on whose membership is not `inside`, or `end`.
    fn next_change(&self, at: u64, end: u64, inside: bool) -> u64 {
        let flip = if inside { u64::MAX } else { 0 };
        let mut index = (at / 64) as usize;
        let Some(word) = self.words.get(index) else { return if inside { at } else { end } };
        let mut changed = (word ^ flip) & (u64::MAX << (at % 64));
        while changed == 0 {
            index += 1;
            if index as u64 * 64 >= end {
                return end;
            }
            match self.words.get(index) {
                Some(word) => changed = word ^ flip,
                None => return if inside { index as u64 * 64 } else { end },
            }
        }
        (index as u64 * 64 + u64::from(changed.trailing_zeros())).min(end)
    }

    /// Fills `batch` with up to `max` pages from `cursor` on and moves the cursor behind them. A cursor
    /// starts at 0.
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
        let bytes = self.words.len() as u64 * 64 * PAGE_SIZE;
        let Ok(all) = PageRange::new(0, bytes) else { return Vec::new() };
        let inside = self.extents(all).filter(|(_, inside)| *inside);
        inside.map(|(span, _)| (span.start() / PAGE_SIZE, span.pages())).collect()
    }

    fn or(&mut self, index: usize, bits: u64) {
        let word = &mut self.words[index];
        self.len += u64::from((bits & !*word).count_ones());
        *word |= bits;
    }
}

/// Two sets are the same when they hold the same pages, whatever room they have.
impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        let common = self.words.len().min(other.words.len());
        self.len == other.len && self.words[..common] == other.words[..common]
    }
}

impl Eq for PageSet {}

/// The words that pages `first` to `end` (not included) lie in, and which of their bits.
fn pieces(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let words = if first < end { first / 64..(end - 1) / 64 + 1 } else { 0..0 };
    words.map(move |index| {
        let (from, to) = (first.max(index * 64) % 64, (end - 1).min(index * 64 + 63) % 64);
        (index as usize, (u64::MAX >> (63 - to)) & (u64::MAX << from))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Insert(u64),
        Remove(u64),
        InsertRange(u64, u64),
        RemoveRange(u64, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            (0u64..600).prop_map(Op::Insert),
            (0u64..600).prop_map(Op::Remove),
            (0u64..600, 1u64..300).prop_map(|(first, count)| Op::InsertRange(first, count)),
            (0u64..600, 1u64..300).prop_map(|(first, count)| Op::RemoveRange(first, count)),
        ];
        prop::collection::vec(op, 0..40)
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
    }

    /// A set and a model of it, checked after every step.
    fn apply(ops: &[Op]) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut model) = (PageSet::new(), BTreeSet::new());
        for op in ops {
            match *op {
                Op::Insert(p) => assert_eq!(set.insert(RamPage::new(p)), model.insert(p)),
                Op::Remove(p) => assert_eq!(set.remove(RamPage::new(p)), model.remove(&p)),
                Op::InsertRange(first, count) => {
                    set.insert_range(range(first, count));
                    model.extend(first..first + count);
                }
                Op::RemoveRange(first, count) => {
                    set.remove_range(range(first, count));
                    model.retain(|p| !(first..first + count).contains(p));
                }
            }
            assert_eq!(set.len(), model.len() as u64, "after {op:?}");
        }
        (set, model)
    }

    fn pages(set: &PageSet) -> Vec<u64> {
        set.iter().map(RamPage::get).collect()
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in ops(), more in ops(), log: [u64; 3], first in 0u64..100) {
            let (mut set, mut model) = apply(&ops);
            set.insert_log(RamPage::new(first), &log);
            for bit in 0..192 {
                if log[bit / 64] >> (bit % 64) & 1 != 0 {
                    model.insert(first + bit as u64);
                }
            }
            let expected: Vec<u64> = model.iter().copied().collect();
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(&pages(&set), &expected);
            let (mut cursor, mut batch, mut all) = (0, Vec::new(), Vec::new());
            loop {
                set.next_batch(&mut cursor, 7, &mut batch);
                if batch.is_empty() { break; }
                all.extend(batch.iter().map(|p| p.get()));
            }
            prop_assert_eq!(&all, &expected);
            let unrolled: Vec<u64> = set.runs().into_iter().flat_map(|(f, n)| f..f + n).collect();
            prop_assert_eq!(&unrolled, &expected);
            let joined = set.runs().windows(2).all(|p| p[0].0 + p[0].1 < p[1].0);
            prop_assert!(joined);

            let (other, other_model) = apply(&more);
            let mut both = set.clone();
            both.union(&other);
            prop_assert_eq!(pages(&both), model.union(&other_model).copied().collect::<Vec<_>>());
            let taken = set.take(&other);
            prop_assert_eq!(pages(&taken), model.intersection(&other_model).copied().collect::<Vec<_>>());
            prop_assert_eq!(pages(&set), model.difference(&other_model).copied().collect::<Vec<_>>());
            prop_assert_eq!((set.len(), taken.len()), (pages(&set).len() as u64, pages(&taken).len() as u64));
        }

        #[test]
        fn extents_cover_a_range_and_alternate(ops in ops(), first in 0u64..700, count in 1u64..700) {
            let (set, model) = apply(&ops);
            let list: Vec<_> = set.extents(range(first, count)).collect();
            let mut at = first;
            for (span, inside) in &list {
                prop_assert_eq!(span.start() / PAGE_SIZE, at);
                at += span.pages();
                prop_assert!((span.start() / PAGE_SIZE..at).all(|p| model.contains(&p) == *inside));
            }
            prop_assert_eq!(at, first + count);
            prop_assert!(list.windows(2).all(|p| p[0].1 != p[1].1));
            prop_assert_eq!(set.contains_all(first, count), (first..first + count).all(|p| model.contains(&p)));
        }
    }

    /// Page numbers at the edges of words.
    const EDGES: [u64; 12] = [0, 1, 2, 62, 63, 64, 65, 126, 127, 128, 129, 191];

    /// Sets whose bitmaps end in different words, and lie about the same edges.
    fn few_sets() -> Vec<BTreeSet<u64>> {
        let lists: [&[u64]; 8] = [
            &[],
            &[0],
            &[63],
            &[64],
            &[0, 63, 64, 127, 128],
            &[191],
            &[1, 62, 65, 126, 129, 190],
            &[63, 64, 65, 66, 127],
        ];
        let full = [(0..64).collect(), (0..128).collect(), (3..190).collect()];
        lists.iter().map(|l| l.iter().copied().collect()).chain(full).collect()
    }

    fn set_of(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new();
        pages.iter().for_each(|p| assert!(set.insert(RamPage::new(*p))));
        set
    }

    fn same(set: &PageSet, model: &BTreeSet<u64>) {
        assert_eq!(pages(set), model.iter().copied().collect::<Vec<_>>());
        assert_eq!((set.len(), set.is_empty()), (model.len() as u64, model.is_empty()));
        assert_eq!(*set, set_of(model));
    }

    #[test]
    fn every_range_between_edges_of_words_is_put_in_taken_out_and_found() {
        for model in few_sets() {
            let set = set_of(&model);
            for first in EDGES {
                for end in EDGES.into_iter().chain([192, 193, 300]).filter(|end| *end > first) {
                    let (count, span) = (end - first, range(first, end - first));
                    let (mut more, mut fewer) = (set.clone(), set.clone());
                    more.insert_range(span);
                    same(&more, &model.iter().copied().chain(first..end).collect());
                    assert!(more.contains_all(first, count) && !more.contains_all(first, 301 - first));
                    fewer.remove_range(span);
                    same(&fewer, &model.iter().copied().filter(|p| !(first..end).contains(p)).collect());
                    assert_eq!(set.contains_all(first, count), (first..end).all(|p| model.contains(&p)));
                    let cut = set.extents(span).flat_map(|(s, inside)| {
                        let at = s.start() / PAGE_SIZE;
                        (at..at + s.pages()).map(move |p| (p, inside))
                    });
                    assert!(
                        cut.eq((first..end).map(|p| (p, model.contains(&p)))),
                        "{model:?} {first}..{end}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_log_is_put_in_wherever_in_a_word_it_begins() {
        let words = [0, 1, 1 << 63, 1 << 31 | 1, u64::MAX];
        for first in (0..130).chain([4095, 4096]) {
            for log in words.iter().flat_map(|a| words.iter().map(|b| [*a, *b, 0])) {
                for model in [BTreeSet::new(), BTreeSet::from([first, first + 64, 5000])] {
                    let mut set = set_of(&model);
                    set.insert_log(RamPage::new(first), &log);
                    let logged = (0..192).filter(|i| log[i / 64] >> (i % 64) & 1 != 0);
                    same(&set, &model.iter().copied().chain(logged.map(|i| first + i as u64)).collect());
                    let last = set.iter().last().map_or(0, |p| p.get() / 64 + 1);
                    assert_eq!(set.words.len() as u64, last, "no more words than pages need");
                }
            }
        }
    }

    #[test]
    fn two_sets_of_any_length_unite_and_part_as_sets_do() {
        for model in few_sets() {
            for other in few_sets() {
                let (mut set, theirs) = (set_of(&model), set_of(&other));
                let mut both = set.clone();
                both.union(&theirs);
                same(&both, &model.union(&other).copied().collect());
                same(&set.take(&theirs), &model.intersection(&other).copied().collect());
                same(&set, &model.difference(&other).copied().collect());
                assert_eq!(set_of(&model) == theirs, model == other);
            }
        }
    }

    #[test]
    fn batches_go_on_where_the_last_ended_and_runs_are_as_long_as_they_are() {
        for model in few_sets() {
            let set = set_of(&model);
            for max in [1, 2, 63, 64, 65] {
                let (mut cursor, mut batch, mut all) = (0, Vec::new(), Vec::new());
                loop {
                    set.next_batch(&mut cursor, max, &mut batch);
                    all.extend(batch.iter().map(|p| p.get()));
                    if batch.len() < max {
                        break;
                    }
                }
                assert!(model.iter().eq(&all), "{max} at a time");
            }
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for page in &model {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == *page => *count += 1,
                    Some(_) | None => runs.push((*page, 1)),
                }
            }
            assert_eq!(set.runs(), runs);
        }
    }

    #[test]
    fn far_pages_and_none() {
        let mut set = PageSet::new();
        // Nothing grows for what is not there.
        assert!(!set.remove(RamPage::new(u64::MAX)));
        set.remove_range(PageRange::new(0, 1 << 50).unwrap());
        assert!(set.words.is_empty() && set.contains_all(5, 0) && !set.contains_all(u64::MAX, 2));
        assert!(!set.contains_all(u64::MAX - 1, 1));
        // However it came about, the same pages are the same set.
        set.insert(RamPage::new(3));
        let mut other = set.clone();
        other.insert(RamPage::new(9_000));
        assert_ne!(set, other);
        other.remove(RamPage::new(9_000));
        assert_eq!(set, other);
    }
}
