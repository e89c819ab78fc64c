//! Room for page digests: behind everything else in the helper's block, where the block was made for it.

use mirrorvm::addr::{HelperVa, PAGE_2M, PAGE_SIZE};
use mirrorvm::address_space::{
    Access, Confidentiality, FOUR_GIB, GuestLayout, HelperPlacement, HostLimits, MirrorPlan, PlanRequest,
    Plug, PspVia, Purpose, Shift, Strategy as Kind, plan, reference_declaration, walk,
};
use mirrorvm_abi::config::{Config, FIXED_BYTES};
use mirrorvm_abi::layout as abi;

use crate::by_name::{LIMITS, MAILBOX, SEV, image};
use crate::generate::spec;
use crate::{GIB, TIB};

const STRATEGIES: [Kind; 5] = [
    Kind::Shifted { shift: Shift::FourGib },
    Kind::Shifted { shift: Shift::MaxPhys },
    Kind::IdentityCbit,
    Kind::Declared,
    Kind::PspCopied { via: PspVia::LaunchUpdate },
];

fn planned(layout: &GuestLayout, limits: &HostLimits, strategy: Kind, level: Confidentiality) -> MirrorPlan {
    let h = image();
    let declaration = reference_declaration(layout, &h, limits).unwrap();
    let mut request = PlanRequest::new(layout, &h, limits, strategy, MAILBOX);
    request.declaration = Some(&declaration);
    request.confidentiality = level;
    plan(&request).unwrap_or_else(|r| panic!("{strategy:?}: {r:?}"))
}

fn config_of(plan: &MirrorPlan) -> Config {
    let contents = plan.set_contents(0, 0);
    Config::decode(contents[0].1[..FIXED_BYTES].try_into().unwrap()).unwrap()
}

fn bare(bytes: u64) -> GuestLayout {
    GuestLayout::assign(&[spec("low", GIB, Some(0)), spec("high", bytes - GIB, Some(FOUR_GIB))]).unwrap()
}

#[test]
fn of_a_helper_s_block_nobody_touches_the_room_for_digests_of_what_is_no_ram() {
    let h = image();
    for bytes in [PAGE_2M, GIB / 8, GIB, 100 * GIB, TIB, 3 * TIB, 60 * TIB] {
        let bare = GuestLayout::assign(&[spec("ram0", bytes, None)]).unwrap();
        let without = HelperPlacement::block_size(&h, &bare).unwrap();
        assert_eq!(HelperPlacement::unused(&bare), 0);
        assert_eq!(HelperPlacement::unused(&bare.with_helper(without, false).unwrap()), 0, "{bytes:#x}");
        let with = HelperPlacement::block_size_with_digests(&h, &bare).unwrap();
        let touched = with - HelperPlacement::unused(&bare.with_helper(with, false).unwrap());
        if with == without {
            assert!(bytes > 4 * TIB, "{bytes:#x}");
            assert_eq!(touched, with);
            continue;
        }
        // All of it but that room, and a little more.
        let least = without + bytes / PAGE_SIZE * abi::DIGEST_BYTES;
        assert!((least..=least + 2 * PAGE_2M).contains(&touched), "{bytes:#x}: {least:#x} {touched:#x}");
        assert!(with - touched > 48 << 20);
    }
}

