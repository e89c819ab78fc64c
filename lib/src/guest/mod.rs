//! Guests as machines: started, paused, saved, restored, ended. One trait, an implementation per driver.
//!
//! Owns: machines, consoles, the pages that a guest shares. Must not know: mirrors, migrations, names, storage.

mod console;
pub mod embedded;
mod encryption;
pub mod lifecycle;
pub mod qemu;

use std::sync::Arc;

pub use console::Console;
pub use encryption::{EncryptionStatus, StatusError};

use crate::hypervisor::HypervisorError;
use crate::memory::{GuestRam, MemoryError};
use crate::pages::PageSet;

/// Why a machine could not be made or did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error("the hypervisor refused")]
    Hypervisor(#[from] HypervisorError),
    /// Memory.
    #[error("memory for the guest could not be had")]
    Memory(#[from] MemoryError),
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
    /// QEMU.
    #[error("QEMU did not do as told")]
    Qemu(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How a guest ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineEnd {
    /// It switched itself off.
    #[error("it switched itself off")]
    PowerOff,
    /// A vCPU could not go on.
    #[error("a vCPU stopped: {what}")]
    Crashed {
        /// Why.
        what: &'static str,
    },
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

    /// The secret that its helper's keys come from. At protection level `none` the host makes and holds it.
    fn migration_secret(&self) -> &[u8; 32];

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

    /// vCPU and device state, while paused. What follows on `pause` before pages are moved a last time: saving may
    /// touch memory.
    ///
    /// # Errors
    /// The machine stays paused and whole.
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Sets vCPU and device state, while paused, after memory has arrived.
    ///
    /// # Errors
    /// The machine is of no use then.
    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// Whether the guest has ended by itself.
    fn ended(&self) -> Option<MachineEnd>;

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
