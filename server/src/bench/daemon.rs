//! A daemon of this program as a child, and the leanest HTTP/1.1 client that can talk to it.
//!
//! Owns: both. Must not know: what is measured with them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::BenchError;

/// A daemon on a state directory of its own; ends with this value.
pub(super) struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Starts it; its peers may come to a free port of loopback.
    pub fn start(name: &str) -> Result<Self, BenchError> {
        let dir = tempfile::tempdir()?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--name", name, "--exit-with-stdin", "--peer-listen", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .env("RUST_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("no stdout")?;
        let daemon = Self { child, dir };
        BufReader::new(stdout).read_line(&mut line)?;
        if !line.starts_with("ready ") {
            return Err("the daemon does not start".into());
        }
        Ok(daemon)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("state/mirrorvmd.sock")
    }

    pub fn connect(&self) -> Result<Client, BenchError> {
        Client::connect(&self.socket())
    }
}

/// HTTP/1.1 over one kept connection, as small as it can be.
pub(super) struct Client {
    stream: BufReader<UnixStream>,
    line: String,
    body: Vec<u8>,
}

impl Client {
    pub fn connect(socket: &Path) -> Result<Self, BenchError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        // As large as the longest answer of the benchmarks: one read takes what is there.
        let stream = BufReader::with_capacity(2 << 20, stream);
        Ok(Self { stream, line: String::new(), body: Vec::new() })
    }

    /// The bytes of a request.
    pub fn request(method: &str, path: &str, body: &str) -> String {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\n");
        if body.is_empty() {
            return format!("{head}content-length: 0\r\n\r\n");
        }
        format!("{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    /// Sends a request that was made before; gives status and length of the body.
    pub fn exchange(&mut self, request: &str) -> Result<(u16, usize), BenchError> {
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.next_line()?;
        let status = self.line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or("no status")?;
        let mut length = 0;
        loop {
            self.next_line()?;
            let header = self.line.trim_end();
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body)?;
        Ok((status, length))
    }

    fn next_line(&mut self) -> Result<(), BenchError> {
        self.line.clear();
        if self.stream.read_line(&mut self.line)? == 0 {
            return Err("the daemon hung up".into());
        }
        Ok(())
    }

    /// One request; gives status and length of the body.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> Result<(u16, usize), BenchError> {
        self.exchange(&Self::request(method, path, body))
    }

    /// One request that must succeed; gives its answer.
    pub fn json(&mut self, method: &str, path: &str, body: &Value) -> Result<Value, BenchError> {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let (status, _) = self.call(method, path, &text)?;
        if !(200..300).contains(&status) {
            return Err(format!("{method} {path}: {status} {}", String::from_utf8_lossy(&self.body)).into());
        }
        Ok(serde_json::from_slice(&self.body).unwrap_or_default())
    }

    /// The body of the last answer.
    pub fn body(&self) -> &[u8] {
        &self.body
    }
}
