//! Owns the life of one child process: spawning, the captured end of its stderr, its exit, killing it by
//! pidfd. Must not know what the process is, but for its name in what people are told.
//!
//! Descriptors beyond the standard three pass under the numbers that they have here: between fork and exec
//! the child alone makes them, and nothing else, survive the exec. Clearing their close-on-exec flag in this
//! process would let every other child that is started at that moment have them, too. The price is a fork in
//! the place of a `vfork`; guest memory, the large part of this process, is left out of it (`MADV_DONTFORK`).
//!
//! One thread per child, the *keeper*, spawns it, waits for it and reaps it. That is not only tidy: the
//! parent-death signal fires when the **thread** that forked ends, so the forking thread must live exactly as
//! long as the child.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt};
use std::process::{Child as StdChild, ChildStderr, Command, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sync::{Locked, WaitLocked};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How much of the end of stderr is told to whoever asked for the guest, in bytes.
const LAST_WORDS: usize = 500;
/// How much of the end of stderr is kept, in bytes.
const STDERR_KEPT: usize = 4096;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitInfo {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal number, if one killed it.
    pub signal: Option<i32>,
    /// The end of what it wrote to stderr, at most 4 KiB, control characters other than line ends removed.
    pub stderr: String,
}

/// Characters that change how text around them is shown, and say nothing themselves.
const fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl ExitInfo {
    /// How QEMU ended, in a sentence with the last of what it said.
    #[must_use]
    pub fn told(&self) -> String {
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("QEMU ended with code {code}"),
            (None, Some(signal)) => format!("QEMU was ended by signal {signal}"),
            (None, None) => "QEMU ended".to_owned(),
        };
        match self.last_words() {
            words if words.is_empty() => how,
            words => format!("{how}: {words}"),
        }
    }

    /// The last of what it wrote to stderr, on one line: whole lines, at most `LAST_WORDS` bytes, or the
    /// end of the last line. Empty if it wrote nothing.
    #[must_use]
    pub fn last_words(&self) -> String {
        let plain =
            |line: &str| line.chars().filter(|c| !c.is_control() && !is_invisible(*c)).collect::<String>();
        let mut words = String::new();
        for line in self.stderr.lines().rev().map(plain).filter(|line| !line.trim().is_empty()) {
            let line = line.trim();
            if words.is_empty() {
                let from = line.len().saturating_sub(LAST_WORDS);
                words = line
                    .chars()
                    .scan(0, |at, c| {
                        *at += c.len_utf8();
                        Some((*at, c))
                    })
                    .filter(|(end, _)| *end > from)
                    .map(|(_, c)| c)
                    .collect();
            } else if words.len() + line.len() + 3 <= LAST_WORDS {
                words = format!("{line} / {words}");
            } else {
                break;
            }
        }
        words
    }
}

impl fmt::Display for ExitInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "code {code}")?,
            (None, Some(signal)) => write!(f, "signal {signal}")?,
            (None, None) => write!(f, "unknown status")?,
        }
        match self.stderr.trim() {
            "" => Ok(()),
            text => write!(f, ", stderr: {text}"),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    exit: Mutex<Option<ExitInfo>>,
    exited: Condvar,
}

impl Shared {
    fn exit(&self) -> MutexGuard<'_, Option<ExitInfo>> {
        // The value is replaced whole, so a panic elsewhere leaves nothing half done.
        self.exit.locked()
    }
}

/// Tells whether a process has ended, without the process; keeps nothing of it alive.
#[derive(Clone, Debug)]
pub(super) struct ExitWatch(Arc<Shared>);

impl ExitWatch {
    /// How it ended, if it has.
    pub(super) fn look(&self) -> Option<ExitInfo> {
        self.0.exit().clone()
    }
}

/// A running (or ended) child. Dropping it kills it and waits for a moment until it is reaped.
#[derive(Debug)]
pub(super) struct Child {
    pid: u32,
    pidfd: OwnedFd,
    shared: Arc<Shared>,
}

