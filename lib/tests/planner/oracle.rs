//! What the design says about every case, computed another way: in 128-bit numbers that cannot wrap, page by
//! page where the planner works with ranges.

use std::collections::{BTreeSet, HashSet};

use mirrorvm::addr::{PAGE_1G, PAGE_2M, PAGE_SIZE};
use mirrorvm::address_space::{
    Access, BlockRole, Confidentiality, FOUR_GIB, HelperPlacement, HelperSet, MailboxSize, PspVia, Purpose,
    RamBlock, RefusalCode, Shift, Strategy as Kind,
};
use mirrorvm_abi::{header::Header, layout as abi};

use crate::generate::Case;

/// Where the helper's parts lie, by the prose of the design: image, secret, TSS, sixteen worker areas, two
/// bits for every page of RAM and for 16 GiB more.
#[derive(Clone, Copy, Debug)]
pub struct Offsets {
    pub secret: u64,
    pub tss: u64,
    pub workers: u64,
    pub maps: u64,
    pub maps_len: u64,
}

impl Offsets {
    pub fn new(header: &Header, guest_end: u64) -> Self {
        let secret = header.bss_end - header.base;
        let workers = secret + 2 * 4096;
        let behind = workers + 16 * (128 << 10);
        let covered = (guest_end + HEAD_ROOM).min(64 << 40);
        let maps_len = (covered.div_ceil(4096).div_ceil(64) * 2 * 8).next_multiple_of(4096);
        let maps = if maps_len >= PAGE_2M { behind.next_multiple_of(PAGE_2M) } else { behind };
        Self { secret, tss: secret + 4096, workers, maps, maps_len }
    }
}

/// Bytes above the end of RAM addresses that the helper's maps cover.
pub const HEAD_ROOM: u64 = 16 << 30;

/// A slot in numbers that cannot wrap.
#[derive(Clone, Copy, Debug)]
pub struct WideSlot {
    pub start: u128,
    pub end: u128,
    /// First byte counted from the start of the helper's block, when it is the helper's.
    helper: Option<u128>,
}

pub struct Oracle<'a> {
    pub case: &'a Case,
    /// What is added to a `RamAddr` in the window; 0 under identity.
    pub shift: u64,
    pub slots: Vec<WideSlot>,
    pub mailbox_at: u128,
    pub offsets: Offsets,
    /// Where the save areas are under identity.
    vmsa_at: Option<u128>,
}

/// One contiguous mapping as it is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    pub purpose: Purpose,
    pub va: u64,
    pub gpa: u64,
    pub len: u64,
    pub access: Access,
    pub encrypted: bool,
}

impl<'a> Oracle<'a> {
    pub fn new(case: &'a Case) -> Self {
        let bits = (case.limits.max_phys_bits - case.limits.phys_bit_reduction).clamp(33, 52);
        let shift = match case.strategy {
            Kind::Shifted { shift: Shift::FourGib } => 1 << 32,
            Kind::Shifted { shift: Shift::MaxPhys } | Kind::Declared => 1u64 << (bits - 1),
            Kind::Shifted { shift: Shift::Explicit { bytes } } => bytes,
            Kind::IdentityCbit | Kind::PspCopied { .. } => 0,
        };
        let offsets = Offsets::new(&case.header, guest_end(case));
        let (slots, mailbox_at, vmsa_at) = (Vec::new(), 0, None);
        let mut oracle = Self { case, shift, slots, mailbox_at, offsets, vmsa_at };
        oracle.place_slots(1u128 << bits);
        oracle
    }

