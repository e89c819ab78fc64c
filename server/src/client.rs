//! A small HTTP client for a daemon's Unix socket: one connection a request, JSON in and out, problems as
//! errors.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, ETAG, HOST, IF_NONE_MATCH};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Longest time for one request; long polls of the demo wait a second at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a request has no answer, or which problem it has.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("the daemon's socket does not answer")]
    Connect(#[source] std::io::Error),
    #[error("the connection to the daemon broke")]
    Http(#[from] hyper::Error),
    #[error("the daemon did not answer within {} seconds", PATIENCE.as_secs())]
    Late,
    #[error("the daemon's answer is no JSON")]
    Json(#[from] serde_json::Error),
    /// What the problem says, with its values at fault.
    #[error("{detail} ({status} {code})")]
    Problem { status: u16, code: String, detail: String },
}

impl ClientError {
    /// Whether the daemon said no and why, as opposed to a fault.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Problem { code, .. } if code != "internal")
    }

    /// Whether the daemon does not do this at all, here or with these values, as opposed to not now.
    pub(crate) fn is_impossible(&self) -> bool {
        let Self::Problem { status, code, .. } = self else { return false };
        matches!(status, 422 | 501) || code == "policy_forbids"
    }
}

/// One daemon's API.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value, ClientError> {
        let answer = self.send(Method::GET, path, None, None).await?;
        Ok(serde_json::from_slice(answer.body())?)
    }

    /// The bytes of a resource that is no JSON.
    pub(crate) async fn get_bytes(&self, path: &str) -> Result<Bytes, ClientError> {
        Ok(self.send(Method::GET, path, None, None).await?.into_body())
    }

    pub(crate) async fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let answer = self.send(Method::POST, path, body, None).await?;
        Ok(serde_json::from_slice(answer.body())?)
    }

    /// Of something that gives no answer but its going.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(Method::DELETE, path, None, None).await.map(drop)
    }

    /// A long poll: the resource when it is not the one with `etag` any more, `None` when it did not change.
    /// Keeps the new ETag in `etag`.
    pub(crate) async fn changed(
        &self,
        path: &str,
        etag: &mut Option<String>,
    ) -> Result<Option<Value>, ClientError> {
        let answer = self.send(Method::GET, &format!("{path}?wait=1s"), None, etag.as_deref()).await?;
        if answer.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        *etag = answer.headers().get(ETAG).and_then(|e| e.to_str().ok()).map(str::to_owned);
        Ok(Some(serde_json::from_slice(answer.body())?))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        etag: Option<&str>,
    ) -> Result<Response<Bytes>, ClientError> {
        let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(etag) = etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        let bytes = body.map_or_else(Bytes::new, |b| Bytes::from(b.to_string()));
        let request = request.body(Full::new(bytes)).expect("paths and ETags of the API are valid in a head");
        let answer = tokio::time::timeout(PATIENCE, self.exchange(request)).await;
        let answer = answer.map_err(|_| ClientError::Late)??;
        let status = answer.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(answer);
        }
        Err(problem(status, answer.body()))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(ClientError::Connect)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the sender, or with the daemon.
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
    }
}

fn problem(status: StatusCode, body: &[u8]) -> ClientError {
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or("unknown").to_owned();
    let mut detail = text(&problem, "detail");
    for error in problem["errors"].as_array().into_iter().flatten() {
        let said = text(error, "detail");
        if !detail.contains(&said) {
            let place = error["pointer"].as_str().unwrap_or_default();
            detail.push_str(&format!("; {place}: {said}"));
        }
    }
    ClientError::Problem { status: status.as_u16(), code: text(&problem, "code"), detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_the_values_at_fault() {
        let body = br#"{"code": "validation_failed", "detail": "2 values of the request cannot be used",
            "errors": [{"pointer": "/name", "detail": "this is missing"}, {"pointer": "/a", "detail": "too long"}]}"#;
        assert_eq!(
            problem(StatusCode::UNPROCESSABLE_ENTITY, body).to_string(),
            "2 values of the request cannot be used; /name: this is missing; /a: too long (422 validation_failed)"
        );
        assert_eq!(problem(StatusCode::BAD_GATEWAY, b"<html>").to_string(), "unknown (502 unknown)");
    }

    #[test]
    fn what_cannot_be_differs_from_what_cannot_be_now() {
        let of = |status: u16, code: &str| ClientError::Problem {
            status,
            code: code.into(),
            detail: String::new(),
        };
        for impossible in [of(422, "plan_refused"), of(501, "capability_missing"), of(409, "policy_forbids")]
        {
            assert!(impossible.is_impossible(), "{impossible:?}");
        }
        for other in [of(409, "in_use"), of(500, "internal"), of(503, "no_resources"), ClientError::Late] {
            assert!(!other.is_impossible(), "{other:?}");
        }
    }
}
