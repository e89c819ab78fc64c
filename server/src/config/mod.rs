//! What the daemon is told by its file, environment and command line, and where each value came from.
//!
//! Owns: the configuration's values and their defaults. Must not know: what they lead to.

pub mod file;
pub mod sources;

use std::collections::BTreeMap;

use crate::access::Role;

/// What handlers and middleware go by.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Who has which role.
    pub access: AccessRules,
    /// How much of what.
    pub limits: Limits,
    /// Whether changes of what exists need `If-Match`.
    pub require_if_match: bool,
}

/// Who has which role.
#[derive(Clone, Debug)]
pub struct AccessRules {
    /// By user id.
    pub users: BTreeMap<u32, Role>,
    /// By group id, where no user rule applies.
    pub groups: BTreeMap<u32, Role>,
    /// By a name in the client certificate: `dns:...`, `uri:...`, `email:...` or `ip:...`.
    pub certificates: BTreeMap<String, Role>,
    /// The daemon's own user.
    own: u32,
}

impl Default for AccessRules {
    fn default() -> Self {
        let own = rustix::process::geteuid().as_raw();
        Self { users: BTreeMap::new(), groups: BTreeMap::new(), certificates: BTreeMap::new(), own }
    }
}

impl AccessRules {
    /// The role of a local user: its own rule, its group's, and without either `admin` for the daemon's own
    /// user and root, who could read the database anyway.
    pub fn role_of_user(&self, uid: u32, gid: u32) -> Option<Role> {
        let ruled = self.users.get(&uid).or_else(|| self.groups.get(&gid)).copied();
        ruled.or((uid == 0 || uid == self.own).then_some(Role::Admin))
    }
}

/// How much of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once for each listener; of more, those that let the daemon wait are closed first.
    pub connections: u32,
    /// Event streams at once, and at most a quarter of a listener's connections.
    pub streams: u32,
    /// Callers that wait for a change at once, and at most half of a listener's connections.
    pub long_polls: u32,
    /// Requests per second of one principal, over the time of a second; 0: any number.
    pub requests_per_second: u32,
    /// Seconds for a TLS handshake.
    pub handshake_seconds: u32,
    /// Seconds for a request's head.
    pub header_seconds: u32,
    /// Seconds for a request's body.
    pub body_seconds: u32,
    /// Seconds for what is in flight when the daemon ends.
    pub drain_seconds: u32,
    /// Seconds that a reader of an event stream may take nothing.
    pub stream_stall_seconds: u32,
    /// Events that are kept.
    pub events_kept: u64,
    /// MiB of memory that guests leave to the daemon and the rest of the host, and in each control group; 0:
    /// a sixty-fourth of what there is, 32 MiB to 1 GiB.
    pub memory_reserve_mib: u64,
}

impl Limits {
    /// Event streams that may be open: they never fill a listener.
    pub fn open_streams(&self) -> usize {
        self.streams.min((self.connections / 4).max(1)) as usize
    }

    /// Callers that may wait: with the streams they never fill a listener.
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
