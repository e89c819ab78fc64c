//! Opening links to a peer, and answering them: version agreement, and asking what became of a session.
//!
//! A peer that hangs up before it has said anything may be one that is busy with others: it is tried again, a
//! few times, each time after a longer pause of uneven length, and never beyond the caller's patience.

use crate::codes::PeerRefusal;
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use uuid::Uuid;

use super::wire::{
    self, ABILITIES_MAX, Abilities, Hello, HelloAck, Holding, Outcome, PROTOCOL_VERSIONS, Prepare, Purpose,
    VERDICT_MAX, Verdict, kind,
};
use super::{Control, MigrationFault};
use crate::transport::{
    Deadlines, Endpoint, Identity, Link, LinkError, PeerIdentity, ResolveError, resolve as resolve_name,
};

/// Longest wait for a connection, and for a handshake.
const STEP: Duration = Duration::from_secs(10);

/// Longest wait for a connection to one of several addresses, before the next has its turn.
const TURN: Duration = Duration::from_secs(2);

/// A link on which a version of the protocol is agreed.
pub struct Spoken {
    /// The link.
    pub link: Link,
    /// Who agreed on what.
    pub agreed: Agreed,
}

/// What the two ends of a link know of each other before they say what they want. Both have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version that both ends speak.
    pub protocol: u32,
    /// Versions that the caller offered.
    pub caller_speaks: Vec<u32>,
    /// Versions that the answerer has.
    pub answerer_speaks: Vec<u32>,
    /// Who called, by its key.
    pub caller: PeerIdentity,
    /// Who answered, by its key.
    pub answerer: PeerIdentity,
}

/// Where a peer is and who it must be.
pub type PeerAddress = (Endpoint, PeerIdentity);

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
) -> Result<Spoken, MigrationFault> {
    agree(connect(peer, identity, patience, control)?, identity, host, purpose)
}

/// As [`open_control`], with one bound for all that the peer says: one that is just in time with every
/// message must not hold a thread of ours for as many times our patience.
fn open_bounded(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    purpose: Purpose,
    patience: Duration,
) -> Result<Link, MigrationFault> {
    let by = Instant::now() + patience;
    let mut link = connect(peer, identity, patience, None)?;
    link.set_deadline(Some(by));
    Ok(agree(link, identity, host, purpose)?.link)
}

/// A link to `peer` on which nothing was said yet.
fn connect(
    peer: &PeerAddress,
    identity: &Identity,
    patience: Duration,
    control: Option<&Control>,
) -> Result<Link, MigrationFault> {
    let by = Instant::now() + patience;
    for attempt in 0.. {
        let error = match attempt_once(peer, identity, by, patience, control) {
            Ok(link) => return Ok(link),
            Err(error) => error,
        };
        let pause = pause_after(attempt, random()).filter(|pause| Instant::now() + *pause < by);
        let Some(pause) = pause.filter(|_| is_worth_another_try(&error)) else {
            return Err(MigrationFault::Connect(error));
        };
        let called_off = match control {
            Some(control) => control.pause(pause),
            None => {
                std::thread::sleep(pause);
                false
            }
        };
        if called_off {
            return Err(MigrationFault::Canceled);
        }
    }
    Err(MigrationFault::PeerGone)
}

/// Tries each of the peer's addresses. Of several failures the one that tells most is given.
fn attempt_once(
    peer: &PeerAddress,
    identity: &Identity,
    by: Instant,
    patience: Duration,
    control: Option<&Control>,
) -> Result<Link, LinkError> {
    let left = || by.saturating_duration_since(Instant::now()).min(STEP);
    let called_off = || control.is_some_and(Control::is_cancelled);
    let addresses =
        resolve_name(&peer.0, Instant::now() + left(), &called_off).map_err(|error| match error {
            ResolveError::CalledOff => LinkError::Cancelled,
            source => LinkError::Unresolved { name: peer.0.to_string(), source },
        })?;
    let mut told = None;
    let last = addresses.len().saturating_sub(1);
    for (at, address) in addresses.into_iter().enumerate() {
        let handshake = left();
        // A dead address must not take the time that the others need.
        let connect = if at < last { handshake.min(TURN) } else { handshake };
        let deadlines = Deadlines { connect, handshake, frame: patience, idle: Some(patience) };
        let register = |link| {
            if let Some(control) = control {
                control.register(link);
            }
        };
        match Link::connect_cancellable(address, identity, &peer.1, deadlines, register) {
            Ok(link) => return Ok(link),
            Err(LinkError::Cancelled) => return Err(LinkError::Cancelled),
            Err(error) => {
                let says_more = !matches!(error, LinkError::Connect { .. });
                told = Some(told.filter(|_| !says_more).unwrap_or(error));
            }
        }
    }
    Err(told.unwrap_or(LinkError::Broken))
}

