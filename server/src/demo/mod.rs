//! `mirrorvmd demo`: two daemons, and between them the migration of a guest, checked; or one by every
//! strategy, compared.
//!
//! Owns: the two child processes with their directories, the course of the demo, what it says. Must not know:
//! how a guest runs or a page moves; it is a client of the REST API like any other, and shares no memory with
//! the daemons.
//!
//! - `args`: options. `method`: a strategy with its parameters. `setting`: which driver, and its
//!   guests.
//! - `daemons`: the child processes. `json`: fields of answers.
//! - `course`: what is shown in which order. `trial`: one strategy from guest to proof. `evidence`:
//!   what is compared.
//! - `console`: what the guest says. `plan`, `progress`, `report`, `comparison`: what the reader
//!   sees.

/// A line on stderr. Unlike `eprintln!` it does not panic when nobody reads it: cleaning up must go on.
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}
use note;

mod args;
mod comparison;
mod console;
mod course;
mod daemons;
mod error;
mod evidence;
mod json;
mod method;
mod plan;
mod progress;
mod report;
mod setting;
mod trial;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use mirrorvm::chain::chain;
use tokio::signal::unix::{SignalKind, signal};

pub use args::DemoArgs;
use args::Driver;
pub(crate) use args::LONG_ABOUT;
use course::Outcome;
use daemons::Stage;
use error::DemoError;

use crate::out::out;

/// How the course ended.
enum End {
    Ran(Result<Outcome, DemoError>),
    Interrupted { status: u8 },
}

/// Runs the demo. The status is success only when something was migrated and everything that was not refused
/// verified; 130 or 143 after SIGINT or SIGTERM.
pub fn main(args: &DemoArgs) -> ExitCode {
    let ran = args
        .check()
        .and_then(|()| check_kvm(args.driver, Path::new("/dev/kvm")))
        .and_then(|()| {
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DemoError::Runtime)
        })
        .and_then(|runtime| runtime.block_on(run(args)));
    match ran {
        Ok(status) => status,
        Err(error) => {
            note!("mirrorvmd demo: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &DemoArgs) -> Result<ExitCode, DemoError> {
    // Caught before the first child exists, so that no signal can leave one behind.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DemoError::Runtime)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(DemoError::Runtime)?;
    let mut stage = Stage::new()?;
    let end = tokio::select! {
        ran = course::run(args, &mut stage) => End::Ran(ran),
        _ = interrupt.recv() => End::Interrupted { status: 130 },
        _ = terminate.recv() => End::Interrupted { status: 143 },
    };
    let broke = match &end {
        End::Ran(Ok(outcome)) => outcome.logs_may_help(),
        End::Ran(Err(error)) => error.logs_may_help(),
        End::Interrupted { .. } => false,
    };
    if broke {
        stage.show_logs();
    }
    if matches!(end, End::Interrupted { .. }) {
        note!("interrupted: stopping the daemons");
    }
    // Whoever signals again does not want to wait for an orderly end.
    tokio::select! {
        () = stage.stop() => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    stage.clear().await?;
    match end {
        End::Interrupted { status } => Ok(ExitCode::from(status)),
        End::Ran(Err(error)) => Err(error),
        End::Ran(Ok(outcome)) => {
            let text = if args.json { outcome.json() } else { outcome.table() };
            out().write_all(text.as_bytes()).map_err(DemoError::Stdout)?;
            if outcome.verified() { Ok(ExitCode::SUCCESS) } else { Err(DemoError::NotVerified) }
        }
    }
}

/// Tells at once, and with more advice than the daemon gives, that a driver which was asked for needs KVM.
/// Which driver is taken when none was asked for is decided by what the daemon says.
fn check_kvm(driver: Option<Driver>, path: &Path) -> Result<(), DemoError> {
    if matches!(driver, None | Some(Driver::Emulated)) {
        return Ok(());
    }
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|source| match source.kind() {
        std::io::ErrorKind::PermissionDenied => {
            let fix = mirrorvm::hypervisor::kvm_denied_fix()
                .unwrap_or_else(|| "join the device's group and log in again".into());
            DemoError::KvmDenied { fix, source }
        }
        _ => DemoError::NoKvm(source),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("kvm");
        for driver in [None, Some(Driver::Emulated)] {
            check_kvm(driver, &absent).unwrap();
        }
        let error = check_kvm(Some(Driver::Embedded), &absent).unwrap_err();
        assert!(matches!(error, DemoError::NoKvm(_)));
        let text = error.to_string();
        assert!(
            text.contains("/dev/kvm") && text.contains("modprobe") && text.contains("emulated"),
            "{text}"
        );
    }
}
