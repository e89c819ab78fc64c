//! The OpenAPI document and the page that shows it. The page asks nothing of any other server.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Json, Router};

use super::common::IfNoneMatchParam;
use crate::api::version::Index;
use crate::http::negotiate;
use crate::http::precondition::{IfNoneMatch, quoted};
use crate::openapi::Document;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

use super::swagger;

/// What the page shows. Of 3.1 it would read the whole document anew for each operation that is opened,
/// which takes more than a second; of 3.0 a quarter of one. It has what a person asks for: only
/// certificates as a scheme and a second kind of success are left out.
const SHOWN: &str = "/v1/openapi-3.0.json";

/// Where to begin
///
/// Paths of this daemon, for whoever knows only its address. A browser, which accepts `text/html`, is sent to
/// `/docs/`.
#[utoipa::path(get, path = "/", operation_id = "index_get", tag = "daemon",
    responses(
        (status = 200, description = "What is here", body = Index),
        (status = 303, description = "The page is at `/docs/`",
            headers(("Location" = String, description = "`/docs/`"))),
    ))]
pub async fn index(headers: HeaderMap) -> Response {
    let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    if accepted.any(|value| value.split([',', ';']).any(|kind| kind.trim().eq_ignore_ascii_case("text/html")))
    {
        return Redirect::to("/docs/").into_response();
    }
    Json(Index::of_this_build()).into_response()
}

/// The OpenAPI document
///
/// OpenAPI 3.1 of this API as this daemon serves it.
#[utoipa::path(get, path = "/v1/openapi.json", operation_id = "openapi_get", tag = "daemon",
    params(IfNoneMatchParam),
    responses((status = 200, description = "The document", body = serde_json::Value)))]
pub async fn document(State(state): State<AppState>, headers: HeaderMap) -> Result<Response, Problem> {
    json(state.document().await?, &headers).await
}

/// The OpenAPI document in version 3.0.3
///
/// Derived from `/v1/openapi.json` for tools that know no newer version: without `mutualTLS`, with problems
/// as `application/json` and one success response for each operation.
#[utoipa::path(get, path = "/v1/openapi-3.0.json", operation_id = "openapi_3_0_get", tag = "daemon",
    params(IfNoneMatchParam),
    responses((status = 200, description = "The document", body = serde_json::Value)))]
pub async fn document_3_0(State(state): State<AppState>, headers: HeaderMap) -> Result<Response, Problem> {
    json(state.document_3_0().await?, &headers).await
}

/// The document, compressed for those who take that. Nothing else is: the document is the same for everybody
/// and holds nothing of a caller's, so its length tells nobody anything (BREACH).
async fn json(document: &Document, headers: &HeaderMap) -> Result<Response, Problem> {
    let known = IfNoneMatch::read(headers)?;
    let packed = if negotiate::takes_gzip(headers) { document.gzip().await } else { None };
    // Of the bytes that go over the wire: a strong tag is of one representation.
    let (coding, digest) = (if packed.is_some() { "-gzip" } else { "" }, document.sha256());
    let tag = format!("{}{coding}", digest.strip_prefix("sha256:").unwrap_or(digest));
    let lasting = [
        (header::ETAG, quoted(&tag)),
        (header::VARY, HeaderValue::from_static("accept-encoding")),
        // It may be kept, and is asked for again: the next build has another.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    if known.has_tag(&tag) {
        return Ok((StatusCode::NOT_MODIFIED, lasting).into_response());
    }
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok(match packed {
        Some(bytes) => (lasting, kind, [(header::CONTENT_ENCODING, "gzip")], bytes).into_response(),
        None => (lasting, kind, document.bytes().clone()).into_response(),
    })
}

/// The documentation page
///
/// Redirects to `/docs/`, which shows the document of version 3.0.3 in Swagger UI, for that is opened
/// faster there. Everything on it is served by the daemon itself.
#[utoipa::path(get, path = "/docs", operation_id = "openapi_docs", tag = "daemon",
    responses((status = 308, description = "The page is at `/docs/`",
        headers(("Location" = String, description = "`/docs/`")))))]
pub async fn page() -> Redirect {
    Redirect::permanent("/docs/")
}

/// The page's own files, which are no part of the API.
pub fn assets() -> Router<AppState> {
    Router::new()
        .route("/docs/", get(|| async { file("index.html") }))
        .route("/docs/{*file}", get(|Path(name): Path<String>| async move { file(&name) }))
}

fn file(name: &str) -> Result<Response, Problem> {
    let file = match swagger::file(name, SHOWN) {
        Ok(Some(file)) => file,
        Ok(None) => return Err(Problem::new(ProblemCode::RouteNotFound, "the page has no such file")),
        Err(bad) => return Err(Problem::new(ProblemCode::Internal, bad.to_string())),
    };
    let policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                  font-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                  frame-ancestors 'none'";
    let headers = [(header::CONTENT_TYPE, file.kind), (header::CONTENT_SECURITY_POLICY, policy)];
    Ok((headers, file.bytes).into_response())
}
