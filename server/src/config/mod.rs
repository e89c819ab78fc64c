//! What the daemon is told by its file, environment and command line, and where each value came from.
//!
//! Owns: the configuration's values and their defaults. Must not know: what they lead to.

pub mod file;
pub mod sources;

use std::collections::BTreeMap;

use crate::access::Role;

/// The part of the configuration that handlers and middleware need.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Which callers have which role.
    pub access: AccessRules,
    /// Bounds on connections, time and memory.
    pub limits: Limits,
    /// Whether changes of existing resources need `If-Match`.
    pub require_if_match: bool,
}

/// Which callers have which role.
#[derive(Clone, Debug)]
pub struct AccessRules {
    /// Roles by user id.
    pub users: BTreeMap<u32, Role>,
    /// Roles by group id, for users without a rule of their own.
    pub groups: BTreeMap<u32, Role>,
    /// Roles by a name in the client certificate: `dns:...`, `uri:...`, `email:...` or `ip:...`.
    pub certificates: BTreeMap<String, Role>,
    /// The daemon's own user id.
    own: u32,
}

impl Default for AccessRules {
    fn default() -> Self {
        let own = rustix::process::geteuid().as_raw();
        Self { users: BTreeMap::new(), groups: BTreeMap::new(), certificates: BTreeMap::new(), own }
    }
}

impl AccessRules {
    /// The role of a local user: by the user's own rule, else by the group's. Without either, the daemon's
    /// own user and root are `admin`, because they could read the database anyway.
    pub fn role_of_user(&self, uid: u32, gid: u32) -> Option<Role> {
        let ruled = self.users.get(&uid).or_else(|| self.groups.get(&gid)).copied();
        ruled.or((uid == 0 || uid == self.own).then_some(Role::Admin))
    }
}

/// Bounds on connections, time and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections that each listener may have at once. Beyond that, connections that let the daemon wait are
    /// closed first.
    pub connections: u32,
    /// Event streams that may be open at once. At most a quarter of a listener's connections in any case.
    pub streams: u32,
    /// Callers that may wait for a change at once. At most half of a listener's connections in any case.
    pub long_polls: u32,
    /// Requests that one principal may send per second. 0: any number.
    pub requests_per_second: u32,
    /// Seconds that a TLS handshake may take.
    pub handshake_seconds: u32,
    /// Seconds that the head of a request may take.
    pub header_seconds: u32,
    /// Seconds that the body of a request may take.
    pub body_seconds: u32,
    /// Seconds that requests in flight get when the daemon ends.
    pub drain_seconds: u32,
    /// Seconds for which a reader of an event stream may take nothing.
    pub stream_stall_seconds: u32,
    /// How many events are kept.
    pub events_kept: u64,
    /// MiB of memory that guests leave free for the daemon and the rest of the host, and in each control
    /// group. 0: a sixty-fourth of what there is, at least 32 MiB and at most 1 GiB.
    pub memory_reserve_mib: u64,
}

impl Limits {
    /// How many event streams may be open, so that they never fill a listener.
    pub fn open_streams(&self) -> usize {
        self.streams.min((self.connections / 4).max(1)) as usize
    }

    /// How many callers may wait, so that together with the streams they never fill a listener.
    pub fn waiting(&self) -> usize {
        self.long_polls.min((self.connections / 2).max(1)) as usize
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            streams: 64,
            long_polls: 256,
            requests_per_second: 0,
            handshake_seconds: 10,
            header_seconds: 10,
            body_seconds: 30,
            drain_seconds: 10,
            stream_stall_seconds: 30,
            events_kept: mirrorvm::store::ledger::EVENTS_KEPT,
            memory_reserve_mib: 0,
        }
    }
}
