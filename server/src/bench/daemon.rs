//! A daemon of this program as a child, and connections to it.
//!
//! Owns: both. Must not know: what is measured with them.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mirrorvm_client::blocking::{Client, Connection};

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

    /// A connection that is kept.
    pub fn connect(&self) -> Result<Connection, BenchError> {
        connect(&self.socket())
    }
}

/// A kept connection to a daemon's socket.
pub(super) fn connect(socket: &Path) -> Result<Connection, BenchError> {
    Ok(Client::new(mirrorvm_client::Client::local(socket))?.connect()?)
}
