//! A request, put together piece by piece.
//!
//! Owns: method, target, headers, body, and what no HTTP client can send of them. Must not know: connections.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderName, HeaderValue,
    IF_MATCH, IF_NONE_MATCH, PROXY_AUTHORIZATION, USER_AGENT,
};
use hyper::{HeaderMap, Method, Uri};
use ring::rand::SecureRandom as _;
use serde_json::Value;

use crate::settings::Settings;
use crate::text::escape;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Sent with changes under a session: no page of another origin can.
const SESSION_MARK: HeaderName = HeaderName::from_static("x-mirrorvm");
const AGENT: HeaderValue = HeaderValue::from_static(concat!("mirrorvm-client/", env!("CARGO_PKG_VERSION")));

/// Why a request is none. Told when it is sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The method is no token.
    #[error("{0:?} is no method")]
    Method(String),
    /// The target is no path with a query.
    #[error("{0:?} is no target: a path from / on with a query, percent-encoded")]
    Target(String),
    /// A header's name is no token, or its value has control characters. The value is not told.
    #[error("the header {0:?} has a name or a value that no header can have")]
    Header(String),
    /// The system gives no random bytes for an idempotency key.
    #[error("the system gives no random bytes")]
    NoRandomness,
}

/// A request. What cannot be sent of it is told when it is sent.
#[derive(Clone)]
pub struct Request {
    method: Method,
    target: String,
    headers: HeaderMap,
    body: Bytes,
    within: Option<Duration>,
    up_to: Option<u64>,
    /// The first thing that cannot be sent.
    wrong: Option<RequestError>,
}

