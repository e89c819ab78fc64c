//! A guest's RAM: blocks, plugging, encryption status.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use mirrorvm::addr::{Gpa, PAGE_SIZE, RamAddr};
use mirrorvm::address_space::BlockSpec;
use mirrorvm::host::{Ask, GuestRecord, RamBlockInfo};

use super::common::{DryRunParam, IdempotencyKeyParam, IfMatchParam};
use crate::api::encryption::{EncryptionStatusList, EncryptionStatusUpdate, Extent, RamBlockPlug};
use crate::api::guests::BlockBody;
use crate::api::page::{LIMIT_DEFAULT, LIMIT_MAX};
use crate::api::ram_blocks::{RamBlock, RamBlockList};
use crate::http::body::JsonBody;
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::respond;
use crate::problem::{MAX_SAFE_INTEGER, Problem};
use crate::state::AppState;

/// List a guest's RAM blocks
///
/// Each with its RAM address and the encryption status of its pages, including the helper's block.
#[utoipa::path(get, path = "/v1/guests/{guest}/ram-blocks", operation_id = "ram_block_list", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1")),
    responses((status = 200, description = "The RAM blocks", body = RamBlockList)))]
pub async fn list(
    State(state): State<AppState>,
    Path(key): Path<String>,
) -> Result<Json<RamBlockList>, Problem> {
    let blocks = state.host()?.ram_blocks(&key)?;
    Ok(Json(RamBlockList { items: blocks.into_iter().map(RamBlock::from).collect() }))
}

/// Get a RAM block
///
/// By its name.
#[utoipa::path(get, path = "/v1/guests/{guest}/ram-blocks/{block}", operation_id = "ram_block_get", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("block" = String, Path, description = "Name of the block", example = "ram1"),
    ),
    responses((status = 200, description = "The block", body = RamBlock)))]
pub async fn get(
    State(state): State<AppState>,
    Path((key, block)): Path<(String, String)>,
) -> Result<Json<RamBlock>, Problem> {
    Ok(Json(state.host()?.ram_block(&key, &block)?.into()))
}

/// Add a RAM block
///
/// The guest must be stopped. The block comes after its other RAM and belongs to the guest's definition from
/// then on. `If-Match` and the answer's `ETag` are about the guest. The same rules apply as for a definition;
/// a `qemu` guest has all its RAM in one block and gets no further one.
#[utoipa::path(post, path = "/v1/guests/{guest}/ram-blocks", operation_id = "ram_block_create", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam, IfMatchParam,
    ),
    request_body = BlockBody,
    responses(
        (status = 200, description = "With `dry_run`: the block that would be added", body = RamBlock),
        (status = 201, description = "The block is added", body = RamBlock),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<BlockBody>,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let block = BlockSpec::from(body);
    // An earlier daemon may have added it and died over this very request.
    if !change.dry_run
        && change.again()
        && let Ok(guest) = host.guest(&key)
        && guest.spec.blocks.contains(&block)
    {
        return Ok(made(&guest, host.ram_block(&key, &block.name)?));
    }
    let ask = change.ask();
    let (info, guest) = respond::detached(async move { host.add_ram_block(&key, block, &ask).await }).await?;
    if change.dry_run {
        return Ok(respond::ok(guest.generation, RamBlock::from(info)));
    }
    Ok(made(&guest, info))
}

fn made(guest: &GuestRecord, info: RamBlockInfo) -> Response {
    let location = format!("/v1/guests/{}/ram-blocks/{}", guest.id, info.block.name);
    respond::created(&location, guest.generation, RamBlock::from(info))
}

/// A block at an address, or at none. It has no version of its own, and the guest's is not asked for.
async fn plugged(
    state: &AppState,
    change: &Change,
    key: String,
    block: String,
    gpa: Option<Gpa>,
) -> Result<Json<RamBlock>, Problem> {
    let host = state.host()?.clone();
    let ask = if change.dry_run { Ask::dry_run() } else { Ask::now() };
    let info = respond::detached(async move { host.plug(&key, &block, gpa, &ask).await }).await?;
    Ok(Json(info.into()))
}

