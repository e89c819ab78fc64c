//! A server of these tests: a thread that answers connections by hand, so that it can also answer wrongly.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::future::Future;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use mirrorvm_client::{Client, Endpoint, Limits, blocking};

/// Longer than anything takes that is not stuck.
pub const LONG: Duration = Duration::from_secs(60);
/// A deadline that is to pass.
pub const SHORT: Duration = Duration::from_millis(200);

/// A connection, in the clear or not.
pub trait Talk: Read + Write + Send {}
impl<T: Read + Write + Send> Talk for T {}

/// Where a server is, and the directory of its socket.
pub struct Server {
    pub endpoint: Endpoint,
    dir: tempfile::TempDir,
}

/// Serves on a Unix socket: each connection goes to `serve`, which may fail when the client hangs up.
pub fn on_unix(serve: impl Fn(Box<dyn Talk>) -> std::io::Result<()> + Send + Sync + 'static) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), Arc::clone(&serve));
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.set_write_timeout(Some(LONG)).unwrap();
            std::thread::spawn(move || serve(Box::new(stream)));
        }
    });
    Server { endpoint: Endpoint::Unix(path), dir }
}

/// The same on TCP.
pub fn on_tcp(serve: impl Fn(Box<dyn Talk>) -> std::io::Result<()> + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), Arc::clone(&serve));
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(LONG)).unwrap();
            std::thread::spawn(move || serve(Box::new(stream)));
        }
    });
    Server { endpoint, dir: tempfile::tempdir().unwrap() }
}

/// A server that answers every request with these bytes, and closes.
pub fn saying(answer: impl Into<Vec<u8>>) -> Server {
    let answer = answer.into();
    on_unix(move |mut stream| {
        request(&mut stream)?;
        stream.write_all(&answer)
    })
}

impl Server {
    /// A client of it that waits long.
    pub fn client(&self) -> Client {
        Client::builder(self.endpoint.clone()).limits(patient()).build().unwrap()
    }

    /// The same, blocking.
    pub fn blocking(&self) -> blocking::Client {
        blocking::Client::new(self.client()).unwrap()
    }

    /// A blocking client with these limits.
    pub fn limited(&self, limits: Limits) -> blocking::Client {
        let client = Client::builder(self.endpoint.clone()).limits(limits).build().unwrap();
        blocking::Client::new(client).unwrap()
    }
}

/// Limits that no slow machine meets.
pub fn patient() -> Limits {
    Limits { connect: LONG, answer: LONG, silence: LONG, ..Limits::default() }
}

/// The next request on a connection, body included: by its `content-length`. Empty at the end.
pub fn request(stream: &mut dyn Talk) -> std::io::Result<String> {
    let mut text = head(stream)?;
    let length = text.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    text.push_str(&String::from_utf8(body).unwrap());
    Ok(text)
}

/// The head of the next request.
pub fn head(stream: &mut dyn Talk) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
        head.push(byte[0]);
    }
    Ok(String::from_utf8(head).unwrap())
}

/// An answer with this status line, more lines of head, and a body of known length.
pub fn answer(status: &str, more: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{more}content-length: {}\r\n\r\n{body}", body.len())
}

/// Waits until the client has hung up.
pub fn hang_up(stream: &mut dyn Talk) -> std::io::Result<()> {
    std::io::copy(stream, &mut std::io::sink()).map(drop)
}

/// Runs `work` on a runtime of this thread.
pub fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}
