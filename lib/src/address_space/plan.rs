//! What a strategy yields: slots, page tables, where the helper lies, what stays out of reach, what is exposed.

use mirrorvm_abi::{header::Header, layout as abi, mailbox};
use serde::{Deserialize, Serialize};

use super::{
    Access, BlockRole, GuestLayout, HostLimits, Mapping, PageTables, Refusal, RefusalCode, Strategy, shifted,
    walk,
};
use crate::addr::{HelperVa, MirrorGpa, PAGE_1G, PAGE_2M, PAGE_SIZE, PageRange, RamAddr, align_up};

/// What a slot or mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The bottom 4 GiB of the guest, one to one.
    LowWindow,
    /// All RAM, addressed by `RamAddr`.
    RamWindow,
    /// Rings and buffers shared with the host.
    Mailbox,
    /// The helper's code.
    HelperText,
    /// The helper's constants.
    HelperRodata,
    /// The helper's data.
    HelperData,
    /// Configuration written by the loader.
    HelperConfig,
    /// The guest's migration secret.
    HelperSecret,
    /// The task state segment: a page of zeroes.
    HelperTss,
    /// A worker's stack.
    HelperStack,
    /// The helper's page maps.
    HelperMaps,
}

/// What is behind a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SlotBacking {
    /// A span of guest RAM.
    Ram {
        /// First byte.
        ram_addr: RamAddr,
    },
    /// The mailbox, from its start.
    Mailbox,
}

/// One memory slot of the mirror. Never dirty-logged: a logged slot costs 4 KiB faults again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MirrorSlot {
    /// Where the mirror sees it.
    pub gpa: MirrorGpa,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub backing: SlotBacking,
    /// What for.
    pub purpose: Purpose,
}

/// A mapping of the helper's address space with what it is for.
pub type PlannedMapping = (Purpose, Mapping);

/// Where the helper's parts lie in its block; offsets in bytes, page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HelperPlacement {
    /// Configuration pages start here, right after the image.
    pub config_at: u64,
    /// Configuration pages.
    pub config_pages: u64,
    /// The secret page.
    pub secret_at: u64,
    /// The zero page for the task state segment.
    pub tss_at: u64,
    /// Worker areas.
    pub workers_at: u64,
    /// Page maps.
    pub maps_at: u64,
    /// Bytes of page maps.
    pub maps_len: u64,
    /// Page tables, up to the block's end.
    pub tables_at: u64,
}

impl HelperPlacement {
    /// Places a helper with this `header` for RAM that ends at `ram_end` and has `ranges` ranges. Depends on
    /// nothing else, so that both ends of a migration agree.
    pub fn new(header: &Header, ram_end: RamAddr, ranges: usize) -> Option<Self> {
        let config_at = align_up(header.footprint(), PAGE_SIZE)?;
        let config_bytes = mirrorvm_abi::config::FIXED_BYTES + ranges * mirrorvm_abi::config::RANGE_BYTES;
        let config_pages = (config_bytes as u64).div_ceil(PAGE_SIZE);
        let secret_at = config_at + config_pages * PAGE_SIZE;
        let tss_at = secret_at + PAGE_SIZE;
        let workers_at = tss_at + PAGE_SIZE;
        let maps_at = workers_at + u64::from(abi::WORKERS_MAX) * abi::WORKER_BYTES;
        // Two maps of one bit a page, in whole u64 words.
        let words = (ram_end.get() / PAGE_SIZE).div_ceil(64);
        let maps_len = align_up(words.checked_mul(16)?, PAGE_SIZE)?;
        let tables_at = maps_at.checked_add(maps_len)?;
        (config_pages <= abi::CONFIG_PAGES_MAX).then_some(Self {
            config_at,
            config_pages,
            secret_at,
            tss_at,
            workers_at,
            maps_at,
            maps_len,
            tables_at,
        })
    }

    /// How large a helper's block should be for `layout` (without helper): placement plus page tables,
    /// rounded up to 2 MiB.
    pub fn block_size(header: &Header, layout: &GuestLayout) -> Option<u64> {
        Self::new(header, layout.guest_end(), layout.ram().count())?.size_for(layout)
    }

