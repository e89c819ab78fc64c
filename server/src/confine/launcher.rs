//! The process that starts QEMUs for a confined daemon.
//!
//! Owns: how the daemon starts it, and what it gives up itself. Must not know: what a QEMU is told (that is
//! `mirrorvm::qemu`).
//!
//! It is this program once more, under a name that no help shows. It has no descriptor of the daemon's but
//! one end of a socket pair, as its standard input, and ends when the daemon does.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use clap::Args;
use mirrorvm::qemu::{
    QemuUsers, Starter, close_on_exec, launcher_pair, may_change_users, serve as serve_daemon,
};
use rustix::process::{Signal, set_parent_process_death_signal, setsid};
use rustix::thread::set_no_new_privs;

use super::capabilities;

/// Name of the command that is the launcher.
const COMMAND: &str = "qemu-launcher";

/// What the launcher is started with.
#[derive(Debug, Args)]
pub struct LauncherArgs {
    /// Whom QEMU runs as, where that can be chosen.
    #[arg(long)]
    qemu_users: QemuUsers,
}

/// Why there is no launcher.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// The process cannot be started.
    #[error("cannot start the process that starts QEMUs")]
    Start(#[source] io::Error),
    /// The daemon cannot be heard.
    #[error("this command is the daemon's own, which is at the other end of its standard input")]
    Serve(#[source] io::Error),
}

/// Starts the launcher. It ends with this process: when the thread that called this ends, which must be the
/// main one, or when nobody holds what this returns.
///
/// # Errors
/// [`LauncherError::Start`].
pub fn start(users: QemuUsers) -> Result<Starter, LauncherError> {
    let (launcher, theirs) = launcher_pair().map_err(LauncherError::Start)?;
    // What a service manager passed on is not for it.
    close_on_exec();
    Command::new("/proc/self/exe")
        .arg0("mirrorvmd")
        .args([COMMAND, "--qemu-users", &users.to_string()])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        // It is reaped by whoever reaps the daemon, which it does not outlive.
        .map(drop)
        .map_err(LauncherError::Start)?;
    Ok(Starter::Launcher(launcher))
}

/// Is the launcher, until the daemon is gone.
///
/// # Errors
/// [`LauncherError::Serve`].
pub fn serve(args: &LauncherArgs) -> Result<(), LauncherError> {
    let failed = |errno: rustix::io::Errno| LauncherError::Serve(errno.into());
    // A signal to the daemon's terminal is for the daemon, which drains.
    let _ = setsid();
    let _ = rustix::thread::set_name(c"mvm-launcher");
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed)?;
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(LauncherError::Serve)?;
    // QEMU gets the null device or its own descriptors, and nothing of this.
    let users = may_change_users().then_some(args.qemu_users);
    let (force, kept) = capabilities::give_up_for_launcher();
    tracing::debug!(?force, ?kept, "the launcher keeps what starting QEMUs takes");
    set_no_new_privs(true).map_err(failed)?;
    serve_daemon(&socket, users).map_err(LauncherError::Serve)
}
