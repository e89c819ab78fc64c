//! The one table from the library's errors to problems. Exhaustive on purpose: a new error of the library
//! does not compile here before it has a code.

use mirrorvm::address_space::Refusal;
use mirrorvm::host::{FieldError, Finding, HostError, PeerSilence};
use mirrorvm::memory::Shortage;
use mirrorvm::store::Trouble;

use axum::http::header;

use super::{BlockedReason, MAX_SAFE_INTEGER, Problem, ProblemCode, ProblemError};
use crate::http::precondition::etag;

/// The code of a peer's silence. Its status is in the catalogue.
fn code_of_silence(silence: &PeerSilence) -> ProblemCode {
    match (silence.code.as_str(), silence.timed_out) {
        ("peer_not_mirrorvm", _) => ProblemCode::PeerNotMirrorvm,
        ("peer_unresolved", _) => ProblemCode::PeerUnresolved,
        (_, true) => ProblemCode::PeerTimedOut,
        (_, false) => ProblemCode::PeerFailed,
    }
}

fn code_of(error: &HostError) -> ProblemCode {
    match error {
        HostError::NotFound { .. } => ProblemCode::NotFound,
        HostError::NameTaken { .. } => ProblemCode::NameTaken,
        HostError::Invalid(_) => ProblemCode::ValidationFailed,
        HostError::WrongState { .. } => ProblemCode::StateConflict,
        HostError::GuestMigrating { .. } => ProblemCode::GuestMigrating,
        HostError::GuestMoved { .. } => ProblemCode::GuestMoved,
        HostError::GuestUnconfirmed { .. } => ProblemCode::GuestUnconfirmed,
        HostError::GenerationMismatch { .. } => ProblemCode::PreconditionFailed,
        HostError::IdTaken { .. } => ProblemCode::IdTaken,
        HostError::Maintenance => ProblemCode::HostInMaintenance,
        HostError::InUse { .. } => ProblemCode::InUse,
        HostError::PastPointOfNoReturn => ProblemCode::PastPointOfNoReturn,
        HostError::DestinationIsSelf => ProblemCode::ValidationFailed,
        HostError::DestinationRefuses(_) => ProblemCode::DestinationRefuses,
        HostError::PeerSilent(silence) => code_of_silence(silence),
        HostError::PlanRefused(_) => ProblemCode::PlanRefused,
        HostError::PolicyForbids { .. } => ProblemCode::PolicyForbids,
        HostError::MirrorAtLaunch => ProblemCode::MirrorAtLaunch,
        HostError::NotLaunched { .. } | HostError::ImageNotLaunched => ProblemCode::HelperNotLaunched,
        HostError::ImageFailed { .. } => ProblemCode::HelperImageFailed,
        HostError::BatchRefused(_) => ProblemCode::BatchRefused,
        HostError::GuestNotReady { .. } => ProblemCode::GuestNotReady,
        HostError::PlugRefused(_) => ProblemCode::PlugRefused,
        HostError::CapabilityMissing { .. } => ProblemCode::CapabilityMissing,
        HostError::NoMemory(_) => ProblemCode::NoMemory,
        HostError::NoResources { .. } => ProblemCode::NoResources,
        HostError::ShuttingDown => ProblemCode::ShuttingDown,
        HostError::Storage { trouble: Trouble::Full, .. }
        | HostError::Owed { trouble: Trouble::Full, .. } => ProblemCode::StorageFull,
        HostError::Storage { trouble: Trouble::Busy, .. }
        | HostError::Owed { trouble: Trouble::Busy, .. } => ProblemCode::StorageBusy,
        HostError::Storage { trouble: Trouble::Failed, .. }
        | HostError::Owed { trouble: Trouble::Failed, .. } => ProblemCode::StorageFailed,
        HostError::Internal { .. } => ProblemCode::Internal,
    }
}

