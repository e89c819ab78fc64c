//! Who may hold a connection of a listener, and who has to give his up.
//!
//! Owns: the places of one listener and the choice between those who want one. Must not know: sockets, HTTP.
//!
//! A full listener takes newcomers and lets go of whoever has let it wait longest, of the address that holds
//! the most: by asking for nothing, by a request that does not come to its end, by an answer that is not
//! read. None of these must keep those out who have something to ask, however they are known. Where all work
//! is the daemon's own a few places beyond the bound are left, in which only monitoring is answered.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mirrorvm::sync::Locked;
use tokio::sync::Notify;

/// How many places there are beyond the bound, for monitoring.
pub(super) const RESERVED: usize = 16;

/// Who a connection belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// A network address. For IPv6 the 64 bits that one site has.
    Address(IpAddr),
    /// A local user, by user id.
    User(u32),
    /// The system did not say who it is.
    Unknown,
}

impl Owner {
    /// The owner of a connection from an address.
    pub(super) fn of(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(v6) if !v6.is_loopback() => {
                let [a, b, c, d, ..] = v6.segments();
                IpAddr::from([a, b, c, d, 0, 0, 0, 0])
            }
            other => other,
        })
    }

    /// Whether many callers may be behind it, so that it has no bound of its own. Everybody on this machine
    /// comes from the loopback address, and the daemon's own user and root are its administrators.
    fn is_shared(self, own: u32) -> bool {
        match self {
            Self::Address(address) => address.is_loopback(),
            Self::User(uid) => uid == 0 || uid == own,
            Self::Unknown => false,
        }
    }
}

/// What the choice needs to know about one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    id: u64,
    owner: Owner,
    /// Since when it has let the daemon wait. `None` while the daemon works for it.
    idle_since: Option<u64>,
    /// Whether it has a place beyond the bound.
    reserved: bool,
}

/// Where a new connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// To a free place.
    Free,
    /// To the place of this connection, which has to go.
    Instead(u64),
    /// To a place beyond the bound, for monitoring only.
    Reserved,
    /// To the place beyond the bound of this connection, which has to go.
    ReservedInstead(u64),
    /// There is no place for it.
    Refused,
}

/// How many places one owner may have: three quarters, so that nobody holds all of them.
const fn share(places: usize) -> usize {
    let share = places - places / 4;
    if share == 0 { 1 } else { share }
}

fn choose(held: &[Held], newcomer: Owner, places: usize, own: u32) -> Choice {
    let mut of: HashMap<Owner, usize> = HashMap::new();
    for h in held.iter().filter(|h| !h.reserved) {
        *of.entry(h.owner).or_default() += 1;
    }
    let used: usize = of.values().sum();
    let count = |owner: &Owner| of.get(owner).copied().unwrap_or(0);
    // The longest idle one, of the owner that has the most.
    let victim = |wanted: &dyn Fn(&Held) -> bool| {
        let idle = held.iter().filter(|h| wanted(h)).filter_map(|h| Some((h, h.idle_since?)));
        let worst = idle.max_by_key(|(h, since)| (count(&h.owner), std::cmp::Reverse((*since, h.id))));
        worst.map(|(h, _)| h.id)
    };
    let over_share = !newcomer.is_shared(own) && count(&newcomer) >= share(places);
    let found = match (over_share, used < places) {
        (false, true) => return Choice::Free,
        (true, _) => victim(&|h| !h.reserved && h.owner == newcomer),
        (false, false) => victim(&|h| !h.reserved),
    };
    if let Some(id) = found {
        return Choice::Instead(id);
    }
    if held.iter().filter(|h| h.reserved).count() < RESERVED {
        return Choice::Reserved;
    }
    victim(&|h| h.reserved).map_or(Choice::Refused, Choice::ReservedInstead)
}

