//! The gate before every operation: who calls, whether that caller may, how often; that changes go through
//! the audit log, in a task of their own; and that nobody reads on by a credential that is withdrawn.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequestParts as _, MatchedPath, RawPathParams, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt as _;
use tokio::sync::{oneshot, watch};

use super::audit::{self, AuditRecord};
use super::guard;
use super::query::Query;
use super::stream::Hangup;
use crate::access::caller::{self, Caller, Peer, recognize};
use crate::access::lease::{self, Lease};
use crate::access::table::{self, Operation};
use crate::access::{Access, Role};
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;
use mirrorvm::sync::Locked;

/// How many principals' paces are remembered at most.
const PRINCIPALS_MAX: usize = 4096;

/// Lets requests pass whose callers may send them. Changes run in tasks of their own.
pub async fn layer(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    // Decoded here for everybody behind: what is let in, what is noted and what is done go by the same.
    let query = Query::of(&parts.uri, &mut parts.extensions);
    let named = RawPathParams::from_request_parts(&mut parts, &()).await.ok();
    let named =
        named.as_ref().and_then(|p| p.iter().find(|(name, _)| *name == "guest").map(|(_, v)| v.to_owned()));
    let mut request = Request::from_parts(parts, body);
    let matched = request.extensions().get::<MatchedPath>().map(|m| m.as_str().to_owned());
    let Some(operation) = matched.as_deref().and_then(|path| table::find(request.method(), path)) else {
        // No such route or method, or a file of the documentation page.
        return next.run(request).await;
    };
    // Before the look at the credential, so that no withdrawal falls between.
    let withdrawals = state.credentials().withdrawals();
    let peer = request.extensions().get::<Peer>();
    let caller = recognize(&state, peer, request.uri(), request.headers());
    let admitted = admit(&state, operation, &caller, &request, named.as_deref());
    let dry_run = query.wants_dry_run();
    let record = changes_something(operation)
        .then(|| AuditRecord::new(operation, caller.as_ref().ok(), dry_run, &request));
    let refused = admitted.err();
    let lease = caller.as_ref().ok().and_then(|c| c.lease);
    if let Ok(caller) = caller {
        request.extensions_mut().insert(caller);
    }
    match (refused, record) {
        (None, None) => match lease {
            Some(lease) => while_good(state, lease, withdrawals, request, next).await,
            None => next.run(request).await,
        },
        (Some(problem), None) => problem.into_response(),
        (Some(problem), Some(record)) => audit::refused(&state, record, problem.into_response()).await,
        (None, Some(record)) => {
            // To the end even when the caller goes away: neither is the change left half-way nor its entry.
            let act = if operation.access == Access::Public {
                tokio::spawn(audit::carry_out_for_nobody_known(state, record, request, next))
            } else {
                tokio::spawn(audit::carry_out(state, operation, record, request, next))
            };
            act.await.unwrap_or_else(|_| {
                Problem::new(ProblemCode::Internal, "the daemon failed; its log has the reason")
                    .into_response()
            })
        }
    }
}

fn admit(
    state: &AppState,
    operation: &Operation,
    caller: &Result<Caller, Problem>,
    request: &Request,
    guest: Option<&str>,
) -> Result<(), Problem> {
    let method = request.method();
    if let Ok(caller) = caller
        && caller.method == caller::Method::Session
    {
        guard::check_session(method, request.headers())?;
    }
    if operation.access == Access::Public {
        // Whoever changes something without being known is a browser without its session.
        return if is_safe(method) { Ok(()) } else { guard::check_mark(request.headers()) };
    }
    let caller = caller.as_ref().map_err(Clone::clone)?;
    if !operation.access.allows(caller.role) {
        let detail =
            format!("{} has the role {}. {}", caller.principal, caller.role.name(), operation.access.text());
        return Err(Problem::new(ProblemCode::Forbidden, detail));
    }
    if caller.role == Role::Vmm && operation.access == Access::Report {
        let theirs = state.host()?.guest(guest.unwrap_or("")).ok().map(|g| g.id);
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

/// Runs a read for as long as the caller's credential is good: long polls and streams end with it.
async fn while_good(
    state: AppState,
    lease: Lease,
    withdrawals: watch::Receiver<u64>,
    request: Request,
    next: Next,
) -> Response {
    let hangup = request.extensions().get::<Hangup>().cloned();
    let mut over = Box::pin(lease::over(state, lease, withdrawals));
    let response = tokio::select! {
        biased;
        response = next.run(request) => response,
        () = &mut over => {
            let detail = "the token or session was withdrawn or has ended meanwhile";
            return caller::unknown(detail).into_response();
        }
    };
    // What is whole already is on its way.
    let (Some(hangup), None) = (hangup, response.body().size_hint().exact()) else { return response };
    let (reads, read) = oneshot::channel::<()>();
    tokio::spawn(async move {
        tokio::select! {
            () = over => hangup.now(),
            _ = read => {}
        }
    });
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            // Held for as long as there is a body.
            let _ = &reads;
            frame
        }))
    })
}

/// Whether an operation changes something: everything except reads and the posts that only compute.
fn changes_something(operation: &Operation) -> bool {
    operation.method != "GET" && operation.access != Access::Read
}

/// How fast each principal sends requests: a bucket of one second's requests, filled as time passes.
#[derive(Debug, Default)]
pub struct Pace(Mutex<HashMap<String, (f64, Instant)>>);

impl Pace {
    /// Counts one request of `principal`. False when it is one too many.
    pub fn admits(&self, principal: &str, per_second: u32) -> bool {
        if per_second == 0 {
            return true;
        }
        let (size, now) = (f64::from(per_second), Instant::now());
        let mut buckets = self.0.locked();
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
