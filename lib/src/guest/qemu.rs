//! The `qemu` driver as a machine: one QEMU process on RAM that this process holds.
//!
//! Owns: fitting QEMU's view of RAM to a layout. Must not know: QMP (that is [`crate::qemu`]), mirrors.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Console, EncryptionStatus, EndWatch, Machine, MachineEnd, MachineError, MigrationControl};
use crate::addr::Gpa;
use crate::address_space::{GuestLayout, Plug};
use crate::boot_files::SealedFile;
use crate::memory::{Claim, GuestRam, Secret};
use crate::pages::PageSet;
use crate::qemu::{
    self, KvmAccess, Qemu, QemuEnd, QemuError, RunAs, ShutdownCause, Starter, UserLease, kvm_access,
};

/// Bytes of `RamAddr` after the guest's memory that belong to QEMU's own blocks (firmware, ROMs, video
/// memory); the helper's block comes after them.
pub const QEMU_RESERVED: u64 = 1 << 30;
/// The memory backend's name, and so the RAM block's.
pub const RAM_BLOCK: &str = "ram0";

/// What a QEMU guest is made from.
#[derive(Debug)]
pub struct QemuMachineSpec {
    /// The QEMU binary.
    pub binary: PathBuf,
    /// Machine type; the source's exact one at a destination.
    pub machine_type: String,
    /// Accelerator.
    pub accel: qemu::Accel,
    /// 1 to 16.
    pub vcpus: u32,
    /// Kernel image, in sealed memory.
    pub kernel: SealedFile,
    /// Initial RAM disk, in sealed memory.
    pub initrd: Option<SealedFile>,
    /// Kernel command line.
    pub append: String,
    /// The user that it runs as; `None`: this process's.
    pub user: Option<UserLease>,
    /// What it may take beside the guest's memory.
    pub memory: Option<Claim>,
    /// Where its keeper keeps what it says.
    pub files: Option<qemu::GuestFiles>,
    /// Whether it waits for state from elsewhere.
    pub incoming: bool,
}

/// A guest in a QEMU process.
pub struct QemuMachine {
    qemu: Qemu,
    ram: GuestRam,
    console: Arc<Console>,
    encryption: Arc<EncryptionStatus>,
    control: Arc<MigrationControl>,
    secret: Secret<32>,
    // Dropped after the process: nobody gets the user while it lives.
    _user: Option<UserLease>,
    _memory: Option<Claim>,
}

/// What a QEMU's end says of its guest. QEMU exits with 0 when the guest powers off and (`-no-reboot`) when
/// it asks for a reset, and also when somebody ends it by a signal that it handles: which it was is what it
/// said before.
fn end_of(end: &QemuEnd) -> MachineEnd {
    match (end.exit.code, &end.cause) {
        (Some(0), Some(ShutdownCause::GuestShutdown)) => MachineEnd::PowerOff,
        (Some(0), Some(ShutdownCause::GuestReset)) => MachineEnd::Reset,
        (_, Some(ShutdownCause::GuestPanic)) => MachineEnd::Panicked,
        (Some(0), Some(ShutdownCause::Other(cause))) => {
            MachineEnd::Exited { how: format!("{} ({cause})", end.exit.told()) }
        }
        (Some(0), None) => MachineEnd::Exited { how: format!("{}; it did not say why", end.exit.told()) },
        (
            _,
            Some(ShutdownCause::GuestShutdown | ShutdownCause::GuestReset | ShutdownCause::Other(_)) | None,
        ) => MachineEnd::Exited { how: end.exit.told() },
    }
}

fn failed(e: QemuError) -> MachineError {
    MachineError::Qemu(Box::new(e))
}

