//! `mirrorvmd demo`: two daemons, one guest, one migration between them, checked.
//!
//! Owns: the two child processes with their directories, the course of the demo, what it says. Must not know: how a
//! guest runs or a page moves; it is a client of the REST API like any other, and shares no memory with the daemons.
//!
//! - [`args`]: options. [`daemons`]: the child processes. [`client`]: HTTP over a Unix socket.
//! - [`course`]: the steps in order. [`console`]: what the guest says. [`plan`], [`progress`], [`report`]: what the
//!   reader sees.

/// A line on stderr. Unlike `eprintln!` it does not panic when nobody reads it: cleaning up must go on.
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}
use note;

mod args;
mod client;
mod console;
mod course;
mod daemons;
mod error;
mod plan;
mod progress;
mod report;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

pub use args::DemoArgs;
pub(crate) use args::LONG_ABOUT;
use course::Course;
use daemons::Stage;
use error::{DemoError, chain};
use report::Report;

/// How the course ended.
enum End {
    Ran(Result<Report, DemoError>),
    Interrupted { status: u8 },
}

/// Runs the demo. The status is success only when the migration verified; 130 or 143 after SIGINT or SIGTERM.
pub fn main(args: &DemoArgs) -> ExitCode {
    let ran = args
        .check()
        .and_then(|()| check_kvm(Path::new("/dev/kvm")))
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
    let course = Course::new(args);
    let end = tokio::select! {
        ran = course.run(&mut stage) => End::Ran(ran),
        _ = interrupt.recv() => End::Interrupted { status: 130 },
        _ = terminate.recv() => End::Interrupted { status: 143 },
    };
    if matches!(&end, End::Ran(Err(error)) if error.logs_may_help()) {
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
        End::Ran(Ok(report)) => {
            let text = if args.json { report.json() } else { report.table() };
            std::io::stdout().write_all(text.as_bytes()).map_err(DemoError::Stdout)?;
            if report.verified() { Ok(ExitCode::SUCCESS) } else { Err(DemoError::NotVerified) }
        }
    }
}

/// Both drivers need KVM: the embedded one for the guest, and every one for the mirror.
fn check_kvm(path: &Path) -> Result<(), DemoError> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|source| match source.kind() {
        std::io::ErrorKind::PermissionDenied => DemoError::KvmDenied(source),
        _ => DemoError::NoKvm(source),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_kvm(&dir.path().join("kvm")).unwrap_err();
        assert!(matches!(error, DemoError::NoKvm(_)));
        let text = error.to_string();
        assert!(
            text.contains("/dev/kvm") && text.contains("modprobe") && text.contains("emulated"),
            "{text}"
        );
    }
}
