//! LXD as another daemon of the field that is asked over HTTP on a Unix socket.
//!
//! Owns: an LXD of our own and the containers that are defined in it. Must not know: what it is compared
//! with.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mirrorvm_client::blocking::Connection;
use mirrorvm_client::{Request, Response};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::{Value, json};

use super::BenchError;
use super::api::{expect, median};
use super::daemon::connect;

const LXD: &str = "/usr/bin/lxd";
/// It makes a database of its own first.
const START: Duration = Duration::from_secs(60);
/// A definition of it takes twenty milliseconds.
pub(super) const CONTAINERS: usize = 100;

/// An LXD with [`CONTAINERS`] containers that were never started.
pub(super) struct Lxd {
    daemon: Child,
    /// It goes after the daemon has.
    dir: tempfile::TempDir,
}

impl Drop for Lxd {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.daemon.wait();
    }
}

impl Lxd {
    pub(super) fn start() -> Result<Self, BenchError> {
        if !std::path::Path::new(LXD).exists() {
            return Err("no lxd".into());
        }
        if !geteuid().is_root() {
            return Err("lxd is root's".into());
        }
        let dir = tempfile::tempdir()?;
        // What it mounts goes with it.
        let daemon = Command::new("unshare")
            .args(["--mount", LXD, "--group", "root"])
            .env("LXD_DIR", dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lxd = Self { daemon, dir };
        let mut connection = lxd.ready()?;
        done(
            &connection.exchange(
                &Request::post("/1.0/storage-pools").json(&json!({"name": "p", "driver": "dir"})),
            )?,
        )?;
        for n in 0..CONTAINERS {
            let definition = json!({
                "name": format!("g{n}"),
                "type": "container",
                "source": {"type": "none"},
                "devices": {"root": {"type": "disk", "path": "/", "pool": "p"}},
            });
            let begun = connection.exchange(&Request::post("/1.0/instances").json(&definition))?;
            let operation = done(&begun)?;
            let operation = operation.get("operation").and_then(Value::as_str).unwrap_or_default();
            let ended = done(&connection.exchange(&Request::get(format!("{operation}/wait")))?)?;
            if ended.pointer("/metadata/status_code") != Some(&json!(200)) {
                return Err(format!("lxd did not define a container: {ended}").into());
            }
        }
        Ok(lxd)
    }

    /// p50 of one container and of a list of all with what each is, both in milliseconds.
    pub(super) fn once(&self, reads: usize) -> Result<(f64, f64), BenchError> {
        let mut connection = self.connect()?;
        let one = Request::get(format!("/1.0/instances/g{}", CONTAINERS / 2));
        let all = Request::get("/1.0/instances?recursion=1");
        let one = median(reads, || expect(&connection.exchange(&one)?).map(drop))?;
        let all = median(reads.div_ceil(20), || expect(&connection.exchange(&all)?).map(drop))?;
        Ok((one / 1e3, all / 1e3))
    }

    fn connect(&self) -> Result<Connection, BenchError> {
        connect(&self.dir.path().join("unix.socket"))
    }

    fn ready(&mut self) -> Result<Connection, BenchError> {
        let deadline = Instant::now() + START;
        loop {
            if let Some(ended) = self.daemon.try_wait()? {
                return Err(format!("lxd ended with {ended}").into());
            }
            let asked = self.connect().and_then(|mut connection| {
                done(&connection.exchange(&Request::get("/1.0"))?)?;
                Ok(connection)
            });
            match asked {
                Ok(connection) => return Ok(connection),
                Err(why) if Instant::now() > deadline => {
                    return Err(format!("lxd does not answer after {} s: {why}", START.as_secs()).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// The body of an answer that must be good.
fn done(answer: &Response) -> Result<Value, BenchError> {
    let (status, body) = (answer.status(), answer.body());
    if !status.is_success() {
        return Err(format!("lxd answered {status}: {}", String::from_utf8_lossy(body)).into());
    }
    Ok(serde_json::from_slice(body)?)
}
