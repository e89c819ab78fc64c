//! Another host as values: what a caller says of it, and how this host knows it. Domain types; the REST wire
//! has its own.

use jiff::Timestamp;
use uuid::Uuid;

use crate::guest::driver::Labels;
use crate::transport::Endpoint;

/// What a caller says of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSpec {
    /// Name, unique among peers; shaped as a guest's name.
    pub name: String,
    /// Where its peer listener is.
    pub address: Endpoint,
    /// Its pinned identity: `sha256:` and 64 hex digits over its public key.
    pub identity: String,
    /// Free labels.
    pub labels: Labels,
}

/// A known peer.
#[derive(Clone, Debug)]
pub struct PeerRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// What was said of it.
    pub spec: PeerSpec,
    /// Goes up with every change.
    pub generation: u64,
    /// When it was added.
    pub created_at: Timestamp,
}
