//! The two codes of a pairing: what one host offers, and what another answers to it.
//!
//! Owns: how they are written, what binds them to each other, and how long and how often an answer is taken.
//! Must not know: terminals, daemons.
//!
//! An offer has a secret of 128 random bits that is used once. The answer has an HMAC by it over both hosts'
//! names, addresses and identities, so that only who saw the offer can answer it, and for these two hosts
//! alone. What both ends show to be compared is made of the same: somebody on the way of both codes would
//! have to find keys for which 64 bits agree, while the offer stands.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mirrorvm::host::is_name;
use mirrorvm::transport::{Endpoint, PeerIdentity};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{digest, hmac};
use zeroize::Zeroizing;

/// For how long an offer is answered.
pub(super) const WINDOW: Duration = Duration::from_secs(600);
/// How many answers are looked at.
pub(super) const TRIES: u32 = 3;
/// Longest text that is read as a code.
pub(super) const TEXT_MAX: usize = 1024;

const OFFER: &str = "mirrorvm-offer-1.";
const ANSWER: &str = "mirrorvm-answer-1.";
const SECRET_BYTES: usize = 16;
const MAC_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;

/// What each host tells the other of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Party {
    pub name: String,
    pub address: Endpoint,
    pub identity: PeerIdentity,
}

/// An offer, at the host that made it or at the one that answers.
pub(super) struct Offer {
    pub host: Party,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
}

/// Why a text is not taken as a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// It is something else.
    #[error(
        "this is no code: give the whole line that `mirrorvmd identity pair` printed on the other host, from `{0}` on"
    )]
    Form(&'static str),
    /// It is the offer, where its answer is wanted.
    #[error(
        "this is the code that a host offers: give it to `mirrorvmd identity pair --answer` on the other host"
    )]
    IsOffer,
    /// It is an answer, where an offer is wanted.
    #[error(
        "this is an answer: give it to the `mirrorvmd identity pair` that waits for it on the other host"
    )]
    IsAnswer,
    /// A character is missing or another one.
    #[error("the code was not copied whole: its checksum is wrong")]
    Damaged,
    /// What it says cannot be said of a host.
    #[error("the code tells of a host that cannot be one: the builds do not fit")]
    Content,
    /// Its host is this one.
    #[error("this is this host's own code: two hosts are paired")]
    OwnHost,
    /// It is the answer to something else, or of somebody who never saw the offer.
    #[error("this answers another code than the one that this host offered")]
    Forged,
    /// It came too late.
    #[error("the code was good for ten minutes: begin again")]
    TooLate,
    /// Too many did not do.
    #[error("{TRIES} answers did not do: begin again")]
    TooOften,
}

impl Party {
    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self.identity.as_bytes());
        for text in [&self.name, &self.address.to_string()] {
            let bytes = u16::try_from(text.len()).expect("names and addresses are short");
            to.extend_from_slice(&bytes.to_be_bytes());
            to.extend_from_slice(text.as_bytes());
        }
    }

    /// A host in all of `bytes`. Whatever is shown of it later is printable: names and addresses have no
    /// other characters.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (identity, rest) = bytes.split_first_chunk::<32>()?;
        let text = |bytes: &mut &[u8]| {
            let (length, rest) = bytes.split_first_chunk::<2>()?;
            let (text, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
            *bytes = rest;
            Some(std::str::from_utf8(text).ok()?.to_owned())
        };
        let mut rest = rest;
        let name = text(&mut rest).filter(|name| is_name(name))?;
        let address: Endpoint = text(&mut rest)?.parse().ok()?;
        address.check_connectable().ok()?;
        rest.is_empty().then_some(Self { name, address, identity: PeerIdentity::from_bytes(*identity) })
    }
}

