//! The descriptors that a QEMU is started with beside its standard ones and its control socket.
//!
//! Owns: which there are for which machine, and their order, by which they go to the process that starts
//! QEMUs. Must not know: how they came to be open.

use std::os::fd::OwnedFd;

use super::parts::Machine;

/// A disk's file, as open descriptions of its own: each of them holds QEMU's lock on the image as long as
/// anybody has it.
#[derive(Debug, Default)]
pub struct DiskFiles {
    /// For reading and writing; `None` for a disk that is only read.
    pub write: Option<OwnedFd>,
    /// For reading; `None` for an empty drive.
    pub read: Option<OwnedFd>,
    /// The file beneath it, for reading.
    pub backing: Option<OwnedFd>,
}

/// What a machine is made from.
#[derive(Debug, Default)]
pub struct Passed {
    /// Linux kernel image: a sealed memfd.
    pub kernel: Option<OwnedFd>,
    /// Initial RAM disk: a sealed memfd.
    pub initrd: Option<OwnedFd>,
    /// UEFI firmware's code: a sealed memfd.
    pub code: Option<OwnedFd>,
    /// UEFI firmware's variables.
    pub nvram: Option<DiskFiles>,
    /// Of each of the machine's disks, in their order.
    pub disks: Vec<DiskFiles>,
    /// What cloud-init reads: a sealed memfd.
    pub seed: Option<OwnedFd>,
    /// QEMU's end of the guest agent's channel.
    pub agent: Option<OwnedFd>,
}

impl Passed {
    /// All of them, in the order of [`Passed::of`].
    pub fn into_list(self) -> Vec<OwnedFd> {
        let files = |f: DiskFiles| [f.write, f.read, f.backing].into_iter().flatten();
        let boot = [self.kernel, self.initrd, self.code].into_iter().flatten();
        let disks = self.nvram.into_iter().chain(self.disks).flat_map(files);
        boot.chain(disks).chain(self.seed).chain(self.agent).collect()
    }

    /// What a machine takes, from the list of it; `None`: too few or too many.
    pub fn of(machine: &Machine, kernel: bool, initrd: bool, list: Vec<OwnedFd>) -> Option<Self> {
        let mut list = list.into_iter();
        let mut next = |wanted: bool| if wanted { list.next().map(Some) } else { Some(None) };
        let (kernel, initrd, code) = (next(kernel)?, next(initrd)?, next(machine.firmware.is_some())?);
        let mut files = |write, read, backing| {
            Some(DiskFiles { write: next(write)?, read: next(read)?, backing: next(backing)? })
        };
        let nvram = if machine.firmware.is_some() { Some(files(true, true, false)?) } else { None };
        let disks = machine.disks.iter();
        let disks =
            disks.map(|d| files(d.path.is_some() && d.is_written(), d.path.is_some(), d.backing.is_some()));
        let disks = disks.collect::<Option<_>>()?;
        let (seed, agent) = (next(machine.cloud_init.is_some())?, next(machine.guest_agent)?);
        let passed = Self { kernel, initrd, code, nvram, disks, seed, agent };
        list.next().is_none().then_some(passed)
    }
}
