//! Secrets of a session: one for each direction and stream, from the guest's migration secret and both
//! nonces.
//!
//! HKDF-SHA256 (RFC 5869): salt = source nonce || destination nonce, input = secret, info = label, session,
//! transcript, suite, direction, stream. A new nonce of either helper gives other secrets. None of them seals
//! anything: each group has a key of its own ([`crate::seal`]).

use mirrorvm_abi::record::{Direction, Suite};
use ring::hkdf;

use crate::seal::{KeyLength, Sealer, wipe};

const LABEL: &[u8] = b"mirrorvm stream secret v2";

/// What secrets are derived from; dropped when they are.
pub(crate) struct KeySchedule {
    prk: hkdf::Prk,
    session: [u8; 16],
    transcript: [u8; 32],
    suite: Suite,
}

impl KeySchedule {
    pub fn new(
        secret: &[u8; 32],
        source_nonce: &[u8; 32],
        destination_nonce: &[u8; 32],
        session: [u8; 16],
        transcript: [u8; 32],
        suite: Suite,
    ) -> Self {
        let mut salt = [0; 64];
        salt[..32].copy_from_slice(source_nonce);
        salt[32..].copy_from_slice(destination_nonce);
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(secret);
        Self { prk, session, transcript, suite }
    }

    /// One direction and stream, before its first group.
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
