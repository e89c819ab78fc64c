//! Owns one QEMU from launch to reaping, and the operations on it. Must not know why it is paused, saved or
//! resumed.
//!
//! ```text
//! launch --> prelaunch --cont--> running <--cont/stop--> paused --save_device_state--> postmigrate --cont--> running
//! launch(incoming) --> inmigrate --load_device_state--> paused --cont--> running
//! ```

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::child::Child;
use super::command::{Arriving, QemuSpec, RAM_ID, Timeouts};
use super::console::{Console, ConsoleSink};
use super::device_state;
use super::end::{QemuWatch, SharedQmp};
use super::error::QemuError;
use super::exit::ExitInfo;
use super::machine::{Disk, Machine, Network, Nic};
use super::mtree::{RamPiece, parse_ram_pieces};
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::ramblock::{LayoutError, QemuRamBlock, parse_ram_blocks};
use super::start::Order;
use super::starter::Starter;

/// How long to wait for the exit of a QEMU that has closed its control socket.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);

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
    console: Console,
    child: Child,
    timeouts: Timeouts,
    memory_bytes: u64,
    /// What was saved since the vCPUs last ran. QEMU refuses to save twice in one pause.
    saved: Option<Saved>,
    /// Forwards of an arrived guest that are still to be asked for: interface, and the port as QEMU takes it.
    forwards: Vec<(String, String)>,
    /// The daemon's end of the guest agent's channel.
    _agent: Option<UnixStream>,
}

/// Forwards of all interfaces.
fn forwards(machine: &Machine) -> Vec<(String, String)> {
    let of = |nic: &Nic| {
        let Network::User { forwards } = &nic.network;
        let id = format!("nic-{}", nic.name);
        forwards.iter().map(move |f| (id.clone(), f.told())).collect::<Vec<_>>()
    };
    machine.nics.iter().flat_map(of).collect()
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
    pub fn launch(mut spec: QemuSpec, console: ConsoleSink, starter: &Starter) -> Result<Self, QemuError> {
        spec.check()?;
        let prepare = |doing| move |source| QemuError::Prepare { doing, source };
        let deadline = Instant::now() + spec.timeouts.launch;
        // Sockets without names: there is nothing that another process could connect to.
        let (qmp_ours, qmp_theirs) = UnixStream::pair().map_err(prepare("make the control socket"))?;
        let (ours, theirs) = UnixStream::pair().map_err(prepare("make the console socket"))?;
        let console = Console::start(ours, console).map_err(prepare("start the console thread"))?;
        let qmp_theirs = OwnedFd::from(qmp_theirs);
        let agent = if spec.machine.guest_agent {
            let (ours, theirs) = UnixStream::pair().map_err(prepare("make the agent's socket"))?;
            spec.passed.agent = Some(theirs.into());
            Some(ours)
        } else {
            None
        };
        let (binary, timeouts, memory_bytes) = (spec.binary.clone(), spec.timeouts, spec.memory_bytes);
        let (machine, late) = (spec.machine.clone(), spec.arriving == Some(Arriving::ToRun));
        let forwards = if spec.arriving.is_some() { forwards(&machine) } else { Vec::new() };
        let order = move |words| Order { spec, qmp: qmp_theirs, console: theirs.into(), words };
        let child =
            Child::start(starter.clone(), order).map_err(|source| QemuError::Spawn { binary, source })?;
        let qmp = Qmp::connect(qmp_ours, deadline).map_err(|error| explain(error, &child))?;
        let qmp = SharedQmp::new(qmp);
        let mut qemu =
            Self { qmp, console, child, timeouts, memory_bytes, saved: None, forwards, _agent: agent };
        let enabled = device_state::enable(&mut qemu.qmp.lock(), late, deadline);
        qemu.explained(enabled)?;
        qemu.check_images(&machine)?;
        for nic in machine.nics.iter().filter(|nic| !nic.link) {
            qemu.run("set_link", json!({ "name": format!("nic-{}", nic.name), "up": false }))?;
        }
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
        self.take_disks()?;
        self.saved = None;
        self.await_state("continue", |state| *state == RunState::Running)?;
        self.forward();
        Ok(())
    }

    /// Continues the guest. Where its state was loaded or saved, QEMU takes its disks now, and is refused
    /// while another QEMU holds the lock on one: for a moment one that ends does.
    fn take_disks(&mut self) -> Result<(), QemuError> {
        let by = Instant::now() + self.timeouts.lock;
        let mut pause = Duration::from_millis(20);
        loop {
            match self.run("cont", json!({})) {
                Err(QemuError::Qmp(QmpError::Refused { desc, .. }))
                    // QEMU says of a save that it is over a moment before it is.
                    if (desc.contains("lock") || desc.contains("not finalized"))
                        && Instant::now() + pause < by =>
                {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                other => return other.map(drop),
            }
        }
    }

    /// Asks for the forwards of an arrived guest; those that somebody else has stay to be asked for.
    pub fn forward(&mut self) {
        let wanted = std::mem::take(&mut self.forwards);
        let (mut left, mut words) = (Vec::new(), None);
        for (nic, port) in wanted {
            let line = format!("hostfwd_add {nic} {port}");
            let said = self.run("human-monitor-command", json!({ "command-line": line }));
            let refused = said.map(|said| said.as_str().unwrap_or_default().trim().to_owned());
            if refused.as_ref().is_ok_and(String::is_empty) {
                continue;
            }
            words = refused.ok();
            left.push((nic, port));
        }
        if let Some(words) = words {
            tracing::debug!(words, "a forward of an arrived guest is not to be had yet");
        }
        self.forwards = left;
    }

    /// Forwards of an arrived guest that it does not have yet.
    #[must_use]
    pub fn forwards_missing(&self) -> usize {
        self.forwards.len()
    }

    /// Refuses images whose header names a file that the definition does not: QEMU was told to leave it, and
    /// what the guest's owner believes to be there is not. (Nobody but QEMU reads what a guest can write.)
    fn check_images(&mut self, machine: &Machine) -> Result<(), QemuError> {
        if machine.disks.iter().all(|d| d.path.is_none()) {
            return Ok(());
        }
        let nodes = self.run("query-named-block-nodes", json!({ "flat": true }))?;
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        for node in nodes.as_array().into_iter().flatten() {
            let Some(name) = node.get("node-name").and_then(Value::as_str) else { continue };
            let of = |d: &&Disk| d.name == name || name == format!("{}.b", d.name);
            let Some(disk) = machine.disks.iter().find(of) else { continue };
            let image = node.get("image");
            let beneath = text(image.and_then(|i| i.get("backing-filename")));
            let data = text(image.and_then(|i| i.pointer("/format-specific/data/data-file")));
            let named = disk.backing.is_some() && disk.name == name;
            let found = data.or(beneath.filter(|_| !named));
            if let Some(found) = found {
                let found = found.chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(QemuError::NamesAnother { disk: disk.name.clone(), found });
            }
        }
        Ok(())
    }

    /// What QEMU said unasked since the last call, of disks that it could not read or write.
    pub fn take_io_errors(&mut self) -> Vec<QmpEvent> {
        let mut qmp = self.qmp.lock();
        qmp.take_in();
        qmp.take_events("BLOCK_IO_ERROR")
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
        self.console.finish(patience);
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
