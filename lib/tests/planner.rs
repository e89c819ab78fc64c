//! The `shifted` planner against an independent oracle: what it accepts is checked byte-page by byte-page, what it refuses
//! must break a rule that the oracle states for itself, and nothing legal is refused.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};

use mirrorvm::addr::{Gpa, HelperVa, MirrorGpa, PAGE_1G, PAGE_2M, PAGE_SIZE, RamAddr};
use mirrorvm::address_space::{
    Access, BlockRole, BlockSpec, FOUR_GIB, GuestLayout, HelperPlacement, HostLimits, LayoutError,
    MailboxSize, MirrorPlan, MirrorSlot, Plug, PspVia, Purpose, RamBlock, RefusalCode, Shift, SlotBacking,
    Strategy as Kind, WalkError, plan, walk,
};
use mirrorvm_abi::{header::Header, layout as abi};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

// ------------------------------------------------------------------------------------------ what is planned

/// One question to the planner.
#[derive(Clone, Debug)]
struct Case {
    layout: GuestLayout,
    /// The helper's block was sized by `HelperPlacement::block_size`.
    sized: bool,
    header: Header,
    limits: HostLimits,
    shift: Shift,
    mailbox: MailboxSize,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Unplugged,
    Low,
    Straddling,
    High,
    /// The middle third, below or above 4 GiB.
    Part(bool),
    /// First and last third, the wrong way round.
    Halves,
}

#[derive(Clone, Copy, Debug)]
enum HelperBlock {
    None,
    Sized {
        plugged: bool,
    },
    /// Room for this many pages of tables.
    Tight {
        plugged: bool,
        tables: u64,
    },
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (1u64..70).prop_map(|p| p * PAGE_SIZE),
        2 => (1u64..9).prop_map(|n| n * PAGE_2M),
        2 => (1u64..9, 1u64..512).prop_map(|(n, p)| n * PAGE_2M + p * PAGE_SIZE),
        2 => (1u64..6).prop_map(|n| n * GIB),
        1 => (1u64..6, 1u64..600).prop_map(|(n, p)| n * GIB + p * PAGE_SIZE),
    ]
}

fn places() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Unplugged),
        Just(Place::Low),
        Just(Place::Straddling),
        Just(Place::High),
        any::<bool>().prop_map(Place::Part),
        Just(Place::Halves),
    ]
}

fn helpers() -> impl Strategy<Value = HelperBlock> {
    prop_oneof![
        1 => Just(HelperBlock::None),
        5 => any::<bool>().prop_map(|plugged| HelperBlock::Sized { plugged }),
        2 => (any::<bool>(), 0u64..60).prop_map(|(plugged, tables)| HelperBlock::Tight { plugged, tables }),
    ]
}

fn shifts() -> impl Strategy<Value = Shift> {
    let explicit = prop_oneof![
        4 => (0u64..1 << 16).prop_map(|n| FOUR_GIB + n * PAGE_2M),
        1 => (0u32..20).prop_map(|n| FOUR_GIB << n),
        1 => any::<u64>(),
        1 => (0u64..FOUR_GIB / PAGE_2M).prop_map(|n| n * PAGE_2M),
        1 => (1u64..PAGE_2M).prop_map(|n| FOUR_GIB + n),
        1 => (0u64..1 << 13).prop_map(|n| (u64::MAX - n * PAGE_2M) & !(PAGE_2M - 1)),
        1 => (0u64..1 << 10, prop_oneof![Just(46), Just(47), Just(51), Just(63)])
            .prop_map(|(n, bit)| (1u64 << bit) + n * PAGE_2M),
        1 => prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1u64 << 63), Just(FOUR_GIB - PAGE_2M)],
    ];
    prop_oneof![
        3 => Just(Shift::FourGib),
        2 => Just(Shift::MaxPhys),
        4 => explicit.prop_map(|bytes| Shift::Explicit { bytes }),
    ]
}

fn limits() -> impl Strategy<Value = HostLimits> {
    let c_bit = prop_oneof![Just(None), Just(Some(47)), Just(Some(51))];
    let reduction = prop_oneof![Just(0u8), Just(1), Just(5)];
    let budget = prop_oneof![1 => 0u32..9, 4 => Just(32_764)];
    (36u8..=52, c_bit, reduction, budget, any::<bool>()).prop_map(
        |(bits, c_bit, reduction, slots, gib_pages)| HostLimits {
            max_phys_bits: bits,
            c_bit,
            phys_bit_reduction: reduction,
            slot_budget: slots,
            gib_pages,
        },
    )
}

fn headers() -> impl Strategy<Value = Header> {
    (1u64..40, 0u64..20, 0u64..5, 0u64..300)
        .prop_map(|(text, rodata, data, bss)| header(text, rodata, data, bss))
}

