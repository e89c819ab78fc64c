//! How large a helper's block is: large enough for every strategy, wherever RAM is plugged, and the same for
//! everybody who asks.

use mirrorvm::addr::{Gpa, PAGE_2M, PAGE_SIZE};
use mirrorvm::address_space::{
    Confidentiality, GuestLayout, HelperPlacement, HelperSet, HostLimits, PlanRequest, Plug, PspVia, Shift,
    Strategy as Kind, plan, reference_declaration,
};
use proptest::prelude::*;

use crate::by_name::{LIMITS, MAILBOX};
use crate::generate::{blocks_of, header, places, sizes, spec};
use crate::{GIB, TIB};

const FOUR_GIB: u64 = mirrorvm::address_space::FOUR_GIB;

/// Every strategy over `layout`; panics with the refusals.
fn all_plan(layout: &GuestLayout, limits: &HostLimits) -> Vec<u64> {
    let h = header(8, 2, 1, 4);
    let declaration = reference_declaration(layout, &h, limits).unwrap();
    let strategies = [
        Kind::Shifted { shift: Shift::FourGib },
        Kind::Shifted { shift: Shift::MaxPhys },
        Kind::Shifted { shift: Shift::Explicit { bytes: FOUR_GIB + PAGE_2M } },
        Kind::IdentityCbit,
        Kind::Declared,
        Kind::PspCopied { via: PspVia::LaunchUpdate },
    ];
    let one = |strategy: Kind| {
        let mut request = PlanRequest::new(layout, &h, limits, strategy, MAILBOX);
        request.declaration = Some(&declaration);
        let plan = plan(&request).unwrap_or_else(|r| panic!("{strategy:?}: {r:?}"));
        let pages = plan.tables.page_count() as u64;
        assert!(pages <= plan.placement.table_pages);
        pages
    };
    strategies.into_iter().map(one).collect()
}

#[test]
fn large_guests_get_a_helper_block_that_is_large_enough() {
    let limits = |gib_pages| HostLimits { max_phys_bits: 52, gib_pages, ..LIMITS };
    let h = header(8, 2, 1, 4);
    for (bytes, gib_pages) in
        [(TIB, true), (TIB, false), (4 * TIB, false), (16 * TIB, true), (60 * TIB, true)]
    {
        let bare =
            GuestLayout::assign(&[spec("low", GIB, Some(0)), spec("high", bytes - GIB, Some(FOUR_GIB))])
                .unwrap();
        let size = HelperPlacement::block_size(&h, &bare).unwrap();
        let layout = bare.with_helper(size, true).unwrap();
        let pages = all_plan(&layout, &limits(gib_pages));
        println!(
            "{} TiB, gib_pages {gib_pages}: {pages:?} table pages, helper block {} MiB",
            bytes / TIB,
            size >> 20
        );
        if bytes == TIB && gib_pages {
            assert!(
                pages.iter().enumerate().all(|(i, p)| *p < 64 || i == 2),
                "1 TiB costs {pages:?} table pages"
            );
        }
    }
}

#[test]
fn a_helper_block_is_never_sized_by_luck() {
    // Sizes are rounded up to 2 MiB, which can hide tables that were not counted: but each set has its own
    // room, which is not rounded.
    let limits = HostLimits { max_phys_bits: 52, ..LIMITS };
    for pages in [1, 511, 512, 513, 262_143, 262_144, 262_145, 300_000] {
        for blocks in [1u64, 2, 5] {
            let specs: Vec<_> = (0..blocks)
                .map(|b| {
                    spec(&format!("b{b}"), pages * PAGE_SIZE, Some(FOUR_GIB + b * 3 * GIB + b * PAGE_SIZE))
                })
                .collect();
            let bare = GuestLayout::assign(&specs).unwrap();
            let size = HelperPlacement::block_size(&header(8, 2, 1, 4), &bare).unwrap();
            let gaps = blocks * 3 * GIB;
            if gaps + pages * PAGE_SIZE < bare.guest_end().get() + FOUR_GIB {
                all_plan(&bare.with_helper(size, true).unwrap(), &limits);
            }
        }
    }
}