/// Nothing was asked: there is no head, or not all of one.
const SILENT: u8 = 0;
/// A head has arrived, and its body has not.
const COMING: u8 = 1;
/// All of a request has arrived, and the daemon owes the answer.
const ASKED: u8 = 2;
/// There is something to read, and the other end does not read it.
const UNREAD: u8 = 3;
/// The place belongs to another connection, or the connection is at its end.
const GONE: u8 = 4;

/// The place of a connection, and what the connection is waiting for.
#[derive(Debug)]
pub(super) struct Seat {
    id: u64,
    owner: Owner,
    reserved: bool,
    phase: AtomicU8,
    since: AtomicU64,
    answered: AtomicBool,
    asked_for: Notify,
    epoch: Instant,
}

impl Seat {
    /// Changes the state from one in `from` to `to`. When the daemon has nothing more to do for the
    /// connection, its time of waiting begins now.
    fn go(&self, from: &[u8], to: u8) -> bool {
        let next = |phase| from.contains(&phase).then_some(to);
        let was = self.phase.load(Ordering::Acquire);
        if from.contains(&was) && to != ASKED {
            self.since.store(self.epoch.elapsed().as_nanos() as u64, Ordering::Release);
        }
        self.phase.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).is_ok()
    }

    /// Notes that the head of a request has arrived. False when the place was given away just before: then
    /// nothing may be done for it.
    pub(super) fn ask(&self) -> bool {
        self.answered.store(false, Ordering::Release);
        // One after the other without a pause between is no harm.
        self.go(&[SILENT, COMING, ASKED, UNREAD], COMING)
    }

    /// Notes that the whole request has arrived: from now on only the daemon frees the place. False when it
    /// was given away just before: then the request must not be acted upon.
    pub(super) fn arrived(&self) -> bool {
        self.go(&[COMING], ASKED) || matches!(self.phase.load(Ordering::Acquire), ASKED | UNREAD)
    }

    /// Notes that the service has completed the answer. Not all of it may have been written yet.
    pub(super) fn answer_made(&self) {
        self.answered.store(true, Ordering::Release);
    }

    /// Notes that there is something to write and no room for it.
    pub(super) fn unread(&self) {
        // Of a request that has not come to its end nothing better is known than that.
        self.go(&[ASKED], UNREAD);
    }

    /// Notes that everything was written. True when that was the end of an answer.
    pub(super) fn flushed(&self) -> bool {
        if self.answered.load(Ordering::Acquire) {
            return self.go(&[COMING, ASKED, UNREAD], SILENT);
        }
        self.go(&[UNREAD], ASKED);
        false
    }

    /// Whether a request is arriving or being answered.
    pub(super) fn is_asked(&self) -> bool {
        matches!(self.phase.load(Ordering::Acquire), COMING | ASKED | UNREAD)
    }

    /// Whether only monitoring is answered on this connection.
    pub(super) fn is_reserved(&self) -> bool {
        self.reserved
    }

    /// Notes that the connection is being closed, whatever was asked: others may have the place.
    pub(super) fn closing(&self) {
        self.go(&[COMING, ASKED, UNREAD], SILENT);
    }

    /// Notes that the connection is at its end: nothing more will arrive.
    pub(super) fn end(&self) {
        self.phase.store(GONE, Ordering::Release);
    }

    /// Returns when the place is given to another connection.
    pub(super) async fn given_away(&self) {
        self.asked_for.notified().await;
    }

    /// Takes the place away, unless the daemon is working for the connection.
    fn take(&self) -> bool {
        // One that has ended is about to give its place back.
        let taken = self.go(&[SILENT, COMING, UNREAD, GONE], GONE);
        if taken {
            self.asked_for.notify_one();
        }
        taken
    }

    fn held(&self) -> Held {
        let works = self.phase.load(Ordering::Acquire) == ASKED;
        let idle_since = (!works).then(|| self.since.load(Ordering::Acquire));
        Held { id: self.id, owner: self.owner, idle_since, reserved: self.reserved }
    }
}

