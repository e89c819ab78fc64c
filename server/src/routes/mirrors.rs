//! Mirrors and their layout.

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::events::Event;
use mirrorvm::host::{
    Ask, GuestRecord, Host, HostError, MirrorRecord, MirrorSpec, MirrorState, ResourceKind,
};
use uuid::Uuid;

use super::common::{
    CreateOnlyParam, DryRunParam, IdempotencyKeyParam, IfMatchParam, IfNoneMatchParam, LabelParams,
    PageParams, SortParams, WaitParams, check_put, must_be_there, new_id,
};
use super::events::expired;
use crate::access::caller::Caller;
use crate::api::Preview;
use crate::api::batches::{BatchBody, ExportBody, ImportBody, ImportRequest, MirrorImport};
use crate::api::labels;
use crate::api::layout::AddressSpacePlan;
use crate::api::mirrors::{Mirror, MirrorCreate, MirrorList};
use crate::api::page::{LIMIT_MAX, Scope};
use crate::api::patch::MirrorUpdate;
use crate::api::stats::{MirrorLog, MirrorLogLine, MirrorStats};
use crate::draw;
use crate::http::body::{JsonBody, PatchBody};
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::{negotiate, respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

const PATH: &str = "/v1/mirrors";

/// Reads the id in a path. Text that is not an id names nothing.
fn id_of(key: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(key).map_err(|_| HostError::missing(ResourceKind::Mirror, key).into())
}

/// List the mirrors
///
/// The mirrors of this host.
#[utoipa::path(get, path = "/v1/mirrors", operation_id = "mirror_list", tag = "mirrors",
    params(
        ("guest" = Option<String>, Query, description = "Only those of this guest, by id or name"),
        ("state" = Option<Vec<String>>, Query, description = "Only those in one of these states; may be repeated"),
        LabelParams, SortParams, PageParams,
    ),
    responses((status = 200, description = "A page of mirrors", body = MirrorList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let guest = parameters.one("guest");
    let states = parameters.each_of("state", MirrorState::ALL, MirrorState::name);
    let having = parameters.labels();
    let texts: Vec<String> = having.iter().map(labels::text).collect();
    let mut filters: Vec<(&str, &str)> = guest.iter().map(|g| ("guest", g.as_str())).collect();
    filters.extend(states.iter().map(|s| ("state", s.name())));
    filters.extend(texts.iter().map(|t| ("label", t.as_str())));
    let scope = Scope::new(state.page_key(), "mirrors", &filters);
    let request = parameters.page(&scope, false);
    parameters.done()?;
    let host = state.host()?;
    let ((items, next), cursor) =
        host.listed(|host| host.mirror_page(&request, guest.as_deref(), &states, &having));
    let events_cursor = cursor.to_string();
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let items = items.into_iter().map(Mirror::from).collect();
    Ok(respond::list(MirrorList { items, next_page_token, events_cursor }, link))
}

fn made(record: MirrorRecord) -> Response {
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    respond::created(&location, generation, Mirror::from(record))
}

/// The mirror that would be made, for a dry run.
fn previewed(host: &Host, record: MirrorRecord) -> Result<Response, Problem> {
    let guest = host.guest(&record.guest.to_string())?;
    let plan = AddressSpacePlan::new(&record.plan, &guest.layout);
    let preview = Preview { warnings: Vec::new(), address_space_plan: Some(plan) };
    let generation = record.generation;
    Ok(respond::ok(generation, Mirror { preview: Some(preview), ..Mirror::from(record) }))
}

/// Makes it, or looks at what would be made.
async fn make(host: &Host, change: &Change, id: Option<Uuid>, spec: MirrorSpec) -> Result<Response, Problem> {
    let (theirs, ask) = (host.clone(), change.ask().with_id(id));
    let record = respond::detached(async move { theirs.create_mirror(spec, &ask).await }).await?;
    if change.dry_run { previewed(host, record) } else { Ok(made(record)) }
}

/// Make a mirror
///
/// The guest must be running or paused. The answer comes when the mirror's helper is ready.
#[utoipa::path(post, path = "/v1/mirrors", operation_id = "mirror_create", tag = "mirrors",
    request_body = MirrorCreate, params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the mirror that would be made, with its plan", body = Mirror),
        (status = 201, description = "The mirror is ready", body = Mirror),
    ))]
pub async fn create(
    State(state): State<AppState>,
    change: Change,
    JsonBody(body): JsonBody<MirrorCreate>,
) -> Result<Response, Problem> {
    make(state.host()?, &change, change.id(), MirrorSpec::from(body)).await
}