fn header(text: u64, rodata: u64, data: u64, bss: u64) -> Header {
    let text_end = abi::IMAGE_VA + text * PAGE_SIZE;
    let rodata_end = text_end + rodata * PAGE_SIZE;
    let data_end = rodata_end + data * PAGE_SIZE;
    Header {
        abi_min: mirrorvm_abi::ABI_VERSION,
        abi_max: mirrorvm_abi::ABI_VERSION,
        layout_hash: abi::LAYOUT_HASH,
        base: abi::IMAGE_VA,
        entry: abi::IMAGE_VA + 96,
        text_end,
        rodata_end,
        data_end,
        bss_end: data_end + bss * PAGE_SIZE,
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let blocks = prop::collection::vec((sizes(), 0u64..3, places()), 1..7);
    let mailbox = (1u32..=16, 1u32..=16).prop_map(|(workers, slots)| MailboxSize { workers, slots });
    (blocks, helpers(), headers(), limits(), shifts(), mailbox).prop_map(
        |(blocks, helper, header, limits, shift, mailbox)| {
            let bare =
                GuestLayout::from_blocks(blocks_of(&blocks)).expect("the generator makes good layouts");
            let (layout, sized) = match helper {
                HelperBlock::None => (bare, false),
                HelperBlock::Sized { plugged } => {
                    let size = HelperPlacement::block_size(&header, &bare).unwrap();
                    (bare.with_helper(size, plugged).unwrap(), true)
                }
                HelperBlock::Tight { plugged, tables } => {
                    let size = Offsets::new(&header, bare.ram_end(), bare.blocks().len()).tables
                        + tables * PAGE_SIZE;
                    (bare.with_helper(size, plugged).unwrap(), false)
                }
            };
            Case { layout, sized, header, limits, shift, mailbox }
        },
    )
}

/// Blocks one after the other in `RamAddr`, plugged where there is room.
fn blocks_of(wanted: &[(u64, u64, Place)]) -> Vec<RamBlock> {
    let (mut ram, mut low, mut high, mut low_end) = (0u64, 0u64, FOUR_GIB, FOUR_GIB);
    let mut list = Vec::new();
    for (index, &(size, gap, place)) in wanted.iter().enumerate() {
        let ram_addr = match gap {
            0 => ram.next_multiple_of(PAGE_2M),
            1 => ram,
            _ => ram + 3 * PAGE_SIZE,
        };
        ram = ram_addr + size;
        let third = size / 3 / PAGE_SIZE * PAGE_SIZE;
        let mut at = |len: u64, below: bool| {
            if below && low + len <= low_end {
                low += len + PAGE_SIZE;
                return Gpa::new(low - len - PAGE_SIZE);
            }
            high += len + PAGE_2M;
            Gpa::new(high - len - PAGE_2M)
        };
        let whole = |gpa| vec![Plug { offset: 0, gpa, len: size }];
        let plugs = match place {
            Place::Low => whole(at(size, true)),
            Place::High => whole(at(size, false)),
            Place::Part(below) if third > 0 => {
                vec![Plug { offset: third, gpa: at(third, below), len: third }]
            }
            Place::Halves if third > 0 => {
                let last = Plug { offset: size - third, gpa: at(third, true), len: third };
                vec![Plug { offset: 0, gpa: at(third, true), len: third }, last]
            }
            // Once, and only while nothing lies there.
            Place::Straddling
                if high == FOUR_GIB && size > PAGE_SIZE && size / 2 <= FOUR_GIB.saturating_sub(low) =>
            {
                let start = FOUR_GIB - size / 2 / PAGE_SIZE * PAGE_SIZE;
                (low_end, high) = (start, start + size);
                whole(Gpa::new(start))
            }
            Place::Unplugged | Place::Part(_) | Place::Halves | Place::Straddling => Vec::new(),
        };
        list.push(RamBlock {
            name: format!("b{index}"),
            ram_addr: RamAddr::new(ram_addr),
            size,
            role: BlockRole::Ram,
            plugs,
        });
    }
    list
}

// ------------------------------------------------------------------------------------------ the oracle

/// Where the helper's parts lie, by the prose of the design: image, configuration, secret, TSS, sixteen worker areas, two
/// bits for every page of RAM, tables.
#[derive(Clone, Copy)]
struct Offsets {
    config: u64,
    config_pages: u64,
    secret: u64,
    tss: u64,
    workers: u64,
    maps: u64,
    maps_len: u64,
    tables: u64,
}

impl Offsets {
    fn new(header: &Header, ram_end: RamAddr, ranges: usize) -> Self {
        let config = header.bss_end - header.base;
        let config_pages = (64 + 16 * ranges as u64).div_ceil(4096);
        let secret = config + config_pages * 4096;
        let tss = secret + 4096;
        let workers = tss + 4096;
        let maps = workers + 16 * (128 << 10);
        let maps_len = (ram_end.get().div_ceil(4096).div_ceil(64) * 2 * 8).next_multiple_of(4096);
        Self { config, config_pages, secret, tss, workers, maps, maps_len, tables: maps + maps_len }
    }
}

/// A slot in numbers that cannot wrap.
#[derive(Clone, Copy, Debug)]
struct WideSlot {
    start: u128,
    end: u128,
}

struct Oracle<'a> {
    case: &'a Case,
    shift: u64,
    slots: Vec<WideSlot>,
    mailbox_at: u128,
    offsets: Offsets,
}

impl<'a> Oracle<'a> {
    fn new(case: &'a Case) -> Self {
        let bits = case.limits.max_phys_bits - case.limits.phys_bit_reduction;
        let shift = match case.shift {
            Shift::FourGib => 1 << 32,
            // The documented clamp: at least 33 bits.
            Shift::MaxPhys => 1u64 << (bits.max(33) - 1),
            Shift::Explicit { bytes } => bytes,
        };
        let mut slots = Vec::new();
        let mut ram_end = 0u128;
        for b in case.layout.blocks() {
            for p in &b.plugs {
                let (start, end) = (u128::from(p.gpa.get()), u128::from(p.gpa.get()) + u128::from(p.len));
                if start < 1 << 32 {
                    slots.push(WideSlot { start, end: end.min(1 << 32) });
                }
            }
            let start = u128::from(b.ram_addr.get()) + u128::from(shift);
            slots.push(WideSlot { start, end: start + u128::from(b.size) });
            ram_end = u128::from(b.ram_addr.get() + b.size);
        }
        let mailbox_at = (ram_end + u128::from(shift)).next_multiple_of(2 << 20);
        slots.push(WideSlot { start: mailbox_at, end: mailbox_at + u128::from(mailbox_len(case.mailbox)) });
        let ranges = case.layout.blocks().iter().filter(|b| b.role == BlockRole::Ram).count();
        let offsets = Offsets::new(&case.header, case.layout.guest_end(), ranges);
        Self { case, shift, slots, mailbox_at, offsets }
    }

