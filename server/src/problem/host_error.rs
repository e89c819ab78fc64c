//! What a problem says of the library's errors.
//!
//! Owns: the details that go along with each, exhaustively. Must not know: which error has which code (the
//! library's table says it), nor which code has which status (the catalogue does).

use mirrorvm::address_space::Refusal;
use mirrorvm::chain::chain;
use mirrorvm::codes::Code;
use mirrorvm::host::{FieldError, Finding, HostError};
use mirrorvm::memory::Shortage;

use axum::http::header;

use super::{BlockedReason, MAX_SAFE_INTEGER, Problem, ProblemCode, ProblemError};
use crate::http::precondition::etag;

impl From<HostError> for Problem {
    fn from(error: HostError) -> Self {
        let code = ProblemCode::from(error.answer());
        // What has no cause is told already.
        let log = std::error::Error::source(&error).map(|_| chain(&error));
        let mut problem = if code == ProblemCode::Internal {
            // Not even `what` of a fault: it is for those who read the log.
            Self::new(code, "the daemon failed; its log has the reason")
        } else {
            Self::new(code, error.to_string())
        };
        let inner = &mut problem.0;
        inner.log = log;
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
                inner.errors =
                    vec![ProblemError::at_pointer("/destination", Code::DestinationIsSelf.as_str(), detail)];
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
                let mut error = ProblemError::bare(code.as_str(), inner.detail.clone());
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
                inner.blocked_reasons.push(BlockedReason::new(Code::MigrationActive, detail));
            }
            HostError::GuestUnconfirmed { missing } => {
                let reason = |detail| BlockedReason::new(Code::WhereaboutsUnknown, detail);
                inner.blocked_reasons.extend(missing.into_iter().map(reason));
            }
            HostError::InUse { user, .. } => {
                let detail = format!("{user} uses it");
                inner.blocked_reasons.push(BlockedReason::new(Code::InUse, detail));
            }
            HostError::CapabilityMissing { what, why } => {
                inner.blocked_reasons.push(BlockedReason { code: what.code().to_owned(), detail: why });
            }
            HostError::NotFound { .. }
            | HostError::NameTaken { .. }
            | HostError::Maintenance
            | HostError::IdTaken { .. }
            | HostError::GuestMoved { .. }
            | HostError::LayoutUnusable { .. }
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

#[cfg(test)]
mod tests {
    use mirrorvm::address_space::RefusalCode;
    use mirrorvm::codes::Capability;
    use mirrorvm::host::{PeerSilence, ResourceKind};
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
        PeerSilence { code: Code::PeerLost.into(), detail: "it said nothing".into(), timed_out }
    }

    fn one_of_each() -> Vec<(HostError, u16)> {
        vec![
            (HostError::missing(ResourceKind::Guest, "g"), 404),
            (HostError::NameTaken { kind: ResourceKind::Guest, name: "g".into() }, 409),
            (HostError::Invalid(vec![FieldError::new("/name", "invalid_format", "bad")]), 422),
            (
                HostError::WrongState {
                    kind: ResourceKind::Guest.into(),
                    current: "stopped",
                    allowed: &["running"],
                },
                409,
            ),
            (HostError::GuestMigrating { migration: Uuid::nil() }, 409),
            (HostError::GuestMoved { peer: "b".into() }, 409),
            (HostError::GuestUnconfirmed { missing: vec!["b does not answer".into()] }, 409),
            (HostError::InUse { kind: ResourceKind::Guest, user: "a mirror".into() }, 409),
            (HostError::GenerationMismatch { kind: ResourceKind::Guest, generation: 7 }, 412),
            (HostError::IdTaken { kind: ResourceKind::Guest }, 409),
            (HostError::Maintenance, 409),
            (HostError::LayoutUnusable { why: "no RAM block is plugged".into() }, 409),
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
            (HostError::lacks(Capability::Kvm, "no device"), 501),
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

    /// A problem in a line: its code, and the codes of its parts.
    fn in_a_line(error: HostError) -> String {
        let text = format!("{error:?}");
        let name = text[..text.find([' ', '(', '{']).unwrap_or(text.len())].to_owned();
        let Problem(inner) = Problem::from(error);
        let errors = inner.errors.iter().map(|e| {
            let pointer = e.pointer.as_deref().unwrap_or_default();
            format!(" {pointer} {}", e.code)
        });
        let reasons = inner.blocked_reasons.iter().map(|r| format!(" blocked {}", r.code));
        let parts: String = errors.chain(reasons).collect();
        format!("{name}: {} {}{parts}", inner.code.as_str(), inner.code.status().as_u16())
    }

    #[test]
    fn every_error_is_answered_with_the_codes_that_are_published() {
        let silence = |code: &str, timed_out| {
            let code = code.to_owned();
            HostError::PeerSilent(PeerSilence {
                code: code.into(),
                detail: "it said nothing".into(),
                timed_out,
            })
        };
        let theirs = Finding { code: "name_taken".into(), detail: "so it is".into(), fix: "rename".into() };
        let more = vec![
            HostError::DestinationRefuses(vec![theirs]),
            silence("peer_not_mirrorvm", true),
            silence("peer_unresolved", false),
            silence("colour", false),
            HostError::owed(sqlite(10)),
            HostError::owed(sqlite(5)),
            HostError::lacks(Capability::OtherHelperImages, "so it is"),
            HostError::lacks(Capability::PspCopiedBySendReceive, "so it is"),
        ];
        let all = one_of_each().into_iter().map(|(error, _)| error).chain(more);
        let (now, published) = (all.map(in_a_line).collect::<Vec<_>>(), include_str!("published.txt"));
        assert_eq!(now, published.lines().collect::<Vec<_>>(), "{}", now.join("\n"));
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
        let state = Problem::from(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: "a",
            allowed: &["b"],
        });
        assert_eq!((state.0.current_state, state.0.allowed_states), (Some("a"), &["b"][..]));
    }
}
