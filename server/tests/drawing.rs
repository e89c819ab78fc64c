//! The drawing of a mirror's address space, from real plans. Leaves the files in the target directory to look
//! at.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{
    BlockSpec, Confidentiality, GuestLayout, HelperPlacement, HostLimits, MailboxSize, PlanRequest, PspVia,
    Shift, Strategy, plan, reference_declaration,
};
use mirrorvm::pages::PageSet;
use mirrorvm_abi::header::Header;
use mirrorvm_abi::layout::{IMAGE_VA, LAYOUT_HASH};
use mirrorvmd::api::layout::AddressSpacePlan;
use mirrorvmd::draw;

const LIMITS: HostLimits = HostLimits {
    max_phys_bits: 48,
    c_bit: Some(51),
    phys_bit_reduction: 1,
    slot_budget: 32_764,
    gib_pages: true,
};

fn header() -> Header {
    Header {
        abi_min: 1,
        abi_max: 1,
        layout_hash: LAYOUT_HASH,
        base: IMAGE_VA,
        entry: IMAGE_VA + 96,
        text_end: IMAGE_VA + 0x4000,
        rodata_end: IMAGE_VA + 0x5000,
        data_end: IMAGE_VA + 0x6000,
        bss_end: IMAGE_VA + 0x7000,
        suites: mirrorvm_abi::record::Suite::Aes256Gcm.bit(),
    }
}

type Block<'a> = (&'a str, u64, Option<u64>);

