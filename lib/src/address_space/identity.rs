//! The `identity-cbit` strategy (IBM's prototype): what the guest sees is where the guest sees it, with the
//! C-bit on every page, and the pages that are shared on purpose appear again without it at a large virtual
//! offset. The helper is addressed by GPA, so a private page that the guest does not see cannot move: a named
//! refusal.
//!
//! The prototype's tables covered 512 GiB and its plain alias the first GiB, by constants; here both follow
//! the layout. Without encryption the layout is the same, without the bit.

use super::draft::Draft;
use super::{
    Addressing, BlockRole, HelperPiece, HelperPlacement, MirrorPlan, PlanRequest, Purpose, RamBlock, Refusal,
    RefusalCode, SlotBacking, Unreachable, exposures, window_purpose,
};
use crate::addr::{MirrorGpa, PAGE_2M, PAGE_SIZE, RamAddr, align_up};

pub(super) fn plan(request: &PlanRequest<'_>) -> Result<MirrorPlan, Vec<Refusal>> {
    let mut draft = Draft::begin(request)?;
    draft.addressing = Addressing::Gpa;
    let layout = request.layout;
    let highest = HelperPlacement::highest(layout);
    let mut top = Some(0u64);
    for (index, block) in layout.blocks().iter().enumerate() {
        for p in &block.plugs {
            let gpa = p.gpa.get();
            top = top.map(|t| t.max(gpa.saturating_add(p.len)));
            let ram_addr = RamAddr::new(block.ram_addr.get() + p.offset);
            draft.slot(gpa, p.len, SlotBacking::Ram { ram_addr }, window_purpose(block.role));
            if block.role != BlockRole::Helper {
                add_to_window(&mut draft, ram_addr, p.len, gpa, block.role, highest);
            }
        }
        match block.role {
            BlockRole::Ram => unplugged(&mut draft, index, block),
            BlockRole::Helper => draft.pieces = helper_pieces(block),
            BlockRole::Vmsa => {}
        }
    }
    // Save areas are in no guest's map; the mirror gets them above everything that is (what IBM planned in
    // October 2020).
    for block in layout.ram().filter(|b| b.role == BlockRole::Vmsa && b.plugs.is_empty()) {
        let gpa = top.and_then(|t| align_up(t, PAGE_2M));
        top = gpa.and_then(|g| g.checked_add(block.size));
        match (gpa, top) {
            (Some(gpa), Some(_)) => {
                let backing = SlotBacking::Ram { ram_addr: block.ram_addr };
                draft.slot(gpa, block.size, backing, Purpose::Vmsa);
                add_to_window(&mut draft, block.ram_addr, block.size, gpa, block.role, highest);
            }
            _ => draft.refuse(Refusal::new(RefusalCode::Wraps, "save areas", block.size)),
        }
    }
    draft.mailbox(top.and_then(|t| align_up(t, PAGE_2M)));
    if let Some(block) = layout.helper() {
        if block.plugs.is_empty() {
            let index = layout.blocks().iter().position(|b| b.role == BlockRole::Helper).unwrap_or(0);
            draft.refuse(Refusal::new(RefusalCode::HelperUnplugged, "helper offset", 0).at(index));
        }
        draft.exposures = exposures::identity(request, block, &draft.unreachable);
    }
    draft.finish()
}

fn add_to_window(draft: &mut Draft<'_>, ram: RamAddr, len: u64, gpa: u64, role: BlockRole, highest: u64) {
    let end = gpa.saturating_add(len);
    if end > highest {
        draft.refuse(Refusal::new(RefusalCode::GpaAboveMaps, "end of RAM", end).bound(highest));
        return;
    }
    draft.window(ram, len, gpa, gpa, window_purpose(role));
}

/// What of a block the guest does not see: refused, unless every page of the range is shared, so that the
/// host moves it by itself.
fn unplugged(draft: &mut Draft<'_>, index: usize, block: &RamBlock) {
    let mut at = 0;
    let ends = block.plugs.iter().map(|p| (p.offset, p.offset + p.len)).chain([(block.size, block.size)]);
    for (start, end) in ends {
        let (from, len) = (block.ram_addr.get() + at, start - at);
        at = end;
        if len == 0 {
            continue;
        }
        let shared = |set: &crate::pages::PageSet| set.contains_all(from / PAGE_SIZE, len / PAGE_SIZE);
        if draft.request.shared.is_some_and(shared) {
            let ram_addr = RamAddr::new(from);
            draft.unreachable.push(Unreachable { ram_addr, len, code: "unplugged_shared" });
        } else {
            let refusal = Refusal::new(RefusalCode::UnpluggedPrivate, "ram_addr", from);
            draft.refuse(refusal.at(index).bound(len));
        }
    }
}

/// The helper's block as the guest sees it; parts that follow each other there are one piece.
fn helper_pieces(block: &RamBlock) -> Vec<HelperPiece> {
    let mut pieces: Vec<HelperPiece> = Vec::new();
    for p in &block.plugs {
        match pieces.last_mut() {
            Some(last) if last.offset + last.len == p.offset && last.gpa.get() + last.len == p.gpa.get() => {
                last.len += p.len;
            }
            _ => pieces.push(HelperPiece { offset: p.offset, gpa: MirrorGpa::new(p.gpa.get()), len: p.len }),
        }
    }
    pieces
}