    fn helper(&self) -> Option<&'a RamBlock> {
        self.case.layout.blocks().iter().find(|b| b.role == BlockRole::Helper)
    }

    /// The helper runs below 4 GiB where all of it is there, else from the RAM window.
    fn helper_gpa(&self, block: &RamBlock) -> u64 {
        let low = block.plugs.len() == 1
            && block.plugs[0].len == block.size
            && block.plugs[0].gpa.get() + block.size <= FOUR_GIB;
        if low { block.plugs[0].gpa.get() } else { block.ram_addr.get() + self.shift }
    }

    /// Every rule that the case breaks.
    fn broken(&self) -> HashSet<RefusalCode> {
        use RefusalCode as C;
        let l = &self.case.limits;
        let limit = 1u128 << (l.max_phys_bits - l.phys_bit_reduction).clamp(33, 52);
        let mut broken = HashSet::new();
        let mut rule = |code, is_broken: bool| {
            if is_broken {
                broken.insert(code);
            }
        };
        rule(C::ShiftUnaligned, !self.shift.is_multiple_of(2 << 20));
        rule(C::ShiftTooLow, self.shift < 1 << 32);
        rule(C::Wraps, self.slots.iter().any(|s| s.end > u128::from(u64::MAX)));
        rule(C::AboveMaxPhys, self.slots.iter().any(|s| s.end > limit));
        rule(C::SlotBudget, self.slots.len() > l.slot_budget as usize);
        rule(C::CBitInAddress, l.c_bit.is_some_and(|c| self.slots.iter().any(|s| meets(s, c))));
        let mut sorted = self.slots.clone();
        sorted.sort_by_key(|s| s.start);
        rule(C::SlotOverlap, sorted.windows(2).any(|p| p[1].start < p[0].end));
        let helper = self.helper();
        rule(C::NoHelper, helper.is_none());
        rule(C::HelperTooSmall, helper.is_some_and(|h| self.offsets.tables >= h.size));
        let fits_so_far = broken.is_empty();
        if let (true, Some(h)) = (fits_so_far, helper) {
            let room = (h.size - self.offsets.tables) / PAGE_SIZE;
            if table_pages(&self.mappings(), l.gib_pages) > room {
                broken.insert(C::PageTableSpace);
            }
        }
        broken
    }

    /// What the helper must see, for a case that breaks no rule.
    fn mappings(&self) -> Vec<Expected> {
        let (h, o, header) = (self.helper().unwrap(), &self.offsets, &self.case.header);
        let base = self.helper_gpa(h);
        let mut list = Vec::new();
        let mut add = |purpose, va, gpa, len, access, encrypted| {
            if len > 0 {
                let encrypted = encrypted && self.case.limits.c_bit.is_some();
                list.push(Expected { purpose, va, gpa, len, access, encrypted });
            }
        };
        let image = |va: u64| base + (va - header.base);
        let (text, rodata, bss) = (header.text_end, header.rodata_end, header.bss_end);
        add(Purpose::HelperText, header.base, base, text - header.base, Access::ReadExecute, true);
        add(Purpose::HelperRodata, text, image(text), rodata - text, Access::Read, true);
        add(Purpose::HelperData, rodata, image(rodata), bss - rodata, Access::ReadWrite, true);
        let config = o.config_pages * PAGE_SIZE;
        add(Purpose::HelperConfig, abi::CONFIG_VA, base + o.config, config, Access::Read, true);
        add(Purpose::HelperSecret, abi::SECRET_VA, base + o.secret, PAGE_SIZE, Access::Read, true);
        add(Purpose::HelperTss, abi::TSS_VA, base + o.tss, PAGE_SIZE, Access::Read, true);
        for w in 0..u64::from(self.case.mailbox.workers) {
            let (va, gpa) = (abi::WORKER_VA + w * (1 << 20), base + o.workers + w * (128 << 10));
            add(Purpose::HelperStack, va, gpa, 128 << 10, Access::ReadWrite, true);
        }
        add(Purpose::HelperMaps, abi::MAPS_VA, base + o.maps, o.maps_len, Access::ReadWrite, true);
        let len = mailbox_len(self.case.mailbox);
        add(Purpose::Mailbox, abi::MAILBOX_VA, self.mailbox_at as u64, len, Access::ReadWrite, false);
        for b in self.case.layout.blocks().iter().filter(|b| b.role == BlockRole::Ram) {
            let va = abi::WINDOW_VA + b.ram_addr.get();
            add(Purpose::RamWindow, va, b.ram_addr.get() + self.shift, b.size, Access::ReadWrite, true);
        }
        list
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    purpose: Purpose,
    va: u64,
    gpa: u64,
    len: u64,
    access: Access,
    encrypted: bool,
}

fn mailbox_len(size: MailboxSize) -> u64 {
    let slot = 4096 + (512u64 * (32 + 4096 + 16)).next_multiple_of(4096);
    let worker = 4 * 4096 + u64::from(size.slots) * slot;
    (u64::from(size.workers) * worker).next_multiple_of(2 << 20)
}

/// Whether some byte of the slot has address bit `c`: an end has it, or the slot passes a whole multiple of 2^(c+1).
fn meets(s: &WideSlot, c: u8) -> bool {
    let last = s.end - 1;
    s.start >> c & 1 == 1 || last >> c & 1 == 1 || s.start >> (c + 1) != last >> (c + 1)
}

/// How many pages the tables need: distinct entries of each level, large pages wherever both addresses allow.
fn table_pages(mappings: &[Expected], gib_pages: bool) -> u64 {
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

// ------------------------------------------------------------------------------------------ what was accepted

/// One entry that maps a page, read from the raw bytes of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaf {
    va: u64,
    gpa: u64,
    len: u64,
    writable: bool,
    executable: bool,
    encrypted: bool,
}

