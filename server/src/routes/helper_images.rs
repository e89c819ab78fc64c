//! Helper images: the built-in one, and those that were uploaded.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::{Act, Ask, ContentError, HostError, ImageRecord};

use super::common::{
    DryRunParam, IdempotencyKeyParam, IfMatchParam, IfNoneMatchParam, NamedSortParams, PageParams,
};
use crate::api::Preview;
use crate::api::helper_images::{HelperImage, HelperImageCreate, HelperImageList};
use crate::api::page::{Place, Scope, cut};
use crate::http::body::{ContentBody, JsonBody};
use crate::http::change::Change;
use crate::http::query::Query;
use crate::http::{respond, wait};
use crate::problem::{Problem, ProblemCode, ProblemError};
use crate::state::AppState;

const PATH: &str = "/v1/helper-images";

fn previewed(record: ImageRecord) -> Response {
    let preview = Some(Preview::default());
    respond::ok(record.generation, HelperImage { preview, ..HelperImage::from(record) })
}

/// List the helper images
///
/// The built-in one and those that were uploaded.
#[utoipa::path(get, path = "/v1/helper-images", operation_id = "helper_image_list", tag = "helper-images",
    params(NamedSortParams, PageParams),
    responses((status = 200, description = "A page of images", body = HelperImageList)))]
pub async fn list(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let scope = Scope::new(state.page_key(), "helper-images", &[]);
    let request = parameters.page(&scope, true);
    parameters.done()?;
    let place = |i: &ImageRecord| Place::of(request.order, i.created_at, &i.name, i.id);
    let host = state.host()?;
    let (images, cursor) = host.listed(mirrorvm::host::Host::images);
    let (items, next) = cut(images?, &request, place);
    let events_cursor = cursor.to_string();
    let (next_page_token, link) = respond::next_page(PATH, &[], &scope, &request, next);
    let items = items.into_iter().map(HelperImage::from).collect();
    Ok(respond::list(HelperImageList { items, next_page_token, events_cursor }, link))
}

/// Make a helper image
///
/// The image is `empty` until its content is uploaded, which is checked before it is kept. Mirrors run it
/// when they are made with its name.
#[utoipa::path(post, path = "/v1/helper-images", operation_id = "helper_image_create", tag = "helper-images",
    request_body = HelperImageCreate, params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the image that would be made", body = HelperImage),
        (status = 201, description = "The image is there, empty", body = HelperImage),
    ))]
pub async fn create(
    State(state): State<AppState>,
    change: Change,
    JsonBody(body): JsonBody<HelperImageCreate>,
) -> Result<Response, Problem> {
    let host = state.host()?;
    let record = match (host.create_image(&body.name, &change.ask()), change.id()) {
        // Made by an earlier daemon that died over this very request.
        (Err(HostError::IdTaken { .. }), Some(id)) if change.again() => host.image(&id.to_string())?,
        (made, _) => made?,
    };
    if change.dry_run {
        return Ok(previewed(record));
    }
    let (location, generation) = (format!("{PATH}/{}", record.id), record.generation);
    Ok(respond::created(&location, generation, HelperImage::from(record)))
}

/// Get a helper image
///
/// By id or name.
#[utoipa::path(get, path = "/v1/helper-images/{image}", operation_id = "helper_image_get", tag = "helper-images",
    params(("image" = String, Path, description = "Id or name of the image", example = "built-in"), IfNoneMatchParam),
    responses((status = 200, description = "The image", body = HelperImage)))]
pub async fn get(
    State(state): State<AppState>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let host = state.host()?;
    wait::get_now(&headers, || {
        let record = host.image(&key)?;
        Ok((record.generation, HelperImage::from(record)))
    })
}

/// Upload a helper image's content
///
/// The content can be set once. Uploading the same bytes again changes nothing, or repairs the file of a
/// `failed` image. They are checked before anything is kept, and may have 16 MiB.
#[utoipa::path(put, path = "/v1/helper-images/{image}/content", operation_id = "helper_image_content_put",
    tag = "helper-images",
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The file"),
    params(
        ("image" = String, Path, description = "Id or name of the image", example = "helper-2"),
        DryRunParam, IfMatchParam,
    ),
    responses((status = 200, description = "The image with its content", body = HelperImage)))]
pub async fn put_content(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
    ContentBody(bytes): ContentBody,
) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let ask = change.ask();
    let part = Act::current();
    let fill = move || Act::sync_scope(part, || host.fill_image(&key, bytes.to_vec(), &ask));
    let filled = tokio::task::spawn_blocking(fill).await;
    let filled = filled.map_err(|_| Problem::from(HostError::ShuttingDown))?;
    let record = filled.map_err(|e| match e {
        ContentError::Host(e) => e.into(),
        ContentError::Header(e) => {
            let detail = e.to_string();
            let error = ProblemError::at_pointer("", "invalid_header", detail.clone());
            Problem::new(ProblemCode::HelperImageInvalid, detail).with_errors(vec![error])
        }
    })?;
    if change.dry_run {
        return Ok(previewed(record));
    }
    Ok(respond::ok(record.generation, HelperImage::from(record)))
}

/// Remove a helper image
///
/// The built-in one cannot be removed.
#[utoipa::path(delete, path = "/v1/helper-images/{image}", operation_id = "helper_image_delete", tag = "helper-images",
    params(
        ("image" = String, Path, description = "Id or name of the image", example = "helper-2"),
        IfMatchParam,
    ),
    responses((status = 204, description = "The image is gone")))]
pub async fn delete(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let host = state.host()?;
    let record = host.delete_image(&key, &change.ask())?;
    Ok(if change.dry_run { previewed(record) } else { StatusCode::NO_CONTENT.into_response() })
}

/// Look at a helper image's deletion
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/helper-images/{image}/deletion-preview", operation_id = "helper_image_deletion_preview_get",
    tag = "helper-images", params(("image" = String, Path, description = "Id or name of the image", example = "helper-2")),
    responses((status = 200, description = "It as it is now, and would be gone", body = HelperImage)))]
pub async fn deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    Ok(previewed(state.host()?.delete_image(&key, &Ask::dry_run())?))
}
