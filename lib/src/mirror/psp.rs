//! `psp-copied` by send-receive: the firmware copies the helper into memory of another context that shares
//! the guest's key, without its host seeing it.
//!
//! The result is another guest of the firmware's with the same key, not a mirror of KVM's: today's kernel
//! refuses RECEIVE on a mirror, and copying into a VM that has a context. So this runs on the model only; the
//! firmware's side is the SEV API's (SEND_START .. RECEIVE_FINISH, RECEIVE_START with a handle).

use std::sync::Arc;

use crate::addr::PAGE_SIZE;
use crate::guest::LaunchedHelper;
use crate::memory::Mapping;
use crate::sev::{Context, PlatformCerts, SevError};

/// Copies `len` bytes at `offset` of `from` (the guest's) into all of `to`, and makes `target` share the
/// guest's key.
///
/// # Errors
/// What the firmware refuses; the guest is running as before.
pub(super) fn copy(
    helper: &LaunchedHelper,
    target: &dyn Context,
    from: (&Mapping, u64, u64),
    to: &Arc<Mapping>,
) -> Result<(), SevError> {
    let source = helper.context.as_ref();
    // To itself: this platform is both ends.
    let pdh = helper.platform.pdh()?;
    let handle = source.guest_status()?.handle;
    target.init(helper.es)?;
    target.register_region(to, 0, to.len())?;
    let session = source.send_start(&PlatformCerts::from(pdh.clone()))?;
    let (memory, offset, len) = from;
    let copied = (|| {
        target.receive_start(helper.policy, &pdh, &session, Some(handle))?;
        for at in (0..len).step_by(PAGE_SIZE as usize) {
            let (header, packet) = source.send_update_data(memory, offset + at, PAGE_SIZE)?;
            target.receive_update_data(&header, &packet, to, at)?;
        }
        target.receive_finish()
    })();
    // Not SEND_FINISH: the guest stays here and goes on.
    source.send_cancel()?;
    copied
}