/// Everything that the tables map, by ascending address, neighbours joined. Asserts what hardware asserts.
fn leaves(plan: &MirrorPlan, limits: &HostLimits) -> Vec<Leaf> {
    let bytes = plan.tables.bytes();
    let base = plan.tables.root().get();
    let c_bit = limits.c_bit.map_or(0, |c| 1u64 << c);
    let mut list: Vec<Leaf> = Vec::new();
    let mut pending = vec![(base, 3u32, 0u64, true, true)];
    let mut tables = 0;
    while let Some((table, level, va, writable, executable)) = pending.pop() {
        tables += 1;
        let at = (table - base) as usize;
        // Reversed: the stack gives ascending addresses back.
        for slot in (0..512u64).rev() {
            let entry = u64::from_le_bytes(bytes[at + slot as usize * 8..][..8].try_into().unwrap());
            if entry == 0 {
                continue;
            }
            assert_eq!(entry & 0b101, 0b101, "an entry that is there is present and for user mode");
            let va = va + (slot << (12 + 9 * level));
            let (w, x) = (writable && entry & 2 != 0, executable && entry >> 63 == 0);
            let address = entry & ((1 << 52) - 4096) & !c_bit;
            let large = entry & 0x80 != 0;
            if level == 0 || large {
                assert!(level < 3 && (level < 2 || limits.gib_pages), "{va:#x}: level {level}");
                let len = 4096u64 << (9 * level);
                assert_eq!(address % len, 0, "{va:#x}");
                let encrypted = c_bit != 0 && entry & c_bit != 0;
                list.push(Leaf { va, gpa: address, len, writable: w, executable: x, encrypted });
            } else {
                assert_eq!(entry & c_bit, c_bit, "tables are read as encrypted memory");
                pending.push((address, level - 1, va, w, x));
            }
        }
    }
    assert_eq!(tables, plan.tables.page_count(), "every table page is used");
    list.sort_by_key(|l| l.va);
    list.dedup_by(|next, last| {
        let adjoins = last.va + last.len == next.va && last.gpa + last.len == next.gpa;
        let alike = (last.writable, last.executable, last.encrypted)
            == (next.writable, next.executable, next.encrypted);
        if adjoins && alike {
            last.len += next.len;
        }
        adjoins && alike
    });
    list
}

/// The software's view of KVM's slots: which RAM is at a mirror-physical address.
fn lookup(slots: &[MirrorSlot], gpa: u64) -> Option<(Purpose, Option<u64>)> {
    let s = slots.iter().find(|s| gpa >= s.gpa.get() && gpa - s.gpa.get() < s.len)?;
    Some(match s.backing {
        SlotBacking::Ram { ram_addr } => (s.purpose, Some(ram_addr.get() + (gpa - s.gpa.get()))),
        SlotBacking::Mailbox => (s.purpose, None),
    })
}

/// All pages of a short span, edges and a stride of a long one.
fn sample(len: u64) -> impl Iterator<Item = u64> {
    let pages = len / PAGE_SIZE;
    let stride = if pages <= 2048 { 1 } else { pages / 509 };
    let edges = [0, 1, 511, 512, pages.saturating_sub(2), pages - 1];
    (0..pages).step_by(stride as usize).chain(edges).filter(move |p| *p < pages).map(|p| p * PAGE_SIZE)
}

fn check_accepted(oracle: &Oracle<'_>, plan: &MirrorPlan) {
    let case = oracle.case;
    let limits = &case.limits;
    let c_bit = limits.c_bit.map_or(0, |c| 1u64 << c);
    let limit = 1u64 << (limits.max_phys_bits - limits.phys_bit_reduction).clamp(33, 52);
    let helper = oracle.helper().unwrap();
    let helper_span = helper.ram_addr.get()..helper.ram_addr.get() + helper.size;

    // Slots.
    assert!(plan.slots.len() <= limits.slot_budget as usize);
    for (i, s) in plan.slots.iter().enumerate() {
        let end = s.gpa.get() + s.len;
        assert!(s.len > 0 && end <= limit, "{s:?}");
        assert!(!meets(&WideSlot { start: s.gpa.get().into(), end: end.into() }, limits.c_bit.unwrap_or(63)));
        for other in &plan.slots[i + 1..] {
            assert!(
                end <= other.gpa.get() || other.gpa.get() + other.len <= s.gpa.get(),
                "{s:?} meets {other:?}"
            );
        }
        if let SlotBacking::Ram { ram_addr } = s.backing {
            let inside = |b: &&RamBlock| {
                ram_addr.get() >= b.ram_addr.get() && ram_addr.get() + s.len <= b.ram_addr.get() + b.size
            };
            assert_eq!(case.layout.blocks().iter().filter(inside).count(), 1, "{s:?} lies in one block");
        }
    }
    // The bottom 4 GiB are the guest's own, one to one.
    for s in plan.slots.iter().filter(|s| s.purpose == Purpose::LowWindow) {
        for offset in sample(s.len) {
            let (_, ram) = lookup(&plan.slots, s.gpa.get() + offset).unwrap();
            assert_eq!(case.layout.gpa_to_ram(Gpa::new(s.gpa.get() + offset)).map(RamAddr::get), ram);
        }
    }

    // Mappings: exactly those expected, exactly in the tables, exactly by a walk.
    let mut expected = oracle.mappings();
    let planned: Vec<Expected> = plan
        .mappings
        .iter()
        .map(|(purpose, m)| Expected {
            purpose: *purpose,
            va: m.va.get(),
            gpa: m.gpa.get(),
            len: m.len,
            access: m.access,
            encrypted: m.encrypted,
        })
        .collect();
    assert_eq!(planned, expected);
    expected.sort_by_key(|m| m.va);
    let found = leaves(plan, limits);
    let mut rest = found.as_slice();
    for m in &expected {
        // A leaf may run through several mappings that happen to adjoin on both sides.
        let leaf = rest.first().expect("a mapping that the tables lack");
        let inside = m.va >= leaf.va && m.va + m.len <= leaf.va + leaf.len;
        assert!(inside && leaf.gpa + (m.va - leaf.va) == m.gpa, "{m:?} is not {leaf:?}");
        let flags =
            (m.access == Access::ReadWrite, m.access == Access::ReadExecute, m.encrypted && c_bit != 0);
        assert_eq!((leaf.writable, leaf.executable, leaf.encrypted), flags, "{m:?}");
        if m.va + m.len == leaf.va + leaf.len {
            rest = &rest[1..];
        }
    }
    assert!(rest.is_empty(), "mapped without a plan: {rest:?}");
    let total = |l: &[Leaf]| l.iter().map(|l| l.len).sum::<u64>();
    assert_eq!(total(&found), expected.iter().map(|m| m.len).sum::<u64>(), "nothing else is mapped");

    let step =
        |va: u64| walk(HelperVa::new(va), plan.tables.root(), c_bit, limit, |at| plan.tables.entry_at(at));
    for m in &expected {
        for offset in sample(m.len) {
            let t = step(m.va + offset).unwrap_or_else(|e| panic!("{m:?} + {offset:#x}: {e}"));
            assert_eq!((t.gpa.get(), t.access), (m.gpa + offset, m.access));
            assert_eq!(t.encrypted, m.encrypted && c_bit != 0);
            let (purpose, ram) = lookup(&plan.slots, t.gpa.get()).expect("a slot behind every page");
            match m.purpose {
                Purpose::Mailbox => assert_eq!((purpose, ram), (Purpose::Mailbox, None)),
                Purpose::RamWindow => assert_eq!(ram, Some(m.va + offset - abi::WINDOW_VA)),
                _ => assert!(helper_span.contains(&ram.unwrap()), "{m:?} leaves the helper's block"),
            }
        }
        // Guards.
        for outside in [m.va - PAGE_SIZE, m.va + m.len] {
            let mapped = expected.iter().any(|o| outside >= o.va && outside - o.va < o.len);
            assert_eq!(step(outside).is_ok(), mapped, "{outside:#x} beside {m:?}");
        }
    }
    for w in 0..u64::from(abi::WORKERS_MAX) {
        for guard in [128 << 10, 512 << 10, (1 << 20) - PAGE_SIZE] {
            let va = abi::WORKER_VA + w * abi::WORKER_STRIDE + guard;
            assert!(matches!(step(va), Err(WalkError::NotPresent(_))), "between worker areas");
        }
    }
    for va in [0, PAGE_SIZE, abi::WINDOW_VA - PAGE_SIZE, (1 << 47) - PAGE_SIZE] {
        assert!(matches!(step(va), Err(WalkError::NotPresent(_))), "{va:#x}");
    }

    // Page N of every allowed range is at WINDOW_VA + N * 4096 and nowhere else; the helper is not in the window.
    let mut pages = 0;
    for range in &plan.allowed {
        pages += range.pages();
        for offset in sample(range.len()) {
            let page = (range.start() + offset) / PAGE_SIZE;
            let t = step(abi::WINDOW_VA + page * PAGE_SIZE).unwrap();
            assert_eq!(t.access, Access::ReadWrite);
            assert_eq!(lookup(&plan.slots, t.gpa.get()), Some((Purpose::RamWindow, Some(page * PAGE_SIZE))));
        }
        assert!(
            range.end() <= helper_span.start || range.start() >= helper_span.end,
            "the helper may be exported"
        );
    }
    let ram: u64 = case.layout.blocks().iter().filter(|b| b.role == BlockRole::Ram).map(|b| b.size).sum();
    assert_eq!(pages * PAGE_SIZE, ram, "all RAM may move");
    for offset in sample(helper.size) {
        let va = abi::WINDOW_VA + helper.ram_addr.get() + offset;
        assert!(matches!(step(va), Err(WalkError::NotPresent(_))), "the helper is in the RAM window");
    }
    // W^X, over aliases too: no byte of RAM that is executable somewhere is writable anywhere.
    let backing = |l: &Leaf| lookup(&plan.slots, l.gpa).unwrap().1.map(|ram| ram..ram + l.len);
    assert!(!found.iter().any(|l| l.writable && l.executable));
    for code in found.iter().filter(|l| l.executable).filter_map(backing) {
        for data in found.iter().filter(|l| l.writable).filter_map(backing) {
            assert!(code.end <= data.start || data.end <= code.start, "{code:x?} is also writable");
        }
    }
    // Tables lie in the helper's block, behind everything else, unmapped.
    let tables = plan.tables.root().get();
    let (_, at) = lookup(&plan.slots, tables).unwrap();
    let end = at.unwrap() + plan.tables.page_count() as u64 * PAGE_SIZE;
    assert!(at.unwrap() >= helper_span.start + oracle.offsets.tables && end <= helper_span.end);
    for l in &found {
        let span = tables..tables + plan.tables.page_count() as u64 * PAGE_SIZE;
        assert!(l.gpa + l.len <= span.start || l.gpa >= span.end, "the helper could write its own tables");
    }
    assert_eq!(plan.tables.page_count() as u64, table_pages(&expected, limits.gib_pages));
    assert_eq!(plan.helper_gpa, MirrorGpa::new(oracle.helper_gpa(helper)));
}

