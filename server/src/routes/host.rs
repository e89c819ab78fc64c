//! This host: what it is, what it can do, which strategies it executes.

use axum::Json;
use axum::extract::{Path, State};
use mirrorvm::host::HostError;

use crate::api::capabilities::HostCapabilities;
use crate::api::host::Host;
use crate::api::strategies::{StrategyInfo, StrategyList};
use crate::problem::Problem;
use crate::state::AppState;

/// Get this host
///
/// What the host is, its identity on the peer link, and what it has to do.
#[utoipa::path(get, path = "/v1/host", operation_id = "host_get", tag = "host",
    responses((status = 200, description = "The host", body = Host)))]
pub async fn get(State(state): State<AppState>) -> Result<Json<Host>, Problem> {
    let host = state.host()?;
    Ok(Json(Host::new(host.info(), &host.capabilities())))
}

/// Get what this host can do
///
/// Drivers, KVM, limits, strategies; `missing` says what the host lacks and what would help.
#[utoipa::path(get, path = "/v1/host/capabilities", operation_id = "host_capabilities_get", tag = "host",
    responses((status = 200, description = "The capabilities", body = HostCapabilities)))]
pub async fn capabilities(State(state): State<AppState>) -> Result<Json<HostCapabilities>, Problem> {
    Ok(Json(state.host()?.capabilities().into()))
}

/// List the address-space strategies
///
/// Each with what it lays open, what it cannot reach and whether this host executes it.
#[utoipa::path(get, path = "/v1/strategies", operation_id = "strategy_list", tag = "strategies",
    responses((status = 200, description = "The strategies", body = StrategyList)))]
pub async fn strategies(State(state): State<AppState>) -> Result<Json<StrategyList>, Problem> {
    Ok(Json(StrategyList { items: StrategyInfo::all(&state.host()?.capabilities()) }))
}

/// Get an address-space strategy
///
/// What it lays open, what it cannot reach and whether this host executes it.
#[utoipa::path(get, path = "/v1/strategies/{kind}", operation_id = "strategy_get", tag = "strategies",
    params(("kind" = String, Path, description = "Name of the strategy", example = "shifted")),
    responses((status = 200, description = "The strategy", body = StrategyInfo)))]
pub async fn strategy(
    State(state): State<AppState>,
    Path(kind): Path<String>,
) -> Result<Json<StrategyInfo>, Problem> {
    let capabilities = state.host()?.capabilities();
    let info = StrategyInfo::of(&kind, &capabilities);
    info.map(Json).ok_or_else(|| HostError::NotFound { kind: "strategy", key: kind }.into())
}