#[test]
fn ten_thousand_blocks_have_room_in_every_set() {
    // Odd sizes at odd places: what needs most tables.
    let specs: Vec<_> = (0..10_000u64)
        .map(|b| spec(&format!("b{b}"), 300 * PAGE_SIZE, Some(FOUR_GIB + b * 301 * PAGE_SIZE)))
        .collect();
    let bare = GuestLayout::assign(&specs).unwrap();
    let size = HelperPlacement::block_size(&header(8, 2, 1, 4), &bare).unwrap();
    let pages = all_plan(&bare.with_helper(size, true).unwrap(), &LIMITS);
    println!("{pages:?} table pages, helper block {} MiB", size >> 20);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_placement_depends_on_blocks_alone(
        blocks in prop::collection::vec((sizes(), 0u64..3, places()), 1..7), vcpus in 0u32..20, plugged: bool,
    ) {
        let h = header(8, 2, 1, 4);
        let mut bare = GuestLayout::from_blocks(blocks_of(&blocks)).unwrap();
        if vcpus > 0 {
            bare = bare.with_save_areas(vcpus).unwrap();
        }
        let size = HelperPlacement::block_size(&h, &bare).unwrap();
        prop_assert_eq!(size % PAGE_2M, 0);
        let with = bare.with_helper(size, plugged).unwrap();
        prop_assert_eq!(HelperPlacement::block_size(&h, &with), Some(size));
        // Everything unplugged, and the first block plugged page by page.
        let mut other = with.clone();
        for b in with.blocks() {
            other = other.with_plugs(&b.name, Vec::new()).unwrap();
        }
        let first = &with.blocks()[0];
        let pages = (first.size / PAGE_SIZE).min(8);
        let part = |p: u64| Plug { offset: p * PAGE_SIZE, gpa: Gpa::new(p * 2 * PAGE_SIZE), len: PAGE_SIZE };
        other = other.with_plugs(&first.name, (0..pages).map(part).collect()).unwrap();
        for set in HelperSet::ALL {
            let placement = HelperPlacement::new(&h, &with, set);
            prop_assert_eq!(placement, HelperPlacement::new(&h, &bare, set));
            prop_assert_eq!(placement, HelperPlacement::new(&h, &other, set));
        }
    }
}

/// On SEV the guest is measured once: what is written for one strategy must not lie where another one's is.
#[test]
fn sets_do_not_share_a_page() {
    let h = header(8, 2, 1, 4);
    let limits = HostLimits { max_phys_bits: 48, c_bit: Some(51), ..LIMITS };
    let bare =
        GuestLayout::assign(&[spec("ram0", 3 * GIB, Some(0)), spec("ram1", GIB, Some(FOUR_GIB))]).unwrap();
    let layout = bare.with_helper(HelperPlacement::block_size(&h, &bare).unwrap(), true).unwrap();
    let declaration = reference_declaration(&layout, &h, &limits).unwrap();
    let mut spans = Vec::new();
    for strategy in [
        Kind::Shifted { shift: Shift::FourGib },
        Kind::Shifted { shift: Shift::MaxPhys },
        Kind::IdentityCbit,
        Kind::Declared,
        Kind::PspCopied { via: PspVia::SendReceive },
    ] {
        let mut request = PlanRequest::new(&layout, &h, &limits, strategy, MAILBOX);
        request.declaration = Some(&declaration);
        request.confidentiality = Confidentiality::SevEs;
        let plan = plan(&request).unwrap();
        spans.extend(plan.set_contents(0, 0).into_iter().map(|(at, bytes)| (at, at + bytes.len() as u64)));
        assert!(plan.placement.maps_at + plan.placement.maps_len <= plan.placement.config_at);
    }
    assert!(spans.is_sorted() && spans.windows(2).all(|p| p[0].1 <= p[1].0), "{spans:x?}");
    assert!(spans.last().unwrap().1 <= layout.helper().unwrap().size);
}
