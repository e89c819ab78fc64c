//! Accepting peers.
//!
//! Owns: the listening socket, a thread per connection, what is told of those that came to nothing. Must not
//! know: what handlers do.
//!
//! A stranger can make us spend at most [`ListenerLimits::max_handshakes`] threads, each for at most the
//! handshake timeout, and nobody can keep others out by being silent: whoever has waited longest gives way to
//! the next (`shares`). Links do not count against that, nor the other way round, and each peer has its share
//! of them and of their memory (`places`).

use crate::chain::chain;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ServerConfig;

use super::endpoint::Unconnectable;
use super::here::check_listenable;
use super::identity::Identity;
use super::link::{Deadlines, Link};
use super::link_error::LinkError;
use super::log_budget::LogBudget;
use super::places::{KnownAddress, Occupancy, Place, Places};
use super::socket::Socket;
use super::tls::{self, CertRefusal, PeerFilter};
use crate::sync::Locked;
use crate::threads::{self, Role};

/// Pause after `accept` failed for want of descriptors or memory: the next attempt would fail at once.
const ACCEPT_BACKOFF: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Longest error text in a log line, in characters.
const LOG_TEXT: usize = 300;

/// Bounds on what connections may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerLimits {
    /// For the handshake of one connection, from accept to admission.
    pub handshake_timeout: Duration,
    /// Connections in their handshake at once. A newcomer takes the place of the oldest of the busiest
    /// address.
    pub max_handshakes: usize,
    /// The same of one address (of IPv6: one /64 network).
    pub handshakes_per_address: usize,
    /// Handshakes from addresses of known peers, beside those of strangers.
    pub reserved_handshakes: usize,
    /// Links at once; more are closed unread, but for the peers' reserved ones.
    pub max_links: usize,
    /// Links of one peer at once.
    pub links_per_peer: usize,
    /// Links that each peer may have when all others are taken: enough to ask what became of a migration.
    pub reserved_links_per_peer: usize,
    /// Bytes of messages that all links hold at once.
    pub max_message_bytes: u64,
    /// Bytes of messages that the links of one peer hold at once.
    pub message_bytes_per_peer: u64,
}

impl Default for ListenerLimits {
    /// A peer that sends sixteen guests at once over sixteen streams each has 272 links.
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 64,
            handshakes_per_address: 32,
            reserved_handshakes: 32,
            max_links: 512,
            links_per_peer: 288,
            reserved_links_per_peer: 4,
            max_message_bytes: 512 << 20,
            message_bytes_per_peer: 128 << 20,
        }
    }
}

/// Why a listener was not started.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// Nobody could connect to it.
    #[error("cannot listen on {addr}: it {why}")]
    Address {
        /// Address as it was given.
        addr: SocketAddr,
        /// Why nobody could connect to it.
        why: Unconnectable,
    },
    /// The address is in use, not ours, or not allowed.
    #[error("cannot listen on {addr}")]
    Bind {
        /// Address as it was given.
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
    /// Listens on `addr` (port 0: any free one) as `identity`. `admits` is asked within each handshake;
    /// `handler` gets each link of an admitted peer, with default [`Deadlines`].
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        admits: PeerFilter,
        limits: ListenerLimits,
        handler: Handler,
    ) -> Result<Self, ListenerError> {
        Self::bind_knowing(addr, identity, admits, Arc::new(|_| false), limits, handler)
    }

    /// As [`bind`](Self::bind); handshakes from addresses that are `known` have room that strangers do not
    /// take.
    pub(crate) fn bind_knowing(
        addr: SocketAddr,
        identity: &Identity,
        admits: PeerFilter,
        known: KnownAddress,
        limits: ListenerLimits,
        handler: Handler,
    ) -> Result<Self, ListenerError> {
        check_listenable(&addr).map_err(|why| ListenerError::Address { addr, why })?;
        let config = tls::server_config(tls::provider(), identity, admits).map_err(ListenerError::Tls)?;
        let bind = |source| ListenerError::Bind { addr, source };
        let listener = TcpListener::bind(addr).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let addr = listener.local_addr().map_err(bind)?;
        let (wake, woken) = UnixStream::pair().map_err(ListenerError::Start)?;
        let places = Arc::new(Places::new(limits, known));
        let turned = Turned::KINDS.map(|_| Counted::default());
        let shared = Arc::new(Shared { config, limits, handler, places, threads: Mutex::default(), turned });
        let accepting = thread::Builder::new()
            .name("mvm-peer-accept".into())
            .spawn({
                let shared = shared.clone();
                move || {
                    threads::begin(Role::Link);
                    accept_loop(&listener, &woken, &shared)
                }
            })
            .map_err(ListenerError::Start)?;
        Ok(Self { addr, wake, shared, accepting: Some(accepting) })
    }

    /// The address on which it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Who is connected now, and what that holds.
    pub fn occupancy(&self) -> Occupancy {
        self.shared.places.occupancy()
    }

    /// Connections that came to nothing since the start, by reason.
    pub fn turned_away(&self) -> Vec<(&'static str, u64)> {
        let counts = self.shared.turned.iter().map(|counted| counted.count.load(Relaxed));
        Turned::KINDS.into_iter().zip(counts).collect()
    }

    /// Stops accepting, cancels every link that a handler still has, and waits for the handlers to return
    /// (except one that calls this).
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.places.stop();
        // Fails only when the thread is gone already.
        let _ = (&self.wake).write(&[0]);
        join(accepting);
        // Nobody adds to these after the accepting thread has ended.
        self.shared.places.cancel_all();
        let threads = std::mem::take(&mut *self.shared.threads());
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
    places: Arc<Places>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// In the order of [`Turned::KINDS`].
    turned: [Counted; Turned::KINDS.len()],
}

