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
    name: String,
    environment: Vec<(&'static str, &'static str)>,
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
        Self::start_with(name, &[])
    }

    /// The same with these variables in its environment.
    pub fn start_with(name: &str, environment: &[(&'static str, &'static str)]) -> Result<Self, BenchError> {
        let dir = tempfile::tempdir()?;
        let child = spawn(dir.path(), name, environment)?;
        let mut daemon = Self { child, dir, name: name.to_owned(), environment: environment.to_vec() };
        daemon.wait_until_ready()?;
        Ok(daemon)
    }

    /// Kills it and starts it again on the same state; returns when it is ready.
    pub fn again(&mut self) -> Result<(), BenchError> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(self.dir.path(), &self.name, &self.environment)?;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<(), BenchError> {
        let mut line = String::new();
        let stdout = self.child.stdout.take().ok_or("no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        if line.starts_with("ready ") { Ok(()) } else { Err("the daemon does not start".into()) }
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

fn spawn(dir: &Path, name: &str, environment: &[(&str, &str)]) -> Result<Child, BenchError> {
    let child = Command::new(std::env::current_exe()?)
        .args(["serve", "--name", name, "--exit-with-stdin", "--peer-listen", "127.0.0.1:0"])
        .arg("--state-dir")
        .arg(dir.join("state"))
        .env("RUST_LOG", "error")
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(child)
}

/// A kept connection to a daemon's socket.
pub(super) fn connect(socket: &Path) -> Result<Connection, BenchError> {
    Ok(Client::new(mirrorvm_client::Client::local(socket))?.connect()?)
}
