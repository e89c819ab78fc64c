//! Crowds: many who connect, wait or are refused keep nobody else out; and what is said to those who send no
//! HTTP.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod bodies;
mod connections;
mod no_http;

use mirrorvm_tests::{AnyServer, Daemon, Reply, Request, daemon_binary, until};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// A daemon on TCP, with counters on TCP beside.
fn on_tcp(environment: &[(&str, &str)]) -> Daemon {
    Daemon::start_as("a", environment, |_| {
        ["--listen", "tcp:127.0.0.1:0", "--metrics-listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec()
    })
}

/// A connection to `to` from an address of this machine.
fn from(address: [u8; 4], to: &str) -> TcpStream {
    let flags = SocketFlags::CLOEXEC;
    let descriptor = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    bind(&descriptor, &SocketAddr::from((address, 0))).unwrap();
    connect(&descriptor, &to.parse::<SocketAddr>().unwrap()).unwrap();
    let stream = TcpStream::from(descriptor);
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

/// The first answer on a connection that stays open, its head alone where there is no length.
fn first(stream: &mut impl Read) -> String {
    let mut text = Vec::new();
    let mut byte = [0; 1];
    while !text.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

/// A connection, in the clear or not.
trait Talk: Read + Write {}

impl<T: Read + Write> Talk for T {}

/// A client of the API over TLS, which brings no certificate.
fn tls_client() -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_no_client_auth();
    Arc::new(config)
}

fn over_tls(config: &Arc<ClientConfig>, address: &str) -> StreamOwned<ClientConnection, TcpStream> {
    let connection = ClientConnection::new(Arc::clone(config), "localhost".try_into().unwrap()).unwrap();
    StreamOwned::new(connection, from([127, 0, 0, 1], address))
}

/// The number behind a line of the counters.
fn count(d: &Daemon, line: &str) -> u64 {
    let text = d.get("/metrics").expect(200).text();
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or(0)
}

/// Asks often; the middle one of the times that it took.
fn usual(ask: impl Fn()) -> Duration {
    let mut times: Vec<Duration> = (0..15)
        .map(|_| {
            let begun = Instant::now();
            ask();
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

/// Lets this process have as many descriptors as it may.
fn lift_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}

/// What is answered to these bytes on the Unix socket, whole.
fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    let _ = stream.write_all(bytes);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Status and code of an answer that must be a problem as all are.
fn problem(answer: &str, what: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{what}: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{what}: {e}: {answer}"));
    let header = |name: &str| head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
    assert_eq!(header("content-type"), Some("application/problem+json"), "{what}: {answer}");
    assert_eq!(header("x-request-id"), body["request_id"].as_str(), "{what}: {answer}");
    assert_eq!(body["status"], status, "{what}: {answer}");
    let code = body["code"].as_str().unwrap().to_owned();
    assert_eq!(body["type"], format!("/v1/problems/{code}"), "{what}");
    assert!(!body["title"].as_str().unwrap().is_empty() && !body["detail"].as_str().unwrap().is_empty());
    (status, code)
}
