//! Builds x86-64 four-level page tables for the helper.
//!
//! Large pages wherever address and length allow, so that a 1 TiB window costs a few KiB of tables.
//! Entry bits: AMD APM vol. 2, section 5.3 (long-mode page translation).

use super::Coverage;
use crate::addr::{HelperVa, MirrorGpa, PAGE_1G, PAGE_2M, PAGE_SIZE};

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
// The helper runs at CPL 3 (native speed on every KVM here), so every level needs U/S.
pub(super) const USER: u64 = 1 << 2;
// Accessed and dirty are set from the start: the helper's tables are not writable by it, and KVM would
// otherwise have to write them.
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// First virtual address that four levels cannot hold in the lower half.
pub(super) const VA_LIMIT: u64 = 1 << 47;

/// What the helper may do with a mapping. There is no writable-and-executable on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read only, no execute.
    Read,
    /// Read and write, no execute.
    ReadWrite,
    /// The helper may read and execute it.
    ReadExecute,
}

/// One contiguous mapping of the helper's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First virtual address of the mapping.
    pub va: HelperVa,
    /// Mirror-physical address that it leads to.
    pub gpa: MirrorGpa,
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
    /// What the helper may do there.
    pub access: Access,
    /// Whether the C-bit is set (no effect on a host without one).
    pub encrypted: bool,
}

/// Why tables could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// A mapping is zero, unaligned or leaves the lower canonical half.
    #[error("mapping {index} at {va} is zero, unaligned or not canonical")]
    BadMapping {
        /// Index of the mapping.
        index: usize,
        /// First virtual address of the mapping.
        va: HelperVa,
    },
    /// Two mappings cover one virtual address.
    #[error("mapping {index} covers {va}, which is mapped already")]
    Conflict {
        /// Index of the later of the two mappings.
        index: usize,
        /// A virtual address that both map.
        va: HelperVa,
    },
    /// More table pages than there is room for.
    #[error("page tables need more than {room} pages")]
    NoRoom {
        /// Pages that there is room for.
        room: usize,
    },
}

/// A page of tables, kept as the span of entries that is in use: a guest with ten thousand blocks of odd
/// sizes has as many pages with an entry or two, and zeroing and touching all of them would take longer than
/// everything else in a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    first: usize,
    entries: Vec<u64>,
}

impl Table {
    fn get(&self, slot: usize) -> u64 {
        slot.checked_sub(self.first).and_then(|i| self.entries.get(i)).copied().unwrap_or(0)
    }

    /// The `count` entries from `slot` on, to be written.
    fn span(&mut self, slot: usize, count: usize) -> &mut [u64] {
        if self.entries.is_empty() {
            self.first = slot;
        }
        let before = self.first.saturating_sub(slot);
        if before > 0 {
            self.entries.splice(0..0, std::iter::repeat_n(0, before));
            self.first = slot;
        }
        let from = slot - self.first;
        if self.entries.len() < from + count {
            self.entries.resize(from + count, 0);
        }
        &mut self.entries[from..from + count]
    }
}

/// Finished page tables: 512 entries a page, the root first, to be placed at consecutive addresses from
/// `base`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTables {
    base: MirrorGpa,
    pages: Vec<Table>,
    c_bit: u64,
    /// Pages of 4 KiB, 2 MiB and 1 GiB.
    leaves: [u64; 3],
}

impl PageTables {
    /// Builds tables for `mappings`, to be placed at `base`; at most `room` pages.
    ///
    /// # Errors
    /// [`TableError`]; nothing is kept then.
    pub fn build(
        mappings: &[Mapping],
        base: MirrorGpa,
        c_bit: u64,
        gib_pages: bool,
        room: usize,
    ) -> Result<Self, TableError> {
        let mut tables = Self { base, pages: Vec::new(), c_bit, leaves: [0; 3] };
        tables.new_page(room)?;
        for (index, m) in mappings.iter().enumerate() {
            let end = m.va.get().checked_add(m.len);
            let aligned = m.va.is_aligned(PAGE_SIZE) && m.gpa.is_aligned(PAGE_SIZE) && m.len % PAGE_SIZE == 0;
            if m.len == 0 || !aligned || end.is_none_or(|e| e > VA_LIMIT) {
                return Err(TableError::BadMapping { index, va: m.va });
            }
            tables.map(index, m, gib_pages, room)?;
        }
        Ok(tables)
    }

    /// Where the root must lie; what CR3 holds (without the C-bit).
    pub const fn root(&self) -> MirrorGpa {
        self.base
    }

    /// The C-bit in force, for CR3.
    pub const fn c_bit(&self) -> u64 {
        self.c_bit
    }

