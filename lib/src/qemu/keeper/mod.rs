//! Owns the keeper: the parent of one QEMU. Starts it, gives up what that took, carries what the guest's
//! serial port says and is told, keeps both that and QEMU's own words in files, ends QEMU when it is told to,
//! and tells how it ended. Must not know what a guest is, or what QEMU is told over its control socket.
//!
//! A keeper is a process of its own, with one thread, and holds QEMU's memory; where nobody can start such
//! processes (a program with this library and no launcher) it is a thread of that program.
//!
//! It sees bytes that a guest wrote, and understands none of them.

mod log_file;
mod out_of_memory;
mod privileges;
mod record;
mod relay;

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::process::{DumpableBehavior, Signal, pidfd_send_signal, set_dumpable_behavior, setsid};

use super::child::STDERR_KEPT;
use super::command::GuestFiles;
use super::start::{pidfd, start};
use super::wire::{Ended, Order, Process, Wish, Word, again, next_wish, process, tell};
use log_file::LogFile;
use out_of_memory::Kills;
pub use out_of_memory::OomKills;
use record::Record;
use relay::Relay;

/// How long a daemon that does not read is waited for when its guest has ended.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// Is a keeper: takes the wish that comes over standard input, and returns when that QEMU has ended. To be
/// called first thing in a process of its own, while it has one thread.
///
/// # Errors
/// Standard input is no launcher's socket.
pub fn keep() -> io::Result<()> {
    // A signal to the daemon's terminal is for the daemon, and nobody but root looks into this.
    let _ = setsid();
    let _ = rustix::thread::set_name(c"mvm-keeper");
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let wish = next_wish(&io::stdin().as_fd().try_clone_to_owned()?)?;
    // It has no more to say, and its being open here says nothing any more.
    rustix::stdio::dup2_stdin(io::stdout())?;
    let Wish::Of(leash, order) = wish else { return Err(io::ErrorKind::InvalidInput.into()) };
    match order {
        Ok(order) => run(order, &leash, true),
        Err(error) => tell(&leash, &Word::not(&error)),
    }
    Ok(())
}

/// The same, as a thread of this process, whose privileges stay.
pub(super) fn keep_here(order: Order, leash: &OwnedFd) {
    run(order, leash, false);
}

fn run(order: Order, leash: &OwnedFd, own_process: bool) {
    match Kept::start(order, own_process) {
        Ok(mut kept) => {
            tell(leash, &Word::Started { qemu: kept.qemu, keeper: kept.keeper });
            kept.until_its_end(leash);
            let ended = kept.end();
            tell(leash, &Word::Ended(ended));
        }
        Err(error) => tell(leash, &Word::not(&error)),
    }
}

/// What is to be done with a QEMU whose daemon is gone.
enum WithoutDaemon {
    /// It ends, too.
    End,
}

/// The one place where that is decided.
const fn daemon_is_gone() -> WithoutDaemon {
    WithoutDaemon::End
}

/// A QEMU and all that is its.
struct Kept {
    child: Child,
    ended: OwnedFd,
    qemu: Process,
    keeper: Process,
    /// QEMU's standard error, until its end.
    words: Option<PipeReader>,
    tail: Vec<u8>,
    log: LogFile,
    console: Relay,
    kills: Option<Kills>,
    killed_here: bool,
    record: Record,
    /// The guest's memory, which lives as long as anybody has it.
    _ram: OwnedFd,
}

/// What there is to be done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    End,
    Leash,
    Words,
    Guest,
    Daemon,
}

impl Kept {
    /// Starts QEMU. Nothing of it stays when this fails.
    fn start(order: Order, own_process: bool) -> io::Result<Self> {
        let Order { mut spec, qmp, console } = order;
        let ram = spec.ram.try_clone()?;
        let files = spec.files.take();
        let (run_as, memory_bytes) = (spec.run_as, spec.memory_bytes);
        let (guest, its_console) = UnixStream::pair()?;
        let (words, its_words) = io::pipe()?;
        guest.set_nonblocking(true)?;
        let daemon = UnixStream::from(console);
        daemon.set_nonblocking(true)?;
        // A keeper must never wait for a pipe.
        fcntl_setfl(&words, fcntl_getfl(&words)? | OFlags::NONBLOCK)?;
        let mut child = start(spec, qmp, its_console.into(), its_words.into())?;
        let started = (|| {
            let ended = pidfd(&child)?;
            let (qemu, _) = process(child.id())?;
            let (keeper, _) = process(std::process::id())?;
            let kills = Kills::of(child.id());
            if own_process {
                privileges::give_up(run_as.map(|r| r.uid))?;
            }
            let (guest_id, directory) = files.map(|GuestFiles { guest, directory }| (guest, directory)).unzip();
            let opened = |name| LogFile::open(directory.as_ref(), name);
            let (console_log, log) = (opened("console.log"), opened("qemu.log"));
            let record = Record::write(directory, guest_id, keeper, qemu, memory_bytes);
            let console = Relay::new(guest, daemon, console_log);
            Ok((ended, qemu, keeper, kills, log, console, record))
        })();
        match started {
            Ok((ended, qemu, keeper, kills, log, console, record)) => Ok(Self {
                child,
                ended,
                qemu,
                keeper,
                words: Some(words),
                tail: Vec::with_capacity(2 * STDERR_KEPT),
                log,
                console,
                kills,
                killed_here: false,
                record,
                _ram: ram,
            }),
            Err(error) => {
                let _ = (child.kill(), child.wait());
                Err(error)
            }
        }
    }

