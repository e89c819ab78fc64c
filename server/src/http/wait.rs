//! Long polls: a conditional GET that waits for the resource to change.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::HostError;
use serde::Serialize;
use tokio::time::Instant;

use super::places::{Full, Place};
use super::precondition::{IfNoneMatch, etag};
use super::query::WAIT_MAX;
use super::respond;
use crate::access::caller::Caller;
use crate::metrics::Open;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// The header that says that a preference was followed.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const PREFER: HeaderName = HeaderName::from_static("prefer");

/// One waiting caller, counted until this is dropped.
#[derive(Debug)]
pub struct Waiting {
    _place: Place,
    _counted: Open,
}

/// Permission to wait, for as long as the result is kept. Waiting callers hold connections, so they must not
/// hold all of them, and those of one principal must not even hold all that may wait.
///
/// # Errors
/// `too_many_long_polls`.
pub fn begin(state: &AppState, caller: &Caller) -> Result<Waiting, Problem> {
    let place = state.long_polls().take(&caller.principal).map_err(|full| {
        let detail = match full {
            Full::All => {
                "as many callers wait for changes as may; ask again later, or without waiting".to_owned()
            }
            Full::Theirs { each } => {
                let who = &caller.principal;
                format!("{each} long polls of {who} wait already, as many as of one principal may; ask again later, or without waiting")
            }
        };
        Problem::new(ProblemCode::TooManyLongPolls, detail)
    })?;
    Ok(Waiting { _place: place, _counted: state.metrics().long_poll() })
}

/// How long a caller would wait for the outcome: `Prefer: wait=N` (RFC 7240, section 4.3), at most a long
/// poll's time. A preference that cannot be read is none.
pub fn preferred(headers: &HeaderMap) -> Duration {
    let all = headers.get_all(PREFER).iter().filter_map(|v| v.to_str().ok());
    let seconds = all.flat_map(|v| v.split(',')).find_map(|p| {
        let (name, value) = p.trim().split_once('=')?;
        name.trim().eq_ignore_ascii_case("wait").then(|| digits(value.trim())).flatten()
    });
    Duration::from_secs(seconds.unwrap_or(0).min(WAIT_MAX))
}

fn digits(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// The header that says how long the daemon was willing to wait.
pub fn applied(patience: Duration) -> HeaderValue {
    HeaderValue::try_from(format!("wait={}", patience.as_secs())).unwrap_or(HeaderValue::from_static("wait"))
}

/// Waits for `done` for as long as the caller would; gives the newest record, and whether there was any
/// waiting.
pub async fn end_of<T>(
    state: &AppState,
    caller: &Caller,
    mut record: T,
    patience: Duration,
    done: impl Fn(&T) -> bool,
    read: impl Fn() -> Result<T, HostError>,
) -> (T, bool) {
    let Ok(host) = state.host() else { return (record, false) };
    if patience.is_zero() {
        return (record, false);
    }
    // A preference that cannot be followed is passed over; the act is done.
    let Ok(_waiting) = begin(state, caller) else { return (record, false) };
    let (mut changes, mut closing) = (host.changes(), state.closing());
    let deadline = Instant::now() + patience;
    loop {
        changes.mark_unchanged();
        match read() {
            Ok(newer) => record = newer,
            Err(_) => return (record, true),
        }
        if done(&record) {
            return (record, true);
        }
        let changed = tokio::select! {
            changed = changes.changed() => changed.is_ok(),
            _ = closing.wait_for(|closing| *closing) => false,
            () = tokio::time::sleep_until(deadline) => false,
        };
        if !changed {
            return (record, true);
        }
    }
}

/// Answers a GET at once: 200 with the resource, or 304 when the caller has it already. `read` gives the
/// resource's generation and wire form.
///
/// # Errors
/// What `read` says.
pub fn get_now<T: Serialize>(
    headers: &HeaderMap,
    read: impl Fn() -> Result<(u64, T), HostError>,
) -> Result<Response, Problem> {
    let condition = IfNoneMatch::read(headers)?;
    let (generation, body) = read()?;
    Ok(if condition.has(generation) { unchanged(generation) } else { respond::ok(generation, body) })
}

fn unchanged(generation: u64) -> Response {
    (StatusCode::NOT_MODIFIED, [(header::ETAG, etag(generation))]).into_response()
}

/// Answers a GET: 200 with the resource, or 304 when the caller has it already and it did not change within
/// `wait`. `read` as for [`get_now`].
///
/// # Errors
/// What `read` says, also when the resource goes away meanwhile; `too_many_long_polls`.
pub async fn get<T: Serialize>(
    state: &AppState,
    caller: &Caller,
    headers: &HeaderMap,
    wait: Duration,
    read: impl Fn() -> Result<(u64, T), HostError>,
) -> Result<Response, Problem> {
    let condition = IfNoneMatch::read(headers)?;
    let deadline = Instant::now() + wait;
    let mut closing = state.closing();
    // Subscribed before the first look, so that no change falls between the two.
    let mut changes = state.host()?.changes();
    let mut waiting = None;
    loop {
        changes.mark_unchanged();
        let (generation, body) = read()?;
        if !condition.has(generation) {
            return Ok(respond::ok(generation, body));
        }
        if waiting.is_none() && !wait.is_zero() {
            waiting = Some(begin(state, caller)?);
        }
        let changed = tokio::select! {
            changed = changes.changed() => changed.is_ok(),
            _ = closing.wait_for(|closing| *closing) => false,
            () = tokio::time::sleep_until(deadline) => false,
        };
        if !changed {
            return Ok(unchanged(generation));
        }
    }
}
