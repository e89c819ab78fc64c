//! Which pages a guest shares with its host, by `RamAddr`, also for RAM that is not plugged at the moment.
//!
//! Guests report in guest physical addresses (KVM_HC_MAP_GPA_RANGE); what is kept is by `RamAddr`, so that a
//! page that is private and not mapped anywhere is still known (Paolo Bonzini, 18 Aug 2021).

use std::sync::{Mutex, MutexGuard};

use crate::addr::{Gpa, PAGE_SIZE, PageRange, RamAddr, RamPage};
use crate::address_space::{BlockRole, GuestLayout, MAX_RAM_BYTES, RamBlock};
use crate::pages::PageSet;
use crate::sync::Locked;

/// A report that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatusError {
    /// Address or length.
    #[error("{pages} pages at {gpa} are no range of pages")]
    Range {
        /// First address.
        gpa: Gpa,
        /// Pages.
        pages: u64,
    },
    /// A page of the range is no RAM of the guest, or is the helper's.
    #[error("{gpa} is not the guest's RAM")]
    NotRam {
        /// The page.
        gpa: Gpa,
    },
}

/// Most pages in one report: what the largest guest has.
pub const REPORT_PAGES_MAX: u64 = MAX_RAM_BYTES / PAGE_SIZE;

/// Pages in a row with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Where they are in RAM.
    pub range: PageRange,
    /// Whether the guest shares them with its host.
    pub shared: bool,
}

/// The status of every page: private unless it was reported shared.
#[derive(Debug, Default)]
pub struct EncryptionStatus {
    shared: Mutex<PageSet>,
}

impl EncryptionStatus {
    /// A status with these pages shared.
    pub fn with_shared(shared: PageSet) -> Self {
        Self { shared: Mutex::new(shared) }
    }

    /// Takes a guest's report; all or nothing. Time grows with the plugged parts that it touches and one bit
    /// a page, memory not beyond one bit a page of RAM: a guest cannot make its host remember more by
    /// reporting in another way.
    ///
    /// # Errors
    /// [`StatusError`]; the status stays.
    pub fn report(
        &self,
        layout: &GuestLayout,
        gpa: Gpa,
        pages: u64,
        private: bool,
    ) -> Result<(), StatusError> {
        let bad = StatusError::Range { gpa, pages };
        if pages == 0 || pages > REPORT_PAGES_MAX || !gpa.is_aligned(PAGE_SIZE) {
            return Err(bad);
        }
        let end = gpa.checked_add(pages * PAGE_SIZE).ok_or(bad)?.get();
        let mut ranges = Vec::new();
        let mut at = gpa.get();
        for (block, plug) in layout.plugged_in(gpa, pages * PAGE_SIZE) {
            let hole = StatusError::NotRam { gpa: Gpa::new(at) };
            let inside =
                at.checked_sub(plug.gpa.get()).filter(|_| block.role != BlockRole::Helper).ok_or(hole)?;
            let len = (plug.len - inside).min(end - at);
            let start = block.ram_addr.get() + plug.offset + inside;
            ranges.push(PageRange::new(start, len).map_err(|_| hole)?);
            at += len;
        }
        if at < end {
            return Err(StatusError::NotRam { gpa: Gpa::new(at) });
        }
        let mut shared = self.set();
        for range in ranges {
            if private {
                shared.remove_range(range);
            } else {
                shared.insert_range(range);
            }
        }
        Ok(())
    }

    /// The status of the RAM that moves with the guest from `from` on, at most `max` spans: spans ascend,
    /// cover all of it without gaps within a block, and alternate. The next call goes on from the end of the
    /// last span.
    pub fn extents(&self, layout: &GuestLayout, from: RamAddr, max: usize) -> Vec<StatusExtent> {
        let shared = self.set();
        let mut list: Vec<StatusExtent> = Vec::new();
        for block in layout.ram().map(RamBlock::ram_range).filter(|r| r.end() > from.get()) {
            let start = block.start().max(from.get() / PAGE_SIZE * PAGE_SIZE);
            let Ok(rest) = PageRange::new(start, block.end() - start) else { continue };
            for (range, is_shared) in shared.extents(rest) {
                if let Some(last) = list.last_mut()
                    && last.shared == is_shared
                    && last.range.end() == range.start()
                {
                    last.range = PageRange::new(last.range.start(), last.range.len() + range.len())
                        .unwrap_or(last.range);
                    continue;
                }
                if list.len() == max {
                    return list;
                }
                list.push(StatusExtent { range, shared: is_shared });
            }
        }
        list
    }

    /// Whether a page is shared with the host.
    pub fn is_shared(&self, page: RamPage) -> bool {
        self.set().contains(page)
    }

