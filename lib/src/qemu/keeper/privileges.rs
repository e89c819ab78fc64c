//! Owns what a keeper gives up once its QEMU runs, and that it can still end it. Must not know what took the
//! privileges that it gives up.
//!
//! QEMU has a user of its own, and the keeper no capability to send it a signal. So it has that user as its
//! *effective* one, which may; real and saved user stay the daemon's, so that QEMU, whose users are all its
//! own, may neither signal nor trace the keeper: both take the keeper's real and saved user. The kernel looks
//! at the same users when the keeper ends and QEMU is to be sent its parent-death signal. Files are the
//! daemon's user's.
//!
//! The bounding set stays as the launcher left it, which lacks the capability to reduce it: without a
//! permitted or inheritable capability, and with `no_new_privs`, no program that this process could run would
//! get anything from it.

use std::io;

use rustix::process::{DumpableBehavior, Uid, getuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
    set_thread_res_uid,
};

/// Gives up all privileges of this thread, which is the process's only one; `qemu` is QEMU's user if it has
/// one of its own.
pub(super) fn give_up(qemu: Option<u32>) -> io::Result<()> {
    if let Some(qemu) = qemu {
        let own = getuid();
        set_thread_res_uid(own, Uid::from_raw(qemu), own)?;
        file_system_user(own)?;
    }
    // Kernels without ambient capabilities have none to give up.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_no_new_privs(true)?;
    // A change of users sets it to what the host's administrator likes.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Has files opened and made as this user.
#[expect(unsafe_code, reason = "UNSAFETY: setfsuid(2), which no crate we use wraps")]
fn file_system_user(user: Uid) -> io::Result<()> {
    // SAFETY: a system call on a number.
    let _ = unsafe { libc::setfsuid(user.as_raw()) };
    // It tells no error, but who it was before; nobody's number changes nothing.
    // SAFETY: as above.
    let now = unsafe { libc::setfsuid(u32::MAX) };
    if u32::try_from(now) == Ok(user.as_raw()) {
        return Ok(());
    }
    Err(io::Error::from(io::ErrorKind::PermissionDenied))
}