impl Offer {
    /// A new one of this host.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn new(host: Party) -> Result<Self, ring::error::Unspecified> {
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        SystemRandom::new().fill(&mut *secret)?;
        Ok(Self { host, secret })
    }

    pub fn text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(self.secret.to_vec());
        self.host.write(&mut bytes);
        Zeroizing::new(written(OFFER, &bytes))
    }

    /// The offer in a text from another host than `own`.
    pub fn parse(text: &str, own: &PeerIdentity) -> Result<Self, CodeError> {
        if text.trim().starts_with(ANSWER) {
            return Err(CodeError::IsAnswer);
        }
        let bytes = read(OFFER, text)?;
        let (secret, host) = bytes.split_first_chunk::<SECRET_BYTES>().ok_or(CodeError::Content)?;
        let host = Party::read(host).ok_or(CodeError::Content)?;
        if host.identity == *own {
            return Err(CodeError::OwnHost);
        }
        Ok(Self { host, secret: Zeroizing::new(*secret) })
    }

    /// What `host` answers.
    pub fn answer(&self, host: &Party) -> String {
        let mut bytes = hmac::sign(&self.key(), &self.bound("answer", host)).as_ref().to_vec();
        host.write(&mut bytes);
        written(ANSWER, &bytes)
    }

    /// The host that an answer is of.
    fn answered(&self, text: &str) -> Result<Party, CodeError> {
        if text.trim().starts_with(OFFER) {
            return Err(CodeError::IsOffer);
        }
        let bytes = read(ANSWER, text)?;
        let (mac, host) = bytes.split_at_checked(MAC_BYTES).ok_or(CodeError::Content)?;
        let host = Party::read(host).ok_or(CodeError::Content)?;
        hmac::verify(&self.key(), &self.bound("answer", &host), mac).map_err(|_| CodeError::Forged)?;
        if host.identity == self.host.identity {
            return Err(CodeError::OwnHost);
        }
        Ok(host)
    }

    /// What people compare: the same at both hosts if each of them is where the other thinks it is.
    pub fn shown(&self, answering: &Party) -> String {
        let tag = hmac::sign(&self.key(), &self.bound("shown", answering));
        let group = |pair: &[u8]| pair.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        tag.as_ref()[..8].chunks(2).map(group).collect::<Vec<_>>().join("-")
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.secret)
    }

    /// Everything that both hosts agree on, for one use.
    fn bound(&self, what: &str, answering: &Party) -> Vec<u8> {
        let mut bytes = format!("mirrorvm pairing 1 {what}\0").into_bytes();
        self.host.write(&mut bytes);
        answering.write(&mut bytes);
        bytes
    }
}

/// An offer that waits for its answer. Times are of a clock that nobody sets.
pub(super) struct Waiting {
    pub offer: Offer,
    until: Duration,
    tries: u32,
}

impl Waiting {
    pub const fn new(offer: Offer, now: Duration) -> Self {
        Self { offer, until: now.saturating_add(WINDOW), tries: 0 }
    }

    /// When it is too late.
    pub const fn until(&self) -> Duration {
        self.until
    }

    /// Takes an answer, or says why not; after [`CodeError::TooLate`] and [`CodeError::TooOften`] there is
    /// nothing to wait for.
    pub fn take(&mut self, text: &str, now: Duration) -> Result<Party, CodeError> {
        if now >= self.until {
            return Err(CodeError::TooLate);
        }
        self.tries += 1;
        if self.tries > TRIES {
            return Err(CodeError::TooOften);
        }
        self.offer
            .answered(text)
            .map_err(|wrong| if self.tries == TRIES { CodeError::TooOften } else { wrong })
    }
}

fn check(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let digest = digest::digest(&digest::SHA256, bytes);
    *digest.as_ref().first_chunk().expect("a digest is longer")
}

fn written(start: &str, bytes: &[u8]) -> String {
    let whole = Zeroizing::new([bytes, &check(bytes)].concat());
    format!("{start}{}", URL_SAFE_NO_PAD.encode(&*whole))
}

fn read(start: &'static str, text: &str) -> Result<Zeroizing<Vec<u8>>, CodeError> {
    let rest =
        text.trim().strip_prefix(start).filter(|_| text.len() <= TEXT_MAX).ok_or(CodeError::Form(start))?;
    let mut bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(rest).map_err(|_| CodeError::Damaged)?);
    let length = bytes.len().checked_sub(CHECK_BYTES).ok_or(CodeError::Damaged)?;
    if check(&bytes[..length]) != bytes[length..] {
        return Err(CodeError::Damaged);
    }
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]
mod tests {
    use super::*;

    fn party(name: &str, byte: u8) -> Party {
        Party {
            name: name.into(),
            address: format!("{name}.example:7801").parse().unwrap(),
            identity: PeerIdentity::from_bytes([byte; 32]),
        }
    }

