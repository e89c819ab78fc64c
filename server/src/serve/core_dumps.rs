//! No core dumps: this process's memory holds guests' memory, keys and tokens.
//!
//! Owns: the two settings of the kernel that see to it. Must not know: what serves. Children have both
//! settings too, so a QEMU that crashes writes no guest out either.
//!
//! Not `PR_SET_DUMPABLE`: that also takes `/proc/PID` away from the user that runs the daemon and wants to
//! watch it.

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Which mappings a dump contains, one bit for each kind (core(5)); here none. It takes effect where the
/// limit does not: when `core_pattern` names a program, the kernel pipes to it whatever the limit is.
const FILTER: &str = "/proc/self/coredump_filter";

/// Turns core dumps off for good: the hard limit cannot be raised again without CAP_SYS_RESOURCE.
///
/// # Errors
/// The kernel's.
pub(super) fn disable() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    match std::fs::write(FILTER, "0x0") {
        // A kernel that cannot dump has no filter.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
