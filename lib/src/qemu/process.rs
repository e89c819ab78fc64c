//! Owns one QEMU from launch to reaping, and the operations on it. Must not know why it is paused, saved or
//! resumed.
//!
//! ```text
//! launch --> prelaunch --cont--> running <--cont/stop--> paused --save_device_state--> postmigrate --cont--> running
//! launch(incoming) --> inmigrate --load_device_state--> paused --cont--> running
//! ```

use std::fmt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::child::Child;
use super::command::{QemuSpec, RAM_ID, Timeouts};
use super::console::ConsoleSink;
use super::device_state;
use super::end::{QemuWatch, SharedQmp};
use super::error::QemuError;
use super::exit::ExitInfo;
use super::mtree::{RamPiece, parse_ram_pieces};
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::ramblock::{LayoutError, QemuRamBlock, parse_ram_blocks};
use super::starter::Starter;

/// How long to wait for the exit of a QEMU that has closed its control socket.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that may be typed at a guest at once.
const TYPED_MAX: usize = 4096;

/// QEMU's run state (`query-status`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The guest's vCPUs run.
    Running,
    /// Stopped by `stop`, or by having been loaded.
    Paused,
    /// The process was launched, and the guest was never continued.
    Prelaunch,
    /// Waiting for, or loading, device state.
    InMigrate,
    /// Stopped, and its state was saved. May be continued: nothing of it was given away.
    PostMigrate,
    /// The guest powered off or asked for a reset.
    Shutdown,
    /// Any other state, by QEMU's name (at most 64 bytes); vCPUs do not run.
    Other(String),
}

impl RunState {
    fn parse(name: &str) -> Self {
        match name {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "prelaunch" => Self::Prelaunch,
            "inmigrate" => Self::InMigrate,
            "postmigrate" => Self::PostMigrate,
            "shutdown" => Self::Shutdown,
            other => Self::Other(other.chars().filter(char::is_ascii_graphic).take(64).collect()),
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::Other(name) => name,
        })
    }
}

/// A QEMU process of ours. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Qemu {
    qmp: SharedQmp,
    child: Child,
    timeouts: Timeouts,
    memory_bytes: u64,
    /// What was saved since the vCPUs last ran. QEMU refuses to save twice in one pause.
    saved: Option<Saved>,
}

/// The state of vCPUs and devices; not for logs.
struct Saved(Vec<u8>);

impl fmt::Debug for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Saved({} bytes)", self.0.len())
    }
}

impl Qemu {
    /// Has QEMU started by `starter`, with its vCPUs stopped. `console` gets every byte of the guest's first
    /// serial port.
    ///
    /// The memfd in the specification is held by QEMU from here on, not by this value: keep a duplicate.
    ///
    /// # Errors
    /// [`QemuError::BadSpec`], [`QemuError::BadRam`], [`QemuError::Prepare`], [`QemuError::Spawn`];
    /// [`QemuError::Exited`] with QEMU's words if it did not like its command line; [`QemuError::Late`].
    pub fn launch(spec: QemuSpec, console: ConsoleSink, starter: &Starter) -> Result<Self, QemuError> {
        spec.check()?;
        let prepare = |doing| move |source| QemuError::Prepare { doing, source };
        let deadline = Instant::now() + spec.timeouts.launch;
        // A socket without a name: there is nothing that another process could connect to.
        let (qmp_ours, qmp_theirs) = UnixStream::pair().map_err(prepare("make the control socket"))?;
        let (binary, timeouts, memory_bytes) = (spec.binary.clone(), spec.timeouts, spec.memory_bytes);
        let child = Child::start(starter, spec, qmp_theirs.into(), console)
            .map_err(|source| QemuError::Spawn { binary, source })?;
        let qmp = Qmp::connect(qmp_ours, deadline).map_err(|error| explain(error, &child))?;
        let qmp = SharedQmp::new(qmp);
        let qemu = Self { qmp, child, timeouts, memory_bytes, saved: None };
        let enabled = device_state::enable(&mut qemu.qmp.lock(), deadline);
        qemu.explained(enabled)?;
        Ok(qemu)
    }

