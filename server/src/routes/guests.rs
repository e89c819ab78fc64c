//! Guests: definition, lifecycle, console, RAM, and plans for their mirrors.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{
    Ask, ConsoleChunk, FieldError, GuestAction, GuestRecord, GuestSpec, GuestState, HostError, Labels,
    PlanOptions, ResourceKind,
};
use mirrorvm::reading::Json as Body;

use super::common::{
    CreateOnlyParam, DryRunParam, IdempotencyKeyParam, IfMatchParam, IfNoneMatchParam, LabelParams,
    NamedSortParams, PageParams, WaitParams, check_put, must_be_there, new_id,
};
use crate::access::caller::Caller;
use crate::api::decode::{Errors, Node, Raw, decode_by, problems};
use crate::api::guests::{Console, Guest, GuestConfirm, GuestCreate, GuestList};
use crate::api::labels;
use crate::api::layout::{AddressSpacePlan, AddressSpacePlanCreate};
use crate::api::page::Scope;
use crate::api::patch::{GuestUpdate, relabel};
use crate::api::stats::GuestStats;
use crate::api::{Preview, Warning};
use crate::http::body::{JsonBody, PatchBody};
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::{negotiate, respond, wait};
use crate::problem::{MAX_SAFE_INTEGER, Problem};
use crate::state::AppState;

const PATH: &str = "/v1/guests";
/// How many bytes of console output are sent when the caller does not say, and at most.
const CONSOLE_DEFAULT: usize = 64 << 10;
const CONSOLE_MAX: usize = 1 << 20;

/// About how many bytes a guest takes as JSON, which decides how much room the answer of a list begins with.
const GUEST_BYTES: usize = 768;

/// List the guests
///
/// The guests of this host.
#[utoipa::path(get, path = "/v1/guests", operation_id = "guest_list", tag = "guests",
    params(
        ("state" = Option<Vec<String>>, Query, description = "Only those in one of these states; may be repeated"),
        LabelParams, NamedSortParams, PageParams,
    ),
    responses((status = 200, description = "A page of guests", body = GuestList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let states = parameters.each_of("state", GuestState::ALL, GuestState::name);
    let having = parameters.labels();
    let texts: Vec<String> = having.iter().map(labels::text).collect();
    let mut filters: Vec<(&str, &str)> = states.iter().map(|s| ("state", s.name())).collect();
    filters.extend(texts.iter().map(|t| ("label", t.as_str())));
    let scope = Scope::new(state.page_key(), "guests", &filters);
    let request = parameters.page(&scope, true);
    parameters.done()?;
    let host = state.host()?;
    let ((items, next), cursor) = host.listed(|host| host.guest_page(&request, &states, &having));
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let count = items.len();
    let guests = respond::Lazily(items, |g: &Arc<GuestRecord>| Guest::of(g, state.drivers()));
    Ok(respond::long_list(guests, next_page_token, link, cursor.to_string(), count * GUEST_BYTES))
}

fn made(state: &AppState, record: &GuestRecord) -> Response {
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    respond::created(&location, generation, Guest::of(record, state.drivers()))
}

/// A definition in a body, read by this daemon's drivers.
fn defined(state: &AppState, body: &Body) -> Result<GuestSpec, Problem> {
    let by = |node: &Node<'_>, errors: &mut Errors| GuestCreate::decode(node, errors, state.drivers());
    decode_by(body, by).map(GuestSpec::from).map_err(|found| Problem::validation(problems(found)))
}

fn previewed(state: &AppState, record: &GuestRecord, warnings: Vec<Warning>) -> Response {
    let generation = record.generation;
    let preview = Some(Preview { warnings, address_space_plan: None });
    respond::ok(generation, Guest { preview, ..Guest::of(record, state.drivers()) })
}

/// Define a guest
///
/// The guest is `stopped` until it is started.
#[utoipa::path(post, path = "/v1/guests", operation_id = "guest_create", tag = "guests", request_body = GuestCreate,
    params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest that would be defined", body = Guest),
        (status = 201, description = "The guest is defined", body = Guest),
    ))]
