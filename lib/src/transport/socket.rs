//! A TCP socket whose every wait can end early: by deadline or by cancellation.
//!
//! Owns: the file descriptor, its options, waiting on it. Must not know: TLS, frames.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

use crate::memory::Span;

/// Silence after which the kernel asks whether the peer is still there, and between its questions.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(20);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 4;

/// What a link was waiting for when its time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The TLS handshake and the server's admission.
    Handshake,
    /// The first byte of the next frame. The link is still good.
    FrameStart,
    /// The rest of a frame.
    Frame,
    /// The peer to take a frame.
    Send,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Handshake => "the handshake",
            Self::FrameStart => "the next frame",
            Self::Frame => "the rest of a frame",
            Self::Send => "the peer to take a frame",
        })
    }
}

/// Why a read or write did not happen.
#[derive(Debug)]
pub(super) enum SocketError {
    Deadline,
    Cancelled,
    Io(io::Error),
}

#[derive(Debug)]
struct Shared {
    stream: TcpStream,
    cancelled: AtomicBool,
}

impl Shared {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // Fails only if the peer has gone already: nothing blocks then either.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn ended(&self) -> bool {
        let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(over))
    }
}

/// Ends a [`Link`](super::Link)'s blocking calls from another thread. Keeps nothing of the link alive.
#[derive(Clone, Debug)]
pub struct LinkCanceller(Weak<Shared>);

impl LinkCanceller {
    /// Shuts the link down both ways: a blocked call returns [`LinkError::Cancelled`](super::LinkError) at
    /// once, and so does every later one. No effect on a link that is gone.
    pub fn cancel(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.cancel();
        }
    }

    /// Whether the peer has ended its side of the connection, or the link is cancelled or gone; what arrived
    /// before may still be unread. Does not wait.
    pub fn ended(&self) -> bool {
        self.0.upgrade().is_none_or(|shared| shared.ended())
    }
}

/// The socket of one link. Dropping it cuts the connection, canceller or not.
#[derive(Debug)]
pub(super) struct Socket(Arc<Shared>);

impl Drop for Socket {
    fn drop(&mut self) {
        // A canceller may be holding the descriptor open for a moment.
        let _ = self.0.stream.shutdown(Shutdown::Both);
    }
}

impl Socket {
    /// Takes over a connected stream and sets it up for bulk transfer.
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
        Ok(Self(Arc::new(Shared { stream, cancelled: AtomicBool::new(false) })))
    }

    /// Connects to `addr`. `begun` gets the canceller before anything is waited for.
    pub(super) fn connect(
        addr: SocketAddr,
        deadline: Instant,
        begun: impl FnOnce(LinkCanceller),
    ) -> Result<Self, SocketError> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let failed = |errno: Errno| SocketError::Io(errno.into());
        let fd = net::socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
        let socket = Self::new(TcpStream::from(fd)).map_err(SocketError::Io)?;
        begun(socket.canceller());
        match net::connect(&socket.0.stream, &addr) {
            Ok(()) => return Ok(socket),
            Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(errno) => return Err(socket.or_cancelled(failed(errno))),
        }
        let mut connected = false;
        while !connected {
            let left = deadline.saturating_duration_since(Instant::now());
            if socket.0.cancelled.load(Ordering::Acquire) {
                return Err(SocketError::Cancelled);
            }
            if left.is_zero() {
                return Err(SocketError::Deadline);
            }
            socket.wait(PollFlags::OUT, Some(left))?;
            let settled = sockopt::socket_error(&socket.0.stream).map_err(failed)?;
            settled.map_err(|errno| socket.or_cancelled(failed(errno)))?;
            connected = socket.0.stream.peer_addr().is_ok();
        }
        Ok(socket)
    }

    pub(super) fn canceller(&self) -> LinkCanceller {
        LinkCanceller(Arc::downgrade(&self.0))
    }

    /// Whether the peer's side of the connection has ended, or this one was cancelled; what arrived before
    /// may still be unread.
    pub(super) fn ended(&self) -> bool {
        self.0.ended()
    }

    /// Waits until a read would not, or until `until`; says which. After a failure of the wait it is for the
    /// read to tell.
    pub(super) fn readable(&self, until: Instant) -> bool {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.0.stream, PollFlags::IN)], Some(&timeout)) {
                Ok(0) if left.is_zero() => return false,
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return true,
            }
        }
    }

    /// Reads what there is, at least one byte; 0 means that the peer's side of the connection has ended.
    pub(super) fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> Result<usize, SocketError> {
        self.attempt(PollFlags::IN, deadline, || (&self.0.stream).read(buffer))
    }

    /// Writes all of `bytes`.
    pub(super) fn write_all(&self, mut bytes: &[u8], deadline: Option<Instant>) -> Result<(), SocketError> {
        while !bytes.is_empty() {
            let taken = self.attempt(PollFlags::OUT, deadline, || (&self.0.stream).write(bytes))?;
            if taken == 0 {
                return Err(SocketError::Io(io::ErrorKind::WriteZero.into()));
            }
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Writes all of `span`.
    pub(super) fn write_span(&self, span: &dyn Span, deadline: Option<Instant>) -> Result<(), SocketError> {
        let mut at = 0;
        while at < span.len() {
            let taken =
                self.attempt(PollFlags::OUT, deadline, || span.write_to(at, self.0.stream.as_fd()))?;
            if taken == 0 {
                return Err(SocketError::Io(io::ErrorKind::WriteZero.into()));
            }
            at += taken;
        }
        Ok(())
    }

    /// Fills `span`; gives less than its length when the peer's side of the connection ends before.
    pub(super) fn read_span(&self, span: &dyn Span, deadline: Option<Instant>) -> Result<usize, SocketError> {
        let mut at = 0;
        while at < span.len() {
            match self.attempt(PollFlags::IN, deadline, || span.read_from(at, self.0.stream.as_fd()))? {
                0 => break,
                count => at += count,
            }
        }
        Ok(at)
    }

    /// Says that nothing more will be written.
    pub(super) fn finish(&self) {
        let _ = self.0.stream.shutdown(Shutdown::Write);
    }

    fn attempt(
        &self,
        ready: PollFlags,
        deadline: Option<Instant>,
        mut io: impl FnMut() -> io::Result<usize>,
    ) -> Result<usize, SocketError> {
        loop {
            // Also when bytes keep coming: a steady trickle must not outlive the deadline.
            let left = match deadline.map(|at| at.checked_duration_since(Instant::now())) {
                Some(None | Some(Duration::ZERO)) => return Err(self.or_cancelled(SocketError::Deadline)),
                Some(left) => left,
                None => None,
            };
            if self.0.cancelled.load(Ordering::Acquire) {
                return Err(SocketError::Cancelled);
            }
            match io() {
                // The shutdown that cancels looks like the peer's end.
                Ok(0) if self.0.cancelled.load(Ordering::Acquire) => return Err(SocketError::Cancelled),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(ready, left)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.or_cancelled(SocketError::Io(error))),
            }
        }
    }

    /// Returns when the socket may be ready, has failed, a signal came or `left` is over; the caller looks
    /// again.
    fn wait(&self, ready: PollFlags, left: Option<Duration>) -> Result<(), SocketError> {
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(&self.0.stream, ready)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(SocketError::Io(errno.into())),
        }
    }

    fn or_cancelled(&self, error: SocketError) -> SocketError {
        if self.0.cancelled.load(Ordering::Acquire) { SocketError::Cancelled } else { error }
    }
}
