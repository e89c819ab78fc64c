//! Guests as machines: started, paused, saved, restored, ended. One trait, an implementation per driver.
//!
//! Owns: machines, consoles, the pages that a guest shares. Must not know: mirrors, migrations, names,
//! storage.

mod attestation;
mod console;
mod dirty_ranges;
pub mod driver;
pub mod drivers;
pub mod embedded;
mod encryption;
pub mod helper_block;
pub mod lifecycle;
mod migration_control;
mod promises;
pub mod qemu;

use std::borrow::Cow;
use std::sync::Arc;

pub use attestation::{AttestationSpec, Hex};
pub use console::Console;
pub use dirty_ranges::{DirtyRanges, LoggedSlot};
pub use driver::{
    AccelChoice, BadParameters, DriverSpec, Fill, Labels, LaunchMirror, Parameters, ProtectionLevel, SevSpec,
    WorkloadSpec,
};
pub use drivers::{
    Driver, Drivers, EmbeddedDriver, EmulatedDriver, MissingCapability, QemuDriver, QemuGuest, WorkloadGuest,
};
pub use encryption::{EncryptionStatus, REPORT_PAGES_MAX, StatusError, StatusExtent};
pub use migration_control::{CarriedReadiness, MigrationControl, Readiness, ReadinessReason};
pub use promises::Promise;

use mirrorvm_abi::evidence::Release;

use crate::addr::Gpa;
use crate::address_space::{LayoutError, PspVia};
use crate::boot_files::FileRefusal;
use crate::hypervisor::HypervisorError;
use crate::memory::{GuestRam, Mapping, MemoryError};
use crate::pages::PageSet;
use crate::sev;

/// Why a RAM block was not plugged or unplugged; everything is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// No block has the name.
    #[error("there is no such RAM block")]
    NoBlock,
    /// It is plugged at another address.
    #[error("the block is plugged at {gpa}; unplug it first")]
    Elsewhere {
        /// Where.
        gpa: Gpa,
    },
    /// The guest runs from it, or it is the helper's.
    #[error("the guest cannot do without the block")]
    Needed,
    /// The guest still uses it, or is paused and cannot let go of it.
    #[error("the guest has not let go of the block")]
    InUse,
    /// The address cannot be.
    #[error("the address cannot be used")]
    Layout(#[source] LayoutError),
}

/// The helper of an SEV guest: loaded, encrypted and measured with the guest's launch. Its host cannot write
/// it later, so that a mirror finds everything there or cannot be made.
#[derive(Clone)]
pub struct LaunchedHelper {
    /// The guest's encryption context.
    pub context: Arc<dyn sev::Context>,
    /// Whether vCPU registers are encrypted: a mirror's vCPUs then must exist before the launch ends.
    pub es: bool,
    /// Whether the guest's launch has ended.
    pub finished: bool,
    /// The guest's policy.
    pub policy: sev::Policy,
    /// The platform's certificate, to which `send-receive` addresses itself.
    pub platform: Arc<dyn sev::Platform>,
    /// What was loaded for the strategies: offset in the helper's block, SHA-256 of the bytes.
    pub sets: Arc<[(u64, [u8; 32])]>,
    /// What the guest's owner demands of a destination; `None` before the launch has ended.
    pub release: Option<Arc<Release>>,
    /// A second copy for `psp-copied` by launch-update: no address of the guest leads to it. Registered
    /// through the guest, so that it stays where its ciphertext is valid.
    pub private: Arc<Mapping>,
}

impl LaunchedHelper {
    /// Whether a way of `psp-copied` is open to this guest's policy and platform.
    ///
    /// # Errors
    /// The reason why not.
    pub fn check_via(&self, via: PspVia) -> Result<(), sev::NotSent> {
        match via {
            PspVia::LaunchUpdate => Ok(()),
            PspVia::SendReceive => {
                let why = sev::NotSent::reason(self.es, self.platform.is_modelled(), self.policy);
                why.map_or(Ok(()), Err)
            }
        }
    }
}