/// Plug a RAM block
///
/// Gives an unplugged block a guest-physical address while the guest runs or is paused. Its content and
/// encryption status are what they were. Plugging a block where it already is changes nothing. Remove the
/// guest's mirrors first: they show what was plugged when they were made.
#[utoipa::path(post, path = "/v1/guests/{guest}/ram-blocks/{block}/plug", operation_id = "ram_block_plug", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("block" = String, Path, description = "Name of the block", example = "ram1"),
        DryRunParam, IdempotencyKeyParam,
    ),
    request_body = RamBlockPlug,
    responses((status = 200, description = "The block is plugged", body = RamBlock)))]
pub async fn plug(
    State(state): State<AppState>,
    Path((key, block)): Path<(String, String)>,
    change: Change,
    JsonBody(body): JsonBody<RamBlockPlug>,
) -> Result<Json<RamBlock>, Problem> {
    plugged(&state, &change, key, block, Some(Gpa::new(body.gpa))).await
}

/// Unplug a RAM block
///
/// Takes a block's address away once the guest has let go of it, as virtio-mem does. Its content and
/// encryption status stay, and it still moves with the guest under every strategy that addresses RAM by RAM
/// address. Unplugging an unplugged block changes nothing.
#[utoipa::path(post, path = "/v1/guests/{guest}/ram-blocks/{block}/unplug", operation_id = "ram_block_unplug",
    tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("block" = String, Path, description = "Name of the block", example = "ram1"),
        DryRunParam, IdempotencyKeyParam,
    ),
    responses((status = 200, description = "The block is unplugged", body = RamBlock)))]
pub async fn unplug(
    State(state): State<AppState>,
    Path((key, block)): Path<(String, String)>,
    change: Change,
) -> Result<Json<RamBlock>, Problem> {
    plugged(&state, &change, key, block, None).await
}

/// List the encryption status of a guest's RAM
///
/// Runs of pages with one status, sorted by RAM address. RAM that is not plugged is included, and the
/// helper's block is left out. While the guest has no machine there is one run with the status `unknown`.
#[utoipa::path(get, path = "/v1/guests/{guest}/encryption-status", operation_id = "encryption_status_list", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("from" = Option<u64>, Query, description = "RAM address to begin at; rounded down to a page"),
        ("limit" = Option<u32>, Query, description = "Most runs", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "A page of runs", body = EncryptionStatusList)))]
pub async fn status(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Json<EncryptionStatusList>, Problem> {
    let mut parameters = query.read()?;
    let from = parameters.int("from", 0, MAX_SAFE_INTEGER).unwrap_or(0);
    let limit = parameters.int("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT);
    parameters.done()?;
    let host = state.host()?;
    let end = host.guest(&key)?.layout.guest_end().get();
    let Some(found) = host.encryption_extents(&key, RamAddr::new(from), limit)? else {
        let start = from / PAGE_SIZE * PAGE_SIZE;
        let items = if start < end { vec![Extent::unknown(start, end - start)] } else { Vec::new() };
        return Ok(Json(EncryptionStatusList { items, next_from: None }));
    };
    let next_from = found.last().map(|e| e.range.end()).filter(|next| *next < end);
    let items = found.into_iter().map(Extent::from).collect();
    Ok(Json(EncryptionStatusList { items, next_from }))
}

/// Report the encryption status of pages
///
/// What a guest reports with the hypercall KVM_HC_MAP_GPA_RANGE, in guest-physical addresses. It is kept by
/// RAM address. Either the whole report is taken or none of it.
#[utoipa::path(post, path = "/v1/guests/{guest}/encryption-status", operation_id = "encryption_status_update",
    tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        DryRunParam, IdempotencyKeyParam,
    ),
    request_body = EncryptionStatusUpdate,
    responses((status = 204, description = "The report was taken")))]
pub async fn report(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    JsonBody(body): JsonBody<EncryptionStatusUpdate>,
) -> Result<StatusCode, Problem> {
    let host = state.host()?;
    host.report_encryption(&key, Gpa::new(body.gpa), body.pages, body.encrypted, &change.ask())?;
    Ok(StatusCode::NO_CONTENT)
}
