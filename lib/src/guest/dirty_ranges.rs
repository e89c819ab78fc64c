//! The dirty log of a running guest, cleared piece by piece.
//!
//! Owns: which slot a page of RAM is in. Must not know: who sends pages.
//!
//! Clearing the whole log when a round begins logs again what the guest writes before the round comes to it,
//! and all of that is sent twice. Clearing a page right before it is read does not (docs/rounds.md).

use std::sync::Arc;

use crate::addr::RamPage;
use crate::hypervisor::{DirtyLog, HypervisorError, SlotId};
use crate::pages::PageSet;

/// Most pages that one call to the kernel spans: 128 KiB of bitmap.
const SPAN_MAX: u64 = 1 << 20;

/// The logged slots of a machine, as long as nothing is plugged or unplugged. May be used from several
/// threads.
#[derive(Clone)]
pub struct DirtyRanges {
    log: Arc<dyn DirtyLog>,
    slots: Arc<[LoggedSlot]>,
}

/// A slot whose writes are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedSlot {
    /// Which.
    pub id: SlotId,
    /// The page of RAM that it starts with.
    pub first: RamPage,
    /// Pages.
    pub pages: u64,
}

impl DirtyRanges {
    /// Of slots that are logged and share no page.
    pub fn new(log: Arc<dyn DirtyLog>, mut slots: Vec<LoggedSlot>) -> Self {
        slots.sort_unstable_by_key(|s| s.first);
        Self { log, slots: slots.into() }
    }

