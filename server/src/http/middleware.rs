//! What is around every route: request ids, problems for whatever went wrong, limits of time, the log.

use std::any::Any;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use uuid::Uuid;

use super::{gate, guard, idempotency, meant, quiet, trace};
use crate::access::table;
use crate::problem::{PROBLEM_JSON, Problem, ProblemCode};
use crate::state::AppState;

/// The header with the request's id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// No page of another origin has a use for an answer, not even as an image or a script.
const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");
/// An answer that is not a page of ours must not run anything: with a browser's session, a script in it could
/// do whatever the session may. The SVG of a layout has a style of its own.
const NO_PAGE: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
/// Reads that take longer are logged with their duration.
const SLOW: Duration = Duration::from_millis(10);
/// How long an answer may take: longer than the longest long poll.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest head of a request, in bytes: first line and headers.
pub const HEAD_MAX: usize = 64 << 10;
/// The paths that are answered even when there is no room for anything else.
const MONITORING: [&str; 3] = ["/livez", "/readyz", "/metrics"];

/// Marks the requests of a connection beyond the listener's bound. Set by the accept loop.
#[derive(Clone, Copy, Debug)]
pub struct Crowded;

/// Puts the middleware around `router`.
pub fn wrap(router: Router, state: &AppState) -> Router {
    // The last one is the outermost.
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(timeout))
        .layer(from_fn_with_state(state.clone(), idempotency::layer))
        .layer(from_fn_with_state(state.clone(), gate::layer))
        .layer(from_fn(guard::layer))
        .layer(from_fn_with_state(state.clone(), finish))
}

/// Puts what public routes need around them: no gate, nothing for changes, and no check under which name the
/// daemon is addressed, because scrapers come through proxies.
pub fn wrap_open(router: Router, state: &AppState) -> Router {
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(timeout))
        .layer(from_fn_with_state(state.clone(), finish))
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    // The panic hook has logged it; its text may hold anything, so the caller gets none of it.
    Problem::new(ProblemCode::Internal, "the daemon failed; its log has the reason").into_response()
}

async fn timeout(request: Request, next: Next) -> Response {
    match tokio::time::timeout(ANSWER_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(ProblemCode::TimedOut, "the operation takes longer than a request may")
            .into_response(),
    }
}

