//! What every strategy begins and ends with: the rules that hold for all, then slots and mappings are
//! checked, tables are built and walked.

use mirrorvm_abi::{layout as abi, mailbox};

use super::plan::helper_piece;
use super::rules::{check_aliases, check_slots, split_read_only};
use super::spans::{Span, SpanIndex};
use super::{
    Access, Addressing, Confidentiality, Coverage, Exposure, HelperPiece, HelperPlacement, HelperSet,
    Mapping, MirrorPlan, MirrorSlot, PageTables, PlanRequest, PlannedMapping, Purpose, RamBlock, Refusal,
    RefusalCode, SlotBacking, TableError, Unreachable, walk,
};
use crate::addr::{HelperVa, MirrorGpa, PAGE_SIZE, PageRange, RamAddr};

/// The helper and its block, when both are fit for use.
#[derive(Clone, Copy)]
pub(super) struct Home<'a> {
    pub block: &'a RamBlock,
    pub placement: HelperPlacement,
}

/// A run of RAM in the helper's window.
#[derive(Clone, Copy)]
pub(super) struct WindowPart {
    pub span: Span,
    pub purpose: Purpose,
}

/// A plan in the making, and every refusal so far. A strategy fills it in; [`Draft::finish`] does the rest.
pub(super) struct Draft<'a> {
    pub request: &'a PlanRequest<'a>,
    pub home: Option<Home<'a>>,
    pub refusals: Vec<Refusal>,
    pub addressing: Addressing,
    pub shift: u64,
    pub slots: Vec<MirrorSlot>,
    pub window: Vec<WindowPart>,
    /// Where the helper's block is, by ascending offset.
    pub pieces: Vec<HelperPiece>,
    pub mailbox_gpa: Option<MirrorGpa>,
    /// What it means when a part of the helper is in no piece.
    pub missing_piece: RefusalCode,
    pub unreachable: Vec<Unreachable>,
    pub exposures: Vec<Exposure>,
}

impl<'a> Draft<'a> {
    /// Checks what does not depend on the strategy.
    ///
    /// # Errors
    /// When nothing else can be computed.
    pub fn begin(request: &'a PlanRequest<'a>) -> Result<Self, Vec<Refusal>> {
        // First: everything else computes with these two.
        let size = request.mailbox;
        for (what, value, bound) in
            [("workers", size.workers, abi::WORKERS_MAX), ("slots", size.slots, mailbox::SLOTS_MAX)]
        {
            if !(1..=bound).contains(&value) {
                let refusal = Refusal::new(RefusalCode::MailboxSize, what, u64::from(value));
                return Err(vec![refusal.bound(u64::from(bound))]);
            }
        }
        let mut refusals = Vec::new();
        check_confidentiality(request, &mut refusals);
        let home = find_home(request, &mut refusals);
        Ok(Self {
            request,
            home,
            refusals,
            addressing: Addressing::RamAddr,
            shift: 0,
            slots: Vec::new(),
            window: Vec::new(),
            pieces: Vec::new(),
            mailbox_gpa: None,
            missing_piece: RefusalCode::HelperUnplugged,
            unreachable: Vec::new(),
            exposures: Vec::new(),
        })
    }

    pub fn refuse(&mut self, refusal: Refusal) {
        self.refusals.push(refusal);
    }

    /// Adds a slot. Its place may be absurd: [`Draft::finish`] checks it.
    pub fn slot(&mut self, gpa: u64, len: u64, backing: SlotBacking, purpose: Purpose) {
        let gpa = MirrorGpa::new(gpa);
        self.slots.push(MirrorSlot { gpa, len, backing, purpose, read_only: false });
    }

    /// Adds the mailbox, at an address that is a multiple of 2 MiB; `None` when there is none below 2^64.
    pub fn mailbox(&mut self, gpa: Option<u64>) {
        let Some(gpa) = gpa else {
            self.refuse(Refusal::new(RefusalCode::Wraps, "mailbox", u64::MAX));
            return;
        };
        self.mailbox_gpa = Some(MirrorGpa::new(gpa));
        self.slot(gpa, self.request.mailbox.bytes(), SlotBacking::Mailbox, Purpose::Mailbox);
    }

    /// Adds RAM to the helper's window, without a slot.
    pub fn window(&mut self, ram: RamAddr, len: u64, helper: u64, gpa: u64, purpose: Purpose) {
        self.window.push(WindowPart { span: Span { ram: ram.get(), len, helper, gpa }, purpose });
    }

