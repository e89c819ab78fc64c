//! Opening links to a peer, and answering them: version agreement, and asking what became of a session.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::wire::{
    self, ABILITIES_MAX, Abilities, Hello, HelloAck, Outcome, PROTOCOL_VERSIONS, Purpose, kind,
};
use super::{Control, MigrationFault};
use crate::transport::{Deadlines, Identity, Link, LinkCanceller, PeerIdentity};

/// Where a peer is and who it must be.
pub type PeerAddress = (SocketAddr, PeerIdentity);

/// Connects and says hello. With a `control`, cancelling reaches the link from its first moment.
///
/// # Errors
/// No link, or no common version.
pub fn open_control(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    purpose: Purpose,
    patience: Duration,
    control: Option<&Control>,
) -> Result<Link, MigrationFault> {
    let hello = Hello { protocol_versions: PROTOCOL_VERSIONS.to_vec(), host: host.to_owned(), purpose };
    agree(connect(peer, identity, patience, control)?, &hello)
}

/// A link to `peer` on which nothing was said yet.
fn connect(
    peer: &PeerAddress,
    identity: &Identity,
    patience: Duration,
    control: Option<&Control>,
) -> Result<Link, MigrationFault> {
    let deadlines = Deadlines {
        connect: patience.min(Duration::from_secs(10)),
        handshake: patience.min(Duration::from_secs(10)),
        frame: patience,
        idle: Some(patience),
    };
    let register = |link: LinkCanceller| {
        if let Some(control) = control {
            control.register(link);
        }
    };
    Link::connect_cancellable(peer.0, identity, &peer.1, deadlines, register).map_err(MigrationFault::Connect)
}

/// Says hello on a link and takes the peer's choice of a version.
fn agree(mut link: Link, hello: &Hello) -> Result<Link, MigrationFault> {
    wire::send(&mut link, kind::HELLO, hello)?;
    let (_, payload) = wire::expect(&mut link, &[kind::HELLO_ACK], 64 << 10)?;
    let ack: HelloAck = wire::parse(&payload)?;
    if !PROTOCOL_VERSIONS.contains(&ack.protocol) {
        let theirs = vec![ack.protocol];
        return Err(MigrationFault::Version { theirs, ours: PROTOCOL_VERSIONS.to_vec() });
    }
    Ok(link)
}

/// Reads a caller's hello and agrees on the newest common version.
///
/// # Errors
/// No hello in time, or no common version; the caller is told.
pub fn accept_hello(link: &mut Link, host: &str) -> Result<Hello, MigrationFault> {
    link.set_deadline(Some(Instant::now() + Duration::from_secs(10)));
    let (_, payload) = wire::expect(link, &[kind::HELLO], 64 << 10)?;
    let hello: Hello = wire::parse(&payload)?;
    let common = PROTOCOL_VERSIONS.iter().rev().find(|v| hello.protocol_versions.contains(v));
    let Some(protocol) = common else {
        let theirs: Vec<u32> = hello.protocol_versions.iter().copied().take(8).collect();
        let detail = format!("this host speaks peer protocol versions {PROTOCOL_VERSIONS:?}");
        let refusal = wire::Refused { code: "peer_version".into(), detail };
        wire::send(link, kind::REFUSED, &refusal)?;
        return Err(MigrationFault::Version { theirs, ours: PROTOCOL_VERSIONS.to_vec() });
    };
    wire::send(link, kind::HELLO_ACK, &HelloAck { protocol: *protocol, host: host.to_owned() })?;
    link.set_deadline(None);
    Ok(hello)
}

/// Asks a destination what became of `session`.
///
/// # Errors
/// No link, or no answer.
pub fn resolve(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    session: Uuid,
) -> Result<Outcome, MigrationFault> {
    let patience = Duration::from_secs(10);
    let mut link = open_control(peer, identity, host, Purpose::Resolve { session }, patience, None)?;
    let (_, payload) = wire::expect(&mut link, &[kind::OUTCOME], 64 << 10)?;
    wire::parse(&payload)
}

/// Asks a peer what it can do; also gives how long it took to agree with it on a version.
///
/// # Errors
/// No link, or no answer that makes sense.
pub fn ask(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    patience: Duration,
) -> Result<(Abilities, Duration), MigrationFault> {
    let begun = Instant::now();
    let mut link = connect(peer, identity, patience, None)?;
    // One bound for all that it says: a peer that is just in time with every message must not hold a thread of ours for
    // as many times our patience.
    link.set_deadline(Some(begun + patience));
    let hello = Hello {
        protocol_versions: PROTOCOL_VERSIONS.to_vec(),
        host: host.to_owned(),
        purpose: Purpose::Ask {},
    };
    let mut link = agree(link, &hello)?;
    let agreed = begun.elapsed();
    let (_, payload) = wire::expect(&mut link, &[kind::ABILITIES], ABILITIES_MAX)?;
    Ok((Abilities::read(&payload)?, agreed))
}