    /// The shared pages.
    pub fn shared(&self) -> PageSet {
        self.set().clone()
    }

    /// Replaces the status, at the destination of a migration.
    pub fn replace(&self, shared: PageSet) {
        *self.set() = shared;
    }

    fn set(&self) -> MutexGuard<'_, PageSet> {
        self.shared.locked()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::address_space::{BlockSpec, HELPER_BLOCK, Plug};

    /// Three blocks with a hole between the first two, the third in two parts the wrong way round with its
    /// middle unplugged, and a helper right behind the second.
    fn layout() -> GuestLayout {
        let spec = |name: &str, pages: u64, gpa: Option<u64>| BlockSpec {
            name: name.into(),
            size_bytes: pages * PAGE_SIZE,
            gpa: gpa.map(|page| Gpa::new(page * PAGE_SIZE)),
        };
        let plug = |offset: u64, gpa: u64, pages: u64| Plug {
            offset: offset * PAGE_SIZE,
            gpa: Gpa::new(gpa * PAGE_SIZE),
            len: pages * PAGE_SIZE,
        };
        let bare =
            GuestLayout::assign(&[spec("a", 100, Some(0)), spec("b", 70, Some(110)), spec("c", 90, None)]);
        let bare = bare.unwrap().with_plugs("c", vec![plug(0, 300, 30), plug(60, 270, 30)]).unwrap();
        let with = bare.with_helper(10 * PAGE_SIZE, false).unwrap();
        with.with_plugs(HELPER_BLOCK, vec![plug(0, 180, 10)]).unwrap()
    }

    proptest! {
        #[test]
        fn reports_do_what_they_would_page_by_page(reports in prop::collection::vec((0u64..400, 1u64..120, any::<bool>()), 1..40)) {
            let (layout, status) = (layout(), EncryptionStatus::default());
            let helper = layout.helper().unwrap().ram_range();
            let mut model: BTreeSet<u64> = BTreeSet::new();
            for (first, pages, private) in reports {
                let ram = |p: u64| {
                    let ram = layout.gpa_to_ram(Gpa::new(p * PAGE_SIZE))?.get();
                    (!helper.contains(ram)).then_some(ram / PAGE_SIZE)
                };
                let wrong = (first..first + pages).find(|p| ram(*p).is_none());
                let expected = wrong.map_or(Ok(()), |p| Err(StatusError::NotRam { gpa: Gpa::new(p * PAGE_SIZE) }));
                prop_assert_eq!(status.report(&layout, Gpa::new(first * PAGE_SIZE), pages, private), expected);
                if expected.is_ok() {
                    for page in (first..first + pages).filter_map(ram) {
                        if private { model.remove(&page) } else { model.insert(page) };
                    }
                }
                prop_assert_eq!(status.shared().iter().map(RamPage::get).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            }
            // All of it, and three spans at a time.
            let all = status.extents(&layout, RamAddr::new(0), usize::MAX);
            let mut pages = 0;
            for e in &all {
                pages += e.range.pages();
                prop_assert!((e.range.start() / PAGE_SIZE..e.range.end() / PAGE_SIZE).all(|p| model.contains(&p) == e.shared));
            }
            prop_assert_eq!(pages, 260);
            let (mut from, mut again) = (RamAddr::new(0), Vec::new());
            loop {
                let some = status.extents(&layout, from, 3);
                prop_assert!(some.len() <= 3);
                let Some(last) = some.last() else { break };
                from = RamAddr::new(last.range.end());
                again.extend(some);
            }
            prop_assert_eq!(again, all);
        }
    }

    #[test]
    fn reports_that_cannot_be() {
        let (layout, status) = (layout(), EncryptionStatus::default());
        for (gpa, pages) in [(0, 0), (8, 1), (0, u64::MAX), (0, REPORT_PAGES_MAX + 1), (u64::MAX - 4095, 1)] {
            let gpa = Gpa::new(gpa);
            assert_eq!(status.report(&layout, gpa, pages, false), Err(StatusError::Range { gpa, pages }));
        }
        // As long as a report may be, over everything: the first hole is named, and nothing is taken.
        let hole = Gpa::new(100 * PAGE_SIZE);
        assert_eq!(
            status.report(&layout, Gpa::new(0), REPORT_PAGES_MAX, false),
            Err(StatusError::NotRam { gpa: hole })
        );
        assert!(status.shared().is_empty());
        // The helper's pages are nobody's to share.
        let gpa = Gpa::new(180 * PAGE_SIZE);
        assert_eq!(
            status.report(&layout, Gpa::new(170 * PAGE_SIZE), 20, false),
            Err(StatusError::NotRam { gpa })
        );
    }
}