#[test]
fn every_strategy_maps_digests_of_all_pages_where_the_block_has_room() {
    let large = HostLimits { max_phys_bits: 52, ..LIMITS };
    for (bytes, limits, level) in [
        (2 * GIB, LIMITS, Confidentiality::None),
        (2 * GIB, SEV, Confidentiality::Sev),
        (TIB, large, Confidentiality::None),
        (3 * TIB, large, Confidentiality::None),
    ] {
        let bare = bare(bytes);
        let size = HelperPlacement::block_size_with_digests(&image(), &bare).unwrap();
        let plain = HelperPlacement::block_size(&image(), &bare).unwrap();
        // 16 bytes a page, and what rounding takes.
        let pages = (bare.guest_end().get() + (16 << 30)) / PAGE_SIZE;
        assert!((plain + pages * 16..plain + pages * 16 + 2 * PAGE_2M).contains(&size));
        let layout = bare.with_helper(size, true).unwrap();
        for strategy in STRATEGIES {
            let plan = planned(&layout, &limits, strategy, level);
            assert!(plan.has_digests(), "{strategy:?}");
            let config = config_of(&plan);
            assert_eq!(config.digests, config.pages);
            let found: Vec<_> =
                plan.mappings.iter().filter(|(p, _)| *p == Purpose::HelperDigests).map(|(_, m)| m).collect();
            let p = &plan.placement;
            assert!(config.digests * abi::DIGEST_BYTES <= p.digests_len);
            assert!(p.block_len() <= p.digests_at && p.digests_at + p.digests_len <= size);
            let [m] = found[..] else { panic!("{strategy:?}: {found:?}") };
            assert_eq!((m.va.get(), m.len, m.access), (abi::DIGESTS_VA, p.digests_len, Access::ReadWrite));
            assert_eq!(m.encrypted, level != Confidentiality::None, "as private as the helper's keys");
            // Nothing else lies there, in the helper's space or in the mirror's.
            for (purpose, other) in plan.mappings.iter().filter(|(p, _)| *p != Purpose::HelperDigests) {
                let apart = |a: u64, b: u64| a + m.len <= b || b + other.len <= a;
                assert!(apart(m.va.get(), other.va.get()), "{strategy:?}: {purpose:?}");
                assert!(apart(m.gpa.get(), other.gpa.get()), "{strategy:?}: {purpose:?}");
            }
            let c_bit = if level == Confidentiality::None { 0 } else { limits.c_bit_mask() };
            for offset in [0, PAGE_SIZE, (m.len / 2) & !(PAGE_SIZE - 1), m.len - PAGE_SIZE] {
                let at = walk(
                    HelperVa::new(m.va.get() + offset),
                    plan.tables.root(),
                    c_bit,
                    limits.phys_limit(),
                    |at| plan.tables.entry_at(at),
                )
                .unwrap();
                assert_eq!(Some(at.gpa), plan.helper_at(p.digests_at + offset));
            }
        }
    }
}

#[test]
fn a_block_of_the_plain_size_has_none_and_a_page_less_is_none() {
    let bare = bare(2 * GIB);
    let with = HelperPlacement::block_size_with_digests(&image(), &bare).unwrap();
    let without = HelperPlacement::block_size(&image(), &bare).unwrap();
    for (size, scans) in [(without, false), (with - PAGE_SIZE, false), (with, true), (with + PAGE_2M, true)] {
        let layout = bare.with_helper(size, true).unwrap();
        let plan = planned(&layout, &LIMITS, STRATEGIES[0], Confidentiality::None);
        assert_eq!(plan.has_digests(), scans, "{size:#x}");
        // The rest of the block is the same, with and without.
        let fresh =
            HelperPlacement::new(&image(), &bare, mirrorvm::address_space::HelperSet::Shifted).unwrap();
        let p = &plan.placement;
        assert_eq!(
            (p.secret_at, p.maps_at, p.config_at, p.tables_at, p.table_pages, p.block_len()),
            (
                fresh.secret_at,
                fresh.maps_at,
                fresh.config_at,
                fresh.tables_at,
                fresh.table_pages,
                fresh.block_len()
            )
        );
    }
}

#[test]
fn a_guest_too_large_for_digests_is_planned_without() {
    let bare = bare(8 * TIB);
    let size = HelperPlacement::block_size_with_digests(&image(), &bare).unwrap();
    assert_eq!(Some(size), HelperPlacement::block_size(&image(), &bare));
    let layout = bare.with_helper(size, true).unwrap();
    let large = HostLimits { max_phys_bits: 52, ..LIMITS };
    assert!(!planned(&layout, &large, STRATEGIES[0], Confidentiality::None).has_digests());
}

#[test]
fn digests_that_are_not_in_the_mirror_in_full_are_done_without() {
    // The guest sees the helper's block but for the last page of its digests.
    let bare = bare(2 * GIB);
    let size = HelperPlacement::block_size_with_digests(&image(), &bare).unwrap();
    let layout = bare.with_helper(size, true).unwrap();
    let gpa = layout.helper().unwrap().gpa().unwrap();
    let plug = Plug { offset: 0, gpa, len: size - PAGE_2M };
    let cut = layout.with_plugs(mirrorvm::address_space::HELPER_BLOCK, vec![plug]).unwrap();
    assert!(planned(&layout, &LIMITS, Kind::IdentityCbit, Confidentiality::None).has_digests());
    assert!(!planned(&cut, &LIMITS, Kind::IdentityCbit, Confidentiality::None).has_digests());
}
