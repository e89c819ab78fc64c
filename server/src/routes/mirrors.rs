//! Mirrors and their layout.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{HostError, MirrorSpec};
use uuid::Uuid;

use super::{IfMatchParam, IfNoneMatchParam, PageParams, WaitParams};
use crate::api::layout::AddressSpacePlan;
use crate::api::mirrors::{Mirror, MirrorCreate, MirrorList};
use crate::api::page::{Scope, cut};
use crate::draw;
use crate::http::body::JsonBody;
use crate::http::precondition::IfMatch;
use crate::http::query::Query;
use crate::http::{negotiate, respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

const PATH: &str = "/v1/mirrors";

/// The id in a path. What is no id names nothing.
fn id_of(key: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(key).map_err(|_| HostError::NotFound { kind: "mirror", key: key.to_owned() }.into())
}

/// List the mirrors
///
/// Mirrors of this host, by creation.
#[utoipa::path(get, path = "/v1/mirrors", operation_id = "mirror_list", tag = "mirrors",
    params(("guest" = Option<String>, Query, description = "Only those of this guest, by id or name"), PageParams),
    responses((status = 200, description = "A page of mirrors", body = MirrorList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let guest = parameters.one("guest");
    let filters: Vec<(&str, &str)> = guest.iter().map(|g| ("guest", g.as_str())).collect();
    let scope = Scope::new("mirrors", &filters);
    let request = parameters.page(&scope);
    parameters.done()?;
    let host = state.host()?;
    let mut mirrors = host.mirrors();
    if let Some(key) = &guest {
        // A guest that is not there has no mirrors.
        let id = host.guest(key).ok().map(|g| g.id);
        mirrors.retain(|m| Some(m.guest) == id);
    }
    let (items, next) = cut(mirrors, &request, |m| (m.created_at, m.id));
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let items = items.into_iter().map(Mirror::from).collect();
    Ok(respond::list(MirrorList { items, next_page_token }, link))
}

/// Make a mirror
///
/// Of a running or paused guest; the answer comes when its helper is ready.
#[utoipa::path(post, path = "/v1/mirrors", operation_id = "mirror_create", tag = "mirrors",
    request_body = MirrorCreate,
    responses((status = 201, description = "The mirror is ready", body = Mirror)))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<MirrorCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let spec = MirrorSpec::from(body);
    let record = respond::detached(async move { host.create_mirror(spec).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::created(&location, generation, Mirror::from(record)))
}

/// Get a mirror
///
/// With `If-None-Match` and `wait` the answer comes when the mirror changes.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}", operation_id = "mirror_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The mirror", body = Mirror)))]
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
        let record = host.mirror(id)?;
        Ok((record.generation, Mirror::from(record)))
    })
    .await
}

/// Remove a mirror
///
/// Not while a migration has it.
#[utoipa::path(delete, path = "/v1/mirrors/{mirror}", operation_id = "mirror_delete", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror"), IfMatchParam),
    responses((status = 204, description = "The mirror is gone")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let condition = IfMatch::read(&headers)?;
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    if !condition.is_absent() {
        condition.check(host.mirror(id)?.generation)?;
    }
    respond::detached(async move { host.delete_mirror(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Get a mirror's address space
///
/// The plan in force, in numbers; `Accept: image/svg+xml` draws guest-physical space, RAM and mirror-physical
/// space side by side.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/layout", operation_id = "mirror_layout_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror")),
    responses((status = 200, description = "The layout", content(
        (AddressSpacePlan = "application/json"),
        (String = "image/svg+xml"),
    ))))]
pub async fn layout(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let media = negotiate::choose(&headers, &["application/json", draw::SVG])?;
    let (host, id) = (state.host()?, id_of(&key)?);
    let mirror = host.mirror(id)?;
    let guest = host.guest(&mirror.guest.to_string())?;
    if media == "application/json" {
        return Ok(Json(AddressSpacePlan::new(&mirror.plan, &guest.layout)).into_response());
    }
    let svg = draw::layout(&mirror.plan, &guest.layout, &guest.spec.name);
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    Ok(([(header::CONTENT_TYPE, draw::SVG), (header::CONTENT_SECURITY_POLICY, policy)], svg).into_response())
}
