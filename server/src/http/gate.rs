//! The gate before every operation: who calls, whether that caller may, how often; and the audit log of changes.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mirrorvm::store::ledger::Log;
use serde::{Deserialize, Serialize};

use super::idempotency::REPLAYED;
use super::middleware::RequestId;
use crate::access::caller::{Caller, Peer, recognize};
use crate::access::table::{self, Operation};
use crate::access::{Access, Role};
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// Principals whose pace is remembered at most.
const PRINCIPALS_MAX: usize = 4096;

/// An entry of the audit log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Who; null when nobody known.
    pub principal: Option<String>,
    /// How the caller was recognized.
    pub authenticated_by: Option<String>,
    /// The caller's role.
    pub role: Option<String>,
    /// What was asked for.
    pub operation: String,
    /// The path, without the query.
    pub path: String,
    /// Whether only the outcome was asked for.
    pub dry_run: bool,
    /// HTTP status of the answer.
    pub status: u16,
    /// Code of the problem, if it was one.
    pub code: Option<String>,
    /// Path of what was made.
    pub location: Option<String>,
    /// Whether it was the answer to an earlier request.
    pub replayed: bool,
    /// The request's id.
    pub request_id: String,
}

/// Lets requests pass whose callers may send them.
pub async fn layer(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>().map(|m| m.as_str().to_owned());
    let Some(operation) = matched.as_deref().and_then(|path| table::find(request.method(), path)) else {
        // No such route or method, or a file of the documentation page.
        return next.run(request).await;
    };
    let caller = recognize(&state, request.extensions().get::<Peer>(), request.headers());
    let admitted = admit(&state, operation, &caller, request.uri().path());
    let changes = changes_something(operation);
    let mut record = changes.then(|| record_of(operation, &caller, &request));
    let response = match admitted {
        Ok(()) => {
            if let Ok(caller) = caller {
                request.extensions_mut().insert(caller);
            }
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    };
    if let Some(record) = &mut record {
        complete(record, &response);
        write(&state, record).await;
    }
    response
}

fn admit(
    state: &AppState,
    operation: &Operation,
    caller: &Result<Caller, Problem>,
    path: &str,
) -> Result<(), Problem> {
    if operation.access == Access::Public {
        return Ok(());
    }
    let caller = caller.as_ref().map_err(Clone::clone)?;
    if !operation.access.allows(caller.role) {
        let detail =
            format!("{} has the role {}. {}", caller.principal, caller.role.name(), operation.access.text());
        return Err(Problem::new(ProblemCode::Forbidden, detail));
    }
    if caller.role == Role::Vmm && operation.access == Access::Report {
        let named = path.split('/').nth(3).unwrap_or("");
        let theirs = state.host()?.guest(named).ok().map(|g| g.id);
        // Another guest and no guest look the same.
        if theirs.is_none() || theirs != caller.guest {
            return Err(Problem::new(ProblemCode::Forbidden, "the token is about another guest"));
        }
    }
    if state.pace().admits(&caller.principal, state.config().limits.requests_per_second) {
        Ok(())
    } else {
        Err(Problem::new(ProblemCode::TooManyRequests, "too many requests of this principal"))
    }
}

/// Everything but reading, and posts that only compute.
fn changes_something(operation: &Operation) -> bool {
    operation.method != "GET" && operation.access != Access::Read
}

fn record_of(operation: &Operation, caller: &Result<Caller, Problem>, request: &Request) -> AuditRecord {
    let caller = caller.as_ref().ok();
    AuditRecord {
        principal: caller.map(|c| c.principal.clone()),
        authenticated_by: caller.map(|c| c.method.name().to_owned()),
        role: caller.map(|c| c.role.name().to_owned()),
        operation: operation.id.to_owned(),
        path: request.uri().path().chars().take(256).collect(),
        dry_run: request.uri().query().is_some_and(|q| q.split('&').any(|p| p == "dry_run=true")),
        status: 0,
        code: None,
        location: None,
        replayed: false,
        request_id: request.extensions().get::<RequestId>().map_or_else(String::new, |r| r.0.clone()),
    }
}

fn complete(record: &mut AuditRecord, response: &Response) {
    record.status = response.status().as_u16();
    record.code = response.extensions().get::<Problem>().map(|p| p.code().as_str().to_owned());
    record.location =
        response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
    record.replayed = response.headers().contains_key(REPLAYED);
}

/// The entry is on disk before the caller has the answer.
async fn write(state: &AppState, record: &AuditRecord) {
    // A refusal before the host is open is in the daemon's log alone.
    let Ok(host) = state.host() else { return };
    let written = match serde_json::to_string(record) {
        Ok(text) => host.ledger().append_durably(Log::Audit, text).await.is_ok(),
        Err(_) => false,
    };
    if !written {
        tracing::error!(operation = record.operation, request_id = record.request_id, "no audit entry");
    }
}

/// How fast each principal goes: a bucket of one second's requests, filled as time passes.
#[derive(Debug, Default)]
pub struct Pace(Mutex<HashMap<String, (f64, Instant)>>);

impl Pace {
    /// Takes one request of `principal` into account; false when it is one too many.
    pub fn admits(&self, principal: &str, per_second: u32) -> bool {
        if per_second == 0 {
            return true;
        }
        let (size, now) = (f64::from(per_second), Instant::now());
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= PRINCIPALS_MAX && !buckets.contains_key(principal) {
            // A bucket of a second ago is full again.
            buckets.retain(|_, (_, at)| now.duration_since(*at).as_secs() < 1);
        }
        let (level, at) = buckets.entry(principal.to_owned()).or_insert((size, now));
        *level = (*level + now.duration_since(*at).as_secs_f64() * size).min(size);
        *at = now;
        let fits = *level >= 1.0;
        if fits {
            *level -= 1.0;
        }
        fits
    }
}

/// Whether a method is one that only reads.
pub fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_principal_has_a_pace_of_its_own() {
        let pace = Pace::default();
        let admitted = (0..100).filter(|_| pace.admits("a", 10)).count();
        assert!((10..=12).contains(&admitted), "{admitted}");
        assert!(pace.admits("b", 10));
        assert!((0..1000).all(|_| pace.admits("c", 0)));
    }
}