pub async fn create(
    State(state): State<AppState>,
    change: Change,
    JsonBody(Raw(body)): JsonBody<Raw>,
) -> Result<Response, Problem> {
    let spec = defined(&state, &body)?;
    let host = state.host()?.clone();
    let (id, ask) = (change.id(), change.ask());
    let defined = respond::attempted({
        let host = host.clone();
        async move { host.define_guest(spec, &ask).await }
    });
    match (defined.await?, id) {
        (Ok(record), _) if change.dry_run => Ok(previewed(&state, &record, Vec::new())),
        (Ok(record), _) => Ok(made(&state, &record)),
        // Defined by an earlier daemon that died over this very request.
        (Err(HostError::IdTaken { .. }), Some(id)) if change.again() => {
            Ok(made(&state, &host.guest(&id.to_string())?))
        }
        (Err(e), _) => Err(e.into()),
    }
}

/// Define a guest under an id of your choice
///
/// Makes the guest, or finds it. Sending the same definition again is answered with 200 and changes nothing;
/// another definition is refused with `id_taken`. With `If-None-Match: *` a guest that exists already is
/// refused with 412.
#[utoipa::path(put, path = "/v1/guests/{guest}", operation_id = "guest_put", tag = "guests", request_body = GuestCreate,
    params(("guest" = Uuid, Path, description = "Id of the guest, a UUID", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, CreateOnlyParam, IfMatchParam),
    responses(
        (status = 200, description = "The guest is there already; or with `dry_run`, what would be defined", body = Guest),
        (status = 201, description = "The guest is defined", body = Guest),
    ))]
pub async fn put(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(Raw(body)): JsonBody<Raw>,
) -> Result<Response, Problem> {
    let spec = defined(&state, &body)?;
    let host = state.host()?.clone();
    let id = new_id(&key)?;
    if let Ok(there) = host.guest(&id.to_string()) {
        check_put(&change, ResourceKind::Guest, there.generation)?;
        // Labels may have changed since.
        let same = GuestSpec { labels: spec.labels.clone(), ..there.spec.clone() } == spec;
        let taken = || Err(HostError::IdTaken { kind: ResourceKind::Guest }.into());
        return if same {
            Ok(respond::ok(there.generation, Guest::of(&there, state.drivers())))
        } else {
            taken()
        };
    }
    must_be_there(&change, ResourceKind::Guest)?;
    let ask = change.ask().with_id(Some(id));
    let record = respond::detached(async move { host.define_guest(spec, &ask).await }).await?;
    Ok(if change.dry_run { previewed(&state, &record, Vec::new()) } else { made(&state, &record) })
}

/// Get a guest
///
/// By id or name. With `If-None-Match` and `wait` the answer comes when the guest changes.
#[utoipa::path(get, path = "/v1/guests/{guest}", operation_id = "guest_get", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The guest", body = Guest)))]
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(key): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let limit = parameters.wait();
    parameters.done()?;
    let host = state.host()?;
    wait::get(&state, &caller, &headers, limit, || {
        let record = host.guest(&key)?;
        Ok((record.generation, Guest::of(&record, state.drivers())))
    })
    .await
}

/// Change a guest
///
/// A JSON merge patch of its labels. It works in every state. Labels move along with a migration: they cannot
/// change from the moment at which the guest's state leaves for the destination until the migration has
/// ended.
#[utoipa::path(patch, path = "/v1/guests/{guest}", operation_id = "guest_update", tag = "guests",
    request_body(content = GuestUpdate, content_type = "application/merge-patch+json"),
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), DryRunParam, IfMatchParam),
    responses((status = 200, description = "The guest as it is now, or with `dry_run` as it would be", body = Guest)))]
pub async fn update(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    PatchBody(body): PatchBody<GuestUpdate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let merge = |now: &Labels| relabel(now, body.labels);
    let ask = change.ask();
    let relabeled = async move { host.change_labels(&key, merge, &ask).await };
    let record = respond::detached(relabeled).await?;
    if change.dry_run {
        return Ok(previewed(&state, &record, Vec::new()));
    }
    Ok(respond::ok(record.generation, Guest::of(&record, state.drivers())))
}

