//! What stands in a migration's way, said so that a caller knows what would help.
//!
//! Owns: findings of errors of this host, of refusals of the other, and of looks at both. Must not know: how
//! anything is found out; `host::codes` has the codes of errors, `crate::codes` what helps against refusals.

use crate::codes::{Code, Explained, THEIR_LINK, THEIR_LOG};
use crate::host::HostError;
use crate::host::codes::{LOG, codes_of};
use crate::host::peers::probe::PeerSilence;
use crate::migration::wire::Refused;

/// Something that a look at a migration found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable code: one of [`Code`], what a host lacks ([`crate::codes::Capability`]), what is wrong with a
    /// value or a plan, or another build's.
    pub code: String,
    /// What it is.
    pub detail: String,
    /// What would help.
    pub fix: String,
}

impl Finding {
    /// A finding of a look at both hosts, with what helps against its code; of one that answers requests, its
    /// error says that.
    pub(in crate::host) fn new(code: Code, detail: impl Into<String>) -> Self {
        let fix = match code.explained() {
            Explained::Here(of) => of.fix,
            Explained::Answer(_) => LOG,
        };
        Self { code: code.as_str().to_owned(), detail: detail.into(), fix: fix.to_owned() }
    }

    /// The same, with what helps in this case.
    pub(in crate::host) fn fixed_by(self, fix: impl Into<String>) -> Self {
        Self { fix: fix.into(), ..self }
    }
}

impl PeerSilence {
    pub(in crate::host) fn finding(self) -> Finding {
        let own = self.code.known().map(Code::explained);
        let fix = match own {
            Some(Explained::Here(of)) => of.fix,
            Some(Explained::Answer(_)) | None => THEIR_LINK,
        };
        Finding { code: self.code.into(), detail: self.detail, fix: fix.into() }
    }
}

/// A destination that cannot say whether it would let the migration in.
pub(in crate::host) fn not_asked() -> Finding {
    Finding::new(
        Code::DestinationNotAsked,
        "the other host's build cannot be asked whether it would let this migration in",
    )
}

/// An error of a request as what stands in its way: by its own code, or by those of its reasons.
pub(in crate::host) fn findings(e: &HostError) -> Vec<Finding> {
    let codes = codes_of(e);
    let found = |code: &str, detail: String| Finding { code: code.to_owned(), detail, fix: codes.fix.into() };
    match e {
        HostError::PlanRefused(refusals) => {
            refusals.iter().map(|r| found(r.code.as_str(), r.to_string())).collect()
        }
        HostError::Invalid(fields) => {
            fields.iter().map(|f| found(f.code, format!("{}: {}", f.pointer, f.detail))).collect()
        }
        HostError::DestinationRefuses(list) => list.clone(),
        HostError::PeerSilent(silence) => vec![silence.clone().finding()],
        HostError::CapabilityMissing { what, .. } => vec![found(what.code(), e.to_string())],
        e => vec![found(codes.finding.as_str(), e.to_string())],
    }
}

/// A destination's reason, with what would help: a refusal that this build knows says it itself.
pub(in crate::host) fn finding(refused: Refused) -> Finding {
    let refusal = refused.code.known().and_then(Code::refusal);
    let fix = refusal.map_or(THEIR_LOG, crate::codes::PeerRefusal::fix);
    Finding { code: refused.code.into(), detail: refused.detail, fix: fix.into() }
}