    /// Adds the pages that are marked, and leaves the marks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(&self, dirty: &mut PageSet) -> Result<(), HypervisorError> {
        for slot in self.slots.iter() {
            dirty.insert_log(slot.first, &self.log.look(slot.id)?);
        }
        Ok(())
    }

    /// Takes the marks off `pages` (ascending): what is written from now on is marked again. Pages that no
    /// slot logs are passed over.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&self, pages: &[RamPage]) -> Result<(), HypervisorError> {
        let mut pages = pages;
        while let Some(first) = pages.first() {
            let after = self.slots.partition_point(|s| s.first <= *first);
            let inside = |s: &&LoggedSlot| first.get() - s.first.get() < s.pages;
            let Some(slot) = after.checked_sub(1).and_then(|i| self.slots.get(i)).filter(inside) else {
                pages = &pages[1..];
                continue;
            };
            let start = slot.first.get();
            let base = (first.get() - start) / 64 * 64;
            let reach = start + slot.pages.min(base + SPAN_MAX);
            let (now, later) = pages.split_at(pages.partition_point(|p| p.get() < reach));
            pages = later;
            let mut bits = Vec::new();
            for page in now {
                let at = page.get() - start - base;
                let word = (at / 64) as usize;
                if bits.len() <= word {
                    bits.resize(word + 1, 0u64);
                }
                bits[word] |= 1 << (at % 64);
            }
            self.log.clear(slot.id, base, &bits)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// Remembers what was cleared, by slot and page of it.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, u64)>>);

    impl DirtyLog for Recorder {
        fn look(&self, _: SlotId) -> Result<Vec<u64>, HypervisorError> {
            Ok(Vec::new())
        }

        fn clear(&self, id: SlotId, first: u64, bits: &[u64]) -> Result<(), HypervisorError> {
            assert!(first.is_multiple_of(64) && !bits.is_empty());
            assert!(bits.len() as u64 * 64 <= SPAN_MAX + 64);
            let set = |i: u64| bits[(i / 64) as usize] >> (i % 64) & 1 == 1;
            let cleared = (0..bits.len() as u64 * 64).filter(|i| set(*i)).map(|i| (id.0, first + i));
            self.0.lock().unwrap().extend(cleared);
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn exactly_the_pages_of_logged_slots_are_cleared(
            starts in prop::collection::btree_set(1u64..5_000_000, 1..6),
            lengths in prop::collection::vec(1u64..2_000_000, 6),
            pages in prop::collection::btree_set(0u64..6_000_000, 0..600),
        ) {
            let ends = starts.iter().skip(1).copied().chain([u64::MAX]);
            let slots: Vec<_> = starts
                .iter()
                .zip(ends)
                .zip(lengths)
                .zip(0..)
                .map(|(((s, end), len), id)| LoggedSlot {
                    id: SlotId(id),
                    first: RamPage::new(*s),
                    pages: len.min(end - s),
                })
                .collect();
            let log = Arc::new(Recorder::default());
            let list: Vec<_> = pages.iter().map(|p| RamPage::new(*p)).collect();
            DirtyRanges::new(Arc::clone(&log) as Arc<dyn DirtyLog>, slots.clone()).clear(&list).unwrap();
            let wanted: Vec<_> = list
                .iter()
                .filter_map(|p| {
                    let slot = slots.iter().find(|s| (s.first.get()..s.first.get() + s.pages).contains(&p.get()))?;
                    Some((slot.id.0, p.get() - slot.first.get()))
                })
                .collect();
            prop_assert_eq!(&*log.0.lock().unwrap(), &wanted);
        }
    }

    /// A log in which pages are marked by the last three bits of their numbers.
    struct Marked(Vec<LoggedSlot>, u64);

    impl DirtyLog for Marked {
        fn look(&self, id: SlotId) -> Result<Vec<u64>, HypervisorError> {
            let slot = self.0.iter().find(|s| s.id == id).unwrap();
            let mut log = vec![0; slot.pages.div_ceil(64) as usize];
            for page in (0..slot.pages).filter(|p| self.is_marked(slot.first.get() + p)) {
                log[(page / 64) as usize] |= 1 << (page % 64);
            }
            Ok(log)
        }

        fn clear(&self, _: SlotId, _: u64, _: &[u64]) -> Result<(), HypervisorError> {
            unreachable!("a look leaves the marks")
        }
    }

    impl Marked {
        fn is_marked(&self, page: u64) -> bool {
            self.1 >> (page % 8) & 1 != 0
        }
    }

    /// Two slots of every size about a word, wherever they begin in one, next to one another or apart.
    fn few_slots() -> impl Iterator<Item = Vec<LoggedSlot>> {
        const LENGTHS: [u64; 5] = [1, 63, 64, 65, 130];
        let pairs = LENGTHS.iter().flat_map(|a| LENGTHS.iter().map(move |b| (*a, *b)));
        let begins = [0, 1, 63, 64].iter().flat_map(|first| [0, 1, 64].iter().map(move |gap| (*first, *gap)));
        pairs.flat_map(move |(a, b)| {
            begins.clone().map(move |(first, gap)| {
                let slot =
                    |id, first, pages| LoggedSlot { id: SlotId(id), first: RamPage::new(first), pages };
                // In no order.
                vec![slot(7, first + a + gap, b), slot(3, first, a)]
            })
        })
    }

    #[test]
    fn a_look_finds_the_marks_of_every_slot_where_its_pages_are() {
        for slots in few_slots() {
            for marks in [0, 1, 0x80, 0xa5, 0xff] {
                let log = Arc::new(Marked(slots.clone(), marks));
                // What was there stays.
                let mut dirty = PageSet::new();
                dirty.insert(RamPage::new(1000));
                DirtyRanges::new(Arc::clone(&log) as Arc<dyn DirtyLog>, slots.clone())
                    .look(&mut dirty)
                    .unwrap();
                let in_a_slot =
                    |p: &u64| slots.iter().any(|s| (s.first.get()..s.first.get() + s.pages).contains(p));
                let wanted = (0..400).filter(in_a_slot).filter(|p| log.is_marked(*p)).chain([1000]);
                assert!(dirty.iter().map(RamPage::get).eq(wanted), "{slots:?} {marks:#x}");
            }
        }
    }

    #[test]
    fn pages_about_the_edges_of_slots_and_calls_are_cleared_once_and_by_their_slot() {
        let slot = |id, first, pages| LoggedSlot { id: SlotId(id), first: RamPage::new(first), pages };
        // The last one takes three calls, and its last page's number is the last that an address has.
        let last = slot(9, (1 << 52) - 2 * SPAN_MAX - 5, 2 * SPAN_MAX + 5);
        let far = [0, 1, 63, 64, SPAN_MAX - 1, SPAN_MAX, SPAN_MAX + 63, 2 * SPAN_MAX, 2 * SPAN_MAX + 4];
        for mut slots in few_slots() {
            slots.push(last);
            let about = (0..400).chain([last.first.get() - 1]);
            let pages: Vec<_> = about.chain(far.map(|p| last.first.get() + p)).map(RamPage::new).collect();
            let log = Arc::new(Recorder::default());
            DirtyRanges::new(Arc::clone(&log) as Arc<dyn DirtyLog>, slots.clone()).clear(&pages).unwrap();
            let of_slot = |page: &RamPage| {
                let inside = |s: &&LoggedSlot| (s.first.get()..s.first.get() + s.pages).contains(&page.get());
                slots.iter().find(inside).map(|s| (s.id.0, page.get() - s.first.get()))
            };
            assert!(pages.iter().filter_map(of_slot).eq(log.0.lock().unwrap().iter().copied()), "{slots:?}");
        }
    }
}
