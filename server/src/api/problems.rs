//! The catalogue of problems on the wire.

use serde::Serialize;
use utoipa::ToSchema;

use crate::problem::Entry;

/// A kind of problem that the API answers with, or that stands in the `error` of a resource.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKind {
    /// Address of its page, which is the `type` of such a problem.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/v1/problems/not_found")]
    pub kind: String,
    /// Stable code of the problem. The list is open: new codes may be added.
    #[schema(example = "not_found")]
    pub code: &'static str,
    /// HTTP status of answers with this problem. 200: no request is answered with it; it stands in the
    /// `error` of a resource, or among the findings of a check or the reasons of another problem.
    #[schema(example = 404)]
    pub status: u16,
    /// Short name of the problem.
    pub title: &'static str,
    /// What leads to the problem.
    pub cause: &'static str,
    /// What to do about the problem.
    pub fix: String,
    /// Whether the same attempt may succeed later.
    pub retryable: bool,
}

impl From<Entry> for ProblemKind {
    fn from(entry: Entry) -> Self {
        Self {
            kind: format!("/v1/problems/{}", entry.code()),
            code: entry.code(),
            status: entry.status(),
            title: entry.title(),
            cause: entry.cause(),
            fix: entry.fix(),
            retryable: entry.retryable(),
        }
    }
}

/// All kinds of problems.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemKindList {
    /// One entry for each kind.
    pub items: Vec<ProblemKind>,
}
