//! Every refusal by name: code, what, value, index and bound.

use mirrorvm::addr::{Gpa, PAGE_2M, PAGE_SIZE, PageRange, RamAddr};
use mirrorvm::address_space::{
    BlockRole, Confidentiality, FOUR_GIB, GuestLayout, HELPER_BLOCK, HelperPlacement, HelperSet, HostLimits,
    MailboxSize, PlanRequest, Plug, PspVia, RamBlock, Refusal, RefusalCode as C, Shift, Strategy as Kind,
    plan,
};
use mirrorvm::pages::PageSet;
use mirrorvm_abi::header::Header;

use crate::generate::{header, spec};
use crate::oracle::HEAD_ROOM;
use crate::{GIB, TIB};

pub const LIMITS: HostLimits = HostLimits {
    max_phys_bits: 46,
    c_bit: None,
    phys_bit_reduction: 0,
    slot_budget: 32_764,
    gib_pages: false,
};
/// A host with SEV: 46 usable bits.
pub const SEV: HostLimits =
    HostLimits { max_phys_bits: 47, c_bit: Some(51), phys_bit_reduction: 1, ..LIMITS };
pub const MAILBOX: MailboxSize = MailboxSize { workers: 2, slots: 4 };
const FOUR: Kind = Kind::Shifted { shift: Shift::FourGib };

pub fn image() -> Header {
    header(8, 2, 1, 4)
}

pub fn guest(bytes: u64) -> GuestLayout {
    GuestLayout::assign(&[spec("ram0", bytes, Some(0))]).unwrap()
}

pub fn with_helper(layout: &GuestLayout) -> GuestLayout {
    let size = HelperPlacement::block_size(&image(), layout).unwrap();
    layout.with_helper(size, true).unwrap()
}

/// A refusal in short.
pub type Short = (C, Option<usize>, u64, Option<u64>);

pub fn short(refusals: &[Refusal]) -> Vec<Short> {
    refusals.iter().map(|r| (r.code, r.index, r.value, r.bound)).collect()
}

fn ask(layout: &GuestLayout, limits: &HostLimits, strategy: Kind) -> Vec<Short> {
    ask_as(layout, limits, strategy, Confidentiality::None)
}

fn ask_as(layout: &GuestLayout, limits: &HostLimits, strategy: Kind, level: Confidentiality) -> Vec<Short> {
    let h = image();
    let mut request = PlanRequest::new(layout, &h, limits, strategy, MAILBOX);
    request.confidentiality = level;
    plan(&request).map_or_else(|r| short(&r), |_| Vec::new())
}

#[test]
fn shifts() {
    let good = with_helper(&guest(64 << 20));
    let explicit =
        |limits: &HostLimits, bytes| ask(&good, limits, Kind::Shifted { shift: Shift::Explicit { bytes } });
    assert_eq!(explicit(&LIMITS, FOUR_GIB), []);
    assert_eq!(
        explicit(&LIMITS, FOUR_GIB + 4096),
        [(C::ShiftUnaligned, None, FOUR_GIB + 4096, Some(PAGE_2M))]
    );
    let low = FOUR_GIB - PAGE_2M;
    let refused = explicit(&LIMITS, low);
    // The window would also meet the helper, which lies right below 4 GiB.
    assert_eq!(refused[0], (C::ShiftTooLow, None, low, Some(FOUR_GIB)));
    assert!(refused[1..].iter().all(|r| r.0 == C::SlotOverlap), "{refused:x?}");
    // Window, helper and mailbox; the two slots of the low window come first.
    let end = |mib: u64| (1 << 46) + (mib << 20);
    let helper = good.helper().unwrap().size >> 20;
    let mailbox = MAILBOX.bytes() >> 20;
    let limit = Some(1u64 << 46);
    assert_eq!(
        explicit(&LIMITS, 1 << 46),
        [
            (C::AboveMaxPhys, Some(2), end(64), limit),
            (C::AboveMaxPhys, Some(3), end(64 + helper), limit),
            (C::AboveMaxPhys, Some(4), end(64 + helper + mailbox), limit),
        ]
    );
    let c = HostLimits { max_phys_bits: 48, c_bit: Some(47), ..LIMITS };
    let at = |mib: u64| (1u64 << 47) + (mib << 20);
    let bit = Some(1u64 << 47);
    assert_eq!(
        explicit(&c, 1 << 47),
        [
            (C::CBitInAddress, Some(2), at(0), bit),
            (C::CBitInAddress, Some(3), at(64), bit),
            (C::CBitInAddress, Some(4), at(64 + helper), bit),
        ]
    );
    let wraps = u64::MAX - PAGE_2M + 1;
    assert_eq!(explicit(&LIMITS, wraps), [(C::Wraps, None, wraps, None)]);
}

