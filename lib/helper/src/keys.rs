//! Secrets of a session: one for each direction and stream, from the guest's migration secret and what both
//! helpers drew for the session.
//!
//! HKDF-SHA256 (RFC 5869): salt = what the source's helper answered to `Hello`, then the destination's (nonce
//! and ephemeral public key each); input = the guest's migration secret, then what X25519 gives of both
//! ephemeral keys; info = label, session, transcript, suite, direction, stream. It takes both inputs to know
//! a secret of the session: the guest's shows that the other end is the guest's, the ephemeral keys are gone
//! when the session has begun. A new nonce of either helper gives other secrets. None of them seals anything:
//! each group has a key of its own ([`crate::seal`]).

use mirrorvm_abi::op::{GREETING_BYTES, Greeting};
use mirrorvm_abi::record::{Direction, Suite};
use ring::hkdf;
use x25519_dalek::SharedSecret;
use zeroize::Zeroizing;

use crate::seal::{KeyLength, Sealer, overwrite, wipe};

const LABEL: &[u8] = b"mirrorvm stream secret v3";
/// Under what the audit digests pages: both ends the same, so it comes from the session as well.
const AUDIT_LABEL: &[u8] = b"mirrorvm audit digest key v1";

/// What secrets are derived from; dropped, and wiped, when they are.
pub(crate) struct KeySchedule {
    prk: hkdf::Prk,
    session: [u8; 16],
    transcript: [u8; 32],
    suite: Suite,
}

impl KeySchedule {
    #[inline(never)]
    pub fn new(
        (secret, shared): (&[u8; 32], &SharedSecret),
        (source, destination): (&Greeting, &Greeting),
        session: [u8; 16],
        transcript: [u8; 32],
        suite: Suite,
    ) -> Self {
        let mut salt = [0; 2 * GREETING_BYTES];
        salt[..GREETING_BYTES].copy_from_slice(&source.encode());
        salt[GREETING_BYTES..].copy_from_slice(&destination.encode());
        let mut input = Zeroizing::new([0; 64]);
        input[..32].copy_from_slice(secret);
        input[32..].copy_from_slice(shared.as_bytes());
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(&input[..]);
        Self { prk, session, transcript, suite }
    }

    /// The key of the audit's digests.
    #[inline(never)]
    pub fn audit(&self) -> Option<Zeroizing<[u8; 32]>> {
        let suite = [self.suite as u8];
        let info: [&[u8]; 4] = [AUDIT_LABEL, &self.session, &self.transcript, &suite];
        let mut key = Zeroizing::new([0; 32]);
        self.prk.expand(&info, KeyLength).ok()?.fill(&mut key[..]).ok()?;
        Some(key)
    }

    /// One direction and stream, before its first group. Works on a stack of its own, below what the caller
    /// makes of it.
    #[inline(never)]
    pub fn sealer(&self, direction: Direction, stream: u16) -> Option<Sealer> {
        let (suite, dir) = ([self.suite as u8], [direction as u8]);
        let stream_bytes = stream.to_le_bytes();
        let info: [&[u8]; 6] = [LABEL, &self.session, &self.transcript, &suite, &dir, &stream_bytes];
        let mut raw = [0; 32];
        self.prk.expand(&info, KeyLength).ok()?.fill(&mut raw).ok()?;
        let secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &raw);
        wipe(&mut raw);
        Some(Sealer::new(secret, self.suite, stream))
    }
}

impl Drop for KeySchedule {
    fn drop(&mut self) {
        overwrite(&mut self.prk);
    }
}
