//! This host: what it is, what it can do, which strategies it executes.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use mirrorvm::address_space::StrategyKind;
use mirrorvm::host::HostSettings;

use super::common::{DryRunParam, IfMatchParam, IfNoneMatchParam};
use crate::api::Preview;
use crate::api::capabilities::HostCapabilities;
use crate::api::host::Host;
use crate::api::patch::{HostUpdate, relabel};
use crate::api::strategies::{StrategyInfo, StrategyList};
use crate::http::body::PatchBody;
use crate::http::change::Change;
use crate::http::{respond, wait};
use crate::problem::Problem;
use crate::state::AppState;

fn body(state: &AppState, host: &mirrorvm::host::Host, settings: HostSettings) -> Host {
    Host::new(host.info(), &host.capabilities(), settings, state.confinement())
}

/// Get this host
///
/// What the host is, its identity on the peer link, how much it has to do, and its settings.
#[utoipa::path(get, path = "/v1/host", operation_id = "host_get", tag = "host", params(IfNoneMatchParam),
    responses((status = 200, description = "The host", body = Host)))]
pub async fn get(State(state): State<AppState>, headers: HeaderMap) -> Result<Response, Problem> {
    let host = state.host()?;
    wait::get_now(&headers, || {
        let settings = host.settings();
        Ok((settings.generation, body(&state, host, settings)))
    })
}

/// Change this host
///
/// A JSON merge patch of `labels`, `maintenance` and `migration_slots`.
#[utoipa::path(patch, path = "/v1/host", operation_id = "host_update", tag = "host",
    request_body(content = HostUpdate, content_type = "application/merge-patch+json"),
    params(DryRunParam, IfMatchParam),
    responses((status = 200, description = "The host as it is now, or with `dry_run` as it would be", body = Host)))]
pub async fn update(
    State(state): State<AppState>,
    change: Change,
    PatchBody(patch): PatchBody<HostUpdate>,
) -> Result<Response, Problem> {
    let host = state.host()?;
    let to = |settings: &mut HostSettings| {
        settings.labels = relabel(&settings.labels, patch.labels);
        settings.maintenance = patch.maintenance.unwrap_or(settings.maintenance);
        settings.migration_slots = patch.migration_slots.unwrap_or(settings.migration_slots);
    };
    let settings = host.change_settings(to, &change.ask())?;
    let generation = settings.generation;
    let preview = change.dry_run.then(Preview::default);
    Ok(respond::ok(generation, Host { preview, ..body(&state, host, settings) }))
}

/// Get what this host can do
///
/// Drivers, KVM, limits and strategies. `missing` says what the host lacks and what would help.
#[utoipa::path(get, path = "/v1/host/capabilities", operation_id = "host_capabilities_get", tag = "host",
    responses((status = 200, description = "The capabilities", body = HostCapabilities)))]
pub async fn capabilities(State(state): State<AppState>) -> Result<Json<HostCapabilities>, Problem> {
    Ok(Json(state.host()?.capabilities().into()))
}

/// List the address-space strategies
///
/// Each with what it exposes, what it cannot reach, and whether this host can execute it.
#[utoipa::path(get, path = "/v1/strategies", operation_id = "strategy_list", tag = "strategies",
    responses((status = 200, description = "The strategies", body = StrategyList)))]
pub async fn strategies(State(state): State<AppState>) -> Result<Json<StrategyList>, Problem> {
    Ok(Json(StrategyList { items: StrategyInfo::all(&state.host()?.capabilities()) }))
}

/// Get an address-space strategy
///
/// What it exposes, what it cannot reach, and whether this host can execute it.
#[utoipa::path(get, path = "/v1/strategies/{kind}", operation_id = "strategy_get", tag = "strategies",
    params(("kind" = String, Path, description = "Name of the strategy", example = "shifted")),
    responses((status = 200, description = "The strategy", body = StrategyInfo)))]
pub async fn strategy(
    State(state): State<AppState>,
    Path(kind): Path<String>,
) -> Result<Json<StrategyInfo>, Problem> {
    let capabilities = state.host()?.capabilities();
    match StrategyKind::named(&kind) {
        Some(kind) => Ok(Json(StrategyInfo::of(kind, &capabilities))),
        None => Err(Problem::missing("strategy", &kind)),
    }
}