    fn size_for(&self, layout: &GuestLayout) -> Option<u64> {
        // Per block: at most two tables of each lower level at its edges, one directory a GiB. The window needs one
        // more level for every 512 GiB; the maps are not 2 MiB aligned and need a table for every 2 MiB. The fixed
        // part covers the rest of the helper's own mappings and the mailbox.
        let blocks: u64 = layout.blocks().iter().map(|b| 6 + b.size.div_ceil(PAGE_1G)).sum();
        let window = layout.ram_end().get().div_ceil(512 * PAGE_1G);
        let maps = self.maps_len.div_ceil(PAGE_2M) + self.maps_len.div_ceil(PAGE_1G);
        let tables = blocks + window + maps + 64;
        align_up(self.tables_at.checked_add(tables * PAGE_SIZE)?, PAGE_2M)
    }
}

/// Size of a mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MailboxSize {
    /// Workers, 1 to 16.
    pub workers: u32,
    /// Slots a worker, 1 to 16.
    pub slots: u32,
}

impl MailboxSize {
    /// Bytes, a multiple of 2 MiB so that huge pages can back it.
    pub fn bytes(self) -> u64 {
        (mailbox::mailbox_bytes(self.workers, self.slots) as u64).next_multiple_of(PAGE_2M)
    }
}

/// RAM that the helper cannot reach under the plan, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreachable {
    /// First byte.
    pub ram_addr: RamAddr,
    /// Bytes.
    pub len: u64,
    /// Stable code.
    pub code: &'static str,
}

/// What a plan lays open, said plainly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exposure {
    /// Stable code.
    pub code: &'static str,
    /// A sentence for people.
    pub detail: String,
}

/// A mirror's address space, ready to be executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPlan {
    /// What it was planned by.
    pub strategy: Strategy,
    /// Bytes between a `RamAddr` and its place in the RAM window.
    pub shift: u64,
    /// Memory slots, disjoint, by ascending address.
    pub slots: Vec<MirrorSlot>,
    /// The helper's mappings.
    pub mappings: Vec<PlannedMapping>,
    /// Page tables that realize the mappings.
    pub tables: PageTables,
    /// Where the helper's parts lie in its block.
    pub placement: HelperPlacement,
    /// Where the helper's block starts in the mirror.
    pub helper_gpa: MirrorGpa,
    /// The mailbox.
    pub mailbox: MailboxSize,
    /// Pages that the helper may export and import.
    pub allowed: Vec<PageRange>,
    /// RAM out of reach.
    pub unreachable: Vec<Unreachable>,
    /// What is laid open.
    pub exposures: Vec<Exposure>,
}

/// Plans a mirror's address space. Pure.
///
/// # Errors
/// Every refusal found, each with its code and the offending value.
pub fn plan(
    layout: &GuestLayout,
    helper: &Header,
    limits: &HostLimits,
    strategy: Strategy,
    size: MailboxSize,
) -> Result<MirrorPlan, Vec<Refusal>> {
    // First: everything else computes with these two.
    for (what, value, bound) in
        [("workers", size.workers, abi::WORKERS_MAX), ("slots", size.slots, mailbox::SLOTS_MAX)]
    {
        if !(1..=bound).contains(&value) {
            let refusal = Refusal::new(RefusalCode::MailboxSize, what, u64::from(value));
            return Err(vec![refusal.bound(u64::from(bound))]);
        }
    }
    match strategy {
        Strategy::Shifted { shift } => shifted::plan(layout, helper, limits, shift, size),
        Strategy::IdentityCbit | Strategy::Declared | Strategy::PspCopied { .. } => {
            Err(vec![Refusal::new(RefusalCode::StrategyUnavailable, strategy.name(), 0)])
        }
    }
}

/// What every strategy ends with: slots and mappings are checked, tables are built and walked.
pub(super) struct Draft {
    pub strategy: Strategy,
    pub shift: u64,
    pub slots: Vec<MirrorSlot>,
    pub placement: HelperPlacement,
    pub helper_gpa: MirrorGpa,
    pub helper_len: u64,
    pub mailbox: MailboxSize,
    pub mailbox_gpa: MirrorGpa,
    pub exposures: Vec<Exposure>,
}

