//! Which pages a guest shares with its host, by `RamAddr`, also for RAM that is not plugged at the moment.
//!
//! Guests report in guest physical addresses (KVM_HC_MAP_GPA_RANGE); what is kept is by `RamAddr`, so that a page
//! that is private and not mapped anywhere is still known (Paolo Bonzini, 18 Aug 2021).

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::addr::{Gpa, PAGE_SIZE, RamPage};
use crate::address_space::GuestLayout;
use crate::pages::PageSet;

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

/// Most pages in one report: what a guest of 64 TiB has.
const REPORT_MAX: u64 = 64 << 28;

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

    /// Takes a guest's report; all or nothing.
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
        if pages == 0 || pages > REPORT_MAX || !gpa.is_aligned(PAGE_SIZE) {
            return Err(bad);
        }
        gpa.checked_add(pages * PAGE_SIZE).ok_or(bad)?;
        let mut list = Vec::new();
        for i in 0..pages {
            let at = Gpa::new(gpa.get() + i * PAGE_SIZE);
            let ram = layout
                .gpa_to_ram(at)
                .filter(|r| layout.helper().is_none_or(|h| !h.ram_range().contains(r.get())));
            list.push(ram.ok_or(StatusError::NotRam { gpa: at })?.page());
        }
        let mut shared = self.set();
        for page in list {
            if private {
                shared.remove(page);
            } else {
                shared.insert(page);
            }
        }
        Ok(())
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
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