    /// Process id. It may be reused once the process has exited; use [`Qemu::has_exited`] to look.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn has_exited(&self) -> Option<ExitInfo> {
        self.child.has_exited()
    }

    /// Tells others than the owner whether it has ended, and why.
    #[must_use]
    pub fn watch(&self) -> QemuWatch {
        QemuWatch::new(self.child.exit_watch(), self.qmp.clone())
    }

    /// QEMU's RAM blocks, and where the main one shows in guest-physical space now.
    ///
    /// # Errors
    /// [`QemuError::Layout`] if the answer cannot be believed or the main block is not there in full.
    pub fn layout(&mut self) -> Result<(Vec<QemuRamBlock>, Vec<RamPiece>), QemuError> {
        let table = self.run("x-query-ramblock", json!({}))?;
        let table = table.get("human-readable-text").and_then(Value::as_str).unwrap_or_default();
        let blocks = parse_ram_blocks(table).map_err(QemuError::Layout)?;
        let bytes = self.memory_bytes;
        if !blocks.iter().any(|block| block.name == RAM_ID && block.used_length == bytes) {
            return Err(QemuError::Layout(LayoutError::NoBlock { name: RAM_ID, bytes }));
        }
        let view = self.run("human-monitor-command", json!({ "command-line": "info mtree -f" }))?;
        let pieces = parse_ram_pieces(view.as_str().unwrap_or_default(), RAM_ID, bytes);
        Ok((blocks, pieces.map_err(QemuError::Layout)?))
    }

    /// The versioned machine type, e.g. `pc-i440fx-7.2`, that a destination with another QEMU must be given.
    ///
    /// # Errors
    /// [`QemuError::Qmp`], [`QemuError::Exited`].
    pub fn machine_type(&mut self) -> Result<String, QemuError> {
        let reply = self.run("qom-get", json!({ "path": "/machine", "property": "type" }))?;
        let name: String = reply.as_str().unwrap_or_default().chars().take(64).collect();
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }

    /// The run state.
    ///
    /// # Errors
    /// [`QemuError::Qmp`], [`QemuError::Exited`].
    pub fn status(&mut self) -> Result<RunState, QemuError> {
        let reply = self.run("query-status", json!({}))?;
        Ok(RunState::parse(reply.get("status").and_then(Value::as_str).unwrap_or("unknown")))
    }

    /// Lets the vCPUs run and waits until they do. No effect if they run.
    ///
    /// # Errors
    /// [`QemuError::WrongState`] while device state is still to be loaded, or after the guest's end;
    /// [`QemuError::Late`].
    pub fn cont(&mut self) -> Result<(), QemuError> {
        let state = self.status()?;
        if matches!(state, RunState::InMigrate | RunState::Shutdown) {
            return Err(QemuError::WrongState { doing: "continue", state: state.to_string() });
        }
        self.saved = None;
        self.run("cont", json!({}))?;
        self.await_state("continue", |state| *state == RunState::Running)
    }

    /// Pauses the vCPUs and waits until they are paused. No effect if they are.
    ///
    /// # Errors
    /// [`QemuError::Late`], [`QemuError::Qmp`], [`QemuError::Exited`].
    pub fn stop(&mut self) -> Result<(), QemuError> {
        self.run("stop", json!({}))?;
        self.await_state("pause", |state| *state != RunState::Running)
    }

    /// The state of vCPUs and devices, without guest RAM, as QEMU writes it. To be called before the last
    /// copy of RAM: saving may write to RAM. The guest stays stopped; [`Qemu::cont`] resumes it, also after
    /// an error.
    ///
    /// Until then the state stays what it is, and is given again when it is asked for again: QEMU itself
    /// saves only once between two runs of the vCPUs ("paused due to previous migration").
    ///
    /// # Errors
    /// [`QemuError::WrongState`] unless the guest is stopped, or when it was saved in this pause and the
    /// result was not collected; [`QemuError::StateTooLarge`] past `max_bytes`; [`QemuError::StateRefused`],
    /// [`QemuError::StateIo`].
    pub fn save_device_state(&mut self, max_bytes: usize) -> Result<Vec<u8>, QemuError> {
        let state = self.status()?;
        match (&state, &self.saved) {
            (RunState::Paused, _) => {}
            (RunState::PostMigrate, Some(saved)) if saved.0.len() > max_bytes => {
                return Err(QemuError::StateTooLarge { limit: max_bytes });
            }
            (RunState::PostMigrate, Some(saved)) => return Ok(saved.0.clone()),
            _ => {
                return Err(QemuError::WrongState { doing: "save device state", state: state.to_string() });
            }
        }
        let saved = device_state::save(&mut self.qmp.lock(), max_bytes, Instant::now() + self.timeouts.state);
        let saved = self.explained(saved)?;
        self.saved = Some(Saved(saved.clone()));
        Ok(saved)
    }

    /// Loads what [`Qemu::save_device_state`] gave, into a QEMU launched with `incoming` whose RAM is
    /// complete. The guest is paused afterwards. Under KVM this itself writes RAM (kvmclock), so RAM is to be
    /// checked before, and never written after.
    ///
    /// # Errors
    /// [`QemuError::WrongState`] unless it waits for state; otherwise this QEMU is to be thrown away:
    /// [`QemuError::Exited`] with QEMU's words (7.2) or [`QemuError::StateRefused`].
    pub fn load_device_state(&mut self, bytes: &[u8]) -> Result<(), QemuError> {
        let state = self.status()?;
        if state != RunState::InMigrate {
            return Err(QemuError::WrongState { doing: "load device state", state: state.to_string() });
        }
        let loaded = device_state::load(&mut self.qmp.lock(), bytes, Instant::now() + self.timeouts.state);
        self.explained(loaded)?;
        self.await_state("finish loading", |state| *state != RunState::InMigrate)
    }

    /// Waits for an event (`STOP`, `RESUME`, `SHUTDOWN`, `GUEST_PANICKED`, ...); `None` if none came in time.
    ///
    /// # Errors
    /// [`QemuError::Exited`] if QEMU went away, [`QemuError::Qmp`].
    pub fn wait_event(&mut self, names: &[&str], patience: Duration) -> Result<Option<QmpEvent>, QemuError> {
        let waited = self.qmp.lock().wait_event(names, Instant::now() + patience);
        match waited {
            Ok(event) => Ok(Some(event)),
            Err(QmpError::Deadline { .. }) => Ok(None),
            Err(error) => Err(explain(error, &self.child)),
        }
    }

    /// Types at the guest's first serial port: hands on at most 4 KiB of `bytes`, and gives how many were
    /// taken; 0 when the guest has not read what it was told before.
    ///
    /// # Errors
    /// Nobody is at the other end any more.
    pub fn type_in(&self, bytes: &[u8]) -> std::io::Result<usize> {
        self.child.type_in(bytes.get(..TYPED_MAX).unwrap_or(bytes))
    }

    /// Ends QEMU: asks, then kills, and reaps. All console bytes have been handed over when this returns.
    ///
    /// # Errors
    /// [`QemuError::Late`] if even a killed QEMU does not go away (it is stuck in the kernel).
    pub fn quit(self) -> Result<ExitInfo, QemuError> {
        let patience = self.timeouts.quit;
        let asked = self.qmp.lock().execute("quit", json!({}), Instant::now() + patience);
        if matches!(asked, Ok(_) | Err(QmpError::Closed)) {
            let _ = self.child.wait(patience);
        }
        self.child.kill();
        let exit = self.child.wait(patience).ok_or(QemuError::Late { doing: "exit", waited: patience })?;
        self.child.finish_console(patience);
        Ok(exit)
    }

    fn run(&mut self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        let deadline = Instant::now() + self.timeouts.command;
        let done = self.qmp.lock().execute(command, arguments, deadline);
        done.map_err(|error| explain(error, &self.child))
    }

    /// Polls: `STOP` and `RESUME` events say less than the state (they are also sent for other reasons).
    fn await_state(
        &mut self,
        doing: &'static str,
        reached: impl Fn(&RunState) -> bool,
    ) -> Result<(), QemuError> {
        let waited = self.timeouts.command;
        let deadline = Instant::now() + waited;
        while !reached(&self.status()?) {
            if Instant::now() >= deadline {
                return Err(QemuError::Late { doing, waited });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn explained<T>(&self, result: Result<T, QemuError>) -> Result<T, QemuError> {
        result.map_err(|error| match error {
            QemuError::Qmp(error) => explain(error, &self.child),
            other => other,
        })
    }
}

/// A closed control socket means that QEMU exits; how it did is the better error.
fn explain(error: QmpError, child: &Child) -> QemuError {
    if matches!(error, QmpError::Closed)
        && let Some(exit) = child.wait(EXIT_PATIENCE)
    {
        return QemuError::Exited(exit);
    }
    QemuError::Qmp(error)
}
