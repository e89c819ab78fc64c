//! The destination's RAM, made present ahead of what arrives.
//!
//! Owns: which pages are about to be written for the first time, asking the kernel for them in one call. Must not know:
//! the records' content. What the headers say is a hint here: the helper decides what is written.
//!
//! A first touch through a mirror's slot costs an exit to KVM and a fault for every page of the backing; asked for by
//! range, the kernel hands out the same pages at the speed of clearing them, on a thread that waits for the network
//! anyway. Pages that come as zero are not asked for: memory that a guest never wrote stays unallocated.

use mirrorvm_abi::record::{Header, Kind};

use crate::addr::{PAGE_SIZE, RamAddr};
use crate::address_space::MirrorPlan;
use crate::memory::GuestRam;

/// Fewer pages in a row are left to fault: a system call costs more than they do.
const RUN_MIN: u64 = 16;

/// Collects the runs of one batch.
pub(super) struct Landing<'a> {
    ram: &'a GuestRam,
    plan: &'a MirrorPlan,
    /// First page as the helper calls it, pages.
    run: (u64, u64),
}

impl<'a> Landing<'a> {
    pub const fn new(ram: &'a GuestRam, plan: &'a MirrorPlan) -> Self {
        Self { ram, plan, run: (0, 0) }
    }

    /// Notes a record that is about to be opened.
    pub fn expect(&mut self, header: &Header) {
        if header.kind != Kind::Page {
            return;
        }
        let (first, pages) = self.run;
        if first.checked_add(pages) == Some(header.page) && pages > 0 {
            self.run.1 += 1;
        } else {
            self.prepare();
            self.run = (header.page, 1);
        }
    }

    /// Makes the last run present.
    pub fn prepare(&mut self) {
        let (first, pages) = std::mem::take(&mut self.run);
        if pages < RUN_MIN {
            return;
        }
        // Neighbours for the helper are neighbours in RAM but where two blocks meet: then the span is not in one block.
        let Some(at) = self.plan.ram_page(first).and_then(|p| p.get().checked_mul(PAGE_SIZE)) else { return };
        let (at, len) = (RamAddr::new(at), pages * PAGE_SIZE);
        if let Ok((mapping, offset)) = self.ram.locate(at, len) {
            mapping.populate(offset, len);
        }
    }
}
