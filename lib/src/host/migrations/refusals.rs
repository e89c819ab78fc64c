//! How a destination refuses, in its source's ears.
//!
//! Owns: the codes that errors of this host have on the peer link. Must not know: what is refused when.

use crate::guest::MachineError;
use crate::host::HostError;
use crate::memory::MemoryError;
use crate::migration::MigrationFault;
use crate::migration::wire::Refused;
use crate::store::Trouble;

pub(in crate::host) fn refuse(code: &str, detail: impl Into<String>) -> Refused {
    Refused { code: code.into(), detail: detail.into() }
}

/// All reasons as one refusal: with the first one's code, in the words of all.
pub(in crate::host) fn first(against: Vec<Refused>) -> Refused {
    let code = against.first().map_or_else(|| "destination_failed".into(), |r| r.code.clone());
    let detail = against.into_iter().map(|r| r.detail).collect::<Vec<_>>().join("; ");
    Refused { code, detail }
}

/// A source that is neither known nor has a ticket.
pub(in crate::host) fn no_leave() -> Refused {
    refuse("ticket_invalid", "no ticket for this session and source")
}

pub(in crate::host) fn refused_by(e: &HostError) -> Refused {
    let code = match e {
        HostError::NoMemory(_) => "no_memory",
        HostError::NoResources { .. } => "no_resources",
        HostError::PlanRefused(_) => "plan_refused",
        HostError::CapabilityMissing { .. } => "capability_missing",
        HostError::PolicyForbids { .. } => "policy_forbids",
        HostError::NotLaunched { .. } => "helper_not_launched",
        HostError::Invalid(_) => "invalid",
        HostError::ImageFailed { .. } => "helper_image_failed",
        HostError::ShuttingDown => "shutting_down",
        HostError::Storage { trouble, .. } | HostError::Owed { trouble, .. } => storage_code(*trouble),
        // None of these is about a guest that comes.
        HostError::NotFound { .. }
        | HostError::NameTaken { .. }
        | HostError::WrongState { .. }
        | HostError::GuestMigrating { .. }
        | HostError::GuestUnconfirmed { .. }
        | HostError::GenerationMismatch { .. }
        | HostError::Maintenance
        | HostError::IdTaken { .. }
        | HostError::GuestMoved { .. }
        | HostError::InUse { .. }
        | HostError::PastPointOfNoReturn
        | HostError::DestinationIsSelf
        | HostError::DestinationRefuses(_)
        | HostError::PeerSilent(_)
        | HostError::MirrorAtLaunch
        | HostError::ImageNotLaunched
        | HostError::BatchRefused(_)
        | HostError::GuestNotReady { .. }
        | HostError::PlugRefused(_)
        | HostError::Internal { .. } => "destination_failed",
    };
    let detail = match e {
        HostError::PlanRefused(list) => list.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        e => e.to_string(),
    };
    refuse(code, detail)
}

pub(in crate::host) fn machine_refusal(e: &MachineError) -> Refused {
    tracing::warn!(error = %crate::host::faults::chain(e), "no machine could be made for an import");
    match e {
        MachineError::Memory(MemoryError::NotEnough(shortage)) => refuse("no_memory", shortage.to_string()),
        MachineError::Unsupported { .. } => refuse("capability_missing", e.to_string()),
        MachineError::BootFile { .. } | MachineError::BootFileChanged { .. } => {
            refuse("invalid", format!("/driver/{e}"))
        }
        MachineError::Parameters(_) => refuse("invalid", format!("/driver: {e}")),
        MachineError::NoUser => refuse("no_resources", e.to_string()),
        MachineError::Qemu(_) => {
            let crate::host::Fault { code, detail } = crate::host::faults::machine_fault(e);
            refuse(&code, detail)
        }
        MachineError::Hypervisor(_)
        | MachineError::Memory(
            MemoryError::Size { .. } | MemoryError::System { .. } | MemoryError::Map { .. },
        )
        | MachineError::Sev(_)
        | MachineError::Measurement
        | MachineError::Plug(_)
        | MachineError::TooSmall { .. }
        | MachineError::NothingPlugged
        | MachineError::HelperImage(_)
        | MachineError::BadState { .. }
        | MachineError::Ended(_)
        | MachineError::Thread(_) => refuse("destination_failed", e.to_string()),
    }
}

/// What a peer hears of a store that failed.
pub(in crate::host) fn not_stored(error: &HostError) -> Refused {
    tracing::error!(error = %crate::host::faults::chain(error), "an import could not be noted");
    let trouble = match error {
        HostError::Storage { trouble, .. } | HostError::Owed { trouble, .. } => *trouble,
        _ => Trouble::Failed,
    };
    refuse(storage_code(trouble), format!("the destination: {error}"))
}

pub(in crate::host) const fn storage_code(trouble: Trouble) -> &'static str {
    match trouble {
        Trouble::Full => "storage_full",
        Trouble::Busy | Trouble::Failed => "storage",
    }
}

pub(in crate::host) fn session_exists() -> Refused {
    refuse("session_exists", "the destination has seen this session")
}

/// Nobody can say whether there is a ticket, or note that it is used up.
pub(in crate::host) fn ticket_unread(error: &HostError) -> Refused {
    tracing::error!(error = %crate::host::faults::chain(error), "a ticket cannot be looked at");
    refuse("storage", "the destination's storage failed")
}

pub(in crate::host) fn no_room(error: std::io::Error) -> Refused {
    tracing::warn!(%error, "an incoming migration is refused: no disk space for its records");
    let error = MigrationFault::NoStorage(error);
    refuse(error.code(), format!("the destination: {error}"))
}
