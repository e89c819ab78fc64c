//! The routes: parse, one library call, render. One file per resource.
//!
//! Must not know: how a guest runs or a page moves. Every route comes in by `routes!`, so that none can be
//! without its entry in the document.

mod docs;
mod guests;
mod health;
mod host;
mod migrations;
mod mirrors;
mod peers;
mod problems;
mod ram;

use axum::Router;
use tokio::sync::watch;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::middleware;
use crate::openapi::{self, Document};
use crate::state::AppState;

/// Every route with its entry in the document.
pub fn documented() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::version))
        .routes(routes!(docs::document))
        .routes(routes!(docs::page))
        .routes(routes!(problems::list))
        .routes(routes!(problems::get))
        .routes(routes!(host::get))
        .routes(routes!(host::capabilities))
        .routes(routes!(host::strategies))
        .routes(routes!(host::strategy))
        .routes(routes!(peers::list, peers::create))
        .routes(routes!(peers::get, peers::delete))
        .routes(routes!(guests::list, guests::create))
        .routes(routes!(guests::get, guests::delete))
        .routes(routes!(guests::start))
        .routes(routes!(guests::pause))
        .routes(routes!(guests::resume))
        .routes(routes!(guests::stop))
        .routes(routes!(guests::console))
        .routes(routes!(ram::list))
        .routes(routes!(ram::plug))
        .routes(routes!(ram::unplug))
        .routes(routes!(ram::status, ram::report))
        .routes(routes!(guests::plan))
        .routes(routes!(mirrors::list, mirrors::create))
        .routes(routes!(mirrors::get, mirrors::delete))
        .routes(routes!(mirrors::layout))
        .routes(routes!(migrations::list, migrations::create))
        .routes(routes!(migrations::get, migrations::delete))
        .routes(routes!(migrations::cancel))
        .routes(routes!(migrations::rounds))
        .routes(routes!(migrations::page_digests))
}

/// The whole service and its state. The state has no host yet.
///
/// # Errors
/// When the document cannot be written as JSON, which a test rules out.
pub fn service(closing: watch::Receiver<bool>) -> Result<(Router, AppState), serde_json::Error> {
    let (router, api) = documented().split_for_parts();
    let state = AppState::new(Document::new(&api)?, closing);
    let router = router.merge(docs::assets()).with_state(state.clone());
    Ok((middleware::wrap(router), state))
}

/// Which page of a list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
struct PageParams {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// `next_page_token` of the page before, with the same filters.
    page_token: Option<String>,
}

/// A long poll.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
struct WaitParams {
    /// With `If-None-Match`: how long to wait for a change, 0 to 60 seconds with the unit. 304 when there was none.
    #[param(pattern = "^([0-9]|[1-5][0-9]|60)s$", example = "30s")]
    wait: Option<String>,
}

/// A conditional read.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
struct IfNoneMatchParam {
    /// ETag that the caller has; 304 when it is still the resource's.
    #[param(rename = "If-None-Match", example = "\"3\"")]
    if_none_match: Option<String>,
}

/// A conditional change.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
struct IfMatchParam {
    /// ETag that the resource must have; 412 when it has another.
    #[param(rename = "If-Match", example = "\"3\"")]
    if_match: Option<String>,
}
