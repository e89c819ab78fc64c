//! The one table from what goes wrong in a host to the codes that are published of it.
//!
//! Owns: of each error the answer to a request, the code in a record, the refusal that a peer hears, and the
//! finding with what would help. Must not know: the details that go along, HTTP: the daemon's catalogue has a
//! status for each answer. A new error does not compile before it is here.

use crate::codes::{Answer, AnyCode, Capability, Code, PeerRefusal, THEIR_LINK};
use crate::guest::{MachineEnd, MachineError};
use crate::host::{HostError, PeerSilence, ResourceKind, Subject};
use crate::memory::MemoryError;
use crate::store::Trouble;

/// What helps against a fault of this host.
pub(super) const LOG: &str = "look into the daemon's log";

/// The codes of one error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Codes {
    /// Answers the request.
    pub answer: Answer,
    /// Stands in the record of a resource that failed over it.
    pub record: Code,
    /// What the source of a guest hears that would come.
    pub refusal: PeerRefusal,
    /// What a look at a migration calls it; of errors that have reasons of their own, these are shown
    /// instead.
    pub finding: Code,
    /// What would help then.
    pub fix: &'static str,
}

impl Codes {
    /// One code for request, record and finding. Most errors are not about a guest that comes.
    const fn of(answer: Answer, fix: &'static str) -> Self {
        let code = answer.code();
        Self { answer, record: code, refusal: PeerRefusal::DestinationFailed, finding: code, fix }
    }

    /// Not to be expected of a migration: should one meet it all the same, this host is at fault.
    const fn unexpected(answer: Answer) -> Self {
        Self::of(answer, LOG).recorded(Code::MirrorFailed).found(Code::HostFailed)
    }

    const fn recorded(self, record: Code) -> Self {
        Self { record, ..self }
    }

    const fn refused(self, refusal: PeerRefusal) -> Self {
        Self { refusal, ..self }
    }

    const fn found(self, finding: Code) -> Self {
        Self { finding, ..self }
    }
}

impl HostError {
    /// The code that answers the request.
    pub const fn answer(&self) -> Answer {
        codes_of(self).answer
    }
}