impl Child {
    /// Spawns; stderr is taken over, stdin and stdout are the caller's business. The child has `passed` under
    /// the numbers that they have here; this process has them no longer.
    pub(super) fn spawn(mut command: Command, passed: Vec<OwnedFd>) -> io::Result<Self> {
        command.stderr(Stdio::piped());
        pass(&mut command, &passed);
        let shared = Arc::new(Shared::default());
        let (tell, told) = sync_channel(1);
        let keepers = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("qemu-keeper".to_owned())
            .spawn(move || keep(command, passed, &keepers, &tell))?;
        let (pid, pidfd) = told.recv().map_err(io::Error::other)??;
        Ok(Self { pid, pidfd, shared })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn has_exited(&self) -> Option<ExitInfo> {
        self.shared.exit().clone()
    }

    pub(super) fn exit_watch(&self) -> ExitWatch {
        ExitWatch(Arc::clone(&self.shared))
    }

    /// Waits until the child is reaped.
    pub(super) fn wait(&self, patience: Duration) -> Option<ExitInfo> {
        let deadline = Instant::now() + patience;
        let mut exit = self.shared.exit();
        while exit.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            exit = self.shared.exited.wait_locked_for(exit, left);
        }
        exit.clone()
    }

    /// Kills it; no effect if it is gone. By pidfd, so never another process with the same number.
    pub(super) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // A process stuck in the kernel is left to its keeper, which reaps it whenever it ends.
        let _ = self.wait(Duration::from_secs(5));
    }
}

/// Lets the child of `command` keep `fds`, and no other descriptor but its standard ones.
#[expect(unsafe_code, reason = "UNSAFETY: code that runs between fork and exec")]
fn pass(command: &mut Command, fds: &[OwnedFd]) {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let in_child = move || {
        // SAFETY: a system call on numbers. Kernels before 5.11 do not know it; what the daemon opens closes
        // itself there.
        let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        for number in &numbers {
            // SAFETY: the child has a copy of the table, in which the number is open: `keep` holds it until
            // after the spawn.
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two kinds of system calls and nothing else: it
    // allocates nothing, takes no lock, and reads only numbers that were written before the fork.
    unsafe { command.pre_exec(in_child) };
}

type Started = io::Result<(u32, OwnedFd)>;

/// The body of the thread that starts the process and waits for its end.
fn keep(mut command: Command, passed: Vec<OwnedFd>, shared: &Shared, tell: &SyncSender<Started>) {
    let started = command.spawn().and_then(|mut child| {
        // The descriptors meant for the child must not stay open on our side.
        drop((command, passed));
        match open_pidfd(&child) {
            Ok(pair) => Ok((child, pair)),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    });
    let (mut child, (ours, theirs)) = match started {
        Ok(started) => started,
        Err(error) => {
            let _ = tell.send(Err(error));
            return;
        }
    };
    let stderr = child.stderr.take();
    let _ = tell.send(Ok((child.id(), theirs)));
    let tail = drain_until_exit(stderr, &ours);
    let status = child.wait().ok();
    *shared.exit() = Some(ExitInfo {
        code: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        stderr: tail,
    });
    shared.exited.notify_all();
}

fn open_pidfd(child: &StdChild) -> io::Result<(OwnedFd, OwnedFd)> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok((pidfd.try_clone()?, pidfd))
}

/// Reads stderr until the process has exited (not until end of file: a copy of the pipe may outlive it).
fn drain_until_exit(mut stderr: Option<ChildStderr>, pidfd: &OwnedFd) -> String {
    let mut tail = VecDeque::with_capacity(STDERR_KEPT);
    if let Some(pipe) = &stderr {
        // If this failed, the last read could wait for ever; then rather do without the text.
        if fcntl_getfl(pipe).and_then(|flags| fcntl_setfl(pipe, flags | OFlags::NONBLOCK)).is_err() {
            stderr = None;
        }
    }
    loop {
        let mut wanted = vec![PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        wanted.extend(stderr.as_ref().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)));
        match poll(&mut wanted, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
        let exited = wanted.first().is_some_and(|pidfd| !pidfd.revents().is_empty());
        if let Some(pipe) = &mut stderr
            && !drain(pipe, &mut tail)
        {
            stderr = None;
        }
        if exited {
            break;
        }
    }
    let bytes: Vec<u8> = tail.into_iter().collect();
    String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}

/// Takes what is there, bounded per call so that a chatty child cannot hold us here; false at the end.
fn drain(pipe: &mut ChildStderr, tail: &mut VecDeque<u8>) -> bool {
    let mut chunk = [0u8; STDERR_KEPT];
    for _ in 0..16 {
        match pipe.read(&mut chunk) {
            Ok(0) => return false,
            Ok(count) => {
                tail.extend(chunk.get(..count).unwrap_or_default());
                tail.drain(..tail.len().saturating_sub(STDERR_KEPT));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}
