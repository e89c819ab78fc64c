//! Where the parts of a helper lie in its block.
//!
//! ```text
//! image | secret | TSS | worker areas | page maps | set 0 | set 1 | ... | set 4 | page digests (only where asked for)
//! ```
//!
//! A set is the configuration and the page tables of one strategy. All sets have their place in every block,
//! and the placement depends on neither strategy nor host nor on where RAM is plugged: the memory of an
//! encrypted guest is loaded and measured once, at its launch, and a host cannot write it afterwards. Both
//! ends of a migration compute the same.

use mirrorvm_abi::{config, header::Header, layout as abi};
use serde::Serialize;

use super::{GuestLayout, Shift, Strategy};
use crate::addr::{PAGE_1G, PAGE_2M, PAGE_SIZE, align_up};

/// Bytes of guest-physical space above the end of `RamAddr`s that the page maps cover: `identity-cbit` calls
/// pages by their frame numbers, and a guest's map has holes: below 4 GiB, and where blocks may be plugged
/// later.
const GPA_HEAD_ROOM: u64 = 16 << 30;
/// Table pages for the helper's own parts but the maps, and for the mailbox: 26 counted from the addresses in
/// `mirrorvm_abi::layout`, and room to grow.
const OWN_TABLES: u64 = 64;
/// Most bytes of page digests, which covers some 4 TiB of RAM: their tables come out of [`OWN_TABLES`], one a
/// GiB.
const DIGESTS_MAX: u64 = 16 << 30;

/// Which set of configuration and page tables a strategy uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperSet {
    /// `shifted` by 4 GiB or an explicit value.
    Shifted,
    /// For `shifted` by `max-phys`.
    ShiftedMaxPhys,
    /// For `identity-cbit`.
    IdentityCbit,
    /// For `declared`.
    Declared,
    /// For `psp-copied`, whichever way its memory is filled.
    PspCopied,
}

impl HelperSet {
    /// All sets, in the order in which they lie in the block.
    pub const ALL: [Self; 5] =
        [Self::Shifted, Self::ShiftedMaxPhys, Self::IdentityCbit, Self::Declared, Self::PspCopied];

    /// The set of a strategy.
    pub const fn of(strategy: &Strategy) -> Self {
        match strategy {
            Strategy::Shifted { shift: Shift::MaxPhys } => Self::ShiftedMaxPhys,
            Strategy::Shifted { shift: Shift::FourGib | Shift::Explicit { .. } } => Self::Shifted,
            Strategy::IdentityCbit => Self::IdentityCbit,
            Strategy::Declared => Self::Declared,
            Strategy::PspCopied { .. } => Self::PspCopied,
        }
    }

    /// Its position in the block.
    pub const fn index(self) -> usize {
        match self {
            Self::Shifted => 0,
            Self::ShiftedMaxPhys => 1,
            Self::IdentityCbit => 2,
            Self::Declared => 3,
            Self::PspCopied => 4,
        }
    }
}

/// Where the helper's parts lie in its block, with the set of one strategy; offsets in bytes, page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HelperPlacement {
    /// The secret page, right after the image.
    pub secret_at: u64,
    /// The zero page for the task state segment.
    pub tss_at: u64,
    /// Worker areas, one after the other, for as many workers as the ABI knows.
    pub workers_at: u64,
    /// Offset of the page maps.
    pub maps_at: u64,
    /// Bytes of page maps.
    pub maps_len: u64,
    /// The set that the next four describe.
    pub set: HelperSet,
    /// Offset of the configuration pages.
    pub config_at: u64,
    /// How many configuration pages there are.
    pub config_pages: u64,
    /// Page tables, right behind the configuration.
    pub tables_at: u64,
    /// Pages of room for them.
    pub table_pages: u64,
    /// Offset of the page digests.
    pub digests_at: u64,
    /// Bytes of page digests, as many pages as the page maps cover; 0 when the block has no room for them:
    /// then the helper cannot scan. They take address space; of memory only what is written, 16 bytes a page
    /// of RAM.
    pub digests_len: u64,
    block_len: u64,
}

