//! Layouts: what they refuse by name, that addresses round-trip, where a helper's block goes.

use mirrorvm::addr::{Gpa, PAGE_2M, PAGE_SIZE, RamAddr};
use mirrorvm::address_space::{
    BlockRole, BlockSpec, FOUR_GIB, GuestLayout, HelperPlacement, LayoutError, Plug, RamBlock,
};
use proptest::prelude::*;

use crate::accepted::sample;
use crate::generate::{blocks_of, header, places, sizes, spec};
use crate::{GIB, TIB};

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
    let layout = guest_with_helper();
    let errors = layout.with_helper(PAGE_2M, false).unwrap_err();
    assert!(matches!(errors[..], [E::DuplicateName { .. }]), "{errors:?}");
}

fn guest_with_helper() -> GuestLayout {
    let bare = GuestLayout::assign(&[spec("ram0", 64 << 20, Some(0))]).unwrap();
    let size = HelperPlacement::block_size(&header(8, 2, 1, 4), &bare).unwrap();
    bare.with_helper(size, true).unwrap()
}

#[test]
fn parts_are_found_by_address() {
    let specs =
        [spec("a", 4 * PAGE_SIZE, Some(GIB)), spec("b", 2 * PAGE_SIZE, Some(0)), spec("c", PAGE_SIZE, None)];
    let layout = GuestLayout::assign(&specs).unwrap();
    let names = |gpa: u64, len: u64| {
        layout.plugged_in(Gpa::new(gpa), len).map(|(b, _)| b.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(0, u64::MAX), ["b", "a"]);
    assert_eq!(names(2 * PAGE_SIZE, GIB - 2 * PAGE_SIZE), Vec::<String>::new());
    assert_eq!(names(2 * PAGE_SIZE - 1, 1), ["b"]);
    assert_eq!(names(GIB + 3 * PAGE_SIZE, u64::MAX), ["a"]);
    assert_eq!(layout.block_at(RamAddr::new(PAGE_2M)).map(|b| b.name.as_str()), Some("b"));
    assert_eq!(layout.block_at(RamAddr::new(4 * PAGE_SIZE)), None);
}
