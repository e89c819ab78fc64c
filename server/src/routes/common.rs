//! What routes share: the documentation of common parameters, and the rules of `PUT`.

use mirrorvm::host::HostError;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::http::change::Change;
use crate::http::precondition::etag;
use crate::problem::{Problem, ProblemCode, ProblemError};

/// The id of a resource that a caller chose.
pub(super) fn new_id(key: &str) -> Result<Uuid, Problem> {
    let id = Uuid::try_parse(key).ok().filter(|id| !id.is_nil() && !id.is_max());
    id.ok_or_else(|| {
        let detail = "an id of your choice is a UUID, neither nil nor max";
        Problem::validation(vec![ProblemError::at_parameter("id", "invalid_format", detail)])
    })
}

/// A `PUT` of something that is there, at `generation`.
pub(super) fn check_put(change: &Change, kind: &'static str, generation: u64) -> Result<(), Problem> {
    if change.only_new {
        let detail = format!("the {kind} is there already, at \"{generation}\"");
        let etag = (axum::http::header::ETAG, etag(generation));
        return Err(Problem::new(ProblemCode::PreconditionFailed, detail).with_header(etag.0, etag.1));
    }
    change.expected.check(kind, generation).map_err(Problem::from)
}

/// A `PUT` of something that is not there: a condition on its version cannot hold.
pub(super) fn must_be_there(change: &Change, kind: &'static str) -> Result<(), Problem> {
    if change.conditional {
        return Err(HostError::NotFound { kind, key: "of this id".into() }.into());
    }
    Ok(())
}

/// Which page of a list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct PageParams {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// `next_page_token` of the page before, with the same filters.
    page_token: Option<String>,
}

/// A long poll.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct WaitParams {
    /// With `If-None-Match`: how long to wait for a change, 0 to 60 seconds with the unit. 304 when there was
    /// none.
    #[param(pattern = "^([0-9]|[1-5][0-9]|60)s$", example = "30s")]
    wait: Option<String>,
}

/// A conditional read.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct IfNoneMatchParam {
    /// ETag that the caller has; 304 when it is still the resource's.
    #[param(rename = "If-None-Match", example = "\"3\"")]
    if_none_match: Option<String>,
}

/// A conditional change.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct IfMatchParam {
    /// ETag that the resource must have; 412 when it has another.
    #[param(rename = "If-Match", example = "\"3\"")]
    if_match: Option<String>,
}

/// A look instead of a change.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::change` reads")]
pub(super) struct DryRunParam {
    /// `true`: check everything, change nothing, and answer 200 with what would be, `preview` included.
    #[param(default = false)]
    dry_run: Option<bool>,
}

/// A request that takes effect once.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::idempotency` reads")]
pub(super) struct IdempotencyKeyParam {
    /// A key of the caller's, 1 to 255 printable ASCII characters: the same request with the same key within
    /// 24 hours is answered as the first one was, with `Idempotency-Replayed: true`
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

/// A creation that finds nothing there.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::precondition` reads")]
pub(super) struct CreateOnlyParam {
    /// `*`: 412 when the resource is there already.
    #[param(rename = "If-None-Match", example = "*")]
    if_none_match: Option<String>,
}

/// A preference.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documentation of headers that `http::wait` reads")]
pub(super) struct PreferParam {
    /// `wait=N`: answer when the migration has ended, or after N seconds, at most 60.
    #[param(rename = "Prefer", example = "wait=10")]
    prefer: Option<String>,
}

/// Label selectors.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct LabelParams {
    /// Only those with this label, as `KEY=VALUE` or `KEY`; may be repeated, all must hold.
    #[param(example = json!(["rack=r1"]))]
    label: Option<Vec<String>>,
}

/// The order of things with names.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct NamedSortParams {
    /// The order: by creation or by name, with a minus the other way round.
    #[param(inline, default = "created_at")]
    sort_by: Option<NamedSort>,
}

/// The order of things without names.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
pub(super) struct SortParams {
    /// The order: by creation, with a minus the other way round.
    #[param(inline, default = "created_at")]
    sort_by: Option<Sort>,
}

/// Orders of things with names.
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

/// Orders of things without names.
#[derive(Debug, serde::Serialize, utoipa::ToSchema)]
#[expect(dead_code, reason = "documentation of parameters that `http::query` reads")]
enum Sort {
    #[serde(rename = "created_at")]
    CreatedAt,
    #[serde(rename = "-created_at")]
    CreatedAtDescending,
}
