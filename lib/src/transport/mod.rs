//! Authenticated, framed, blocking links between hosts.
//!
//! Owns: a host's identity ([`Identity`], pinned by peers as [`PeerIdentity`]), mutual TLS 1.3 with pins in
//! place of certificate authorities, frames over it ([`Link`]) and accepting them ([`PeerListener`]). Must
//! not know: what a frame means. Only `migration` uses it.
//!
//! Not trusted: the network, whoever connects, and the bytes of an authenticated peer. So: a peer that is not
//! pinned is refused inside the handshake; every length is bounded, and takes memory only as its bytes come;
//! every wait has a deadline; what a stranger or a peer can make us spend (threads, links, memory, log lines)
//! has a cap.
//!
//! On the wire, after the handshake (ALPN `mirrorvm/1`): frames `[u32 le payload length][u8 kind][3 zero
//! bytes][payload]` in both directions. Kind 0 is the link's own: the server's first frame, empty, tells the
//! client that it has been admitted (in TLS 1.3 the client cannot see otherwise whether its certificate was
//! accepted). The end of a stream is a TLS `close_notify` at a frame boundary; any other end is an error.
//!
//! A link whose frames carry what is sealed end to end anyway may go on without TLS ([`Link::leave_tls`])
//! once both ends know each other: the same frames, as they are. From there on the network can read and
//! change them, so that nothing may cross that would matter to: see `migration` for what does.

mod endpoint;
mod frame;
mod here;
mod identity;
pub(crate) mod key_file;
mod link;
mod link_error;
mod listen_at;
mod listener;
mod log_budget;
mod places;
mod records;
mod resolve;
mod session;
mod shares;
mod socket;
mod tls;

#[cfg(test)]
mod tests;

pub use endpoint::{AdvertiseError, Advertised, Endpoint, ParseEndpointError, Unconnectable};
pub use frame::{FrameHeader, HEADER_LEN, HeaderError};
pub(crate) use here::is_at;
pub use here::{check_listenable, check_reachable};
pub use identity::{Identity, IdentityError, IdentityFacts, ParsePeerIdentityError, PeerIdentity};
#[cfg(test)]
use link::Frame;
pub use link::{Deadlines, Link, LinkCounters};
pub use link_error::LinkError;
pub use listen_at::{ListenAt, ListenAtError};
pub use listener::{ListenerError, ListenerLimits, PeerListener};
pub(crate) use log_budget::LogBudget;
pub use places::Occupancy;
pub use resolve::{ResolveError, resolve};
pub use rustls::AlertDescription;
pub use socket::{LinkCanceller, Waiting};
pub use tls::{CertRefusal, PeerFilter};
