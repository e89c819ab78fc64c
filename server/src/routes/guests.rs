//! Guests: definition, lifecycle, console, RAM, and plans for their mirrors.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{GuestAction, GuestSpec, HostError, PlanOptions};

use super::{IfMatchParam, IfNoneMatchParam, PageParams, WaitParams};
use crate::api::guests::{Console, Guest, GuestCreate, GuestList};
use crate::api::layout::{AddressSpacePlan, AddressSpacePlanCreate};
use crate::api::page::{Scope, cut};
use crate::http::body::JsonBody;
use crate::http::precondition::IfMatch;
use crate::http::query::Query;
use crate::http::{negotiate, respond, wait};
use crate::problem::{MAX_SAFE_INTEGER, Problem};
use crate::state::AppState;

const PATH: &str = "/v1/guests";
/// Bytes of console output when the caller does not say, and at most.
const CONSOLE_DEFAULT: usize = 64 << 10;
const CONSOLE_MAX: usize = 1 << 20;

/// List the guests
///
/// Guests of this host, by creation.
#[utoipa::path(get, path = "/v1/guests", operation_id = "guest_list", tag = "guests", params(PageParams),
    responses((status = 200, description = "A page of guests", body = GuestList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let scope = Scope::new("guests", &[]);
    let mut parameters = query.read()?;
    let request = parameters.page(&scope);
    parameters.done()?;
    let (items, next) = cut(state.host()?.guests(), &request, |g| (g.created_at, g.id));
    let (next_page_token, link) = respond::next_page(PATH, &[], &scope, &request, next);
    let items = items.into_iter().map(Guest::from).collect();
    Ok(respond::list(GuestList { items, next_page_token }, link))
}

/// Define a guest
///
/// It is `stopped` until it is started.
#[utoipa::path(post, path = "/v1/guests", operation_id = "guest_create", tag = "guests", request_body = GuestCreate,
    responses((status = 201, description = "The guest is defined", body = Guest)))]
pub async fn create(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<GuestCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let spec = GuestSpec::from(body);
    let record = respond::detached(async move { host.define_guest(spec).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::created(&location, generation, Guest::from(record)))
}

/// Get a guest
///
/// By id or name. With `If-None-Match` and `wait` the answer comes when the guest changes.
#[utoipa::path(get, path = "/v1/guests/{guest}", operation_id = "guest_get", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The guest", body = Guest)))]
pub async fn get(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let limit = parameters.wait();
    parameters.done()?;
    let host = state.host()?;
    wait::get(&state, &headers, limit, || {
        let record = host.guest(&key)?;
        Ok((record.generation, Guest::from(record)))
    })
    .await
}

/// Undefine a guest
///
/// Only a stopped or failed one.
#[utoipa::path(delete, path = "/v1/guests/{guest}", operation_id = "guest_delete", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 204, description = "The guest is gone")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(mut key): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let condition = IfMatch::read(&headers)?;
    let host = state.host()?.clone();
    if !condition.is_absent() {
        let record = host.guest(&key)?;
        condition.check(record.generation)?;
        key = record.id.to_string();
    }
    respond::detached(async move { host.delete_guest(&key).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn act(
    state: &AppState,
    mut key: String,
    headers: &HeaderMap,
    action: GuestAction,
) -> Result<Response, Problem> {
    let condition = IfMatch::read(headers)?;
    let host = state.host()?.clone();
    if !condition.is_absent() {
        let record = host.guest(&key)?;
        condition.check(record.generation)?;
        key = record.id.to_string();
    }
    let record = respond::detached(async move { host.guest_action(&key, action).await }).await?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::accepted(&location, generation, Guest::from(record)))
}

/// Start a guest
///
/// `stopped` to `running`. Starting a running guest changes nothing.
#[utoipa::path(post, path = "/v1/guests/{guest}/start", operation_id = "guest_start", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 202, description = "Accepted; `state` tells how it goes on", body = Guest)))]
pub async fn start(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    act(&state, key, &headers, GuestAction::Start).await
}

/// Pause a guest
///
/// `running` to `paused`. Its memory stays.
#[utoipa::path(post, path = "/v1/guests/{guest}/pause", operation_id = "guest_pause", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 202, description = "Accepted; `state` tells how it goes on", body = Guest)))]
pub async fn pause(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    act(&state, key, &headers, GuestAction::Pause).await
}

/// Resume a guest
///
/// `paused` to `running`.
#[utoipa::path(post, path = "/v1/guests/{guest}/resume", operation_id = "guest_resume", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 202, description = "Accepted; `state` tells how it goes on", body = Guest)))]
pub async fn resume(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    act(&state, key, &headers, GuestAction::Resume).await
}

/// Stop a guest
///
/// Any state to `stopped`. Its memory is gone.
#[utoipa::path(post, path = "/v1/guests/{guest}/stop", operation_id = "guest_stop", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 202, description = "Accepted; `state` tells how it goes on", body = Guest)))]
pub async fn stop(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    act(&state, key, &headers, GuestAction::Stop).await
}

/// Get console output
///
/// Serial output from a byte offset: JSON, or the raw bytes with `Accept: text/plain` and the offsets in the
/// `x-console-offset`, `x-console-next-offset` and `x-console-end-offset` headers.
#[utoipa::path(get, path = "/v1/guests/{guest}/console", operation_id = "guest_console_get", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("offset" = Option<u64>, Query, description = "First byte wanted; absent: the oldest that is kept"),
        ("max_bytes" = Option<u64>, Query, description = "Most bytes", minimum = 1, maximum = 1048576),
    ),
    responses((status = 200, description = "The output", content(
        (Console = "application/json"),
        (String = "text/plain"),
    ))))]