/// Undefine a guest
///
/// The guest must be stopped or failed.
#[utoipa::path(delete, path = "/v1/guests/{guest}", operation_id = "guest_delete", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IfMatchParam),
    responses((status = 204, description = "The guest is gone")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let ask = change.ask();
    let record = respond::detached(async move { host.delete_guest(&key, &ask).await }).await?;
    if change.dry_run {
        return Ok(previewed(&state, &record, Vec::new()));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Look at a guest's deletion
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/guests/{guest}/deletion-preview", operation_id = "guest_deletion_preview_get",
    tag = "guests", params(("guest" = String, Path, description = "Id or name of the guest", example = "g1")),
    responses((status = 200, description = "It as it is now, and would be gone", body = Guest)))]
pub async fn deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let host = state.host()?.clone();
    let record = respond::detached(async move { host.delete_guest(&key, &Ask::dry_run()).await }).await?;
    Ok(previewed(&state, &record, Vec::new()))
}

async fn act(
    state: &AppState,
    key: String,
    change: Change,
    action: GuestAction,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let ask = change.ask();
    let record = respond::detached(async move { host.guest_action(&key, action, &ask).await }).await?;
    if change.dry_run {
        let lost = "the guest's memory is lost: it is not shut down, it is switched off";
        let warnings =
            if action == GuestAction::Stop { vec![Warning::new("memory_is_lost", lost)] } else { Vec::new() };
        return Ok(previewed(state, &record, warnings));
    }
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::accepted(&location, generation, Guest::of(&record, state.drivers())))
}

/// Start a guest
///
/// From `stopped` to `running`. Starting a running guest changes nothing.
#[utoipa::path(post, path = "/v1/guests/{guest}/start", operation_id = "guest_start", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest as it would be", body = Guest),
        (status = 202, description = "Accepted; `state` tells how it goes on", body = Guest),
    ))]
pub async fn start(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    act(&state, key, change, GuestAction::Start).await
}

/// Pause a guest
///
/// From `running` to `paused`. The guest keeps its memory, and its clock stands still: after it is resumed,
/// its clock is behind by the length of the pause until the guest sets it, for instance by NTP.
#[utoipa::path(post, path = "/v1/guests/{guest}/pause", operation_id = "guest_pause", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest as it would be", body = Guest),
        (status = 202, description = "Accepted; `state` tells how it goes on", body = Guest),
    ))]
pub async fn pause(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    act(&state, key, change, GuestAction::Pause).await
}

/// Resume a guest
///
/// From `paused` to `running`.
#[utoipa::path(post, path = "/v1/guests/{guest}/resume", operation_id = "guest_resume", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest as it would be", body = Guest),
        (status = 202, description = "Accepted; `state` tells how it goes on", body = Guest),
    ))]
pub async fn resume(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    act(&state, key, change, GuestAction::Resume).await
}

/// Stop a guest
///
/// From any state to `stopped`. The content of its memory is lost.
#[utoipa::path(post, path = "/v1/guests/{guest}/stop", operation_id = "guest_stop", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest as it would be", body = Guest),
        (status = 202, description = "Accepted; `state` tells how it goes on", body = Guest),
    ))]
pub async fn stop(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    act(&state, key, change, GuestAction::Stop).await
}

/// Confirm a guest
///
/// Says that an `unconfirmed` guest belongs to this host, without waiting for peers that have not answered.
/// It is meant for hosts whose state was put back from a backup. If another host has the guest, it will exist
/// twice. The audit log keeps who said so.
#[utoipa::path(post, path = "/v1/guests/{guest}/confirm", operation_id = "guest_confirm", tag = "guests",
    request_body = GuestConfirm,
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: the guest as it would be", body = Guest),
        (status = 202, description = "Confirmed; confirming a confirmed guest changes nothing", body = Guest),
    ))]
