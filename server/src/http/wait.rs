//! Long polls: a conditional GET that waits for the resource to change.

use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::HostError;
use serde::Serialize;
use tokio::time::Instant;

use super::precondition::{IfNoneMatch, etag};
use super::respond;
use crate::problem::Problem;
use crate::state::AppState;

/// Answers a GET: 200 with the resource, or 304 when the caller has it already and it did not change within
/// `wait`. `read` gives the resource's generation and wire form.
///
/// # Errors
/// What `read` says, also when the resource goes away meanwhile.
pub async fn get<T: Serialize>(
    state: &AppState,
    headers: &HeaderMap,
    wait: Duration,
    read: impl Fn() -> Result<(u64, T), HostError>,
) -> Result<Response, Problem> {
    let condition = IfNoneMatch::read(headers)?;
    let deadline = Instant::now() + wait;
    let mut closing = state.closing();
    // Subscribed before the first look, so that no change falls between the two.
    let mut changes = state.host()?.changes();
    loop {
        changes.mark_unchanged();
        let (generation, body) = read()?;
        if !condition.has(generation) {
            return Ok(respond::ok(generation, body));
        }
        let changed = tokio::select! {
            changed = changes.changed() => changed.is_ok(),
            _ = closing.wait_for(|closing| *closing) => false,
            () = tokio::time::sleep_until(deadline) => false,
        };
        if !changed {
            return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag(generation))]).into_response());
        }
    }
}