/// Asks planner and oracle; gives the codes of the refusals.
fn check(case: &Case) -> Vec<RefusalCode> {
    let oracle = Oracle::new(case);
    let broken = oracle.broken();
    let strategy = Kind::Shifted { shift: case.shift };
    match plan(&case.layout, &case.header, &case.limits, strategy, case.mailbox) {
        Ok(plan) => {
            assert_eq!(broken, HashSet::new(), "accepted what breaks a rule");
            check_accepted(&oracle, &plan);
            Vec::new()
        }
        Err(refusals) => {
            assert!(!refusals.is_empty());
            for r in &refusals {
                assert!(broken.contains(&r.code), "{r}: the oracle knows only of {broken:?}");
                assert!(!r.to_string().is_empty());
            }
            let codes: Vec<_> = refusals.iter().map(|r| r.code).collect();
            let too_small =
                |c: &RefusalCode| matches!(c, RefusalCode::HelperTooSmall | RefusalCode::PageTableSpace);
            assert!(!case.sized || !codes.iter().any(too_small), "block_size is too small: {refusals:?}");
            codes
        }
    }
}

#[test]
fn plans_agree_with_the_oracle() {
    // New seeds every time; a failure prints its smallest case.
    let mut runner = TestRunner::new(Config { cases: 1024, failure_persistence: None, ..Config::default() });
    runner
        .run(&cases(), |case| {
            check(&case);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn the_oracle_is_asked_about_everything() {
    // The same cases every time, so that what they cover can be promised.
    let seen = RefCell::new((0, HashSet::new()));
    let config = Config { cases: 512, failure_persistence: None, ..Config::default() };
    let rng = TestRunner::deterministic().rng().clone();
    TestRunner::new_with_rng(config, rng)
        .run(&cases(), |case| {
            let codes = check(&case);
            let mut seen = seen.borrow_mut();
            seen.0 += usize::from(codes.is_empty());
            seen.1.extend(codes);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    let (accepted, codes) = seen.into_inner();
    println!("{accepted} accepted, refusals: {codes:?}");
    assert!(accepted > 100, "{accepted}");
    use RefusalCode as C;
    for code in [
        C::NoHelper,
        C::HelperTooSmall,
        C::ShiftUnaligned,
        C::ShiftTooLow,
        C::AboveMaxPhys,
        C::CBitInAddress,
        C::Wraps,
        C::SlotBudget,
        C::PageTableSpace,
    ] {
        assert!(codes.contains(&code), "{code:?} never came up");
    }
}

// ------------------------------------------------------------------------------------------ by name

const LIMITS: HostLimits = HostLimits {
    max_phys_bits: 46,
    c_bit: None,
    phys_bit_reduction: 0,
    slot_budget: 32_764,
    gib_pages: false,
};
const MAILBOX: MailboxSize = MailboxSize { workers: 2, slots: 4 };

fn guest(bytes: u64) -> GuestLayout {
    GuestLayout::assign(&[spec("ram0", bytes, Some(0))]).unwrap()
}

fn spec(name: &str, size_bytes: u64, gpa: Option<u64>) -> BlockSpec {
    BlockSpec { name: name.into(), size_bytes, gpa: gpa.map(Gpa::new) }
}

fn with_helper(layout: &GuestLayout) -> GuestLayout {
    let size = HelperPlacement::block_size(&header(8, 2, 1, 4), layout).unwrap();
    layout.with_helper(size, true).unwrap()
}

fn refusals(
    layout: &GuestLayout,
    helper: &Header,
    limits: &HostLimits,
    shift: Shift,
    size: MailboxSize,
) -> Vec<(RefusalCode, Option<u64>)> {
    let refused = plan(layout, helper, limits, Kind::Shifted { shift }, size).unwrap_err();
    refused.iter().map(|r| (r.code, r.bound)).collect()
}

#[test]
fn every_refusal_by_name() {
    use RefusalCode as C;
    let bare = guest(64 << 20);
    let good = with_helper(&bare);
    let h = header(8, 2, 1, 4);
    let explicit = |bytes| Shift::Explicit { bytes };
    let ask = |layout: &GuestLayout, limits: &HostLimits, shift| refusals(layout, &h, limits, shift, MAILBOX);
    plan(&good, &h, &LIMITS, Kind::Shifted { shift: Shift::FourGib }, MAILBOX).expect("legal as it stands");

    assert_eq!(ask(&bare, &LIMITS, Shift::FourGib), [(C::NoHelper, None)]);
    let small = bare.with_helper(PAGE_2M, true).unwrap();
    assert!(matches!(ask(&small, &LIMITS, Shift::FourGib)[..], [(C::HelperTooSmall, Some(_))]));
    assert_eq!(ask(&good, &LIMITS, explicit(FOUR_GIB + 4096)), [(C::ShiftUnaligned, Some(PAGE_2M))]);
    assert_eq!(ask(&good, &LIMITS, explicit(FOUR_GIB - PAGE_2M)), [(C::ShiftTooLow, Some(FOUR_GIB))]);
    let above = ask(&good, &LIMITS, explicit(1 << 46));
    assert!(above.iter().all(|r| *r == (C::AboveMaxPhys, Some(1 << 46))) && above.len() == 3, "{above:?}");
    let sev = HostLimits { max_phys_bits: 48, c_bit: Some(47), ..LIMITS };
    let encrypted = ask(&good, &sev, explicit(1 << 47));
    assert!(encrypted.iter().all(|r| *r == (C::CBitInAddress, Some(1 << 47))) && encrypted.len() == 3);
    assert_eq!(ask(&good, &LIMITS, explicit(u64::MAX - PAGE_2M + 1)), [(C::Wraps, None)]);
    let few = HostLimits { slot_budget: 4, ..LIMITS };
    assert_eq!(ask(&good, &few, Shift::FourGib), [(C::SlotBudget, Some(4))]);
    let tables = Offsets::new(&h, bare.ram_end(), 1).tables;
    let tight = bare.with_helper(tables + 2 * PAGE_SIZE, true).unwrap();
    assert!(matches!(ask(&tight, &LIMITS, Shift::FourGib)[..], [(C::PageTableSpace, Some(_))]));
    // Bit 63 of an entry is no-execute: a C-bit there is no host that exists, and the walk finds it out.
    let absurd = HostLimits { c_bit: Some(63), ..LIMITS };
    assert_eq!(ask(&good, &absurd, Shift::FourGib), [(C::PageTables, None)]);
    for bad in [Header { layout_hash: 1, ..h }, Header { base: 0x20_0000, ..h }] {
        let codes = refusals(&good, &bad, &LIMITS, Shift::FourGib, MAILBOX);
        assert!(codes.iter().any(|(code, _)| *code == C::HelperLayoutMismatch), "{codes:?}");
    }
    for size in [(0, 4), (17, 4), (2, 0), (2, 17), (u32::MAX, u32::MAX), (16, u32::MAX)] {
        let size = MailboxSize { workers: size.0, slots: size.1 };
        assert_eq!(
            refusals(&good, &h, &LIMITS, Shift::FourGib, size),
            [(C::MailboxSize, Some(16))],
            "{size:?}"
        );
    }
    let others = [
        Kind::IdentityCbit,
        Kind::Declared,
        Kind::PspCopied { via: PspVia::LaunchUpdate },
        Kind::PspCopied { via: PspVia::SendReceive },
    ];
    for strategy in others {
        let refused = plan(&good, &h, &LIMITS, strategy, MAILBOX).unwrap_err();
        assert_eq!((refused.len(), refused[0].code), (1, C::StrategyUnavailable));
        assert_eq!(refused[0].what, strategy.name());
    }
}

#[test]
fn several_wrong_things_are_named_at_once() {
    use RefusalCode as C;
    let shift = Shift::Explicit { bytes: 4095 };
    let codes = refusals(&guest(64 << 20), &header(8, 2, 1, 4), &LIMITS, shift, MAILBOX);
    let codes: Vec<_> = codes.iter().map(|(code, _)| *code).collect();
    assert_eq!(codes, [C::ShiftUnaligned, C::ShiftTooLow, C::NoHelper]);
}

#[test]
fn a_hundred_thousand_slots_are_refused_by_count() {
    let pages = 100_000u64;
    let plugs = (0..pages)
        .map(|p| Plug { offset: p * PAGE_SIZE, gpa: Gpa::new((pages - p) * 2 * PAGE_SIZE), len: PAGE_SIZE })
        .collect();
    let block = RamBlock {
        name: "shreds".into(),
        ram_addr: RamAddr::new(0),
        size: pages * PAGE_SIZE,
        role: BlockRole::Ram,
        plugs,
    };
    let layout = with_helper(&GuestLayout::from_blocks(vec![block]).unwrap());
    let limits = HostLimits { slot_budget: 32_764, ..LIMITS };
    let begun = std::time::Instant::now();
    let codes = refusals(&layout, &header(8, 2, 1, 4), &limits, Shift::FourGib, MAILBOX);
    let took = begun.elapsed();
    println!("refused in {took:?}");
    assert_eq!(codes, [(RefusalCode::SlotBudget, Some(32_764))]);
    // Linear work takes milliseconds; pairwise comparison of them would take minutes.
    assert!(took < std::time::Duration::from_secs(5), "{took:?}");
}

#[test]
fn large_guests_get_a_helper_block_that_is_large_enough() {
    let limits = |gib_pages| HostLimits { max_phys_bits: 52, gib_pages, ..LIMITS };
    let h = header(8, 2, 1, 4);
    for (bytes, gib_pages) in [
        (TIB, true),
        (TIB, false),
        (2 * TIB, true),
        (4 * TIB, false),
        (4 * TIB, true),
        (16 * TIB, true),
        (60 * TIB, true),
    ] {
        let bare =
            GuestLayout::assign(&[spec("low", GIB, Some(0)), spec("high", bytes - GIB, Some(FOUR_GIB))])
                .unwrap();
        let size = HelperPlacement::block_size(&h, &bare).unwrap();
        for plugged in [false, true] {
            let layout = bare.with_helper(size, plugged).unwrap();
            let begun = std::time::Instant::now();
            let plan =
                plan(&layout, &h, &limits(gib_pages), Kind::Shifted { shift: Shift::FourGib }, MAILBOX)
                    .unwrap_or_else(|r| panic!("{} TiB, gib_pages {gib_pages}: {r:?}", bytes / TIB));
            println!(
                "{} TiB, gib_pages {gib_pages}, plugged {plugged}: {} table pages, helper block {} MiB, {:?}",
                bytes / TIB,
                plan.tables.page_count(),
                size >> 20,
                begun.elapsed()
            );
            if bytes == TIB && gib_pages {
                assert!(
                    plan.tables.page_count() < 128,
                    "1 TiB costs {} table pages",
                    plan.tables.page_count()
                );
            }
        }
    }
}

#[test]
fn a_helper_block_is_never_sized_by_luck() {
    // Sizes are rounded up to 2 MiB, which can hide tables that were not counted: take the sizes around 4 TiB where
    // the rounding gives least.
    let h = header(8, 2, 1, 4);
    let bare = |gib: u64| GuestLayout::assign(&[spec("ram0", gib * GIB, Some(FOUR_GIB))]).unwrap();
    let spare = |gib: u64| {
        let bare = bare(gib);
        let size = HelperPlacement::block_size(&h, &bare).unwrap();
        size - Offsets::new(&h, bare.ram_end(), 1).tables - gib * PAGE_SIZE
    };
    let mut sizes: Vec<_> = (4096..4096 + 512).collect();
    sizes.sort_by_key(|gib| spare(*gib));
    for gib in &sizes[..6] {
        let bare = bare(*gib);
        let layout = bare.with_helper(HelperPlacement::block_size(&h, &bare).unwrap(), false).unwrap();
        let limits = HostLimits { max_phys_bits: 52, ..LIMITS };
        let plan = plan(&layout, &h, &limits, Kind::Shifted { shift: Shift::FourGib }, MAILBOX);
        let tables = plan.unwrap_or_else(|r| panic!("{gib} GiB: {r:?}")).tables.page_count();
        println!("{gib} GiB: {tables} table pages");
    }
}

// ------------------------------------------------------------------------------------------ layouts

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn addresses_round_trip(blocks in prop::collection::vec((sizes(), 0u64..3, places()), 1..7), plugged: bool, probe: u64) {
        let bare = GuestLayout::from_blocks(blocks_of(&blocks)).unwrap();
        let layout = bare.with_helper(4 << 20, plugged).unwrap();
        prop_assert_eq!(&layout.blocks()[..bare.blocks().len()], bare.blocks());
        let helper = layout.helper().unwrap();
        prop_assert_eq!((helper.size, helper.plugs.is_empty()), (4 << 20, !plugged));
        prop_assert_eq!(layout.ram_bytes(), bare.blocks().iter().map(|b| b.size).sum::<u64>());
        for b in layout.blocks() {
            for offset in sample(b.size).chain([probe % b.size, b.size - 1]) {
                let ram = RamAddr::new(b.ram_addr.get() + offset);
                let plug = b.plugs.iter().find(|p| offset >= p.offset && offset < p.offset + p.len);
                let gpa = plug.map(|p| Gpa::new(p.gpa.get() + (offset - p.offset)));
                prop_assert_eq!(layout.ram_to_gpa(ram), gpa);
                if let Some(gpa) = gpa {
                    prop_assert_eq!(layout.gpa_to_ram(gpa), Some(ram));
                }
            }
        }
        // What is beside every plug, and anywhere, is RAM exactly when some plug holds it.
        let edges: Vec<u64> = layout
            .plugged()
            .iter()
            .flat_map(|(_, p)| [p.gpa.get().wrapping_sub(1), p.gpa.get() + p.len])
            .chain([probe])
            .collect();
        for gpa in edges {
            let held = layout.plugged().iter().any(|(_, p)| gpa >= p.gpa.get() && gpa < p.gpa.get() + p.len);
            prop_assert_eq!(layout.gpa_to_ram(Gpa::new(gpa)).is_some(), held);
        }
        prop_assert_eq!(layout.ram_to_gpa(layout.ram_end()), None);
        let raw: Vec<RamBlock> = layout.clone().into();
        prop_assert_eq!(GuestLayout::from_blocks(raw), Ok(layout));
    }

    #[test]
    fn a_plugged_helper_takes_the_highest_hole_below_4_gib(
        starts in prop::collection::btree_set(0u64..64, 0..20), size in 1u64..6, high: bool,
    ) {
        // Blocks of 64 MiB on a grid of the bottom 4 GiB.
        const GRID: u64 = 64 << 20;
        let mut specs: Vec<_> =
            starts.iter().map(|i| spec(&format!("b{i}"), GRID, Some(i * GRID))).collect();
        if high || specs.is_empty() {
            specs.push(spec("high", GRID, high.then_some(FOUR_GIB)));
        }
        let bare = GuestLayout::assign(&specs).unwrap();
        let size = size * PAGE_2M;
        let layout = bare.with_helper(size, true).unwrap();
        let gpa = layout.helper().unwrap().gpa().unwrap().get();
        let free = |at: u64| bare.plugged().iter().all(|(_, p)| at + size <= p.gpa.get() || at >= p.gpa.get() + p.len);
        let best = (0..=(FOUR_GIB - size) / PAGE_2M).rev().map(|n| n * PAGE_2M).find(|at| free(*at));
        prop_assert_eq!(Some(gpa), best, "there is always a hole in this grid");
    }
}

#[test]
fn a_helper_without_a_hole_below_4_gib_goes_above_all_ram() {
    let full = GuestLayout::assign(&[spec("all", 5 * GIB + 4096, Some(0))]).unwrap();
    let gpa = full.with_helper(PAGE_2M, true).unwrap().helper().unwrap().gpa().unwrap();
    assert_eq!(gpa.get(), 5 * GIB + PAGE_2M);
}

#[test]
fn every_layout_error_by_name() {
    use LayoutError as E;
    let one = |specs: &[BlockSpec]| GuestLayout::assign(specs).unwrap_err();
    assert!(matches!(one(&[])[..], [E::Empty]));
    let many: Vec<_> = (0..32_769).map(|i| spec(&format!("b{i}"), PAGE_SIZE, None)).collect();
    assert!(matches!(one(&many)[..], [E::TooMany { count: 32_769 }]));
    GuestLayout::assign(&many[1..]).expect("as many as there may be");
    for name in ["", "a b", "ä", "a/b", "a\0", &"x".repeat(65)] {
        let errors = one(&[spec("ok", PAGE_SIZE, None), spec(name, PAGE_SIZE, None)]);
        assert!(matches!(errors[..], [E::Name { index: 1, .. }]), "{name:?}: {errors:?}");
    }
    GuestLayout::assign(&[spec(&"x".repeat(64), PAGE_SIZE, None)]).unwrap();
    let errors = one(&[spec("a", PAGE_SIZE, None), spec("b", PAGE_SIZE, None), spec("a", PAGE_SIZE, None)]);
    assert!(matches!(&errors[..], [E::DuplicateName { index: 2, name }] if name == "a"));
    for size in [0, 1, 4095, 4097, u64::MAX] {
        let errors = one(&[spec("a", size, None)]);
        let named = |e: &LayoutError| matches!(e, E::Range { index: 0, field: "size_bytes", .. });
        assert!(errors.iter().any(named), "{size}: {errors:?}");
    }
    for gpa in [1, 4097, u64::MAX, u64::MAX - 4095] {
        let errors = one(&[spec("a", PAGE_SIZE, Some(gpa))]);
        assert!(matches!(errors[..], [E::Range { index: 0, field: "gpa", .. }]), "{gpa:#x}: {errors:?}");
    }
    let errors = one(&[spec("a", PAGE_SIZE, None), spec("b", 64 * TIB, None)]);
    assert!(errors.iter().all(|e| matches!(e, E::TooLarge { index: 1 })) && !errors.is_empty(), "{errors:?}");
    GuestLayout::assign(&[spec("a", 64 * TIB, None)]).unwrap();
    let errors =
        one(&[spec("a", GIB, Some(0)), spec("b", GIB, Some(4 * GIB)), spec("c", GIB, Some(GIB - 4096))]);
    let at = Gpa::new(GIB - 4096);
    assert!(matches!(errors[..], [E::Overlap { index: 2, other: 0, gpa }] if gpa == at), "{errors:?}");
    // All at once, not the first alone.
    let errors = one(&[spec("a b", PAGE_SIZE, None), spec("c", 5, None), spec("c", PAGE_SIZE, Some(3))]);
    assert_eq!(errors.len(), 4, "{errors:?}");

    let block = |plugs| RamBlock {
        name: "a".into(),
        ram_addr: RamAddr::new(0),
        size: 4 * PAGE_SIZE,
        role: BlockRole::Ram,
        plugs,
    };
    let plug =
        |offset: u64, gpa: u64, pages: u64| Plug { offset, gpa: Gpa::new(gpa), len: pages * PAGE_SIZE };
    for plugs in [
        vec![plug(0, 0, 5)],
        vec![plug(3 * PAGE_SIZE, 0, 2)],
        vec![plug(0, 0, 2), plug(PAGE_SIZE, 1 << 30, 1)],
        vec![plug(PAGE_SIZE, 0, 1), plug(0, 1 << 30, 1)],
        vec![plug(5, 0, 1)],
        vec![plug(0, 0, 0)],
        vec![plug(u64::MAX - 4095, 0, 1)],
    ] {
        let errors = GuestLayout::from_blocks(vec![block(plugs.clone())]).unwrap_err();
        assert!(matches!(errors[..], [E::Range { index: 0, field: "gpa", .. }]), "{plugs:?}: {errors:?}");
    }
    // RamAddrs that go back or overlap.
    let at = |name: &str, ram: u64| RamBlock {
        name: name.into(),
        ram_addr: RamAddr::new(ram),
        ..block(Vec::new())
    };
    for second in [0, 4096, 3 * 4096] {
        let errors = GuestLayout::from_blocks(vec![at("a", 0), at("b", second)]).unwrap_err();
        assert!(matches!(errors[..], [E::TooLarge { index: 1 }]), "{second:#x}: {errors:?}");
    }
    // A second helper.
    let layout = with_helper(&guest(64 << 20));
    let errors = layout.with_helper(PAGE_2M, false).unwrap_err();
    assert!(matches!(errors[..], [E::DuplicateName { .. }]), "{errors:?}");
}
