//! What a strategy yields: slots, page tables, where the helper lies, what stays out of reach, what is
//! exposed.

use mirrorvm_abi::config;
use serde::{Deserialize, Serialize};

use super::spans::SpanIndex;
use super::{
    Confidentiality, HelperPlacement, MailboxSize, Mapping, PageTables, PlanRequest, Refusal, Strategy,
    declared, identity, psp_copied, shifted,
};
use crate::addr::{MirrorGpa, PAGE_SIZE, PageRange, RamAddr, RamPage};

/// What a slot or mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The bottom 4 GiB of the guest, one to one.
    LowWindow,
    /// All RAM, addressed by `RamAddr` (by GPA under `identity-cbit`).
    RamWindow,
    /// Save areas of an SEV-ES guest's vCPUs, modelled.
    Vmsa,
    /// A slot over the helper's own block, where the guest sees it.
    Helper,
    /// A slot over a piece of the helper's block that it declared.
    DeclaredPiece,
    /// A slot over memory of the helper that belongs to the mirror alone.
    HelperPrivate,
    /// Rings and buffers shared with the host.
    Mailbox,
    /// The mapping without the C-bit over the pages that are shared on purpose, under `identity-cbit`.
    PlainAlias,
    /// The helper's code, which it may execute.
    HelperText,
    /// The helper's constants, which it may read.
    HelperRodata,
    /// The helper's data, which it may write.
    HelperData,
    /// Configuration written by the loader.
    HelperConfig,
    /// The guest's migration secret.
    HelperSecret,
    /// The task state segment: a page of zeroes.
    HelperTss,
    /// The stack of one worker.
    HelperStack,
    /// The helper's page maps.
    HelperMaps,
    /// The helper's page digests.
    HelperDigests,
}

/// What is behind a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SlotBacking {
    /// A span of guest RAM.
    Ram {
        /// RAM address of the first byte.
        ram_addr: RamAddr,
    },
    /// Memory of the helper that belongs to the mirror alone, as large as the helper's block.
    Private {
        /// First byte, counted from the start of that memory; the same offset as in the block.
        offset: u64,
    },
    /// The mailbox, from its start.
    Mailbox,
}

/// One memory slot of the mirror. Never dirty-logged: a logged slot costs 4 KiB faults again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MirrorSlot {
    /// Where the mirror sees it.
    pub gpa: MirrorGpa,
    /// Length in bytes.
    pub len: u64,
    /// What memory is behind it.
    pub backing: SlotBacking,
    /// What the slot is for.
    pub purpose: Purpose,
    /// Whether the mirror may only read it (KVM_MEM_READONLY).
    pub read_only: bool,
}

/// A mapping of the helper's address space with what it is for.
pub type PlannedMapping = (Purpose, Mapping);

/// What the helper calls pages by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Addressing {
    /// By their place in RAM.
    RamAddr,
    /// By the address where the guest sees them.
    Gpa,
}

/// Where a piece of the helper's block lies in the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HelperPiece {
    /// First byte, counted from the start of the block.
    pub offset: u64,
    /// Where it is in the mirror.
    pub gpa: MirrorGpa,
    /// Length in bytes.
    pub len: u64,
}

/// A run of RAM that the helper may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WindowRun {
    /// First byte in RAM.
    pub ram_addr: RamAddr,
    /// Length in bytes.
    pub len: u64,
    /// What the helper calls the first byte: a `RamAddr` or a GPA, by [`MirrorPlan::addressing`].
    pub helper_addr: u64,
    /// Where the mirror sees it.
    pub gpa: MirrorGpa,
}

/// What the page tables cover, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Coverage {
    /// Entries of the root table in use; one covers 512 GiB.
    pub pml4_entries: u64,
    /// Pages of 1 GiB.
    pub gib_leaves: u64,
    /// Pages of 2 MiB.
    pub mib2_leaves: u64,
    /// Pages of 4 KiB.
    pub kib4_leaves: u64,
    /// How many pages the tables take.
    pub table_pages: u64,
    /// Bytes mapped without the C-bit, so that the host can read them.
    pub alias_bytes: u64,
    /// Bytes of RAM in the helper's window.
    pub window_bytes: u64,
}

/// RAM that the helper cannot reach under the plan, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreachable {
    /// RAM address of the first byte.
    pub ram_addr: RamAddr,
    /// Length in bytes.
    pub len: u64,
    /// Why it is out of reach, as a stable code.
    pub code: &'static str,
}

/// What a plan lays open, said plainly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exposure {
    /// What is exposed, as a stable code.
    pub code: &'static str,
    /// A sentence for people.
    pub detail: String,
}

/// A mirror's address space, ready to be executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPlan {
    /// What it was planned by.
    pub strategy: Strategy,
    /// What the guest's hardware protects.
    pub confidentiality: Confidentiality,
    /// What the helper calls pages by.
    pub addressing: Addressing,
    /// Bytes between a `RamAddr` and its place in the RAM window; 0 under `identity-cbit`, which has no such
    /// constant.
    pub shift: u64,
    /// Memory slots, disjoint, by ascending address.
    pub slots: Vec<MirrorSlot>,
    /// Everything that the helper's page tables map.
    pub mappings: Vec<PlannedMapping>,
    /// Page tables that realize the mappings.
    pub tables: PageTables,
    /// What the tables cover.
    pub coverage: Coverage,
    /// Where the helper's parts lie in its block.
    pub placement: HelperPlacement,
    /// Where the helper's block lies in the mirror: by ascending offset, disjoint, neighbours joined.
    pub helper: Vec<HelperPiece>,
    /// How many workers and slots the mailbox has.
    pub mailbox: MailboxSize,
    /// Where the mailbox lies in the mirror.
    pub mailbox_gpa: MirrorGpa,
    /// Pages that the helper may export and import, ascending and disjoint, by what the helper calls them:
    /// the page numbers are [`PageRange::start`] / 4096 and so on.
    pub allowed: Vec<PageRange>,
    /// RAM out of reach.
    pub unreachable: Vec<Unreachable>,
    /// What is laid open.
    pub exposures: Vec<Exposure>,
    pub(super) spans: SpanIndex,
}