/// What became of a new connection.
pub(super) enum Admission {
    /// It has a place, which was an idle connection's if `in_place` is set.
    Seated { guest: Seated, in_place: bool },
    /// There is no place for it.
    Full,
}

/// A place, which is free again when this is dropped.
pub(super) struct Seated {
    pub seat: Arc<Seat>,
    shares: Arc<Shares>,
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.shares.lock().seats.remove(&self.seat.id);
    }
}

/// All places of one listener.
#[derive(Debug)]
pub(super) struct Shares {
    places: usize,
    own: u32,
    epoch: Instant,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    seats: HashMap<u64, Arc<Seat>>,
}

impl Shares {
    /// Makes a listener's places, with this number of them.
    pub(super) fn new(places: usize) -> Arc<Self> {
        let own = rustix::process::geteuid().as_raw();
        Arc::new(Self { places, own, epoch: Instant::now(), taken: Mutex::default() })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.locked()
    }

    /// Finds a place for a connection of `owner`.
    pub(super) fn admit(self: &Arc<Self>, owner: Owner) -> Admission {
        let mut taken = self.lock();
        loop {
            let held: Vec<Held> = taken.seats.values().map(|s| s.held()).collect();
            let (instead, reserved) = match choose(&held, owner, self.places, self.own) {
                Choice::Free => (None, false),
                Choice::Instead(id) => (Some(id), false),
                Choice::Reserved => (None, true),
                Choice::ReservedInstead(id) => (Some(id), true),
                Choice::Refused => return Admission::Full,
            };
            if let Some(id) = instead {
                // All of its request may have come since we looked: then another one goes.
                if !taken.seats.get(&id).is_some_and(|s| s.take()) {
                    continue;
                }
                taken.seats.remove(&id);
            }
            let id = taken.next;
            taken.next += 1;
            let seat = Arc::new(Seat {
                id,
                owner,
                reserved,
                phase: AtomicU8::new(SILENT),
                since: AtomicU64::new(self.epoch.elapsed().as_nanos() as u64),
                answered: AtomicBool::new(false),
                asked_for: Notify::new(),
                epoch: self.epoch,
            });
            taken.seats.insert(id, Arc::clone(&seat));
            let guest = Seated { seat, shares: Arc::clone(self) };
            return Admission::Seated { guest, in_place: instead.is_some() };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: u32 = 4_000_001;

    fn held(id: u64, owner: Owner, idle_since: Option<u64>) -> Held {
        Held { id, owner, idle_since, reserved: false }
    }

    fn address(last: u8) -> Owner {
        Owner::of(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn the_longest_idle_one_of_the_greediest_goes_first() {
        let mut all = vec![
            held(1, address(1), Some(10)),
            held(2, address(2), Some(30)),
            held(3, address(2), Some(20)),
            held(4, address(2), None),
        ];
        assert_eq!(choose(&all, address(3), 5, OWN), Choice::Free);
        assert_eq!(choose(&all, address(3), 4, OWN), Choice::Instead(3));
        all.iter_mut().for_each(|h| h.idle_since = None);
        assert_eq!(choose(&all, address(3), 4, OWN), Choice::Reserved);
        let beyond = |id, since| Held { reserved: true, ..held(id, address(9), since) };
        all.extend((0..RESERVED as u64).map(|n| beyond(100 + n, (n == 7).then_some(1))));
        assert_eq!(choose(&all, address(3), 4, OWN), Choice::ReservedInstead(107));
        all.iter_mut().for_each(|h| h.idle_since = None);
        assert_eq!(choose(&all, address(3), 4, OWN), Choice::Refused);
    }

    #[test]
    fn one_address_never_holds_everything_and_this_machine_may() {
        let busy = |owner, n| (0..n).map(|id| held(id, owner, None)).collect::<Vec<_>>();
        assert_eq!(choose(&busy(address(1), 6), address(1), 8, OWN), Choice::Reserved);
        assert_eq!(choose(&busy(address(1), 6), address(2), 8, OWN), Choice::Free);
        let here = Owner::of(IpAddr::from([127, 0, 0, 1]));
        assert_eq!(choose(&busy(here, 7), here, 8, OWN), Choice::Free);
        assert_eq!(choose(&busy(Owner::User(OWN), 7), Owner::User(OWN), 8, OWN), Choice::Free);
        assert_eq!(choose(&busy(Owner::User(7), 7), Owner::User(7), 8, OWN), Choice::Reserved);
        let v6 = |text: &str| Owner::of(text.parse().unwrap());
        assert_eq!(v6("2001:db8::1"), v6("2001:db8::ffff:1"));
        assert_ne!(v6("2001:db8::1"), v6("2001:db8:0:1::1"));
        assert_eq!(v6("::ffff:192.0.2.1"), address(1));
        assert_eq!(v6("::1"), v6("::1"));
    }

    fn seated(shares: &Arc<Shares>, replaces: bool) -> Seated {
        match shares.admit(address(1)) {
            Admission::Seated { guest, in_place } if in_place == replaces => guest,
            _ => panic!("not as it should be"),
        }
    }

    #[test]
    fn whoever_has_asked_keeps_the_place_until_the_answer_is_read() {
        let shares = Shares::new(1);
        let first = seated(&shares, false);
        assert!(first.seat.ask() && first.seat.arrived());
        let second = seated(&shares, false);
        assert!(second.seat.is_reserved() && !first.seat.is_reserved());
        assert!(!first.seat.flushed(), "a flush before the answer is made ends nothing");
        first.seat.answer_made();
        assert!(first.seat.flushed());
        let third = seated(&shares, true);
        assert!(!first.seat.ask(), "it came too late");
        drop((first, second, third));
        assert!(shares.lock().seats.is_empty());
    }

    #[test]
    fn a_request_that_does_not_come_to_its_end_gives_way_and_is_not_acted_upon_later() {
        let shares = Shares::new(1);
        let first = seated(&shares, false);
        assert!(first.seat.ask());
        let second = seated(&shares, true);
        assert!(!first.seat.arrived() && !first.seat.is_asked());
        assert!(second.seat.ask() && second.seat.arrived() && second.seat.arrived());
        assert!(seated(&shares, false).seat.is_reserved());
        second.seat.end();
        assert!(!second.seat.arrived(), "nothing comes over a connection that is gone");
    }

    #[test]
    fn an_answer_that_is_not_read_gives_way_and_one_that_goes_on_does_not() {
        let shares = Shares::new(1);
        let first = seated(&shares, false);
        assert!(first.seat.ask() && first.seat.arrived());
        first.seat.unread();
        assert!(!first.seat.flushed() && seated(&shares, false).seat.is_reserved(), "it has caught up");
        first.seat.unread();
        first.seat.answer_made();
        let second = seated(&shares, true);
        assert!(!first.seat.flushed() && !second.seat.is_reserved());
    }

    proptest! {
        #[test]
        fn nobody_who_asked_loses_a_place_and_the_bound_holds(
            of in proptest::collection::vec((0_u8..4, proptest::option::of(0_u64..50)), 0..40),
            newcomer in 0_u8..4,
            places in 1_usize..40,
        ) {
            let all: Vec<Held> =
                of.iter().take(places).enumerate().map(|(i, (o, s))| held(i as u64, address(*o), *s)).collect();
            match choose(&all, address(newcomer), places, OWN) {
                Choice::Free => prop_assert!(all.len() < places),
                Choice::Instead(id) => prop_assert!(all[id as usize].idle_since.is_some()),
                Choice::Reserved => {
                    let mine = all.iter().filter(|h| h.owner == address(newcomer));
                    let over = mine.clone().count() >= share(places);
                    prop_assert!(all.len() == places || over);
                    let stuck = if over { mine.clone().all(|h| h.idle_since.is_none()) }
                        else { all.iter().all(|h| h.idle_since.is_none()) };
                    prop_assert!(stuck);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