    fn now(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_one_host_offers_and_the_other_answers_makes_each_known_to_the_other() {
        let mut waiting = Waiting::new(Offer::new(party("a", 1)).unwrap(), now(5));
        let b = party("b", 2);
        let at_b = Offer::parse(&format!("  {}\n", &*waiting.offer.text()), &b.identity).unwrap();
        assert_eq!(at_b.host, party("a", 1));
        assert_eq!(waiting.take(&at_b.answer(&b), now(600)), Ok(b.clone()));
        let shown = waiting.offer.shown(&b);
        assert_eq!(shown, at_b.shown(&b));
        assert_eq!((shown.len(), shown.matches('-').count()), (19, 3));
        // Of another host, or by another secret, it is another.
        assert_ne!(shown, at_b.shown(&party("b", 3)));
        assert_ne!(shown, Offer::new(party("a", 1)).unwrap().shown(&b));
    }

    #[test]
    fn an_answer_of_somebody_who_did_not_see_the_offer_is_refused() {
        let waiting = || Waiting::new(Offer { host: party("a", 1), secret: Zeroizing::new([7; 16]) }, now(0));
        let other = Offer { host: party("a", 1), secret: Zeroizing::new([8; 16]) };
        assert_eq!(waiting().take(&other.answer(&party("b", 2)), now(1)), Err(CodeError::Forged));
        // Nor is one for another host of the same secret, or with another host put in.
        let elsewhere = Offer { host: party("c", 3), secret: Zeroizing::new([7; 16]) };
        assert_eq!(waiting().take(&elsewhere.answer(&party("b", 2)), now(1)), Err(CodeError::Forged));
        let good = waiting().offer.answer(&party("b", 2));
        let mut bytes = read(ANSWER, &good).unwrap().to_vec();
        bytes[MAC_BYTES] ^= 1;
        assert_eq!(waiting().take(&written(ANSWER, &bytes), now(1)), Err(CodeError::Forged));
        let own = waiting().offer.answer(&party("a", 1));
        assert_eq!(waiting().take(&own, now(1)), Err(CodeError::OwnHost));
    }

    #[test]
    fn an_offer_stands_for_ten_minutes_and_three_answers() {
        let good = |waiting: &Waiting| waiting.offer.answer(&party("b", 2));
        let mut waiting = Waiting::new(Offer::new(party("a", 1)).unwrap(), now(100));
        let answer = good(&waiting);
        assert_eq!(waiting.take(&answer, now(700)), Err(CodeError::TooLate));
        assert!(waiting.take(&answer, now(699)).is_ok());
        let mut waiting = Waiting::new(Offer::new(party("a", 1)).unwrap(), now(0));
        let answer = good(&waiting);
        let forged = Offer::new(party("a", 1)).unwrap().answer(&party("b", 2));
        assert_eq!(waiting.take(&forged, now(1)), Err(CodeError::Forged));
        assert_eq!(waiting.take("what?", now(1)), Err(CodeError::Form(ANSWER)));
        assert_eq!(waiting.take(&forged, now(1)), Err(CodeError::TooOften));
        assert_eq!(waiting.take(&answer, now(1)), Err(CodeError::TooOften));
    }

    #[test]
    fn what_was_not_copied_whole_or_is_the_other_code_says_so() {
        let offer = Offer::new(party("a", 1)).unwrap();
        let (own, text) = (PeerIdentity::from_bytes([2; 32]), offer.text());
        let wrong = |text: &str| Offer::parse(text, &own).err().unwrap();
        for at in OFFER.len()..text.len() {
            let mut other = text.as_bytes().to_vec();
            other[at] = if other[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(wrong(std::str::from_utf8(&other).unwrap()), CodeError::Damaged, "{at}");
            assert_eq!(wrong(&text[..at]), CodeError::Damaged);
        }
        assert_eq!(wrong(""), CodeError::Form(OFFER));
        assert_eq!(wrong(&offer.answer(&party("b", 2))), CodeError::IsAnswer);
        assert_eq!(offer.answered(&text), Err(CodeError::IsOffer));
        assert_eq!(Offer::parse(&text, &offer.host.identity).err(), Some(CodeError::OwnHost));
        // A name that would write on somebody's terminal.
        let mut bytes = vec![0; SECRET_BYTES];
        Party { name: "\x1b[2J".into(), ..party("a", 1) }.write(&mut bytes);
        assert_eq!(wrong(&written(OFFER, &bytes)), CodeError::Content);
    }
}