impl MirrorPlan {
    /// What the helper calls a page of RAM: what a host writes into a batch. `None` for a page that the
    /// helper may not touch.
    pub fn helper_page(&self, page: RamPage) -> Option<u64> {
        let ram = page.get().checked_mul(PAGE_SIZE)?;
        self.spans.find(ram).map(|(span, inside)| (span.helper + inside) / PAGE_SIZE)
    }

    /// The page of RAM that the helper calls `helper_page`; the inverse of [`MirrorPlan::helper_page`]. Not
    /// for hot paths: time grows with the number of ranges under `identity-cbit`.
    pub fn ram_page(&self, helper_page: u64) -> Option<RamPage> {
        let at = helper_page.checked_mul(PAGE_SIZE)?;
        let ram = match self.addressing {
            Addressing::RamAddr => self.spans.find(at).map(|_| at)?,
            Addressing::Gpa => self.spans.iter().find_map(|s| {
                at.checked_sub(s.helper).filter(|inside| *inside < s.len).map(|inside| s.ram + inside)
            })?,
        };
        Some(RamAddr::new(ram).page())
    }

    /// Pages that the helper may export and import.
    pub fn allowed_pages(&self) -> u64 {
        self.allowed.iter().map(|r| r.pages()).sum()
    }

    /// Whether the helper has room to keep a digest of every page that it may touch: of what it sealed, so
    /// that it can find the changed ones, and of what it opened, for the audit.
    pub const fn has_digests(&self) -> bool {
        self.placement.digests_len > 0
    }

    /// Where a byte of RAM lies in the mirror's RAM window. `None` for RAM that the helper may not touch.
    pub fn mirror_gpa(&self, ram: RamAddr) -> Option<MirrorGpa> {
        self.spans.find(ram.get()).map(|(span, inside)| MirrorGpa::new(span.gpa + inside))
    }

    /// The RAM that the helper may touch, by ascending `RamAddr`: what [`MirrorPlan::allowed`] is under each
    /// name.
    pub fn window(&self) -> impl Iterator<Item = WindowRun> {
        self.spans.iter().map(|s| WindowRun {
            ram_addr: RamAddr::new(s.ram),
            len: s.len,
            helper_addr: s.helper,
            gpa: MirrorGpa::new(s.gpa),
        })
    }

    /// Where a byte of the helper's block lies in the mirror. `None` for what was not declared, or lies
    /// outside.
    pub fn helper_at(&self, offset: u64) -> Option<MirrorGpa> {
        helper_piece(&self.helper, offset).map(|(gpa, _)| gpa)
    }

    /// What the loader writes into the helper's memory for this plan beside image and secret: configuration
    /// and page tables, as offsets in the block and bytes. `protection` and `policy` are what the
    /// configuration tells the helper of the guest's protection level.
    pub fn set_contents(&self, protection: u32, policy: u32) -> Vec<(u64, Vec<u8>)> {
        let ranges: Vec<config::Range> = self
            .allowed
            .iter()
            .map(|r| config::Range { first: r.start() / PAGE_SIZE, count: r.pages() })
            .collect();
        let pages = self.allowed.last().map_or(0, |r| r.end() / PAGE_SIZE);
        let fixed = config::Config {
            workers: self.mailbox.workers,
            slots: self.mailbox.slots,
            pages,
            ranges: ranges.len() as u32,
            protection,
            policy,
            digests: if self.has_digests() { pages } else { 0 },
        };
        let mut bytes = fixed.encode().to_vec();
        bytes.extend(ranges.iter().flat_map(config::Range::encode));
        vec![(self.placement.config_at, bytes), (self.placement.tables_at, self.tables.bytes())]
    }
}

/// Where `offset` is by these pieces, and how many bytes of its piece follow.
pub(super) fn helper_piece(pieces: &[HelperPiece], offset: u64) -> Option<(MirrorGpa, u64)> {
    let after = pieces.partition_point(|p| p.offset <= offset);
    let p = pieces.get(after.checked_sub(1)?)?;
    let inside = offset - p.offset;
    (inside < p.len).then(|| (MirrorGpa::new(p.gpa.get() + inside), p.len - inside))
}

/// Plans a mirror's address space. Pure.
///
/// # Errors
/// Every refusal that can be computed, each with its code and the offending value.
pub fn plan(request: &PlanRequest<'_>) -> Result<MirrorPlan, Vec<Refusal>> {
    match request.strategy {
        Strategy::Shifted { shift } => shifted::plan(request, shift),
        Strategy::IdentityCbit => identity::plan(request),
        Strategy::Declared => declared::plan(request),
        Strategy::PspCopied { via } => psp_copied::plan(request, via),
    }
}
