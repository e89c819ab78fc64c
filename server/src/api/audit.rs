//! The audit log on the wire.

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::gate::AuditRecord;

/// Who asked for what, and what came of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Its number; counts from 1 without gaps.
    #[schema(example = 42)]
    pub seq: u64,
    /// When the request was answered.
    pub time: Timestamp,
    /// Who asked: `unix:<uid>`, `cert:<name>` or `token:<id>`; null when nobody known.
    #[schema(example = "unix:0")]
    pub principal: Option<String>,
    /// How the caller was recognized: `local_user`, `certificate` or `token`.
    #[schema(example = "local_user")]
    pub authenticated_by: Option<String>,
    /// The caller's role.
    #[schema(example = "admin")]
    pub role: Option<String>,
    /// Id of the operation.
    #[schema(example = "guest_create")]
    pub operation: String,
    /// Path of the request, without the query.
    #[schema(example = "/v1/guests")]
    pub path: String,
    /// Whether only the outcome was asked for.
    pub dry_run: bool,
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
    /// The request's id.
    pub request_id: String,
}

impl AuditEntry {
    /// Entry number `seq` of the log.
    pub fn new(seq: u64, time: Timestamp, record: AuditRecord) -> Self {
        Self {
            seq,
            time,
            principal: record.principal,
            authenticated_by: record.authenticated_by,
            role: record.role,
            operation: record.operation,
            path: record.path,
            dry_run: record.dry_run,
            status: record.status,
            code: record.code,
            location: record.location,
            replayed: record.replayed,
            request_id: record.request_id,
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