/// The codes of a host's error.
pub(super) const fn codes_of(error: &HostError) -> Codes {
    match error {
        HostError::NotFound { kind: Subject::Resource(ResourceKind::PeerHost), .. } => {
            Codes::of(Answer::NotFound, NAME_ONE).found(Code::PeerUnknown)
        }
        HostError::NotFound { .. } => Codes::of(Answer::NotFound, NAME_ONE),
        HostError::NameTaken { .. } => Codes::unexpected(Answer::NameTaken),
        HostError::Invalid(_) => {
            Codes::of(Answer::ValidationFailed, "correct the value that the pointer names")
                .recorded(Code::Invalid)
                .refused(PeerRefusal::Invalid)
        }
        HostError::WrongState { .. } => Codes::of(Answer::StateConflict, "start the guest first"),
        HostError::GuestMigrating { .. } => {
            Codes::of(Answer::GuestMigrating, "wait for its migration, or cancel it")
        }
        HostError::GuestUnconfirmed { .. } => Codes::of(
            Answer::GuestUnconfirmed,
            "wait until all known peers have answered, or confirm the guest",
        ),
        HostError::GenerationMismatch { .. } => Codes::unexpected(Answer::PreconditionFailed),
        HostError::Maintenance => {
            Codes::of(Answer::HostInMaintenance, "unset maintenance with PATCH /v1/host")
                .recorded(Code::MirrorFailed)
        }
        HostError::IdTaken { .. } => {
            Codes::of(Answer::IdTaken, "choose another id; a ticket is good for one migration")
                .recorded(Code::MirrorFailed)
        }
        HostError::GuestMoved { .. } => {
            Codes::of(Answer::GuestMoved, "ask the host that has it").recorded(Code::MirrorFailed)
        }
        HostError::InUse { kind: ResourceKind::Guest, .. } => Codes::of(Answer::InUse, THROUGH_IT),
        HostError::InUse { .. } => Codes::of(Answer::InUse, "remove what uses it first, or name it"),
        HostError::LayoutUnusable { .. } => Codes::of(Answer::LayoutUnusable, LARGER_BLOCK),
        HostError::PastPointOfNoReturn => Codes::unexpected(Answer::PastPointOfNoReturn),
        HostError::DestinationIsSelf => Codes::of(Answer::ValidationFailed, "choose another host")
            .recorded(Code::DestinationIsSelf)
            .found(Code::DestinationIsSelf),
        HostError::DestinationRefuses(_) => {
            Codes::of(Answer::DestinationRefuses, "each reason says what would help")
        }
        HostError::PeerSilent(silence) => {
            Codes::of(of_silence(silence), THEIR_LINK).recorded(Code::PeerFailed)
        }
        HostError::PlanRefused(_) => {
            Codes::of(Answer::PlanRefused, PeerRefusal::PlanRefused.fix()).refused(PeerRefusal::PlanRefused)
        }
        HostError::PolicyForbids { .. } => Codes::of(Answer::PolicyForbids, PeerRefusal::PolicyForbids.fix())
            .refused(PeerRefusal::PolicyForbids),
        HostError::MirrorAtLaunch => Codes::of(
            Answer::MirrorAtLaunch,
            "migrate through the mirror that the guest has, or name another in driver.sev.mirror and start it anew",
        ),
        HostError::NotLaunched { .. } => {
            Codes::of(Answer::HelperNotLaunched, AS_LAUNCHED).refused(PeerRefusal::HelperNotLaunched)
        }
        HostError::ImageNotLaunched => Codes::of(Answer::HelperNotLaunched, AS_LAUNCHED),
        HostError::ImageFailed { .. } => {
            Codes::of(Answer::HelperImageFailed, "PUT the same content again, or name another helper image")
                .refused(PeerRefusal::HelperImageFailed)
        }
        HostError::BatchRefused(_) => Codes::unexpected(Answer::BatchRefused),
        HostError::GuestNotReady { .. } => Codes::of(
            Answer::GuestNotReady,
            "wait until the guest announces itself; migration_readiness shows it",
        ),
        HostError::PlugRefused(_) => Codes::unexpected(Answer::PlugRefused),
        HostError::CapabilityMissing { what: Capability::Throttling, .. } => Codes::of(
            Answer::CapabilityMissing,
            "leave auto_throttle off, and choose on_timeout cancel or force",
        )
        .refused(PeerRefusal::CapabilityMissing),
        HostError::CapabilityMissing { .. } => {
            Codes::of(Answer::CapabilityMissing, "`missing` of /v1/host/capabilities says what would help")
                .refused(PeerRefusal::CapabilityMissing)
        }
        HostError::NoMemory(_) => Codes::of(Answer::NoMemory, "stop a guest, or give the daemon more memory")
            .refused(PeerRefusal::NoMemory),
        HostError::NoResources { .. } => Codes::of(Answer::NoResources, "free some of what the detail names")
            .refused(PeerRefusal::NoResources),
        HostError::ShuttingDown => Codes::of(Answer::ShuttingDown, "try again when the daemon runs again")
            .recorded(Code::MirrorFailed)
            .refused(PeerRefusal::ShuttingDown),
        HostError::Storage { trouble, .. } | HostError::Owed { trouble, .. } => of_trouble(*trouble),
        HostError::Internal { .. } => Codes::unexpected(Answer::Internal),
    }
}

const NAME_ONE: &str = "add the destination with POST /v1/hosts, or name a mirror that exists";
/// A guest that leaves has one mirror, through which it leaves.
const THROUGH_IT: &str = "migrate through the mirror that the guest has: name it by \"mirror\": {\"kind\": \"existing\", \"mirror\": ID} in the request; or DELETE it first";
const LARGER_BLOCK: &str =
    "define the guest anew with a larger first block, or a driver that needs less; the detail says how much";