    pub fn helper(&self) -> Option<&'a RamBlock> {
        self.case.layout.blocks().iter().find(|b| b.role == BlockRole::Helper)
    }

    pub fn text_len(&self) -> u64 {
        self.case.header.text_end - self.case.header.base
    }

    fn place_slots(&mut self, limit: u128) {
        let case = self.case;
        let mut list = Vec::new();
        // Start, length, and where in the helper's block it begins.
        let mut slot = |start: u128, len: u128, helper: Option<u128>| {
            list.push(WideSlot { start, end: start + len, helper });
        };
        let helper_at =
            |b: &RamBlock, offset: u64| (b.role == BlockRole::Helper).then_some(u128::from(offset));
        let (mut ram_end, mut gpa_end) = (0u128, 0u128);
        for b in case.layout.blocks() {
            ram_end = u128::from(b.ram_addr.get() + b.size);
            for p in &b.plugs {
                let (start, end) = (u128::from(p.gpa.get()), u128::from(p.gpa.get()) + u128::from(p.len));
                gpa_end = gpa_end.max(end);
                let low = start < 1 << 32;
                match case.strategy {
                    Kind::Shifted { .. } if low => {
                        slot(start, end.min(1 << 32) - start, helper_at(b, p.offset));
                    }
                    Kind::IdentityCbit => slot(start, end - start, helper_at(b, p.offset)),
                    _ => {}
                }
            }
            let window = match case.strategy {
                Kind::Shifted { .. } => true,
                Kind::Declared | Kind::PspCopied { .. } => b.role != BlockRole::Helper,
                Kind::IdentityCbit => false,
            };
            if window {
                let start = u128::from(b.ram_addr.get()) + u128::from(self.shift);
                slot(start, b.size.into(), helper_at(b, 0));
            }
        }
        let mut mailbox_at = (ram_end + u128::from(self.shift)).next_multiple_of(2 << 20);
        match case.strategy {
            Kind::IdentityCbit => {
                for b in case.layout.blocks().iter().filter(|b| b.role == BlockRole::Vmsa) {
                    let at = gpa_end.next_multiple_of(2 << 20);
                    self.vmsa_at = Some(at);
                    slot(at, b.size.into(), None);
                    gpa_end = at + u128::from(b.size);
                }
                mailbox_at = gpa_end.next_multiple_of(2 << 20);
            }
            Kind::Declared => {
                for t in case.declaration.iter().flat_map(|d| d.tuples()) {
                    let mirror = u128::from(t.mirror.get());
                    for (offset, len, done) in self.helper_spans(t.guest.get(), t.len) {
                        slot(mirror + u128::from(done), len.into(), Some(offset.into()));
                    }
                }
            }
            Kind::PspCopied { .. } => {
                let down = |top: u128, len: u64| top.saturating_sub(len.into()) / (2 << 20) * (2 << 20);
                let Some(b) = self.helper() else {
                    self.slots = list;
                    return;
                };
                let top = down(limit, b.size);
                slot(top, b.size.into(), Some(0));
                mailbox_at = down(top, mailbox_len(case.mailbox));
            }
            Kind::Shifted { .. } => {}
        }
        slot(mailbox_at, mailbox_len(case.mailbox).into(), None);
        (self.slots, self.mailbox_at) = (list, mailbox_at);
    }

    /// The parts of a guest range that lie in plugged parts of the helper's block: offset there, bytes, and
    /// how far into the range.
    fn helper_spans(&self, guest: u64, len: u64) -> Vec<(u64, u64, u64)> {
        let end = u128::from(guest) + u128::from(len);
        let plugs = self.helper().into_iter().flat_map(|b| &b.plugs);
        let inside = plugs.filter_map(|p| {
            let from = u128::from(guest.max(p.gpa.get()));
            let to = end.min(u128::from(p.gpa.get()) + u128::from(p.len));
            (from < to).then(|| {
                let from = from as u64;
                (p.offset + (from - p.gpa.get()), to as u64 - from, from - guest)
            })
        });
        inside.collect()
    }

    /// Where the mirror sees a page of the helper's block, when it does, and the helper uses it there.
    pub fn helper_gpa(&self, offset: u64) -> Option<u64> {
        let b = self.helper()?;
        let plug = b.plugs.iter().find(|p| offset >= p.offset && offset < p.offset + p.len);
        let guest = plug.map(|p| p.gpa.get() + (offset - p.offset));
        match self.case.strategy {
            Kind::Shifted { .. } => {
                let low = b.plugs.len() == 1
                    && b.plugs[0].len == b.size
                    && b.plugs[0].gpa.get() + b.size <= FOUR_GIB;
                if low { guest } else { Some(b.ram_addr.get() + self.shift + offset) }
            }
            Kind::IdentityCbit => guest,
            Kind::Declared => {
                let guest = guest?;
                let tuples = self.case.declaration.iter().flat_map(|d| d.tuples());
                tuples
                    .filter(|t| guest >= t.guest.get() && guest - t.guest.get() < t.len)
                    .map(|t| t.mirror.get() + (guest - t.guest.get()))
                    .next()
            }
            Kind::PspCopied { .. } => {
                let private = self.slots.iter().rev().find(|s| s.helper.is_some())?;
                Some(private.start as u64 + offset)
            }
        }
    }

    /// What the helper calls a byte of RAM, and where the mirror has it in the window.
    pub fn window(&self, ram: u64) -> Option<(u64, u64)> {
        let b = self.case.layout.blocks().iter().find(|b| {
            b.role != BlockRole::Helper && ram >= b.ram_addr.get() && ram < b.ram_addr.get() + b.size
        })?;
        if self.case.strategy != Kind::IdentityCbit {
            return Some((ram, ram + self.shift));
        }
        let offset = ram - b.ram_addr.get();
        let gpa = if b.role == BlockRole::Vmsa {
            self.vmsa_at? as u64 + offset
        } else {
            let p = b.plugs.iter().find(|p| offset >= p.offset && offset < p.offset + p.len)?;
            p.gpa.get() + (offset - p.offset)
        };
        Some((gpa, gpa))
    }

    /// Every rule that the case breaks.
    pub fn broken(&self) -> HashSet<RefusalCode> {
        use RefusalCode as C;
        let case = self.case;
        let l = &case.limits;
        let mut broken = HashSet::new();
        let mut rule = |code, is_broken: bool| {
            if is_broken {
                broken.insert(code);
            }
        };
        let level = case.confidentiality;
        let encrypted = level != Confidentiality::None;
        let es = matches!(level, Confidentiality::SevEs | Confidentiality::SevSnp);
        rule(C::SnpMirror, level == Confidentiality::SevSnp);
        rule(C::CBitMissing, encrypted && l.c_bit.is_none());
        rule(C::ReadOnlySlots, es && case.read_only_text);
        let helper = self.helper();
        rule(C::NoHelper, helper.is_none());
        let placement =
            HelperPlacement::new(&case.header, &case.layout, HelperSet::of(&case.strategy)).unwrap();
        rule(C::HelperTooSmall, helper.is_some_and(|h| placement.block_len() > h.size));
        let unplugged = helper.is_some_and(|h| h.plugs.is_empty());
        match case.strategy {
            Kind::Shifted { .. } => {
                rule(C::ShiftUnaligned, !self.shift.is_multiple_of(2 << 20));
                rule(C::ShiftTooLow, self.shift < 1 << 32);
            }
            Kind::IdentityCbit => {
                rule(C::HelperUnplugged, unplugged);
                rule(C::UnpluggedPrivate, self.unplugged_private());
                rule(C::GpaAboveMaps, self.above_maps());
            }
            Kind::Declared => rule(C::HelperUnplugged, unplugged),
            Kind::PspCopied { via } => {
                rule(C::SendReceiveUnencrypted, via == PspVia::SendReceive && !encrypted);
            }
        }
        if case.strategy == Kind::Declared {
            match &case.declaration {
                None => rule(C::NoDeclaration, true),
                Some(_) => broken.extend(self.broken_tuples()),
            }
        }
        broken.extend(self.broken_slots());
        if broken.is_empty() {
            broken.extend(self.broken_helper(&placement));
        }
        broken
    }

    fn broken_slots(&self) -> HashSet<RefusalCode> {
        use RefusalCode as C;
        let l = &self.case.limits;
        let limit = 1u128 << (l.max_phys_bits - l.phys_bit_reduction).clamp(33, 52);
        let mut broken = HashSet::new();
        let mut rule = |code, is_broken: bool| {
            if is_broken {
                broken.insert(code);
            }
        };
        let text = u128::from(self.text_len());
        let cut = |s: &&WideSlot| s.helper.is_some_and(|h| h < text && s.end - s.start > text - h);
        let more = if self.case.read_only_text { self.slots.iter().filter(cut).count() } else { 0 };
        // Tuples count also when nothing of the helper's is behind them.
        let tuples = match self.case.strategy {
            Kind::Declared => self.case.declaration.as_ref().map_or(0, |d| d.tuples().len()),
            _ => 0,
        };
        let fixed = self.slots.iter().filter(|s| tuples == 0 || s.helper.is_none()).count();
        rule(C::SlotBudget, (self.slots.len() + more).max(fixed + tuples) > l.slot_budget as usize);
        rule(C::Wraps, self.slots.iter().any(|s| s.end > u128::from(u64::MAX)));
        rule(C::AboveMaxPhys, self.slots.iter().any(|s| s.end > limit));
        rule(C::CBitInAddress, l.c_bit.is_some_and(|c| self.slots.iter().any(|s| meets(s.start, s.end, c))));
        let mut sorted = self.slots.clone();
        sorted.sort_by_key(|s| s.start);
        let overlap = sorted.windows(2).any(|p| p[1].start < p[0].end);
        // Two tuples at one place are named as tuples.
        let declared = self.case.strategy == Kind::Declared;
        rule(C::SlotOverlap, overlap && !declared);
        broken
    }

    fn broken_tuples(&self) -> HashSet<RefusalCode> {
        use RefusalCode as C;
        let l = &self.case.limits;
        let limit = 1u128 << (l.max_phys_bits - l.phys_bit_reduction).clamp(33, 52);
        let tuples = self.case.declaration.as_ref().unwrap().tuples();
        let mut broken = HashSet::new();
        let mut sound = Vec::new();
        for t in tuples {
            let mut wrong = HashSet::new();
            let mut rule = |code, is_broken: bool| {
                if is_broken {
                    wrong.insert(code);
                }
            };
            if t.len == 0 {
                broken.insert(C::TupleZero);
                continue;
            }
            let spans = [t.guest.get(), t.mirror.get()].map(u128::from).map(|a| (a, a + u128::from(t.len)));
            rule(C::TupleUnaligned, [t.len, t.guest.get(), t.mirror.get()].iter().any(|v| v % 4096 != 0));
            for (start, end) in spans {
                let wraps = end > u128::from(u64::MAX);
                rule(C::Wraps, wraps);
                rule(C::AboveMaxPhys, !wraps && end > limit);
                rule(C::CBitInAddress, !wraps && l.c_bit.is_some_and(|c| meets(start, end, c)));
            }
            rule(C::TupleInWindow, spans[1].1 > u128::from(self.shift));
            if wrong.is_empty() {
                sound.push(*t);
            }
            broken.extend(wrong);
        }
        for (i, t) in sound.iter().enumerate() {
            // The first page that is not the helper's decides.
            let helper: u64 = self.helper_spans(t.guest.get(), t.len).iter().map(|s| s.1).sum();
            if helper < t.len {
                let first = self.first_foreign(t.guest.get(), t.len);
                let ram = self.case.layout.blocks().iter().any(|b| {
                    let mut plugs = b.plugs.iter();
                    plugs.any(|p| first >= p.gpa.get() && first < p.gpa.get() + p.len)
                });
                broken.insert(if ram { C::TupleNotHelper } else { C::TupleNotRam });
            }
            for other in &sound[i + 1..] {
                let meet = |a: u64, b: u64| a < b + other.len && b < a + t.len;
                let shared =
                    meet(t.guest.get(), other.guest.get()) || meet(t.mirror.get(), other.mirror.get());
                if shared {
                    broken.insert(C::TupleOverlap);
                }
            }
        }
        broken
    }

    /// The first address of a range that is not in the helper's plugged parts.
    fn first_foreign(&self, guest: u64, len: u64) -> u64 {
        let mut spans = self.helper_spans(guest, len);
        spans.sort_by_key(|s| s.2);
        let mut at = 0;
        for (_, len, done) in spans {
            if done != at {
                break;
            }
            at += len;
        }
        guest + at
    }

    /// Whether a page of RAM is neither plugged nor known to be shared.
    fn unplugged_private(&self) -> bool {
        let shared = self.case.shared.as_ref();
        self.case.layout.blocks().iter().filter(|b| b.role == BlockRole::Ram).any(|b| {
            let plugged: u64 = b.plugs.iter().map(|p| p.len).sum();
            if plugged == b.size {
                return false;
            }
            let Some(shared) = shared else { return true };
            let mut at = 0;
            let ends = b.plugs.iter().map(|p| (p.offset, p.offset + p.len)).chain([(b.size, b.size)]);
            let mut gaps = Vec::new();
            for (start, end) in ends {
                gaps.push((at, start));
                at = end;
            }
            let page = |offset: u64| mirrorvm::addr::RamPage::new((b.ram_addr.get() + offset) / PAGE_SIZE);
            gaps.iter().any(|(from, to)| {
                (*from..*to).step_by(PAGE_SIZE as usize).any(|offset| !shared.contains(page(offset)))
            })
        })
    }

    /// Whether RAM is where the helper's maps have no bits.
    fn above_maps(&self) -> bool {
        let covered = u128::from((guest_end(self.case) + HEAD_ROOM).min(64 << 40));
        let ram = self.case.layout.blocks().iter().filter(|b| b.role != BlockRole::Helper);
        let plugged = ram.flat_map(|b| &b.plugs).map(|p| u128::from(p.gpa.get()) + u128::from(p.len));
        let vmsa = self.case.layout.blocks().iter().find(|b| b.role == BlockRole::Vmsa);
        let vmsa = vmsa.zip(self.vmsa_at).map(|(b, at)| at + u128::from(b.size));
        plugged.chain(vmsa).any(|end| end > covered)
    }

    /// What breaks when everything else is right: parts of the helper that are nowhere, tables without room.
    fn broken_helper(&self, placement: &HelperPlacement) -> Option<RefusalCode> {
        use RefusalCode as C;
        let missing =
            if self.case.strategy == Kind::Declared { C::DeclarationIncomplete } else { C::HelperUnplugged };
        let Some(mappings) = self.mappings(placement) else { return Some(missing) };
        let Some(base) = self.helper_gpa(placement.tables_at) else { return Some(missing) };
        let pages =
            |n: &u64| self.helper_gpa(placement.tables_at + n * PAGE_SIZE) == Some(base + n * PAGE_SIZE);
        let contiguous = (0..placement.table_pages).take_while(pages).count() as u64;
        if table_pages(&mappings, self.case.limits.gib_pages) <= contiguous {
            return None;
        }
        let whole = contiguous == placement.table_pages;
        Some(if whole { C::PageTableSpace } else { C::TablesNotContiguous })
    }

    /// What the helper must see; `None` when a part of it is nowhere.
    pub fn mappings(&self, placement: &HelperPlacement) -> Option<Vec<Expected>> {
        let (o, header) = (&self.offsets, &self.case.header);
        let encrypted = self.case.confidentiality != Confidentiality::None;
        let mut parts = Vec::new();
        let (text, rodata, bss) = (header.text_end, header.rodata_end, header.bss_end);
        let base = header.base;
        parts.push((Purpose::HelperText, base, 0, text - base, Access::ReadExecute));
        parts.push((Purpose::HelperRodata, text, text - base, rodata - text, Access::Read));
        parts.push((Purpose::HelperData, rodata, rodata - base, bss - rodata, Access::ReadWrite));
        let config = placement.config_pages * PAGE_SIZE;
        parts.push((Purpose::HelperConfig, abi::CONFIG_VA, placement.config_at, config, Access::Read));
        parts.push((Purpose::HelperSecret, abi::SECRET_VA, o.secret, PAGE_SIZE, Access::Read));
        parts.push((Purpose::HelperTss, abi::TSS_VA, o.tss, PAGE_SIZE, Access::Read));
        for w in 0..u64::from(self.case.mailbox.workers) {
            let (va, at) = (abi::WORKER_VA + w * (1 << 20), o.workers + w * (128 << 10));
            parts.push((Purpose::HelperStack, va, at, 128 << 10, Access::ReadWrite));
        }
        parts.push((Purpose::HelperMaps, abi::MAPS_VA, o.maps, o.maps_len, Access::ReadWrite));
        let mut list: Vec<Expected> = Vec::new();
        for (purpose, va, offset, len, access) in parts {
            let first = list.len();
            for done in (0..len).step_by(PAGE_SIZE as usize) {
                let gpa = self.helper_gpa(offset + done)?;
                let page = Expected { purpose, va: va + done, gpa, len: PAGE_SIZE, access, encrypted };
                join(&mut list, first, page);
            }
        }
        let alias =
            if self.case.strategy == Kind::IdentityCbit { Purpose::PlainAlias } else { Purpose::Mailbox };
        let len = mailbox_len(self.case.mailbox);
        let gpa = self.mailbox_at as u64;
        let access = Access::ReadWrite;
        list.push(Expected { purpose: alias, va: abi::MAILBOX_VA, gpa, len, access, encrypted: false });
        let first = list.len();
        for (helper, gpa, len, purpose) in self.window_runs() {
            let va = abi::WINDOW_VA + helper;
            join(&mut list, first, Expected { purpose, va, gpa, len, access: Access::ReadWrite, encrypted });
        }
        Some(list)
    }

    /// Runs of RAM in the window by what the helper calls them: that, where the mirror has them, bytes.
    fn window_runs(&self) -> Vec<(u64, u64, u64, Purpose)> {
        let mut list = Vec::new();
        for b in self.case.layout.blocks().iter().filter(|b| b.role != BlockRole::Helper) {
            let purpose = if b.role == BlockRole::Vmsa { Purpose::Vmsa } else { Purpose::RamWindow };
            let whole = vec![(0, b.size)];
            let parts = match (self.case.strategy, b.role) {
                (Kind::IdentityCbit, BlockRole::Ram) => b.plugs.iter().map(|p| (p.offset, p.len)).collect(),
                _ => whole,
            };
            for (offset, len) in parts {
                let (helper, gpa) = self.window(b.ram_addr.get() + offset).unwrap();
                list.push((helper, gpa, len, purpose));
            }
        }
        list.sort_unstable_by_key(|r| r.0);
        list
    }
}