/// Gives the request an id, turns every failure into a problem, logs.
async fn finish(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map(|m| m.as_str().to_owned());
    let operation = route.as_deref().and_then(|r| table::find(&method, r)).map_or("none", |o| o.id);
    let trace = trace::of(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let crowded = request.extensions().get::<Crowded>().is_some();
    let response = match refusal(&request, crowded) {
        Some(problem) => problem.into_response(),
        None => next.run(request).await,
    };
    let problem = problem_of(&response, &method, &path);
    let mut response = match &problem {
        Some(problem) => render(problem, &response, &path, &id),
        None => response,
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::try_from(&id) {
        headers.insert(REQUEST_ID, value);
    }
    headers.insert(trace::TRACEPARENT, trace.header());
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(RESOURCE_POLICY, HeaderValue::from_static("same-origin"));
    if !headers.contains_key(header::CONTENT_SECURITY_POLICY) {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(NO_PAGE));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if crowded {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let took = started.elapsed();
    if method == Method::GET && took >= SLOW {
        let timing = format!("total;dur={:.1}", took.as_secs_f64() * 1e3);
        if let Ok(value) = HeaderValue::try_from(timing) {
            headers.insert(HeaderName::from_static("server-timing"), value);
        }
    }
    state.metrics().answered(operation, response.status().as_u16(), took);
    if let Some(problem) = &problem {
        state.metrics().problem(problem.code());
    }
    log(&method, operation, &id, trace.id(), response.status(), took, problem.as_ref());
    response
}

/// Why a request is refused whatever it asks for.
fn refusal(request: &Request, crowded: bool) -> Option<Problem> {
    if head_bytes(request) > HEAD_MAX {
        let detail = format!("a request's head has at most {HEAD_MAX} bytes");
        return Some(Problem::new(ProblemCode::HeadersTooLarge, detail));
    }
    // The parser takes the length from the last one and leaves the others to whoever reads the body, which
    // nobody does.
    let mut codings = request.headers().get_all(header::TRANSFER_ENCODING).iter();
    let chunked = codings.next().is_none_or(|c| c.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
    if !chunked || codings.next().is_some() {
        let detail = "Transfer-Encoding may only be chunked: send the body without another coding";
        return Some(
            Problem::new(ProblemCode::UnsupportedMediaType, detail)
                .with_header(header::CONNECTION, HeaderValue::from_static("close")),
        );
    }
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if crowded && !MONITORING.contains(&route) {
        let detail = "every connection that this listener may have is being used";
        return Some(Problem::new(ProblemCode::TooManyConnections, detail));
    }
    None
}

/// Bytes of the head, without white space that it can do without. Requests that are sent without waiting for
/// answers arrive in one piece, of which the parser cannot tell how much belongs to which.
fn head_bytes(request: &Request) -> usize {
    // The spaces and the version of the first line, and an empty line at the end.
    let first =
        request.method().as_str().len() + request.uri().to_string().len() + "  HTTP/1.1\r\n\r\n".len();
    request.headers().iter().map(|(n, v)| n.as_str().len() + v.len() + ": \r\n".len()).sum::<usize>() + first
}

/// The answer to something that could not be read as a request, as it goes over the wire.
pub async fn unread(state: Option<&AppState>, problem: &Problem) -> Vec<u8> {
    let id = Uuid::now_v7().to_string();
    // There is no path that could be trusted.
    let (head, body) = problem.render("", &id).into_parts();
    // A problem's body is in memory.
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let reason = head.status.canonical_reason().unwrap_or_default();
    let mut text = format!(
        "HTTP/1.1 {} {reason}\r\n{REQUEST_ID}: {id}\r\nconnection: close\r\ncontent-length: {}\r\n\
         x-content-type-options: nosniff\r\n",
        head.status.as_u16(),
        body.len()
    )
    .into_bytes();
    for (name, value) in head.headers.iter().filter(|(n, _)| *n != header::CONTENT_LENGTH) {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    text.extend_from_slice(&body);
    if let Some(state) = state {
        state.metrics().answered("none", head.status.as_u16(), Duration::ZERO);
        state.metrics().problem(problem.code());
    }
    log(&Method::default(), "none", &id, "", head.status, Duration::ZERO, Some(problem));
    text
}

/// The id of the request being handled.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// The value of a header that occurs once and is text. Of two values nobody knows which counts.
pub fn sole<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    let mut all = headers.get_all(name).iter();
    match (all.next(), all.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// The caller's id for the request, if it is short and plain, otherwise a new one.
fn request_id(headers: &HeaderMap) -> String {
    let plain = |id: &&str| {
        (1..=64).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c))
    };
    let given = sole(headers, &REQUEST_ID).filter(plain);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

/// The problem that a response stands for. Whatever a layer below answers on its own (no route, no such
/// method, a rejected extractor) becomes a problem, too.
fn problem_of(response: &Response, method: &Method, path: &str) -> Option<Problem> {
    if let Some(problem) = response.extensions().get::<Problem>() {
        return Some(problem.clone());
    }
    let status = response.status();
    let is_problem = response.headers().get(header::CONTENT_TYPE).is_some_and(|t| t == PROBLEM_JSON);
    if is_problem || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    let (code, detail) = match status {
        StatusCode::NOT_FOUND => {
            let meant = meant::path(path).map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
            (ProblemCode::RouteNotFound, format!("this path is not part of the API{meant}"))
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            (ProblemCode::MethodNotAllowed, format!("{method} does not apply to this path"))
        }
        StatusCode::PAYLOAD_TOO_LARGE => (ProblemCode::PayloadTooLarge, "the body is too large".to_owned()),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            (ProblemCode::UnsupportedMediaType, "the body's media type is not supported".to_owned())
        }
        s if s.is_client_error() => {
            (ProblemCode::MalformedRequest, "the request cannot be parsed".to_owned())
        }
        _ => (ProblemCode::Internal, "the daemon failed; its log has the reason".to_owned()),
    };
    Some(Problem::new(code, detail))
}

/// The problem's response, with the headers that the layers below had set (`Allow`).
fn render(problem: &Problem, below: &Response, path: &str, id: &str) -> Response {
    let mut response: Response<Body> = problem.render(path, id);
    for (name, value) in below.headers() {
        if name != header::CONTENT_TYPE
            && name != header::CONTENT_LENGTH
            && !response.headers().contains_key(name)
        {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}

fn log(
    method: &Method,
    operation: &str,
    id: &str,
    trace_id: &str,
    status: StatusCode,
    took: Duration,
    problem: Option<&Problem>,
) {
    // One of the caller's own making may be of any length.
    let shown: String = method.as_str().chars().take(16).collect();
    let ms = took.as_secs_f64() * 1e3;
    let code = problem.map_or("none", |p| p.code().as_str());
    let cause = problem.and_then(Problem::log).unwrap_or("");
    let status = status.as_u16();
    if status >= 500 {
        let Some(left_out) = quiet::admits(code) else { return };
        tracing::error!(
            method = shown,
            operation,
            status,
            code,
            cause,
            request_id = id,
            trace_id,
            ms,
            left_out,
            "request failed"
        );
    } else if status >= 400 {
        let Some(left_out) = quiet::admits(code) else { return };
        tracing::info!(
            method = shown,
            operation,
            status,
            code,
            cause,
            request_id = id,
            trace_id,
            ms,
            left_out,
            "request refused"
        );
    } else {
        tracing::debug!(method = shown, operation, status, request_id = id, trace_id, ms, "request");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_callers_are_kept_when_they_are_plain() {
        let id = |value: &'static str| {
            request_id(&[(REQUEST_ID, HeaderValue::from_static(value))].into_iter().collect())
        };
        assert_eq!(id("abc-1.2_3"), "abc-1.2_3");
        for bad in ["", "a b", "a\"b", "<script>"] {
            assert_ne!(id(bad), bad);
            assert!(Uuid::try_parse(&id(bad)).is_ok());
        }
    }
}