#[test]
fn helpers_and_mailboxes() {
    let bare = guest(64 << 20);
    let good = with_helper(&bare);
    assert_eq!(ask(&bare, &LIMITS, FOUR), [(C::NoHelper, None, 1, None)]);
    let needed = HelperPlacement::new(&image(), &bare, HelperSet::Shifted).unwrap().block_len();
    let small = bare.with_helper(PAGE_2M, true).unwrap();
    assert_eq!(ask(&small, &LIMITS, FOUR), [(C::HelperTooSmall, None, PAGE_2M, Some(needed))]);
    let exact = bare.with_helper(needed, true).unwrap();
    assert_eq!(ask(&exact, &LIMITS, FOUR), []);
    let short_by_one = bare.with_helper(needed - PAGE_SIZE, true).unwrap();
    assert_eq!(
        ask(&short_by_one, &LIMITS, FOUR),
        [(C::HelperTooSmall, None, needed - PAGE_SIZE, Some(needed))]
    );

    let h = image();
    let hash = mirrorvm_abi::layout::LAYOUT_HASH;
    for bad in [
        Header { layout_hash: 1, ..h },
        Header { base: 0x20_0000, ..h },
        Header { text_end: h.base - PAGE_SIZE, ..h },
        Header { bss_end: h.rodata_end - PAGE_SIZE, ..h },
        Header { bss_end: u64::MAX - 4095, ..h },
        Header { bss_end: 0, ..h },
    ] {
        let refused = plan(&PlanRequest::new(&good, &bad, &LIMITS, FOUR, MAILBOX)).unwrap_err();
        assert_eq!(short(&refused)[0], (C::HelperLayoutMismatch, None, bad.layout_hash, Some(hash)));
    }
    for (workers, slots, bad) in [
        (0, 4, 0),
        (17, 4, 17),
        (2, 0, 0),
        (2, 17, 17),
        (u32::MAX, u32::MAX, u32::MAX),
        (16, u32::MAX, u32::MAX),
    ] {
        let request = PlanRequest::new(&good, &h, &LIMITS, FOUR, MailboxSize { workers, slots });
        assert_eq!(short(&plan(&request).unwrap_err()), [(C::MailboxSize, None, u64::from(bad), Some(16))]);
    }
    // Bit 63 of an entry is no-execute: a C-bit there is no host that exists, and the walk finds it out.
    let absurd = HostLimits { c_bit: Some(63), ..LIMITS };
    let refused = ask_as(&good, &absurd, FOUR, Confidentiality::Sev);
    assert_eq!(refused, [(C::PageTables, Some(0), mirrorvm_abi::layout::IMAGE_VA, None)]);
}

