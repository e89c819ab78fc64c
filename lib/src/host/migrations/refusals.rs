//! How a destination refuses, in its source's ears.
//!
//! Owns: the sentences that errors of this host have on the peer link; `host::codes` has the codes. Must not
//! know: what is refused when.

use crate::chain::chain;
use crate::codes::PeerRefusal;
use crate::guest::MachineError;
use crate::host::HostError;
use crate::host::codes::{codes_of, of_machine};
use crate::host::faults::machine_fault;
use crate::memory::MemoryError;
use crate::migration::MigrationFault;
use crate::migration::wire::Refused;

pub(in crate::host) fn refuse(code: PeerRefusal, detail: impl Into<String>) -> Refused {
    Refused { code: code.into(), detail: detail.into() }
}

/// All reasons as one refusal: with the first one's code, in the words of all.
pub(in crate::host) fn first(against: Vec<Refused>) -> Refused {
    let code = against.first().map_or_else(|| PeerRefusal::DestinationFailed.into(), |r| r.code.clone());
    let detail = against.into_iter().map(|r| r.detail).collect::<Vec<_>>().join("; ");
    Refused { code, detail }
}

/// A source that is neither known nor has a ticket.
pub(in crate::host) fn no_leave() -> Refused {
    refuse(PeerRefusal::TicketInvalid, "no ticket for this session and source")
}

pub(in crate::host) fn refused_by(e: &HostError) -> Refused {
    let detail = match e {
        HostError::PlanRefused(list) => list.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        e => e.to_string(),
    };
    refuse(codes_of(e).refusal, detail)
}

pub(in crate::host) fn machine_refusal(e: &MachineError) -> Refused {
    tracing::warn!(error = %chain(e), "no machine could be made for an import");
    let (_, code) = of_machine(e);
    let detail = match e {
        MachineError::Memory(MemoryError::NotEnough(_)) | MachineError::Qemu(_) => machine_fault(e).detail,
        // The field is part of what these say.
        MachineError::BootFile { .. } | MachineError::BootFileChanged { .. } => format!("/driver/{e}"),
        MachineError::Parameters(_) => format!("/driver: {e}"),
        e => e.to_string(),
    };
    refuse(code, detail)
}

/// What a peer hears of a store that failed.
pub(in crate::host) fn not_stored(error: &HostError) -> Refused {
    tracing::error!(error = %chain(error), "an import could not be noted");
    // Whatever kept a record from being written: for the source it is the store.
    let full = codes_of(error).refusal == PeerRefusal::StorageFull;
    let code = if full { PeerRefusal::StorageFull } else { PeerRefusal::Storage };
    refuse(code, format!("the destination: {error}"))
}

pub(in crate::host) fn session_exists() -> Refused {
    refuse(PeerRefusal::SessionExists, "the destination has seen this session")
}

/// Nobody can say whether there is a ticket, or note that it is used up.
pub(in crate::host) fn ticket_unread(error: &HostError) -> Refused {
    tracing::error!(error = %chain(error), "a ticket cannot be looked at");
    refuse(PeerRefusal::Storage, "the destination's storage failed")
}

pub(in crate::host) fn no_room(error: std::io::Error) -> Refused {
    tracing::warn!(%error, "an incoming migration is refused: no disk space for its records");
    let error = MigrationFault::NoStorage(error);
    Refused { code: error.code(), detail: format!("the destination: {error}") }
}
