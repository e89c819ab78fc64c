//! The cryptography of a session between a platform and a guest owner or another platform: derived keys,
//! wrapped transport keys, packets, measurements.
//!
//! Owns: the computations, and the byte layouts of what travels. Must not know: which command uses them,
//! guests, memory. Sources: AMD's SEV API specification (publication 55766, chapter 2 on keys, appendix A on
//! packets); the session code of the `sev` crate (virtee/sev, Apache-2.0), against whose published vectors
//! this is tested.
//!
//! A packet's MAC covers neither an address nor a number: whoever carries packets of equal length may swap,
//! repeat and drop them. That is the specification's; order must come from the layer above.

use aes::Aes128;
use aes::cipher::{Array, KeyIvInit, StreamCipher};
use ring::hmac;
use zeroize::{Zeroize, Zeroizing};

use super::random::Random;
use super::{FirmwareError, Measurement, PacketHeader, Policy, Session};
use crate::memory::Secret;

/// Flag of a packet's header: its content is compressed. Nothing here compresses; such a packet is refused.
pub const COMPRESSED: u32 = 1 << 0;

/// Bytes of a session as the firmware reads it.
pub const SESSION_BYTES: usize = 128;
/// Bytes of a packet's header.
pub const HEADER_BYTES: usize = 52;
/// Bytes of a measurement.
pub const MEASUREMENT_BYTES: usize = 48;

/// A 128-bit key, wiped when dropped and never printed.
#[derive(Clone)]
pub(crate) struct Key128(Secret<16>);

impl std::fmt::Debug for Key128 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key128")
    }
}

impl Key128 {
    #[cfg(test)]
    pub fn new(bytes: [u8; 16]) -> Self {
        Self(Secret::copied(&bytes))
    }

    /// Room for a key that is yet to come.
    fn empty() -> Self {
        Self(Secret::filled(|_| {}))
    }

    /// Draws a new key.
    fn random(random: &mut Random) -> Self {
        let mut key = Self::empty();
        random.fill(&mut *key.0);
        key
    }

    /// HMAC-SHA256 over `parts`, one after the other.
    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        hmac_sha256(&*self.0, parts)
    }

    /// Whether `mac` is that of `parts`, in time that does not depend on it.
    fn verify(&self, parts: &[&[u8]], mac: &[u8; 32]) -> Result<(), FirmwareError> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*self.0);
        hmac::verify(&key, &parts.concat(), mac).map_err(|_| FirmwareError::BadMeasurement)
    }

    /// AES-128 in counter mode; encrypts and decrypts. The whole IV is the counter block, big-endian.
    fn apply(&self, iv: &[u8; 16], data: &mut [u8]) {
        let (key, iv) = (Array::from(*self.0), Array::from(*iv));
        ctr::Ctr128BE::<Aes128>::new(&key, &iv).apply_keystream(data);
    }
}

fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    parts.iter().for_each(|part| context.update(part));
    let mut mac = [0; 32];
    mac.copy_from_slice(context.sign().as_ref());
    mac
}

/// NIST SP 800-108, 5.1: key derivation in counter mode with HMAC-SHA256. One block of output is enough for
/// the 128-bit keys here. The numbers are little-endian: the firmware's choice.
fn derive(key: &[u8], label: &str, context: &[u8]) -> Key128 {
    const BITS: u32 = 128;
    let mut block =
        hmac_sha256(key, &[&1u32.to_le_bytes(), label.as_bytes(), &[0], context, &BITS.to_le_bytes()]);
    let mut derived = Key128::empty();
    derived.0.copy_from_slice(&block[..16]);
    block.zeroize();
    derived
}

/// What both ends of a session derive from the Diffie-Hellman secret: encrypts and authenticates the
/// transport keys.
pub(crate) struct WrappingKeys {
    kek: Key128,
    kik: Key128,
}

