//! The `shifted` strategy: the bottom 4 GiB of guest-physical space one to one, every RAM block again at
//! `RamAddr + shift`. The helper is addressed by `RamAddr`, so RAM that is unplugged at the moment can move.
//! (Paolo Bonzini, 17 Aug 2021, in the mirror VM thread.)

use mirrorvm_abi::{header::Header, layout as abi};

use super::plan::Draft;
use super::{
    Exposure, FOUR_GIB, GuestLayout, HelperPlacement, HostLimits, MailboxSize, MirrorPlan, MirrorSlot,
    Purpose, RamBlock, Refusal, RefusalCode, Shift, SlotBacking, Strategy,
};
use crate::addr::{MirrorGpa, PAGE_2M, align_up};

pub(super) fn plan(
    layout: &GuestLayout,
    helper: &Header,
    limits: &HostLimits,
    shift: Shift,
    mailbox: MailboxSize,
) -> Result<MirrorPlan, Vec<Refusal>> {
    let strategy = Strategy::Shifted { shift };
    let bytes = match shift {
        Shift::FourGib => FOUR_GIB,
        Shift::MaxPhys => limits.max_phys_shift(),
        Shift::Explicit { bytes } => bytes,
    };
    let mut refusals = Vec::new();
    if helper.layout_hash != abi::LAYOUT_HASH || helper.base != abi::IMAGE_VA {
        let refusal = Refusal::new(RefusalCode::HelperLayoutMismatch, "layout hash", helper.layout_hash);
        refusals.push(refusal.bound(abi::LAYOUT_HASH));
    }
    if bytes % PAGE_2M != 0 {
        refusals.push(Refusal::new(RefusalCode::ShiftUnaligned, "shift", bytes).bound(PAGE_2M));
    }
    if bytes < FOUR_GIB {
        refusals.push(Refusal::new(RefusalCode::ShiftTooLow, "shift", bytes).bound(FOUR_GIB));
    }
    let top = layout.ram_end().get().checked_add(bytes).and_then(|t| align_up(t, PAGE_2M));
    if top.is_none_or(|t| t.checked_add(mailbox.bytes()).is_none()) {
        refusals.push(Refusal::new(RefusalCode::Wraps, "shift", bytes));
    }
    let block = layout.helper();
    if block.is_none() {
        refusals.push(Refusal::new(RefusalCode::NoHelper, "blocks", layout.blocks().len() as u64));
    }
    let placement = HelperPlacement::new(helper, layout.guest_end(), layout.ram().count());
    if let Some(b) = block
        && placement.is_none_or(|p| p.tables_at >= b.size)
    {
        let needed = placement.map_or(u64::MAX, |p| p.tables_at);
        refusals.push(Refusal::new(RefusalCode::HelperTooSmall, "helper block", b.size).bound(needed));
    }
    let (Some(top), Some(block), Some(placement), true) = (top, block, placement, refusals.is_empty()) else {
        return Err(refusals);
    };
    let mailbox_gpa = MirrorGpa::new(top);
    let draft = Draft {
        strategy,
        shift: bytes,
        slots: slots(layout, bytes, mailbox_gpa, mailbox),
        placement,
        helper_gpa: helper_gpa(block, bytes),
        helper_len: block.size,
        mailbox,
        mailbox_gpa,
        exposures: exposures(block),
    };
    draft.finish(layout, helper, limits)
}

fn slots(layout: &GuestLayout, shift: u64, mailbox_gpa: MirrorGpa, mailbox: MailboxSize) -> Vec<MirrorSlot> {
    let low = layout.plugged().into_iter().filter_map(|(b, p)| {
        let len = FOUR_GIB.checked_sub(p.gpa.get())?.min(p.len);
        let ram_addr = b.ram_addr.checked_add(p.offset)?;
        (len > 0).then_some(MirrorSlot {
            gpa: MirrorGpa::new(p.gpa.get()),
            len,
            backing: SlotBacking::Ram { ram_addr },
            purpose: Purpose::LowWindow,
        })
    });
    let window = layout.blocks().iter().map(|b| MirrorSlot {
        gpa: MirrorGpa::new(b.ram_addr.get() + shift),
        len: b.size,
        backing: SlotBacking::Ram { ram_addr: b.ram_addr },
        purpose: Purpose::RamWindow,
    });
    let shared = MirrorSlot {
        gpa: mailbox_gpa,
        len: mailbox.bytes(),
        backing: SlotBacking::Mailbox,
        purpose: Purpose::Mailbox,
    };
    low.chain(window).chain([shared]).collect()
}

/// The helper runs from the bottom 4 GiB where the guest has it there, else from the RAM window.
fn helper_gpa(block: &RamBlock, shift: u64) -> MirrorGpa {
    match block.plugs.as_slice() {
        [p] if p.len == block.size && p.gpa.get() + p.len <= FOUR_GIB => MirrorGpa::new(p.gpa.get()),
        _ => MirrorGpa::new(block.ram_addr.get() + shift),
    }
}

fn exposures(block: &RamBlock) -> Vec<Exposure> {
    let mut list = Vec::new();
    if block.plugs.is_empty() {
        list.push(Exposure {
            code: "helper_hidden_from_guest",
            detail:
                "the helper's block has no guest physical address: the guest cannot write it, and it was \
                     not part of the guest's own launch"
                    .into(),
        });
    } else {
        list.push(Exposure {
            code: "guest_can_write_helper",
            detail:
                "the helper lies in the guest's own memory: the guest can rewrite it and leak its own keys \
                     or use the host's helper threads; it harms itself, the host treats the helper as \
                     untrusted"
                    .into(),
        });
    }
    list.push(Exposure {
        code: "mirror_reaches_all_ram",
        detail:
            "the mirror's slots cover all RAM, the bottom 4 GiB twice; the helper's page tables map each \
                 page of RAM once, writable"
                .into(),
    });
    list
}
