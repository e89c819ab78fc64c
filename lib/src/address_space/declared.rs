//! The `declared` strategy: the helper says which of the guest's pages it runs from and where the mirror
//! shall see them; the mirror holds those and the RAM window, and nothing else of the guest's address space.
//!
//! Everything in a declaration is untrusted, by the host since the guest made it, and by the guest since the
//! host carried it: each tuple is checked in full, and only the helper's own block may be declared (other RAM
//! is somebody else's, and would be reachable twice).

use std::collections::HashSet;

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
    check_tuples(&mut draft, tuples, shift);
    draft.finish()
}

/// Checks every tuple, by itself and against the others, and makes slots and pieces of those that are sound.
fn check_tuples(draft: &mut Draft<'_>, tuples: &[Tuple], window: u64) {
    let sound: Vec<(usize, &Tuple)> =
        tuples.iter().enumerate().filter(|(index, t)| check_numbers(draft, *index, t, window)).collect();
    let mut clashing = overlaps(draft, &sound, "tuple guest address", |t| t.guest.get());
    clashing.extend(overlaps(draft, &sound, "tuple mirror address", |t| t.mirror.get()));
    let parts = draft.request.layout.plugged();
    for (index, tuple) in sound {
        let Some(pieces) = pieces_of(draft, index, tuple, &parts) else { continue };
        // Named once is enough: as slots, clashing tuples would be named again.
        if clashing.contains(&index) {
            continue;
        }
        for (piece, ram_addr) in pieces {
            draft.slot(piece.gpa.get(), piece.len, SlotBacking::Ram { ram_addr }, Purpose::DeclaredPiece);
            draft.pieces.push(piece);
        }
    }
    join(&mut draft.pieces);
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
    if !t.len.is_multiple_of(PAGE_SIZE) {
        refuse(C::TupleUnaligned, "tuple length", t.len, Some(PAGE_SIZE));
    }
    for (what, at) in [("tuple guest address", t.guest.get()), ("tuple mirror address", t.mirror.get())] {
        if !at.is_multiple_of(PAGE_SIZE) {
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

/// What is behind the tuple, one piece for each plugged part: the helper's block and nothing else.
fn pieces_of(
    draft: &mut Draft<'_>,
    index: usize,
    t: &Tuple,
    parts: &[(&RamBlock, Plug)],
) -> Option<Vec<(HelperPiece, RamAddr)>> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < t.len {
        let at = t.guest.get() + done;
        let after = parts.partition_point(|(_, p)| p.gpa <= Gpa::new(at));
        let found = after.checked_sub(1).and_then(|i| parts.get(i));
        let code = match found.filter(|(_, p)| at - p.gpa.get() < p.len) {
            None => RefusalCode::TupleNotRam,
            Some((block, _)) if block.role != BlockRole::Helper => RefusalCode::TupleNotHelper,
            Some((block, plug)) => {
                let inside = at - plug.gpa.get();
                let (offset, len) = (plug.offset + inside, (t.len - done).min(plug.len - inside));
                let gpa = t.mirror.checked_add(done)?;
                pieces.push((HelperPiece { offset, gpa, len }, block.ram_addr.checked_add(offset)?));
                done += len;
                continue;
            }
        };
        draft.refuse(Refusal::new(code, "tuple guest address", at).at(index));
        return None;
    }
    Some(pieces)
}

/// Refuses tuples that share addresses of one kind with a tuple below them; gives the indexes of those.
fn overlaps(
    draft: &mut Draft<'_>,
    tuples: &[(usize, &Tuple)],
    what: &str,
    address: impl Fn(&Tuple) -> u64,
) -> HashSet<usize> {
    let mut spans: Vec<(u64, usize, u64)> = tuples.iter().map(|(i, t)| (address(t), *i, t.len)).collect();
    spans.sort_unstable();
    let mut clashing = HashSet::new();
    let mut end = 0;
    for (start, index, len) in spans {
        if start < end {
            draft.refuse(Refusal::new(RefusalCode::TupleOverlap, what, start).at(index).bound(end));
            clashing.insert(index);
        }
        end = end.max(start + len);
    }
    clashing
}

/// Sorts pieces by their place in the block and joins those that follow each other there and in the mirror: a
/// guest may cut its helper as it likes, what counts is what is contiguous.
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
