//! Responses of resources: status, ETag, Location.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::Act;
use serde::Serialize;

use super::precondition::etag;
use super::query::escape;
use crate::api::page::{Order, PageRequest, Place, Scope, name_of};
use crate::problem::{Problem, ProblemCode};

/// Answers 200 with a resource.
pub fn ok(generation: u64, body: impl Serialize) -> Response {
    ([(header::ETAG, etag(generation))], axum::Json(body)).into_response()
}

/// Answers 201 with a resource that is at `location` now.
pub fn created(location: &str, generation: u64, body: impl Serialize) -> Response {
    let headers = [(header::LOCATION, text(location)), (header::ETAG, etag(generation))];
    (StatusCode::CREATED, headers, axum::Json(body)).into_response()
}

/// Answers 202 with a resource whose state will tell how it goes on.
pub fn accepted(location: &str, generation: u64, body: impl Serialize) -> Response {
    let headers = [
        (header::LOCATION, text(location)),
        (header::ETAG, etag(generation)),
        (header::RETRY_AFTER, HeaderValue::from_static("1")),
    ];
    (StatusCode::ACCEPTED, headers, axum::Json(body)).into_response()
}

/// Answers 200 with a page of a list. `next` also goes into a `Link` header (RFC 8288).
pub fn list(body: impl Serialize, link: Option<String>) -> Response {
    let mut response = axum::Json(body).into_response();
    if let Some(link) = link {
        response.headers_mut().insert(header::LINK, text(&link));
    }
    response
}

/// Items that are converted one at a time while they are serialized, so that a long list is never in memory
/// twice.
pub struct Lazily<T, F>(pub Vec<T>, pub F);

impl<T, B: Serialize, F: Fn(&T) -> B> Serialize for Lazily<T, F> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(&self.1))
    }
}

/// Answers like [`list`], for what may be many items, into a buffer that has room for `bytes` from the start.
pub fn long_list(
    items: impl Serialize,
    next_page_token: Option<String>,
    link: Option<String>,
    events_cursor: String,
    bytes: usize,
) -> Response {
    #[derive(Serialize)]
    struct Page<I> {
        items: I,
        #[serde(skip_serializing_if = "Option::is_none")]
        next_page_token: Option<String>,
        events_cursor: String,
    }
    let mut text = Vec::with_capacity(bytes + 256);
    if let Err(error) = serde_json::to_writer(&mut text, &Page { items, next_page_token, events_cursor }) {
        return Problem::new(ProblemCode::Internal, error.to_string()).into_response();
    }
    let json = HeaderValue::from_static("application/json");
    let mut response = ([(header::CONTENT_TYPE, json)], text).into_response();
    if let Some(link) = link {
        response.headers_mut().insert(header::LINK, self::text(&link));
    }
    response
}

/// The `Link` header of the next page, and its token.
pub fn next_page(
    path: &str,
    filters: &[(&str, &str)],
    scope: &Scope,
    request: &PageRequest,
    next: Option<Place>,
) -> (Option<String>, Option<String>) {
    let Some(place) = next else { return (None, None) };
    let token = scope.token(request.order, &place);
    let mut filters: String = filters.iter().map(|(n, v)| format!("{n}={}&", escape(v))).collect();
    if request.order != Order::default() {
        filters.push_str(&format!("sort_by={}&", name_of(request.order)));
    }
    let link = format!("<{path}?{filters}limit={}&page_token={token}>; rel=\"next\"", request.limit);
    (Some(token), Some(link))
}

/// Runs a change to its end even when the caller goes away meanwhile, because half a change is worse than one
/// that nobody waits for.
///
/// # Errors
/// The change's own; `internal` when it panicked.
pub async fn detached<T: Send + 'static, E: Into<Problem> + Send + 'static>(
    change: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::spawn(Act::scope(Act::current(), change)).await {
        Ok(result) => result.map_err(Into::into),
        Err(join) => match join.try_into_panic() {
            // The catch-panic layer logs it and answers.
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Problem::from(mirrorvm::host::HostError::ShuttingDown)),
        },
    }
}

/// As [`detached`], but keeps the change's own error for the caller to look at.
///
/// # Errors
/// `internal` when it panicked, `shutting_down`.
pub async fn attempted<T: Send + 'static, E: Send + 'static>(
    change: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<Result<T, E>, Problem> {
    detached(async move { Ok::<_, Problem>(change.await) }).await
}

fn text(value: &str) -> HeaderValue {
    // Paths of this API, ids and escaped values: visible ASCII.
    HeaderValue::try_from(value).unwrap_or(HeaderValue::from_static("/"))
}
