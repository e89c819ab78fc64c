//! RFC 9457 problems: what every response of 400 and above carries.
//!
//! Owns: the problem value, its wire form, and (in `host_error`) what is said of library errors. Must not
//! know: routes. A handler returns a [`Problem`]; the outermost middleware renders it with the request's id
//! and path, so that nothing can leave without them.

mod codes;
mod entry;
mod host_error;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::codes::Code;
use serde::Serialize;
use utoipa::ToSchema;

pub use codes::ProblemCode;
pub use entry::{Entry, sentence};
pub use mirrorvm::reading::MAX_SAFE_INTEGER;

/// The media type of every problem.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// How many values at fault the sentence names. All of them are in the list beside it.
const NAMED_MAX: usize = 8;

/// How much of a name that nothing has is said again.
const KEY_SHOWN: usize = 80;

/// One value of the request that cannot be used, or one refusal of the planner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProblemError {
    /// RFC 6901 pointer into the body.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "/memory/blocks/0/size_bytes")]
    pub pointer: Option<String>,
    /// Name of the query or path parameter that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "limit")]
    pub parameter: Option<String>,
    /// Name of the header that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "if-match")]
    pub header: Option<String>,
    /// A stable code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "out_of_range")]
    pub code: String,
    /// What is wrong, in a sentence.
    #[schema(example = "0 is not between 1 and 16")]
    pub detail: String,
    /// For a refusal of the planner: what the offending value is, such as `shift` or `slot`. For `no_memory`:
    /// what limits memory, one of `host`, `control_group`, `huge_pages`, `commit_limit`, `address_space`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub what: Option<String>,
    /// For a refusal of the planner: the offending value. For `no_memory`: how many bytes are needed. Left
    /// out above 2^53 - 1; `detail` has it in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub value: Option<u64>,
    /// For a refusal of the planner: the bound that the value breaks. For `no_memory`: how many bytes are
    /// available.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bound: Option<u64>,
    /// For a refusal of the planner: index of the offending slot, block or mapping.
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

    /// An error about a value of the body.
    pub fn at_pointer(pointer: impl Into<String>, code: &str, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), ..Self::bare(code, detail.into()) }
    }

    /// An error about a query or path parameter.
    pub fn at_parameter(parameter: impl Into<String>, code: &str, detail: impl Into<String>) -> Self {
        Self { parameter: Some(parameter.into()), ..Self::bare(code, detail.into()) }
    }

    /// An error about a header.
    pub fn at_header(header: &HeaderName, code: &str, detail: impl Into<String>) -> Self {
        Self { header: Some(header.as_str().to_owned()), ..Self::bare(code, detail.into()) }
    }
}

/// A reason why a request does not work now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct BlockedReason {
    /// A stable code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "migration_active")]
    pub code: String,
    /// What the reason is, in a sentence.
    pub detail: String,
}

impl BlockedReason {
    /// A reason that has a code of the library's.
    pub fn new(code: Code, detail: String) -> Self {
        Self { code: code.as_str().to_owned(), detail }
    }
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

/// A problem, on its way to the caller.
#[derive(Clone, Debug)]
pub struct Problem(Box<Inner>);

impl Problem {
    /// Makes a problem with a sentence for the caller, which must not contain paths of the host, addresses of
    /// this process, or secrets.
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

    /// There is no such thing of the daemon's own.
    pub fn missing(what: &str, key: &str) -> Self {
        let key: String = key.chars().take(KEY_SHOWN).collect();
        Self::new(ProblemCode::NotFound, format!("there is no {what} {key:?}"))
    }

    /// Makes a `validation_failed` problem of these errors.
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

    /// The code of the problem.
    pub fn code(&self) -> ProblemCode {
        self.0.code
    }

    /// The values at fault.
    pub fn errors(&self) -> &[ProblemError] {
        &self.0.errors
    }

    /// Adds a response header.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    /// Adds the oldest and the newest place in the events.
    pub fn with_cursors(mut self, oldest: String, latest: String) -> Self {
        self.0.cursors = Some((oldest, latest));
        self
    }

    /// Adds values at fault.
    pub fn with_errors(mut self, errors: Vec<ProblemError>) -> Self {
        self.0.errors = errors;
        self
    }

    /// Adds a text for the log, which the caller does not see.
    pub fn with_log(mut self, log: impl Into<String>) -> Self {
        self.0.log = Some(log.into());
        self
    }

    /// What the log should say and the caller must not see.
    pub fn log(&self) -> Option<&str> {
        self.0.log.as_deref()
    }

    /// Renders the response, for the request `request_id` on path `instance`.
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
    /// Hands the problem on to the outermost middleware, which renders it.
    fn into_response(self) -> Response {
        let mut response = self.0.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A problem as RFC 9457 defines it, with the members that this API adds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem, title = "Problem")]
pub struct ProblemBody<'a> {
    /// Address of the page that explains the problem: `/v1/problems/<code>`.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/v1/problems/not_found")]
    pub kind: String,
    /// Short name of the problem.
    #[schema(example = "No such resource")]
    pub title: &'a str,
    /// HTTP status of the answer.
    #[schema(example = 404, minimum = 400, maximum = 599)]
    pub status: u16,
    /// What happened, in a sentence. Programs should go by `code`.
    #[schema(example = "there is no guest \"g1\"")]
    pub detail: &'a str,
    /// Path of the request.
    #[schema(format = "uri-reference", example = "/v1/guests/g1")]
    pub instance: &'a str,
    /// Stable code of the problem, for programs.
    pub code: ProblemCode,
    /// The request's id, as in the `x-request-id` header and the daemon's log.
    #[schema(example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub request_id: &'a str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The values at fault. Empty when the problem is not about values.
    pub errors: &'a [ProblemError],
    /// The reasons why the request does not work now. Often empty.
    pub blocked_reasons: &'a [BlockedReason],
    /// With `event_cursor_expired`: the oldest place in the events that can be continued from.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "8f1c0a7d5be2460c-1")]
    pub oldest: Option<&'a str>,
    /// With `event_cursor_expired`: the place of the newest event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "8f1c0a7d5be2460c-42")]
    pub latest: Option<&'a str>,
    /// With `state_conflict`: state of the resource.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "stopped")]
    pub current_state: Option<&'a str>,
    /// With `state_conflict`: the states in which the action works.
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