#[test]
fn budgets() {
    let good = with_helper(&guest(64 << 20));
    let few = |slot_budget| HostLimits { slot_budget, ..LIMITS };
    // Two in the low window, two in the RAM window, the mailbox.
    assert_eq!(ask(&good, &few(5), FOUR), []);
    assert_eq!(ask(&good, &few(4), FOUR), [(C::SlotBudget, None, 5, Some(4))]);
    assert_eq!(ask(&good, &few(2), Kind::IdentityCbit), [(C::SlotBudget, None, 3, Some(2))]);
    let psp = Kind::PspCopied { via: PspVia::LaunchUpdate };
    assert_eq!(ask(&good, &few(2), psp), [(C::SlotBudget, None, 3, Some(2))]);
    let h = image();
    let limits = few(6);
    let mut request = PlanRequest::new(&good, &h, &limits, FOUR, MAILBOX);
    request.read_only_text = true;
    // The code is cut out of both slots that reach it.
    assert_eq!(short(&plan(&request).unwrap_err()), [(C::SlotBudget, None, 7, Some(6))]);
}

#[test]
fn protection_levels() {
    let good = with_helper(&guest(64 << 20));
    let all = [
        FOUR,
        Kind::Shifted { shift: Shift::MaxPhys },
        Kind::IdentityCbit,
        Kind::PspCopied { via: PspVia::LaunchUpdate },
    ];
    for strategy in all {
        assert_eq!(ask_as(&good, &SEV, strategy, Confidentiality::Sev), []);
        assert_eq!(ask_as(&good, &SEV, strategy, Confidentiality::SevEs), []);
        assert_eq!(ask_as(&good, &SEV, strategy, Confidentiality::SevSnp), [(C::SnpMirror, None, 0, None)]);
        assert_eq!(ask_as(&good, &LIMITS, strategy, Confidentiality::Sev), [(C::CBitMissing, None, 0, None)]);
        let h = image();
        for (level, refused) in [
            (Confidentiality::None, vec![]),
            (Confidentiality::Sev, vec![]),
            (Confidentiality::SevEs, vec![(C::ReadOnlySlots, None, 1, None)]),
            (Confidentiality::SevSnp, vec![(C::SnpMirror, None, 0, None), (C::ReadOnlySlots, None, 1, None)]),
        ] {
            let mut request = PlanRequest::new(&good, &h, &SEV, strategy, MAILBOX);
            (request.confidentiality, request.read_only_text) = (level, true);
            assert_eq!(plan(&request).map_or_else(|r| short(&r), |_| Vec::new()), refused);
        }
    }
    assert!(C::SnpMirror.sentence().contains("VMSA features"), "the kernel's reason is given");
    let send = Kind::PspCopied { via: PspVia::SendReceive };
    assert_eq!(ask_as(&good, &SEV, send, Confidentiality::Sev), []);
    assert_eq!(ask(&good, &SEV, send), [(C::SendReceiveUnencrypted, None, 0, None)]);
}

