//! Owns starting one QEMU as a child of the process that this runs in. Must not know who waits for it, or why
//! it is started.
//!
//! Descriptors beyond the standard three pass under the numbers that they have here: between fork and exec
//! the child alone makes them, and nothing else, survive the exec. Clearing their close-on-exec flag in this
//! process would let every other child that is started at that moment have them, too. The price is a fork in
//! the place of a `vfork`; guest memory, the large part of this process, is left out of it (`MADV_DONTFORK`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::command::QemuSpec;

/// Starts QEMU as `spec` says, with its end of the control socket, of the guest's serial port (its standard
/// output) and of what it says (its standard error). Must be called on a thread that lives as long as the
/// process: the parent-death signal fires when the **thread** that forked ends. Nothing that was passed stays
/// open here: a copy of a disk image would hold QEMU's lock on it.
pub(super) fn start(spec: QemuSpec, qmp: OwnedFd, console: OwnedFd, words: OwnedFd) -> io::Result<Child> {
    let mut command = spec.command(&qmp);
    let QemuSpec { ram, kernel, initrd, .. } = spec;
    command.stdin(Stdio::from(ram)).stdout(Stdio::from(console)).stderr(Stdio::from(words));
    let passed: Vec<OwnedFd> = [qmp, kernel].into_iter().chain(initrd).collect();
    pass(&mut command, &passed);
    // Until the child has its copies; then none stays open on our side.
    command.spawn()
}

/// A descriptor of a child that was not waited for: readable when it has ended.
pub(super) fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Lets the child of `command` keep `fds`, and no other descriptor but its standard ones.
#[expect(unsafe_code, reason = "UNSAFETY: code that runs between fork and exec")]
fn pass(command: &mut Command, fds: &[OwnedFd]) {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let in_child = move || {
        // SAFETY: a system call on numbers. Kernels before 5.11 do not know it; what the daemon opens closes
        // itself there.
        let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        for number in &numbers {
            // SAFETY: the child has a copy of the table, in which the number is open: `start` holds it until
            // after the spawn.
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two kinds of system calls and nothing else: it
    // allocates nothing, takes no lock, and reads only numbers that were written before the fork.
    unsafe { command.pre_exec(in_child) };
}

/// Has no descriptor of this process but the standard three survive the next exec, whoever opened it. Kernels
/// before 5.11 do not know how; there it changes nothing.
#[expect(unsafe_code, reason = "UNSAFETY: close_range(2), which no crate we use wraps")]
pub fn close_on_exec() {
    // SAFETY: a system call on numbers, which closes nothing now.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}
