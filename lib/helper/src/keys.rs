//! Session keys: one for each direction and stream, from the guest's migration secret and both nonces.
//!
//! HKDF-SHA256 (RFC 5869): salt = source nonce || destination nonce, input = secret, info = label, session,
//! transcript, direction, stream. A new nonce of either helper gives new keys, so a sequence that starts at
//! 0 again never meets an old key.

use mirrorvm_abi::record::{Binding, Direction, HEADER_BYTES, Header, TAG_BYTES};
use ring::{aead, hkdf};

const LABEL: &[u8] = b"mirrorvm session key v1";

/// What keys are derived from; dropped when they are.
pub(crate) struct KeySchedule {
    prk: hkdf::Prk,
    session: [u8; 16],
    transcript: [u8; 32],
}

struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

impl KeySchedule {
    pub fn new(
        secret: &[u8; 32],
        source_nonce: &[u8; 32],
        destination_nonce: &[u8; 32],
        session: [u8; 16],
        transcript: [u8; 32],
    ) -> Self {
        let mut salt = [0; 64];
        salt[..32].copy_from_slice(source_nonce);
        salt[32..].copy_from_slice(destination_nonce);
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(secret);
        Self { prk, session, transcript }
    }

    /// The key of one direction and stream, with its counter at 0.
    pub fn sealer(&self, direction: Direction, stream: u16) -> Option<Sealer> {
        let dir = [direction as u8];
        let stream_bytes = stream.to_le_bytes();
        let info: [&[u8]; 5] = [LABEL, &self.session, &self.transcript, &dir, &stream_bytes];
        let mut raw = [0; 32];
        self.prk.expand(&info, KeyLength).ok()?.fill(&mut raw).ok()?;
        let key = aead::UnboundKey::new(&aead::AES_256_GCM, &raw).ok()?;
        raw.fill(0);
        core::hint::black_box(&mut raw);
        let binding = Binding { session: self.session, direction };
        Some(Sealer { key: aead::LessSafeKey::new(key), binding, sequence: 0 })
    }
}

/// A key with the counter that keeps its nonces apart.
pub(crate) struct Sealer {
    key: aead::LessSafeKey,
    binding: Binding,
    sequence: u64,
}

/// The counter is used up; nothing was sealed.
pub(crate) struct Exhausted;

impl Sealer {
    /// Seals `body` in place under `header`, whose sequence is filled in here and spent whatever happens.
    pub fn seal(
        &mut self,
        mut header: Header,
        body: &mut [u8],
    ) -> Result<([u8; HEADER_BYTES], [u8; TAG_BYTES]), Exhausted> {
        header.sequence = self.sequence;
        // Spent before use, so that no failure can bring a nonce back.
        self.sequence = self.sequence.checked_add(1).ok_or(Exhausted)?;
        let bytes = header.encode();
        let nonce = aead::Nonce::assume_unique_for_key(header.nonce());
        let aad = aead::Aad::from(self.binding.aad(&bytes));
        let tag = self.key.seal_in_place_separate_tag(nonce, aad, body).map_err(|_| Exhausted)?;
        let mut out = [0; TAG_BYTES];
        out.copy_from_slice(tag.as_ref());
        Ok((bytes, out))
    }

    /// Whether `header` is the record expected next.
    pub const fn expects(&self, header: &Header) -> bool {
        header.sequence == self.sequence
    }

    /// Opens `sealed` (ciphertext, then tag) in place; true when it is genuine, whatever its sequence.
    pub fn open_any(&self, header: &Header, sealed: &mut [u8]) -> bool {
        let nonce = aead::Nonce::assume_unique_for_key(header.nonce());
        let aad = aead::Aad::from(self.binding.aad(&header.encode()));
        self.key.open_in_place(nonce, aad, sealed).is_ok()
    }

    /// The same for the record expected next; the sequence then moves on.
    pub fn open(&mut self, header: &Header, sealed: &mut [u8]) -> bool {
        let genuine = self.expects(header) && self.open_any(header, sealed);
        if genuine {
            self.sequence += 1;
        }
        genuine
    }
}
