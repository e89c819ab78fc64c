//! The `psp-copied` strategy, in the form that Steve Rutherford proposed on 17 Aug 2021: the helper's memory
//! is the mirror's alone, very high in its physical space, its content put there by the security processor;
//! RAM is shared at `RamAddr`, unshifted. Ownership follows from the address: high is the helper's, low is
//! the guest's.
//!
//! Both ways to fill that memory give one layout. Whether firmware and kernel go along is for `sev` to say.

use super::draft::Draft;
use super::{
    HelperPiece, MirrorPlan, PlanRequest, PspVia, Purpose, Refusal, RefusalCode, SlotBacking, exposures,
};
use crate::addr::{MirrorGpa, PAGE_2M};

pub(super) fn plan(request: &PlanRequest<'_>, via: PspVia) -> Result<MirrorPlan, Vec<Refusal>> {
    let mut draft = Draft::begin(request)?;
    if via == PspVia::SendReceive && !request.confidentiality.is_encrypted() {
        draft.refuse(Refusal::new(RefusalCode::SendReceiveUnencrypted, request.confidentiality.name(), 0));
    }
    draft.ram_window(0);
    if let Some(block) = request.layout.helper() {
        // A block or mailbox that is larger than the space itself meets the RAM below, and is refused as
        // that.
        let below = |top: u64, len: u64| top.saturating_sub(len) & !(PAGE_2M - 1);
        let gpa = below(request.limits.phys_limit(), block.size);
        draft.slot(gpa, block.size, SlotBacking::Private { offset: 0 }, Purpose::HelperPrivate);
        draft.pieces.push(HelperPiece { offset: 0, gpa: MirrorGpa::new(gpa), len: block.size });
        draft.mailbox(Some(below(gpa, request.mailbox.bytes())));
        draft.exposures = exposures::psp_copied(request, via);
    }
    draft.finish()
}