impl WrappingKeys {
    /// From the shared secret `z` and the session's nonce.
    pub fn derive(z: &[u8], nonce: &[u8; 16]) -> Self {
        let master = derive(z, "sev-master-secret", nonce);
        Self { kek: derive(&*master.0, "sev-kek", &[]), kik: derive(&*master.0, "sev-kik", &[]) }
    }
}

/// The keys of a session's packets: TEK encrypts them, TIK authenticates them.
#[derive(Clone, Debug)]
pub(crate) struct TransportKeys {
    tek: Key128,
    tik: Key128,
}

/// What a packet is for; the first byte that its MAC covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PacketKind<'a> {
    /// LAUNCH_SECRET. Bound to the launch by its measurement.
    Secret {
        /// The MAC that LAUNCH_MEASURE gave.
        measurement: &'a [u8; 32],
    },
    /// SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA.
    Data,
}

impl<'a> PacketKind<'a> {
    const fn code(self) -> u8 {
        match self {
            Self::Secret { .. } => 0x01,
            Self::Data => 0x02,
        }
    }

    fn trailer(self) -> &'a [u8] {
        match self {
            Self::Secret { measurement } => measurement,
            Self::Data => &[],
        }
    }
}

impl TransportKeys {
    /// Draws new keys.
    pub fn random(random: &mut Random) -> Self {
        Self { tek: Key128::random(random), tik: Key128::random(random) }
    }

    #[cfg(test)]
    pub fn new(tek: [u8; 16], tik: [u8; 16]) -> Self {
        Self { tek: Key128::new(tek), tik: Key128::new(tik) }
    }

    /// Wraps the keys for whoever derives the same wrapping keys.
    pub fn wrap(&self, with: &WrappingKeys, nonce: [u8; 16], wrap_iv: [u8; 16], policy: Policy) -> Session {
        let mut wrap_tk = [0; 32];
        wrap_tk[..16].copy_from_slice(&*self.tek.0);
        wrap_tk[16..].copy_from_slice(&*self.tik.0);
        with.kek.apply(&wrap_iv, &mut wrap_tk);
        Session {
            nonce,
            wrap_tk,
            wrap_iv,
            wrap_mac: with.kik.mac(&[&wrap_tk]),
            policy_mac: self.tik.mac(&[&policy.0.to_le_bytes()]),
        }
    }

    /// Unwraps the keys of `session`, which was made for `policy`.
    ///
    /// # Errors
    /// BAD_MEASUREMENT: a MAC is wrong. Which one is not told.
    pub fn unwrap(with: &WrappingKeys, session: &Session, policy: Policy) -> Result<Self, FirmwareError> {
        with.kik.verify(&[&session.wrap_tk], &session.wrap_mac)?;
        let mut plain = Zeroizing::new(session.wrap_tk);
        with.kek.apply(&session.wrap_iv, &mut *plain);
        let (mut tek, mut tik) = (Key128::empty(), Key128::empty());
        tek.0.copy_from_slice(&plain[..16]);
        tik.0.copy_from_slice(&plain[16..]);
        tik.verify(&[&policy.0.to_le_bytes()], &session.policy_mac)?;
        Ok(Self { tek, tik })
    }

    /// Makes a packet of `plain`.
    pub fn seal(&self, kind: PacketKind<'_>, iv: [u8; 16], plain: &[u8]) -> (PacketHeader, Vec<u8>) {
        let mut packet = plain.to_vec();
        self.tek.apply(&iv, &mut packet);
        let mac = covered(kind, 0, &iv, &packet, |parts| self.tik.mac(parts));
        (PacketHeader { flags: 0, iv, mac }, packet)
    }

