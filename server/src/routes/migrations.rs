//! Migrations: creation, progress, cancellation, what they measured.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{
    Ask, Begun, Destination, Host, HostError, MigrationPreview, MigrationRecord, MigrationSpec,
    MigrationState, MirrorChoice, ResourceKind, Ticket,
};
use uuid::Uuid;

use super::common::{
    CreateOnlyParam, DryRunParam, IdempotencyKeyParam, IfMatchParam, IfNoneMatchParam, LabelParams,
    PageParams, PreferParam, SortParams, WaitParams, check_put, must_be_there, new_id,
};
use crate::access::caller::Caller;
use crate::api::checks::MigrationCheck;
use crate::api::labels;
use crate::api::layout::AddressSpacePlan;
use crate::api::migrations::{Migration, MigrationCreate, MigrationList, MigrationRound, MigrationRoundList};
use crate::api::page::Scope;
use crate::api::patch::MigrationUpdate;
use crate::api::{Preview, Warning};
use crate::http::body::{JsonBody, PatchBody};
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::{negotiate, respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

pub(super) const PATH: &str = "/v1/migrations";

/// Reads the id in a path. Text that is not an id names nothing.
pub(super) fn id_of(key: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(key).map_err(|_| HostError::missing(ResourceKind::Migration, key).into())
}

/// List the migrations
///
/// Migrations from and to this host. Those that have ended stay until they are deleted.
#[utoipa::path(get, path = "/v1/migrations", operation_id = "migration_list", tag = "migrations",
    params(
        ("state" = Option<Vec<String>>, Query, description = "Only those in one of these states; may be repeated"),
        ("guest" = Option<String>, Query, description = "Only those of this guest, by id or name"),
        LabelParams, SortParams, PageParams,
    ),
    responses((status = 200, description = "A page of migrations", body = MigrationList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let states = parameters.each_of("state", MigrationState::ALL, MigrationState::name);
    let guest = parameters.one("guest");
    let mut filters: Vec<(&str, &str)> = states.iter().map(|s| ("state", s.name())).collect();
    filters.extend(guest.iter().map(|g| ("guest", g.as_str())));
    let having = parameters.labels();
    let texts: Vec<String> = having.iter().map(labels::text).collect();
    filters.extend(texts.iter().map(|t| ("label", t.as_str())));
    let scope = Scope::new(state.page_key(), "migrations", &filters);
    let request = parameters.page(&scope, false);
    parameters.done()?;
    let host = state.host()?;
    let ((items, next), cursor) =
        host.listed(|host| host.migration_page(&request, guest.as_deref(), &states, &having));
    let events_cursor = cursor.to_string();
    let (next_page_token, link) = respond::next_page(PATH, &filters, &scope, &request, next);
    let items = items.into_iter().map(Migration::from).collect();
    Ok(respond::list(MigrationList { items, next_page_token, events_cursor }, link))
}

/// Completes what a body asks for. When it leaves mirror or streams open and the guest has only the mirror of
/// its launch, that mirror decides, so that the defaults of guests and migrations fit each other.
fn wanted(host: &Host, body: MigrationCreate) -> MigrationSpec {
    let open = body.left_open;
    let mut spec = MigrationSpec::from(body);
    let Some((strategy, workers)) = host.launch_mirror(&spec.guest) else { return spec };
    if open.mirror {
        spec.mirror = MirrorChoice::Template(strategy);
    }
    if open.streams {
        spec.streams = spec.streams.min(u16::try_from(workers).unwrap_or(u16::MAX));
    }
    spec
}

fn made(record: MigrationRecord) -> Response {
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    respond::created(&location, generation, Migration::from(record))
}

/// The migration that would begin, for a dry run.
fn previewed(record: MigrationRecord, would: &MigrationPreview) -> Response {
    let address_space_plan = Some(AddressSpacePlan::new(&would.plan, &would.guest.layout));
    let not_asked = || {
        Warning::new(
            "destination_not_asked",
            "only this host was looked at: the destination's build cannot be asked whether it would let this in",
        )
    };
    let warnings = (!would.destination_asked).then(not_asked).into_iter().collect();
    let preview = Some(Preview { warnings, address_space_plan });
    respond::ok(record.generation, Migration { preview, ..Migration::from(record) })
}

/// Start a migration
///
/// The answer comes when the migration is recorded; `state` and `progress` show how it goes on. With `Prefer:
/// wait=N` (RFC 7240) it comes when the migration has ended, or after N seconds.
#[utoipa::path(post, path = "/v1/migrations", operation_id = "migration_create", tag = "migrations",
    request_body = MigrationCreate, params(DryRunParam, IdempotencyKeyParam, PreferParam),
    responses(
        (status = 200, description = "With `dry_run`: the migration that would begin, with its mirror's plan", body = Migration),
        (status = 201, description = "The migration is recorded", body = Migration),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    change: Change,
    headers: HeaderMap,
    JsonBody(body): JsonBody<MigrationCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let spec = wanted(&host, body);
    let patience = wait::preferred(&headers);
    // A ticket brings its own id, the same every time.
    let session = match &spec.destination {
        Destination::Ticket(text) => Some(Ticket::parse(text)?.session),
        Destination::Host(_) => None,
    };
    let id = if session.is_some() { None } else { change.id() };
    let ask = change.ask().with_id(id);
    let begun = respond::attempted({
        let host = host.clone();
        async move { host.create_migration(spec, &ask).await }
    });
    let record = match (begun.await?, session.or(id)) {
        (Ok(Begun { record, preview: Some(would) }), _) => return Ok(previewed(record, &would)),
        (Ok(Begun { record, preview: None }), _) => record,
        // Begun by an earlier daemon that died over this very request.
        (Err(HostError::IdTaken { .. }), Some(id)) if change.again() => host.migration(id)?,
        (Err(e), _) => return Err(e.into()),
    };
    let id = record.id;
    let (record, waited) =
        wait::end_of(&state, &caller, record, patience, |r| r.state.is_terminal(), || host.migration(id))
            .await;
    let mut response = made(record);
    if waited {
        response.headers_mut().insert(wait::PREFERENCE_APPLIED, wait::applied(patience));
    }
    Ok(response)
}

/// Start a migration under an id of your choice
///
/// Starts the migration, or finds it. Sending the same request again is answered with 200 and changes
/// nothing; another request is refused with `id_taken`.
#[utoipa::path(put, path = "/v1/migrations/{migration}", operation_id = "migration_put", tag = "migrations",
    request_body = MigrationCreate,
    params(("migration" = Uuid, Path, description = "Id of the migration, a UUID", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, CreateOnlyParam, IfMatchParam),
    responses(
        (status = 200, description = "The migration is there already; or with `dry_run`, what would begin", body = Migration),
        (status = 201, description = "The migration is recorded", body = Migration),
    ))]
pub async fn put(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<MigrationCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let id = new_id(&key)?;
    let spec = wanted(&host, body);
    if let Ok(there) = host.migration(id) {
        check_put(&change, ResourceKind::Migration, there.generation)?;
        // Limits may have changed since.
        let same =
            there.spec.as_ref().is_some_and(|s| MigrationSpec { limits: spec.limits, ..s.clone() } == spec);
        let taken = || Err(HostError::IdTaken { kind: ResourceKind::Migration }.into());
        return if same { Ok(respond::ok(there.generation, Migration::from(there))) } else { taken() };
    }
    must_be_there(&change, ResourceKind::Migration)?;
    let ask = change.ask().with_id(Some(id));
    let begun = respond::detached(async move { host.create_migration(spec, &ask).await }).await?;
    Ok(match begun.preview {
        Some(would) => previewed(begun.record, &would),
        None => made(begun.record),
    })
}

/// Change a migration
///
/// A JSON merge patch of its limits, possible until the migration is `finishing`. A new bandwidth applies
/// from the next batch of pages on, other limits from the next time they are looked at.
#[utoipa::path(patch, path = "/v1/migrations/{migration}", operation_id = "migration_update", tag = "migrations",
    request_body(content = MigrationUpdate, content_type = "application/merge-patch+json"),
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IfMatchParam),
    responses((status = 200, description = "The migration as it is now, or with `dry_run` as it would be", body = Migration)))]