    /// A window on every block but the helper's at `RamAddr + shift`, with its slots, as three strategies
    /// have it. False when addresses wrap.
    pub fn ram_window(&mut self, shift: u64) -> bool {
        self.shift = shift;
        for b in self.request.layout.ram() {
            let Some(gpa) = b.ram_addr.get().checked_add(shift).filter(|g| g.checked_add(b.size).is_some())
            else {
                self.refuse(Refusal::new(RefusalCode::Wraps, "shift", shift));
                return false;
            };
            let purpose = super::window_purpose(b.role);
            self.slot(gpa, b.size, SlotBacking::Ram { ram_addr: b.ram_addr }, purpose);
            self.window(b.ram_addr, b.size, b.ram_addr.get(), gpa, purpose);
        }
        true
    }

    /// Checks the rules that hold under every strategy and finishes the plan.
    pub fn finish(mut self) -> Result<MirrorPlan, Vec<Refusal>> {
        let request = self.request;
        let text = request.helper.text_end.saturating_sub(request.helper.base);
        if let (true, Some(home)) = (request.read_only_text, &self.home) {
            split_read_only(&mut self.slots, home.block.ram_addr, text);
        }
        // By count first: an absurd list is refused before it costs a sort.
        let budget = u64::from(request.limits.slot_budget);
        let count = self.slots.len() as u64;
        if count > budget {
            self.refusals.push(Refusal::new(RefusalCode::SlotBudget, "slots", count).bound(budget));
            return Err(self.refusals);
        }
        check_slots(&mut self.slots, request.limits, &mut self.refusals);
        if self.refusals.is_empty() {
            check_aliases(&self.slots, &mut self.refusals);
        }
        let (Some(home), Some(mailbox_gpa), true) = (self.home, self.mailbox_gpa, self.refusals.is_empty())
        else {
            return Err(self.refusals);
        };
        let home = Home { placement: self.with_digests(&home), ..home };
        let allowed = self.allowed(&home.placement).map_err(|r| vec![r])?;
        let mappings = self.mappings(&home.placement, mailbox_gpa).map_err(|r| vec![r])?;
        let tables = self.tables(&home.placement, &mappings).map_err(|r| vec![r])?;
        let c_bit = request.c_bit_mask();
        let plain = |m: &PlannedMapping| c_bit == 0 || !m.1.encrypted;
        let aliases = mappings.iter().filter(|(p, _)| matches!(p, Purpose::Mailbox | Purpose::PlainAlias));
        let coverage = Coverage {
            alias_bytes: aliases.filter(|m| plain(m)).map(|(_, m)| m.len).sum(),
            window_bytes: self.window.iter().map(|w| w.span.len).sum(),
            ..tables.coverage()
        };
        Ok(MirrorPlan {
            strategy: request.strategy,
            confidentiality: request.confidentiality,
            addressing: self.addressing,
            shift: self.shift,
            slots: self.slots,
            mappings,
            tables,
            coverage,
            placement: home.placement,
            helper: self.pieces,
            mailbox: request.mailbox,
            mailbox_gpa,
            allowed,
            unreachable: self.unreachable,
            exposures: self.exposures,
            spans: SpanIndex::new(self.window.into_iter().map(|w| w.span).collect()),
        })
    }

    /// The placement with page digests, when the block has room for them and all of it lies in the mirror: a
    /// helper does without where it was not declared.
    fn with_digests(&self, home: &Home<'_>) -> HelperPlacement {
        let p = home.placement.in_block(self.request.layout, home.block.size);
        let gap = first_gap(&self.pieces, p.digests_at, p.digests_len);
        if gap.is_some() { home.placement } else { p }
    }

    /// What the helper may touch, by what it calls it; sorts the window by that.
    fn allowed(&mut self, placement: &HelperPlacement) -> Result<Vec<PageRange>, Refusal> {
        self.window.sort_by_key(|w| w.span.helper);
        let mut list: Vec<PageRange> = Vec::new();
        for s in self.window.iter().map(|w| &w.span) {
            let joined = list.last().filter(|l| l.end() == s.helper).map(|l| (l.start(), l.len() + s.len));
            let (start, len) = joined.unwrap_or((s.helper, s.len));
            let range = PageRange::new(start, len)
                .map_err(|_| Refusal::new(RefusalCode::PageTables, "window", s.helper))?;
            if joined.is_some() {
                list.pop();
            }
            list.push(range);
        }
        let (count, bound) = (list.len() as u64, placement.ranges_max());
        if count > bound {
            return Err(Refusal::new(RefusalCode::ConfigSpace, "ranges", count).bound(bound));
        }
        Ok(list)
    }