fn guest_end(case: &Case) -> u64 {
    let ram = case.layout.blocks().iter().filter(|b| b.role != BlockRole::Helper);
    ram.map(|b| b.ram_addr.get() + b.size).max().unwrap_or(0)
}

fn join(list: &mut Vec<Expected>, first: usize, next: Expected) {
    if let Some(last) = list[first..].last_mut()
        && last.va + last.len == next.va
        && last.gpa + last.len == next.gpa
        && last.purpose == next.purpose
    {
        last.len += next.len;
        return;
    }
    list.push(next);
}

pub fn mailbox_len(size: MailboxSize) -> u64 {
    // Page numbers, then a group: its header, and for each of 128 pages a word, the page and a tag.
    let slot = 4096 + (48 + 128u64 * (8 + 4096 + 16)).next_multiple_of(4096);
    let worker = 4 * 4096 + u64::from(size.slots) * slot;
    (u64::from(size.workers) * worker).next_multiple_of(2 << 20)
}

/// Whether some byte of a span has address bit `c`: an end has it, or the span passes a whole multiple of
/// 2^(c+1).
pub fn meets(start: u128, end: u128, c: u8) -> bool {
    let last = end - 1;
    start >> c & 1 == 1 || last >> c & 1 == 1 || start >> (c + 1) != last >> (c + 1)
}

/// How many pages the tables need: distinct entries of each level, large pages wherever both addresses allow.
pub fn table_pages(mappings: &[Expected], gib_pages: bool) -> u64 {
    let (mut l3, mut l2, mut l1) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for m in mappings {
        let mut done = 0;
        while done < m.len {
            let (va, gpa, left) = (m.va + done, m.gpa + done, m.len - done);
            l3.insert(va >> 39);
            let fits = |size: u64| (va | gpa) & (size - 1) == 0 && left >= size;
            if gib_pages && fits(PAGE_1G) {
                done += PAGE_1G;
                continue;
            }
            l2.insert(va >> 30);
            if fits(PAGE_2M) {
                done += PAGE_2M;
                continue;
            }
            l1.insert(va >> 21);
            done += PAGE_SIZE;
        }
    }
    1 + (l3.len() + l2.len() + l1.len()) as u64
}
