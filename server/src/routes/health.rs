//! Whether the daemon lives and is ready, and which version it is.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use mirrorvm::host::HostError;
use mirrorvm::store::Trouble;
use mirrorvm::store::ledger::Log;

use crate::api::version::Version;
use crate::http::query::Query;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// Whether the daemon lives
///
/// Answers as long as the process runs.
#[utoipa::path(get, path = "/livez", operation_id = "health_live", tag = "daemon",
    responses((status = 200, description = "It lives", body = String, content_type = "text/plain", example = "ok")))]
pub async fn live() -> &'static str {
    "ok\n"
}

/// Whether the daemon is ready
///
/// 200 from the time when the state directory is open and reconciled until the daemon is told to end, as long
/// as its database accepts writes. Otherwise a problem that says what is the matter. With `verbose` the
/// answer has one line for each part that must work.
#[utoipa::path(get, path = "/readyz", operation_id = "health_ready", tag = "daemon",
    params(("verbose" = Option<bool>, Query, description = "One line for each part: `true` or `false`")),
    responses((status = 200, description = "It is ready", body = String, content_type = "text/plain", example = "ok")))]
pub async fn ready(State(state): State<AppState>, query: Query) -> Result<String, Problem> {
    let mut parameters = query.read_flag("verbose")?;
    let verbose = parameters.flag("verbose");
    parameters.done()?;
    state.ready()?;
    let host = state.host()?;
    let writing = host.storage().await;
    if let Some((trouble, since)) = writing.failing {
        return Err(not_written(trouble, since, writing.owed));
    }
    if let Err(error) = host.ledger().bounds(Log::Event) {
        return Err(HostError::storage("reading the database", error).into());
    }
    if !verbose {
        return Ok("ok\n".to_owned());
    }
    let storage = match writing.owed {
        0 => "ok".to_owned(),
        owed => format!("ok, {owed} changes are still to be written"),
    };
    let capabilities = host.capabilities();
    let kvm = if capabilities.kvm_api_version.is_some() { "ok" } else { "absent" };
    let qemu = if capabilities.drivers.contains(&"qemu") { "ok" } else { "absent" };
    let peers = if host.info().peer_listen.is_some() { "ok" } else { "off" };
    Ok(format!("[+] database {storage}\n[+] kvm {kvm}\n[+] qemu {qemu}\n[+] peer listener {peers}\nok\n"))
}

/// The problem that says that the database accepts no writes.
fn not_written(trouble: Trouble, since: Duration, owed: usize) -> Problem {
    let (code, what) = match trouble {
        Trouble::Full => {
            (ProblemCode::StorageFull, "no space is left in the file system of the state directory")
        }
        Trouble::Busy => (ProblemCode::StorageBusy, "another process keeps the database locked"),
        Trouble::Failed => {
            (ProblemCode::StorageFailed, "the disk of the state directory fails or does not answer")
        }
    };
    let kept = match owed {
        0 => String::new(),
        owed => format!("; {owed} changes that have happened are kept in memory until they can be written"),
    };
    let seconds = since.as_secs();
    Problem::new(code, format!("database: writing has failed for {seconds} s: {what}{kept}"))
}

/// Get the metrics
///
/// Counters for Prometheus, as OpenMetrics text.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics_get", tag = "daemon",
    responses((status = 200, description = "The counters", body = String,
        content_type = "application/openmetrics-text", example = "# EOF")))]
pub async fn metrics(State(state): State<AppState>) -> Result<Response, Problem> {
    let failed = |_| Problem::new(ProblemCode::Internal, "the daemon failed; its log has the reason");
    let text = state.metrics().text(state.host().ok()).map_err(failed)?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Version of API and daemon
///
/// `features` names what this build can do. Clients test for names, not for versions.
#[utoipa::path(get, path = "/v1/version", operation_id = "version_get", tag = "daemon",
    responses((status = 200, description = "The version", body = Version)))]
pub async fn version(State(state): State<AppState>) -> Result<Json<Version>, Problem> {
    Ok(Json(Version::new(state.document().await?.sha256().to_owned())))
}
