//! Who is connected to a listener, and how much of it each may have.
//!
//! Owns: the counts of handshakes and links, by address and by peer, and the bytes of their messages. Must
//! not know: accepting, TLS, what handlers do.
//!
//! A connection's [`Place`] is counted until it is dropped, and an admitted link has its own: counted as long
//! as the link is there, whichever thread has it by then.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::identity::PeerIdentity;
use super::listener::{ListenerLimits, Turned};
use super::shares::{self, Room, Share, Waiting};
use super::socket::LinkCanceller;
use crate::sync::{Locked, WaitLocked};

/// Addresses that are remembered because a peer came from there.
const REMEMBERED: usize = 256;
/// Messages up to this size have room whatever else is held: asking what became of a migration needs no more.
const SMALL: u64 = 64 << 10;
/// How long whoever makes room waits for those who gave way to be gone.
const GONE: Duration = Duration::from_millis(100);

/// Asked whether a known peer may be at an address.
pub(crate) type KnownAddress = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// The connections of one listener.
pub(super) struct Places {
    limits: ListenerLimits,
    known: KnownAddress,
    state: Mutex<State>,
    /// Somebody who gave way is gone.
    gone: Condvar,
}

#[derive(Default)]
struct State {
    stopping: bool,
    next: u64,
    /// By id: oldest first.
    connections: BTreeMap<u64, Connection>,
    /// Threads of connections that gave way and have not noticed yet.
    leaving: usize,
    /// Where admitted peers came from, newest last.
    remembered: VecDeque<Share>,
}

struct Connection {
    canceller: LinkCanceller,
    phase: Phase,
}

enum Phase {
    Handshake(Waiting),
    Link { peer: PeerIdentity, held: u64 },
}

/// What there is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Connections in their handshake.
    pub handshakes: u64,
    /// Links of admitted peers.
    pub links: u64,
    /// Bytes of messages that these links hold, or wait for.
    pub message_bytes: u64,
}

/// A connection's place among those counted; gives it back when dropped.
pub(super) struct Place {
    places: Arc<Places>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state();
        if state.connections.remove(&self.id).is_none() {
            state.leaving -= 1;
            self.places.gone.notify_all();
        }
    }
}

impl Places {
    pub fn new(limits: ListenerLimits, known: KnownAddress) -> Self {
        Self { limits, known, state: Mutex::default(), gone: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in there panics half way.
        self.state.locked()
    }

    pub fn is_stopping(&self) -> bool {
        self.state().stopping
    }

    /// Nobody gets in any more.
    pub fn stop(&self) {
        self.state().stopping = true;
    }

    /// Ends all connections of the listener.
    pub fn cancel_all(&self) {
        self.state().connections.values().for_each(|connection| connection.canceller.cancel());
    }

    pub fn occupancy(&self) -> Occupancy {
        let mut all = Occupancy::default();
        for connection in self.state().connections.values() {
            match &connection.phase {
                Phase::Handshake(_) => all.handshakes += 1,
                Phase::Link { held, .. } => {
                    all.links += 1;
                    all.message_bytes += held;
                }
            }
        }
        all
    }

    /// Counts a new connection in; somebody may have to give way for it.
    pub fn enter(self: &Arc<Self>, canceller: LinkCanceller, from: SocketAddr) -> Result<Place, Turned> {
        // Not under the lock: the answer may take locks of its own.
        let is_known = (self.known)(from.ip());
        let from = Share::of(from.ip());
        let mut state = self.state();
        if state.stopping {
            return Err(Turned::Stopping);
        }
        let id = state.next;
        state.next += 1;
        let newcomer = Waiting { id, from, known: is_known || state.remembered.contains(&from) };
        let waiting: Vec<Waiting> = state.connections.values().filter_map(Connection::waiting).collect();
        let room = Room {
            strangers: self.limits.max_handshakes,
            known: self.limits.reserved_handshakes,
            per_address: self.limits.handshakes_per_address,
        };
        if let Some(old) =
            shares::gives_way(&waiting, &newcomer, room).and_then(|id| state.connections.remove(&id))
        {
            old.canceller.cancel();
            state.leaving += 1;
            // They hold threads until they have noticed: of those there may not be any number either.
            if state.leaving > self.limits.max_handshakes {
                state = self.gone.wait_locked_for(state, GONE);
            }
        }
        state.connections.insert(id, Connection { canceller, phase: Phase::Handshake(newcomer) });
        Ok(Place { places: Arc::clone(self), id })
    }
}

impl Connection {
    fn waiting(&self) -> Option<Waiting> {
        match self.phase {
            Phase::Handshake(waiting) => Some(waiting),
            Phase::Link { .. } => None,
        }
    }
}

impl Place {
    /// Moves the connection from those shaking hands to the links of `peer`, if there is room.
    pub fn admit(&self, peer: &PeerIdentity) -> Result<(), Turned> {
        let limits = &self.places.limits;
        let mut guard = self.places.state();
        let state = &mut *guard;
        if state.stopping {
            return Err(Turned::Stopping);
        }
        let (mut all, mut theirs) = (0, 0);
        for connection in state.connections.values() {
            if let Phase::Link { peer: other, .. } = &connection.phase {
                all += 1;
                theirs += usize::from(other == peer);
            }
        }
        if theirs >= limits.links_per_peer
            || (all >= limits.max_links && theirs >= limits.reserved_links_per_peer)
        {
            return Err(Turned::TooMany);
        }
        let Some(connection) = state.connections.get_mut(&self.id) else { return Err(Turned::GaveWay) };
        if let Phase::Handshake(waiting) = connection.phase {
            let from = waiting.from;
            state.remembered.retain(|share| *share != from);
            state.remembered.push_back(from);
            if state.remembered.len() > REMEMBERED {
                state.remembered.pop_front();
            }
        }
        connection.phase = Phase::Link { peer: *peer, held: 0 };
        Ok(())
    }

    /// Whether somebody newer was given the place before the handshake was over.
    pub fn gave_way(&self) -> bool {
        !self.places.state().connections.contains_key(&self.id)
    }

    /// Notes that the link holds `bytes` of a message from now on; false, and as before, when that is too
    /// much.
    pub fn hold(&self, bytes: u64) -> bool {
        let limits = &self.places.limits;
        let mut state = self.places.state();
        let Some(Connection { phase: Phase::Link { peer, held }, .. }) = state.connections.get(&self.id)
        else {
            return true;
        };
        let (peer, before) = (*peer, *held);
        if bytes > before.max(SMALL) {
            let (mut all, mut theirs) = (0, 0);
            for connection in state.connections.values() {
                if let Phase::Link { peer: other, held } = &connection.phase {
                    all += held;
                    theirs += if *other == peer { *held } else { 0 };
                }
            }
            let more = bytes - before;
            if all + more > limits.max_message_bytes || theirs + more > limits.message_bytes_per_peer {
                return false;
            }
        }
        if let Some(Connection { phase: Phase::Link { held, .. }, .. }) = state.connections.get_mut(&self.id)
        {
            *held = bytes;
        }
        true
    }
}