impl QemuMachine {
    /// Starts QEMU, paused, on the first block of `ram`.
    ///
    /// # Errors
    /// [`MachineError`]; no process stays behind.
    pub fn launch(
        spec: QemuMachineSpec,
        ram: GuestRam,
        secret: Secret<32>,
        starter: &Starter,
    ) -> Result<Self, MachineError> {
        let layout = ram.layout();
        let block = layout.ram().next().ok_or(MachineError::NothingPlugged)?;
        let memory = ram.mapping(block).and_then(|m| m.memfd_fd()).ok_or(MachineError::NothingPlugged)?;
        let fd: OwnedFd = memory.try_clone_to_owned().map_err(MachineError::Thread)?;
        let console = Arc::new(Console::default());
        let sink = Arc::clone(&console);
        let kvm_group = match (spec.accel, kvm_access(spec.user.is_some())) {
            (qemu::Accel::Kvm, KvmAccess::Group(group)) => Some(group),
            (qemu::Accel::Kvm, KvmAccess::Open | KvmAccess::Closed) | (qemu::Accel::Tcg, _) => None,
        };
        let run_as = spec.user.as_ref().map(|u| RunAs { uid: u.uid, gid: u.gid, kvm_group });
        let command = qemu::QemuSpec {
            binary: spec.binary,
            accel: spec.accel,
            machine: spec.machine_type,
            cpu: "max".into(),
            vcpus: spec.vcpus,
            memory_bytes: block.size,
            kernel: spec.kernel.into_fd(),
            initrd: spec.initrd.map(SealedFile::into_fd),
            append: spec.append,
            ram: fd,
            run_as,
            incoming: spec.incoming,
            files: spec.files,
            timeouts: qemu::Timeouts::default(),
        };
        let sink = Box::new(move |bytes: &[u8]| sink.append(bytes));
        let qemu = Qemu::launch(command, sink, starter).map_err(failed)?;
        // It has its memory mapped; from here on a guest runs in it that may take it over.
        ram.mapping(block).map_or(Ok(()), |m| m.keep_pages())?;
        if let Some(memory) = &spec.memory {
            memory.of_process(qemu.pid());
        }
        let (control, encryption) = (Arc::new(MigrationControl::new(false)), Arc::default());
        let (_user, _memory) = (spec.user, spec.memory);
        Ok(Self { qemu, ram, console, encryption, control, secret, _user, _memory })
    }

    /// Where QEMU has the guest's RAM: `layout` with the plugged parts as QEMU says.
    ///
    /// # Errors
    /// When QEMU's RAM is not where the layout has it, or its own blocks reach into the helper's.
    pub fn true_layout(&mut self, layout: &GuestLayout) -> Result<GuestLayout, MachineError> {
        let (blocks, pieces) = self.qemu.layout().map_err(failed)?;
        let bad = |what| MachineError::BadState { what };
        let ours = layout.ram().next().ok_or(MachineError::NothingPlugged)?;
        let theirs = blocks.iter().find(|b| b.name == RAM_BLOCK).ok_or(bad("QEMU has no block ram0"))?;
        if theirs.offset != ours.ram_addr.get() || theirs.used_length != ours.size {
            return Err(bad("QEMU's RAM is elsewhere"));
        }
        let end = blocks.iter().filter_map(|b| b.offset.checked_add(b.total_length)).max().unwrap_or(0);
        if layout.helper().is_some_and(|h| h.ram_addr.get() < end) {
            return Err(bad("QEMU's own blocks reach into the helper's"));
        }
        let mut plugs: Vec<Plug> = pieces
            .iter()
            .map(|p| Plug { offset: p.offset_in_block, gpa: Gpa::new(p.gpa), len: p.len })
            .collect();
        plugs.sort_by_key(|p| p.offset);
        let found =
            layout.with_plugs(&ours.name, plugs).map_err(|_| bad("QEMU's view of RAM is contradictory"))?;
        self.ram.replug(Arc::new(found.clone())).map_err(|_| bad("QEMU has other RAM"))?;
        Ok(found)
    }

    fn check_alive(&self) -> Result<(), MachineError> {
        self.ended().map_or(Ok(()), |end| Err(MachineError::Ended(end)))
    }

