//! Owns moving vCPU and device state out of and into QEMU as one blob. Must not know what is in the blob, nor
//! how RAM moves.
//!
//! The blob is QEMU's migration stream with `x-ignore-shared`: it holds the small RAM blocks that are not in
//! our memfd (BIOS, option ROMs, ACPI tables) and every device, but not guest RAM. QEMU gets one end of a
//! socket pair (`getfd`), so there is no path that anybody else could connect to.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::QemuError;
use super::qmp::{Qmp, QmpError, remaining};

/// No device state is larger, in bytes, whatever the caller allows. About 210 KiB is normal.
pub const MAX_DEVICE_STATE_BYTES: usize = 64 << 20;

/// Name of the descriptor in QEMU's table while it is being handed over.
const FD_NAME: &str = "mirrorvm-state";
/// How long QEMU is given to settle after we called a save off.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);

/// Prepares a QEMU for either direction. To be called once, before anything else. `late`: it takes its disks
/// when the guest first runs, not with its state.
pub(super) fn enable(qmp: &mut Qmp, late: bool, deadline: Instant) -> Result<(), QemuError> {
    let capabilities = json!([
        { "capability": "events", "state": true },
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "late-block-activate", "state": late },
    ]);
    run(qmp, "migrate-set-capabilities", json!({ "capabilities": capabilities }), deadline).map(drop)
}

/// Saves the state of a guest that does not run. The guest stays stopped and can be continued, whatever
/// happens.
pub(super) fn save(qmp: &mut Qmp, max_bytes: usize, deadline: Instant) -> Result<Vec<u8>, QemuError> {
    let limit = max_bytes.min(MAX_DEVICE_STATE_BYTES);
    let ours = hand_over_channel(qmp, "save", deadline)?;
    start(qmp, "migrate", deadline)?;
    let collected = collect(&ours, limit, deadline);
    // Whatever QEMU still wants to write, it shall fail at once.
    drop(ours);
    match collected {
        Ok(state) => settle(qmp, "save", deadline).map(|()| state),
        Err(error) => {
            // Best effort: the first error is the one to report.
            let patience = Instant::now() + CANCEL_PATIENCE;
            let _ = run(qmp, "migrate_cancel", json!({}), patience);
            let _ = settle(qmp, "save", patience);
            Err(error)
        }
    }
}

/// Loads state into a QEMU started with `-incoming defer`. On failure that QEMU is of no further use (7.2
/// exits).
pub(super) fn load(qmp: &mut Qmp, state: &[u8], deadline: Instant) -> Result<(), QemuError> {
    if state.len() > MAX_DEVICE_STATE_BYTES {
        return Err(QemuError::StateTooLarge { limit: MAX_DEVICE_STATE_BYTES });
    }
    let ours = hand_over_channel(qmp, "load", deadline)?;
    start(qmp, "migrate-incoming", deadline)?;
    let fed = feed(&ours, state, deadline);
    drop(ours);
    match (fed, settle(qmp, "load", deadline)) {
        (_, Ok(())) => Ok(()),
        // QEMU stopped reading because it failed; its own reason says more than our broken pipe.
        (Err(error), Err(_)) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(QemuError::StateIo { doing: "load", source: error })
        }
        (_, Err(error)) => Err(error),
    }
}

/// Gives QEMU one end of a new socket pair and returns the other.
fn hand_over_channel(qmp: &mut Qmp, doing: &'static str, deadline: Instant) -> Result<UnixStream, QemuError> {
    let (ours, theirs) = UnixStream::pair().map_err(|source| QemuError::StateIo { doing, source })?;
    qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd(), deadline)
        .map_err(QemuError::Qmp)?;
    Ok(ours)
}

fn start(qmp: &mut Qmp, command: &str, deadline: Instant) -> Result<(), QemuError> {
    qmp.forget_events("MIGRATION");
    let started = run(qmp, command, json!({ "uri": format!("fd:{FD_NAME}") }), deadline);
    if started.is_err() {
        // It may or may not have taken the descriptor out of its table.
        let _ = run(qmp, "closefd", json!({ "fdname": FD_NAME }), deadline);
    }
    started.map(drop)
}

fn collect(mut from: &UnixStream, limit: usize, deadline: Instant) -> Result<Vec<u8>, QemuError> {
    let failed = |source| QemuError::StateIo { doing: "save", source };
    let mut state = Vec::new();
    let mut chunk = vec![0u8; 64 << 10];
    loop {
        if Instant::now() >= deadline {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        from.set_read_timeout(Some(remaining(deadline))).map_err(failed)?;
        match from.read(&mut chunk) {
            Ok(0) => return Ok(state),
            Ok(count) if state.len() + count > limit => return Err(QemuError::StateTooLarge { limit }),
            Ok(count) => state.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

fn feed(mut to: &UnixStream, mut state: &[u8], deadline: Instant) -> io::Result<()> {
    while !state.is_empty() {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        to.set_write_timeout(Some(remaining(deadline)))?;
        match to.write(state) {
            Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
            Ok(count) => state = state.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until QEMU's migration is over, well or badly. Events wake us; the query decides, as events may be
/// lost.
fn settle(qmp: &mut Qmp, doing: &'static str, deadline: Instant) -> Result<(), QemuError> {
    loop {
        let reply = run(qmp, "query-migrate", json!({}), deadline)?;
        let status = reply.get("status").and_then(Value::as_str).unwrap_or("unknown");
        match status {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let desc = reply.get("error-desc").and_then(Value::as_str).unwrap_or("");
                let desc = desc.chars().filter(|c| !c.is_control()).take(512).collect();
                return Err(QemuError::StateRefused { doing, status: status.to_owned(), desc });
            }
            _ => {}
        }
        let soon = deadline.min(Instant::now() + Duration::from_millis(50));
        match qmp.wait_event(&["MIGRATION"], soon) {
            Err(QmpError::Deadline { .. }) if Instant::now() < deadline => {}
            Ok(_) => {}
            Err(error) => return Err(QemuError::Qmp(error)),
        }
    }
}

fn run(qmp: &mut Qmp, command: &str, arguments: Value, deadline: Instant) -> Result<Value, QemuError> {
    qmp.execute(command, arguments, deadline).map_err(QemuError::Qmp)
}
