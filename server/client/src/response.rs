//! An answer, whole.
//!
//! Owns: what a caller reads from it. Must not know: connections.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, ETAG, HeaderName, LOCATION, RETRY_AFTER, SET_COOKIE};
use hyper::{HeaderMap, StatusCode};
use serde_json::Value;

use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::problem::{PROBLEM_JSON, Problem};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// An answer of whatever status, whole.
#[derive(Clone)]
pub struct Response {
    endpoint: Endpoint,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Response {
    pub(crate) fn new(endpoint: Endpoint, head: hyper::http::response::Parts, body: Bytes) -> Self {
        let mut headers = head.headers;
        // A session is a secret.
        if let hyper::header::Entry::Occupied(mut set) = headers.entry(SET_COOKIE) {
            set.iter_mut().for_each(|value| value.set_sensitive(true));
        }
        Self { endpoint, status: head.status, headers, body }
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The first value of a header, when it is ASCII.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The body alone.
    pub fn into_body(self) -> Bytes {
        self.body
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value, ClientError> {
        serde_json::from_slice(&self.body).map_err(|e| self.odd(format!("no JSON: {e}")))
    }

    /// The ETag of the resource, for [`Request::if_match`](crate::Request::if_match).
    pub fn etag(&self) -> Option<&str> {
        self.header(ETAG.as_str())
    }

    /// Path of what was made.
    pub fn location(&self) -> Option<&str> {
        self.header(LOCATION.as_str())
    }

    /// Id of the request, as in the daemon's log.
    pub fn request_id(&self) -> Option<&str> {
        self.header(REQUEST_ID.as_str())
    }

    /// After which time to look or ask again, when the daemon says.
    pub fn retry_after(&self) -> Option<Duration> {
        Some(Duration::from_secs(self.header(RETRY_AFTER.as_str())?.trim().parse().ok()?))
    }

    /// Whether it is the first answer to this idempotency key, told again.
    pub fn is_replayed(&self) -> bool {
        self.headers.contains_key(REPLAYED)
    }

    /// Which problem it is, of a status of 400 and above.
    pub fn problem(&self) -> Option<Problem> {
        let kind = self.header(CONTENT_TYPE.as_str())?.split(';').next()?.trim();
        if !self.is_refusal() || !kind.eq_ignore_ascii_case(PROBLEM_JSON) {
            return None;
        }
        let mut problem = Problem::read(self.status.as_u16(), &self.body)?;
        problem.retry_after = self.retry_after();
        problem.etag = self.etag().map(str::to_owned);
        Some(problem)
    }

    /// Itself, unless the daemon said no.
    ///
    /// # Errors
    /// [`ClientError::Problem`]; [`ClientError::Status`] when the refusal is no problem.
    pub fn accepted(self) -> Result<Self, ClientError> {
        if !self.is_refusal() {
            return Ok(self);
        }
        Err(match self.problem() {
            Some(problem) => ClientError::Problem(Box::new(problem)),
            None => ClientError::Status { endpoint: self.endpoint, status: self.status },
        })
    }

    pub(crate) fn is_refusal(&self) -> bool {
        self.status.as_u16() >= 400
    }

    /// A good answer that the API does not give.
    pub(crate) fn odd(&self, what: impl Into<String>) -> ClientError {
        ClientError::Answer { endpoint: self.endpoint.clone(), what: what.into() }
    }
}

impl fmt::Debug for Response {
    /// Without the body, which may hold a secret that is told once.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}
