//! The audit log on the wire.

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::audit::{AuditOutcome, AuditRecord};

/// One entry of the audit log: who asked for what, and what came of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Number of the entry. Entries count from 1 without gaps.
    #[schema(example = 42)]
    pub seq: u64,
    /// When the change was asked for. For a request that was refused at once: when it was answered.
    #[serde(serialize_with = "super::time::to_ms")]
    pub time: Timestamp,
    /// Who asked: `unix:<uid>`, `cert:<name>` or `token:<id>`; for a session, whoever opened it. Null for an
    /// unknown caller.
    #[schema(example = "unix:0")]
    pub principal: Option<String>,
    /// How the caller was recognized: `local_user`, `certificate`, `token` or `session`.
    #[schema(example = "local_user")]
    pub authenticated_by: Option<String>,
    /// The role that the caller had.
    #[schema(example = "admin")]
    pub role: Option<String>,
    /// Id of the session, for a caller recognized by one.
    pub session: Option<Uuid>,
    /// Id of the operation, as in the API's document.
    #[schema(example = "guest_create")]
    pub operation: String,
    /// Path of the request, without the query.
    #[schema(example = "/v1/guests")]
    pub path: String,
    /// Whether the request was a dry run.
    pub dry_run: bool,
    /// What came of it. Null while the change goes on, and for good if the daemon ended before it was over.
    /// Whether such a change was made can be read from the resource: the outcome is stored in one transaction
    /// with the first record of the change.
    pub outcome: Option<AuditEntryOutcome>,
    /// HTTP status of the answer, as in `outcome`. 0 while there is no outcome.
    #[schema(example = 201)]
    pub status: u16,
    /// Code of the problem, if the answer was one.
    #[schema(example = "name_taken")]
    pub code: Option<String>,
    /// Path of the resource that was made.
    pub location: Option<String>,
    /// Whether the answer was a kept one, given to an earlier request with the same idempotency key.
    pub replayed: bool,
    /// Id of the request, as in the answer's `x-request-id`.
    pub request_id: String,
    /// How many refused requests of the same principal since its last entry have no entry of their own. Where
    /// refusals follow each other quickly, only some get one.
    pub left_out: u64,
}

/// What came of a request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditEntryOutcome {
    /// When the outcome was known.
    #[serde(serialize_with = "super::time::to_ms")]
    pub time: Timestamp,
    /// HTTP status of the answer.
    #[schema(example = 201)]
    pub status: u16,
    /// Code of the problem, if the answer was one.
    #[schema(example = "name_taken")]
    pub code: Option<String>,
    /// Path of the resource that was made.
    pub location: Option<String>,
    /// Whether the answer was a kept one, given to an earlier request with the same idempotency key.
    pub replayed: bool,
    /// Whether the outcome was stored in one transaction with the record of the change. If so, the change was
    /// made, whatever `status` says.
    pub recorded: bool,
}

impl AuditEntry {
    /// Joins entry number `seq` of the log with its outcome, where that was written later.
    pub fn new(
        seq: u64,
        time: Timestamp,
        record: AuditRecord,
        since: Option<(Timestamp, AuditOutcome)>,
    ) -> Self {
        let at_once = (record.outcome.status != 0).then_some((time, record.outcome));
        let outcome = since.or(at_once);
        let last = outcome.as_ref().map(|(_, o)| o.clone()).unwrap_or_default();
        Self {
            seq,
            time,
            principal: record.principal,
            authenticated_by: record.authenticated_by,
            role: record.role,
            session: record.session,
            operation: record.operation,
            path: record.path,
            dry_run: record.dry_run,
            outcome: outcome.map(|(time, o)| AuditEntryOutcome {
                time,
                status: o.status,
                code: o.code,
                location: o.location,
                replayed: o.replayed,
                recorded: o.recorded,
            }),
            status: last.status,
            code: last.code,
            location: last.location,
            replayed: last.replayed,
            request_id: record.request_id,
            left_out: record.left_out,
        }
    }
}

/// One page of the audit log.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditLog {
    /// Entries, the newest first.
    pub items: Vec<AuditEntry>,
    /// Send it as `before` to get older entries. Absent when there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_before: Option<u64>,
}
