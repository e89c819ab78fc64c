//! Owns the one thread that listens to all keepers of this process: to what they tell, and to what their
//! guests print. Must not know what that means.
//!
//! The thread starts with the first QEMU and ends with the last.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::child::STDERR_KEPT;
use super::console::ConsoleSink;
use super::exit::ExitInfo;
use super::wire::{Ended, Word, again, hear};
use crate::sync::{Locked, WaitLocked};
use crate::threads::{self, Role};

/// Events that are taken at once.
const EVENTS: usize = 64;
/// Pieces of a console's output that are taken before others have their turn.
const PIECES: usize = 16;

/// What is known of a QEMU.
#[derive(Debug, Default)]
pub(super) struct State {
    pub exit: Option<ExitInfo>,
    /// Whether the last byte of its console has been handed over.
    pub console_ended: bool,
}

/// A QEMU's keeper, as the daemon has it.
pub(super) struct Watched {
    leash: OwnedFd,
    console: UnixStream,
    sink: Mutex<ConsoleSink>,
    state: Mutex<State>,
    changed: Condvar,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Watched {
    /// With the daemon's ends of leash and console; neither blocks.
    pub fn new(leash: OwnedFd, console: UnixStream, sink: ConsoleSink) -> Self {
        Self {
            leash,
            console,
            sink: Mutex::new(sink),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Values are replaced whole, so a panic elsewhere leaves nothing half done.
        self.state.locked()
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<ExitInfo> {
        self.state().exit.clone()
    }

    /// Waits until something is known.
    pub fn wait<T>(&self, patience: Duration, known: impl Fn(&State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        loop {
            if let Some(known) = known(&state) {
                return Some(known);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.changed.wait_locked_for(state, left);
        }
    }

    /// Has it killed.
    pub fn kill(&self) {
        let _ = again(|| send(&self.leash, b"k", SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
    }

    /// Types at the guest; gives how much was taken.
    pub fn type_in(&self, bytes: &[u8]) -> io::Result<usize> {
        match (&self.console).write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    /// Takes what the guest printed; true when no more will come.
    fn read(&self, pieces: usize) -> bool {
        let mut piece = [0; 4096];
        for _ in 0..pieces {
            match (&self.console).read(&mut piece) {
                Ok(0) => return true,
                Ok(count) => (*self.sink.locked())(piece.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
        false
    }

    /// Takes what the keeper says: how QEMU ended, if that is it.
    fn hear(&self) -> Option<ExitInfo> {
        let ended = match hear(&self.leash) {
            Ok(Some(Word::Ended(ended))) => ended,
            Ok(Some(Word::Started { .. } | Word::Not { .. })) => return None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // It is gone, or says what no keeper does: nothing is known of how QEMU ended.
            Ok(None) | Err(_) => Ended { code: None, signal: None, oom_killed: None, words: String::new() },
        };
        let Ended { code, signal, oom_killed, words } = ended;
        let stderr: String = words.chars().filter(|c| *c == '\n' || !c.is_control()).collect();
        let from = stderr.ceil_char_boundary(stderr.len().saturating_sub(STDERR_KEPT));
        let stderr = stderr.get(from..).unwrap_or_default().to_owned();
        Some(ExitInfo { code, signal, oom_killed, stderr })
    }

    fn learn(&self, what: impl FnOnce(&mut State)) {
        what(&mut self.state());
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        let state = self.state();
        state.exit.is_some() && state.console_ended
    }
}

/// All that are watched.
#[derive(Debug, Default)]
struct Watching {
    /// While there is a thread.
    epoll: Option<Arc<OwnedFd>>,
    all: BTreeMap<u64, Arc<Watched>>,
    next: u64,
}

static WATCHING: Mutex<Watching> = Mutex::new(Watching { epoll: None, all: BTreeMap::new(), next: 0 });

/// The events of one: by its number, and which of the two it is.
const fn leash_of(number: u64) -> epoll::EventData {
    epoll::EventData::new_u64(number << 1 | 1)
}

const fn console_of(number: u64) -> epoll::EventData {
    epoll::EventData::new_u64(number << 1)
}

/// Watches a keeper from now on, until its QEMU has ended and its console has.
///
/// # Errors
/// The system's; then it is not watched, and ends when it is dropped.
pub(super) fn watch(new: &Arc<Watched>) -> io::Result<()> {
    let mut watching = WATCHING.locked();
    let epoll = match &watching.epoll {
        Some(epoll) => Arc::clone(epoll),
        None => {
            let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
            let its = Arc::clone(&epoll);
            std::thread::Builder::new().name("qemu-keepers".to_owned()).spawn(move || {
                threads::begin(Role::Keeper);
                listen(&its);
            })?;
            watching.epoll = Some(Arc::clone(&epoll));
            epoll
        }
    };
    let number = watching.next;
    watching.next += 1;
    watching.all.insert(number, Arc::clone(new));
    let added = epoll::add(&epoll, &new.leash, leash_of(number), epoll::EventFlags::IN)
        .and_then(|()| epoll::add(&epoll, &new.console, console_of(number), epoll::EventFlags::IN));
    if let Err(error) = added {
        let _ = epoll::delete(&epoll, &new.leash);
        watching.all.remove(&number);
        return Err(error.into());
    }
    Ok(())
}

/// The body of the thread.
fn listen(epoll: &OwnedFd) {
    let mut events = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "no QEMU of this process is watched any more");
                return;
            }
        }
        for event in &events {
            let data = event.data.u64();
            let found = WATCHING.locked().all.get(&(data >> 1)).cloned();
            if let Some(watched) = found {
                turn_to(epoll, &watched, data & 1 == 1);
                if watched.is_over() {
                    WATCHING.locked().all.remove(&(data >> 1));
                }
            }
        }
        let mut watching = WATCHING.locked();
        if watching.all.is_empty() {
            watching.epoll = None;
            return;
        }
    }
}

fn turn_to(epoll: &OwnedFd, watched: &Watched, leash: bool) {
    let mut ended = false;
    if leash && let Some(exit) = watched.hear() {
        let _ = epoll::delete(epoll, &watched.leash);
        // Its keeper closed it before: what is there is all.
        ended = watched.read(usize::MAX);
        watched.learn(|state| state.exit = Some(exit));
    } else if !leash {
        ended = watched.read(PIECES);
    }
    if ended && !watched.state().console_ended {
        let _ = epoll::delete(epoll, &watched.console);
        super::child::close(&watched.console);
        watched.learn(|state| state.console_ended = true);
    }
}
