//! Migrations: creation, progress, cancellation, what they measured.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{HostError, MigrationRecord, MigrationSpec, MigrationState};
use uuid::Uuid;

use super::{IfMatchParam, IfNoneMatchParam, PageParams, WaitParams};
use crate::api::migrations::{
    Migration, MigrationCreate, MigrationList, MigrationRound, MigrationRoundList, parse_state,
};
use crate::api::page::{Scope, cut};
use crate::http::body::JsonBody;
use crate::http::precondition::IfMatch;
use crate::http::query::{Parameters, Query};
use crate::http::{negotiate, respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

const PATH: &str = "/v1/migrations";

/// The id in a path. What is no id names nothing.
fn id_of(key: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(key).map_err(|_| HostError::NotFound { kind: "migration", key: key.to_owned() }.into())
}

fn states(parameters: &mut Parameters) -> Vec<MigrationState> {
    let mut states = Vec::new();
    for name in parameters.all("state") {
        match parse_state(&name) {
            Ok(state) => states.push(state),
            Err(error) => parameters.problem(*error),
        }
    }
    states
}

fn is_of(record: &MigrationRecord, guest: &str) -> bool {
    match Uuid::try_parse(guest) {
        Ok(id) => record.guest == id,
        Err(_) => record.guest_name == guest,
    }
}

/// List the migrations
///
/// Migrations from and to this host, by creation; those that have ended stay until they are deleted.
#[utoipa::path(get, path = "/v1/migrations", operation_id = "migration_list", tag = "migrations",
    params(
        ("state" = Option<Vec<String>>, Query, description = "Only those in one of these states; may be repeated"),
        ("guest" = Option<String>, Query, description = "Only those of this guest, by id or name"),
        PageParams,
    ),
    responses((status = 200, description = "A page of migrations", body = MigrationList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let states = states(&mut parameters);
    let guest = parameters.one("guest");
    let mut filters: Vec<(&str, &str)> = states.iter().map(|s| ("state", s.name())).collect();
    filters.extend(guest.iter().map(|g| ("guest", g.as_str())));
    let scope = Scope::new("migrations", &filters);
    let request = parameters.page(&scope);
    parameters.done()?;
    let mut migrations = state.host()?.migrations();
    migrations.retain(|m| {
        (states.is_empty() || states.contains(&m.state)) && guest.as_ref().is_none_or(|g| is_of(m, g))
    });
    let (items, next) = cut(migrations, &request, |m| (m.created_at, m.id));
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let items = items.into_iter().map(Migration::from).collect();
    Ok(respond::list(MigrationList { items, next_page_token }, link))
}

/// Start a migration
///
/// The answer comes when the migration is recorded; `state` and `progress` tell how it goes on.
#[utoipa::path(post, path = "/v1/migrations", operation_id = "migration_create", tag = "migrations",
    request_body = MigrationCreate,
    responses((status = 201, description = "The migration is recorded", body = Migration)))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<MigrationCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let spec = MigrationSpec::from(body);
    let record = respond::detached(async move { host.create_migration(spec).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::created(&location, generation, Migration::from(record)))
}

/// Get a migration
///
/// With `If-None-Match` and `wait` the answer comes when the migration changes.
#[utoipa::path(get, path = "/v1/migrations/{migration}", operation_id = "migration_get", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The migration", body = Migration)))]
pub async fn get(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let limit = parameters.wait();
    parameters.done()?;
    let (host, id) = (state.host()?, id_of(&key)?);
    wait::get(&state, &headers, limit, || {
        let record = host.migration(id)?;
        Ok((record.generation, Migration::from(record)))
    })
    .await
}

/// Forget a migration
///
/// Only one that has ended.
#[utoipa::path(delete, path = "/v1/migrations/{migration}", operation_id = "migration_delete", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration"), IfMatchParam),
    responses((status = 204, description = "The migration is forgotten")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let condition = IfMatch::read(&headers)?;
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    if !condition.is_absent() {
        condition.check(host.migration(id)?.generation)?;
    }
    respond::detached(async move { host.delete_migration(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Cancel a migration
///
/// 202: asked for, `state` tells the outcome. 200: it had ended already. 409 `past_point_of_no_return`: the
/// destination may run the guest already.
#[utoipa::path(post, path = "/v1/migrations/{migration}/cancel", operation_id = "migration_cancel", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration"), IfMatchParam),
    responses(
        (status = 200, description = "It had ended already", body = Migration),
        (status = 202, description = "Cancellation is asked for", body = Migration),
    ))]
pub async fn cancel(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let condition = IfMatch::read(&headers)?;
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    if !condition.is_absent() {
        condition.check(host.migration(id)?.generation)?;
    }
    // Ended before this request, not through it: a migration that cancellation ends at once is a 202.
    let had_ended = host.migration(id)?.state.is_terminal();
    let record = respond::detached(async move { host.cancel_migration(id).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    let ended = had_ended || (record.state.is_terminal() && record.state != MigrationState::Canceled);
    let body = Migration::from(record);
    Ok(if ended { respond::ok(generation, body) } else { respond::accepted(&location, generation, body) })
}

/// List a migration's rounds
///
/// One entry for each pass over memory, kept after the end.
#[utoipa::path(get, path = "/v1/migrations/{migration}/rounds", operation_id = "migration_round_list", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration")),
    responses((status = 200, description = "The rounds", body = MigrationRoundList)))]
pub async fn rounds(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<MigrationRoundList>, Problem> {
    let record = state.host()?.migration(id_of(&key)?)?;
    Ok(Json(MigrationRoundList { items: record.rounds.into_iter().map(MigrationRound::from).collect() }))
}

/// Get a migration's page digests
///
/// Of a migration with `verify`: SHA-256 of every page of RAM at the pause point, the first 16 bytes each, in
/// the order of RAM addresses. The same at both hosts when memory arrived as it left.
#[utoipa::path(get, path = "/v1/migrations/{migration}/page-digests",
    operation_id = "migration_page_digests_get", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration")),
    responses((status = 200, description = "The digests, 16 bytes a page", body = Vec<u8>,
        content_type = "application/octet-stream")))]
pub async fn page_digests(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    negotiate::choose(&headers, &["application/octet-stream"])?;
    let digests = state.host()?.page_digests(id_of(&key)?)?;
    let bytes = Bytes::from(digests.digests.as_flattened().to_vec());
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}
