//! Why a migration did not come to its end.

use super::NotRun;
use crate::chain::chain;
use crate::codes::{AnyCode, Code};
use crate::guest::{MachineEnd, MachineError};
use crate::mirror::{LaneError, MirrorError};
use crate::transport::{AlertDescription, CertRefusal, LinkError};

/// Why a migration ended, or is in doubt.
#[derive(Debug, thiserror::Error)]
pub enum MigrationFault {
    /// Called off by request.
    #[error("canceled")]
    Canceled,
    /// The peer could not be reached or refused the link.
    #[error("no link to the destination")]
    Connect(#[source] LinkError),
    /// An established link broke.
    #[error("the link to the peer broke")]
    PeerLost(#[source] LinkError),
    /// The peer closed the link where more had to come.
    #[error("the peer ended the link early")]
    PeerGone,
    /// The peer refuses, with its reason.
    #[error("the peer refuses: {detail}")]
    PeerRefused {
        /// The peer's code, checked to be one.
        code: AnyCode,
        /// The peer's sentence, bounded and printable.
        detail: String,
    },
    /// The peer sent what the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// No common protocol version.
    #[error("the peer speaks protocol versions {}, this host {}", numbers(theirs), numbers(ours))]
    Version {
        /// Theirs, the first few.
        theirs: Vec<u32>,
        /// Ours.
        ours: Vec<u32>,
    },
    /// The helper.
    #[error("the migration helper failed")]
    Helper(#[from] LaneError),
    /// The mirror.
    #[error("the mirror could not be made")]
    Mirror(#[from] MirrorError),
    /// The guest's machine.
    #[error("the guest's machine failed")]
    Machine(#[from] MachineError),
    /// At a destination: the machine that waited for the guest ended. The guest runs on at the source.
    #[error("the machine that waited for the guest ended: {0}")]
    PlaceLost(MachineEnd),
    /// The guest dirties memory faster than it moves.
    #[error(
        "not converging: the guest dirties {dirty_pages_per_second} pages/s, {pages_per_second} pages/s move{}",
        Floor(*floor_ms)
    )]
    NotConverging {
        /// Measured over the last round.
        dirty_pages_per_second: u64,
        /// Measured over the last round.
        pages_per_second: u64,
        /// The shortest pause that could be had, milliseconds, when it is longer than the limit.
        floor_ms: Option<u64>,
    },
    /// A private page that the helper cannot reach under the mirror's strategy: it was unplugged, or its
    /// status changed, after the mirror was planned.
    #[error("private page {page} of RAM is out of the helper's reach")]
    Unreachable {
        /// Its number.
        page: u64,
    },
    /// The guest shares its pages in more pieces than a migration carries.
    #[error("the guest shares its pages in too many pieces")]
    Fragmented,
    /// Pages at the destination are not what the source has: the guest must not run there.
    #[error("{pages} pages at the destination are not what the source has")]
    AuditMismatch {
        /// How many.
        pages: u64,
    },
    /// The audit came to no verdict, without which the guest must not run at the destination.
    #[error("the audit before COMMIT came to no verdict: {}", why.name())]
    AuditNotRun {
        /// Why.
        why: NotRun,
    },
    /// The guest's owner demands evidence of the destination, and there is none.
    #[error("the guest's owner demands evidence of the destination, and there is none: {why}")]
    EvidenceMissing {
        /// Why not.
        why: &'static str,
    },
    /// The destination's evidence is not what the guest's owner demands: the helper makes no keys with it,
    /// and no page left.
    #[error("the helper refuses the destination's evidence: {why}")]
    EvidenceRefused {
        /// What this host sees is wrong with it. The helper told no reason.
        why: &'static str,
    },
    /// An administrator said that the destination never took the guest.
    #[error("an administrator said that the destination never took the guest")]
    Resolved,
    /// No room can be set aside for the records of a hand-over, so it does not begin.
    #[error("no disk space can be set aside in the state directory to store how the migration ends: {0}")]
    NoStorage(std::io::Error),
    /// The journal could not be written, so START was not sent.
    #[error("the journal could not be written")]
    Journal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What would help where the limit of the pause is what stands in the way.
struct Floor(Option<u64>);

impl std::fmt::Display for Floor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(ms) = self.0 else { return Ok(()) };
        write!(
            f,
            "; the shortest pause is about {ms} ms: raise limits.downtime_ms to that, or choose on_timeout force"
        )
    }
}

impl MigrationFault {
    /// Stable code; a peer's own where that refused.
    pub fn code(&self) -> AnyCode {
        match self {
            Self::PeerRefused { code, .. } => return code.clone(),
            Self::Canceled => Code::Canceled,
            Self::Unreachable { .. } => Code::PageUnreachable,
            Self::Fragmented => Code::PageStatusFragmented,
            Self::Connect(error) => of_connecting(error),
            Self::PeerLost(_) | Self::PeerGone => Code::PeerLost,
            Self::Protocol(_) => Code::PeerProtocol,
            Self::Version { .. } => Code::PeerVersion,
            Self::Helper(_) => Code::HelperFailed,
            Self::Mirror(_) => Code::MirrorFailed,
            Self::Machine(MachineError::Ended(_)) => Code::GuestEnded,
            Self::Machine(_) => Code::GuestFailed,
            Self::PlaceLost(_) => Code::DestinationFailed,
            Self::NotConverging { .. } => Code::NotConverging,
            Self::AuditMismatch { .. } => Code::AuditMismatch,
            Self::AuditNotRun { .. } => Code::AuditNotRun,
            Self::EvidenceMissing { .. } => Code::EvidenceMissing,
            Self::EvidenceRefused { .. } => Code::EvidenceRefused,
            Self::Resolved => Code::Resolved,
            Self::NoStorage(e) => {
                use std::io::ErrorKind::{QuotaExceeded, StorageFull};
                let full = matches!(e.kind(), StorageFull | QuotaExceeded);
                if full { Code::StorageFull } else { Code::Storage }
            }
            Self::Journal(_) => Code::Journal,
        }
        .into()
    }

    /// What whoever asks for the migration is told. Details of our own faults may name paths; the log has
    /// them. What QEMU did not do names none.
    pub fn told(&self) -> String {
        match self {
            Self::Machine(MachineError::Ended(end)) => format!("the guest has ended: {end}"),
            Self::Machine(MachineError::Qemu(e)) => format!("{self}: QEMU did not do as told: {}", e.told()),
            Self::Machine(_) | Self::Mirror(_) | Self::Journal(_) => self.to_string(),
            Self::Canceled
            | Self::Connect(_)
            | Self::PeerLost(_)
            | Self::PeerGone
            | Self::PeerRefused { .. }
            | Self::Protocol(_)
            | Self::Version { .. }
            | Self::Helper(_)
            | Self::PlaceLost(_)
            | Self::NotConverging { .. }
            | Self::Unreachable { .. }
            | Self::Fragmented
            | Self::AuditMismatch { .. }
            | Self::AuditNotRun { .. }
            | Self::EvidenceMissing { .. }
            | Self::EvidenceRefused { .. }
            | Self::Resolved
            | Self::NoStorage(_) => chain(self),
        }
    }
}

fn numbers(versions: &[u32]) -> String {
    versions.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// The code of a link that did not come about.
const fn of_connecting(error: &LinkError) -> Code {
    match error {
        // What answers speaks no TLS, another protocol over it, or shows a certificate that is none of a
        // host's.
        LinkError::NotMirrorvm { .. }
        | LinkError::WrongProtocol
        | LinkError::RefusedByPeer { alert: Some(AlertDescription::NoApplicationProtocol) }
        | LinkError::PeerRefused(CertRefusal::Chain(_) | CertRefusal::TooLong(_) | CertRefusal::Malformed) => {
            Code::PeerNotMirrorvm
        }
        LinkError::PeerRefused(
            CertRefusal::WrongPeer { .. } | CertRefusal::Oneself { .. } | CertRefusal::NotAdmitted(_),
        )
        | LinkError::Unknown { .. }
        | LinkError::RefusedByPeer { alert: Some(_) } => Code::PeerIdentity,
        LinkError::Unresolved { .. } => Code::PeerUnresolved,
        LinkError::Connect { .. }
        | LinkError::RefusedByPeer { alert: None }
        | LinkError::Tls(_)
        | LinkError::Deadline(_)
        | LinkError::Cancelled
        | LinkError::Truncated { .. }
        | LinkError::BadFrame(_)
        | LinkError::NoRoom
        | LinkError::Io(_)
        | LinkError::Misuse(_)
        | LinkError::Broken => Code::PeerUnreachable,
    }
}

impl From<LinkError> for MigrationFault {
    fn from(e: LinkError) -> Self {
        Self::PeerLost(e)
    }
}