/// A guest as SEV-ES has them: save areas, a helper; its unplugged RAM is shared.
fn layout(blocks: &[Block<'_>]) -> (GuestLayout, PageSet) {
    let specs: Vec<BlockSpec> = blocks
        .iter()
        .map(|(name, size_bytes, gpa)| BlockSpec {
            name: (*name).to_owned(),
            size_bytes: *size_bytes,
            gpa: gpa.map(Gpa::new),
        })
        .collect();
    let bare = GuestLayout::assign(&specs).unwrap().with_save_areas(4).unwrap();
    let mut shared = PageSet::new();
    bare.blocks().iter().filter(|b| b.plugs.is_empty()).for_each(|b| shared.insert_range(b.ram_range()));
    let layout = bare.with_helper(HelperPlacement::block_size(&header(), &bare).unwrap(), true).unwrap();
    (layout, shared)
}

fn drawn(blocks: &[Block<'_>], strategy: Strategy, level: Confidentiality) -> (String, AddressSpacePlan) {
    let (layout, shared) = layout(blocks);
    let declaration = reference_declaration(&layout, &header(), &LIMITS);
    let header = header();
    let size = MailboxSize { workers: 2, slots: 4 };
    let plan = plan(&PlanRequest {
        declaration: declaration.as_ref(),
        shared: Some(&shared),
        confidentiality: level,
        read_only_text: level == Confidentiality::Sev,
        ..PlanRequest::new(&layout, &header, &LIMITS, strategy, size)
    })
    .unwrap();
    (draw::layout(&plan, &layout, "g<1>"), AddressSpacePlan::new(&plan, &layout))
}

/// A guest as it is: a hole below 4 GiB, RAM above, a block to plug later.
const PC: &[Block<'_>] =
    &[("ram0", 3 << 30, Some(0)), ("ram1", 1 << 30, Some(4 << 30)), ("hotplug0", 2 << 30, None)];

const ALL: [(&str, Strategy); 5] = [
    ("4gib", Strategy::Shifted { shift: Shift::FourGib }),
    ("max-phys", Strategy::Shifted { shift: Shift::MaxPhys }),
    ("identity-cbit", Strategy::IdentityCbit),
    ("declared", Strategy::Declared),
    ("psp-copied", Strategy::PspCopied { via: PspVia::LaunchUpdate }),
];

#[test]
fn every_slot_and_block_is_in_the_drawing() {
    for (name, strategy) in ALL {
        for level in [Confidentiality::None, Confidentiality::Sev, Confidentiality::SevEs] {
            let (svg, plan) = drawn(PC, strategy, level);
            let file = format!("{}/layout-{name}-{}.svg", env!("CARGO_TARGET_TMPDIR"), level.name());
            std::fs::write(file, &svg).unwrap();
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("g&lt;1&gt;"));
            for slot in &plan.slots {
                assert!(svg.contains(&format!("{:#x} +", slot.mirror_gpa)), "{slot:?}");
            }
            // A band for each plugged part (two and the helper's), each slot of RAM and each mapping.
            let ram_slots = plan.slots.iter().filter(|s| s.backing == "ram").count();
            assert_eq!(svg.matches("<path").count(), 3 + ram_slots + plan.mappings.len(), "{name}");
            for mapping in plan.mappings.iter().filter(|m| m.purpose != "helper_stack") {
                assert!(svg.contains(&format!("{:#x} +", mapping.helper_va)), "{name}: {mapping:?}");
            }
            for exposure in &plan.exposures {
                assert!(svg.contains(exposure.code), "{name}: {exposure:?}");
            }
            assert!(svg.contains("hotplug0 (unplugged)") && svg.contains("mailbox"));
            assert!(!svg.contains("http") || svg.matches("http").count() == 1, "nothing but the namespace");
            // The legend has what occurs: a class of a piece is explained, and nothing else is.
            for (class, words) in [
                ("low", "one to one"),
                ("private", "the mirror's alone"),
                ("code", "the helper's code"),
                ("out", "out of the helper's reach"),
                ("off", "does not see now"),
                ("vmsa", "save areas"),
            ] {
                let drawn = svg.matches(&format!("class=\"p {class}\"")).count();
                assert_eq!(drawn > 0, svg.contains(words), "{name}: {class}");
                assert_ne!(drawn, 1, "{name}: {class} is in the legend alone");
            }
        }
    }
}

/// How high the drawing is, in pixels.
fn height(svg: &str) -> f64 {
    let (_, after) = svg.split_once(" height=\"").unwrap();
    after.split_once('"').unwrap().0.parse().unwrap()
}

#[test]
fn forty_blocks_fit_on_a_page() {
    let names: Vec<String> = (0..40).map(|i| format!("dimm{i}")).collect();
    let blocks: Vec<Block<'_>> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), 64 << 20, Some((4 << 30) + i as u64 * (256 << 20))))
        .collect();
    for (name, strategy) in ALL {
        let (svg, _) = drawn(&blocks, strategy, Confidentiality::Sev);
        std::fs::write(format!("{}/layout-{name}-forty.svg", env!("CARGO_TARGET_TMPDIR")), &svg).unwrap();
        assert!(height(&svg) < 1500.0, "{name}: {} px", height(&svg));
        assert!(svg.contains("37 pieces"), "{name}");
    }
}

#[test]
fn what_the_helper_may_do_is_said_of_every_mapping() {
    let access = |svg: &str, what: &str| svg.matches(&format!("text-anchor=\"end\">{what}</text>")).count();
    for (_, strategy) in ALL {
        let (svg, plan) = drawn(PC, strategy, Confidentiality::SevEs);
        assert!(access(&svg, "RX C") == 1 && access(&svg, "RW C") > 1 && access(&svg, "R C") > 0);
        // The mailbox alone is shared with the host.
        assert_eq!(access(&svg, "RW -"), plan.mappings.iter().filter(|m| !m.encrypted).count());
        let (svg, _) = drawn(PC, strategy, Confidentiality::None);
        assert!(access(&svg, "RX") == 1 && access(&svg, "RX C") == 0 && svg.contains("no page has a C-bit"));
    }
}

#[test]
fn nothing_reaches_over_the_edge() {
    // Pixels of a character, wide enough for any of the fonts.
    let each = |text: &str| match text.split_once("class=\"").and_then(|(_, c)| c.split_once('"')) {
        Some(("h", _)) => 10.0,
        Some(("s", _)) => 6.9,
        _ => 7.4,
    };
    for (name, strategy) in ALL {
        for level in [Confidentiality::None, Confidentiality::Sev, Confidentiality::SevEs] {
            let (svg, _) = drawn(PC, strategy, level);
            for text in svg.split("<text ").skip(1) {
                let x: f64 = text.split_once("x=\"").unwrap().1.split_once('"').unwrap().0.parse().unwrap();
                let y: f64 = text.split_once(" y=\"").unwrap().1.split_once('"').unwrap().0.parse().unwrap();
                let words = text.split_once('>').unwrap().1.split_once('<').unwrap().0;
                let wide = words.chars().count() as f64 * each(text);
                let right = if text.contains("text-anchor") { x } else { x + wide };
                assert!(right <= 1710.0 - 8.0, "{name}: {words:?} ends at {right}");
                assert!(y <= height(&svg) - 8.0, "{name}: {words:?} lies at {y} of {}", height(&svg));
            }
        }
    }
}

#[test]
fn what_sets_a_strategy_apart_is_seen() {
    let svg = |strategy| drawn(PC, strategy, Confidentiality::SevEs).0;
    let [shifted, _, identity, declared, psp] = ALL.map(|(_, strategy)| svg(strategy));
    assert!(shifted.contains("low: ram0") && shifted.contains("window: hotplug0"));
    assert!(identity.contains("plain alias") && identity.contains("C-bit on every private page"));
    assert!(identity.contains("out of the helper") && !shifted.contains("out of the helper"));
    assert!(declared.contains("declared: maps") && declared.contains("declared: config, tables"));
    assert!(declared.contains("6 pieces"));
    assert!(psp.contains("private: the helper") && psp.contains("mirrorvm.helper (unused)"));
    let code = drawn(PC, Strategy::Declared, Confidentiality::Sev).0;
    assert!(code.contains("declared: code, read only"));
}

#[test]
fn ten_thousand_blocks_make_a_drawing_that_can_be_looked_at() {
    let names: Vec<String> = (0..10_000).map(|i| format!("b{i}")).collect();
    let blocks: Vec<Block<'_>> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), 0x20_1000, Some((4 << 30) + i as u64 * 0x40_0000)))
        .collect();
    for (name, strategy) in ALL.into_iter().filter(|(name, _)| *name != "identity-cbit") {
        let (svg, plan) = drawn(&blocks, strategy, Confidentiality::None);
        std::fs::write(format!("{}/layout-{name}-blocks.svg", env!("CARGO_TARGET_TMPDIR")), &svg).unwrap();
        assert!(plan.slots.len() > 10_000);
        assert!(svg.len() < 64 << 10, "{name}: {} bytes", svg.len());
        assert!(svg.contains("9997 pieces"));
        assert!(height(&svg) < 1500.0, "{name}: {} px", height(&svg));
    }
}

#[test]
fn numbers_of_a_plan_name_their_blocks() {
    let blocks: &[Block<'_>] = &[("ram0", 256 << 20, Some(0))];
    let shifted = ALL[0].1;
    let (_, plan) = drawn(blocks, shifted, Confidentiality::None);
    let window = plan.slots.iter().find(|s| s.purpose == "ram_window").unwrap();
    assert_eq!(
        (window.mirror_gpa, window.ram_addr, window.block.as_deref()),
        (4 << 30, Some(0), Some("ram0"))
    );
    let text = plan.mappings.iter().find(|m| m.purpose == "helper_text").unwrap();
    assert_eq!((text.access, text.block.as_deref()), ("read_execute", Some("mirrorvm.helper")));
    assert_eq!(plan.mappings.iter().find(|m| m.purpose == "mailbox").unwrap().block, None);
    assert_eq!(plan.page_tables.bytes, plan.page_tables.pages * 4096);
    assert_eq!((plan.addressing, plan.coverage.window_bytes), ("ram_addr", (256 << 20) + 4 * 4096));
    assert!(plan.slots.iter().all(|s| !s.read_only && s.private_offset_bytes.is_none()));
    assert_eq!(plan.helper.pieces.len(), 1);

    let (_, plan) = drawn(blocks, Strategy::IdentityCbit, Confidentiality::Sev);
    assert_eq!((plan.addressing, plan.shift_bytes), ("gpa", 0));
    assert!(plan.mappings.iter().any(|m| m.purpose == "plain_alias" && !m.encrypted));
    // The save areas are in RAM right behind the block, and for the helper at an address of their own.
    let vmsa = plan.allowed.iter().find(|a| a.ram_addr == 256 << 20).unwrap();
    assert_eq!(vmsa.helper_addr, vmsa.mirror_gpa);
    assert!(vmsa.helper_addr > 256 << 20 && vmsa.size_bytes == 4 * 4096);
    assert_eq!(plan.slots.iter().filter(|s| s.read_only).map(|s| s.size_bytes).sum::<u64>(), 0x4000);

    let (_, plan) = drawn(blocks, Strategy::PspCopied { via: PspVia::LaunchUpdate }, Confidentiality::Sev);
    let private: Vec<_> = plan.slots.iter().filter_map(|s| s.private_offset_bytes).collect();
    assert_eq!(private, [0, 0x4000]);
    let text = plan.mappings.iter().find(|m| m.purpose == "helper_text").unwrap();
    assert_eq!((text.block.as_deref(), text.encrypted), (None, true));

    let (_, plan) = drawn(blocks, Strategy::Declared, Confidentiality::SevEs);
    assert_eq!((plan.helper.pieces.len(), plan.helper.mirror_gpa), (6, plan.helper.pieces[0].mirror_gpa));
}
