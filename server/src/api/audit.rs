//! The audit log on the wire.

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::audit::{AuditOutcome, AuditRecord};

/// Who asked for what, and what came of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Its number; counts from 1 without gaps.
    #[schema(example = 42)]
    pub seq: u64,
    /// When it was asked for; of a request that was refused at once, when it was answered.
    pub time: Timestamp,
    /// Who asked: `unix:<uid>`, `cert:<name>` or `token:<id>`, by a session whoever has opened it; null when
    /// nobody known.
    #[schema(example = "unix:0")]
    pub principal: Option<String>,
    /// How the caller was recognized: `local_user`, `certificate`, `token` or `session`.
    #[schema(example = "local_user")]
    pub authenticated_by: Option<String>,
    /// The caller's role.
    #[schema(example = "admin")]
    pub role: Option<String>,
    /// The session that the caller was known by, of `session`.
    pub session: Option<Uuid>,
    /// Id of the operation.
    #[schema(example = "guest_create")]
    pub operation: String,
    /// Path of the request, without the query.
    #[schema(example = "/v1/guests")]
    pub path: String,
    /// Whether only the outcome was asked for.
    pub dry_run: bool,
    /// What came of it; null while it goes on, and for good when the daemon ended before it was over. Whether
    /// the change was made then, its resource tells: an outcome is stored in one transaction with the first
    /// record of a change.
    pub outcome: Option<AuditEntryOutcome>,
    /// HTTP status of the answer, as in `outcome`; 0 without one.
    #[schema(example = 201)]
    pub status: u16,
    /// Code of the problem, if it was one.
    #[schema(example = "name_taken")]
    pub code: Option<String>,
    /// Path of what was made.
    pub location: Option<String>,
    /// Whether the answer was that of an earlier request with the same idempotency key.
    pub replayed: bool,
    /// The request's id.
    pub request_id: String,
    /// Refused requests of the same principal since its last entry that have none of their own: where many
    /// come one after the other, few have one.
    pub left_out: u64,
}

/// What came of what was asked for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditEntryOutcome {
    /// When it was known.
    pub time: Timestamp,
    /// HTTP status of the answer.
    #[schema(example = 201)]
    pub status: u16,
    /// Code of the problem, if it was one.
    #[schema(example = "name_taken")]
    pub code: Option<String>,
    /// Path of what was made.
    pub location: Option<String>,
    /// Whether the answer was that of an earlier request with the same idempotency key.
    pub replayed: bool,
    /// Whether it was stored in one transaction with the record of what was done: then that was done,
    /// whatever `status` says.
    pub recorded: bool,
}

impl AuditEntry {
    /// Entry number `seq` of the log, and what was written of its outcome since.
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
    /// What to send as `before` for older entries; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_before: Option<u64>,
}
