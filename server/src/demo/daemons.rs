//! The two daemons: child processes of this very program, in temporary directories.
//!
//! A child has a pipe from the demo as its stdin and `--exit-with-stdin`: when the demo goes in whatever way,
//! SIGKILL included, the kernel closes the pipe and the daemon ends in order. Each is in a process group of
//! its own, so that Ctrl-C reaches the demo alone, which then stops them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use mirrorvm_client::Client;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::error::DemoError;

/// Longest time from the start to `ready`; the first start makes keys and a database.
const READY: Duration = Duration::from_secs(30);
/// Longest time from SIGTERM to the end; then SIGKILL.
const STOP: Duration = Duration::from_secs(15);
/// Bytes of a log that are shown after a failure.
const TAIL: u64 = 4096;

/// Everything that must be gone when the demo is.
#[derive(Debug)]
pub(super) struct Stage {
    dir: TempDir,
    daemons: Vec<Daemon>,
}

#[derive(Debug)]
struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Stage {
    pub(super) fn new() -> Result<Self, DemoError> {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new()
            .prefix("mirrorvm-demo-")
            .permissions(private)
            .tempdir()
            .map_err(DemoError::Runtime)?;
        Ok(Self { dir, daemons: Vec::new() })
    }

    /// Starts a daemon and waits until it is ready.
    /// Definitions may name files of the directories `images`.
    pub(super) async fn start(
        &mut self,
        name: &'static str,
        images: &[PathBuf],
    ) -> Result<Client, DemoError> {
        let (state, log) = (self.dir.path().join(name), self.dir.path().join(format!("{name}.log")));
        let child = spawn(name, &state, &log, images).map_err(|source| DemoError::Spawn { name, source })?;
        self.daemons.push(Daemon { name, child, log });
        let daemon = self.daemons.last_mut().ok_or(DemoError::NotReady { name })?;
        let stdout = daemon.child.stdout.take().ok_or(DemoError::NotReady { name })?;
        let mut lines = BufReader::new(stdout).lines();
        // The end of the stream (`None`) means that the daemon has ended.
        match tokio::time::timeout(READY, lines.next_line()).await {
            Ok(Ok(Some(line))) if line.starts_with("ready ") => {
                Ok(Client::local(state.join("mirrorvmd.sock")))
            }
            _ => Err(DemoError::NotReady { name }),
        }
    }

    /// Shows the end of each daemon's log.
    pub(super) fn show_logs(&self) {
        for daemon in &self.daemons {
            match tail(&daemon.log) {
                Ok(text) if text.is_empty() => {}
                Ok(text) => super::note!("--- log of {} ---\n{}\n---", daemon.name, text.trim_end()),
                Err(error) => super::note!("--- log of {}: {error} ---", daemon.name),
            }
        }
    }

    /// Asks all daemons to end, and waits until they have, for a while.
    pub(super) async fn stop(&mut self) {
        for daemon in &self.daemons {
            daemon.ask_to_end();
        }
        let all = async {
            for daemon in &mut self.daemons {
                let _ = daemon.child.wait().await;
            }
        };
        if tokio::time::timeout(STOP, all).await.is_err() {
            super::note!("a daemon does not end; killing it");
        }
    }

    /// Kills what is left, and removes the directory.
    pub(super) async fn clear(mut self) -> Result<(), DemoError> {
        for daemon in &mut self.daemons {
            // Has no effect on a child that has been waited for.
            let _ = daemon.child.kill().await;
        }
        self.dir.close().map_err(DemoError::Leftover)
    }
}

impl Daemon {
    fn ask_to_end(&self) {
        // No id: it has ended and been waited for. Otherwise the number is still its own.
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

fn spawn(name: &str, state: &Path, log: &Path, images: &[PathBuf]) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["serve", "--exit-with-stdin", "--peer-listen", "127.0.0.1:0", "--name", name, "--state-dir"])
        .arg(state)
        .args(images.iter().flat_map(|dir| [OsStr::new("--image-directory"), dir.as_os_str()]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(log)?)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let skip = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(skip))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
