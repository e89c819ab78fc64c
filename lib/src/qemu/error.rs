//! Owns the errors of running one QEMU. Must not know HTTP or the library's error table.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::exit::ExitInfo;
use super::qmp::QmpError;
use super::ramblock::LayoutError;

/// Something about a QEMU process failed.
#[derive(Debug, Error)]
pub enum QemuError {
    /// The specification cannot be run.
    #[error("{field} is not usable: {value}")]
    BadSpec {
        /// The field of [`super::QemuSpec`] at fault.
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
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The process could not be started.
    #[error("could not start {binary}")]
    Spawn {
        /// Path of the QEMU binary.
        binary: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// QEMU did something too late, and still runs.
    #[error("qemu did not {doing} within {} s", waited.as_secs_f32())]
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
        /// What QEMU was asked to do.
        doing: &'static str,
        /// The run state that QEMU is in.
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
        /// What was being done: `save` or `load`.
        doing: &'static str,
        /// The migration status that QEMU reports.
        status: String,
        /// QEMU's text, possibly empty.
        desc: String,
    },
    /// The channel that carries device state failed on our side.
    #[error("could not {doing} device state")]
    StateIo {
        /// What was being done: `save` or `load`.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// An image's header names a file that the definition does not.
    #[error(
        "the disk {disk} is in a file whose header names another, \"{found}\": name it as `backing` in the definition, or make the \
         image stand by itself (qemu-img rebase -b '')"
    )]
    NamesAnother {
        /// The disk.
        disk: String,
        /// What the header says; cut to 200 characters.
        found: String,
    },
    /// QEMU's account of its RAM makes no sense.
    #[error("qemu's ram layout is not usable")]
    Layout(#[source] LayoutError),
}

impl QemuError {
    /// What happened, for whoever asked for the guest: what QEMU said last goes along, names of the host's
    /// files do not.
    #[must_use]
    pub fn told(&self) -> String {
        match self {
            Self::Exited(exit) => exit.told(),
            Self::Spawn { source, .. } => format!("QEMU could not be started: {}", source.kind()),
            Self::Qmp(source) => format!("{self}: {source}"),
            Self::Layout(source) => format!("{self}: {source}"),
            Self::BadSpec { .. }
            | Self::BadRam { .. }
            | Self::Prepare { .. }
            | Self::Late { .. }
            | Self::WrongState { .. }
            | Self::StateTooLarge { .. }
            | Self::StateRefused { .. }
            | Self::StateIo { .. }
            | Self::NamesAnother { .. } => self.to_string(),
        }
    }

    /// Whether QEMU ended because it did not get memory.
    #[must_use]
    pub fn is_want_of_memory(&self) -> bool {
        let Self::Exited(exit) = self else { return false };
        let wants = ["Cannot allocate memory", "cannot set up guest memory", "os_mem_prealloc"];
        wants.iter().any(|text| exit.stderr.contains(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exited(stderr: &str) -> QemuError {
        QemuError::Exited(ExitInfo { code: Some(1), signal: None, stderr: stderr.into() })
    }

    #[test]
    fn what_qemu_said_last_is_told_on_one_line_within_bounds() {
        let told = exited("qemu: warning: x\n\nqemu: initrd is too large, cannot support this.\n").told();
        assert_eq!(
            told,
            "QEMU ended with code 1: qemu: warning: x / qemu: initrd is too large, cannot support this."
        );
        assert_eq!(exited("").told(), "QEMU ended with code 1");
        assert_eq!(exited("a\u{1b}[31mb\u{7}\u{202e}c").told(), "QEMU ended with code 1: a[31mbc");
        let long = exited(&format!("{}\n{}last", "first\n".repeat(300), "\u{e9}".repeat(2000))).told();
        assert!(long.len() <= 530 && long.ends_with("last") && !long.contains("first"), "{long}");
        let many = exited(&"line\n".repeat(300)).told();
        assert!(many.len() <= 530 && many.matches("line").count() > 50, "{many}");
        let killed = QemuError::Exited(ExitInfo { code: None, signal: Some(9), stderr: String::new() });
        assert_eq!(killed.told(), "QEMU was ended by signal 9");
    }

    #[test]
    fn a_qemu_that_got_no_memory_is_known_by_what_it_said() {
        let backing = "qemu: unable to map backing store for guest RAM: Cannot allocate memory";
        assert!(exited(backing).is_want_of_memory());
        assert!(!exited("qemu: initrd is too large").is_want_of_memory());
    }

    #[test]
    fn names_of_the_host_s_files_are_not_told() {
        let source = io::Error::new(io::ErrorKind::NotFound, "/usr/secret/qemu");
        let told = QemuError::Spawn { binary: "/usr/secret/qemu".into(), source }.told();
        assert!(!told.contains("secret") && told.contains("not found"), "{told}");
    }
}
