//! The OpenAPI document and the page that shows it. The page asks nothing of any other server.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use utoipa_swagger_ui::Config;

use crate::openapi::Document;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

const DOCUMENT: &str = "/v1/openapi.json";
/// Where the page's script makes Swagger UI, and the same with our header added to whatever the page sends.
/// Changes by session need that header, and nothing else is disturbed by it.
const MAKES_PAGE: (&str, &str) = (
    "SwaggerUIBundle({",
    "SwaggerUIBundle({\n    requestInterceptor: (r) => { r.headers[\"X-Mirrorvm\"] = \"1\"; return r; },",
);

/// The OpenAPI document
///
/// OpenAPI 3.1 of this API as this daemon serves it.
#[utoipa::path(get, path = "/v1/openapi.json", operation_id = "openapi_get", tag = "daemon",
    responses((status = 200, description = "The document", body = serde_json::Value)))]
pub async fn document(State(state): State<AppState>) -> Result<Response, Problem> {
    Ok(json(state.document().await?))
}

/// The OpenAPI document in version 3.0.3
///
/// Derived from `/v1/openapi.json` for tools that know no newer version: without `mutualTLS`, with problems
/// as `application/json` and one success response for each operation.
#[utoipa::path(get, path = "/v1/openapi-3.0.json", operation_id = "openapi_3_0_get", tag = "daemon",
    responses((status = 200, description = "The document", body = serde_json::Value)))]
pub async fn document_3_0(State(state): State<AppState>) -> Result<Response, Problem> {
    Ok(json(state.document_3_0().await?))
}

fn json(document: &Document) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document.bytes().clone()).into_response()
}

/// The documentation page
///
/// Redirects to `/docs/`, which shows the document in Swagger UI. Everything on it is served by the daemon
/// itself.
#[utoipa::path(get, path = "/docs", operation_id = "openapi_docs", tag = "daemon",
    responses((status = 308, description = "The page is at `/docs/`",
        headers(("Location" = String, description = "`/docs/`")))))]
pub async fn page() -> Redirect {
    Redirect::permanent("/docs/")
}

/// The page's own files, which are no part of the API.
pub fn assets() -> Router<AppState> {
    let config =
        Config::from(DOCUMENT).validator_url("none").try_it_out_enabled(true).display_operation_id(true);
    let config = Arc::new(config);
    let index = config.clone();
    Router::new()
        .route("/docs/", get(move || async move { file("index.html", index) }))
        .route("/docs/{*file}", get(move |Path(name): Path<String>| async move { file(&name, config) }))
}

fn file(name: &str, config: Arc<Config<'static>>) -> Result<Response, Problem> {
    let file = match utoipa_swagger_ui::serve(name, config) {
        Ok(Some(file)) => file,
        Ok(None) => return Err(Problem::new(ProblemCode::RouteNotFound, "the page has no such file")),
        Err(_) => return Err(Problem::new(ProblemCode::Internal, "the page's file cannot be made")),
    };
    let mut response = match std::str::from_utf8(&file.bytes) {
        Ok(script) if name == "swagger-initializer.js" => {
            (StatusCode::OK, script.replace(MAKES_PAGE.0, MAKES_PAGE.1)).into_response()
        }
        _ => (StatusCode::OK, file.bytes).into_response(),
    };
    let headers = response.headers_mut();
    if let Ok(kind) = HeaderValue::try_from(file.content_type) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    if file.gzpipped {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
             font-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; \
             frame-ancestors 'none'",
        ),
    );
    Ok(response)
}