pub async fn update(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    PatchBody(body): PatchBody<MigrationUpdate>,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?, id_of(&key)?);
    let now = host.migration(id)?;
    let limits = now.spec.as_ref().map(|s| s.limits).unwrap_or_default();
    let limits = body.limits.map_or(limits, |patch| patch.apply(limits));
    let record = host.limit_migration(id, limits, &change.ask())?;
    let preview = change.dry_run.then(Preview::default);
    Ok(respond::ok(record.generation, Migration { preview, ..Migration::from(record) }))
}

/// Get a migration
///
/// With `If-None-Match` and `wait` the answer comes when the migration changes.
#[utoipa::path(get, path = "/v1/migrations/{migration}", operation_id = "migration_get", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), WaitParams, IfNoneMatchParam),
    responses((status = 200, description = "The migration", body = Migration)))]
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
        let record = host.migration(id)?;
        Ok((record.generation, Migration::from(record)))
    })
    .await
}

/// A migration that a dry run looked at.
fn looked_at(record: MigrationRecord) -> Response {
    let preview = Some(Preview::default());
    respond::ok(record.generation, Migration { preview, ..Migration::from(record) })
}

/// Forget a migration
///
/// The migration must have ended.
#[utoipa::path(delete, path = "/v1/migrations/{migration}", operation_id = "migration_delete", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), IfMatchParam),
    responses((status = 204, description = "The migration is forgotten")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let ask = change.ask();
    let record = respond::detached(async move { host.delete_migration(id, &ask).await }).await?;
    if change.dry_run {
        return Ok(looked_at(record));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Look at a migration's deletion
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/migrations/{migration}/deletion-preview", operation_id = "migration_deletion_preview_get",
    tag = "migrations", params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "It as it is now, and would be gone", body = Migration)))]