pub async fn console(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let offset = parameters.int("offset", 0, MAX_SAFE_INTEGER);
    let max = parameters.int("max_bytes", 1, CONSOLE_MAX).unwrap_or(CONSOLE_DEFAULT);
    parameters.done()?;
    let media = negotiate::choose(&headers, &["application/json", "text/plain"])?;
    let chunk = state.host()?.console(&key, offset, max)?;
    if media == "application/json" {
        return Ok(Json(Console::from(chunk)).into_response());
    }
    let next = chunk.offset + chunk.data.len() as u64;
    let offsets = [
        (HeaderName::from_static("x-console-offset"), HeaderValue::from(chunk.offset)),
        (HeaderName::from_static("x-console-next-offset"), HeaderValue::from(next)),
        (HeaderName::from_static("x-console-end-offset"), HeaderValue::from(chunk.end)),
    ];
    Ok((offsets, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], chunk.data).into_response())
}

/// Plan an address space
///
/// What a mirror of the guest would look like under a strategy. Changes nothing. When the strategy does not
/// work for the guest, the problem `plan_refused` has every refusal.
#[utoipa::path(post, path = "/v1/guests/{guest}/address-space-plans",
    operation_id = "address_space_plan_create", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1")),
    request_body = AddressSpacePlanCreate,
    responses((status = 200, description = "The plan", body = AddressSpacePlan)))]
pub async fn plan(
    State(state): State<AppState>,
    Path(key): Path<String>,
    JsonBody(body): JsonBody<AddressSpacePlanCreate>,
) -> Result<Json<AddressSpacePlan>, Problem> {
    let host = state.host()?;
    let layout = host.guest(&key)?.layout;
    let options = PlanOptions {
        limits: body.host_limits.map(Into::into),
        declaration: body.declared().map_err(|refusal| HostError::PlanRefused(vec![refusal]))?,
        confidentiality: body.confidentiality.map(Into::into),
        read_only_text: body.read_only_text,
    };
    let plan = host.plan(&key, body.strategy.into(), body.workers, &options)?;
    Ok(Json(AddressSpacePlan::new(&plan, &layout)))
}
