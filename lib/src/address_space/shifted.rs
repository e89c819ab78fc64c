//! The `shifted` strategy: the bottom 4 GiB of guest-physical space one to one, every RAM block again at
//! `RamAddr + shift`. The helper is addressed by `RamAddr`, so RAM that is unplugged at the moment can move.
//! (Paolo Bonzini, 17 Aug 2021, in the mirror VM thread.)
//!
//! What the guest has below 4 GiB appears as it is there, holes included; RAM above 4 GiB, and RAM that the
//! guest does not see at all, appears in the window alone.

use super::draft::Draft;
use super::{
    FOUR_GIB, HelperPiece, MirrorPlan, PlanRequest, Purpose, RamBlock, Refusal, RefusalCode, Shift,
    SlotBacking, exposures,
};
use crate::addr::{MirrorGpa, PAGE_2M, align_up};

pub(super) fn plan(request: &PlanRequest<'_>, shift: Shift) -> Result<MirrorPlan, Vec<Refusal>> {
    let mut draft = Draft::begin(request)?;
    let bytes = match shift {
        Shift::FourGib => FOUR_GIB,
        Shift::MaxPhys => request.limits.max_phys_shift(),
        Shift::Explicit { bytes } => bytes,
    };
    if bytes % PAGE_2M != 0 {
        draft.refuse(Refusal::new(RefusalCode::ShiftUnaligned, "shift", bytes).bound(PAGE_2M));
    }
    if bytes < FOUR_GIB {
        draft.refuse(Refusal::new(RefusalCode::ShiftTooLow, "shift", bytes).bound(FOUR_GIB));
    }
    low_window(&mut draft);
    if draft.ram_window(bytes) {
        if let Some(block) = request.layout.helper() {
            match block.ram_addr.get().checked_add(bytes) {
                Some(gpa) => {
                    let backing = SlotBacking::Ram { ram_addr: block.ram_addr };
                    draft.slot(gpa, block.size, backing, Purpose::RamWindow);
                    let gpa = MirrorGpa::new(low_gpa(block).unwrap_or(gpa));
                    draft.pieces.push(HelperPiece { offset: 0, gpa, len: block.size });
                }
                None => draft.refuse(Refusal::new(RefusalCode::Wraps, "shift", bytes)),
            }
        }
        let top = request.layout.ram_end().get().checked_add(bytes).and_then(|t| align_up(t, PAGE_2M));
        draft.mailbox(top);
    }
    if let Some(block) = request.layout.helper() {
        draft.exposures = exposures::shifted(request, block);
    }
    draft.finish()
}

/// What the guest sees below 4 GiB.
fn low_window(draft: &mut Draft<'_>) {
    for block in draft.request.layout.blocks() {
        for p in &block.plugs {
            let len = FOUR_GIB.saturating_sub(p.gpa.get()).min(p.len);
            if let (true, Some(ram_addr)) = (len > 0, block.ram_addr.checked_add(p.offset)) {
                draft.slot(p.gpa.get(), len, SlotBacking::Ram { ram_addr }, Purpose::LowWindow);
            }
        }
    }
}

/// The helper runs from the bottom 4 GiB where the guest has it there, else from the RAM window.
fn low_gpa(block: &RamBlock) -> Option<u64> {
    match block.plugs.as_slice() {
        [p] if p.len == block.size && p.gpa.get().saturating_add(p.len) <= FOUR_GIB => Some(p.gpa.get()),
        _ => None,
    }
}