impl Draft {
    /// Checks the rules that hold under every strategy and finishes the plan.
    pub fn finish(
        mut self,
        layout: &GuestLayout,
        helper: &Header,
        limits: &HostLimits,
    ) -> Result<MirrorPlan, Vec<Refusal>> {
        let mut refusals = Vec::new();
        // By count first: an absurd list is refused before it costs a sort.
        if self.slots.len() > limits.slot_budget as usize {
            let count = self.slots.len() as u64;
            let refusal = Refusal::new(RefusalCode::SlotBudget, "slots", count);
            return Err(vec![refusal.bound(u64::from(limits.slot_budget))]);
        }
        check_slots(&mut self.slots, limits, &mut refusals);
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let mappings = self.mappings(layout, helper, limits.c_bit.is_some());
        let tables = self.tables(&mappings, limits).map_err(|r| vec![r])?;
        Ok(MirrorPlan {
            strategy: self.strategy,
            shift: self.shift,
            slots: self.slots,
            mappings,
            tables,
            placement: self.placement,
            helper_gpa: self.helper_gpa,
            mailbox: self.mailbox,
            allowed: allowed_ranges(layout),
            unreachable: Vec::new(),
            exposures: self.exposures,
        })
    }

    /// `sev`: private mappings get the C-bit; without one nothing is called encrypted.
    fn mappings(&self, layout: &GuestLayout, helper: &Header, sev: bool) -> Vec<PlannedMapping> {
        let at = |offset: u64| MirrorGpa::new(self.helper_gpa.get() + offset);
        let mut list = Vec::new();
        let mut add = |purpose, va: u64, gpa: MirrorGpa, len: u64, access, encrypted| {
            if len > 0 {
                let encrypted = encrypted && sev;
                list.push((purpose, Mapping { va: HelperVa::new(va), gpa, len, access, encrypted }));
            }
        };
        let (base, p) = (helper.base, &self.placement);
        let section = |from: u64, to: u64| (from, at(from - base), to - from);
        let (va, gpa, len) = section(base, helper.text_end);
        add(Purpose::HelperText, va, gpa, len, Access::ReadExecute, true);
        let (va, gpa, len) = section(helper.text_end, helper.rodata_end);
        add(Purpose::HelperRodata, va, gpa, len, Access::Read, true);
        let (va, gpa, len) = section(helper.rodata_end, helper.bss_end);
        add(Purpose::HelperData, va, gpa, len, Access::ReadWrite, true);
        let config_len = p.config_pages * PAGE_SIZE;
        add(Purpose::HelperConfig, abi::CONFIG_VA, at(p.config_at), config_len, Access::Read, true);
        add(Purpose::HelperSecret, abi::SECRET_VA, at(p.secret_at), PAGE_SIZE, Access::Read, true);
        add(Purpose::HelperTss, abi::TSS_VA, at(p.tss_at), PAGE_SIZE, Access::Read, true);
        for w in 0..u64::from(self.mailbox.workers) {
            let va = abi::WORKER_VA + w * abi::WORKER_STRIDE;
            let gpa = at(p.workers_at + w * abi::WORKER_BYTES);
            add(Purpose::HelperStack, va, gpa, abi::WORKER_BYTES, Access::ReadWrite, true);
        }
        add(Purpose::HelperMaps, abi::MAPS_VA, at(p.maps_at), p.maps_len, Access::ReadWrite, true);
        let mailbox = self.mailbox.bytes();
        add(Purpose::Mailbox, abi::MAILBOX_VA, self.mailbox_gpa, mailbox, Access::ReadWrite, false);
        for b in layout.ram() {
            let gpa = MirrorGpa::new(b.ram_addr.get() + self.shift);
            let va = abi::WINDOW_VA + b.ram_addr.get();
            add(Purpose::RamWindow, va, gpa, b.size, Access::ReadWrite, true);
        }
        list
    }

    fn tables(&self, mappings: &[PlannedMapping], limits: &HostLimits) -> Result<PageTables, Refusal> {
        let room = self.helper_len.saturating_sub(self.placement.tables_at) / PAGE_SIZE;
        let base = MirrorGpa::new(self.helper_gpa.get() + self.placement.tables_at);
        let bare: Vec<Mapping> = mappings.iter().map(|(_, m)| *m).collect();
        let c_bit = limits.c_bit_mask();
        let tables = PageTables::build(&bare, base, c_bit, limits.gib_pages, room as usize)
            .map_err(|e| table_refusal(&e, room))?;
        // Trust, then walk: the first and last page of every mapping by a reader that shares no code with
        // the builder. Property tests walk every page.
        for (index, m) in bare.iter().enumerate() {
            for offset in [0, m.len - PAGE_SIZE] {
                let va = HelperVa::new(m.va.get() + offset);
                let found =
                    walk(va, tables.root(), c_bit, limits.phys_limit(), |at| tables.entry_at(at)).ok();
                let right =
                    found.is_some_and(|t| t.gpa.get() == m.gpa.get() + offset && t.access == m.access);
                if !right {
                    return Err(Refusal::new(RefusalCode::PageTables, "mapping", va.get()).at(index));
                }
            }
        }
        Ok(tables)
    }
}