/// Make a mirror under an id of your choice
///
/// Makes the mirror, or finds it. A request with the same guest, strategy, workers, placement and image is
/// answered with 200 and changes nothing; any other is refused with `id_taken`.
#[utoipa::path(put, path = "/v1/mirrors/{mirror}", operation_id = "mirror_put", tag = "mirrors",
    request_body = MirrorCreate,
    params(("mirror" = Uuid, Path, description = "Id of the mirror, a UUID", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, CreateOnlyParam, IfMatchParam),
    responses(
        (status = 200, description = "The mirror is there already; or with `dry_run`, what would be made", body = Mirror),
        (status = 201, description = "The mirror is ready", body = Mirror),
    ))]
pub async fn put(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<MirrorCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let id = new_id(&key)?;
    let spec = MirrorSpec::from(body);
    if let Ok(there) = host.mirror(id) {
        check_put(&change, ResourceKind::Mirror, there.generation)?;
        let guest = host.guest(&spec.guest).map(|g| g.id).ok();
        let same = guest == Some(there.guest)
            && spec.strategy == there.strategy
            && spec.workers as usize == there.workers.len()
            && spec.options.placement == there.placement
            && host
                .image(spec.options.helper_image.as_deref().unwrap_or("built-in"))
                .is_ok_and(|i| i.content.is_some_and(|c| c.measurement == there.helper_measurement));
        let taken = || Err(HostError::IdTaken { kind: ResourceKind::Mirror }.into());
        return if same { Ok(respond::ok(there.generation, Mirror::from(there))) } else { taken() };
    }
    must_be_there(&change, ResourceKind::Mirror)?;
    make(&host, &change, Some(id), spec).await
}

/// Change a mirror
///
/// A JSON merge patch of where its vCPU threads run and how they are scheduled. It takes effect at once, even
/// while a migration uses the mirror.
#[utoipa::path(patch, path = "/v1/mirrors/{mirror}", operation_id = "mirror_update", tag = "mirrors",
    request_body(content = MirrorUpdate, content_type = "application/merge-patch+json"),
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IfMatchParam),
    responses((status = 200, description = "The mirror as it is now, or with `dry_run` as it would be", body = Mirror)))]
pub async fn update(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    PatchBody(body): PatchBody<MirrorUpdate>,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?, id_of(&key)?);
    let record = host.place_mirror(id, |now| body.placed(now), &change.ask())?;
    let preview = change.dry_run.then(Preview::default);
    Ok(respond::ok(record.generation, Mirror { preview, ..Mirror::from(record) }))
}

/// Get a mirror
///
/// With `If-None-Match` and `wait` the answer comes when the mirror changes.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}", operation_id = "mirror_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The mirror", body = Mirror)))]
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
    let (host, id) = (state.host()?, id_of(&key)?);
    wait::get(&state, &caller, &headers, limit, || {
        let record = host.mirror(id)?;
        Ok((record.generation, Mirror::from(record)))
    })
    .await
}

/// A mirror that a dry run looked at.
fn looked_at(record: MirrorRecord) -> Response {
    let preview = Some(Preview::default());
    respond::ok(record.generation, Mirror { preview, ..Mirror::from(record) })
}

/// Remove a mirror
///
/// Not possible while a migration uses the mirror.
#[utoipa::path(delete, path = "/v1/mirrors/{mirror}", operation_id = "mirror_delete", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), IfMatchParam),
    responses((status = 204, description = "The mirror is gone")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let ask = change.ask();
    let record = respond::detached(async move { host.delete_mirror(id, &ask).await }).await?;
    if change.dry_run {
        return Ok(looked_at(record));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Look at a mirror's deletion
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/deletion-preview", operation_id = "mirror_deletion_preview_get",
    tag = "mirrors", params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "It as it is now, and would be gone", body = Mirror)))]
pub async fn deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let record = respond::detached(async move { host.delete_mirror(id, &Ask::dry_run()).await }).await?;
    Ok(looked_at(record))
}

