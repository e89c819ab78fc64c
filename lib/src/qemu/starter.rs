//! Owns who starts QEMUs: this process, or its launcher. Must not know when, or what they are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;

use rustix::process::{Signal, pidfd_send_signal};

use super::launcher::{Launcher, Leash};
use super::start::{Order, pidfds};

/// Who starts QEMUs.
#[derive(Clone, Debug, Default)]
pub enum Starter {
    /// This process, whose privileges it takes to give them users of their own.
    #[default]
    Here,
    /// A process that was started for it.
    Launcher(Launcher),
}

/// A process that was started.
pub(super) struct Started {
    /// Its id, which is its own until its end is taken.
    pub pid: u32,
    /// For whoever kills it.
    pub killer: Killer,
    /// Of whoever waits for it.
    pub end: End,
}

/// Kills a process, from any thread.
#[derive(Debug)]
pub(super) enum Killer {
    /// By pidfd, so never another process with the same number.
    Pidfd(OwnedFd),
    /// By its launcher.
    Leash(Leash),
}

impl Killer {
    /// No effect if it is gone.
    pub fn kill(&self) {
        match self {
            Self::Pidfd(fd) => {
                let _ = pidfd_send_signal(fd, Signal::KILL);
            }
            Self::Leash(leash) => leash.kill(),
        }
    }
}

/// Gives the end of a process.
pub(super) enum End {
    /// A child of this process: itself, and what is readable when it has ended.
    Ours(Child, OwnedFd),
    /// A child of the launcher.
    Told(Leash),
}

impl End {
    /// Readable when the process has ended.
    pub fn readable(&self) -> BorrowedFd<'_> {
        match self {
            Self::Ours(_, pidfd) => pidfd.as_fd(),
            Self::Told(leash) => leash.readable(),
        }
    }

    /// Waits for it: exit code, and the signal that killed it.
    pub fn take(self) -> (Option<i32>, Option<i32>) {
        use std::os::unix::process::ExitStatusExt as _;
        match self {
            Self::Ours(mut child, _) => {
                let status = child.wait().ok();
                (status.and_then(|s| s.code()), status.and_then(|s| s.signal()))
            }
            Self::Told(leash) => leash.end(),
        }
    }
}

impl Starter {
    /// Starts a QEMU. Must be called on a thread that lives as long as the process.
    pub(super) fn start(&self, order: Order) -> io::Result<Started> {
        match self {
            Self::Here => here(order),
            Self::Launcher(launcher) => {
                let (pid, killer, end) = launcher.start(order)?;
                Ok(Started { pid, killer: Killer::Leash(killer), end: End::Told(end) })
            }
        }
    }
}

fn here(order: Order) -> io::Result<Started> {
    let mut child = order.start()?;
    match pidfds(&child) {
        Ok((ours, theirs)) => {
            Ok(Started { pid: child.id(), killer: Killer::Pidfd(theirs), end: End::Ours(child, ours) })
        }
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}
