//! Owns the way between a guest's serial port and the daemon, both ways. Must not know what the bytes mean.
//!
//! Each way has a buffer of a fixed size. While what the guest wrote was not taken, no more is: QEMU's socket
//! fills, and its UART drops what it cannot get rid of, as with a daemon that reads it itself and is slow.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::log_file::LogFile;

const BUFFER: usize = 8 << 10;

/// Bytes that were read on one side and are to be written on the other.
struct Pending {
    bytes: [u8; BUFFER],
    from: usize,
    to: usize,
}

impl Pending {
    const EMPTY: Self = Self { bytes: [0; BUFFER], from: 0, to: 0 };

    const fn is_empty(&self) -> bool {
        self.from == self.to
    }

    /// Reads what there is; gives what was read, or `None` when no more will come.
    fn fill(&mut self, side: &mut UnixStream) -> Option<&[u8]> {
        match side.read(&mut self.bytes) {
            Ok(0) => None,
            Ok(count) => {
                (self.from, self.to) = (0, count);
                self.bytes.get(..count)
            }
            Err(error) if is_for_later(&error) => Some(&[]),
            Err(_) => None,
        }
    }

    /// Writes what can be; false when nobody takes anything there any more.
    fn empty(&mut self, side: &mut UnixStream) -> bool {
        match side.write(self.bytes.get(self.from..self.to).unwrap_or_default()) {
            Ok(count) => self.from = (self.from + count).min(self.to),
            Err(error) if is_for_later(&error) => {}
            Err(_) => return false,
        }
        true
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// A guest's console.
pub(super) struct Relay {
    guest: Option<UnixStream>,
    daemon: Option<UnixStream>,
    log: LogFile,
    output: Pending,
    input: Pending,
}

impl Relay {
    /// Between these two, neither of which blocks.
    pub const fn new(guest: UnixStream, daemon: UnixStream, log: LogFile) -> Self {
        Self { guest: Some(guest), daemon: Some(daemon), log, output: Pending::EMPTY, input: Pending::EMPTY }
    }

    /// What to wait for on the guest's side, if anything.
    pub fn guest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        side(self.guest.as_ref(), &self.output, &self.input)
    }

    /// The same on the daemon's.
    pub fn daemon(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        side(self.daemon.as_ref(), &self.input, &self.output)
    }

    /// Something can be done on the guest's side.
    pub fn turn_to_guest(&mut self) {
        let Some(guest) = &mut self.guest else { return };
        let mut open = true;
        if self.output.is_empty() {
            match self.output.fill(guest) {
                Some(bytes) => self.log.append(bytes),
                None => open = false,
            }
        }
        if !self.input.is_empty() {
            open &= self.input.empty(guest);
        }
        if !open {
            self.guest = None;
            self.input = Pending::EMPTY;
        }
        // At once, where it can be: no need to wait for what is nearly always so.
        self.hand_over();
    }

    /// Something can be done on the daemon's side.
    pub fn turn_to_daemon(&mut self) {
        self.hand_over();
        let Some(daemon) = &mut self.daemon else { return };
        if self.input.is_empty() && self.input.fill(daemon).is_none() {
            self.daemon = None;
        }
        if let Some(guest) = &mut self.guest
            && !self.input.is_empty()
        {
            self.input.empty(guest);
        } else if self.guest.is_none() {
            self.input = Pending::EMPTY;
        }
    }

    fn hand_over(&mut self) {
        if let Some(daemon) = &mut self.daemon
            && !self.output.is_empty()
            && !self.output.empty(daemon)
        {
            self.daemon = None;
        }
        if self.daemon.is_none() {
            // It is in the file; nobody else wants it.
            self.output = Pending::EMPTY;
        }
    }

    /// The guest has ended: what it wrote last is handed over, as far as it is taken until then.
    pub fn finish(&mut self, deadline: Instant) {
        loop {
            self.hand_over();
            if self.output.is_empty() {
                let Some(guest) = &mut self.guest else { break };
                match self.output.fill(guest) {
                    Some(&[]) | None => break,
                    Some(bytes) => self.log.append(bytes),
                }
                continue;
            }
            let Some(daemon) = &self.daemon else { continue };
            let left = deadline.saturating_duration_since(Instant::now());
            let mut wanted = [PollFd::new(daemon, PollFlags::OUT)];
            match Timespec::try_from(left).map(|left| poll(&mut wanted, Some(&left))) {
                Ok(Ok(1..) | Err(rustix::io::Errno::INTR)) => {}
                Ok(Ok(0) | Err(_)) | Err(_) => break,
            }
        }
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.shutdown(Shutdown::Both);
        }
        self.guest = None;
    }
}

/// What is read goes to `out`, what is written comes from `back`.
fn side<'a>(
    stream: Option<&'a UnixStream>,
    out: &Pending,
    back: &Pending,
) -> Option<(BorrowedFd<'a>, PollFlags)> {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, out.is_empty());
    flags.set(PollFlags::OUT, !back.is_empty());
    // Without either, a hang-up would be told again and again.
    stream.filter(|_| !flags.is_empty()).map(|stream| (stream.as_fd(), flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay() -> (Relay, UnixStream, UnixStream) {
        let ((guest, its), (daemon, theirs)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for stream in [&guest, &its, &daemon, &theirs] {
            stream.set_nonblocking(true).unwrap();
        }
        (Relay::new(guest, daemon, LogFile::open(None, "console.log")), its, theirs)
    }

    #[test]
    fn both_ways_lose_nothing_and_hold_little() {
        let (mut relay, mut guest, mut daemon) = relay();
        for (from_guest, total) in [(true, 1 << 20), (false, 1 << 20)] {
            let (mut sent, mut got) = (0usize, Vec::new());
            let mut piece = [0; 4096];
            while got.len() < total {
                let bytes: Vec<u8> = (sent..total.min(sent + 4096)).map(|n| (n % 251) as u8).collect();
                let (source, sink) =
                    if from_guest { (&mut guest, &mut daemon) } else { (&mut daemon, &mut guest) };
                sent += source.write(&bytes).unwrap_or(0);
                relay.turn_to_guest();
                relay.turn_to_daemon();
                if let Ok(count) = sink.read(&mut piece) {
                    got.extend_from_slice(&piece[..count]);
                }
            }
            assert!(got.iter().enumerate().all(|(n, byte)| *byte == (n % 251) as u8));
        }
    }

    #[test]
    fn a_daemon_that_does_not_read_holds_the_guest_up_and_one_that_is_gone_does_not() {
        let (mut relay, mut guest, daemon) = relay();
        let mut push = |relay: &mut Relay| {
            let mut taken = 0;
            while let Ok(count) = guest.write(&[b'x'; 4096]) {
                taken += count;
                relay.turn_to_guest();
                if taken > 16 << 20 {
                    break;
                }
            }
            taken
        };
        assert!(push(&mut relay) < 4 << 20);
        assert!(relay.guest().is_none(), "nothing more is read");
        relay.finish(Instant::now());
        drop(daemon);
        let (mut relay, mut guest, daemon) = self::relay();
        drop(daemon);
        for _ in 0..4096 {
            assert_eq!(guest.write(&[b'x'; 4096]).unwrap(), 4096);
            relay.turn_to_guest();
        }
        assert!(relay.daemon().is_none());
    }
}