/// Whether a peer that did not take us may take us in a moment: it hung up without a word, as one does that
/// has others to answer.
const fn is_worth_another_try(error: &LinkError) -> bool {
    matches!(error, LinkError::RefusedByPeer { alert: None })
}

/// How long to wait after failed attempt number `attempt`, somewhere between half of its step and all of it,
/// so that many who were refused at once do not come back at once; `None`: it was the last.
fn pause_after(attempt: u32, random: u32) -> Option<Duration> {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(1);
    const ATTEMPTS: u32 = 8;
    let step = (FIRST * 2u32.checked_pow(attempt)?).min(LONGEST);
    (attempt + 1 < ATTEMPTS).then(|| step / 2 + (step / 2).mul_f64(f64::from(random) / f64::from(u32::MAX)))
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness the pauses are even.
    let _ = SystemRandom::new().fill(&mut bytes);
    u32::from_le_bytes(bytes)
}

/// Says hello on a link and takes the peer's choice of a version.
fn agree(
    mut link: Link,
    identity: &Identity,
    host: &str,
    purpose: Purpose,
) -> Result<Spoken, MigrationFault> {
    let hello = Hello { protocol_versions: PROTOCOL_VERSIONS.to_vec(), host: host.to_owned(), purpose };
    wire::send(&mut link, kind::HELLO, &hello)?;
    let (_, payload) = wire::expect(&mut link, &[kind::HELLO_ACK], 64 << 10)?;
    let ack: HelloAck = wire::parse(&payload)?;
    if !PROTOCOL_VERSIONS.contains(&ack.protocol) {
        let theirs = vec![ack.protocol];
        return Err(MigrationFault::Version { theirs, ours: PROTOCOL_VERSIONS.to_vec() });
    }
    // Never taken for an empty list: both ends bind what was said.
    let answerer_speaks = ack
        .protocol_versions
        .filter(|theirs| theirs.contains(&ack.protocol))
        .ok_or(MigrationFault::Protocol("an answer to HELLO that does not say which versions there are"))?;
    let agreed = Agreed {
        protocol: ack.protocol,
        caller_speaks: hello.protocol_versions,
        answerer_speaks,
        caller: *identity.pin(),
        answerer: *link.peer(),
    };
    Ok(Spoken { link, agreed })
}

/// Reads a caller's hello and agrees on the newest common version: what the link is for, and the agreement.
///
/// # Errors
/// No hello in time, no common version, or a purpose that this build does not know; the caller is told.
pub fn accept_hello(
    link: &mut Link,
    identity: &Identity,
    host: &str,
) -> Result<(Purpose, Agreed), MigrationFault> {
    link.set_deadline(Some(Instant::now() + Duration::from_secs(10)));
    let (_, payload) = wire::expect(link, &[kind::HELLO], 64 << 10)?;
    let hello: Hello = wire::parse(&payload)?;
    let common = PROTOCOL_VERSIONS.iter().rev().find(|v| hello.protocol_versions.contains(v));
    let Some(protocol) = common else {
        let theirs: Vec<u32> = hello.protocol_versions.iter().copied().take(8).collect();
        let ours = PROTOCOL_VERSIONS.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let detail = format!("this host speaks peer protocol versions {ours}");
        let refusal = wire::Refused { code: PeerRefusal::PeerVersion.into(), detail };
        wire::send(link, kind::REFUSED, &refusal)?;
        return Err(MigrationFault::Version { theirs, ours: PROTOCOL_VERSIONS.to_vec() });
    };
    if hello.purpose == Purpose::Unknown {
        let detail = "this host's build does not know what the link is for".to_owned();
        wire::send(link, kind::REFUSED, &wire::Refused { code: PeerRefusal::PurposeUnknown.into(), detail })?;
        return Err(MigrationFault::Protocol("a purpose that this build does not know"));
    }
    let agreed = Agreed {
        protocol: *protocol,
        caller_speaks: hello.protocol_versions,
        answerer_speaks: PROTOCOL_VERSIONS.to_vec(),
        caller: *link.peer(),
        answerer: *identity.pin(),
    };
    let ack = HelloAck {
        protocol: *protocol,
        protocol_versions: Some(agreed.answerer_speaks.clone()),
        host: host.to_owned(),
    };
    wire::send(link, kind::HELLO_ACK, &ack)?;
    link.set_deadline(None);
    Ok((hello.purpose, agreed))
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
    let mut link = open_control(peer, identity, host, Purpose::Resolve { session }, patience, None)?.link;
    let (_, payload) = wire::expect(&mut link, &[kind::OUTCOME], 64 << 10)?;
    wire::parse(&payload)
}