    /// What came of a command: when QEMU has ended meanwhile, how its guest did.
    fn done<T>(&self, result: Result<T, QemuError>) -> Result<T, MachineError> {
        result.map_err(|error| match (&error, self.ended()) {
            (QemuError::Exited(_), Some(end)) => MachineError::Ended(end),
            _ => failed(error),
        })
    }
}

impl Machine for QemuMachine {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn console(&self) -> &Arc<Console> {
        &self.console
    }

    fn encryption(&self) -> &Arc<EncryptionStatus> {
        &self.encryption
    }

    fn migration_control(&self) -> &Arc<MigrationControl> {
        &self.control
    }

    fn migration_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.check_alive()?;
        let done = self.qemu.cont();
        self.done(done)
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.check_alive()?;
        let done = self.qemu.stop();
        self.done(done)
    }

    fn can_log_dirty(&self) -> bool {
        // The dirty log of these vCPUs belongs to QEMU's process, which does not export it.
        false
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), MachineError> {
        if on { Err(MachineError::Unsupported { what: "log dirty pages" }) } else { Ok(()) }
    }

    fn take_dirty(&mut self, _: &mut PageSet) -> Result<(), MachineError> {
        Err(MachineError::Unsupported { what: "log dirty pages" })
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        let saved = self.qemu.save_device_state(qemu::MAX_DEVICE_STATE_BYTES);
        self.done(saved)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.qemu.load_device_state(state).map_err(failed)
    }

    fn end_watch(&self) -> EndWatch {
        let watch = self.qemu.watch();
        EndWatch::new(move || watch.look().map(|end| end_of(&end)))
    }

    fn machine_type(&mut self) -> Result<Option<String>, MachineError> {
        self.qemu.machine_type().map(Some).map_err(failed)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.qemu.pid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::qemu::ExitInfo;

    fn end(code: Option<i32>, signal: Option<i32>, stderr: &str, cause: Option<ShutdownCause>) -> MachineEnd {
        end_of(&QemuEnd { exit: ExitInfo { code, signal, oom_killed: None, stderr: stderr.into() }, cause })
    }

    #[test]
    fn a_guest_s_end_is_what_qemu_said_of_it_and_ended_as_it_said() {
        use ShutdownCause as C;
        assert_eq!(end(Some(0), None, "", Some(C::GuestShutdown)), MachineEnd::PowerOff);
        assert_eq!(end(Some(0), None, "warning: something", Some(C::GuestShutdown)), MachineEnd::PowerOff);
        assert_eq!(end(Some(0), None, "", Some(C::GuestReset)), MachineEnd::Reset);
        assert_eq!(end(Some(0), None, "", Some(C::GuestPanic)), MachineEnd::Panicked);
        assert_eq!(end(Some(1), None, "", Some(C::GuestPanic)), MachineEnd::Panicked);
        let how = |end| match end {
            MachineEnd::Exited { how } => how,
            other => panic!("{other}"),
        };
        assert_eq!(how(end(Some(0), None, "", None)), "QEMU ended with code 0; it did not say why");
        assert_eq!(how(end(Some(1), None, "no\nmemory\n", None)), "QEMU ended with code 1: no / memory");
        assert_eq!(how(end(None, Some(9), "", None)), "QEMU was ended by signal 9");
        assert_eq!(how(end(None, Some(11), "", Some(C::GuestShutdown))), "QEMU was ended by signal 11");
        assert!(how(end(None, None, "", None)).contains("QEMU's keeper"));
        let word = "qemu-system-x86_64: terminating on signal 15 from pid 1 (init)";
        assert_eq!(
            how(end(Some(0), None, word, Some(C::Other("host-signal".into())))),
            format!("QEMU ended with code 0: {word} (host-signal)")
        );
        assert!(how(end(Some(2), None, &"x".repeat(4096), None)).len() <= 1000);
    }
}
