//! The routes: parse, one library call, render. One file per resource.
//!
//! Must not know: how a guest runs or a page moves. Every route comes in by `routes!`, so that none can be
//! without its entry in the document.

mod access;
mod common;
mod docs;
mod events;
mod guests;
mod health;
mod helper_images;
mod host;
mod incoming;
mod migrations;
mod mirrors;
mod peers;
mod problems;
mod ram;
mod resolution;
mod sessions;
mod swagger;

use axum::Router;
use axum::routing::get;
use mirrorvm::guest::Drivers;
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::config::Config;
use crate::http::middleware;
use crate::openapi;
use crate::state::AppState;

/// All routes, each with its entry in the document.
pub fn documented() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(docs::index))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .routes(routes!(health::version))
        .routes(routes!(docs::document))
        .routes(routes!(docs::document_3_0))
        .routes(routes!(docs::page))
        .routes(routes!(problems::list))
        .routes(routes!(problems::get))
        .routes(routes!(access::whoami))
        .routes(routes!(access::list_tokens, access::create_token))
        .routes(routes!(access::delete_token))
        .routes(routes!(access::token_deletion_preview))
        .routes(routes!(access::audit_log))
        .routes(routes!(sessions::create_link))
        .routes(routes!(sessions::create, sessions::delete))
        .routes(routes!(host::get, host::update))
        .routes(routes!(host::capabilities))
        .routes(routes!(host::strategies))
        .routes(routes!(host::strategy))
        .routes(routes!(peers::list, peers::create))
        .routes(routes!(peers::get, peers::update, peers::delete))
        .routes(routes!(peers::deletion_preview))
        .routes(routes!(peers::capabilities))
        .routes(routes!(guests::list, guests::create))
        .routes(routes!(guests::get, guests::put, guests::update, guests::delete))
        .routes(routes!(guests::deletion_preview))
        .routes(routes!(guests::start))
        .routes(routes!(guests::pause))
        .routes(routes!(guests::resume))
        .routes(routes!(guests::stop))
        .routes(routes!(guests::confirm))
        .routes(routes!(guests::console))
        .routes(routes!(guests::console_text))
        .routes(routes!(ram::list, ram::create))
        .routes(routes!(ram::get))
        .routes(routes!(ram::plug))
        .routes(routes!(ram::unplug))
        .routes(routes!(ram::status, ram::report))
        .routes(routes!(guests::stats))
        .routes(routes!(guests::plan))
        .routes(routes!(helper_images::list, helper_images::create))
        .routes(routes!(helper_images::get, helper_images::delete))
        .routes(routes!(helper_images::deletion_preview))
        .routes(routes!(helper_images::put_content))
        .routes(routes!(mirrors::list, mirrors::create))
        .routes(routes!(mirrors::get, mirrors::put, mirrors::update, mirrors::delete))
        .routes(routes!(mirrors::deletion_preview))
        .routes(routes!(mirrors::export))
        .routes(routes!(mirrors::import))
        .routes(routes!(mirrors::layout))
        .routes(routes!(mirrors::drawing))
        .routes(routes!(mirrors::stats))
        .routes(routes!(mirrors::log))
        .routes(routes!(migrations::check))
        .routes(routes!(migrations::list, migrations::create))
        .routes(routes!(migrations::get, migrations::put, migrations::update, migrations::delete))
        .routes(routes!(migrations::deletion_preview))
        .routes(routes!(migrations::cancel))
        .routes(routes!(migrations::switchover))
        .routes(routes!(resolution::resolve))
        .routes(routes!(resolution::token))
        .routes(routes!(migrations::rounds))
        .routes(routes!(migrations::page_digests))
        .routes(routes!(incoming::create))
        .routes(routes!(events::list))
        .routes(routes!(events::stream))
}

/// The whole service and its state, with the default configuration. The state has no host yet.
pub fn service(closing: watch::Receiver<bool>) -> (Router, AppState) {
    service_with(Drivers::default(), Config::default(), closing)
}

/// The whole service and its state, with these drivers and this configuration.
pub fn service_with(drivers: Drivers, config: Config, closing: watch::Receiver<bool>) -> (Router, AppState) {
    let (router, _) = documented().split_for_parts();
    let state = AppState::new(drivers, config, closing);
    let router = router.merge(docs::assets()).merge(sessions::page()).with_state(state.clone());
    (middleware::wrap(router, &state), state)
}

/// What a listener for monitoring serves: health and counters, and nothing about any guest.
pub fn monitoring(state: &AppState) -> Router {
    let router = Router::new()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics));
    middleware::wrap_open(router.with_state(state.clone()), state)
}
