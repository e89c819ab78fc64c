//! The audit log on disk: an entry, and what came of one.

use mirrorvm::store::form::{Document, Part, Version, Wrong, fill, there};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::http::audit::{AuditOutcome, AuditRecord};

/// The form of an [`AuditRecord`]: the members of its outcome are among its own.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditForm {
    version: Version<5>,
    #[serde(deserialize_with = "there")]
    principal: Option<String>,
    #[serde(deserialize_with = "there")]
    authenticated_by: Option<String>,
    #[serde(deserialize_with = "there")]
    role: Option<String>,
    #[serde(deserialize_with = "there")]
    session: Option<Uuid>,
    operation: String,
    path: String,
    dry_run: bool,
    status: u16,
    #[serde(deserialize_with = "there")]
    code: Option<String>,
    #[serde(deserialize_with = "there")]
    location: Option<String>,
    replayed: bool,
    recorded: bool,
    request_id: String,
    left_out: u64,
}

impl Part for AuditRecord {
    type Form = AuditForm;

    fn form(&self) -> AuditForm {
        let Self {
            principal,
            authenticated_by,
            role,
            session,
            operation,
            path,
            dry_run,
            outcome: AuditOutcome { status, code, location, replayed, recorded },
            request_id,
            left_out,
        } = self;
        AuditForm {
            version: Version,
            principal: principal.clone(),
            authenticated_by: authenticated_by.clone(),
            role: role.clone(),
            session: *session,
            operation: operation.clone(),
            path: path.clone(),
            dry_run: *dry_run,
            status: *status,
            code: code.clone(),
            location: location.clone(),
            replayed: *replayed,
            recorded: *recorded,
            request_id: request_id.clone(),
            left_out: *left_out,
        }
    }

    fn of(form: AuditForm) -> Result<Self, Wrong> {
        let AuditForm {
            version: _,
            principal,
            authenticated_by,
            role,
            session,
            operation,
            path,
            dry_run,
            status,
            code,
            location,
            replayed,
            recorded,
            request_id,
            left_out,
        } = form;
        let outcome = AuditOutcome { status, code, location, replayed, recorded };
        Ok(Self {
            principal,
            authenticated_by,
            role,
            session,
            operation,
            path,
            dry_run,
            outcome,
            request_id,
            left_out,
        })
    }
}

impl Document for AuditRecord {
    const VERSION: u64 = 5;

    /// Earlier builds had no sessions, counted no refusals and noted outcomes apart.
    fn forward(_from: u64, document: &mut Value) {
        fill(document, [("session", Value::Null), ("recorded", json!(false)), ("left_out", json!(0))]);
    }
}

/// The form of an [`AuditOutcome`] by itself.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutcomeForm {
    version: Version<5>,
    status: u16,
    #[serde(deserialize_with = "there")]
    code: Option<String>,
    #[serde(deserialize_with = "there")]
    location: Option<String>,
    replayed: bool,
    recorded: bool,
}

impl Part for AuditOutcome {
    type Form = OutcomeForm;

    fn form(&self) -> OutcomeForm {
        let Self { status, code, location, replayed, recorded } = self;
        OutcomeForm {
            version: Version,
            status: *status,
            code: code.clone(),
            location: location.clone(),
            replayed: *replayed,
            recorded: *recorded,
        }
    }

    fn of(form: OutcomeForm) -> Result<Self, Wrong> {
        let OutcomeForm { version: _, status, code, location, replayed, recorded } = form;
        Ok(Self { status, code, location, replayed, recorded })
    }
}

impl Document for AuditOutcome {
    const VERSION: u64 = 5;

    fn forward(_from: u64, document: &mut Value) {
        fill(document, [("recorded", json!(false))]);
    }
}