#[test]
fn private_ram_that_is_not_plugged() {
    let specs =
        [spec("ram0", 64 << 20, Some(0)), spec("hot0", 8 << 20, None), spec("hot1", 16 << 20, Some(GIB))];
    let whole = with_helper(&GuestLayout::assign(&specs).unwrap());
    let parts = vec![
        Plug { offset: 2 << 20, gpa: Gpa::new(GIB), len: 2 << 20 },
        Plug { offset: 8 << 20, gpa: Gpa::new(2 * GIB), len: 4 << 20 },
    ];
    let layout = whole.with_plugs("hot1", parts).unwrap();
    let at = |mib: u64, len: u64, block| (C::UnpluggedPrivate, Some(block), mib << 20, Some(len << 20));
    // One refusal a range: value and bound are its first byte in RAM and its length.
    let (a, b) = (64, 72);
    let ranges = [at(a, 8, 1), at(b, 2, 2), at(b + 4, 4, 2), at(b + 12, 4, 2)];
    assert_eq!(ask(&layout, &LIMITS, Kind::IdentityCbit), ranges);
    // The other strategies do not care.
    for strategy in [FOUR, Kind::PspCopied { via: PspVia::LaunchUpdate }] {
        assert_eq!(ask(&layout, &LIMITS, strategy), []);
    }
    // A range that the guest shares is the host's to move.
    let mut shared = PageSet::new();
    let mib = |from: u64, len: u64| PageRange::new(from << 20, len << 20).unwrap();
    shared.insert_range(mib(a, 8));
    shared.insert_range(mib(b + 4, 4));
    shared.insert_range(mib(b + 12, 4));
    shared.remove(RamAddr::new((b + 12) << 20).page());
    let h = image();
    let mut request = PlanRequest::new(&layout, &h, &LIMITS, Kind::IdentityCbit, MAILBOX);
    request.shared = Some(&shared);
    assert_eq!(short(&plan(&request).unwrap_err()), [ranges[1], ranges[3]]);
    let mut more = shared.clone();
    more.insert_range(mib(b, 16));
    request.shared = Some(&more);
    let planned = plan(&request).unwrap();
    let left: Vec<_> =
        planned.unreachable.iter().map(|u| (u.ram_addr.get() >> 20, u.len >> 20, u.code)).collect();
    let code = "unplugged_shared";
    assert_eq!(left, [(a, 8, code), (b, 2, code), (b + 4, 4, code), (b + 12, 4, code)]);
    assert!(planned.exposures.iter().any(|e| e.code == "unplugged_shared_ram_left_to_host"));
}

#[test]
fn what_identity_needs_of_the_guest_s_map() {
    let bare = guest(64 << 20);
    let size = HelperPlacement::block_size(&image(), &bare).unwrap();
    let hidden = bare.with_helper(size, false).unwrap();
    assert_eq!(ask(&hidden, &LIMITS, Kind::IdentityCbit), [(C::HelperUnplugged, Some(1), 0, None)]);
    // Half of it.
    let half =
        hidden.with_plugs(HELPER_BLOCK, vec![Plug { offset: 0, gpa: Gpa::new(GIB), len: PAGE_2M }]).unwrap();
    // The stacks of the configured workers are in the first 2 MiB, the maps are not: their first byte is
    // named.
    let maps = HelperPlacement::new(&image(), &bare, HelperSet::IdentityCbit).unwrap().maps_at;
    assert_eq!(ask(&half, &LIMITS, Kind::IdentityCbit), [(C::HelperUnplugged, None, maps, None)]);
    // The maps have bits for 16 GiB above the end of RAM.
    let high = |gpa: u64| with_helper(&GuestLayout::assign(&[spec("ram0", 64 << 20, Some(gpa))]).unwrap());
    assert_eq!(ask(&high(HEAD_ROOM), &LIMITS, Kind::IdentityCbit), []);
    let end = HEAD_ROOM + (64 << 20);
    let refused = ask(&high(HEAD_ROOM + PAGE_SIZE), &LIMITS, Kind::IdentityCbit);
    assert_eq!(refused, [(C::GpaAboveMaps, None, end + PAGE_SIZE, Some(end))]);
    // Tables in two pieces, cut where they lie.
    let p = HelperPlacement::new(&image(), &bare, HelperSet::IdentityCbit).unwrap();
    let cut = p.tables_at + 3 * PAGE_SIZE;
    let plugs = vec![
        Plug { offset: 0, gpa: Gpa::new(GIB), len: cut },
        Plug { offset: cut, gpa: Gpa::new(2 * GIB), len: size - cut },
    ];
    let torn = hidden.with_plugs(HELPER_BLOCK, plugs).unwrap();
    let refused = ask(&torn, &LIMITS, Kind::IdentityCbit);
    assert_eq!(refused, [(C::TablesNotContiguous, None, 3, Some(p.table_pages))]);
}

