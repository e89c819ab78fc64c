//! Requests of tests. They go through the client that every tool goes through; what no client would send, or
//! would not wait for, tests write themselves, from a request's bytes.

use std::path::Path;
use std::time::Duration;

use mirrorvm_client::{Client, ClientError, Endpoint, Limits, Response, blocking};
use serde_json::Value;

/// Longer than any answer takes, on whatever machine; answers have up to 1 GiB.
const LIMITS: Limits = Limits {
    connect: Duration::from_secs(60),
    answer: Duration::from_secs(300),
    silence: Duration::from_secs(60),
    body: 1 << 30,
};

/// A request; made by [`Request::new`], sent by [`Request::send`].
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Request {
    /// A request without a body.
    pub fn new(method: &str, target: &str) -> Self {
        Self { method: method.into(), target: target.into(), headers: Vec::new(), body: Vec::new() }
    }

    /// The same with a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with a JSON body.
    #[must_use]
    pub fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json").body(body.to_string().into_bytes())
    }

    /// The same with these bytes as body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Sends it to the socket; an error is one of the connection.
    ///
    /// # Errors
    /// The daemon is not there, or the answer broke off.
    ///
    /// # Panics
    /// When no client can send it.
    pub fn try_send(&self, socket: &Path) -> Result<Reply, ClientError> {
        self.exchange(Endpoint::Unix(socket.to_owned()))
    }

    /// The same over TCP, to an address with its port.
    ///
    /// # Errors
    /// As [`Request::try_send`].
    ///
    /// # Panics
    /// As [`Request::try_send`].
    pub fn try_send_tcp(&self, address: &str) -> Result<Reply, ClientError> {
        self.exchange(Endpoint::Tcp(address.parse().unwrap()))
    }

    fn exchange(&self, endpoint: Endpoint) -> Result<Reply, ClientError> {
        let client = Client::builder(endpoint).limits(LIMITS).build().unwrap();
        let request = mirrorvm_client::Request::new(&self.method, &self.target).bytes(self.body.clone());
        let request = self.headers.iter().fold(request, |request, (name, value)| request.header(name, value));
        let answer = blocking::Client::new(client).unwrap().exchange(&request);
        assert!(!matches!(answer, Err(ClientError::Request(_))), "{answer:?}");
        answer.map(Reply::from)
    }

    /// What goes before the body.
    fn head(&self, host: &str) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\nconnection: close\r\n", self.method, self.target);
        if !self.headers.iter().any(|(name, _)| name == "host") {
            head.push_str(&format!("host: {host}\r\n"));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !self.body.is_empty() || ["POST", "PUT", "PATCH"].contains(&self.method.as_str()) {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        head
    }

    /// All of it as it goes over TCP to `host`.
    pub fn bytes(&self, host: &str) -> Vec<u8> {
        [self.head(host).as_bytes(), &self.body].concat()
    }

    /// Sends it over TCP.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn send_tcp(&self, address: &str) -> Reply {
        self.try_send_tcp(address).unwrap_or_else(|e| panic!("{} {}: {e}", self.method, self.target))
    }

    /// Sends it.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn send(&self, socket: &Path) -> Reply {
        self.try_send(socket).unwrap_or_else(|e| panic!("{} {}: {e}", self.method, self.target))
    }
}

impl From<Response> for Reply {
    fn from(answer: Response) -> Self {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let headers = answer.headers().iter().map(|(n, v)| (n.as_str().to_owned(), text(v.as_bytes())));
        Self { status: answer.status().as_u16(), headers: headers.collect(), body: answer.body().to_vec() }
    }
}

impl Reply {
    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Itself, when the status is this one.
    ///
    /// # Panics
    /// With the body when it is not.
    #[must_use]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// The problem's `code`; checks that it is a well-formed problem with this status.
    ///
    /// # Panics
    /// When it is not.
    pub fn problem(&self) -> String {
        let body = self.json();
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{body}");
        assert_eq!(body["status"], self.status, "{body}");
        let code = body["code"].as_str().unwrap().to_owned();
        assert_eq!(body["type"], format!("/v1/problems/{code}"), "{body}");
        assert_eq!(body["request_id"].as_str(), self.header("x-request-id"), "{body}");
        code
    }
}
