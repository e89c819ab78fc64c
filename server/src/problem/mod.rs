//! RFC 9457 problems: what every response of 400 and above carries.
//!
//! Owns: the problem value, its wire form, and (in `host_error`) the one table from library errors. Must not
//! know: routes. A handler returns a [`Problem`]; the outermost middleware renders it with the request's id
//! and path, so that nothing can leave without them.

mod codes;
mod host_error;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

pub use codes::ProblemCode;

/// The media type of every problem.
pub const PROBLEM_JSON: &str = "application/problem+json";
/// Largest integer that every JSON reader keeps exact: 2^53 - 1.
pub const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// Values at fault that one sentence names; all of them are in the list beside it.
const NAMED_MAX: usize = 8;

/// One value of the request that cannot be used, or one refusal of the planner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProblemError {
    /// RFC 6901 pointer into the body.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "/memory/blocks/0/size_bytes")]
    pub pointer: Option<String>,
    /// Name of the query or path parameter.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "limit")]
    pub parameter: Option<String>,
    /// Name of the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "if-match")]
    pub header: Option<String>,
    /// Stable code, `snake_case`; an open list.
    #[schema(example = "out_of_range")]
    pub code: String,
    /// What is wrong, for people.
    #[schema(example = "0 is not between 1 and 16")]
    pub detail: String,
    /// What the offending value is, of a planner's refusal: `shift`, `slot`, ...; of `no_memory` what bounds
    /// it: `host`, `control_group`, `huge_pages`, `commit_limit`, `address_space`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub what: Option<String>,
    /// The offending value, of a planner's refusal, or the bytes of memory that are needed; left out above
    /// 2^53 - 1 (`detail` has it in any case).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value: Option<u64>,
    /// The bound that it breaks, of a planner's refusal, or the bytes of memory that can be given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bound: Option<u64>,
    /// Index of the offending slot, block or mapping, of a planner's refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub index: Option<u64>,
}

impl ProblemError {
    fn bare(code: &str, detail: String) -> Self {
        Self {
            pointer: None,
            parameter: None,
            header: None,
            code: code.to_owned(),
            detail,
            what: None,
            value: None,
            bound: None,
            index: None,
        }
    }

    /// About a value of the body.
    pub fn at_pointer(pointer: impl Into<String>, code: &str, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), ..Self::bare(code, detail.into()) }
    }

    /// About a parameter.
    pub fn at_parameter(parameter: impl Into<String>, code: &str, detail: impl Into<String>) -> Self {
        Self { parameter: Some(parameter.into()), ..Self::bare(code, detail.into()) }
    }

    /// About a header.
    pub fn at_header(header: &HeaderName, code: &str, detail: impl Into<String>) -> Self {
        Self { header: Some(header.as_str().to_owned()), ..Self::bare(code, detail.into()) }
    }
}

/// Something that keeps a request from working now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct BlockedReason {
    /// Stable code, `snake_case`; an open list.
    #[schema(example = "migration_active")]
    pub code: String,
    /// What it is, for people.
    pub detail: String,
}

#[derive(Clone, Debug)]
struct Inner {
    code: ProblemCode,
    detail: String,
    errors: Vec<ProblemError>,
    current_state: Option<&'static str>,
    allowed_states: &'static [&'static str],
    blocked_reasons: Vec<BlockedReason>,
    cursors: Option<(String, String)>,
    headers: Vec<(HeaderName, HeaderValue)>,
    log: Option<String>,
}

/// A problem on its way out.
#[derive(Clone, Debug)]
pub struct Problem(Box<Inner>);

