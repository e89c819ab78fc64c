//! Owns how a QEMU ended: its exit, and what it said before of the reason. Must not know what that means for
//! a guest.

use std::sync::{Arc, Mutex, MutexGuard};

use super::child::ExitWatch;
use super::exit::ExitInfo;
use super::qmp::{Qmp, QmpEvent};
use crate::sync::Locked;

/// The event by which QEMU says that it is about to end.
const SHUTDOWN: &str = "SHUTDOWN";
/// Longest name of a cause that is carried along, in characters.
const CAUSE_MAX: usize = 64;

/// Why QEMU said that it ends (`ShutdownCause` in its `qapi/run-state.json`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShutdownCause {
    /// The guest switched itself off.
    GuestShutdown,
    /// The guest asked for a reset, or a vCPU had a triple fault, which is one; with `-no-reboot` that is the
    /// end.
    GuestReset,
    /// The guest's system said that it panicked.
    GuestPanic,
    /// Any other, by QEMU's name, such as `host-signal`.
    Other(String),
}

impl ShutdownCause {
    fn of(event: &QmpEvent) -> Self {
        match event.data.get("reason").and_then(serde_json::Value::as_str).unwrap_or("none") {
            "guest-shutdown" => Self::GuestShutdown,
            "guest-reset" => Self::GuestReset,
            "guest-panic" => Self::GuestPanic,
            other => Self::Other(other.chars().filter(char::is_ascii_graphic).take(CAUSE_MAX).collect()),
        }
    }
}

/// How a QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuEnd {
    /// How the process did.
    pub exit: ExitInfo,
    /// What it said before; `None`: nothing.
    pub cause: Option<ShutdownCause>,
}

/// A control connection that the process's owner and those who watch for its end share.
#[derive(Clone, Debug)]
pub(super) struct SharedQmp(Arc<Mutex<Qmp>>);

impl SharedQmp {
    pub(super) fn new(qmp: Qmp) -> Self {
        Self(Arc::new(Mutex::new(qmp)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Qmp> {
        // A conversation cut short by a panic is found out by its next message.
        self.0.locked()
    }
}

/// Tells whether a QEMU has ended, and why, without its owner; keeps no process alive.
#[derive(Clone, Debug)]
pub struct QemuWatch {
    exit: ExitWatch,
    qmp: SharedQmp,
}

impl QemuWatch {
    pub(super) const fn new(exit: ExitWatch, qmp: SharedQmp) -> Self {
        Self { exit, qmp }
    }

    /// How it ended, if it has. Meant to be asked now and then: whoever asks also takes in what QEMU says
    /// unasked, so that the last word finds room in the socket.
    #[must_use]
    pub fn look(&self) -> Option<QemuEnd> {
        let Some(exit) = self.exit.look() else {
            // Whoever is talking to it reads, too.
            if let Ok(mut qmp) = self.qmp.0.try_lock() {
                qmp.take_in();
            }
            return None;
        };
        // Nobody holds it for long any more: every conversation with a process that is gone ends at once.
        let mut qmp = self.qmp.lock();
        qmp.take_in();
        Some(QemuEnd { exit, cause: qmp.last_event(SHUTDOWN).map(ShutdownCause::of) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn causes_are_known_by_their_names_and_bounded() {
        let of = |data| ShutdownCause::of(&QmpEvent { name: SHUTDOWN.into(), data });
        assert_eq!(of(json!({"guest": true, "reason": "guest-shutdown"})), ShutdownCause::GuestShutdown);
        assert_eq!(of(json!({"guest": true, "reason": "guest-reset"})), ShutdownCause::GuestReset);
        assert_eq!(of(json!({"guest": true, "reason": "guest-panic"})), ShutdownCause::GuestPanic);
        let other = |name: &str| ShutdownCause::Other(name.into());
        assert_eq!(of(json!({"guest": false, "reason": "host-signal"})), other("host-signal"));
        assert_eq!(of(json!({"guest": false})), other("none"));
        assert_eq!(of(json!(null)), other("none"));
        assert_eq!(of(json!({"reason": "\u{1b}[31m \u{202e}x"})), other("[31mx"));
        assert_eq!(of(json!({"reason": "y".repeat(5000)})), other(&"y".repeat(CAUSE_MAX)));
    }
}
