//! Ending a migration's doubt where the two hosts cannot: tokens that are carried by hand, an administrator's
//! word.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use mirrorvm::host::{Answer, FieldError, HostError};

use super::common::{DryRunParam, IdempotencyKeyParam, IfMatchParam};
use super::migrations::{PATH, id_of};
use crate::api::Preview;
use crate::api::migrations::Migration;
use crate::api::resolution::{HandOverToken, Resolve, ResolveBody};
use crate::http::body::JsonBody;
use crate::http::change::Change;
use crate::http::respond;
use crate::problem::Problem;
use crate::state::AppState;

/// Get a hand-over's token
///
/// At the destination of a migration: what its helper said about the hand-over (COMMIT or ABORT), to be
/// carried by hand to a source that cannot ask over the network. 404 while there is no token.
#[utoipa::path(get, path = "/v1/migrations/{migration}/hand-over-token",
    operation_id = "migration_hand_over_token_get", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "The token", body = HandOverToken)))]
pub async fn token(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<HandOverToken>, Problem> {
    Ok(Json(state.host()?.hand_over_token(id_of(&key)?)?.into()))
}

/// Resolve a migration in doubt
///
/// At the source of a migration in doubt, when the destination cannot be asked: by the destination's token,
/// which the helper checks, or by an administrator's word, which nobody can check and which is kept in the
/// audit log and the migration's record. After the source's daemon was restarted there is no helper that
/// could check a token (422 `not_checkable`); only an administrator's word is left.
#[utoipa::path(post, path = "/v1/migrations/{migration}/resolution", operation_id = "migration_resolve",
    tag = "migrations", request_body = ResolveBody,
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: it is in doubt, and the request is good", body = Migration),
        (status = 202, description = "It is taken; `state` tells the outcome", body = Migration),
    ))]
pub async fn resolve(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<Resolve>,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let answer = match body {
        Resolve::Token(token) => Answer::Token(token),
        Resolve::Word(word, confirm) => {
            let name = host.migration(id)?.guest_name;
            if confirm != name {
                let detail = format!("to confirm, give the name of the migration's guest: {name:?}");
                let error = FieldError::new("/confirm", "not_confirmed", detail);
                return Err(HostError::Invalid(vec![error]).into());
            }
            Answer::Word(word)
        }
    };
    let ask = change.ask();
    let record = respond::detached(async move { host.resolve_migration(id, answer, &ask).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    let body = Migration::from(record);
    if change.dry_run {
        return Ok(respond::ok(generation, Migration { preview: Some(Preview::default()), ..body }));
    }
    Ok(respond::accepted(&location, generation, body))
}
