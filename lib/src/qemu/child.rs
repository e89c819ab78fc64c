//! Owns the life of one QEMU process: having it started, the captured end of its stderr, its exit, killing
//! it. Must not know who starts it, or what it is but for its name in what people are told.
//!
//! One thread per process, the *keeper*, has it started, waits for it and takes its end. That is not only
//! tidy: the parent-death signal of a child of this process fires when the **thread** that forked ends, so
//! the forking thread must live exactly as long as the child.

use std::collections::VecDeque;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::exit::ExitInfo;
use super::start::Order;
use super::starter::{End, Killer, Started, Starter};
use crate::sync::{Locked, WaitLocked};
use crate::threads::{self, Role};

/// How much of the end of stderr is kept, in bytes.
const STDERR_KEPT: usize = 4096;

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

/// A running (or ended) process. Dropping it kills it and waits for a moment until its end is known.
#[derive(Debug)]
pub(super) struct Child {
    pid: u32,
    killer: Killer,
    shared: Arc<Shared>,
}

impl Child {
    /// Has a QEMU started by `starter`; `order` makes what is asked of it, given the end of stderr that is
    /// QEMU's.
    pub(super) fn start(
        starter: Starter,
        order: impl FnOnce(OwnedFd) -> Order + Send + 'static,
    ) -> io::Result<Self> {
        let (words, theirs) = io::pipe()?;
        let shared = Arc::new(Shared::default());
        let (tell, told) = sync_channel(1);
        let keepers = Arc::clone(&shared);
        std::thread::Builder::new().name("qemu-keeper".to_owned()).spawn(move || {
            threads::begin(Role::Keeper);
            keep(|| starter.start(order(theirs.into())), words, &keepers, &tell)
        })?;
        let (pid, killer) = told.recv().map_err(io::Error::other)??;
        Ok(Self { pid, killer, shared })
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

    /// Kills it; no effect if it is gone.
    pub(super) fn kill(&self) {
        self.killer.kill();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // A process stuck in the kernel is left to its keeper, which takes its end whenever that comes.
        let _ = self.wait(Duration::from_secs(5));
    }
}

type Told = io::Result<(u32, Killer)>;

/// The body of the thread that has the process started and waits for its end.
fn keep(
    start: impl FnOnce() -> io::Result<Started>,
    words: PipeReader,
    shared: &Shared,
    tell: &SyncSender<Told>,
) {
    let end = match start() {
        Ok(Started { pid, killer, end }) => {
            let _ = tell.send(Ok((pid, killer)));
            end
        }
        Err(error) => {
            let _ = tell.send(Err(error));
            return;
        }
    };
    let stderr = drain_until_exit(words, &end);
    let (code, signal) = end.take();
    *shared.exit() = Some(ExitInfo { code, signal, stderr });
    shared.exited.notify_all();
}

/// Reads stderr until the process has exited (not until end of file: a copy of the pipe may outlive it).
fn drain_until_exit(words: PipeReader, end: &End) -> String {
    let mut stderr = Some(words);
    let mut tail = VecDeque::with_capacity(STDERR_KEPT);
    if let Some(pipe) = &stderr {
        // If this failed, the last read could wait for ever; then rather do without the text.
        if fcntl_getfl(pipe).and_then(|flags| fcntl_setfl(pipe, flags | OFlags::NONBLOCK)).is_err() {
            stderr = None;
        }
    }
    loop {
        let mut wanted = vec![PollFd::from_borrowed_fd(end.readable(), PollFlags::IN)];
        wanted.extend(stderr.as_ref().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)));
        match poll(&mut wanted, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
        let exited = wanted.first().is_some_and(|end| !end.revents().is_empty());
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
fn drain(pipe: &mut PipeReader, tail: &mut VecDeque<u8>) -> bool {
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
