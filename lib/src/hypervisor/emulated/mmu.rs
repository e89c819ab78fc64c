//! The software MMU: what a processor does with a virtual address, and what the memory controller does with
//! the C-bit.
//!
//! Owns: the walk over the four levels of page tables in a VM's own memory (AMD APM vol. 2, 5.3 and 5.4),
//! protection, the choice between private and shared access (15.34). Must not know: programs. There is no
//! TLB, so what is changed in a table or a slot counts from the next access on, and accessed and dirty bits
//! are not written.
//!
//! With a key, table walks and instruction fetches are always private, whatever the C-bit says; data is
//! private when the last entry has the C-bit. Without a key the C-bit is no part of the address and has no
//! effect.
//!
//! A private write of less than a cipher block (16 bytes) reads, changes and writes that block: two vCPUs
//! that write different words of one private block at the same time may lose one, which hardware's caches
//! prevent. No program here does that; what several write at once lies in shared pages.

use std::sync::{Arc, RwLock, RwLockReadGuard};

use super::slots::{Backing, Slots};
use crate::addr::{HelperVa, MirrorGpa, PAGE_SIZE};
use crate::address_space::HostLimits;
use crate::hypervisor::Exit;
use crate::sev::model::MemoryKey;
use crate::sync::Shared;

/// Why an access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A page fault or general protection fault. No program here has a handler: a triple fault.
    Exception,
    /// No memory at this address, or memory that may only be read.
    NoMemory {
        /// The mirror-physical address that was accessed.
        gpa: MirrorGpa,
        /// Whether it was a write.
        write: bool,
    },
}

impl From<Fault> for Exit {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Exception => Self::Shutdown,
            Fault::NoMemory { gpa, write } => Self::Mmio { gpa: gpa.get(), write },
        }
    }
}

/// What an access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Fetch,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub gpa: MirrorGpa,
    /// Whether the access goes through the key, if there is one.
    pub encrypted: bool,
}

/// A vCPU's view of its VM's memory.
pub(super) struct Mmu<'a> {
    pub slots: &'a RwLock<Slots>,
    pub limits: &'a HostLimits,
    /// The key of the VM's ASID; `None` without SEV.
    pub key: Option<Arc<MemoryKey>>,
    /// As CR3 holds it.
    pub cr3: u64,
    /// Whether the access is made at CPL 3.
    pub user: bool,
}