/// One block of `pages` in as many parts, each in another 2 MiB of the guest's map.
fn shreds(pages: u64, far: bool) -> GuestLayout {
    let step = if far { PAGE_2M } else { 2 * PAGE_SIZE };
    let plugs = (0..pages)
        .map(|p| Plug { offset: p * PAGE_SIZE, gpa: Gpa::new((pages - p) * step), len: PAGE_SIZE })
        .collect();
    let (name, size) = ("shreds".into(), pages * PAGE_SIZE);
    let block = RamBlock { name, ram_addr: RamAddr::new(0), size, role: BlockRole::Ram, plugs };
    with_helper(&GuestLayout::from_blocks(vec![block]).unwrap())
}

#[test]
fn parts_without_number() {
    // Room for 252 ranges in the page that the configuration of one block has.
    let p = HelperPlacement::new(&image(), &shreds(300, false), HelperSet::IdentityCbit).unwrap();
    assert_eq!(p.ranges_max(), 252);
    assert_eq!(ask(&shreds(252, false), &LIMITS, Kind::IdentityCbit), []);
    assert_eq!(
        ask(&shreds(253, false), &LIMITS, Kind::IdentityCbit),
        [(C::ConfigSpace, None, 253, Some(252))]
    );
    let room = p.table_pages;
    assert_eq!(
        ask(&shreds(room, true), &LIMITS, Kind::IdentityCbit),
        [(C::PageTableSpace, None, room, Some(room))]
    );
    // By RamAddr it is one range.
    assert_eq!(ask(&shreds(room, true), &LIMITS, FOUR), []);
}

#[test]
fn a_hundred_thousand_slots_are_refused_by_count() {
    let layout = shreds(100_000, false);
    let begun = std::time::Instant::now();
    for strategy in [FOUR, Kind::IdentityCbit] {
        let refused = ask(&layout, &LIMITS, strategy);
        let budget = refused.iter().find(|r| r.0 == C::SlotBudget).unwrap();
        assert_eq!((budget.2 / 1000, budget.3), (100, Some(32_764)));
    }
    let took = begun.elapsed();
    println!("refused in {took:?}");
    // Linear work takes milliseconds; pairwise comparison of them would take minutes.
    assert!(took < std::time::Duration::from_secs(5), "{took:?}");
}

#[test]
fn several_wrong_things_are_named_at_once() {
    let h = image();
    let (bare, limits) = (guest(64 << 20), HostLimits { max_phys_bits: 40, ..SEV });
    let strategy = Kind::Shifted { shift: Shift::Explicit { bytes: 4095 } };
    let mut request = PlanRequest::new(&bare, &h, &limits, strategy, MAILBOX);
    (request.confidentiality, request.read_only_text) = (Confidentiality::SevSnp, true);
    let refused = plan(&request).unwrap_err();
    let codes: Vec<_> = refused.iter().map(|r| r.code).collect();
    let all =
        [C::SnpMirror, C::ReadOnlySlots, C::NoHelper, C::ShiftUnaligned, C::ShiftTooLow, C::SlotOverlap];
    assert_eq!(codes, all);
    // 60 TiB do not fit 40 bits, whatever the strategy; every slot is named.
    let large =
        GuestLayout::assign(&[spec("a", 2 * TIB, Some(0)), spec("b", 2 * TIB, Some(2 * TIB))]).unwrap();
    let layout = with_helper(&large);
    let narrow = HostLimits { max_phys_bits: 40, ..LIMITS };
    let refused = ask(&layout, &narrow, Kind::IdentityCbit);
    assert_eq!(refused.iter().filter(|r| r.0 == C::AboveMaxPhys).count(), 4, "{refused:x?}");
}

#[test]
fn codes_are_spelled_one_way() {
    let mut seen = std::collections::HashSet::new();
    for code in C::ALL {
        assert!(seen.insert(code.as_str()), "{code:?} has the name of another");
        assert!(code.as_str().chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{code:?}");
        assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        assert_eq!(serde_json::from_value::<C>(code.as_str().into()).unwrap(), *code);
        let sentence = code.sentence();
        assert!(sentence.len() > 15 && !sentence.ends_with('.'), "{code:?}");
    }
}