/// How often something happened, and when it was logged.
#[derive(Default)]
struct Counted {
    count: AtomicU64,
    log: LogBudget,
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Turned {
    #[error("gave way to a newer connection before its handshake was over")]
    GaveWay,
    #[error("too many links")]
    TooMany,
    #[error("shutting down")]
    Stopping,
    #[error("cannot set up the connection")]
    Setup(#[source] io::Error),
    #[error("handshake failed")]
    Handshake(#[source] LinkError),
}

impl Turned {
    /// What [`kind`](Self::kind) indexes; names of the metric.
    const KINDS: [&'static str; 8] =
        ["gave_way", "too_many", "stopping", "setup", "not_admitted", "not_tls", "slow", "handshake"];

    const fn kind(&self) -> usize {
        match self {
            Self::GaveWay => 0,
            Self::TooMany => 1,
            Self::Stopping => 2,
            Self::Setup(_) => 3,
            Self::Handshake(LinkError::PeerRefused(CertRefusal::NotAdmitted(_))) => 4,
            Self::Handshake(LinkError::NotMirrorvm { .. }) => 5,
            Self::Handshake(LinkError::Deadline(_)) => 6,
            Self::Handshake(_) => 7,
        }
    }
}

impl Shared {
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.locked()
    }

    /// Starts a connection's thread.
    fn start(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) -> Result<(), Turned> {
        let socket = Socket::new(stream).map_err(Turned::Setup)?;
        let place = self.places.enter(socket.canceller(), from)?;
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("mvm-peer".into())
            .spawn(move || {
                threads::begin(Role::Link);
                if let Err(reason) = serve(&shared, place, socket) {
                    shared.turned_away(from, &reason);
                }
            })
            .map_err(Turned::Setup)?;
        let mut threads = self.threads();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    fn turned_away(&self, from: SocketAddr, reason: &Turned) {
        let Some(counted) = self.turned.get(reason.kind()) else { return };
        counted.count.fetch_add(1, Relaxed);
        if let Some(unlogged) = counted.log.take() {
            tracing::warn!(%from, unlogged, reason = in_a_line(reason), "peer connection refused");
        }
    }
}

fn accept_loop(listener: &TcpListener, woken: &UnixStream, shared: &Arc<Shared>) {
    let (mut backing_off, failures) = (false, LogBudget::new());
    while !shared.places.is_stopping() {
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
                    shared.turned_away(from, &reason);
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset => {}
                _ => {
                    if let Some(unlogged) = failures.take() {
                        tracing::warn!(%error, unlogged, "cannot accept a peer connection");
                    }
                    backing_off = true;
                }
            },
        }
    }
}

fn serve(shared: &Shared, place: Place, socket: Socket) -> Result<(), Turned> {
    let deadlines = Deadlines { handshake: shared.limits.handshake_timeout, ..Deadlines::default() };
    let mut link = Link::accept(socket, shared.config.clone(), deadlines).map_err(|error| {
        // What a connection that was cut sees is the cut.
        if place.gave_way() { Turned::GaveWay } else { Turned::Handshake(error) }
    })?;
    place.admit(link.peer())?;
    link.counted(place);
    link.admit().map_err(Turned::Handshake)?;
    (shared.handler)(link);
    Ok(())
}

/// An error and its causes in one line that a stranger can neither break nor stretch.
fn in_a_line(error: &dyn std::error::Error) -> String {
    chain(error).chars().flat_map(char::escape_debug).take(LOG_TEXT).collect()
}
