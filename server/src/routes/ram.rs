//! A guest's RAM: blocks, plugging, encryption status.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use jiff::Timestamp;
use mirrorvm::addr::{Gpa, RamAddr};
use uuid::Uuid;

use super::PageParams;
use crate::api::encryption::{EncryptionExtentList, EncryptionStatusUpdate, Extent, RamBlockPlug};
use crate::api::page::Scope;
use crate::api::ram_blocks::{RamBlock, RamBlockList};
use crate::http::body::JsonBody;
use crate::http::query::Query;
use crate::http::respond;
use crate::problem::Problem;
use crate::state::AppState;

/// List a guest's RAM blocks
///
/// With their RAM addresses and the encryption status of their pages; the helper's block included.
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

/// Plug a RAM block
///
/// Gives an unplugged block a guest physical address while the guest runs or is paused. Content and encryption status are
/// what they were. Plugging a block where it is changes nothing. Remove the guest's mirrors first: they show what was
/// plugged when they were made.
#[utoipa::path(post, path = "/v1/guests/{guest}/ram-blocks/{block}/plug", operation_id = "ram_block_plug", tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("block" = String, Path, description = "Name of the block", example = "ram1"),
    ),
    request_body = RamBlockPlug,
    responses((status = 200, description = "The block is plugged", body = RamBlock)))]
pub async fn plug(
    State(state): State<AppState>,
    Path((key, block)): Path<(String, String)>,
    JsonBody(body): JsonBody<RamBlockPlug>,
) -> Result<Json<RamBlock>, Problem> {
    let host = state.host()?.clone();
    let info = respond::detached(async move { host.plug(&key, &block, Gpa::new(body.gpa)).await }).await?;
    Ok(Json(info.into()))
}

/// Unplug a RAM block
///
/// Takes a block's address away once the guest has let go of it, as virtio-mem does. Its content and encryption status
/// stay, and it still moves with the guest under every strategy that addresses RAM by RAM address. Unplugging an unplugged
/// block changes nothing.
#[utoipa::path(post, path = "/v1/guests/{guest}/ram-blocks/{block}/unplug", operation_id = "ram_block_unplug",
    tag = "guests",
    params(
        ("guest" = String, Path, description = "Id or name of the guest", example = "g1"),
        ("block" = String, Path, description = "Name of the block", example = "ram1"),
    ),
    responses((status = 200, description = "The block is unplugged", body = RamBlock)))]
pub async fn unplug(
    State(state): State<AppState>,
    Path((key, block)): Path<(String, String)>,
) -> Result<Json<RamBlock>, Problem> {
    let host = state.host()?.clone();
    let info = respond::detached(async move { host.unplug(&key, &block).await }).await?;
    Ok(Json(info.into()))
}

/// List the encryption status of a guest's RAM
///
/// Runs of pages with one status, by RAM address, also of RAM that is not plugged. Empty while the guest has no machine.
#[utoipa::path(get, path = "/v1/guests/{guest}/encryption-status", operation_id = "encryption_status_list", tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1"), PageParams),
    responses((status = 200, description = "A page of extents", body = EncryptionExtentList)))]
pub async fn status(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    let scope = Scope::new("encryption-status", &[("guest", &key)]);
    let mut parameters = query.read()?;
    let request = parameters.page(&scope);
    parameters.done()?;
    // A place in a list is a time and an id; here it is the address that the page before ended at.
    let from = request.after.map_or(0, |(_, id)| id.as_u128() as u64);
    let found = state.host()?.encryption_extents(&key, RamAddr::new(from), request.limit + 1)?;
    let mut items = found.unwrap_or_default();
    let more = items.len() > request.limit;
    items.truncate(request.limit);
    let end = items.last().map(|e| e.range.end()).filter(|_| more);
    let next = end.map(|end| (Timestamp::UNIX_EPOCH, Uuid::from_u128(u128::from(end))));
    let path = format!("/v1/guests/{}/encryption-status", crate::http::query::escape(&key));
    let (next_page_token, link) = respond::next_page(&path, &[], &scope, &request, next);
    let items = items.into_iter().map(Extent::from).collect();
    Ok(respond::list(EncryptionExtentList { items, next_page_token }, link))
}

/// Report the encryption status of pages
///
/// What a guest's KVM_HC_MAP_GPA_RANGE says, in guest physical addresses; it is kept by RAM address. All or nothing.
#[utoipa::path(post, path = "/v1/guests/{guest}/encryption-status", operation_id = "encryption_status_update",
    tag = "guests",
    params(("guest" = String, Path, description = "Id or name of the guest", example = "g1")),
    request_body = EncryptionStatusUpdate,
    responses((status = 204, description = "The report was taken")))]
pub async fn report(
    State(state): State<AppState>,
    Path(key): Path<String>,
    JsonBody(body): JsonBody<EncryptionStatusUpdate>,
) -> Result<StatusCode, Problem> {
    state.host()?.report_encryption(&key, Gpa::new(body.gpa), body.pages, body.encrypted)?;
    Ok(StatusCode::NO_CONTENT)
}