fn table_refusal(e: &super::TableError, room: u64) -> Refusal {
    use super::TableError as T;
    match *e {
        T::NoRoom { .. } => Refusal::new(RefusalCode::PageTableSpace, "page table pages", room).bound(room),
        T::BadMapping { index, va } | T::Conflict { index, va } => {
            Refusal::new(RefusalCode::PageTables, "mapping", va.get()).at(index)
        }
    }
}

/// Every slot below the limit, without the C-bit, without overlap; sorts them.
fn check_slots(slots: &mut [MirrorSlot], limits: &HostLimits, refusals: &mut Vec<Refusal>) {
    let limit = limits.phys_limit();
    for (index, s) in slots.iter().enumerate() {
        let Some(end) = s.gpa.get().checked_add(s.len) else {
            refusals.push(Refusal::new(RefusalCode::Wraps, "slot", s.gpa.get()).at(index));
            continue;
        };
        if end > limit {
            refusals.push(Refusal::new(RefusalCode::AboveMaxPhys, "slot end", end).at(index).bound(limit));
        }
        // A span meets the C-bit when its last byte has it, or when it is long enough to reach it.
        let c = limits.c_bit_mask();
        if c != 0 && (s.gpa.get() & c != 0 || (end - 1) & c != 0 || s.len > c) {
            refusals.push(Refusal::new(RefusalCode::CBitInAddress, "slot", s.gpa.get()).at(index).bound(c));
        }
    }
    slots.sort_by_key(|s| s.gpa);
    for (index, pair) in slots.windows(2).enumerate() {
        let end = pair[0].gpa.get().saturating_add(pair[0].len);
        if pair[1].gpa.get() < end {
            refusals.push(
                Refusal::new(RefusalCode::SlotOverlap, "slot", pair[1].gpa.get()).at(index + 1).bound(end),
            );
        }
    }
}

/// The exportable pages: every block but the helper's, neighbours joined.
fn allowed_ranges(layout: &GuestLayout) -> Vec<PageRange> {
    let mut list: Vec<PageRange> = Vec::new();
    for b in layout.blocks().iter().filter(|b| b.role != BlockRole::Helper) {
        let r = b.ram_range();
        match list.last_mut() {
            Some(last) if last.end() == r.start() => {
                *last = PageRange::new(last.start(), last.len() + r.len()).unwrap_or(*last);
            }
            _ => list.push(r),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    // No strategy makes overlapping slots; this is the net below them.
    #[test]
    fn overlapping_and_wrapping_slots_are_refused_with_their_index() {
        let limits = HostLimits {
            max_phys_bits: 46,
            c_bit: None,
            phys_bit_reduction: 0,
            slot_budget: 8,
            gib_pages: false,
        };
        let slot = |gpa, len| MirrorSlot {
            gpa: MirrorGpa::new(gpa),
            len,
            backing: SlotBacking::Mailbox,
            purpose: Purpose::Mailbox,
        };
        let codes = |list: &[(u64, u64)]| {
            let mut slots: Vec<_> = list.iter().map(|(gpa, len)| slot(*gpa, *len)).collect();
            let mut refusals = Vec::new();
            check_slots(&mut slots, &limits, &mut refusals);
            refusals.iter().map(|r| (r.code, r.index, r.value)).collect::<Vec<_>>()
        };
        assert_eq!(codes(&[(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000)]), []);
        let overlap = (RefusalCode::SlotOverlap, Some(1), 0x1000);
        assert_eq!(codes(&[(0x1000, 0x1000), (0, 0x2000)]), [overlap]);
        let wraps = u64::MAX - 0xfff;
        assert_eq!(codes(&[(0, 0x1000), (wraps, 0x2000)]), [(RefusalCode::Wraps, Some(1), wraps)]);
        let beyond = (1 << 46) - 0x1000;
        assert_eq!(codes(&[(beyond, 0x1000)]), []);
        assert_eq!(codes(&[(beyond, 0x2000)]), [(RefusalCode::AboveMaxPhys, Some(0), (1 << 46) + 0x1000)]);
    }
}
