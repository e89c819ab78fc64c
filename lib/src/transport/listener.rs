//! Accepting peers.
//!
//! Owns: the listening socket, a thread per connection, how many there may be. Must not know: what handlers do.
//!
//! A stranger can make us spend at most [`ListenerLimits::max_handshakes`] threads, each for at most the handshake timeout.
//! These do not count against [`ListenerLimits::max_connections`], so a flood of strangers cannot throw out or keep
//! out peers that are in; it can delay new ones.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ServerConfig;

use super::identity::Identity;
use super::link::{Deadlines, Link};
use super::link_error::LinkError;
use super::socket::{LinkCanceller, Socket};
use super::tls::{self, PeerFilter};

/// Pause after `accept` failed for want of descriptors or memory: the next attempt would fail at once.
const ACCEPT_BACKOFF: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Log lines on refused connections per [`LOG_WINDOW`]; the rest are counted.
const LOG_LINES: u32 = 10;
const LOG_WINDOW: Duration = Duration::from_secs(10);
/// Longest error text in a log line, in characters.
const LOG_TEXT: usize = 300;

/// Bounds on what connections may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerLimits {
    /// For the handshake of one connection, from accept to admission.
    pub handshake_timeout: Duration,
    /// Connections in their handshake at once; more are closed unread.
    pub max_handshakes: usize,
    /// Admitted connections at once, counted until the handler returns; more are closed unread.
    pub max_connections: usize,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(10), max_handshakes: 32, max_connections: 256 }
    }
}