const AS_LAUNCHED: &str = "use a strategy as GET /v1/strategies lists it, and the built-in helper image";

/// Of a store that does not take what is to be kept.
const fn of_trouble(trouble: Trouble) -> Codes {
    let disk = "look at the disk of the state directory";
    match trouble {
        Trouble::Full => {
            Codes::of(Answer::StorageFull, "free space in the file system of the state directory")
                .refused(PeerRefusal::StorageFull)
        }
        Trouble::Busy => {
            Codes::of(Answer::StorageBusy, disk).refused(PeerRefusal::Storage).found(Code::StorageFailed)
        }
        Trouble::Failed => Codes::of(Answer::StorageFailed, disk).refused(PeerRefusal::Storage),
    }
}

/// The answer to a request over which a peer did not do its part. Two reasons have an answer of their own; of
/// the others it counts whether it was a matter of time.
const fn of_silence(silence: &PeerSilence) -> Answer {
    match (&silence.code, silence.timed_out) {
        (AnyCode::Known(Code::PeerNotMirrorvm), _) => Answer::PeerNotMirrorvm,
        (AnyCode::Known(Code::PeerUnresolved), _) => Answer::PeerUnresolved,
        (AnyCode::Known(_) | AnyCode::Other(_), true) => Answer::PeerTimedOut,
        (AnyCode::Known(_) | AnyCode::Other(_), false) => Answer::PeerFailed,
    }
}

/// The code of a machine's error in a record, and what the source of a guest hears for which no machine can
/// be made.
pub(super) fn of_machine(error: &MachineError) -> (Code, PeerRefusal) {
    match error {
        MachineError::Memory(MemoryError::NotEnough(_)) => (Code::NoMemory, PeerRefusal::NoMemory),
        MachineError::Memory(
            MemoryError::Size { .. } | MemoryError::System { .. } | MemoryError::Map { .. },
        ) => (Code::NoMemory, PeerRefusal::DestinationFailed),
        MachineError::TooSmall { .. } | MachineError::NothingPlugged => {
            (Code::LayoutUnusable, PeerRefusal::DestinationFailed)
        }
        MachineError::Ended(_) => (Code::GuestEnded, PeerRefusal::DestinationFailed),
        MachineError::Unsupported { .. } => (Code::CapabilityMissing, PeerRefusal::CapabilityMissing),
        MachineError::BootFile { .. } => (Code::BootFileUnusable, PeerRefusal::Invalid),
        MachineError::BootFileChanged { .. } => (Code::BootFileChanged, PeerRefusal::Invalid),
        MachineError::Parameters(_) => (Code::InvalidDefinition, PeerRefusal::Invalid),
        MachineError::NoUser => (Code::NoResources, PeerRefusal::NoResources),
        MachineError::Qemu(e) if e.is_want_of_memory() => (Code::NoMemory, PeerRefusal::NoMemory),
        MachineError::Qemu(_) => (Code::QemuFailed, PeerRefusal::QemuFailed),
        MachineError::Measurement => (Code::LaunchMeasurement, PeerRefusal::DestinationFailed),
        MachineError::Sev(_) => (Code::SevRefused, PeerRefusal::DestinationFailed),
        MachineError::Plug(_)
        | MachineError::Hypervisor(_)
        | MachineError::HelperImage(_)
        | MachineError::BadState { .. }
        | MachineError::Thread(_) => (Code::MachineFailed, PeerRefusal::DestinationFailed),
    }
}

/// The code of a guest's own end in its record.
pub(super) const fn of_end(end: &MachineEnd) -> Code {
    match end {
        MachineEnd::PowerOff => Code::GuestPoweredOff,
        MachineEnd::Reset => Code::GuestReset,
        MachineEnd::Panicked => Code::GuestPanicked,
        MachineEnd::Crashed { .. } => Code::GuestCrashed,
        MachineEnd::Exited { .. } => Code::QemuFailed,
    }
}

#[cfg(test)]
mod tests;
