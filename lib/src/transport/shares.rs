//! Who gives way when more strangers knock than there is room for.
//!
//! Owns: that decision, and what counts as one address. Must not know: sockets, threads. Pure.
//!
//! Nobody can tell a peer from a stranger before its handshake is over, so a newcomer is never turned away:
//! somebody who has had his chance gives way. A handshake of ours takes some milliseconds; who is slower than
//! all that came after him from the busiest address hardly is a peer, and a peer tries again.

use std::net::{IpAddr, Ipv6Addr};

/// What counts as one address: an IPv4 address, or the network that an IPv6 host has to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Share(IpAddr);

impl Share {
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) if !v6.is_loopback() => {
                let [a, b, c, d, ..] = v6.segments();
                Self(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
            }
            other => Self(other),
        }
    }
}

/// One connection in its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Goes up with every connection.
    pub id: u64,
    pub from: Share,
    /// Whether a known peer is, or was, at that address: such have room of their own.
    pub known: bool,
}

/// How many handshakes there may be at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// From addresses of nobody known.
    pub strangers: usize,
    /// From known addresses, beside those.
    pub known: usize,
    /// From one address, of either.
    pub per_address: usize,
}

/// Whom a newcomer takes the place of; `None`: there is a free one. `waiting` has the oldest first.
pub(super) fn gives_way(waiting: &[Waiting], newcomer: &Waiting, room: Room) -> Option<u64> {
    let alike = || waiting.iter().filter(|w| w.known == newcomer.known);
    let of = |share: Share| alike().filter(move |w| w.from == share);
    let all = if newcomer.known { room.known } else { room.strangers };
    if of(newcomer.from).count() >= room.per_address.min(all).max(1) {
        return of(newcomer.from).next().map(|w| w.id);
    }
    if alike().count() < all.max(1) {
        return None;
    }
    // Of equally busy addresses the one whose oldest has had the longest: `max_by_key` takes the last, so the
    // order turns.
    alike().rev().max_by_key(|w| of(w.from).count()).and_then(|busiest| of(busiest.from).next()).map(|w| w.id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOM: Room = Room { strangers: 8, known: 4, per_address: 5 };

    fn share(last: u8) -> Share {
        Share::of([192, 0, 2, last].into())
    }

    /// Everybody who knocked in this order and is still there.
    fn after(knocks: &[(u8, bool)]) -> Vec<Waiting> {
        let mut waiting: Vec<Waiting> = Vec::new();
        for (id, (last, known)) in knocks.iter().enumerate() {
            let newcomer = Waiting { id: id as u64, from: share(*last), known: *known };
            if let Some(gone) = gives_way(&waiting, &newcomer, ROOM) {
                waiting.retain(|w| w.id != gone);
            }
            waiting.push(newcomer);
        }
        waiting
    }

    #[test]
    fn one_address_shows_as_one_however_it_is_written() {
        let of = |text: &str| Share::of(text.parse().unwrap());
        assert_eq!(of("::ffff:192.0.2.7"), of("192.0.2.7"));
        assert_eq!(of("2001:db8:0:1::2"), of("2001:db8:0:1:ffff::9"));
        assert_ne!(of("2001:db8:0:1::2"), of("2001:db8:0:2::2"));
        assert_ne!(of("192.0.2.7"), of("192.0.2.8"));
        assert_ne!(of("::1"), of("::2"));
    }

    #[test]
    fn the_oldest_of_the_busiest_address_gives_way() {
        // Five of 1 are its share, three of 2 fill the room.
        let full =
            [(1, false), (2, false), (1, false), (1, false), (2, false), (1, false), (1, false), (2, false)];
        let ids = |knocks: &[(u8, bool)]| after(knocks).iter().map(|w| w.id).collect::<Vec<_>>();
        assert_eq!(ids(&full), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(&[&full[..], &[(3, false)]].concat()), [1, 2, 3, 4, 5, 6, 7, 8]);
        // Among equals, whoever has been there longest.
        let equals: Vec<_> = (0..9).map(|last| (last, false)).collect();
        assert_eq!(ids(&equals), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    proptest! {
        #[test]
        fn a_newcomer_always_gets_a_place_and_no_share_grows_over_its_bound(
            knocks in proptest::collection::vec((0u8..6, any::<bool>()), 1..80),
        ) {
            let waiting = after(&knocks);
            prop_assert_eq!(waiting.last().map(|w| w.id), Some(knocks.len() as u64 - 1));
            for known in [false, true] {
                let alike: Vec<_> = waiting.iter().filter(|w| w.known == known).collect();
                let all = if known { ROOM.known } else { ROOM.strangers };
                prop_assert!(alike.len() <= all);
                for last in 0..6 {
                    prop_assert!(alike.iter().filter(|w| w.from == share(last)).count() <= ROOM.per_address);
                }
            }
        }

        #[test]
        fn strangers_take_nothing_from_known_addresses(
            before in proptest::collection::vec((0u8..3, any::<bool>()), 0..20),
            flood in proptest::collection::vec(0u8..6, 0..60),
        ) {
            let known = |knocks: &[(u8, bool)]| after(knocks).into_iter().filter(|w| w.known).collect::<Vec<_>>();
            let flooded: Vec<_> = before.iter().copied().chain(flood.iter().map(|l| (*l, false))).collect();
            prop_assert_eq!(known(&before), known(&flooded));
        }

        /// However many connections one address makes, whoever comes once from another is dropped by none of
        /// them.
        #[test]
        fn a_flood_from_one_address_drops_only_its_own(flood in 1usize..80) {
            let mut knocks = vec![(1, false)];
            knocks.extend(std::iter::repeat_n((2, false), flood));
            prop_assert!(after(&knocks).iter().any(|w| w.id == 0));
        }
    }
}