impl From<HostError> for Problem {
    fn from(error: HostError) -> Self {
        let code = code_of(&error);
        let chain = chain(&error);
        let mut problem = match code {
            // Not even `what` of a fault: it is for those who read the log.
            ProblemCode::Internal => Self::new(code, "the daemon failed; its log has the reason"),
            _ => Self::new(code, error.to_string()),
        };
        let inner = &mut problem.0;
        inner.log = chain;
        match error {
            HostError::Invalid(fields) => {
                let error = |f: FieldError| ProblemError::at_pointer(f.pointer, f.code, f.detail);
                problem = Self::validation(fields.into_iter().map(error).collect());
            }
            HostError::PlanRefused(refusals) => {
                inner.errors = refusals.into_iter().map(ProblemError::from).collect();
            }
            HostError::DestinationIsSelf => {
                let detail = inner.detail.clone();
                inner.errors = vec![ProblemError::at_pointer("/destination", "destination_is_self", detail)];
            }
            HostError::DestinationRefuses(reasons) => {
                let reason = |f: Finding| BlockedReason { code: f.code, detail: f.detail };
                inner.blocked_reasons.extend(reasons.into_iter().map(reason));
            }
            HostError::BatchRefused(refusal) => {
                let written: u64 = refusal.written.iter().map(|(_, len)| len / 4096).sum();
                inner.detail = format!(
                    "record {} is refused as {}; {written} pages before it were written, and the import is over",
                    refusal.index, refusal.code
                );
                let mut error =
                    ProblemError::at_pointer("/batch/records", refusal.code, inner.detail.clone());
                error.index = Some(refusal.index as u64);
                inner.errors = vec![error];
            }
            // The cause is the answer here; it names no more than the caller's own block.
            HostError::PlugRefused(cause) => {
                let source = std::error::Error::source(&cause).map(|e| format!(": {e}")).unwrap_or_default();
                inner.detail = format!("{cause}{source}");
            }
            HostError::NoMemory(Shortage { bytes, available, bound }) => {
                let safe = |value: u64| (value <= MAX_SAFE_INTEGER).then_some(value);
                let mut error = ProblemError::bare("no_memory", inner.detail.clone());
                error.what = Some(bound.name().to_owned());
                (error.value, error.bound) = (safe(bytes), safe(available));
                inner.errors = vec![error];
            }
            HostError::WrongState { current, allowed, .. } => {
                inner.current_state = Some(current);
                inner.allowed_states = allowed;
            }
            HostError::GenerationMismatch { generation, .. } => {
                inner.headers.push((header::ETAG, etag(generation)));
            }
            HostError::GuestMigrating { migration } => {
                let detail = format!("/v1/migrations/{migration} has the guest");
                inner.blocked_reasons.push(BlockedReason { code: "migration_active".into(), detail });
            }
            HostError::GuestUnconfirmed { missing } => {
                let reason = |detail| BlockedReason { code: "whereabouts_unknown".into(), detail };
                inner.blocked_reasons.extend(missing.into_iter().map(reason));
            }
            HostError::InUse { user, .. } => {
                let detail = format!("{user} uses it");
                inner.blocked_reasons.push(BlockedReason { code: "in_use".into(), detail });
            }
            HostError::CapabilityMissing { what, why } => {
                let code = what.replace(' ', "_");
                inner.blocked_reasons.push(BlockedReason { code, detail: why });
            }
            HostError::NotFound { .. }
            | HostError::NameTaken { .. }
            | HostError::Maintenance
            | HostError::IdTaken { .. }
            | HostError::GuestMoved { .. }
            | HostError::PastPointOfNoReturn
            | HostError::PeerSilent(_)
            | HostError::PolicyForbids { .. }
            | HostError::MirrorAtLaunch
            | HostError::NotLaunched { .. }
            | HostError::ImageFailed { .. }
            | HostError::ImageNotLaunched
            | HostError::GuestNotReady { .. }
            | HostError::NoResources { .. }
            | HostError::ShuttingDown
            | HostError::Storage { .. }
            | HostError::Owed { .. }
            | HostError::Internal { .. } => {}
        }
        problem
    }
}

impl From<Refusal> for ProblemError {
    fn from(refusal: Refusal) -> Self {
        let safe = |value: u64| (value <= MAX_SAFE_INTEGER).then_some(value);
        let detail = refusal.to_string();
        let mut error = Self::at_pointer("/strategy", refusal.code.as_str(), detail);
        error.value = safe(refusal.value);
        error.bound = refusal.bound.and_then(safe);
        error.index = refusal.index.map(|i| i as u64);
        error.what = Some(refusal.what);
        error
    }
}

