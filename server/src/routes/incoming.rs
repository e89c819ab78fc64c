//! The destination's side before a migration: tickets.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Bytes};
use mirrorvm::host::{HostError, TicketSpec};

use super::common::{DryRunParam, IdempotencyKeyParam};
use crate::api::tickets::{IncomingMigration, IncomingMigrationCreate};
use crate::http::body::JsonBody;
use crate::http::change::Change;
use crate::http::idempotency::KeepInstead;
use crate::http::respond;
use crate::problem::Problem;
use crate::state::AppState;

/// Issue a ticket for an incoming migration
///
/// A ticket lets in one migration from a host that is not registered here, once, until it expires. Its text
/// goes to the source as `destination`. The migration has the ticket's id on both hosts.
#[utoipa::path(post, path = "/v1/incoming-migrations", operation_id = "incoming_migration_create", tag = "migrations",
    request_body = IncomingMigrationCreate, params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the request is good; the ticket in the answer is not",
            body = IncomingMigration),
        (status = 201, description = "The ticket is good", body = IncomingMigration),
    ))]
pub async fn create(
    State(state): State<AppState>,
    change: Change,
    JsonBody(body): JsonBody<IncomingMigrationCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let (spec, ask) = (TicketSpec::from(body), change.ask());
    let ticket = respond::detached(async move { host.create_ticket(spec, &ask).await }).await?;
    let shown = IncomingMigration { ticket: None, ..IncomingMigration::from(ticket.clone()) };
    if change.dry_run {
        return Ok(Json(shown).into_response());
    }
    let kept = serde_json::to_vec(&shown).map_err(|e| HostError::internal("writing a ticket", e))?;
    let location = format!("/v1/migrations/{}", ticket.session);
    let body = Json(IncomingMigration::from(ticket));
    let mut response = (StatusCode::CREATED, [(header::LOCATION, location)], body).into_response();
    response.extensions_mut().insert(KeepInstead(Bytes::from(kept)));
    Ok(response)
}