    fn until_its_end(&mut self, leash: &OwnedFd) {
        let mut leash = Some(leash);
        loop {
            let ready = match self.wait(leash) {
                Ok(ready) => ready,
                // Nothing can be heard any more; then it must not go on, either.
                Err(_) => return self.kill(),
            };
            for source in &ready {
                match source {
                    Source::End => {}
                    Source::Leash => {
                        if leash.is_some_and(|leash| self.told(leash)) {
                            leash = None;
                        }
                    }
                    Source::Words => self.hear_words(16),
                    Source::Guest => self.console.turn_to_guest(),
                    Source::Daemon => self.console.turn_to_daemon(),
                }
            }
            if ready.contains(&Source::End) {
                return;
            }
        }
    }

    /// Waits until something is to be done.
    fn wait(&self, leash: Option<&OwnedFd>) -> rustix::io::Result<Vec<Source>> {
        let mut all: Vec<(Source, BorrowedFd<'_>, PollFlags)> =
            vec![(Source::End, self.ended.as_fd(), PollFlags::IN)];
        all.extend(leash.map(|leash| (Source::Leash, leash.as_fd(), PollFlags::IN)));
        all.extend(self.words.as_ref().map(|words| (Source::Words, words.as_fd(), PollFlags::IN)));
        all.extend(self.console.guest().map(|(fd, flags)| (Source::Guest, fd, flags)));
        all.extend(self.console.daemon().map(|(fd, flags)| (Source::Daemon, fd, flags)));
        let mut wanted: Vec<PollFd<'_>> =
            all.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match poll(&mut wanted, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let ready = all.iter().zip(&wanted).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, ..), _)| *source).collect())
    }

    /// Takes a message of the daemon's; true when there is no daemon any more.
    fn told(&mut self, leash: &OwnedFd) -> bool {
        let gone = match again(|| recv(leash, &mut [0u8; 8], RecvFlags::DONTWAIT)) {
            Err(Errno::WOULDBLOCK) => return false,
            Ok((_, bytes)) => bytes == 0,
            Err(_) => true,
        };
        if !gone {
            self.kill();
            return false;
        }
        match daemon_is_gone() {
            WithoutDaemon::End => self.kill(),
        }
        true
    }

    fn kill(&mut self) {
        self.killed_here = true;
        let _ = pidfd_send_signal(&self.ended, Signal::KILL);
    }

    /// Takes what QEMU said, at most this many pieces, so that a chatty one cannot hold us here.
    fn hear_words(&mut self, pieces: usize) {
        let mut piece = [0; STDERR_KEPT];
        for _ in 0..pieces {
            let Some(words) = &mut self.words else { return };
            match words.read(&mut piece) {
                Ok(0) => self.words = None,
                Ok(count) => {
                    let piece = piece.get(..count).unwrap_or_default();
                    self.log.append(piece);
                    self.tail.extend_from_slice(piece);
                    self.tail.drain(..self.tail.len().saturating_sub(STDERR_KEPT));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.words = None,
            }
        }
    }

    /// Takes its end, when it has come or was ordered.
    fn end(mut self) -> Ended {
        let status = self.child.wait().ok();
        let (code, signal) = (status.and_then(|s| s.code()), status.and_then(|s| s.signal()));
        // What the kernel does for want of memory looks like any other killing, but for what it counts.
        let oom_killed = match signal {
            Some(libc::SIGKILL) if !self.killed_here => self.kills.as_ref().and_then(Kills::grew),
            _ => Some(false),
        };
        // A copy of the pipe may outlive it: what is there, not until its end.
        self.hear_words(64);
        self.console.finish(Instant::now() + LAST_BYTES);
        self.record.remove();
        Ended { code, signal, oom_killed, words: String::from_utf8_lossy(&self.tail).into_owned() }
    }
}
