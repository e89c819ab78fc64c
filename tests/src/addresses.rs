//! Loopback addresses of one's own.
//!
//! Owns: that nobody else is at an address. A port of 127.0.0.1 that its owner has let go, because it is
//! about to be started again, or because nobody is to be there, is soon somebody else's: the kernel gives it
//! to the next who connects or listens there. Whoever connects without choosing does so from 127.0.0.1, and
//! never from one of these.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

/// An address of 127.0.0.0/8 that nobody else listens at, and nobody connects from.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let many = NEXT.fetch_add(1, Ordering::Relaxed);
    // The processes of one machine and what each takes are more than there are addresses: where two meet, it
    // still takes the same port of both.
    let mixed = std::process::id().wrapping_mul(0x9e37_79b1).wrapping_add(many.wrapping_mul(0x85eb_ca6b));
    let [a, b, c, _] = mixed.to_be_bytes();
    // Neither the network's own addresses nor its broadcast, and not 127.0.
    let inner = |byte: u8| 1 + byte % 254;
    Ipv4Addr::new(127, inner(a), inner(b), inner(c))
}

/// Where nobody listens: who connects is refused at once.
pub fn nobody() -> SocketAddr {
    SocketAddr::from((own_address(), 9))
}
