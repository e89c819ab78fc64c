//! Owns the errors of running one QEMU. Must not know HTTP or the library's error table.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::child::ExitInfo;
use super::qmp::QmpError;
use super::ramblock::LayoutError;

/// Something about a QEMU process failed.
#[derive(Debug, Error)]
pub enum QemuError {
    /// The specification cannot be run.
    #[error("{field} is not usable: {value}")]
    BadSpec {
        /// Field of [`super::QemuSpec`].
        field: &'static str,
        /// Its value, as text.
        value: String,
    },
    /// The guest's RAM is not a memfd of the right size that can be sealed against resizing.
    #[error("guest ram descriptor is not a sealable memfd of {wanted} bytes (it has {found})")]
    BadRam {
        /// Bytes the specification asks for.
        wanted: u64,
        /// Bytes the descriptor has.
        found: u64,
    },
    /// A file, socket or thread that QEMU needs could not be made.
    #[error("could not {doing}")]
    Prepare {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process could not be started.
    #[error("could not start {binary}")]
    Spawn {
        /// The QEMU binary.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// QEMU did something too late, and still runs.
    #[error("qemu did not {doing} within {waited:?}")]
    Late {
        /// What it should have done.
        doing: &'static str,
        /// How long it was given.
        waited: Duration,
    },
    /// QEMU is no longer running.
    #[error("qemu has exited: {0}")]
    Exited(ExitInfo),
    /// A command failed, or the conversation did.
    #[error("qemu control failed")]
    Qmp(#[source] QmpError),
    /// The guest is in the wrong run state for this.
    #[error("cannot {doing} while the guest is {state}")]
    WrongState {
        /// What was asked.
        doing: &'static str,
        /// QEMU's run state.
        state: String,
    },
    /// Device state is larger than allowed; nothing was kept.
    #[error("device state is larger than {limit} bytes")]
    StateTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// QEMU gave up saving or loading device state.
    #[error("qemu could not {doing} device state: {status} ({desc})")]
    StateRefused {
        /// `save` or `load`.
        doing: &'static str,
        /// QEMU's migration status.
        status: String,
        /// QEMU's text, possibly empty.
        desc: String,
    },
    /// The channel that carries device state failed on our side.
    #[error("could not {doing} device state")]
    StateIo {
        /// `save` or `load`.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// QEMU's account of its RAM makes no sense.
    #[error("qemu's ram layout is not usable")]
    Layout(#[source] LayoutError),
}
