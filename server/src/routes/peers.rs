//! Other hosts that this one knows.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use mirrorvm::host::PeerSpec;

use super::{IfMatchParam, IfNoneMatchParam, PageParams};
use crate::api::page::{Scope, cut};
use crate::api::peers::{PeerHost, PeerHostCreate, PeerHostList};
use crate::http::body::JsonBody;
use crate::http::precondition::IfMatch;
use crate::http::query::Query;
use crate::http::{respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

const PATH: &str = "/v1/hosts";

/// List the known hosts
///
/// Hosts that a migration can go to, by creation.
#[utoipa::path(get, path = "/v1/hosts", operation_id = "peer_host_list", tag = "hosts", params(PageParams),
    responses((status = 200, description = "A page of hosts", body = PeerHostList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let scope = Scope::new("hosts", &[]);
    let mut parameters = query.read()?;
    let request = parameters.page(&scope);
    parameters.done()?;
    let (items, next) = cut(state.host()?.peers(), &request, |p| (p.created_at, p.id));
    let (next_page_token, link) = respond::next_page(PATH, &[], &scope, &request, next);
    let items = items.into_iter().map(PeerHost::from).collect();
    Ok(respond::list(PeerHostList { items, next_page_token }, link))
}

/// Add a host
///
/// Its identity is pinned: a host that does not hold the key is never talked to.
#[utoipa::path(post, path = "/v1/hosts", operation_id = "peer_host_create", tag = "hosts",
    request_body = PeerHostCreate,
    responses((status = 201, description = "The host is known now", body = PeerHost)))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<PeerHostCreate>,
) -> Result<Response, Problem> {
    let spec = PeerSpec::try_from(body).map_err(Problem::validation)?;
    let host = state.host()?.clone();
    let record = respond::detached(async move { host.add_peer(spec).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::created(&location, generation, PeerHost::from(record)))
}

/// Get a known host
///
/// By id or name.
#[utoipa::path(get, path = "/v1/hosts/{host}", operation_id = "peer_host_get", tag = "hosts",
    params(("host" = String, Path, description = "Id or name of the host", example = "b"), IfNoneMatchParam),
    responses((status = 200, description = "The host", body = PeerHost)))]
pub async fn get(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let host = state.host()?;
    wait::get(&state, &headers, std::time::Duration::ZERO, || {
        let record = host.peer(&key)?;
        Ok((record.generation, PeerHost::from(record)))
    })
    .await
}

/// Forget a host
///
/// Not while an active migration uses it.
#[utoipa::path(delete, path = "/v1/hosts/{host}", operation_id = "peer_host_delete", tag = "hosts",
    params(("host" = String, Path, description = "Id or name of the host", example = "b"), IfMatchParam),
    responses((status = 204, description = "The host is forgotten")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(mut key): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let condition = IfMatch::read(&headers)?;
    let host = state.host()?.clone();
    if !condition.is_absent() {
        let record = host.peer(&key)?;
        condition.check(record.generation)?;
        key = record.id.to_string();
    }
    respond::detached(async move { host.delete_peer(&key).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
