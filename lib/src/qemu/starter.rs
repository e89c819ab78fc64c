//! Owns who starts QEMUs: this process, or its launcher. Must not know when, or what they are.

use std::io;
use std::os::fd::OwnedFd;

use super::keeper;
use super::launcher::Launcher;
use super::wire::Order;
use crate::threads::{self, Role};

/// Who starts QEMUs.
#[derive(Clone, Debug, Default)]
pub enum Starter {
    /// This process, whose privileges it takes to give them users of their own. Each has a thread of this
    /// process for its keeper: a program that has this library need not be able to be a keeper's process.
    #[default]
    Here,
    /// A process that was started for it, which starts a keeper's process for each.
    Launcher(Launcher),
}

impl Starter {
    /// Has a QEMU started; what becomes of it is told over the other end of `leash`.
    pub(super) fn start(&self, order: Order, leash: OwnedFd) -> io::Result<()> {
        match self {
            Self::Here => {
                // The forking thread lives as long as the process: the parent-death signal is that thread's.
                std::thread::Builder::new()
                    .name("qemu-keeper".to_owned())
                    .spawn(move || {
                        threads::begin(Role::Keeper);
                        keeper::keep_here(order, &leash);
                    })
                    .map(drop)
            }
            Self::Launcher(launcher) => launcher.start(order, &leash),
        }
    }
}