/// Why a listener was not started.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The address is in use, not ours, or not allowed.
    #[error("cannot listen on {addr}")]
    Bind {
        /// Where to.
        addr: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The identity does not make a TLS server.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    /// A thread or a socket pair could not be had.
    #[error("cannot start the accepting thread")]
    Start(#[source] io::Error),
}

/// What is done with each admitted link, on a thread of its own.
type Handler = Arc<dyn Fn(Link) + Send + Sync>;

/// A running listener. Dropping it is [`shutdown`](Self::shutdown).
pub struct PeerListener {
    addr: SocketAddr,
    wake: UnixStream,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for PeerListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerListener").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl PeerListener {
    /// Listens on `addr` (port 0: any free one) as `identity`. `admits` is asked within each handshake; `handler`
    /// gets each link of an admitted peer, with default [`Deadlines`].
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        admits: PeerFilter,
        limits: ListenerLimits,
        handler: Handler,
    ) -> Result<Self, ListenerError> {
        let config = tls::server_config(tls::provider(), identity, admits).map_err(ListenerError::Tls)?;
        let bind = |source| ListenerError::Bind { addr, source };
        let listener = TcpListener::bind(addr).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let addr = listener.local_addr().map_err(bind)?;
        let (wake, woken) = UnixStream::pair().map_err(ListenerError::Start)?;
        let shared =
            Arc::new(Shared { config, limits, handler, state: Mutex::default(), log: Mutex::default() });
        let accepting = thread::Builder::new()
            .name("mvm-peer-accept".into())
            .spawn({
                let shared = shared.clone();
                move || accept_loop(&listener, &woken, &shared)
            })
            .map_err(ListenerError::Start)?;
        Ok(Self { addr, wake, shared, accepting: Some(accepting) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops accepting, cancels every link that a handler still has, and waits for the handlers to return (except one
    /// that calls this).
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.state().stopping = true;
        // Fails only when the thread is gone already.
        let _ = (&self.wake).write(&[0]);
        join(accepting);
        // Nobody adds to these after the accepting thread has ended.
        let threads = {
            let mut state = self.shared.state();
            state.connections.values().for_each(|connection| connection.canceller.cancel());
            std::mem::take(&mut state.threads)
        };
        threads.into_iter().for_each(join);
    }
}

impl Drop for PeerListener {
    fn drop(&mut self) {
        self.stop();
    }
}

fn join(handle: JoinHandle<()>) {
    if handle.thread().id() != thread::current().id() && handle.join().is_err() {
        tracing::error!("a peer connection's thread panicked");
    }
}

struct Shared {
    config: Arc<ServerConfig>,
    limits: ListenerLimits,
    handler: Handler,
    state: Mutex<State>,
    log: Mutex<LogBudget>,
}

#[derive(Default)]
struct State {
    stopping: bool,
    next: u64,
    connections: HashMap<u64, Connection>,
    threads: Vec<JoinHandle<()>>,
}

struct Connection {
    canceller: LinkCanceller,
    admitted: bool,
}

impl State {
    fn counts(&self) -> (usize, usize) {
        let admitted = self.connections.values().filter(|connection| connection.admitted).count();
        (self.connections.len() - admitted, admitted)
    }
}

/// Why a connection was closed without a word.
#[derive(Debug, thiserror::Error)]
enum Turned {
    #[error("too many connections")]
    Full,
    #[error("shutting down")]
    Stopping,
    #[error("cannot set up the connection")]
    Setup(#[source] io::Error),
    #[error("handshake failed")]
    Handshake(#[source] LinkError),
}

/// The connection's place among those counted; gives it back when dropped, also by a panicking handler.
struct Place {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.state().connections.remove(&self.id);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in there panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a new connection in, if there is room.
    fn place(self: &Arc<Self>, canceller: LinkCanceller) -> Result<Place, Turned> {
        let mut state = self.state();
        if state.stopping {
            return Err(Turned::Stopping);
        }
        let (handshaking, admitted) = state.counts();
        if handshaking >= self.limits.max_handshakes || admitted >= self.limits.max_connections {
            return Err(Turned::Full);
        }
        let id = state.next;
        state.next += 1;
        state.connections.insert(id, Connection { canceller, admitted: false });
        Ok(Place { shared: self.clone(), id })
    }

    /// Moves a connection from those shaking hands to those admitted, if there is room.
    fn promote(&self, place: &Place) -> Result<(), Turned> {
        let mut state = self.state();
        if state.stopping {
            return Err(Turned::Stopping);
        }
        if state.counts().1 >= self.limits.max_connections {
            return Err(Turned::Full);
        }
        if let Some(connection) = state.connections.get_mut(&place.id) {
            connection.admitted = true;
        }
        Ok(())
    }

    /// Starts a connection's thread.
    fn start(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) -> Result<(), Turned> {
        let socket = Socket::new(stream).map_err(Turned::Setup)?;
        let place = self.place(socket.canceller())?;
        let thread = thread::Builder::new()
            .name("mvm-peer".into())
            .spawn(move || {
                if let Err(reason) = serve(&place, socket) {
                    place.shared.log_turned(from, &reason);
                }
            })
            .map_err(Turned::Setup)?;
        let mut state = self.state();
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.push(thread);
        Ok(())
    }

    fn log_turned(&self, from: SocketAddr, reason: &Turned) {
        let admitted = self.log.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if let Some(unlogged) = admitted {
            tracing::warn!(%from, unlogged, reason = chain(reason), "peer connection refused");
        }
    }
}

fn accept_loop(listener: &TcpListener, woken: &UnixStream, shared: &Arc<Shared>) {
    let mut backing_off = false;
    while !shared.state().stopping {
        let polled = if backing_off {
            poll(&mut [PollFd::new(woken, PollFlags::IN)], Some(&ACCEPT_BACKOFF))
        } else {
            poll(&mut [PollFd::new(woken, PollFlags::IN), PollFd::new(listener, PollFlags::IN)], None)
        };
        if let Err(errno) = polled
            && errno != rustix::io::Errno::INTR
        {
            tracing::error!(%errno, "cannot wait for peer connections");
            return;
        }
        backing_off = false;
        match listener.accept() {
            Ok((stream, from)) => {
                if let Err(reason) = shared.start(stream, from) {
                    shared.log_turned(from, &reason);
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset => {}
                _ => {
                    tracing::warn!(%error, "cannot accept a peer connection");
                    backing_off = true;
                }
            },
        }
    }
}

fn serve(place: &Place, socket: Socket) -> Result<(), Turned> {
    let shared = &place.shared;
    let deadlines = Deadlines { handshake: shared.limits.handshake_timeout, ..Deadlines::default() };
    let mut link = Link::accept(socket, shared.config.clone(), deadlines).map_err(Turned::Handshake)?;
    shared.promote(place)?;
    link.admit().map_err(Turned::Handshake)?;
    (shared.handler)(link);
    Ok(())
}

/// An error and its causes in one line that a stranger can neither break nor stretch.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text.chars().flat_map(char::escape_debug).take(LOG_TEXT).collect()
}

/// How many lines may still be logged in this window.
#[derive(Default)]
struct LogBudget {
    window: Option<Instant>,
    lines: u32,
    unlogged: u64,
}

impl LogBudget {
    /// `Some(lines left out since the last one)` if a line may be written now.
    fn take(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|since| now.duration_since(since) >= LOG_WINDOW) {
            (self.window, self.lines) = (Some(now), 0);
        }
        if self.lines >= LOG_LINES {
            self.unlogged += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.unlogged))
    }
}
