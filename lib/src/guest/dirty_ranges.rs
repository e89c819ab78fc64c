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
}
