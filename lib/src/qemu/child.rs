//! Owns the daemon's side of one QEMU: having it started by its keeper, what the keeper tells of it, killing
//! it. Must not know who starts keepers, or what QEMU is but for its name in what people are told.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use super::console::ConsoleSink;
use super::exit::ExitInfo;
use super::launcher::gone;
use super::reactor::{self, Watched};
use super::starter::Starter;
use super::wire::{Order, Process, Word, hear, pair, process};
use super::command::QemuSpec;

/// How much of the end of stderr is kept, in bytes.
pub(super) const STDERR_KEPT: usize = 4096;
/// The file in a guest's directory that tells of its keeper and its QEMU while both live.
pub(super) const RECORD: &str = "keeper.json";

/// Tells whether a process has ended, without the process; keeps nothing of it alive.
#[derive(Clone, Debug)]
pub(super) struct ExitWatch(Arc<Watched>);

impl ExitWatch {
    /// How it ended, if it has.
    pub(super) fn look(&self) -> Option<ExitInfo> {
        self.0.exit()
    }
}

/// A running (or ended) process. Dropping it kills it and waits for a moment until its end is known.
#[derive(Debug)]
pub(super) struct Child {
    pid: u32,
    watched: Arc<Watched>,
    /// The guest's directory.
    directory: Option<OwnedFd>,
}

impl Child {
    /// Has a QEMU started by `starter`, with its end of the control socket.
    pub(super) fn start(
        starter: &Starter,
        spec: QemuSpec,
        qmp: OwnedFd,
        sink: ConsoleSink,
    ) -> io::Result<Self> {
        let deadline = Instant::now() + spec.timeouts.launch;
        let directory = spec.files.as_ref().map(|f| f.directory.try_clone()).transpose()?;
        let (leash, its_leash) = pair()?;
        // A socket without a name: there is nothing that another process could connect to.
        let (console, its_console) = UnixStream::pair()?;
        console.set_nonblocking(true)?;
        starter.start(Order { spec, qmp, console: its_console.into() }, its_leash)?;
        let (qemu, keeper) = match first_word(&leash, deadline)? {
            Word::Started { qemu, keeper } => (qemu, keeper),
            Word::Not { errno: Some(errno), .. } => return Err(io::Error::from_raw_os_error(errno)),
            Word::Not { errno: None, why } => return Err(io::Error::other(why)),
            Word::Ended(_) => return Err(gone()),
        };
        check(qemu, keeper)?;
        let watched = Arc::new(Watched::new(leash, console, sink));
        reactor::watch(&watched)?;
        Ok(Self { pid: qemu.pid, watched, directory })
    }

    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn has_exited(&self) -> Option<ExitInfo> {
        self.watched.exit()
    }

    pub(super) fn exit_watch(&self) -> ExitWatch {
        ExitWatch(Arc::clone(&self.watched))
    }

    /// Waits until the child is reaped.
    pub(super) fn wait(&self, patience: Duration) -> Option<ExitInfo> {
        self.watched.wait(patience, |state| state.exit.clone())
    }

    /// Waits until the last byte of the console has been handed over, or nobody knows of more.
    pub(super) fn finish_console(&self, patience: Duration) {
        let _ = self.watched.wait(patience, |state| state.console_ended.then_some(()));
    }

    /// Types at the guest's serial port; gives how many of the bytes were taken.
    pub(super) fn type_in(&self, bytes: &[u8]) -> io::Result<usize> {
        self.watched.type_in(bytes)
    }

    /// Kills it; no effect if it is gone.
    pub(super) fn kill(&self) {
        self.watched.kill();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // A process stuck in the kernel is left to its keeper, which takes its end whenever that comes.
        let exit = self.wait(Duration::from_secs(5));
        let silent = exit.is_some_and(|e| e.code.is_none() && e.signal.is_none());
        if let (true, Some(directory)) = (silent, &self.directory) {
            // A keeper that was killed could not take it away itself.
            let _ = unlinkat(directory, RECORD, AtFlags::empty());
        }
    }
}

/// What a keeper says first.
fn first_word(leash: &OwnedFd, deadline: Instant) -> io::Result<Word> {
    loop {
        match hear(leash) {
            Ok(word) => return word.ok_or_else(keeper_ended),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A launcher that ended had the other end among what it had not looked at.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(gone()),
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(leash, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn keeper_ended() -> io::Error {
    io::Error::other("the process that was to start it ended before it said anything")
}

/// Whether a keeper told the truth, as far as this process may look: QEMU is its child, and both are who they
/// are said to be. One that ended meanwhile says so itself.
fn check(qemu: Process, keeper: Process) -> io::Result<()> {
    let is = |told: Process| process(told.pid).ok().is_none_or(|(found, _)| found == told);
    let child = process(qemu.pid).ok().is_none_or(|(_, parent)| parent == keeper.pid);
    if child && is(qemu) && is(keeper) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "a keeper tells of a process that is not its own"))
}

/// Ends what is said over a stream, both ways.
pub(super) fn close(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both);
}