impl HelperPlacement {
    /// Places a helper with this `header` for the RAM of `layout`, with the set of a strategy. The helper's
    /// own block is not looked at, so the answer is the same with and without one. `None` when sizes pass
    /// 2^64.
    pub fn new(header: &Header, layout: &GuestLayout, set: HelperSet) -> Option<Self> {
        let secret_at = align_up(header.bss_end.checked_sub(header.base)?, PAGE_SIZE)?;
        let tss_at = secret_at.checked_add(PAGE_SIZE)?;
        let workers_at = tss_at.checked_add(PAGE_SIZE)?;
        let workers_end = workers_at.checked_add(u64::from(abi::WORKERS_MAX) * abi::WORKER_BYTES)?;
        // Two maps of one bit a page, in whole u64 words.
        let words = (Self::highest(layout) / PAGE_SIZE).div_ceil(64);
        let maps_len = align_up(words.checked_mul(16)?, PAGE_SIZE)?;
        // Large maps are worth large pages, in the tables and in KVM's.
        let maps_at = align_up(workers_end, if maps_len >= PAGE_2M { PAGE_2M } else { PAGE_SIZE })?;
        let config_pages = config_pages(layout);
        let (window, identity) = (ram_window_tables(layout), identity_tables(layout));
        let maps = maps_len.div_ceil(PAGE_2M) + maps_len.div_ceil(PAGE_1G) + 2;
        let mut at = maps_at.checked_add(maps_len)?;
        let mut found = None;
        for each in HelperSet::ALL {
            let ram = if each == HelperSet::IdentityCbit { identity } else { window };
            let table_pages = OWN_TABLES + maps + ram;
            let tables_at = at.checked_add(config_pages * PAGE_SIZE)?;
            if each == set {
                found = Some((at, tables_at, table_pages));
            }
            at = tables_at.checked_add(table_pages.checked_mul(PAGE_SIZE)?)?;
        }
        let (config_at, tables_at, table_pages) = found?;
        Some(Self {
            secret_at,
            tss_at,
            workers_at,
            maps_at,
            maps_len,
            set,
            config_at,
            config_pages,
            tables_at,
            table_pages,
            digests_at: at,
            digests_len: 0,
            block_len: at,
        })
    }

    /// The same in a block of `size` bytes: with page digests when they fit.
    pub(super) fn in_block(self, layout: &GuestLayout, size: u64) -> Self {
        let fitting = self.digests(layout).filter(|(at, len)| at + len <= size);
        let (digests_at, digests_len) = fitting.unwrap_or((self.block_len, 0));
        Self { digests_at, digests_len, ..self }
    }

    /// Where digests would lie: offset and bytes.
    fn digests(&self, layout: &GuestLayout) -> Option<(u64, u64)> {
        let (at, len) = (align_up(self.block_len, PAGE_2M)?, Self::digest_bytes(layout)?);
        at.checked_add(len).is_some().then_some((at, len))
    }

    /// Bytes of the helper's block of `layout` that nobody comes to touch: room for the digests of pages that
    /// are not RAM. Those of RAM are counted in whole 2 MiB and one more for each block, as if the kernel
    /// gave no smaller pages.
    pub fn unused(layout: &GuestLayout) -> u64 {
        let Some(helper) = layout.helper() else { return 0 };
        // A block that is not larger than they would be has none: the smallest are for the maps' room of 16
        // GiB.
        let digests = Self::digest_bytes(layout).filter(|len| *len < helper.size).unwrap_or(0);
        let pieces = |block: &super::RamBlock| {
            let bytes = (block.size / PAGE_SIZE).saturating_mul(abi::DIGEST_BYTES);
            bytes.div_ceil(PAGE_2M).saturating_add(1).saturating_mul(PAGE_2M)
        };
        digests.saturating_sub(layout.ram().map(pieces).fold(0, u64::saturating_add))
    }

    /// Bytes of digests of all pages that the page maps cover. Whole 2 MiB, so that they need few tables.
    fn digest_bytes(layout: &GuestLayout) -> Option<u64> {
        let bytes = (Self::highest(layout) / PAGE_SIZE).checked_mul(abi::DIGEST_BYTES)?;
        align_up(bytes, PAGE_2M).filter(|len| *len <= DIGESTS_MAX)
    }

