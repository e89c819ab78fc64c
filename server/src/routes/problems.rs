//! The catalogue of problems.

use axum::Json;
use axum::extract::Path;

use crate::api::problems::{ProblemKind, ProblemKindList};
use crate::problem::{Entry, Problem, ProblemCode};

/// List the kinds of problems
///
/// Every code that a problem, the `error` of a resource or a finding of a check can have, with cause and fix.
#[utoipa::path(get, path = "/v1/problems", operation_id = "problem_list", tag = "problems",
    responses((status = 200, description = "The catalogue", body = ProblemKindList)))]
pub async fn list() -> Json<ProblemKindList> {
    Json(ProblemKindList { items: Entry::all().map(ProblemKind::from).collect() })
}

/// Explain a kind of problem
///
/// The page that the `type` of a problem refers to, and that of every code in the `error` of a resource.
#[utoipa::path(get, path = "/v1/problems/{code}", operation_id = "problem_get", tag = "problems",
    params(("code" = String, Path, description = "Code of the problem", example = "not_found")),
    responses((status = 200, description = "The kind of problem", body = ProblemKind)))]
pub async fn get(Path(code): Path<String>) -> Result<Json<ProblemKind>, Problem> {
    Entry::find(&code)
        .map(|entry| Json(entry.into()))
        .ok_or_else(|| Problem::new(ProblemCode::NotFound, "there is no such code"))
}
