//! Why a resource failed, as its record tells it.
//!
//! Owns: the codes that records have for errors of machines and of this host. Must not know: how a request is
//! answered.

use serde::{Deserialize, Serialize};

use super::HostError;
use crate::guest::{MachineEnd, MachineError};
use crate::memory::MemoryError;
use crate::migration::MigrationFault;
use crate::store::Trouble;

/// Why a resource is in a failed state, or what ended it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Stable code, `snake_case`.
    pub code: String,
    /// A sentence for people; never host paths, addresses of this process or key material.
    pub detail: String,
}

/// A machine's error as a guest's record shows it.
pub(super) fn machine_fault(e: &MachineError) -> Fault {
    let code = match e {
        MachineError::Memory(_) => "no_memory",
        MachineError::TooSmall { .. } | MachineError::NothingPlugged => "layout_unusable",
        MachineError::Ended(_) => "guest_ended",
        MachineError::Unsupported { .. } => "capability_missing",
        MachineError::BootFile { .. } => "boot_file_unusable",
        MachineError::BootFileChanged { .. } => "boot_file_changed",
        MachineError::Parameters(_) => "invalid_definition",
        MachineError::NoUser => "no_resources",
        MachineError::Qemu(e) if e.is_want_of_memory() => "no_memory",
        MachineError::Qemu(_) => "qemu_failed",
        MachineError::Measurement => "launch_measurement",
        MachineError::Sev(_) => "sev_refused",
        MachineError::Plug(_)
        | MachineError::Hypervisor(_)
        | MachineError::HelperImage(_)
        | MachineError::BadState { .. }
        | MachineError::Thread(_) => "machine_failed",
    };
    let detail = match e {
        MachineError::Memory(MemoryError::NotEnough(shortage)) => shortage.to_string(),
        MachineError::Qemu(e) => format!("QEMU did not do as told: {}", e.told()),
        e => e.to_string(),
    };
    Fault { code: code.into(), detail }
}

/// What ended a guest by itself, as its record shows it.
pub(super) fn end_fault(end: &MachineEnd) -> Fault {
    let (code, detail) = match end {
        MachineEnd::PowerOff => ("guest_powered_off", "the guest switched itself off".to_owned()),
        MachineEnd::Reset => (
            "guest_reset",
            "the guest asked for a reset (a reboot, a panic that reboots, or a triple fault), and a reset ends it as long as \
             machines cannot be reset: start it again"
                .to_owned(),
        ),
        MachineEnd::Panicked => ("guest_panicked", "the guest's operating system panicked".to_owned()),
        MachineEnd::Crashed { .. } => ("guest_crashed", end.to_string()),
        MachineEnd::Exited { .. } => ("qemu_failed", end.to_string()),
    };
    Fault { code: code.into(), detail }
}

/// A host's error as a migration's record shows it.
pub(super) fn host_fault(e: &HostError) -> Fault {
    let code = match e {
        HostError::NotFound { .. } => "not_found",
        HostError::DestinationIsSelf => "destination_is_self",
        HostError::DestinationRefuses(_) => "destination_refuses",
        HostError::PeerSilent(_) => "peer_failed",
        HostError::GuestMigrating { .. } => "guest_migrating",
        HostError::GuestUnconfirmed { .. } => "guest_unconfirmed",
        HostError::WrongState { .. } => "state_conflict",
        HostError::InUse { .. } => "in_use",
        HostError::PlanRefused(_) => "plan_refused",
        HostError::NoMemory(_) => "no_memory",
        HostError::NoResources { .. } => "no_resources",
        HostError::CapabilityMissing { .. } => "capability_missing",
        HostError::Invalid(_) => "invalid",
        HostError::PolicyForbids { .. } => "policy_forbids",
        HostError::MirrorAtLaunch => "mirror_at_launch",
        HostError::NotLaunched { .. } | HostError::ImageNotLaunched => "helper_not_launched",
        HostError::ImageFailed { .. } => "helper_image_failed",
        HostError::GuestNotReady { .. } => "guest_not_ready",
        HostError::PlugRefused(_)
        | HostError::BatchRefused(_)
        | HostError::NameTaken { .. }
        | HostError::GuestMoved { .. }
        | HostError::GenerationMismatch { .. }
        | HostError::IdTaken { .. }
        | HostError::Maintenance
        | HostError::PastPointOfNoReturn
        | HostError::ShuttingDown
        | HostError::Internal { .. } => "mirror_failed",
        HostError::Storage { trouble: Trouble::Full, .. }
        | HostError::Owed { trouble: Trouble::Full, .. } => "storage_full",
        HostError::Storage { trouble: Trouble::Busy, .. }
        | HostError::Owed { trouble: Trouble::Busy, .. } => "storage_busy",
        HostError::Storage { trouble: Trouble::Failed, .. }
        | HostError::Owed { trouble: Trouble::Failed, .. } => "storage_failed",
    };
    Fault { code: code.into(), detail: e.to_string() }
}

/// An error with its causes, for the log.
pub(super) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text.push_str(": ");
        text.push_str(&e.to_string());
        next = e.source();
    }
    text
}

/// A migration's fault as its record shows it.
pub(super) fn migration_fault(fault: &MigrationFault) -> Fault {
    Fault { code: fault.code().to_owned(), detail: fault.told() }
}
