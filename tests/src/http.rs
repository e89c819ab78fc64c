//! HTTP/1.1 over a Unix socket or TCP, by hand: one request a connection, so that tests can also send what no
//! client library would.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Longest time for an answer.
const ANSWER: Duration = Duration::from_secs(120);
/// Longest time for the daemon to take what is sent.
const TAKE: Duration = Duration::from_secs(30);

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
    pub fn try_send(&self, socket: &Path) -> std::io::Result<Reply> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(TAKE))?;
        self.exchange(stream, "localhost")
    }

    /// The same over TCP, to an address with its port.
    ///
    /// # Errors
    /// As [`Request::try_send`].
    pub fn try_send_tcp(&self, address: &str) -> std::io::Result<Reply> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(TAKE))?;
        self.exchange(stream, address)
    }

    fn exchange(&self, mut stream: impl Read + Write, host: &str) -> std::io::Result<Reply> {
        stream.write_all(self.head(host).as_bytes())?;
        // A server may answer (413) and close before it has read everything.
        let _ = stream.write_all(&self.body);
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset && !bytes.is_empty() => {}
            Err(e) => return Err(e),
        }
        parse(&bytes).ok_or_else(|| std::io::Error::other("the answer is no HTTP"))
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

fn parse(bytes: &[u8]) -> Option<Reply> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.trim().to_ascii_lowercase(), v.trim().to_owned()))
        .collect();
    let body = &bytes[end + 4..];
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let body = if chunked { unchunk(body)? } else { body.to_vec() };
    Some(Reply { status, headers, body })
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
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