/// What the log says about an error that has a cause.
fn chain(error: &HostError) -> Option<String> {
    let mut cause = std::error::Error::source(error)?;
    let mut text = error.to_string();
    loop {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        match cause.source() {
            Some(next) => cause = next,
            None => return Some(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm::address_space::RefusalCode;
    use mirrorvm::memory::Bound;
    use mirrorvm::store::StoreError;
    use uuid::Uuid;

    use super::*;

    /// What SQLite says with result code `code`.
    fn sqlite(code: i32) -> StoreError {
        StoreError::of_sqlite(code)
    }

    #[test]
    fn a_database_that_takes_nothing_is_named_with_what_to_do() {
        for (code, problem, word) in [
            (13, ProblemCode::StorageFull, "no space is left"),
            (10, ProblemCode::StorageFailed, "look at the disk"),
            (5, ProblemCode::StorageBusy, "another process"),
        ] {
            for error in
                [HostError::storage("storing the guest", sqlite(code)), HostError::owed(sqlite(code))]
            {
                let made = matches!(error, HostError::Owed { .. });
                let got = Problem::from(error);
                assert_eq!(got.code(), problem, "{code}");
                assert!(got.code().retryable());
                assert!(got.0.detail.contains(word), "{}", got.0.detail);
                // Whoever tries again should know whether there is anything to try.
                assert_eq!(got.0.detail.starts_with("the change was made"), made);
            }
        }
    }

    fn silence(timed_out: bool) -> PeerSilence {
        PeerSilence { code: "peer_lost".into(), detail: "it said nothing".into(), timed_out }
    }

    fn one_of_each() -> Vec<(HostError, u16)> {
        vec![
            (HostError::NotFound { kind: "guest", key: "g".into() }, 404),
            (HostError::NameTaken { kind: "guest", name: "g".into() }, 409),
            (HostError::Invalid(vec![FieldError::new("/name", "invalid_format", "bad")]), 422),
            (HostError::WrongState { kind: "guest", current: "stopped", allowed: &["running"] }, 409),
            (HostError::GuestMigrating { migration: Uuid::nil() }, 409),
            (HostError::GuestMoved { peer: "b".into() }, 409),
            (HostError::GuestUnconfirmed { missing: vec!["b does not answer".into()] }, 409),
            (HostError::InUse { kind: "guest", user: "a mirror".into() }, 409),
            (HostError::GenerationMismatch { kind: "guest", generation: 7 }, 412),
            (HostError::IdTaken { kind: "guest" }, 409),
            (HostError::Maintenance, 409),
            (HostError::PastPointOfNoReturn, 409),
            (HostError::DestinationIsSelf, 422),
            (HostError::DestinationRefuses(Vec::new()), 409),
            (HostError::PeerSilent(silence(true)), 504),
            (HostError::PeerSilent(silence(false)), 502),
            (HostError::PlanRefused(vec![Refusal::new(RefusalCode::Wraps, "shift", u64::MAX)]), 422),
            (HostError::PolicyForbids { why: "NOSEND".into() }, 409),
            (HostError::MirrorAtLaunch, 409),
            (HostError::NotLaunched { offset: 4096 }, 409),
            (HostError::ImageNotLaunched, 409),
            (HostError::ImageFailed { name: "i".into(), fault: mirrorvm::host::ImageFault::Missing }, 409),
            (HostError::GuestNotReady { why: "it said so" }, 409),
            (
                HostError::BatchRefused(mirrorvm::host::BatchRefusal {
                    code: "unsealed",
                    index: 3,
                    written: vec![(0, 3 * 4096)],
                }),
                422,
            ),
            (HostError::PlugRefused(mirrorvm::guest::PlugError::InUse), 409),
            (HostError::CapabilityMissing { what: "kvm", why: "no device".into() }, 501),
            (HostError::NoResources { what: "helper memory", source: None }, 503),
            (HostError::NoMemory(Shortage { bytes: 2 << 20, available: 0, bound: Bound::HugePages }), 503),
            (HostError::ShuttingDown, 503),
            (HostError::storage("storing the guest", sqlite(13)), 507),
            (HostError::storage("storing the guest", sqlite(10)), 503),
            (HostError::storage("storing the guest", sqlite(5)), 503),
            (HostError::owed(sqlite(13)), 507),
            (HostError::internal("storage", std::io::Error::other("/var/lib/secret")), 500),
        ]
    }

    #[test]
    fn only_an_internal_error_is_a_500_and_it_says_nothing() {
        for (error, status) in one_of_each() {
            let text = format!("{error:?}");
            let problem = Problem::from(error);
            assert_eq!(problem.code().status().as_u16(), status, "{text}");
            assert_eq!(status == 500, problem.code() == ProblemCode::Internal, "{text}");
            if status == 500 {
                assert_eq!(problem.0.detail, "the daemon failed; its log has the reason");
                assert_eq!(problem.log(), Some("storage failed: /var/lib/secret"));
            }
        }
    }

    #[test]
    fn details_go_along() {
        let refusal = Refusal::new(RefusalCode::SlotOverlap, "slot", 4096).at(3).bound(8192);
        let errors = Problem::from(HostError::PlanRefused(vec![refusal])).0.errors;
        assert_eq!((errors[0].value, errors[0].index, errors[0].bound), (Some(4096), Some(3), Some(8192)));
        let huge =
            Problem::from(HostError::PlanRefused(vec![Refusal::new(RefusalCode::Wraps, "s", u64::MAX)]));
        assert_eq!(huge.0.errors[0].value, None);
        let shortage = Shortage { bytes: 16 << 20, available: 4 << 20, bound: Bound::HugePages };
        let problem = Problem::from(HostError::NoMemory(shortage));
        let error = &problem.0.errors[0];
        let found = (error.what.as_deref(), error.value, error.bound);
        assert_eq!(found, (Some("huge_pages"), Some(16 << 20), Some(4 << 20)));
        for word in ["16 MiB", "4 MiB", "vm.nr_hugepages", "another backing"] {
            assert!(problem.0.detail.contains(word), "{}", problem.0.detail);
        }
        let state = Problem::from(HostError::WrongState { kind: "g", current: "a", allowed: &["b"] });
        assert_eq!((state.0.current_state, state.0.allowed_states), (Some("a"), &["b"][..]));
    }
}
