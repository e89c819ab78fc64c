//! The audit log's entries: what was asked for, before it is done, and what came of it, together with the
//! record of it.
//!
//! Owns: the form of entries and outcomes, when which of them is written. Must not know: who may do what.
//!
//! An entry is on disk before the act begins. Its outcome is written in the transaction of the act's first
//! record; of an act that makes no record, before the caller has the answer. So an act without an entry
//! cannot be, and an entry without an outcome is one over which the daemon ended.

use std::sync::{Arc, Mutex};

use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{Act, Effect, HostError};
use mirrorvm::store::ledger::Log;
use mirrorvm::store::{Batch, StoreError, form};
use tokio::sync::watch;
use uuid::Uuid;

use super::body;
use super::idempotency::REPLAYED;
use super::middleware::RequestId;
use super::query::canonical_path;
use crate::access::caller::Caller;
use crate::access::table::Operation;
use crate::problem::Problem;
use crate::state::AppState;
use mirrorvm::sync::Locked;

/// An entry of the audit log. For a request that was refused at once, and for a dry run, the entry includes
/// its outcome. In other entries `status` is 0, and the outcome is written separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRecord {
    /// Who asked. `None` for an unknown caller.
    pub principal: Option<String>,
    /// How the caller was recognized.
    pub authenticated_by: Option<String>,
    /// The role that the caller had.
    pub role: Option<String>,
    /// Id of the session that the caller was recognized by.
    pub session: Option<Uuid>,
    /// Id of the operation that was asked for.
    pub operation: String,
    /// The path, without the query.
    pub path: String,
    /// Whether the request was a dry run.
    pub dry_run: bool,
    /// What came of it.
    pub outcome: AuditOutcome,
    /// Id of the request.
    pub request_id: String,
    /// How many refusals of the same principal since its last entry have no entry of their own.
    pub left_out: u64,
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditOutcome {
    /// HTTP status of the answer.
    pub status: u16,
    /// Code of the problem, if the answer was one.
    pub code: Option<String>,
    /// Path of what was made or changed.
    pub location: Option<String>,
    /// Whether the answer was a kept one, given to an earlier request.
    pub replayed: bool,
    /// Whether it was stored in one transaction with the record of the change.
    pub recorded: bool,
}

impl AuditRecord {
    /// An entry about a request of which nothing has come yet.
    pub fn new(operation: &Operation, caller: Option<&Caller>, dry_run: bool, request: &Request) -> Self {
        Self {
            principal: None,
            authenticated_by: None,
            role: None,
            session: None,
            operation: operation.id.to_owned(),
            path: canonical_path(request.uri().path()).chars().take(256).collect(),
            dry_run,
            outcome: AuditOutcome::default(),
            request_id: request.extensions().get::<RequestId>().map_or_else(String::new, |r| r.0.clone()),
            left_out: 0,
        }
        .by(caller)
    }

    /// Fills in who asked.
    fn by(self, caller: Option<&Caller>) -> Self {
        let Some(caller) = caller else { return self };
        Self {
            principal: Some(caller.principal.clone()),
            authenticated_by: Some(caller.method.name().to_owned()),
            role: Some(caller.role.name().to_owned()),
            session: caller.session(),
            ..self
        }
    }
}

impl AuditOutcome {
    /// The outcome that an answer shows.
    pub fn of(response: &Response) -> Self {
        let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
        Self {
            status: response.status().as_u16(),
            code: response.extensions().get::<Problem>().map(|p| p.code().as_str().to_owned()),
            location: location.map(str::to_owned),
            replayed: response.headers().contains_key(REPLAYED),
            recorded: false,
        }
    }

    /// The outcome that the record being stored implies: the answer that will go with it.
    fn of_effect(operation: &Operation, effect: &Effect<'_>) -> Self {
        let location = match effect {
            Effect::Guest(r) => Some(format!("/v1/guests/{}", r.id)),
            Effect::Migration(r) => Some(format!("/v1/migrations/{}", r.id)),
            Effect::Peer(r) => Some(format!("/v1/hosts/{}", r.id)),
            Effect::Image(r) => Some(format!("/v1/helper-images/{}", r.id)),
            Effect::Ticket(t) => Some(format!("/v1/migrations/{}", t.session)),
            Effect::Token(id) => Some(format!("/v1/tokens/{id}")),
            Effect::Settings(_) | Effect::Gone(..) => None,
        };
        let status = done_status(operation);
        // As in answers: what was there before is not located again.
        Self {
            status,
            location: location.filter(|_| matches!(status, 201 | 202)),
            recorded: true,
            ..Self::default()
        }
    }
}

