//! The catalogue of problems on the wire.

use serde::Serialize;
use utoipa::ToSchema;

use crate::problem::ProblemCode;

/// A kind of problem that the API answers with.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKind {
    /// Address of its page, which is the `type` of such a problem.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/v1/problems/not_found")]
    pub kind: String,
    /// Stable code of the problem.
    pub code: ProblemCode,
    /// HTTP status of answers with this problem.
    #[schema(example = 404)]
    pub status: u16,
    /// Short name of the problem.
    pub title: &'static str,
    /// What leads to the problem.
    pub cause: &'static str,
    /// What to do about the problem.
    pub fix: &'static str,
    /// Whether the same request may succeed later.
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

/// All kinds of problems.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKindList {
    /// One entry for each kind.
    pub items: Vec<ProblemKind>,
}