impl Problem {
    /// A problem with a sentence for the caller: no host paths, no addresses of this process, no secrets.
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            current_state: None,
            allowed_states: &[],
            blocked_reasons: Vec::new(),
            cursors: None,
            headers: Vec::new(),
            log: None,
        }))
    }

    /// Values of the request that cannot be used.
    pub fn validation(errors: Vec<ProblemError>) -> Self {
        let place = |e: &ProblemError| {
            let place = [&e.pointer, &e.parameter, &e.header].into_iter().flatten().next();
            place.filter(|p| !p.is_empty()).map_or("the body", String::as_str).to_owned()
        };
        let detail = match errors.as_slice() {
            [one] => format!("{}: {}", place(one), one.detail),
            many => {
                let mut named: Vec<String> = many.iter().take(NAMED_MAX).map(place).collect();
                if many.len() > NAMED_MAX {
                    named.push(format!("and {} more", many.len() - NAMED_MAX));
                }
                format!("{} values of the request cannot be used: {}", many.len(), named.join(", "))
            }
        };
        let mut problem = Self::new(ProblemCode::ValidationFailed, detail);
        problem.0.errors = errors;
        problem
    }

    /// Its code.
    pub fn code(&self) -> ProblemCode {
        self.0.code
    }

    /// The values at fault.
    pub fn errors(&self) -> &[ProblemError] {
        &self.0.errors
    }

    /// The same with a response header.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    /// The same with the oldest and the newest place in the events.
    pub fn with_cursors(mut self, oldest: String, latest: String) -> Self {
        self.0.cursors = Some((oldest, latest));
        self
    }

    /// The same with values at fault.
    pub fn with_errors(mut self, errors: Vec<ProblemError>) -> Self {
        self.0.errors = errors;
        self
    }

    /// The same with something for the log that the caller does not see.
    pub fn with_log(mut self, log: impl Into<String>) -> Self {
        self.0.log = Some(log.into());
        self
    }

    /// What the log should say and the caller should not see.
    pub fn log(&self) -> Option<&str> {
        self.0.log.as_deref()
    }

    /// The response, for the request `request_id` on path `instance`.
    pub fn render(&self, instance: &str, request_id: &str) -> Response {
        let code = self.0.code;
        let body = ProblemBody {
            kind: format!("/v1/problems/{}", code.as_str()),
            title: code.title(),
            status: code.status().as_u16(),
            detail: &self.0.detail,
            instance,
            code,
            request_id,
            retryable: code.retryable(),
            errors: &self.0.errors,
            current_state: self.0.current_state,
            blocked_reasons: &self.0.blocked_reasons,
            oldest: self.0.cursors.as_ref().map(|(oldest, _)| oldest.as_str()),
            latest: self.0.cursors.as_ref().map(|(_, latest)| latest.as_str()),
            allowed_states: (!self.0.allowed_states.is_empty()).then_some(self.0.allowed_states),
        };
        let mut response = (code.status(), axum::Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if matches!(code.status().as_u16(), 429 | 503) || code == ProblemCode::IdempotencyKeyInUse {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        for (name, value) in &self.0.headers {
            headers.insert(name, value.clone());
        }
        response
    }
}

impl IntoResponse for Problem {
    /// Hands the problem to the outermost middleware, which renders it.
    fn into_response(self) -> Response {
        let mut response = self.0.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A problem as RFC 9457 has it, with the members that this API adds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem, title = "Problem")]
pub struct ProblemBody<'a> {
    /// Page that explains the problem: `/v1/problems/<code>`.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/v1/problems/not_found")]
    pub kind: String,
    /// Short name for people.
    #[schema(example = "No such resource")]
    pub title: &'a str,
    /// The HTTP status.
    #[schema(example = 404, minimum = 400, maximum = 599)]
    pub status: u16,
    /// What happened, for people. Programs go by `code`.
    #[schema(example = "there is no guest \"g1\"")]
    pub detail: &'a str,
    /// Path of the request.
    #[schema(format = "uri-reference", example = "/v1/guests/g1")]
    pub instance: &'a str,
    /// What happened, for programs.
    pub code: ProblemCode,
    /// The request's id, as in the `x-request-id` header and the daemon's log.
    #[schema(example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub request_id: &'a str,
    /// Whether the same request may work later.
    pub retryable: bool,
    /// The values at fault, one entry each; empty when the problem is not about values.
    pub errors: &'a [ProblemError],
    /// What keeps the request from working now; often empty.
    pub blocked_reasons: &'a [BlockedReason],
    /// The oldest place in the events that can be continued from, with `event_cursor_expired`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "8f1c0a7d5be2460c-1")]
    pub oldest: Option<&'a str>,
    /// The newest event's place, with `event_cursor_expired`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "8f1c0a7d5be2460c-42")]
    pub latest: Option<&'a str>,
    /// State of the resource, with `state_conflict`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "stopped")]
    pub current_state: Option<&'a str>,
    /// States in which the action works, with `state_conflict`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<Vec<String>>, example = json!(["running", "paused"]))]
    pub allowed_states: Option<&'a [&'static str]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_catalogue_renders_as_itself() {
        let mut seen = std::collections::HashSet::new();
        for code in ProblemCode::ALL.iter().copied() {
            assert!(seen.insert(code.as_str()), "{code:?} is there twice");
            assert_eq!(ProblemCode::parse(code.as_str()), Some(code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            let status = code.status();
            assert!(status.is_client_error() || status.is_server_error(), "{code:?}");
            assert!(code.as_str().bytes().all(|c| c.is_ascii_lowercase() || c == b'_'), "{code:?}");
            for text in [code.title(), code.cause(), code.fix()] {
                assert!(!text.is_empty() && !text.contains("0x"), "{code:?}: {text}");
            }
            let response = Problem::new(code, "x").render("/v1/guests", "id");
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_JSON);
            let waits = matches!(status.as_u16(), 429 | 503) || code == ProblemCode::IdempotencyKeyInUse;
            assert_eq!(waits, response.headers().contains_key(header::RETRY_AFTER));
        }
    }
}