impl Request {
    /// A request without a body. The target is a path with a query; names in it go through
    /// [`escape`](crate::escape).
    pub fn new(method: &str, target: impl Into<String>) -> Self {
        let (method, wrong) = match Method::from_bytes(method.as_bytes()) {
            Ok(method) => (method, None),
            Err(_) => (Method::GET, Some(RequestError::Method(method.to_owned()))),
        };
        Self {
            method,
            target: target.into(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            within: None,
            up_to: None,
            wrong,
        }
    }

    /// GET.
    pub fn get(target: impl Into<String>) -> Self {
        Self::new("GET", target)
    }

    /// POST.
    pub fn post(target: impl Into<String>) -> Self {
        Self::new("POST", target)
    }

    /// POST with a JSON body or without one.
    pub(crate) fn posted(target: &str, body: Option<&Value>) -> Self {
        match body {
            Some(body) => Self::post(target).json(body),
            None => Self::post(target),
        }
    }

    /// PUT.
    pub fn put(target: impl Into<String>) -> Self {
        Self::new("PUT", target)
    }

    /// PATCH; see [`Request::merge_patch`].
    pub fn patch(target: impl Into<String>) -> Self {
        Self::new("PATCH", target)
    }

    /// DELETE.
    pub fn delete(target: impl Into<String>) -> Self {
        Self::new("DELETE", target)
    }

    /// The same with one more parameter in the query, percent-encoded.
    #[must_use]
    pub fn query(mut self, name: &str, value: &str) -> Self {
        let sign = if self.target.contains('?') { '&' } else { '?' };
        self.target.push_str(&format!("{sign}{}={}", escape(name), escape(value)));
        self
    }

    /// The same with one more header. Values of `authorization` and `cookie` are never printed.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value.as_bytes())) {
            (Ok(name), Ok(mut value)) => {
                value.set_sensitive([AUTHORIZATION, PROXY_AUTHORIZATION, COOKIE].contains(&name));
                self.headers.append(name, value);
            }
            _ => self.wrong = self.wrong.or_else(|| Some(RequestError::Header(name.to_owned()))),
        }
        self
    }

    /// The same with a JSON body.
    #[must_use]
    pub fn json(self, body: &Value) -> Self {
        self.body("application/json", body.to_string())
    }

    /// The same with a JSON merge patch (RFC 7396) as body.
    #[must_use]
    pub fn merge_patch(self, patch: &Value) -> Self {
        self.body("application/merge-patch+json", patch.to_string())
    }

    /// The same with a body of any type.
    #[must_use]
    pub fn body(mut self, content_type: &str, body: impl Into<Bytes>) -> Self {
        self.headers.remove(CONTENT_TYPE);
        self.bytes(body).header(CONTENT_TYPE.as_str(), content_type)
    }

    /// The same with these bytes as body, and no word of what they are.
    #[must_use]
    pub fn bytes(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// The same with a fresh idempotency key: this very value may be sent again, when an answer did not come,
    /// and is done once.
    #[must_use]
    pub fn once(mut self) -> Self {
        let mut random = [0_u8; 16];
        if ring::rand::SystemRandom::new().fill(&mut random).is_err() {
            self.wrong = self.wrong.or(Some(RequestError::NoRandomness));
            return self;
        }
        let key: String = random.iter().map(|b| format!("{b:02x}")).collect();
        self.idempotency_key(&key)
    }

    /// The same with an idempotency key of the caller's, which outlives the caller when it is stored.
    #[must_use]
    pub fn idempotency_key(mut self, key: &str) -> Self {
        self.headers.remove(IDEMPOTENCY_KEY);
        self.header(IDEMPOTENCY_KEY.as_str(), key)
    }

    /// The same, only if the resource still has this ETag: [`Response::etag`](crate::Response::etag) of what
    /// was read.
    #[must_use]
    pub fn if_match(mut self, etag: &str) -> Self {
        self.headers.remove(IF_MATCH);
        self.header(IF_MATCH.as_str(), etag)
    }

    /// The same, only if the resource has not this ETag any more; else the answer is 304.
    #[must_use]
    pub fn if_none_match(mut self, etag: &str) -> Self {
        self.headers.remove(IF_NONE_MATCH);
        self.header(IF_NONE_MATCH.as_str(), etag)
    }

    /// The same with a deadline of its own: longest time from sending it to the last byte of the answer.
    #[must_use]
    pub fn answered_within(mut self, limit: Duration) -> Self {
        self.within = Some(limit);
        self
    }

    /// The same with a bound of its own: most bytes of the answer's body.
    #[must_use]
    pub fn answered_up_to(mut self, bytes: u64) -> Self {
        self.up_to = Some(bytes);
        self
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.within
    }

    pub(crate) fn bound(&self) -> Option<u64> {
        self.up_to
    }

    /// As it goes to the daemon; `last`: no other follows on the connection.
    pub(crate) fn prepare(
        &self,
        to: &Settings,
        last: bool,
    ) -> Result<hyper::Request<Full<Bytes>>, RequestError> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let target = || RequestError::Target(self.target.clone());
        // A fragment would be cut off without a word.
        if !self.target.starts_with('/') || self.target.contains('#') {
            return Err(target());
        }
        let uri: Uri = self.target.parse().map_err(|_| target())?;
        let mut headers = self.headers.clone();
        let mut add = |name: HeaderName, value: HeaderValue| {
            headers.entry(name).or_insert(value);
        };
        add(HOST, to.host.clone());
        add(USER_AGENT, AGENT);
        add(ACCEPT, HeaderValue::from_static("*/*"));
        if last {
            add(CONNECTION, HeaderValue::from_static("close"));
        }
        // A method that has a body says so when there is none (RFC 9110, section 8.6).
        if self.body.is_empty() && [Method::POST, Method::PUT, Method::PATCH].contains(&self.method) {
            add(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        if let Some(credential) = &to.credential {
            let (name, value) = credential.header();
            add(name.clone(), value.clone());
            if credential.is_session() && ![Method::GET, Method::HEAD].contains(&self.method) {
                add(SESSION_MARK, HeaderValue::from_static("1"));
            }
        }
        let mut request = hyper::Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        Ok(request)
    }
}

impl fmt::Debug for Request {
    /// Without credentials and the body, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("method", &self.method)
            .field("target", &self.target)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::credential::Credential;

    fn settings(credential: Option<Credential>) -> Settings {
        Settings { credential, ..Settings::local("/nowhere".into()) }
    }

    fn prepared(request: &Request) -> hyper::Request<Full<Bytes>> {
        request.prepare(&settings(None), true).unwrap()
    }

    #[test]
    fn what_no_client_can_send_is_told_and_not_sent() {
        let of = |request: Request| request.prepare(&settings(None), true).unwrap_err();
        assert_eq!(of(Request::new("G ET", "/")), RequestError::Method("G ET".into()));
        for target in ["", "v1", "http://x/v1", "/a b", "/a#b", "/a\r\nx: y"] {
            assert_eq!(of(Request::get(target)), RequestError::Target(target.into()));
        }
        assert_eq!(of(Request::get("/").header("a b", "c")), RequestError::Header("a b".into()));
        // The first fault counts, and the value is in no sentence.
        let wrong = Request::get("/").header("x-key", "s3cret\r\ny: z").header("b d", "");
        assert_eq!(of(wrong), RequestError::Header("x-key".into()));
    }

    #[test]
    fn parameters_are_escaped_and_added_to_what_is_there() {
        let request = Request::get("/v1/guests?limit=1").query("label", "rack=r 1").query("a", "b&c");
        assert_eq!(prepared(&request).uri(), "/v1/guests?limit=1&label=rack%3Dr%201&a=b%26c");
        assert_eq!(prepared(&Request::get("/v1/events").query("wait", "1s")).uri(), "/v1/events?wait=1s");
    }

    #[test]
    fn a_request_says_how_long_its_body_is_and_whether_another_follows() {
        let request = Request::post("/v1/guests");
        assert_eq!(prepared(&request).headers()[CONTENT_LENGTH], "0");
        assert_eq!(prepared(&request).headers()[CONNECTION], "close");
        let kept = request.json(&json!({})).prepare(&settings(None), false).unwrap();
        assert!(!kept.headers().contains_key(CONTENT_LENGTH), "hyper counts it");
        assert!(!kept.headers().contains_key(CONNECTION));
        assert!(!prepared(&Request::get("/")).headers().contains_key(CONTENT_LENGTH));
    }

    #[test]
    fn what_the_caller_says_counts_before_what_the_client_would() {
        let request =
            Request::get("/").header("host", "evil.example").header("authorization", "Bearer other");
        let credential = Credential::bearer("own").unwrap();
        let prepared = request.prepare(&settings(Some(credential)), true).unwrap();
        assert_eq!(prepared.headers()[HOST], "evil.example");
        assert_eq!(prepared.headers()[AUTHORIZATION], "Bearer other");
    }

    #[test]
    fn changes_under_a_session_have_the_mark_and_reads_have_not() {
        let of = |method: &str| {
            let to = settings(Some(Credential::session("m-s=v").unwrap()));
            let prepared = Request::new(method, "/").prepare(&to, true).unwrap();
            assert_eq!(prepared.headers()[COOKIE], "m-s=v");
            prepared.headers().get(SESSION_MARK).cloned()
        };
        assert_eq!((of("GET"), of("HEAD")), (None, None));
        assert_eq!(of("DELETE").unwrap(), "1");
    }

    #[test]
    fn a_key_is_fresh_each_time_and_stays_with_the_request() {
        let request = Request::post("/").once();
        let key = |r: &Request| prepared(r).headers()[IDEMPOTENCY_KEY].to_str().unwrap().to_owned();
        assert_eq!(key(&request), key(&request.clone()));
        assert_ne!(key(&request), key(&Request::post("/").once()));
        assert_eq!(key(&request.idempotency_key("mine")), "mine");
    }

    #[test]
    fn neither_credentials_nor_bodies_are_printed() {
        let request = Request::post("/v1/session")
            .header("Authorization", "Bearer s3cret")
            .header("cookie", "a=s3cret");
        let shown = format!("{:?}", request.json(&json!({"code": "s3cret"})));
        assert!(shown.contains("/v1/session") && !shown.contains("s3cret"), "{shown}");
    }
}