/// Seal RAM for an import
///
/// The mirror's helper seals pages of its guest for one import of another mirror of the same guest. (All
/// helpers of a guest have the same secret. One of the two mirrors must be `psp-copied`, because only one can
/// use the helper's block.) Batches belong to one session until `last`, and the mirror is `busy` meanwhile.
/// The pages of a running guest are each sealed as they are at that moment; pause the guest for a picture of
/// one moment. Refused with `state_conflict` or `guest_migrating` when the helper has other work, and with
/// `validation_failed` for ranges that are not RAM, that the mirror does not reach, that belong to the
/// helper, or that the guest shares with its host.
#[utoipa::path(post, path = "/v1/mirrors/{mirror}/exports", operation_id = "mirror_export", tag = "mirrors",
    request_body = ExportBody,
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IfMatchParam, IdempotencyKeyParam),
    responses((status = 200, description = "The sealed batch; with `dry_run`, without its records", body = BatchBody)))]
pub async fn export(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<ExportBody>,
) -> Result<Json<BatchBody>, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let ask = change.ask();
    let batch = respond::detached(async move { host.export_batch(id, body.into(), &ask).await }).await?;
    let preview = change.dry_run.then(Preview::default);
    Ok(Json(BatchBody { preview, ..batch.into() }))
}

/// Take a sealed batch back
///
/// In three steps: `open` gives an id and a nonce for `POST …/exports` of the other mirror; `batch` writes
/// what it sealed, in order, into the RAM of the paused guest; `close` gives up. An import ends with its last
/// batch, or with the first that is refused (`batch_refused`). Its helper ends with it, and the mirror gets a
/// fresh one under the same id. Encrypted guests cannot take pages back: it would be a rollback that their
/// owner has not agreed to.
#[utoipa::path(post, path = "/v1/mirrors/{mirror}/imports", operation_id = "mirror_import", tag = "mirrors",
    request_body = ImportBody,
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IfMatchParam, IdempotencyKeyParam),
    responses((status = 200, description = "How the import is", body = MirrorImport)))]
pub async fn import(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<ImportRequest>,
) -> Result<Json<MirrorImport>, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let ask = change.ask();
    let report = respond::detached(async move { host.import_step(id, body.0, &ask).await }).await?;
    let preview = change.dry_run.then(Preview::default);
    Ok(Json(MirrorImport { preview, ..report.into() }))
}

/// Get a mirror's counters
///
/// Exits and CPU time of its vCPUs, as they are now.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/stats", operation_id = "mirror_stats_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "The counters", body = MirrorStats)))]
pub async fn stats(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<MirrorStats>, Problem> {
    Ok(Json(state.host()?.mirror(id_of(&key)?)?.into()))
}

/// List what the host noted about a mirror
///
/// Its events as lines of text: changes of state and failures, including those of its helper.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/log", operation_id = "mirror_log_list", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "The lines", body = MirrorLog)))]
pub async fn log(State(state): State<AppState>, Path(key): Path<String>) -> Result<Json<MirrorLog>, Problem> {
    let (host, id) = (state.host()?, id_of(&key)?);
    let _ = host.mirror(id)?;
    let page =
        host.events().page(None, LIMIT_MAX, &[id.to_string()], |body| body.id == id).map_err(expired)?;
    let line = |e: Event| {
        let kind = e.body.kind();
        let state = e.body.data.get("state").and_then(serde_json::Value::as_str).unwrap_or_default();
        MirrorLogLine { id: e.cursor.to_string(), time: e.at, message: format!("{kind}: {state}") }
    };
    Ok(Json(MirrorLog { items: page.events.into_iter().map(line).collect() }))
}

/// Get a mirror's address space
///
/// The plan in force, in numbers. `layout.svg` draws it.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/layout", operation_id = "mirror_layout_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "The layout", body = AddressSpacePlan)))]
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
    Ok(drawn(&mirror, &guest))
}

fn drawn(mirror: &MirrorRecord, guest: &GuestRecord) -> Response {
    let svg = draw::layout(&mirror.plan, &guest.layout, &guest.spec.name);
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    ([(header::CONTENT_TYPE, draw::SVG), (header::CONTENT_SECURITY_POLICY, policy)], svg).into_response()
}

/// Draw a mirror's address space
///
/// The plan in force as a drawing: guest-physical space, RAM, mirror-physical space and the helper's
/// virtual space side by side, with what the plan lays open.
#[utoipa::path(get, path = "/v1/mirrors/{mirror}/layout.svg", operation_id = "mirror_drawing_get", tag = "mirrors",
    params(("mirror" = String, Path, description = "Id of the mirror", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "The drawing", body = String, content_type = "image/svg+xml")))]
pub async fn drawing(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let host = state.host()?;
    let mirror = host.mirror(id_of(&key)?)?;
    Ok(drawn(&mirror, &host.guest(&mirror.guest.to_string())?))
}
