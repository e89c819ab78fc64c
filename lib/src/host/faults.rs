//! Why a resource failed, as its record tells it.
//!
//! Owns: the sentences that records have for errors of machines and of this host; `codes` has the codes. Must
//! not know: how a request is answered.

use super::HostError;
use super::codes::{codes_of, of_end, of_machine};
use crate::codes::{AnyCode, Code};
use crate::guest::{MachineEnd, MachineError};
use crate::memory::MemoryError;
use crate::migration::MigrationFault;

/// Why a resource is in a failed state, or what ended it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Stable code. That of a migration can be its peer's.
    pub code: AnyCode,
    /// A sentence for people; never host paths, addresses of this process or key material.
    pub detail: String,
}

impl Fault {
    /// A fault of this code.
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code: code.into(), detail: detail.into() }
    }
}

/// A machine's error as a guest's record shows it.
pub(super) fn machine_fault(e: &MachineError) -> Fault {
    let (code, _) = of_machine(e);
    let detail = match e {
        MachineError::Memory(MemoryError::NotEnough(shortage)) => shortage.to_string(),
        MachineError::Qemu(e) => format!("QEMU did not do as told: {}", e.told()),
        e => e.to_string(),
    };
    Fault::new(code, detail)
}

/// What ended a guest by itself, as its record shows it.
pub(super) fn end_fault(end: &MachineEnd) -> Fault {
    let detail = match end {
        MachineEnd::PowerOff => "the guest switched itself off".to_owned(),
        MachineEnd::Reset => {
            "the guest asked for a reset (a reboot, a panic that reboots, or a triple fault), and a reset ends it as long as \
             machines cannot be reset: start it again"
                .to_owned()
        }
        MachineEnd::Panicked => "the guest's operating system panicked".to_owned(),
        MachineEnd::Crashed { .. } | MachineEnd::Exited { .. } => end.to_string(),
    };
    Fault::new(of_end(end), detail)
}

/// A disk that held its guest up.
pub(super) fn disk_fault(disk: &str, full: bool) -> Fault {
    let why =
        if full { "there is no room for what the guest writes to" } else { "the host cannot read or write" };
    Fault::new(
        Code::IoError,
        format!("{why} the disk {disk}; the guest is paused, and tries again when it is resumed"),
    )
}

/// A host's error as a migration's record shows it.
pub(super) fn host_fault(e: &HostError) -> Fault {
    Fault::new(codes_of(e).record, e.to_string())
}

/// A migration's fault as its record shows it.
pub(super) fn migration_fault(fault: &MigrationFault) -> Fault {
    Fault { code: fault.code(), detail: fault.told() }
}