    /// Private mappings get the C-bit; without encryption nothing is called encrypted.
    fn mappings(&self, p: &HelperPlacement, mailbox_gpa: MirrorGpa) -> Result<Vec<PlannedMapping>, Refusal> {
        let encrypted = self.request.c_bit_mask() != 0;
        let mut list = Vec::new();
        let parts = self.parts(p);
        // All parts are looked for before one is mapped, so that it is the first missing byte that is named.
        let gap = |part: &OwnPart| first_gap(&self.pieces, part.offset, part.len);
        if let Some(offset) = parts.iter().filter_map(gap).min() {
            return Err(Refusal::new(self.missing_piece, "helper offset", offset));
        }
        for part in parts {
            let mut done = 0;
            while let Some((gpa, left)) =
                helper_piece(&self.pieces, part.offset + done).filter(|_| done < part.len)
            {
                let (va, len) = (HelperVa::new(part.va + done), left.min(part.len - done));
                list.push((part.purpose, Mapping { va, gpa, len, access: part.access, encrypted }));
                done += len;
            }
        }
        let alias = match self.addressing {
            Addressing::RamAddr => Purpose::Mailbox,
            Addressing::Gpa => Purpose::PlainAlias,
        };
        let mailbox = Mapping {
            va: HelperVa::new(abi::MAILBOX_VA),
            gpa: mailbox_gpa,
            len: self.request.mailbox.bytes(),
            access: Access::ReadWrite,
            encrypted: false,
        };
        list.push((alias, mailbox));
        self.map_window(&mut list, encrypted);
        Ok(list)
    }

    /// What of its block the helper maps, in the order of the design.
    fn parts(&self, p: &HelperPlacement) -> Vec<OwnPart> {
        let h = self.request.helper;
        let mut list = Vec::new();
        let mut add =
            |purpose, va, offset, len, access| list.push(OwnPart { purpose, va, offset, len, access });
        let (base, text, rodata, bss) = (h.base, h.text_end, h.rodata_end, h.bss_end);
        add(Purpose::HelperText, base, 0, text - base, Access::ReadExecute);
        add(Purpose::HelperRodata, text, text - base, rodata - text, Access::Read);
        add(Purpose::HelperData, rodata, rodata - base, bss - rodata, Access::ReadWrite);
        add(Purpose::HelperConfig, abi::CONFIG_VA, p.config_at, p.config_pages * PAGE_SIZE, Access::Read);
        add(Purpose::HelperSecret, abi::SECRET_VA, p.secret_at, PAGE_SIZE, Access::Read);
        add(Purpose::HelperTss, abi::TSS_VA, p.tss_at, PAGE_SIZE, Access::Read);
        for w in 0..u64::from(self.request.mailbox.workers) {
            let (va, at) = (abi::WORKER_VA + w * abi::WORKER_STRIDE, p.workers_at + w * abi::WORKER_BYTES);
            add(Purpose::HelperStack, va, at, abi::WORKER_BYTES, Access::ReadWrite);
        }
        add(Purpose::HelperMaps, abi::MAPS_VA, p.maps_at, p.maps_len, Access::ReadWrite);
        if p.digests_len > 0 {
            add(Purpose::HelperDigests, abi::DIGESTS_VA, p.digests_at, p.digests_len, Access::ReadWrite);
        }
        list
    }

    /// The window, sorted already, neighbours joined: large pages then fit across blocks.
    fn map_window(&self, list: &mut Vec<PlannedMapping>, encrypted: bool) {
        let first = list.len();
        for WindowPart { span, purpose } in &self.window {
            let va = abi::WINDOW_VA + span.helper;
            if let Some((last_purpose, last)) = list[first..].last_mut()
                && (*last_purpose, last.va.get() + last.len, last.gpa.get() + last.len)
                    == (*purpose, va, span.gpa)
            {
                last.len += span.len;
                continue;
            }
            let (va, gpa) = (HelperVa::new(va), MirrorGpa::new(span.gpa));
            let mapping = Mapping { va, gpa, len: span.len, access: Access::ReadWrite, encrypted };
            list.push((*purpose, mapping));
        }
    }