// Bits of an entry, AMD APM vol. 2, 5.4.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Mmu<'_> {
    /// Copies bytes from virtual memory.
    pub fn read(&self, va: HelperVa, to: &mut [u8]) -> Result<(), Fault> {
        self.copy_out(va, to, Access::Read)
    }

    /// Copies instruction bytes out, as they would be executed.
    pub fn fetch(&self, va: HelperVa, to: &mut [u8]) -> Result<(), Fault> {
        self.copy_out(va, to, Access::Fetch)
    }

    /// Copies bytes in. Pages before one that cannot be written are written.
    pub fn write(&self, va: HelperVa, from: &[u8]) -> Result<(), Fault> {
        let slots = self.lock();
        each_page(va, from.len(), |va, span| {
            let part = &from[span];
            let (backing, encrypted) = self.place(&slots, va, Access::Write)?;
            backing.mark(part.len() as u64);
            match self.key.as_deref().filter(|_| encrypted) {
                Some(key) => key.write(backing.memory, backing.offset, part),
                None => backing.memory.write(backing.offset, part),
            }
            Ok(())
        })
    }

    /// Reads an aligned word, with acquire ordering when it is shared.
    pub fn load(&self, va: HelperVa) -> Result<u32, Fault> {
        let slots = self.lock();
        let (backing, encrypted) = self.place(&slots, aligned(va)?, Access::Read)?;
        Ok(match self.key.as_deref().filter(|_| encrypted) {
            Some(key) => {
                let mut bytes = [0; 4];
                key.read(backing.memory, backing.offset, &mut bytes);
                u32::from_le_bytes(bytes)
            }
            None => backing.memory.load_u32(backing.offset),
        })
    }

    /// Writes an aligned word, with release ordering when it is shared.
    pub fn store(&self, va: HelperVa, value: u32) -> Result<(), Fault> {
        let slots = self.lock();
        let (backing, encrypted) = self.place(&slots, aligned(va)?, Access::Write)?;
        backing.mark(4);
        match self.key.as_deref().filter(|_| encrypted) {
            Some(key) => key.write(backing.memory, backing.offset, &value.to_le_bytes()),
            None => backing.memory.store_u32(backing.offset, value),
        }
        Ok(())
    }

    /// Whether `access` to every page of `len` bytes would be done.
    pub fn probe(&self, va: HelperVa, len: usize, access: Access) -> Result<(), Fault> {
        let slots = self.lock();
        each_page(va, len, |va, _| self.place(&slots, va, access).map(|_| ()))
    }

    /// Bytes in the VM's slots.
    pub fn slot_bytes(&self) -> u64 {
        self.lock().bytes()
    }

    fn copy_out(&self, va: HelperVa, to: &mut [u8], access: Access) -> Result<(), Fault> {
        let slots = self.lock();
        each_page(va, to.len(), |va, span| {
            let part = &mut to[span];
            let (backing, encrypted) = self.place(&slots, va, access)?;
            match self.key.as_deref().filter(|_| encrypted) {
                Some(key) => key.read(backing.memory, backing.offset, part),
                None => backing.memory.read(backing.offset, part),
            }
            Ok(())
        })
    }

    fn lock(&self) -> RwLockReadGuard<'_, Slots> {
        // Held over walk and copy: whoever removes a slot or takes a log waits for accesses under way.
        self.slots.to_read()
    }

    /// The memory behind `va`, and whether it is private.
    fn place<'s>(
        &self,
        slots: &'s Slots,
        va: HelperVa,
        access: Access,
    ) -> Result<(Backing<'s>, bool), Fault> {
        let Translation { gpa, encrypted } = self.walk(slots, va, access)?;
        let write = access == Access::Write;
        match slots.locate(gpa) {
            Some(backing) if !(write && backing.read_only) => Ok((backing, encrypted)),
            // KVM cannot emulate an instruction that it cannot read.
            None if access == Access::Fetch => Err(Fault::Exception),
            _ => Err(Fault::NoMemory { gpa, write }),
        }
    }

    /// Translates the virtual address `va` for an access of this kind.
    pub fn walk(&self, slots: &Slots, va: HelperVa, access: Access) -> Result<Translation, Fault> {
        let v = va.get();
        // Canonical: bits 63 to 47 are alike.
        if (v as i64) >> 47 != 0 && (v as i64) >> 47 != -1 {
            return Err(Fault::Exception);
        }
        let c_bit = self.limits.c_bit_mask();
        // CR3's low bits are cache controls.
        let mut table = self.address(self.cr3)?;
        let mut rights = WRITABLE | USER;
        let mut no_execute = 0;
        let mut shift = 39;
        loop {
            let entry = self.entry(slots, table | (v >> shift & 0x1ff) << 3)?;
            if entry & PRESENT == 0 {
                return Err(Fault::Exception);
            }
            rights &= entry;
            no_execute |= entry & NO_EXECUTE;
            let address = self.address(entry)?;
            let large = entry & LARGE != 0;
            if large && shift == 39 {
                return Err(Fault::Exception);
            }
            if shift == 12 || large {
                let inside = (1u64 << shift) - 1;
                // Reserved bits of a large page. Its bit 12 is PAT's, which no program here uses: refused as
                // well.
                if address & inside != 0 {
                    return Err(Fault::Exception);
                }
                let allowed = match access {
                    Access::Read => true,
                    // CR0.WP is set: it counts at CPL 0 too.
                    Access::Write => rights & WRITABLE != 0,
                    Access::Fetch => no_execute == 0,
                };
                if !allowed || (self.user && rights & USER == 0) {
                    return Err(Fault::Exception);
                }
                let encrypted = access == Access::Fetch || entry & c_bit != 0;
                return Ok(Translation { gpa: MirrorGpa::new(address | v & inside), encrypted });
            }
            table = address;
            shift -= 9;
        }
    }

    /// The address in an entry or in CR3. Bits that the machine does not have are reserved.
    fn address(&self, entry: u64) -> Result<u64, Fault> {
        let address = entry & ADDRESS & !self.limits.c_bit_mask();
        if address < self.limits.phys_limit() { Ok(address) } else { Err(Fault::Exception) }
    }

    /// A table's entry. Without memory there, KVM answers with a page fault.
    fn entry(&self, slots: &Slots, at: u64) -> Result<u64, Fault> {
        let backing = slots.locate(MirrorGpa::new(at)).ok_or(Fault::Exception)?;
        let mut bytes = [0; 8];
        match self.key.as_deref() {
            Some(key) => key.read(backing.memory, backing.offset, &mut bytes),
            None => backing.memory.read(backing.offset, &mut bytes),
        }
        Ok(u64::from_le_bytes(bytes))
    }
}

fn aligned(va: HelperVa) -> Result<HelperVa, Fault> {
    if va.is_aligned(4) { Ok(va) } else { Err(Fault::Exception) }
}

/// Cuts a span at page boundaries: address, and where in the caller's buffer. What wraps past the top is a
/// fault.
fn each_page(
    va: HelperVa,
    len: usize,
    mut f: impl FnMut(HelperVa, std::ops::Range<usize>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut done = 0;
    while done < len {
        let at = va.checked_add(done as u64).ok_or(Fault::Exception)?;
        let part = ((PAGE_SIZE - at.get() % PAGE_SIZE) as usize).min(len - done);
        f(at, done..done + part)?;
        done += part;
    }
    Ok(())
}
