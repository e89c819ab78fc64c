//! A VM's physical memory: slots, and which of their pages were written.
//!
//! Owns: KVM's rules for slots (virt/kvm/kvm_main.c, kvm_set_memory_region), the dirty log. Must not know:
//! page tables, encryption, programs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::addr::{MirrorGpa, PAGE_SIZE};
use crate::hypervisor::{HypervisorError, Slot, SlotId};
use crate::memory::Mapping;

const CALL: &str = "KVM_SET_USER_MEMORY_REGION";

/// A slot in force.
struct Entry {
    id: SlotId,
    slot: Slot,
    /// A bit a page, while writes are logged.
    dirty: Option<Box<[AtomicU64]>>,
}

/// The slots of a VM, disjoint, by ascending address.
#[derive(Default)]
pub(super) struct Slots {
    entries: Vec<Entry>,
}

/// Memory that a slot shows at an address.
pub(super) struct Backing<'a> {
    pub memory: &'a Arc<Mapping>,
    pub offset: u64,
    pub read_only: bool,
    entry: &'a Entry,
}

impl Backing<'_> {
    /// Marks the pages of `len` bytes, at least one, as written. They lie in the slot.
    pub fn mark(&self, len: u64) {
        let Some(dirty) = &self.entry.dirty else { return };
        let at = self.offset - self.entry.slot.offset;
        for page in at / PAGE_SIZE..=(at + len - 1) / PAGE_SIZE {
            dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Relaxed);
        }
    }
}

impl Slots {
    /// Adds a slot, or changes the dirty logging of one. `budget` bounds the numbers.
    pub fn set(&mut self, id: SlotId, slot: Slot, budget: u32) -> Result<(), HypervisorError> {
        let refuse = |what| HypervisorError::Slot { slot: id.0, what };
        let end = slot.offset.checked_add(slot.len).ok_or_else(|| refuse("wraps"))?;
        if slot.len == 0 || end > slot.memory.len() {
            return Err(refuse("leaves its memory"));
        }
        let aligned = (slot.gpa | slot.len | slot.offset).is_multiple_of(PAGE_SIZE);
        if id.0 >= budget || !aligned || slot.gpa.checked_add(slot.len).is_none() {
            return Err(kernel(libc::EINVAL));
        }
        if let Some(entry) = self.entries.iter_mut().find(|e| e.id == id) {
            let place = |s: &Slot| (s.gpa, s.len, s.offset, s.read_only);
            if place(&entry.slot) != place(&slot) || !Arc::ptr_eq(&entry.slot.memory, &slot.memory) {
                return Err(refuse("would change its place"));
            }
            if entry.slot.dirty_log != slot.dirty_log {
                entry.dirty = slot.dirty_log.then(|| empty_log(slot.len));
                entry.slot.dirty_log = slot.dirty_log;
            }
            return Ok(());
        }
        let at = self.entries.partition_point(|e| e.slot.gpa < slot.gpa);
        let below = at.checked_sub(1).is_some_and(|i| end_of(&self.entries[i].slot) > slot.gpa);
        let above = self.entries.get(at).is_some_and(|e| e.slot.gpa < end_of(&slot));
        if below || above {
            return Err(kernel(libc::EEXIST));
        }
        let dirty = slot.dirty_log.then(|| empty_log(slot.len));
        self.entries.insert(at, Entry { id, slot, dirty });
        Ok(())
    }

    pub fn remove(&mut self, id: SlotId) -> Result<(), HypervisorError> {
        let at = self.entries.iter().position(|e| e.id == id);
        let at = at.ok_or(HypervisorError::Slot { slot: id.0, what: "is not there" })?;
        self.entries.remove(at);
        Ok(())
    }

    /// The log of a slot since the last call. Exclusive: no access is between its mark and its write.
    pub fn take_log(&mut self, id: SlotId) -> Result<Vec<u64>, HypervisorError> {
        let entry = self.entries.iter_mut().find(|e| e.id == id);
        let log = entry.and_then(|e| e.dirty.as_mut());
        let log = log.ok_or(HypervisorError::Slot { slot: id.0, what: "is not logged" })?;
        Ok(log.iter_mut().map(|w| std::mem::take(w.get_mut())).collect())
    }

    /// What lies at `gpa`. A slot holds whole pages: what starts in one reaches to its page's end at least.
    pub fn locate(&self, gpa: MirrorGpa) -> Option<Backing<'_>> {
        let after = self.entries.partition_point(|e| e.slot.gpa <= gpa.get());
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let at = gpa.get() - entry.slot.gpa;
        (at < entry.slot.len).then(|| Backing {
            memory: &entry.slot.memory,
            offset: entry.slot.offset + at,
            read_only: entry.slot.read_only,
            entry,
        })
    }

    /// Bytes in all slots.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().fold(0, |sum, e| sum.saturating_add(e.slot.len))
    }
}

/// Callers have checked that it does not wrap.
const fn end_of(slot: &Slot) -> u64 {
    slot.gpa + slot.len
}

fn empty_log(len: u64) -> Box<[AtomicU64]> {
    (0..(len / PAGE_SIZE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

/// What the kernel would answer.
fn kernel(errno: i32) -> HypervisorError {
    HypervisorError::Kernel { call: CALL, source: std::io::Error::from_raw_os_error(errno) }
}