    fn tables(&self, p: &HelperPlacement, mappings: &[PlannedMapping]) -> Result<PageTables, Refusal> {
        let (base, contiguous) = helper_piece(&self.pieces, p.tables_at)
            .ok_or_else(|| Refusal::new(self.missing_piece, "helper offset", p.tables_at))?;
        let room = p.table_pages.min(contiguous / PAGE_SIZE);
        let bare: Vec<Mapping> = mappings.iter().map(|(_, m)| *m).collect();
        let (c_bit, limits) = (self.request.c_bit_mask(), self.request.limits);
        let tables = PageTables::build(&bare, base, c_bit, limits.gib_pages, room as usize)
            .map_err(|e| table_refusal(&e, room, p.table_pages))?;
        // Trust, then walk: the first and last page of every mapping by a reader that shares no code with
        // the builder. Property tests walk every page.
        for (index, m) in bare.iter().enumerate() {
            for offset in [0, m.len - PAGE_SIZE] {
                let va = HelperVa::new(m.va.get() + offset);
                let found =
                    walk(va, tables.root(), c_bit, limits.phys_limit(), |at| tables.entry_at(at)).ok();
                let right = found.is_some_and(|t| {
                    (t.gpa.get(), t.access, t.encrypted) == (m.gpa.get() + offset, m.access, m.encrypted)
                });
                if !right {
                    return Err(Refusal::new(RefusalCode::PageTables, "mapping", va.get()).at(index));
                }
            }
        }
        Ok(tables)
    }
}

/// A part of the helper's block, and where the helper sees it.
struct OwnPart {
    purpose: Purpose,
    va: u64,
    offset: u64,
    len: u64,
    access: Access,
}

/// The first of these bytes of the helper's block that is in no piece.
fn first_gap(pieces: &[HelperPiece], offset: u64, len: u64) -> Option<u64> {
    let mut at = offset;
    while at < offset + len {
        match helper_piece(pieces, at) {
            Some((_, left)) => at += left,
            None => return Some(at),
        }
    }
    None
}

fn table_refusal(e: &TableError, room: u64, planned: u64) -> Refusal {
    match *e {
        // The tables would fit their place if all of it lay in one piece.
        TableError::NoRoom { .. } if room < planned => {
            Refusal::new(RefusalCode::TablesNotContiguous, "page table pages", room).bound(planned)
        }
        TableError::NoRoom { .. } => {
            Refusal::new(RefusalCode::PageTableSpace, "page table pages", room).bound(room)
        }
        TableError::BadMapping { index, va } | TableError::Conflict { index, va } => {
            Refusal::new(RefusalCode::PageTables, "mapping", va.get()).at(index)
        }
    }
}

fn check_confidentiality(request: &PlanRequest<'_>, refusals: &mut Vec<Refusal>) {
    let level = request.confidentiality;
    if level == Confidentiality::SevSnp {
        refusals.push(Refusal::new(RefusalCode::SnpMirror, "sev-snp", 0));
    }
    if level.is_encrypted() && request.limits.c_bit_mask() == 0 {
        refusals.push(Refusal::new(RefusalCode::CBitMissing, level.name(), 0));
    }
    if request.read_only_text && matches!(level, Confidentiality::SevEs | Confidentiality::SevSnp) {
        refusals.push(Refusal::new(RefusalCode::ReadOnlySlots, "read_only_text", 1));
    }
}

fn find_home<'a>(request: &PlanRequest<'a>, refusals: &mut Vec<Refusal>) -> Option<Home<'a>> {
    let h = request.helper;
    let ordered = h.base <= h.text_end && h.text_end <= h.rodata_end && h.rodata_end <= h.bss_end;
    let fits = h.base == abi::IMAGE_VA && h.bss_end.saturating_sub(h.base) <= abi::IMAGE_MAX;
    if h.layout_hash != abi::LAYOUT_HASH || !fits || !ordered {
        let refusal = Refusal::new(RefusalCode::HelperLayoutMismatch, "layout hash", h.layout_hash);
        refusals.push(refusal.bound(abi::LAYOUT_HASH));
    }
    let Some(block) = request.layout.helper() else {
        let count = request.layout.blocks().len() as u64;
        refusals.push(Refusal::new(RefusalCode::NoHelper, "blocks", count));
        return None;
    };
    let placement = HelperPlacement::new(h, request.layout, HelperSet::of(&request.strategy));
    let needed = placement.map_or(u64::MAX, |p| p.block_len());
    if needed > block.size {
        refusals.push(Refusal::new(RefusalCode::HelperTooSmall, "helper block", block.size).bound(needed));
    }
    placement.map(|placement| Home { block, placement })
}
