//! The catalogue of problems on the wire.

use serde::Serialize;
use utoipa::ToSchema;

use crate::problem::ProblemCode;

/// A kind of problem.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKind {
    /// Its page: the `type` of a problem.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/v1/problems/not_found")]
    pub kind: String,
    /// Stable code.
    pub code: ProblemCode,
    /// The HTTP status that goes with it.
    #[schema(example = 404)]
    pub status: u16,
    /// Short name.
    pub title: &'static str,
    /// What leads to it.
    pub cause: &'static str,
    /// What to do about it.
    pub fix: &'static str,
    /// Whether the same request may work later.
    pub retryable: bool,
}

impl From<ProblemCode> for ProblemKind {
    fn from(code: ProblemCode) -> Self {
        Self {
            kind: format!("/v1/problems/{}", code.as_str()),
            code,
            status: code.status().as_u16(),
            title: code.title(),
            cause: code.cause(),
            fix: code.fix(),
            retryable: code.retryable(),
        }
    }
}

/// Every kind of problem.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKindList {
    /// One entry each.
    pub items: Vec<ProblemKind>,
}