    /// How many pages the tables take.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// What the tables cover; bytes of windows are the planner's to add.
    pub fn coverage(&self) -> Coverage {
        let pml4 =
            self.pages.first().map_or(0, |root| root.entries.iter().filter(|e| **e & PRESENT != 0).count());
        let [kib4_leaves, mib2_leaves, gib_leaves] = self.leaves;
        Coverage {
            pml4_entries: pml4 as u64,
            gib_leaves,
            mib2_leaves,
            kib4_leaves,
            table_pages: self.pages.len() as u64,
            ..Coverage::default()
        }
    }

    /// The tables as they must lie in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.pages.len() * PAGE_SIZE as usize];
        for (table, page) in self.pages.iter().zip(bytes.chunks_exact_mut(PAGE_SIZE as usize)) {
            let (slots, _) = page.as_chunks_mut::<8>();
            for (slot, entry) in slots[table.first..].iter_mut().zip(&table.entries) {
                *slot = entry.to_le_bytes();
            }
        }
        bytes
    }

    /// The entry at mirror-physical address `at`, for a walker.
    pub fn entry_at(&self, at: MirrorGpa) -> Option<u64> {
        let offset = at.offset_from(self.base)?;
        let page = self.pages.get(usize::try_from(offset / PAGE_SIZE).ok()?)?;
        Some(page.get((offset % PAGE_SIZE / 8) as usize))
    }

    fn map(&mut self, index: usize, m: &Mapping, gib_pages: bool, room: usize) -> Result<(), TableError> {
        let mut done = 0;
        while done < m.len {
            let (va, gpa, left) = (m.va.get() + done, m.gpa.get() + done, m.len - done);
            let fits = |size: u64| va % size == 0 && gpa % size == 0 && left >= size;
            let (size, level) = match () {
                () if gib_pages && fits(PAGE_1G) => (PAGE_1G, 2u32),
                () if fits(PAGE_2M) => (PAGE_2M, 1),
                () => (PAGE_SIZE, 0),
            };
            // As many entries of this size as fit, up to the end of the table or to where larger pages may
            // fit again: one descent for up to 512 entries.
            let table = self.table_for(index, va, level, room)?;
            let first = slot_of(va, level);
            let count = (left / size).min(512 - first as u64) as usize;
            let entry = leaf(gpa, m, level, self.c_bit);
            for (i, slot) in self.pages[table].span(first, count).iter_mut().enumerate() {
                if *slot & PRESENT != 0 {
                    let va = HelperVa::new(va + i as u64 * size);
                    return Err(TableError::Conflict { index, va });
                }
                *slot = entry + i as u64 * size;
            }
            self.leaves[level as usize] += count as u64;
            done += count as u64 * size;
        }
        Ok(())
    }

    /// The table of `level` (0 = PTEs, 1 = PDEs, 2 = PDPTEs) for `va`, made with those above it where it is
    /// missing.
    fn table_for(&mut self, index: usize, va: u64, level: u32, room: usize) -> Result<usize, TableError> {
        let mut page = 0usize;
        for above in ((level + 1)..=3).rev() {
            let slot = slot_of(va, above);
            let existing = self.pages[page].get(slot);
            page = if existing & PRESENT == 0 {
                let new = self.new_page(room)?;
                let at = self.base.get() + new as u64 * PAGE_SIZE;
                self.pages[page].span(slot, 1)[0] = at | self.c_bit | PRESENT | WRITABLE | USER | ACCESSED;
                new
            } else if existing & LARGE != 0 && above < 3 {
                return Err(TableError::Conflict { index, va: HelperVa::new(va) });
            } else {
                let at = existing & !self.c_bit & ADDRESS_MASK;
                ((at - self.base.get()) / PAGE_SIZE) as usize
            };
        }
        Ok(page)
    }

    fn new_page(&mut self, room: usize) -> Result<usize, TableError> {
        if self.pages.len() >= room {
            return Err(TableError::NoRoom { room });
        }
        self.pages.push(Table::default());
        Ok(self.pages.len() - 1)
    }
}

/// Bits 51:12 of an entry: the address.
pub(super) const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

const fn slot_of(va: u64, level: u32) -> usize {
    ((va >> (12 + 9 * level)) & 511) as usize
}

const fn leaf(gpa: u64, m: &Mapping, level: u32, c_bit: u64) -> u64 {
    let mut e = gpa | PRESENT | USER | ACCESSED;
    if level > 0 {
        e |= LARGE;
    }
    if m.encrypted {
        e |= c_bit;
    }
    match m.access {
        Access::Read => e | NO_EXECUTE,
        Access::ReadWrite => e | NO_EXECUTE | WRITABLE | DIRTY,
        Access::ReadExecute => e,
    }
}
