//! Whether the daemon lives and is ready, and which version it is.

use axum::Json;
use axum::extract::State;

use crate::api::version::Version;
use crate::problem::Problem;
use crate::state::AppState;

/// Whether the daemon lives
///
/// Answers as long as the process does.
#[utoipa::path(get, path = "/livez", operation_id = "health_live", tag = "daemon",
    responses((status = 200, description = "It lives", body = String, content_type = "text/plain", example = "ok")))]
pub async fn live() -> &'static str {
    "ok\n"
}

/// Whether the daemon is ready
///
/// 200 once the state directory is open and reconciled, until the daemon is told to end.
#[utoipa::path(get, path = "/readyz", operation_id = "health_ready", tag = "daemon",
    responses((status = 200, description = "It is ready", body = String, content_type = "text/plain", example = "ok")))]
pub async fn ready(State(state): State<AppState>) -> Result<&'static str, Problem> {
    state.ready()?;
    Ok("ok\n")
}

/// Version of API and daemon
///
/// `features` names what this build has; clients test for names, not for versions.
#[utoipa::path(get, path = "/v1/version", operation_id = "version_get", tag = "daemon",
    responses((status = 200, description = "The version", body = Version)))]
pub async fn version(State(state): State<AppState>) -> Json<Version> {
    Json(Version::new(state.document().sha256().to_owned()))
}