/// The status of an answer to an operation that was carried out and has made a record.
pub fn done_status(operation: &Operation) -> u16 {
    match (operation.method, operation.id) {
        ("DELETE", _) => 204,
        ("PATCH", _) | (_, "helper_image_content_put" | "ram_block_plug" | "ram_block_unplug") => 200,
        (_, "guest_start" | "guest_pause" | "guest_resume" | "guest_stop" | "guest_confirm") => 202,
        (_, "migration_cancel" | "migration_switchover" | "migration_resolve") => 202,
        // Creations: at a collection, or under an id of the caller's choice.
        _ => 201,
    }
}

/// What has been noted about an act: by its record, and by the answer to the caller. Whichever comes second
/// takes the first into account.
#[derive(Debug, Default)]
struct Said {
    recorded: Option<AuditOutcome>,
    answered: Option<AuditOutcome>,
}

/// Carries out a change, with its entry stored before it and its outcome with it.
pub async fn carry_out(
    state: AppState,
    operation: &'static Operation,
    record: AuditRecord,
    request: Request,
    next: Next,
) -> Response {
    let guard = state.acts().begin();
    // All of it is here before anything begins: a body that breaks off begins nothing.
    let request = match body::whole(&state, request).await {
        Ok(request) => request,
        Err(problem) => return at_once(&state, record, problem.into_response()).await,
    };
    // Before the host is open nothing can be changed.
    let Ok(host) = state.host() else { return next.run(request).await };
    if record.dry_run {
        let response = next.run(request).await;
        return at_once(&state, record, response).await;
    }
    let intent = match text_of(&record) {
        Ok(text) => host.ledger().append_durably(Log::Audit, text).await,
        Err(problem) => return problem.into_response(),
    };
    let intent = match intent {
        Ok(intent) => intent,
        Err(e) => return refused_by_store(e).into_response(),
    };
    let act = Act::new(guard);
    let said = Arc::new(Mutex::new(Said::default()));
    let theirs = Arc::clone(&said);
    act.write_along(move |effect, batch| {
        let mut said = theirs.locked();
        let done = AuditOutcome::of_effect(operation, effect);
        // The caller may have been told already that it takes too long.
        let outcome = match &said.answered {
            Some(answered) => AuditOutcome { location: done.location, recorded: true, ..answered.clone() },
            None => done,
        };
        if let Ok(text) = form::write(&outcome) {
            batch.outcome(intent, text);
        }
        said.recorded = Some(outcome);
    });
    let response = Act::scope(Some(act.clone()), next.run(request)).await;
    let mut outcome = AuditOutcome { recorded: act.is_recorded(), ..AuditOutcome::of(&response) };
    {
        let mut said = said.locked();
        said.answered = Some(outcome.clone());
        if let Some(recorded) = said.recorded.as_ref().filter(|_| outcome.recorded) {
            if *recorded == outcome {
                return response;
            }
            outcome.location = outcome.location.or_else(|| recorded.location.clone());
        }
    }
    let mut batch = Batch::new();
    if let Ok(text) = form::write(&outcome) {
        batch.outcome(intent, text);
    }
    match host.ledger().owe(batch).await {
        Ok(()) => response,
        // What was not done is answered as it is. What was, is only acknowledged when all of it is on disk.
        Err(_) if outcome.status >= 400 || outcome.replayed => response,
        Err(e) => Problem::from(HostError::owed(e)).into_response(),
    }
}

/// Carries out a change whose caller is known only when it is done: the opening of a session. Its entry names
/// the caller that results, and is on disk before that caller has anything to act with.
pub async fn carry_out_for_nobody_known(
    state: AppState,
    record: AuditRecord,
    request: Request,
    next: Next,
) -> Response {
    let _guard = state.acts().begin();
    let response = match body::whole(&state, request).await {
        Ok(request) => next.run(request).await,
        Err(problem) => problem.into_response(),
    };
    let opened = response.extensions().get::<Caller>().cloned();
    let record = record.by(opened.as_ref());
    let response = match opened {
        Some(_) => at_once(&state, record, response).await,
        None => refused(&state, record, response).await,
    };
    if let Some(session) = opened.and_then(|c| c.session()).filter(|_| !response.status().is_success()) {
        state.credentials().sessions().withdraw(session);
    }
    response
}

