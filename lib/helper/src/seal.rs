//! Groups: sealed and opened under a key of their own.
//!
//! Owns: how a group's key comes from its stream's secret and its header, the counter of groups, the suites'
//! ciphers. Must not know: where pieces lie, what is in them, where random bytes come from. The format is in
//! `mirrorvm_abi::record`.

use aes_gcm_siv::aead::AeadInOut;
use aes_gcm_siv::{Aes256GcmSiv, KeyInit};
use mirrorvm_abi::record::{
    GROUP_LABEL, HEADER_BYTES, Header, Kind, LISTED_BYTES, RANDOM_BYTES, Suite, TAG_BYTES, piece_aad,
    piece_nonce,
};
use ring::{aead, hkdf};

/// Bytes of every secret and key.
pub(crate) struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

/// Overwrites a key that has been used.
pub(crate) fn wipe(key: &mut [u8; 32]) {
    key.fill(0);
    core::hint::black_box(key);
}

/// One direction and stream of a session: its secret, and the counter that keeps its groups in order.
#[derive(Clone)]
pub(crate) struct Sealer {
    secret: hkdf::Prk,
    suite: Suite,
    stream: u16,
    sequence: u64,
}

impl Drop for Sealer {
    fn drop(&mut self) {
        overwrite(&mut self.secret);
    }
}

/// Overwrites a secret where it lies. Its type does not wipe itself, and its bytes cannot be reached: another
/// value takes their place.
pub(crate) fn overwrite(secret: &mut hkdf::Prk) {
    *secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &[0; 32]);
    core::hint::black_box(secret);
}

/// The counter is used up; nothing was sealed.
#[derive(Debug)]
pub(crate) struct Exhausted;

impl Sealer {
    /// The stream whose secret is `secret`, before its first group.
    pub const fn new(secret: hkdf::Prk, suite: Suite, stream: u16) -> Self {
        Self { secret, suite, stream, sequence: 0 }
    }

    /// The next group to be sealed. `random` is fresh from the processor: it alone keeps this group's key
    /// apart from every other's when what is in memory was there before.
    pub fn next(
        &mut self,
        kind: Kind,
        epoch: u32,
        count: u16,
        random: [u8; RANDOM_BYTES],
    ) -> Result<Group, Exhausted> {
        let (suite, stream, sequence) = (self.suite, self.stream, self.sequence);
        // Spent before use, so that no failure makes two groups take one place.
        self.sequence = sequence.checked_add(1).ok_or(Exhausted)?;
        let header = Header { kind, suite, stream, count, epoch, sequence, random };
        self.group(&header).ok_or(Exhausted)
    }

    /// Whether this is a group of this stream and session, at whatever place.
    pub fn is_of(&self, header: &Header) -> bool {
        header.stream == self.stream && header.suite == self.suite
    }

    /// Whether this is the group that comes next.
    pub fn expects(&self, header: &Header) -> bool {
        self.is_of(header) && header.sequence == self.sequence
    }

    /// The group that was expected has been opened, every piece of it.
    pub const fn opened(&mut self) {
        // It was found at this place, so somebody has counted beyond it.
        self.sequence = self.sequence.saturating_add(1);
    }

    /// The group that begins with this header: one key schedule.
    pub fn group(&self, header: &Header) -> Option<Group> {
        let header = header.encode();
        let mut key = [0; 32];
        self.secret.expand(&[GROUP_LABEL, &header], KeyLength).ok()?.fill(&mut key).ok()?;
        let cipher = match self.suite {
            Suite::Aes256Gcm => {
                let key = aead::UnboundKey::new(&aead::AES_256_GCM, &key).ok()?;
                Cipher::Gcm(aead::LessSafeKey::new(key))
            }
            Suite::Aes256GcmSiv => Cipher::GcmSiv(Aes256GcmSiv::new(&key.into())),
        };
        wipe(&mut key);
        Some(Group { header, cipher })
    }
}

/// A group that is being sealed or opened.
pub(crate) struct Group {
    header: [u8; HEADER_BYTES],
    cipher: Cipher,
}

/// On the stack for one request: there is no heap.
enum Cipher {
    Gcm(aead::LessSafeKey),
    GcmSiv(Aes256GcmSiv),
}

impl Group {
    /// The header as it travels.
    pub const fn header(&self) -> &[u8; HEADER_BYTES] {
        &self.header
    }

    /// Seals piece `index` in place and gives its tag. Each index once.
    pub fn seal(
        &self,
        index: usize,
        listed: [u8; LISTED_BYTES],
        body: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], Exhausted> {
        let (nonce, aad) = (piece_nonce(index), piece_aad(index, listed));
        let mut out = [0; TAG_BYTES];
        match &self.cipher {
            Cipher::Gcm(key) => {
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, aead::Aad::from(aad), body);
                out.copy_from_slice(tag.map_err(|_| Exhausted)?.as_ref());
            }
            Cipher::GcmSiv(cipher) => {
                let tag = cipher.encrypt_inout_detached(&nonce.into(), &aad, body.into());
                out.copy_from_slice(&tag.map_err(|_| Exhausted)?);
            }
        }
        Ok(out)
    }

    /// Opens piece `index`, ciphertext then tag, in place; false when it is not genuine, and then what is in
    /// there is nobody's plaintext.
    pub fn open(&self, index: usize, listed: [u8; LISTED_BYTES], sealed: &mut [u8]) -> bool {
        let (nonce, aad) = (piece_nonce(index), piece_aad(index, listed));
        match &self.cipher {
            Cipher::Gcm(key) => {
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, aead::Aad::from(aad), sealed).is_ok()
            }
            Cipher::GcmSiv(cipher) => {
                let Some((body, tag)) = sealed.split_last_chunk_mut::<TAG_BYTES>() else { return false };
                let tag = (*tag).into();
                cipher.decrypt_inout_detached(&nonce.into(), &aad, body.into(), &tag).is_ok()
            }
        }
    }
}