pub async fn deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    let record = respond::detached(async move { host.delete_migration(id, &Ask::dry_run()).await }).await?;
    Ok(looked_at(record))
}

/// Cancel a migration
///
/// 202: cancelling was asked for, and `state` will tell what came of it. 200: the migration had already
/// ended. 409 `past_point_of_no_return`: the destination may already run the guest.
#[utoipa::path(post, path = "/v1/migrations/{migration}/cancel", operation_id = "migration_cancel", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "It had ended already; or with `dry_run`, it could be cancelled", body = Migration),
        (status = 202, description = "Cancellation is asked for", body = Migration),
    ))]
pub async fn cancel(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?.clone(), id_of(&key)?);
    // Ended before this request, not through it: a migration that cancellation ends at once is a 202.
    let had_ended = host.migration(id)?.state.is_terminal();
    let ask = change.ask();
    let record = respond::detached(async move { host.cancel_migration(id, &ask).await }).await?;
    if change.dry_run {
        let (preview, generation) = (Some(Preview::default()), record.generation);
        return Ok(respond::ok(generation, Migration { preview, ..Migration::from(record) }));
    }
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    let ended = had_ended || (record.state.is_terminal() && record.state != MigrationState::Canceled);
    let body = Migration::from(record);
    Ok(if ended { respond::ok(generation, body) } else { respond::accepted(&location, generation, body) })
}

/// Switch a migration over now
///
/// The guest is paused and what is left is sent, however long a pause that takes. 409: the migration has not
/// begun, has ended, or has gone too far for this.
#[utoipa::path(post, path = "/v1/migrations/{migration}/switchover", operation_id = "migration_switchover", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"), DryRunParam, IdempotencyKeyParam, IfMatchParam),
    responses(
        (status = 200, description = "With `dry_run`: it could be asked for", body = Migration),
        (status = 202, description = "The switchover is asked for", body = Migration),
    ))]
pub async fn switchover(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let (host, id) = (state.host()?, id_of(&key)?);
    let record = host.switch_over_migration(id, &change.ask())?;
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    let body = Migration::from(record);
    if change.dry_run {
        return Ok(respond::ok(generation, Migration { preview: Some(Preview::default()), ..body }));
    }
    Ok(respond::accepted(&location, generation, body))
}

/// Check a migration
///
/// Finds out whether a migration would work, at this host and by asking the destination, which decides
/// exactly as it would about the migration itself. Nothing is started or kept. Everything that stands in the
/// way is in `blockers`.
#[utoipa::path(post, path = "/v1/migration-checks", operation_id = "migration_check_create", tag = "migrations",
    request_body = MigrationCreate, params(IdempotencyKeyParam),
    responses((status = 200, description = "What was found", body = MigrationCheck)))]
pub async fn check(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<MigrationCreate>,
) -> Result<Json<MigrationCheck>, Problem> {
    let host = state.host()?.clone();
    let spec = wanted(&host, body);
    let found = respond::detached(async move { host.check_migration(spec).await }).await?;
    Ok(Json(found.into()))
}

/// List a migration's rounds
///
/// One entry for each pass over memory. They are kept after the end.
#[utoipa::path(get, path = "/v1/migrations/{migration}/rounds", operation_id = "migration_round_list", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
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
/// For a migration with `verify`: the first 16 bytes of the SHA-256 of every page of RAM while the guest was
/// paused, in the order of RAM addresses. They are the same on both hosts when memory arrived as it left.
#[utoipa::path(get, path = "/v1/migrations/{migration}/page-digests",
    operation_id = "migration_page_digests_get", tag = "migrations",
    params(("migration" = String, Path, description = "Id of the migration", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
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
