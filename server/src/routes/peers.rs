//! Other hosts that this one knows.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{Ask, HostError, PeerRecord, PeerSpec};

use super::common::{
    DryRunParam, IdempotencyKeyParam, IfMatchParam, IfNoneMatchParam, LabelParams, NamedSortParams,
    PageParams,
};
use crate::api::Preview;
use crate::api::labels::{self, Selector};
use crate::api::page::{Place, Scope, cut};
use crate::api::patch::PeerHostUpdate;
use crate::api::peers::{PeerHost, PeerHostCapabilities, PeerHostCreate, PeerHostList};
use crate::http::body::{JsonBody, PatchBody};
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::{respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

const PATH: &str = "/v1/hosts";

/// List the registered hosts
///
/// The hosts that migrations can go to.
#[utoipa::path(get, path = "/v1/hosts", operation_id = "peer_host_list", tag = "hosts",
    params(LabelParams, NamedSortParams, PageParams),
    responses((status = 200, description = "A page of hosts", body = PeerHostList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let having = parameters.labels();
    let texts: Vec<String> = having.iter().map(labels::text).collect();
    let filters: Vec<(&str, &str)> = texts.iter().map(|t| ("label", t.as_str())).collect();
    let scope = Scope::new(state.page_key(), "hosts", &filters);
    let request = parameters.page(&scope, true);
    parameters.done()?;
    let host = state.host()?;
    let (mut peers, cursor) = host.listed(mirrorvm::host::Host::peers);
    let events_cursor = cursor.to_string();
    peers.retain(|p| Selector::all_hold(&having, &p.spec.labels));
    let place = |p: &PeerRecord| Place::of(request.order, p.created_at, &p.spec.name, p.id);
    let (items, next) = cut(peers, &request, place);
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let items = items.into_iter().map(PeerHost::from).collect();
    Ok(respond::list(PeerHostList { items, next_page_token, events_cursor }, link))
}

fn made(record: PeerRecord) -> Response {
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    respond::created(&location, generation, PeerHost::from(record))
}

fn previewed(record: PeerRecord) -> Response {
    let preview = Some(Preview::default());
    respond::ok(record.generation, PeerHost { preview, ..PeerHost::from(record) })
}

/// Register a host
///
/// Its identity is pinned: a host that does not have the private key is never talked to.
#[utoipa::path(post, path = "/v1/hosts", operation_id = "peer_host_create", tag = "hosts",
    request_body = PeerHostCreate, params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the host that would be known", body = PeerHost),
        (status = 201, description = "The host is known now", body = PeerHost),
    ))]
pub async fn create(
    State(state): State<AppState>,
    change: Change,
    JsonBody(body): JsonBody<PeerHostCreate>,
) -> Result<Response, Problem> {
    let spec = PeerSpec::try_from(body).map_err(Problem::validation)?;
    let host = state.host()?.clone();
    let (id, ask) = (change.id(), change.ask());
    let added = respond::attempted({
        let host = host.clone();
        async move { host.add_peer(spec, &ask).await }
    });
    match (added.await?, id) {
        (Ok(record), _) if change.dry_run => Ok(previewed(record)),
        (Ok(record), _) => Ok(made(record)),
        (Err(HostError::IdTaken { .. }), Some(id)) if change.again() => Ok(made(host.peer(&id.to_string())?)),
        (Err(e), _) => Err(e.into()),
    }
}

/// Change a registered host
///
/// A JSON merge patch of its address, identity and labels.
#[utoipa::path(patch, path = "/v1/hosts/{host}", operation_id = "peer_host_update", tag = "hosts",
    request_body(content = PeerHostUpdate, content_type = "application/merge-patch+json"),
    params(("host" = String, Path, description = "Id or name of the host", example = "b"), DryRunParam, IfMatchParam),
    responses((status = 200, description = "The host as it is now, or with `dry_run` as it would be", body = PeerHost)))]
pub async fn update(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    PatchBody(body): PatchBody<PeerHostUpdate>,
) -> Result<Response, Problem> {
    let host = state.host()?;
    let moved = body.new_address().map_err(Problem::validation)?;
    let to = body.change().map_err(Problem::validation)?;
    if let Some(address) = moved {
        host.peer(&key)?;
        host.check_leads_elsewhere(&address).await?;
    }
    let record = host.change_peer(&key, to, &change.ask())?;
    if change.dry_run {
        return Ok(previewed(record));
    }
    Ok(respond::ok(record.generation, PeerHost::from(record)))
}

/// Ask a registered host what it can do
///
/// Connects, checks its identity, agrees on a version of the peer protocol, and asks. `peer_failed`,
/// `peer_timed_out`, `peer_not_mirrorvm` and `peer_unresolved` say why there is no answer.
#[utoipa::path(get, path = "/v1/hosts/{host}/capabilities", operation_id = "peer_host_capabilities_get", tag = "hosts",
    params(("host" = String, Path, description = "Id or name of the host", example = "b")),
    responses((status = 200, description = "It answers", body = PeerHostCapabilities)))]
pub async fn capabilities(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<PeerHostCapabilities>, Problem> {
    let host = state.host()?;
    let peer = host.peer(&key)?;
    let ours = host.capabilities().protocol_versions;
    match host.probe_peer(&key).await? {
        Ok(answer) => Ok(Json(PeerHostCapabilities::new(peer, answer, &ours))),
        Err(silence) => Err(HostError::PeerSilent(silence).into()),
    }
}

/// Get a registered host
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
    wait::get_now(&headers, || {
        let record = host.peer(&key)?;
        Ok((record.generation, PeerHost::from(record)))
    })
}

/// Forget a host
///
/// Not possible while an active migration uses it.
#[utoipa::path(delete, path = "/v1/hosts/{host}", operation_id = "peer_host_delete", tag = "hosts",
    params(("host" = String, Path, description = "Id or name of the host", example = "b"), IfMatchParam),
    responses((status = 204, description = "The host is forgotten")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let ask = change.ask();
    let record = respond::detached(async move { host.delete_peer(&key, &ask).await }).await?;
    Ok(if change.dry_run { previewed(record) } else { StatusCode::NO_CONTENT.into_response() })
}

/// Look at a host's deletion
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/hosts/{host}/deletion-preview", operation_id = "peer_host_deletion_preview_get",
    tag = "hosts", params(("host" = String, Path, description = "Id or name of the host", example = "b")),
    responses((status = 200, description = "It as it is now, and would be gone", body = PeerHost)))]
pub async fn deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let host = state.host()?.clone();
    let record = respond::detached(async move { host.delete_peer(&key, &Ask::dry_run()).await }).await?;
    Ok(previewed(record))
}
