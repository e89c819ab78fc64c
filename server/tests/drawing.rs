//! The drawing of a mirror's address space, from real plans. Leaves the files in the target directory to look at.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{
    BlockSpec, GuestLayout, HelperPlacement, HostLimits, MailboxSize, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm_abi::header::Header;
use mirrorvm_abi::layout::{IMAGE_VA, LAYOUT_HASH};
use mirrorvmd::api::layout::AddressSpacePlan;
use mirrorvmd::draw;

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
    }
}

fn drawn(blocks: &[(&str, u64, Option<u64>)], shift: Shift) -> (String, AddressSpacePlan) {
    let specs: Vec<BlockSpec> = blocks
        .iter()
        .map(|(name, size_bytes, gpa)| BlockSpec {
            name: (*name).to_owned(),
            size_bytes: *size_bytes,
            gpa: gpa.map(Gpa::new),
        })
        .collect();
    let layout = GuestLayout::assign(&specs).unwrap();
    let layout = layout.with_helper(HelperPlacement::block_size(&header(), &layout).unwrap(), true).unwrap();
    let limits = HostLimits {
        max_phys_bits: 48,
        c_bit: None,
        phys_bit_reduction: 0,
        slot_budget: 32_764,
        gib_pages: true,
    };
    let size = MailboxSize { workers: 2, slots: 4 };
    let strategy = Strategy::Shifted { shift };
    let plan = plan(&PlanRequest::new(&layout, &header(), &limits, strategy, size)).unwrap();
    (draw::layout(&plan, &layout, "g<1>"), AddressSpacePlan::new(&plan, &layout))
}

#[test]
fn every_slot_and_block_is_in_the_drawing() {
    let blocks: &[(&str, u64, Option<u64>)] =
        &[("ram0", 3 << 30, Some(0)), ("ram1", 1 << 30, Some(4 << 30)), ("hotplug0", 2 << 30, None)];
    for (name, shift) in [("4gib", Shift::FourGib), ("max-phys", Shift::MaxPhys)] {
        let (svg, plan) = drawn(blocks, shift);
        std::fs::write(format!("{}/layout-{name}.svg", env!("CARGO_TARGET_TMPDIR")), &svg).unwrap();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("g&lt;1&gt;"));
        for slot in &plan.slots {
            assert!(svg.contains(&format!("{:#x} +", slot.mirror_gpa)), "{slot:?}");
        }
        // A band for each plugged block (three of four) and each slot of RAM.
        let ram_slots = plan.slots.iter().filter(|s| s.backing == "ram").count();
        assert_eq!(svg.matches("<path").count(), 3 + ram_slots);
        assert!(svg.contains("hotplug0 (unplugged)") && svg.contains("mailbox"));
        assert!(!svg.contains("http") || svg.matches("http").count() == 1, "nothing but the namespace");
    }
}

#[test]
fn numbers_of_a_plan_name_their_blocks() {
    let (_, plan) = drawn(&[("ram0", 256 << 20, Some(0))], Shift::FourGib);
    let window = plan.slots.iter().find(|s| s.purpose == "ram_window").unwrap();
    assert_eq!(
        (window.mirror_gpa, window.ram_addr, window.block.as_deref()),
        (4 << 30, Some(0), Some("ram0"))
    );
    let text = plan.mappings.iter().find(|m| m.purpose == "helper_text").unwrap();
    assert_eq!((text.access, text.block.as_deref()), ("read_execute", Some("mirrorvm.helper")));
    assert_eq!(plan.mappings.iter().find(|m| m.purpose == "mailbox").unwrap().block, None);
    assert_eq!(plan.page_tables.bytes, plan.page_tables.pages * 4096);
}
