//! Real sockets on the loopback, both ends in this process. Nothing waits by sleeping: every wait is for an
//! event, with a bound that only a failing test reaches.

mod crowds;
mod frames;
mod identities;
mod links;
mod others;
mod refusals;
mod throughput;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use super::*;

/// Bound that a passing test never reaches.
const LONG: Duration = Duration::from_secs(20);
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn identity() -> Identity {
    let (certificate, key) = identity::generate().unwrap();
    Identity::from_pem(certificate.as_bytes(), key.as_bytes()).unwrap()
}

/// An identity whose certificate has dates, in PEM: certificate and key.
fn dated(from: SystemTime, until: SystemTime) -> (String, String) {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    (identity::envelope(&key, from, until).unwrap(), key.serialize_pem())
}

fn deadlines() -> Deadlines {
    Deadlines { connect: LONG, handshake: LONG, frame: LONG, idle: Some(LONG) }
}

fn limits() -> ListenerLimits {
    ListenerLimits { handshake_timeout: LONG, ..ListenerLimits::default() }
}

/// A listener that admits `admitted` and hands its links out.
fn listen(
    server: &Identity,
    admitted: &[&Identity],
    limits: ListenerLimits,
) -> (PeerListener, Receiver<Link>) {
    let admitted: Vec<PeerIdentity> = admitted.iter().map(|identity| *identity.pin()).collect();
    let (links, accepted) = channel();
    let handler = Arc::new(move |link| links.send(link).unwrap_or(()));
    let admits: PeerFilter = Arc::new(move |peer: &PeerIdentity| admitted.contains(peer));
    (PeerListener::bind(LOOPBACK, server, admits, limits, handler).unwrap(), accepted)
}

/// Both ends of one good link, without a listener that could cut it.
fn pair_with(deadlines: Deadlines) -> (Link, Link) {
    let (server, client) = (identity(), identity());
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let addr = listener.local_addr().unwrap();
    let config = tls::server_config(tls::provider(), &server, Arc::new(|_| true)).unwrap();
    let far = thread::spawn(move || {
        let socket = socket::Socket::new(listener.accept().unwrap().0).unwrap();
        let mut far = Link::accept(socket, config, deadlines).unwrap();
        far.admit().unwrap();
        far
    });
    let near = Link::connect(addr, &client, server.pin(), deadlines).unwrap();
    let far = far.join().unwrap();
    assert_eq!((near.peer(), far.peer()), (server.pin(), client.pin()));
    (near, far)
}

fn pair() -> (Link, Link) {
    pair_with(deadlines())
}