pub async fn confirm(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<GuestConfirm>,
) -> Result<Response, Problem> {
    let name = state.host()?.guest(&key)?.spec.name;
    if body.confirm != name {
        let detail = format!("to confirm, give the guest's name: {name:?}");
        return Err(HostError::Invalid(vec![FieldError::new("/confirm", "not_confirmed", detail)]).into());
    }
    act(&state, key, change, GuestAction::Confirm).await
}

/// Get console output
///
/// Serial output from a byte offset on: as JSON, or with `Accept: text/plain` as raw bytes, with the offsets
/// in the headers `x-console-offset`, `x-console-next-offset` and `x-console-end-offset`.
#[utoipa::path(get, path = "/v1/guests/{guest}/console", operation_id = "guest_console_get", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("offset" = Option<u64>, Query, description = "First byte wanted; absent: the oldest that is kept"),
        ("max_bytes" = Option<u64>, Query, description = "Most bytes", minimum = 1, maximum = 1048576),
    ),
    responses((status = 200, description = "The output", body = Console)))]
pub async fn console(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (offset, max) = console_range(&query)?;
    let media = negotiate::choose(&headers, &["application/json", "text/plain"])?;
    let chunk = state.host()?.console(&key, offset, max)?;
    Ok(if media == "application/json" { Json(Console::from(chunk)).into_response() } else { as_text(chunk) })
}

/// Which part of the output is wanted.
fn console_range(query: &Query) -> Result<(Option<u64>, usize), Problem> {
    let mut parameters = query.read()?;
    let offset = parameters.int("offset", 0, MAX_SAFE_INTEGER);
    let max = parameters.int("max_bytes", 1, CONSOLE_MAX).unwrap_or(CONSOLE_DEFAULT);
    parameters.done()?;
    Ok((offset, max))
}

/// The bytes as they are, and in headers which they are.
fn as_text(chunk: ConsoleChunk) -> Response {
    let next = chunk.offset + chunk.data.len() as u64;
    let offsets = [
        (HeaderName::from_static("x-console-offset"), HeaderValue::from(chunk.offset)),
        (HeaderName::from_static("x-console-next-offset"), HeaderValue::from(next)),
        (HeaderName::from_static("x-console-end-offset"), HeaderValue::from(chunk.end)),
    ];
    (offsets, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], chunk.data).into_response()
}

/// Get console output as text
///
/// The bytes as the guest wrote them. `x-console-offset`, `x-console-next-offset` and
/// `x-console-end-offset` say which part of the output they are.
#[utoipa::path(get, path = "/v1/guests/{guest}/console.txt", operation_id = "guest_console_text_get", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("offset" = Option<u64>, Query, description = "First byte wanted; absent: the oldest that is kept"),
        ("max_bytes" = Option<u64>, Query, description = "Most bytes", minimum = 1, maximum = 1048576),
    ),
    responses((status = 200, description = "The output", body = String, content_type = "text/plain")))]
pub async fn console_text(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    let (offset, max) = console_range(&query)?;
    Ok(as_text(state.host()?.console(&key, offset, max)?))
}

/// Get a guest's counters
///
/// Counters of vCPUs, console and memory, as they are now.
#[utoipa::path(get, path = "/v1/guests/{guest}/stats", operation_id = "guest_stats_get", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1")),
    responses((status = 200, description = "The counters", body = GuestStats)))]
pub async fn stats(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<GuestStats>, Problem> {
    Ok(Json(state.host()?.guest_stats(&key)?.into()))
}

/// Plan an address space
///
/// Shows what a mirror of the guest would look like under a strategy, and changes nothing. When the strategy
/// does not work for the guest, the problem `plan_refused` lists every refusal.
#[utoipa::path(post, path = "/v1/guests/{guest}/address-space-plans",
    operation_id = "address_space_plan_create", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), IdempotencyKeyParam),
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
        helper_image: body.helper_image,
    };
    let plan = host.plan(&key, body.strategy.into(), body.workers, &options)?;
    Ok(Json(AddressSpacePlan::new(&plan, &layout)))
}