/// Asks a peer whether it has guests, at most [`FIND_MAX`](wire::FIND_MAX); gives one answer for each, in
/// their order.
///
/// # Errors
/// No link, or no answer that makes sense.
pub fn find(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    guests: &[Uuid],
) -> Result<Vec<Holding>, MigrationFault> {
    let patience = Duration::from_secs(10);
    let purpose = Purpose::Find { guests: guests.to_vec() };
    let mut link = open_control(peer, identity, host, purpose, patience, None)?.link;
    let (_, payload) = wire::expect(&mut link, &[kind::FOUND], 64 << 10)?;
    let found: Vec<Holding> = wire::parse(&payload)?;
    if found.len() == guests.len() {
        Ok(found)
    } else {
        Err(MigrationFault::Protocol("an answer about other guests than were asked for"))
    }
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
    let mut link = open_bounded(peer, identity, host, Purpose::Ask {}, patience)?;
    let agreed = begun.elapsed();
    let (_, payload) = wire::expect(&mut link, &[kind::ABILITIES], ABILITIES_MAX)?;
    Ok((Abilities::read(&payload)?, agreed))
}

/// Asks a peer what speaks against a migration, as its answer to PREPARE would; nothing is kept of it there.
/// `None`: it ends the link over the question, as builds do that do not know it.
///
/// # Errors
/// No link, or no answer that makes sense.
pub fn check(
    peer: &PeerAddress,
    identity: &Identity,
    host: &str,
    patience: Duration,
    prepare: &Prepare,
) -> Result<Option<Verdict>, MigrationFault> {
    let mut link = match open_bounded(peer, identity, host, Purpose::Check {}, patience) {
        Ok(link) => link,
        Err(
            MigrationFault::PeerGone
            | MigrationFault::PeerLost(LinkError::Truncated { .. } | LinkError::Io(_) | LinkError::Broken),
        ) => return Ok(None),
        Err(fault) => return Err(fault),
    };
    wire::send(&mut link, kind::CHECK, prepare)?;
    let (_, payload) = wire::expect(&mut link, &[kind::CHECKED], VERDICT_MAX)?;
    Verdict::read(&payload).map(Some)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pauses_grow_and_come_to_an_end() {
        let pauses = |random| (0..20).map_while(|at| pause_after(at, random)).collect::<Vec<_>>();
        let ms = |pauses: Vec<Duration>| pauses.iter().map(Duration::as_millis).collect::<Vec<_>>();
        assert_eq!(ms(pauses(0)), [25, 50, 100, 200, 400, 500, 500]);
        assert_eq!(ms(pauses(u32::MAX)), [50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!((pause_after(31, 0), pause_after(u32::MAX, 0)), (None, None));
    }

    proptest! {
        #[test]
        fn a_pause_is_never_over_a_second(attempt in any::<u32>(), random in any::<u32>()) {
            prop_assert!(pause_after(attempt, random).is_none_or(|pause| pause <= Duration::from_secs(1)));
        }
    }
}
