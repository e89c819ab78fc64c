//! The `declared` strategy: the helper says which of the guest's pages it runs from and where the mirror shall see
//! them; the mirror holds those and the RAM window, and nothing else of the guest's address space.
//!
//! Everything in a declaration is untrusted, by the host since the guest made it, and by the guest since the host
//! carried it: each tuple is checked in full, and only the helper's own block may be declared (other RAM is somebody
//! else's, and would be reachable twice).

use super::draft::Draft;
use super::rules::has_bit;
use super::{
    BlockRole, HelperPiece, MirrorPlan, PlanRequest, Plug, Purpose, RamBlock, Refusal, RefusalCode,
    SlotBacking, Tuple, exposures,
};
use crate::addr::{Gpa, PAGE_2M, PAGE_SIZE, RamAddr, align_up};

pub(super) fn plan(request: &PlanRequest<'_>) -> Result<MirrorPlan, Vec<Refusal>> {
    let mut draft = Draft::begin(request)?;
    draft.missing_piece = RefusalCode::DeclarationIncomplete;
    let shift = request.limits.max_phys_shift();
    if draft.ram_window(shift) {
        let top = request.layout.ram_end().get().checked_add(shift).and_then(|t| align_up(t, PAGE_2M));
        draft.mailbox(top);
    }
    if let Some(block) = request.layout.helper() {
        if block.plugs.is_empty() {
            draft.refuse(Refusal::new(RefusalCode::HelperUnplugged, "helper offset", 0));
        }
        draft.exposures = exposures::declared(request, block);
    }
    let Some(declaration) = request.declaration else {
        draft.refuse(Refusal::new(RefusalCode::NoDeclaration, "declaration", 0));
        return draft.finish();
    };
    let tuples = declaration.tuples();
    // By count first: thousands of tuples are refused before they cost a sort.
    let (count, budget) = ((draft.slots.len() + tuples.len()) as u64, u64::from(request.limits.slot_budget));
    if count > budget {
        draft.refuse(Refusal::new(RefusalCode::SlotBudget, "slots", count).bound(budget));
        return Err(draft.refusals);
    }
    let parts = request.layout.plugged();
    let mut sound: Vec<(usize, Tuple)> = Vec::with_capacity(tuples.len());
    for (index, tuple) in tuples.iter().enumerate() {
        if check_numbers(&mut draft, index, tuple, shift) && add_pieces(&mut draft, index, tuple, &parts) {
            sound.push((index, *tuple));
        }
    }
    check_overlaps(&mut draft, sound);
    join(&mut draft.pieces);
    draft.finish()
}

/// The tuple by itself: lengths, alignment, wraps, limits, C-bit, window.
fn check_numbers(draft: &mut Draft<'_>, index: usize, t: &Tuple, window: u64) -> bool {
    use RefusalCode as C;
    let limits = draft.request.limits;
    let before = draft.refusals.len();
    let mut refuse = |code, what: &str, value, bound: Option<u64>| {
        let refusal = Refusal { bound, ..Refusal::new(code, what, value).at(index) };
        draft.refusals.push(refusal);
    };
    if t.len == 0 {
        refuse(C::TupleZero, "tuple length", 0, None);
        return false;
    }
    if t.len % PAGE_SIZE != 0 {
        refuse(C::TupleUnaligned, "tuple length", t.len, Some(PAGE_SIZE));
    }
    for (what, at) in [("tuple guest address", t.guest.get()), ("tuple mirror address", t.mirror.get())] {
        if at % PAGE_SIZE != 0 {
            refuse(C::TupleUnaligned, what, at, Some(PAGE_SIZE));
        }
        let Some(end) = at.checked_add(t.len) else {
            refuse(C::Wraps, what, at, None);
            continue;
        };
        if end > limits.phys_limit() {
            refuse(C::AboveMaxPhys, what, end, Some(limits.phys_limit()));
        }
        if has_bit(at, t.len, limits.c_bit_mask()) {
            refuse(C::CBitInAddress, what, at, Some(limits.c_bit_mask()));
        }
    }
    let end = t.mirror.get().saturating_add(t.len);
    if end > window {
        refuse(C::TupleInWindow, "tuple mirror address", end, Some(window));
    }
    draft.refusals.len() == before
}

/// What is behind the tuple: the helper's block and nothing else. Makes its slots and pieces, one for each plugged part.
fn add_pieces(draft: &mut Draft<'_>, index: usize, t: &Tuple, parts: &[(&RamBlock, Plug)]) -> bool {
    let mut done = 0;
    while done < t.len {
        let at = t.guest.get() + done;
        let after = parts.partition_point(|(_, p)| p.gpa <= Gpa::new(at));
        let found = after.checked_sub(1).and_then(|i| parts.get(i));
        let Some((block, plug)) = found.filter(|(_, p)| at - p.gpa.get() < p.len) else {
            draft.refuse(Refusal::new(RefusalCode::TupleNotRam, "tuple guest address", at).at(index));
            return false;
        };
        if block.role != BlockRole::Helper {
            draft.refuse(Refusal::new(RefusalCode::TupleNotHelper, "tuple guest address", at).at(index));
            return false;
        }
        let inside = at - plug.gpa.get();
        let (offset, len) = (plug.offset + inside, (t.len - done).min(plug.len - inside));
        let gpa = t.mirror.checked_add(done).unwrap_or(t.mirror);
        let ram_addr = RamAddr::new(block.ram_addr.get() + offset);
        draft.slot(gpa.get(), len, SlotBacking::Ram { ram_addr }, Purpose::DeclaredPiece);
        draft.pieces.push(HelperPiece { offset, gpa, len });
        done += len;
    }
    true
}

/// No two tuples share a guest page. (That they share no mirror page is checked with all slots.)
fn check_overlaps(draft: &mut Draft<'_>, mut tuples: Vec<(usize, Tuple)>) {
    tuples.sort_unstable_by_key(|(index, t)| (t.guest, *index));
    let mut end = 0;
    for (index, t) in &tuples {
        let start = t.guest.get();
        if start < end {
            let refusal = Refusal::new(RefusalCode::TupleOverlap, "tuple guest address", start);
            draft.refusals.push(refusal.at(*index).bound(end));
        }
        end = end.max(start + t.len);
    }
}

/// Sorts pieces by their place in the block and joins those that follow each other there and in the mirror: a guest may
/// cut its helper as it likes, what counts is what is contiguous.
fn join(pieces: &mut Vec<HelperPiece>) {
    pieces.sort_unstable_by_key(|p| p.offset);
    pieces.dedup_by(|next, last| {
        let adjoins = last.offset + last.len == next.offset && last.gpa.get() + last.len == next.gpa.get();
        if adjoins {
            last.len += next.len;
        }
        adjoins
    });
}
