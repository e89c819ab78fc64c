//! What routes share: the documentation of common parameters, and the rules of `PUT`.

use mirrorvm::host::HostError;
use mirrorvm::host::ResourceKind;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::http::change::Change;
use crate::http::precondition::etag;
use crate::problem::{Problem, ProblemCode, ProblemError};

/// Reads the id that a caller chose for a new resource.
pub(super) fn new_id(key: &str) -> Result<Uuid, Problem> {
    let id = Uuid::try_parse(key).ok().filter(|id| !id.is_nil() && !id.is_max());
    id.ok_or_else(|| {
        let detail = "an id of your choice is a UUID, neither nil nor max";
        Problem::validation(vec![ProblemError::at_parameter("id", "invalid_format", detail)])
    })
}

/// Checks a `PUT` of a resource that exists, at `generation`.
pub(super) fn check_put(change: &Change, kind: ResourceKind, generation: u64) -> Result<(), Problem> {
    if change.only_new {
        let detail = format!("the {kind} is there already, at \"{generation}\"");
        let etag = (axum::http::header::ETAG, etag(generation));
        return Err(Problem::new(ProblemCode::PreconditionFailed, detail).with_header(etag.0, etag.1));
    }
    change.expected.check(kind, generation).map_err(Problem::from)
}

/// Refuses a condition on the version of a resource that a `PUT` did not find.
pub(super) fn must_be_there(change: &Change, kind: ResourceKind) -> Result<(), Problem> {
    if change.conditional {
        return Err(HostError::missing(kind, "of this id").into());
    }
    Ok(())
}

/// Parameters of a page of a list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct PageParams {
    /// How many items the page may have.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// `next_page_token` of the page before. Send the same filters with it.
    page_token: Option<String>,
}

/// Parameters of a long poll.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct WaitParams {
    /// With `If-None-Match`: how long to wait for a change, from `0s` to `60s`. The answer is 304 when there
    /// was none.
    #[param(pattern = "^([0-9]|[1-5][0-9]|60)s$", example = "30s")]
    wait: Option<String>,
}

/// Headers of a conditional read.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct IfNoneMatchParam {
    /// The ETag that you have. The answer is 304 when the resource still has it.
    #[param(rename = "If-None-Match", example = "\"3\"")]
    if_none_match: Option<String>,
}

/// Headers of a conditional change.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct IfMatchParam {
    /// The ETag that the resource must have. The answer is 412 when it has another one.
    #[param(rename = "If-Match", example = "\"3\"")]
    if_match: Option<String>,
}

/// Parameters of a dry run.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::change` reads")]
pub(super) struct DryRunParam {
    /// `true`: check everything, change nothing, and answer 200 with the resource that would result and a
    /// `preview`.
    dry_run: Option<bool>,
}

/// Headers of a request that takes effect only once.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::idempotency` reads")]
pub(super) struct IdempotencyKeyParam {
    /// A key of your choice, 1 to 255 printable ASCII characters. When the same request comes again with the
    /// same key within 24 hours, it gets the answer of the first, with `Idempotency-Replayed: true`
    /// (draft-ietf-httpapi-idempotency-key-header-07).
    #[param(
        rename = "Idempotency-Key",
        min_length = 1,
        max_length = 255,
        pattern = "^[ -~]+$",
        example = "drain-7f3a/g1"
    )]
    idempotency_key: Option<String>,
}

/// Headers of a creation that must find nothing there.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct CreateOnlyParam {
    /// `*`: the answer is 412 when the resource exists already.
    #[param(rename = "If-None-Match", example = "*")]
    if_none_match: Option<String>,
}

/// Headers that say how long the caller prefers to wait.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::wait` reads")]
pub(super) struct PreferParam {
    /// `wait=N`: answer when the migration has ended, or after N seconds (at most 60).
    #[param(rename = "Prefer", example = "wait=10")]
    prefer: Option<String>,
}

/// Parameters that select by label.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct LabelParams {
    /// Only resources with this label, as `KEY=VALUE` or `KEY`. May be repeated: all must hold.
    #[param(example = json!(["rack=r1"]))]
    label: Option<Vec<String>>,
}

/// Parameters that order resources with names.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct NamedSortParams {
    /// Order by creation or by name. A minus in front reverses it.
    #[param(inline, default = "created_at")]
    sort_by: Option<NamedSort>,
}

/// Parameters that order resources without names.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct SortParams {
    /// Order by creation. A minus in front reverses it.
    #[param(inline, default = "created_at")]
    sort_by: Option<Sort>,
}

/// The orders of resources with names.
#[derive(Debug, serde::Serialize, utoipa::ToSchema)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
enum NamedSort {
    #[serde(rename = "created_at")]
    CreatedAt,
    #[serde(rename = "-created_at")]
    CreatedAtDescending,
    #[serde(rename = "name")]
    Name,
    #[serde(rename = "-name")]
    NameDescending,
}

/// The orders of resources without names.
#[derive(Debug, serde::Serialize, utoipa::ToSchema)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
enum Sort {
    #[serde(rename = "created_at")]
    CreatedAt,
    #[serde(rename = "-created_at")]
    CreatedAtDescending,
}