    /// How large a helper's block must be for `layout` (save areas included, the helper's block ignored),
    /// rounded up to 2 MiB.
    pub fn block_size(header: &Header, layout: &GuestLayout) -> Option<u64> {
        align_up(Self::new(header, layout, HelperSet::Shifted)?.block_len, PAGE_2M)
    }

    /// The same with room for page digests: for guests whose writes nobody logs. Without it where there are
    /// too many pages for them.
    pub fn block_size_with_digests(header: &Header, layout: &GuestLayout) -> Option<u64> {
        let placement = Self::new(header, layout, HelperSet::Shifted)?;
        match placement.digests(layout) {
            Some((at, len)) => Some(at + len),
            None => Self::block_size(header, layout),
        }
    }

    /// Bytes from the start of the block to the end of the last set.
    pub const fn block_len(&self) -> u64 {
        self.block_len
    }

    /// Ranges that the configuration has room for.
    pub const fn ranges_max(&self) -> u64 {
        (self.config_pages * PAGE_SIZE - config::FIXED_BYTES as u64) / config::RANGE_BYTES as u64
    }

    /// The first address that the page maps do not cover: a `RamAddr`, or a GPA under `identity-cbit`.
    pub(super) fn highest(layout: &GuestLayout) -> u64 {
        layout.guest_end().get().saturating_add(GPA_HEAD_ROOM).min(abi::WINDOW_MAX)
    }
}

/// Room for a range a block, and for as many again and some more when RAM is plugged in parts.
fn config_pages(layout: &GuestLayout) -> u64 {
    let ranges = 2 * layout.ram().count() + 16;
    let bytes = (config::FIXED_BYTES + ranges * config::RANGE_BYTES) as u64;
    bytes.div_ceil(PAGE_SIZE).min(abi::CONFIG_PAGES_MAX)
}

/// Counts the tables that ascending spans need, each table once.
#[derive(Default)]
struct TableCount {
    pages: u64,
    // The first region of 512 GiB, 1 GiB and 2 MiB that has no table yet.
    next: [u64; 3],
}

impl TableCount {
    /// One more span, from `start` to `end`, with 2 MiB pages at most. Its address in the mirror has the same
    /// offset within 2 MiB.
    fn span(&mut self, start: u64, end: u64) {
        self.regions(0, start >> 39, (end - 1) >> 39);
        self.regions(1, start >> 30, (end - 1) >> 30);
        if !start.is_multiple_of(PAGE_2M) || end - start < PAGE_2M {
            self.regions(2, start >> 21, start >> 21);
        }
        if !end.is_multiple_of(PAGE_2M) {
            self.regions(2, (end - 1) >> 21, (end - 1) >> 21);
        }
    }

    fn regions(&mut self, level: usize, first: u64, last: u64) {
        let first = first.max(self.next[level]);
        if first <= last {
            self.pages += last - first + 1;
            self.next[level] = last + 1;
        }
    }
}

/// Table pages for a window that is addressed by `RamAddr`, on a host without 1 GiB pages.
fn ram_window_tables(layout: &GuestLayout) -> u64 {
    let mut count = TableCount::default();
    let mut run: Option<(u64, u64)> = None;
    for r in layout.ram().map(super::RamBlock::ram_range) {
        match &mut run {
            Some((_, end)) if *end == r.start() => *end = r.end(),
            _ => {
                if let Some((start, end)) = run.replace((r.start(), r.end())) {
                    count.span(start, end);
                }
            }
        }
    }
    if let Some((start, end)) = run {
        count.span(start, end);
    }
    count.pages
}

/// Table pages for a window that is addressed by GPA, wherever each block will be plugged: two tables a block
/// for its edges, and some more for blocks that are plugged in parts.
fn identity_tables(layout: &GuestLayout) -> u64 {
    let highest = HelperPlacement::highest(layout);
    highest.div_ceil(PAGE_1G) + highest.div_ceil(512 * PAGE_1G) + 2 * layout.ram().count() as u64 + 64
}