    /// Opens a packet. The answer is wiped when dropped.
    ///
    /// # Errors
    /// BAD_MEASUREMENT when header or packet are not what was sealed, UNSUPPORTED for an authentic packet
    /// with flags.
    pub fn open(
        &self,
        kind: PacketKind<'_>,
        header: &PacketHeader,
        packet: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, FirmwareError> {
        covered(kind, header.flags, &header.iv, packet, |parts| self.tik.verify(parts, &header.mac))?;
        if header.flags != 0 {
            return Err(FirmwareError::Unsupported);
        }
        let mut plain = Zeroizing::new(packet.to_vec());
        self.tek.apply(&header.iv, &mut plain);
        Ok(plain)
    }

    /// The MAC of a launch, as LAUNCH_MEASURE gives it.
    pub fn measure(&self, launch: &Launch<'_>, nonce: [u8; 16]) -> Measurement {
        Measurement { mac: launch.covered(&nonce, |parts| self.tik.mac(parts)), nonce }
    }

    /// Whether `measurement` is of this `launch`.
    ///
    /// # Errors
    /// BAD_MEASUREMENT.
    pub fn verify(&self, launch: &Launch<'_>, measurement: &Measurement) -> Result<(), FirmwareError> {
        launch.covered(&measurement.nonce, |parts| self.tik.verify(parts, &measurement.mac))
    }
}

/// What a measurement vouches for.
#[derive(Clone, Copy)]
pub(crate) struct Launch<'a> {
    /// API version of the firmware.
    pub api: (u8, u8),
    /// Build number of the firmware.
    pub build: u8,
    /// The policy of the guest.
    pub policy: Policy,
    /// SHA-256 over all that was measured.
    pub digest: &'a [u8; 32],
}

impl Launch<'_> {
    fn covered<T>(&self, nonce: &[u8; 16], f: impl FnOnce(&[&[u8]]) -> T) -> T {
        let versions = [0x04, self.api.0, self.api.1, self.build];
        f(&[&versions, &self.policy.0.to_le_bytes(), self.digest, nonce])
    }
}

/// Gives `f` what a packet's MAC covers.
fn covered<T>(
    kind: PacketKind<'_>,
    flags: u32,
    iv: &[u8; 16],
    packet: &[u8],
    f: impl FnOnce(&[&[u8]]) -> T,
) -> T {
    // Guest length and transport length: equal, as nothing is compressed.
    let len = (packet.len() as u32).to_le_bytes();
    f(&[&[kind.code()], &flags.to_le_bytes(), iv, &len, &len, packet, kind.trailer()])
}

/// Copies `bytes[at..at + N]` out.
pub(crate) fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

impl Session {
    /// As the firmware reads it.
    pub fn to_bytes(&self) -> [u8; SESSION_BYTES] {
        let mut bytes = [0; SESSION_BYTES];
        bytes[..16].copy_from_slice(&self.nonce);
        bytes[16..48].copy_from_slice(&self.wrap_tk);
        bytes[48..64].copy_from_slice(&self.wrap_iv);
        bytes[64..96].copy_from_slice(&self.wrap_mac);
        bytes[96..].copy_from_slice(&self.policy_mac);
        bytes
    }

    /// From the firmware's bytes. All are possible sessions; the MACs tell.
    pub fn from_bytes(bytes: &[u8; SESSION_BYTES]) -> Self {
        Self {
            nonce: part(bytes, 0),
            wrap_tk: part(bytes, 16),
            wrap_iv: part(bytes, 48),
            wrap_mac: part(bytes, 64),
            policy_mac: part(bytes, 96),
        }
    }
}

impl PacketHeader {
    /// As the firmware reads it.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[4..20].copy_from_slice(&self.iv);
        bytes[20..].copy_from_slice(&self.mac);
        bytes
    }

    /// From the firmware's bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self { flags: u32::from_le_bytes(part(bytes, 0)), iv: part(bytes, 4), mac: part(bytes, 20) }
    }
}

impl Measurement {
    /// As the firmware writes it.
    pub fn to_bytes(&self) -> [u8; MEASUREMENT_BYTES] {
        let mut bytes = [0; MEASUREMENT_BYTES];
        bytes[..32].copy_from_slice(&self.mac);
        bytes[32..].copy_from_slice(&self.nonce);
        bytes
    }

    /// From the firmware's bytes.
    pub fn from_bytes(bytes: &[u8; MEASUREMENT_BYTES]) -> Self {
        Self { mac: part(bytes, 0), nonce: part(bytes, 32) }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