/// Notes a request that was refused before anything began, or that was a dry run. The entry is on disk before
/// the caller has the answer.
pub async fn at_once(state: &AppState, record: AuditRecord, response: Response) -> Response {
    // A refusal before the host is open is in the daemon's log alone.
    let Ok(host) = state.host() else { return response };
    let record = AuditRecord { outcome: AuditOutcome::of(&response), ..record };
    let text = match text_of(&record) {
        Ok(text) => text,
        Err(problem) => return problem.into_response(),
    };
    match host.ledger().append_durably(Log::Audit, text).await {
        Ok(_) => response,
        // Nothing has happened, and nobody is told what the log does not have.
        Err(e) => refused_by_store(e).into_response(),
    }
}

/// Notes a request that its caller may not make. When one principal is refused again and again, only some
/// refusals get entries, which count the others.
pub async fn refused(state: &AppState, record: AuditRecord, response: Response) -> Response {
    match state.refusals().take(record.principal.as_deref()) {
        Some(left_out) => at_once(state, AuditRecord { left_out, ..record }, response).await,
        None => response,
    }
}

fn text_of(record: &AuditRecord) -> Result<String, Problem> {
    form::write(record).map_err(|e| HostError::internal("writing an audit entry", e).into())
}

fn refused_by_store(e: StoreError) -> Problem {
    HostError::storage("noting in the audit log what is asked for", e).into()
}

/// Counts the acts that are going on.
#[derive(Debug)]
pub struct Acts(watch::Sender<usize>);

impl Default for Acts {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Acts {
    /// Counts one more act, until the guard is dropped.
    pub fn begin(&self) -> ActGuard {
        self.0.send_modify(|n| *n += 1);
        ActGuard(self.0.clone())
    }

    /// Returns when no act is going on.
    pub async fn over(&self) {
        let mut acts = self.0.subscribe();
        // An error means that nobody is left who could begin one.
        let _ = acts.wait_for(|n| *n == 0).await;
    }
}

/// Counts an act for as long as it lives.
#[derive(Debug)]
pub struct ActGuard(watch::Sender<usize>);

impl Drop for ActGuard {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n = n.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::table::OPERATIONS;
    use crate::routes;

    #[test]
    fn what_a_record_says_of_the_answer_is_what_the_document_promises() {
        let (_, api) = routes::documented().split_for_parts();
        let document = serde_json::to_value(&api).unwrap();
        for o in OPERATIONS.iter().filter(|o| o.method != "GET") {
            let method = o.method.to_lowercase();
            let responses = document["paths"][o.path][&method]["responses"].as_object().unwrap();
            let unrecorded = ["encryption_status_update", "mirror_export", "mirror_import"].contains(&o.id)
                || o.access == crate::access::Access::Read;
            let status = done_status(o).to_string();
            assert!(unrecorded || responses.contains_key(&status), "{}: {status} of {responses:?}", o.id);
        }
    }

    #[test]
    fn entries_of_earlier_versions_are_read() {
        let old = r#"{"principal":"unix:0","authenticated_by":"local_user","role":"admin","operation":"guest_create",
            "path":"/v1/guests","dry_run":false,"status":201,"code":null,"location":"/v1/guests/x","replayed":false,
            "request_id":"r"}"#;
        let record: AuditRecord = form::read(old.as_bytes()).unwrap();
        assert_eq!((record.outcome.status, record.outcome.recorded), (201, false));
        let text = text_of(&record).unwrap();
        assert_eq!(form::read::<AuditRecord>(text.as_bytes()).unwrap().outcome, record.outcome);
    }

    #[tokio::test]
    async fn acts_are_over_when_the_last_part_of_the_last_is() {
        let acts = Arc::new(Acts::default());
        let (one, two) = (Act::new(acts.begin()), acts.begin());
        let part = one.clone();
        let theirs = Arc::clone(&acts);
        let over = tokio::spawn(async move { theirs.over().await });
        drop((one, two));
        tokio::task::yield_now().await;
        assert!(!over.is_finished());
        drop(part);
        over.await.unwrap();
    }
}
