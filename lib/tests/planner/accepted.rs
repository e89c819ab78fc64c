//! What an accepted plan must be: every rule, checked on the raw slots and the raw bytes of the tables.

use std::collections::HashSet;

use mirrorvm::addr::{Gpa, HelperVa, MirrorGpa, PAGE_SIZE, RamAddr, RamPage};
use mirrorvm::address_space::{
    Access, Addressing, BlockRole, Confidentiality, FOUR_GIB, HelperPlacement, HelperSet, HostLimits,
    MirrorPlan, MirrorSlot, Purpose, RamBlock, SlotBacking, Strategy as Kind, WalkError, walk,
};
use mirrorvm_abi::{config, layout as abi};

use crate::oracle::{Expected, Oracle, mailbox_len, meets, table_pages};

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

/// Everything that the tables map, by ascending address, neighbours joined, and how many entries of each
/// size. Asserts what hardware asserts.
fn leaves(plan: &MirrorPlan, limits: &HostLimits, c_bit: u64) -> (Vec<Leaf>, [u64; 3]) {
    let bytes = plan.tables.bytes();
    let base = plan.tables.root().get();
    let mut list: Vec<Leaf> = Vec::new();
    let mut counts = [0; 3];
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
                counts[level as usize] += 1;
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
    (list, counts)
}

/// Memory behind an address of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Ram(u64),
    Private(u64),
    Mailbox(u64),
}

/// The software's view of KVM's slots: what is at a mirror-physical address.
fn lookup(slots: &[MirrorSlot], gpa: u64) -> Option<(&MirrorSlot, Behind)> {
    let s = slots.iter().find(|s| gpa >= s.gpa.get() && gpa - s.gpa.get() < s.len)?;
    let inside = gpa - s.gpa.get();
    let behind = match s.backing {
        SlotBacking::Ram { ram_addr } => Behind::Ram(ram_addr.get() + inside),
        SlotBacking::Private { offset } => Behind::Private(offset + inside),
        SlotBacking::Mailbox => Behind::Mailbox(inside),
    };
    Some((s, behind))
}

/// All pages of a short span, edges and a stride of a long one.
pub fn sample(len: u64) -> impl Iterator<Item = u64> {
    let pages = len / PAGE_SIZE;
    let stride = if pages <= 2048 { 1 } else { pages / 509 };
    let edges = [0, 1, 511, 512, pages.saturating_sub(2), pages - 1];
    (0..pages).step_by(stride as usize).chain(edges).filter(move |p| *p < pages).map(|p| p * PAGE_SIZE)
}

pub fn check(oracle: &Oracle<'_>, plan: &MirrorPlan) {
    let case = oracle.case;
    let encrypted = case.confidentiality != Confidentiality::None;
    let c_bit = if encrypted { 1u64 << case.limits.c_bit.unwrap() } else { 0 };
    let helper = oracle.helper().unwrap();
    assert_eq!(plan.strategy, case.strategy);
    assert_eq!(plan.confidentiality, case.confidentiality);
    check_placement(oracle, plan, helper);
    check_slots(oracle, plan);
    check_reach(oracle, plan, helper);
    let expected = oracle.mappings(&plan.placement).unwrap();
    let (found, counts) = leaves(plan, &case.limits, c_bit);
    check_mappings(plan, &expected, &found, c_bit);
    check_walks(oracle, plan, &expected, c_bit);
    check_allowed(oracle, plan, c_bit);
    check_permissions(oracle, plan, &found, helper);
    check_tables(oracle, plan, &expected, &found);
    check_coverage(plan, &found, counts, encrypted);
    check_contents(plan);
    let codes: HashSet<_> = plan.exposures.iter().map(|e| e.code).collect();
    assert_eq!(codes.len(), plan.exposures.len(), "a code twice");
    assert!(plan.exposures.iter().all(|e| !e.detail.is_empty()));
    assert_eq!(codes.contains("no_c_bit"), case.strategy == Kind::IdentityCbit && !encrypted);
}