/// Why a machine could not be made or did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error("the hypervisor refused")]
    Hypervisor(#[from] HypervisorError),
    /// Memory.
    #[error("memory for the guest could not be had")]
    Memory(#[from] MemoryError),
    /// SEV.
    #[error("SEV refused")]
    Sev(#[from] sev::SevError),
    /// The launch measurement is not what was loaded.
    #[error("the launch measurement is not that of what was loaded")]
    Measurement,
    /// A RAM block.
    #[error("the RAM block cannot be plugged or unplugged")]
    Plug(#[from] PlugError),
    /// The guest does not fit its RAM.
    #[error("the first RAM block has {have} bytes, the workload needs {need}")]
    TooSmall {
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// No RAM block that a guest could start from.
    #[error("no RAM block is plugged")]
    NothingPlugged,
    /// The helper image cannot be used.
    #[error("the helper image cannot be used")]
    HelperImage(#[source] mirrorvm_abi::header::HeaderError),
    /// A saved state that is not one of this machine.
    #[error("the saved state does not fit: {what}")]
    BadState {
        /// What is wrong.
        what: &'static str,
    },
    /// The guest ended by itself.
    #[error("the guest has ended: {0}")]
    Ended(MachineEnd),
    /// A thread could not be started.
    #[error("a vCPU thread could not be started")]
    Thread(#[source] std::io::Error),
    /// The driver cannot do it.
    #[error("this driver cannot {what}")]
    Unsupported {
        /// What.
        what: &'static str,
    },
    /// A file that the guest boots from cannot be used any more.
    #[error("{field}: {refusal}")]
    BootFile {
        /// Which of the definition's fields names it: `kernel`, `disks/0/path`.
        field: Cow<'static, str>,
        /// Why.
        refusal: FileRefusal,
    },
    /// A file that the guest boots from has another content than when the guest was defined.
    #[error(
        "{field}: the file has changed since the guest was defined; put the old one back, or define the guest again"
    )]
    BootFileChanged {
        /// Which of the definition's fields names it: `kernel`, `initrd`.
        field: &'static str,
    },
    /// Parameters that are none of the driver's.
    #[error("the definition cannot be used")]
    Parameters(#[source] BadParameters),
    /// Every user that QEMU processes may run as has one.
    #[error("all users that QEMU may run as are taken; list more of them in qemu_users")]
    NoUser,
    /// QEMU.
    #[error("QEMU did not do as told")]
    Qemu(#[source] Box<crate::qemu::QemuError>),
}

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineEnd {
    /// It switched itself off.
    #[error("it switched itself off")]
    PowerOff,
    /// It asked for a reset.
    #[error(
        "it asked for a reset (a reboot, a panic that reboots, or a triple fault), and machines are not reset yet"
    )]
    Reset,
    /// Its operating system said that it cannot go on.
    #[error("its operating system panicked")]
    Panicked,
    /// A vCPU could not go on.
    #[error("a vCPU stopped: {what}{}", At(*rip))]
    Crashed {
        /// Why.
        what: &'static str,
        /// Its instruction pointer then, where it can be read. After a triple fault on AMD's processors that
        /// of a reset vCPU; the log tells of the exits before.
        rip: Option<u64>,
    },
    /// The process that was its machine went away without the guest having asked for it.
    #[error("its machine's process ended: {how}")]
    Exited {
        /// Exit code or signal, and the last of what it said. Bounded and printable.
        how: String,
    },
}

/// What happens to a machine that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineNews {
    /// The host could not read or write a disk, and the guest is paused until it is resumed.
    DiskFailed {
        /// The disk.
        disk: String,
        /// Whether there was no room.
        full: bool,
    },
}

/// Tells whether a guest has ended by itself, without its machine: for those who wait while somebody else has
/// that.
#[derive(Clone)]
pub struct EndWatch(Arc<dyn Fn() -> Option<MachineEnd> + Send + Sync>);

impl EndWatch {
    /// A watch that asks `look`, which must not block.
    pub fn new(look: impl Fn() -> Option<MachineEnd> + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// How the guest ended, if it has.
    pub fn look(&self) -> Option<MachineEnd> {
        (self.0)()
    }
}

/// Where a vCPU stood, for people.
struct At(Option<u64>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |rip| write!(f, ", at rip {rip:#x}"))
    }
}

/// Called once, from a thread of the machine, when a guest ends by itself.
pub type OnEnd = Arc<dyn Fn(MachineEnd) + Send + Sync>;

/// A guest's body. Belongs to one owner at a time; calls block, but not for long.
pub trait Machine: Send {
    /// Its memory.
    fn ram(&self) -> &GuestRam;

    /// Its console.
    fn console(&self) -> &Arc<Console>;

    /// Which pages it shares with its host.
    fn encryption(&self) -> &Arc<EncryptionStatus>;

    /// Whether the guest says that it can be migrated.
    fn migration_control(&self) -> &Arc<MigrationControl>;

    /// Whether a guest of this machine writes MSR_KVM_MIGRATION_CONTROL as soon as it runs.
    fn announces_itself(&self) -> bool {
        false
    }

    /// The secret that its helper's keys come from. The host makes and holds it: at protection level `none`
    /// because there is nobody else, at the others because this build plays the guest's owner too.
    fn migration_secret(&self) -> &[u8; 32];

    /// SEV: measures, checks, delivers the secret, ends the launch. No effect without SEV or when done.
    /// `mirror_areas`: SEV-ES, the save areas of the mirror that was made meanwhile.
    ///
    /// # Errors
    /// The machine is of no use then.
    fn finish_launch(&mut self, mirror_areas: &[Vec<u8>]) -> Result<(), MachineError> {
        let _ = mirror_areas;
        Ok(())
    }

    /// SEV: what a mirror finds. `None`: the host loads the helper whenever it likes.
    fn launched_helper(&self) -> Option<LaunchedHelper> {
        None
    }

    /// SHA-256 of every page as the guest sees it, by a path that does not go through the helper: see
    /// [`crate::memory::page_digests`]. `None` when nobody but the guest can read it.
    fn page_digests(&self) -> Option<Vec<[u8; 16]>> {
        Some(crate::memory::page_digests(self.ram(), |_, mapping, at, to| mapping.read(at, to)))
    }

    /// Gives an unplugged block a guest physical address, while the guest runs or is paused.
    ///
    /// # Errors
    /// [`MachineError::Plug`]; everything is as before.
    fn plug(&mut self, name: &str, gpa: Gpa) -> Result<(), MachineError> {
        let _ = (name, gpa);
        Err(MachineError::Unsupported { what: "plug RAM blocks" })
    }

    /// Takes a block's address away when the guest has let go of it; content and encryption status stay.
    ///
    /// # Errors
    /// [`MachineError::Plug`]; everything is as before.
    fn unplug(&mut self, name: &str) -> Result<(), MachineError> {
        let _ = name;
        Err(MachineError::Unsupported { what: "unplug RAM blocks" })
    }

    /// Lets the vCPUs run. No effect when they do.
    ///
    /// # Errors
    /// The machine stays paused.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Holds all vCPUs; returns when none executes an instruction any more. No effect when they are held.
    ///
    /// # Errors
    /// The machine may still run.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Whether writes of the guest can be logged while it runs.
    fn can_log_dirty(&self) -> bool;

    /// Starts or stops logging writes.
    ///
    /// # Errors
    /// [`MachineError::Unsupported`] when it cannot.
    fn log_dirty(&mut self, on: bool) -> Result<(), MachineError>;

    /// Adds the pages written since the last call to `dirty`.
    ///
    /// # Errors
    /// When logging is off, or the kernel fails.
    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), MachineError>;

    /// The log of written pages, to be looked at and cleared in pieces while the guest runs; `None` where
    /// that is not to be had or logging is off. What it gives is good until logging ends.
    fn dirty_ranges(&self) -> Option<DirtyRanges> {
        None
    }

    /// Holds the vCPUs for `percent` of their time, 0 to 99, so that the guest writes less; 0 ends it.
    ///
    /// # Errors
    /// [`MachineError::Unsupported`] when it cannot.
    fn throttle(&mut self, percent: u8) -> Result<(), MachineError> {
        if percent == 0 { Ok(()) } else { Err(MachineError::Unsupported { what: "hold back its vCPUs" }) }
    }

    /// Whether it can.
    fn can_throttle(&self) -> bool {
        false
    }

    /// vCPU and device state, while paused. What follows on `pause` before pages are moved a last time:
    /// saving may touch memory.
    ///
    /// # Errors
    /// The machine stays paused and whole.
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Sets vCPU and device state, while paused, after memory has arrived.
    ///
    /// # Errors
    /// The machine is of no use then.
    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// Whether the guest has ended by itself, for others than the machine's owner.
    fn end_watch(&self) -> EndWatch;

    /// Whether the guest has ended by itself.
    fn ended(&self) -> Option<MachineEnd> {
        self.end_watch().look()
    }

    /// What happened to it since the last call that is not its end; for its owner alone, who asks now and
    /// then.
    fn news(&mut self) -> Vec<MachineNews> {
        Vec::new()
    }

    /// What the destination needs to make the same machine: QEMU's exact machine type.
    ///
    /// # Errors
    /// When it cannot be learnt.
    fn machine_type(&mut self) -> Result<Option<String>, MachineError> {
        Ok(None)
    }

    /// Process id of a machine that is another process.
    fn pid(&self) -> Option<u32> {
        None
    }
}