/// All five sets have their places in the block, whatever the strategy.
fn check_placement(oracle: &Oracle<'_>, plan: &MirrorPlan, helper: &RamBlock) {
    let (case, p, o) = (oracle.case, &plan.placement, &oracle.offsets);
    assert_eq!(
        (p.secret_at, p.tss_at, p.workers_at, p.maps_at, p.maps_len),
        (o.secret, o.tss, o.workers, o.maps, o.maps_len)
    );
    let mut at = p.maps_at + p.maps_len;
    for (index, set) in HelperSet::ALL.into_iter().enumerate() {
        let each = HelperPlacement::new(&case.header, &case.layout, set).unwrap();
        assert_eq!(set.index(), index);
        assert_eq!((each.config_at, each.tables_at), (at, at + each.config_pages * PAGE_SIZE));
        at = each.tables_at + each.table_pages * PAGE_SIZE;
        assert_eq!(each.block_len(), p.block_len());
        if set == HelperSet::of(&case.strategy) {
            assert_eq!(&each, p);
        }
    }
    assert_eq!(at, p.block_len());
    assert!(at <= helper.size);
}

fn check_slots(oracle: &Oracle<'_>, plan: &MirrorPlan) {
    let case = oracle.case;
    let limits = &case.limits;
    let limit = 1u64 << (limits.max_phys_bits - limits.phys_bit_reduction).clamp(33, 52);
    assert!(plan.slots.len() <= limits.slot_budget as usize);
    assert!(plan.slots.is_sorted_by_key(|s| s.gpa));
    for (i, s) in plan.slots.iter().enumerate() {
        let end = s.gpa.get() + s.len;
        assert!(s.len > 0 && end <= limit, "{s:?}");
        assert!(s.gpa.is_aligned(PAGE_SIZE) && s.len % PAGE_SIZE == 0, "{s:?}");
        assert!(limits.c_bit.is_none_or(|c| !meets(s.gpa.get().into(), end.into(), c)), "{s:?}");
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
    // One mailbox, whole.
    let mailboxes: Vec<_> = plan.slots.iter().filter(|s| s.backing == SlotBacking::Mailbox).collect();
    assert!(matches!(mailboxes[..], [s] if s.len == mailbox_len(case.mailbox) && s.gpa == plan.mailbox_gpa));
    assert_eq!(u128::from(plan.mailbox_gpa.get()), oracle.mailbox_at);
}

/// What can be reached through slots, and how often.
fn check_reach(oracle: &Oracle<'_>, plan: &MirrorPlan, helper: &RamBlock) {
    let case = oracle.case;
    let text = helper.ram_addr.get()..helper.ram_addr.get() + oracle.text_len();
    let ram_of = |s: &MirrorSlot| match s.backing {
        SlotBacking::Ram { ram_addr } => Some(ram_addr.get()..ram_addr.get() + s.len),
        SlotBacking::Private { .. } | SlotBacking::Mailbox => None,
    };
    for s in &plan.slots {
        // Read only is the helper's code, all of it and nothing else, when that was asked for.
        let code = match s.backing {
            SlotBacking::Ram { ram_addr } => text.contains(&ram_addr.get()),
            SlotBacking::Private { offset } => offset < oracle.text_len(),
            SlotBacking::Mailbox => false,
        };
        assert_eq!(s.read_only, code && case.read_only_text, "{s:?}");
        if s.read_only {
            assert!(s.len <= oracle.text_len());
        }
        match (s.purpose, &case.strategy) {
            // One to one.
            (Purpose::LowWindow, Kind::Shifted { .. }) => {
                assert!(s.gpa.get() + s.len <= FOUR_GIB);
                same_as_guest(oracle, s);
            }
            (Purpose::RamWindow | Purpose::Helper, Kind::IdentityCbit) => same_as_guest(oracle, s),
            (Purpose::RamWindow | Purpose::Vmsa, _) => {
                let ram = ram_of(s).unwrap();
                if case.strategy != Kind::IdentityCbit {
                    assert_eq!(s.gpa.get(), ram.start + oracle.shift);
                }
            }
            (Purpose::DeclaredPiece, Kind::Declared) => {
                let ram = ram_of(s).unwrap();
                let gpa = case.layout.ram_to_gpa(RamAddr::new(ram.start)).unwrap().get();
                let inside = |t: &&mirrorvm::address_space::Tuple| {
                    gpa >= t.guest.get()
                        && gpa + s.len <= t.guest.get() + t.len
                        && s.gpa.get() == t.mirror.get() + (gpa - t.guest.get())
                };
                assert_eq!(case.declaration.as_ref().unwrap().tuples().iter().filter(inside).count(), 1);
                assert!(s.gpa.get() + s.len <= oracle.shift, "below the window");
            }
            (Purpose::HelperPrivate, Kind::PspCopied { .. }) => {
                assert!(matches!(s.backing, SlotBacking::Private { .. }));
            }
            (Purpose::Mailbox, _) => assert_eq!(s.backing, SlotBacking::Mailbox),
            other => panic!("a slot that has no place here: {other:?}"),
        }
    }
    // No page twice, but for the bottom 4 GiB under `shifted`; and then with the same permissions.
    for (i, a) in plan.slots.iter().enumerate() {
        for b in &plan.slots[i + 1..] {
            let (Some(x), Some(y)) = (ram_of(a), ram_of(b)) else { continue };
            if x.start < y.end && y.start < x.end {
                let low = (a.purpose == Purpose::LowWindow) != (b.purpose == Purpose::LowWindow);
                assert!(low && matches!(case.strategy, Kind::Shifted { .. }), "{a:?} and {b:?}");
                assert_eq!(a.read_only, b.read_only);
            }
        }
    }
    // Under the strategies that say so, the helper's block is not in the mirror, or as declared only.
    let reach: u64 = plan
        .slots
        .iter()
        .filter_map(ram_of)
        .filter(|r| r.start >= helper.ram_addr.get() && r.end <= helper.ram_addr.get() + helper.size)
        .map(|r| r.end - r.start)
        .sum();
    match case.strategy {
        Kind::PspCopied { .. } => assert_eq!(reach, 0, "the guest's block is not used"),
        Kind::Declared => {
            let declared: u64 = case.declaration.as_ref().unwrap().tuples().iter().map(|t| t.len).sum();
            assert_eq!(reach, declared);
        }
        Kind::IdentityCbit => assert_eq!(reach, helper.plugs.iter().map(|p| p.len).sum::<u64>()),
        Kind::Shifted { .. } => assert!(reach >= helper.size),
    }
}

fn same_as_guest(oracle: &Oracle<'_>, s: &MirrorSlot) {
    for offset in sample(s.len) {
        let Some((_, Behind::Ram(ram))) = lookup(std::slice::from_ref(s), s.gpa.get() + offset) else {
            panic!("{s:?} is not RAM")
        };
        let gpa = Gpa::new(s.gpa.get() + offset);
        assert_eq!(oracle.case.layout.gpa_to_ram(gpa).map(RamAddr::get), Some(ram));
    }
}

/// Exactly what is expected, and exactly that in the tables.
fn check_mappings(plan: &MirrorPlan, expected: &[Expected], found: &[Leaf], c_bit: u64) {
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
    let mut sorted = expected.to_vec();
    sorted.sort_by_key(|m| m.va);
    let mut rest = found;
    for m in &sorted {
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
    let total: u64 = found.iter().map(|l| l.len).sum();
    assert_eq!(total, expected.iter().map(|m| m.len).sum::<u64>(), "nothing else is mapped");
}

/// What a processor would do, page by page.
fn check_walks(oracle: &Oracle<'_>, plan: &MirrorPlan, expected: &[Expected], c_bit: u64) {
    let limits = &oracle.case.limits;
    let limit = 1u64 << (limits.max_phys_bits - limits.phys_bit_reduction).clamp(33, 52);
    let helper = oracle.helper().unwrap();
    let step =
        |va: u64| walk(HelperVa::new(va), plan.tables.root(), c_bit, limit, |at| plan.tables.entry_at(at));
    for m in expected {
        for offset in sample(m.len) {
            let t = step(m.va + offset).unwrap_or_else(|e| panic!("{m:?} + {offset:#x}: {e}"));
            assert_eq!((t.gpa.get(), t.access), (m.gpa + offset, m.access));
            assert_eq!(t.encrypted, m.encrypted && c_bit != 0);
            let (slot, behind) = lookup(&plan.slots, t.gpa.get()).expect("a slot behind every page");
            assert!(!slot.read_only || m.access == Access::ReadExecute, "{m:?} on {slot:?}");
            match (m.purpose, behind) {
                (Purpose::Mailbox | Purpose::PlainAlias, Behind::Mailbox(at)) => {
                    assert_eq!(at, m.va + offset - abi::MAILBOX_VA);
                    assert!(!t.encrypted, "the host must be able to read it");
                }
                (Purpose::RamWindow | Purpose::Vmsa, Behind::Ram(ram)) => {
                    let (helper, gpa) = oracle.window(ram).unwrap();
                    assert_eq!((abi::WINDOW_VA + helper, gpa), (m.va + offset, t.gpa.get()));
                }
                (_, Behind::Ram(ram)) => {
                    let inside = ram.checked_sub(helper.ram_addr.get()).filter(|o| *o < helper.size);
                    let inside = inside.unwrap_or_else(|| panic!("{m:?} leaves the helper's block"));
                    assert_eq!(plan.helper_at(inside), Some(t.gpa));
                }
                (_, Behind::Private(at)) => assert_eq!(plan.helper_at(at), Some(t.gpa)),
                (_, Behind::Mailbox(_)) => panic!("{m:?} is host memory"),
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
}

/// Every page of RAM is allowed, once, at one place of the window; or it is out of reach for a reason that is
/// given.
fn check_allowed(oracle: &Oracle<'_>, plan: &MirrorPlan, c_bit: u64) {
    let case = oracle.case;
    let by_gpa = case.strategy == Kind::IdentityCbit;
    assert_eq!(plan.addressing, if by_gpa { Addressing::Gpa } else { Addressing::RamAddr });
    assert_eq!(plan.shift, oracle.shift);
    let ends = plan.allowed.windows(2).all(|p| p[0].end() < p[1].start());
    assert!(ends, "ascending, disjoint, joined");
    let maps_pages = plan.placement.maps_len / 16 * 64;
    assert!(
        plan.allowed.last().is_none_or(|r| r.end() / PAGE_SIZE <= maps_pages),
        "the maps have a bit for each"
    );
    let allowed = |helper: u64| plan.allowed.iter().any(|r| r.contains(helper));
    let mut ram = 0;
    for b in case.layout.blocks() {
        for offset in sample(b.size) {
            let at = b.ram_addr.get() + offset;
            let page = RamPage::new(at / PAGE_SIZE);
            let expected = oracle.window(at);
            assert_eq!(plan.mirror_gpa(RamAddr::new(at)), expected.map(|(_, gpa)| MirrorGpa::new(gpa)));
            assert_eq!(plan.mirror_gpa(RamAddr::new(at + 77)), expected.map(|(_, g)| MirrorGpa::new(g + 77)));
            assert_eq!(plan.helper_page(page), expected.map(|(helper, _)| helper / PAGE_SIZE));
            if let Some((helper, gpa)) = expected {
                assert!(allowed(helper));
                assert_eq!(plan.ram_page(helper / PAGE_SIZE), Some(page));
                let va = HelperVa::new(abi::WINDOW_VA + helper);
                let t = walk(va, plan.tables.root(), c_bit, 1 << 52, |at| plan.tables.entry_at(at)).unwrap();
                assert_eq!((t.gpa.get(), t.access), (gpa, Access::ReadWrite));
            } else if b.role != BlockRole::Helper {
                let reason = plan
                    .unreachable
                    .iter()
                    .filter(|u| at >= u.ram_addr.get() && at - u.ram_addr.get() < u.len);
                assert_eq!(reason.map(|u| u.code).collect::<Vec<_>>(), ["unplugged_shared"]);
                assert!(case.shared.as_ref().unwrap().contains(page), "private and left behind");
            } else if !by_gpa {
                assert!(!allowed(at), "the helper may be exported");
            }
        }
        ram += if b.role == BlockRole::Helper { 0 } else { b.size };
    }
    let reached: u64 = plan.allowed.iter().map(|r| r.len()).sum();
    let left: u64 = plan.unreachable.iter().map(|u| u.len).sum();
    assert_eq!(reached + left, ram, "all RAM, and nothing else");
    let end = case.layout.ram_end().get();
    assert_eq!(plan.mirror_gpa(RamAddr::new(end)), None);
    for absurd in [u64::MAX, 1 << 63, end + (1 << 40)] {
        assert_eq!(plan.mirror_gpa(RamAddr::new(absurd)), None);
        assert_eq!((plan.helper_page(RamPage::new(absurd)), plan.ram_page(absurd)), (None, None));
    }
}

/// W^X, over aliases too: no byte that is executable somewhere is writable anywhere, and the helper is not in
/// its window.
fn check_permissions(oracle: &Oracle<'_>, plan: &MirrorPlan, found: &[Leaf], helper: &RamBlock) {
    assert!(!found.iter().any(|l| l.writable && l.executable));
    // As numbers in one space: RAM, private memory from 2^60, the mailbox from 2^61; cut where a slot ends.
    let backing = |l: &Leaf| {
        let mut spans = Vec::new();
        let mut done = 0;
        while done < l.len {
            let (slot, behind) = lookup(&plan.slots, l.gpa + done).unwrap();
            let len = (l.len - done).min(slot.gpa.get() + slot.len - (l.gpa + done));
            let start = match behind {
                Behind::Ram(at) => at,
                Behind::Private(at) => at + (1 << 60),
                Behind::Mailbox(at) => at + (1 << 61),
            };
            spans.push(start..start + len);
            done += len;
        }
        spans
    };
    let all = |flag: fn(&Leaf) -> bool| found.iter().filter(move |l| flag(l)).flat_map(backing);
    for code in all(|l| l.executable) {
        for data in all(|l| l.writable) {
            assert!(code.end <= data.start || data.end <= code.start, "{code:x?} is also writable");
        }
    }
    let home = match oracle.case.strategy {
        Kind::PspCopied { .. } => 1 << 60,
        _ => helper.ram_addr.get(),
    };
    for span in all(|l| l.va >= abi::WINDOW_VA) {
        assert!(span.end <= home || span.start >= home + helper.size, "the helper is in its RAM window");
    }
}

/// Tables lie in their set of the helper's block, in one piece, and nobody can write them.
fn check_tables(oracle: &Oracle<'_>, plan: &MirrorPlan, expected: &[Expected], found: &[Leaf]) {
    let pages = plan.tables.page_count() as u64;
    assert!(pages <= plan.placement.table_pages);
    let root = plan.tables.root().get();
    for page in 0..pages {
        let offset = plan.placement.tables_at + page * PAGE_SIZE;
        assert_eq!(plan.helper_at(offset).map(MirrorGpa::get), Some(root + page * PAGE_SIZE));
    }
    for l in found {
        let span = root..root + pages * PAGE_SIZE;
        assert!(l.gpa + l.len <= span.start || l.gpa >= span.end, "the helper could write its own tables");
    }
    assert_eq!(pages, table_pages(expected, oracle.case.limits.gib_pages));
    assert_eq!(plan.helper_at(oracle.helper().unwrap().size), None);
}

fn check_coverage(plan: &MirrorPlan, found: &[Leaf], counts: [u64; 3], encrypted: bool) {
    let c = plan.coverage;
    let roots: HashSet<u64> = found.iter().flat_map(|l| l.va >> 39..=(l.va + l.len - 1) >> 39).collect();
    assert_eq!(c.pml4_entries, roots.len() as u64);
    assert_eq!([c.kib4_leaves, c.mib2_leaves, c.gib_leaves], counts);
    assert_eq!(c.table_pages, plan.tables.page_count() as u64);
    let plain: u64 = found.iter().filter(|l| !l.encrypted).map(|l| l.len).sum();
    if encrypted {
        assert_eq!(c.alias_bytes, plain, "nothing else is without the C-bit");
    }
    assert_eq!(c.alias_bytes, plan.mailbox.bytes());
    assert_eq!(c.window_bytes, plan.allowed.iter().map(|r| r.len()).sum::<u64>());
}

/// What the loader writes says what the plan says.
fn check_contents(plan: &MirrorPlan) {
    let contents = plan.set_contents(0, 0);
    let (at, bytes) = &contents[0];
    assert_eq!(*at, plan.placement.config_at);
    assert!(bytes.len() as u64 <= plan.placement.config_pages * PAGE_SIZE);
    let fixed = config::Config::decode(bytes[..config::FIXED_BYTES].try_into().unwrap()).unwrap();
    assert_eq!((fixed.workers, fixed.slots), (plan.mailbox.workers, plan.mailbox.slots));
    let ranges: Vec<_> = bytes[config::FIXED_BYTES..]
        .as_chunks::<{ config::RANGE_BYTES }>()
        .0
        .iter()
        .map(config::Range::decode)
        .map(|r| (r.first * PAGE_SIZE, r.count))
        .collect();
    assert_eq!(fixed.ranges as usize, ranges.len());
    assert_eq!(ranges, plan.allowed.iter().map(|r| (r.start(), r.pages())).collect::<Vec<_>>());
    assert_eq!(fixed.pages, plan.allowed.last().map_or(0, |r| r.end() / PAGE_SIZE));
    assert_eq!(contents[1], (plan.placement.tables_at, plan.tables.bytes()));
    assert_eq!(contents.len(), 2);
}
