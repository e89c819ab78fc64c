//! What shows a source's helper where its pages would go: an attestation report of the platform's firmware,
//! the certificate of the key that signed it, and what the guest's owner demands of both.
//!
//! Owns: where what lies in these, and which bytes of them can be. Must not know: how signatures are
//! checked, who calls. Sources: AMD's SEV API specification (55766), ATTESTATION and appendix C; the same
//! layouts in virtee/sev (`LegacyAttestationReport`, `Certificate`) and in sev-tool's sevapi.h. SEV puts no
//! data of the guest into a report: its one field that the asker chooses is `mnonce`.

use crate::config::SECRET_BYTES;
use crate::u32_at;

/// Bytes of the field of a report that whoever asks for it chooses.
pub const MNONCE_BYTES: usize = 16;
/// Bytes of a launch digest, SHA-256.
pub const LAUNCH_DIGEST_BYTES: usize = 32;
/// Bytes of a report.
pub const REPORT_BYTES: usize = 208;
/// Bytes of it that are signed: mnonce, launch digest, policy.
pub const REPORT_SIGNED_BYTES: usize = 52;
/// Bytes of a certificate of the firmware's.
pub const CERTIFICATE_BYTES: usize = 0x824;
/// Bytes of it that are signed: all before the two places for signatures.
pub const CERTIFICATE_SIGNED_BYTES: usize = 0x414;
/// Bytes of evidence: a report, and the certificate of the key that signed it.
pub const EVIDENCE_BYTES: usize = REPORT_BYTES + CERTIFICATE_BYTES;
/// Bytes of a public key on P-384 as it is told here: x and y, big-endian (SEC 1 without its first byte).
pub const KEY_BYTES: usize = 2 * COORDINATE_BYTES;
/// Bytes of a number below the order of P-384, or of its field.
pub const COORDINATE_BYTES: usize = 48;

/// Version of certificates.
pub const CERTIFICATE_VERSION: u32 = 1;
/// Key usage: none; a place for a signature that holds none.
pub const USAGE_INVALID: u32 = 0x1000;
/// Key usage: the platform's owner, who may sign the PEK's certificate.
pub const USAGE_OCA: u32 = 0x1001;
/// Key usage: the platform's endorsement key (PEK), which signs reports.
pub const USAGE_PEK: u32 = 0x1002;
/// Key usage: the platform's Diffie-Hellman key.
pub const USAGE_PDH: u32 = 0x1003;
/// Key usage: the chip's own key (CEK), which signs the PEK's certificate.
pub const USAGE_CEK: u32 = 0x1004;
/// Algorithm: ECDSA with SHA-256.
pub const ALGO_ECDSA_SHA256: u32 = 0x0002;
/// Algorithm: ECDH with SHA-256.
pub const ALGO_ECDH_SHA256: u32 = 0x0003;
/// Algorithm: ECDH with SHA-384.
pub const ALGO_ECDH_SHA384: u32 = 0x0103;
/// The curve P-384.
pub const CURVE_P384: u32 = 2;

/// Offset of a certificate's API version, major and minor; two reserved bytes follow.
pub const CERTIFICATE_API_AT: usize = 4;
/// Offset of its key's usage.
pub const USAGE_AT: usize = 8;
/// Offset of its key's algorithm.
pub const ALGO_AT: usize = 12;
/// Offset of its key's curve.
pub const CURVE_AT: usize = 16;
/// Offset of its key's x, little-endian, in [`NUMBER_ROOM`] bytes; y follows.
pub const POINT_AT: usize = 20;
/// Offsets of its places for signatures: usage and algorithm of the signing key, then the signature.
pub const SIGNATURES_AT: [usize; 2] = [0x414, 0x61c];
/// Bytes of such a place.
pub const SIGNATURE_PLACE_BYTES: usize = 0x208;
/// Room for a coordinate or for half of a signature: the bytes beyond [`COORDINATE_BYTES`] are zero.
pub const NUMBER_ROOM: usize = 72;

/// Offset of a report's launch digest.
const LAUNCH_DIGEST_AT: usize = MNONCE_BYTES;
/// Offset of its policy.
const POLICY_AT: usize = LAUNCH_DIGEST_AT + LAUNCH_DIGEST_BYTES;
/// Offset of the usage of the key that signed it, then its algorithm, then four reserved bytes.
const REPORT_USAGE_AT: usize = REPORT_SIGNED_BYTES;
/// Offset of the signature.
const REPORT_SIGNATURE_AT: usize = 0x40;

/// An ECDSA signature on P-384: r, then s, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature(pub [u8; KEY_BYTES]);

impl Signature {
    /// Writes it as the firmware does: both numbers little-endian, each in [`NUMBER_ROOM`] bytes.
    pub fn encode(&self) -> [u8; 2 * NUMBER_ROOM] {
        numbers(&self.0)
    }

    /// Reads one; `None` where a number is longer than the curve's.
    fn decode(bytes: &[u8]) -> Option<Self> {
        big_endian(bytes).map(Self)
    }
}

/// Two big-endian numbers as the firmware writes them.
pub fn numbers(pair: &[u8; KEY_BYTES]) -> [u8; 2 * NUMBER_ROOM] {
    let mut room = [0; 2 * NUMBER_ROOM];
    for (to, from) in room.chunks_exact_mut(NUMBER_ROOM).zip(pair.chunks_exact(COORDINATE_BYTES)) {
        to.iter_mut().zip(from.iter().rev()).for_each(|(to, from)| *to = *from);
    }
    room
}

/// The two numbers at the start of `bytes`, big-endian; `None` where they are longer than the curve's.
fn big_endian(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    let mut pair = [0; KEY_BYTES];
    let room = bytes.get(..2 * NUMBER_ROOM)?;
    for (to, from) in pair.chunks_exact_mut(COORDINATE_BYTES).zip(room.chunks_exact(NUMBER_ROOM)) {
        let (number, beyond) = from.split_at(COORDINATE_BYTES);
        if beyond.iter().any(|b| *b != 0) {
            return None;
        }
        to.iter_mut().zip(number.iter().rev()).for_each(|(to, from)| *to = *from);
    }
    Some(pair)
}

/// An attestation report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// What whoever asked for it put in.
    pub mnonce: [u8; MNONCE_BYTES],
    /// SHA-256 over all that the guest was launched with.
    pub launch_digest: [u8; LAUNCH_DIGEST_BYTES],
    /// The guest's policy.
    pub policy: u32,
    /// By the platform's PEK, over the fields above.
    pub signature: Signature,
}

impl Report {
    /// What is signed of it.
    pub fn signed(&self) -> [u8; REPORT_SIGNED_BYTES] {
        let mut b = [0; REPORT_SIGNED_BYTES];
        b[..LAUNCH_DIGEST_AT].copy_from_slice(&self.mnonce);
        b[LAUNCH_DIGEST_AT..POLICY_AT].copy_from_slice(&self.launch_digest);
        b[POLICY_AT..].copy_from_slice(&self.policy.to_le_bytes());
        b
    }

    /// Writes the report.
    pub fn encode(&self) -> [u8; REPORT_BYTES] {
        let mut b = [0; REPORT_BYTES];
        b[..REPORT_SIGNED_BYTES].copy_from_slice(&self.signed());
        b[REPORT_USAGE_AT..REPORT_USAGE_AT + 4].copy_from_slice(&USAGE_PEK.to_le_bytes());
        b[REPORT_USAGE_AT + 4..REPORT_USAGE_AT + 8].copy_from_slice(&ALGO_ECDSA_SHA256.to_le_bytes());
        b[REPORT_SIGNATURE_AT..].copy_from_slice(&self.signature.encode());
        b
    }

    /// Reads a report; `None` for one that is not signed by a PEK with ECDSA and SHA-256, or has reserved
    /// bytes set. Nothing of it is checked by that.
    pub fn decode(b: &[u8; REPORT_BYTES]) -> Option<Self> {
        if u32_at(b, REPORT_USAGE_AT) != USAGE_PEK
            || u32_at(b, REPORT_USAGE_AT + 4) != ALGO_ECDSA_SHA256
            || u32_at(b, REPORT_USAGE_AT + 8) != 0
        {
            return None;
        }
        let mut report = Self {
            mnonce: [0; MNONCE_BYTES],
            launch_digest: [0; LAUNCH_DIGEST_BYTES],
            policy: u32_at(b, POLICY_AT),
            signature: Signature::decode(&b[REPORT_SIGNATURE_AT..])?,
        };
        report.mnonce.copy_from_slice(&b[..LAUNCH_DIGEST_AT]);
        report.launch_digest.copy_from_slice(&b[LAUNCH_DIGEST_AT..POLICY_AT]);
        Some(report)
    }
}

/// The certificate of a platform's PEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PekCertificate<'a> {
    /// What is signed of it.
    pub signed: &'a [u8; CERTIFICATE_SIGNED_BYTES],
    /// The key.
    pub key: [u8; KEY_BYTES],
    /// What signed it, as far as that is the signature of a chip or an owner that can be checked here. Chip
    /// and owner may stand in either place.
    pub signatures: [Option<Signature>; 2],
}

impl<'a> PekCertificate<'a> {
    /// Reads a certificate; `None` for one that is not of a PEK for ECDSA with SHA-256 on P-384. Nothing of
    /// it is checked by that; what stands in a place for a signature that is of no use here is not looked at.
    pub fn decode(b: &'a [u8; CERTIFICATE_BYTES]) -> Option<Self> {
        let key = certified_key(b, USAGE_PEK, &[ALGO_ECDSA_SHA256])?;
        let signatures = SIGNATURES_AT.map(|at| {
            let place = &b[at..at + SIGNATURE_PLACE_BYTES];
            let (usage, algo) = (u32_at(place, 0), u32_at(place, 4));
            let of_use = [USAGE_CEK, USAGE_OCA].contains(&usage)
                && algo == ALGO_ECDSA_SHA256
                && place[8 + 2 * NUMBER_ROOM..].iter().all(|b| *b == 0);
            if of_use { Signature::decode(&place[8..]) } else { None }
        });
        Some(Self { signed: b.first_chunk()?, key, signatures })
    }
}

/// The key of a certificate of the firmware's if it is on P-384, for `usage` and one of `algorithms`, with no
/// reserved byte set; whether it is a point of the curve, nobody has looked.
pub fn certified_key(b: &[u8; CERTIFICATE_BYTES], usage: u32, algorithms: &[u32]) -> Option<[u8; KEY_BYTES]> {
    let right = u32_at(b, 0) == CERTIFICATE_VERSION
        && b[CERTIFICATE_API_AT + 2..USAGE_AT] == [0, 0]
        && u32_at(b, USAGE_AT) == usage
        && algorithms.contains(&u32_at(b, ALGO_AT))
        && u32_at(b, CURVE_AT) == CURVE_P384
        && b[POINT_AT + 2 * NUMBER_ROOM..CERTIFICATE_SIGNED_BYTES].iter().all(|b| *b == 0);
    if right { big_endian(&b[POINT_AT..]) } else { None }
}

/// First byte of a release part that demands evidence.
const DEMANDED: u8 = 1;
/// First byte of one that does not.
const NOT_DEMANDED: u8 = 2;
/// Most keys of a [`Release`].
pub const RELEASE_KEYS: usize = 4;
/// Most launch digests of a [`Release`].
pub const RELEASE_LAUNCHES: usize = 4;
/// Offset of the release part in the secret page: behind magic and secret.
pub const RELEASE_AT: usize = 8 + SECRET_BYTES;
/// Bytes of an encoded [`Release`].
pub const RELEASE_BYTES: usize = 8 + RELEASE_KEYS * KEY_BYTES + RELEASE_LAUNCHES * LAUNCH_DIGEST_BYTES;
/// Bytes of a secret page that are used: a multiple of what LAUNCH_SECRET moves.
pub const SECRET_SPAN: usize = RELEASE_AT + RELEASE_BYTES;
const _: () = assert!(SECRET_SPAN.is_multiple_of(16) && SECRET_SPAN <= crate::PAGE_BYTES);

/// What a guest's owner demands before its pages leave: delivered together with the guest's secret, so that
/// no host has a say in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    keys: [[u8; KEY_BYTES]; RELEASE_KEYS],
    key_count: usize,
    launches: [[u8; LAUNCH_DIGEST_BYTES]; RELEASE_LAUNCHES],
    launch_count: usize,
}

impl Release {
    /// No evidence is demanded.
    pub const NOT_DEMANDED: Self = Self {
        keys: [[0; KEY_BYTES]; RELEASE_KEYS],
        key_count: 0,
        launches: [[0; LAUNCH_DIGEST_BYTES]; RELEASE_LAUNCHES],
        launch_count: 0,
    };

    /// Evidence is demanded: of a platform whose PEK one of `keys` has certified, and of a guest that was
    /// launched as one of `launches`. `None` for none or too many of either.
    pub fn demanded(keys: &[[u8; KEY_BYTES]], launches: &[[u8; LAUNCH_DIGEST_BYTES]]) -> Option<Self> {
        let mut release = Self::NOT_DEMANDED;
        if keys.is_empty() || launches.is_empty() {
            return None;
        }
        release.keys.get_mut(..keys.len())?.copy_from_slice(keys);
        release.launches.get_mut(..launches.len())?.copy_from_slice(launches);
        (release.key_count, release.launch_count) = (keys.len(), launches.len());
        Some(release)
    }

    /// Whether evidence is demanded.
    pub const fn is_demanded(&self) -> bool {
        self.key_count != 0
    }

    /// Keys of which one must have signed the certificate of the peer's PEK.
    pub fn keys(&self) -> &[[u8; KEY_BYTES]] {
        &self.keys[..self.key_count]
    }

    /// What the peer's guest may have been launched as.
    pub fn launches(&self) -> &[[u8; LAUNCH_DIGEST_BYTES]] {
        &self.launches[..self.launch_count]
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; RELEASE_BYTES] {
        let mut b = [0; RELEASE_BYTES];
        b[0] = if self.is_demanded() { DEMANDED } else { NOT_DEMANDED };
        b[1] = self.key_count as u8;
        b[2] = self.launch_count as u8;
        let (keys, launches) = b[8..].split_at_mut(RELEASE_KEYS * KEY_BYTES);
        keys.copy_from_slice(self.keys.as_flattened());
        launches.copy_from_slice(self.launches.as_flattened());
        b
    }

    /// Reads one; `None` for what none encodes to, of which nobody can say what was meant. Zeroes are none: a
    /// host that puts the page's blocks back to what they were before the owner wrote them ends nothing of
    /// what he demands.
    pub fn decode(b: &[u8; RELEASE_BYTES]) -> Option<Self> {
        let (key_count, launch_count) = (usize::from(b[1]), usize::from(b[2]));
        let mut release = Self { key_count, launch_count, ..Self::NOT_DEMANDED };
        let counts = match b[0] {
            NOT_DEMANDED => key_count == 0 && launch_count == 0,
            DEMANDED => {
                (1..=RELEASE_KEYS).contains(&key_count) && (1..=RELEASE_LAUNCHES).contains(&launch_count)
            }
            _ => false,
        };
        if !counts {
            return None;
        }
        let (keys, launches) = b[8..].split_at(RELEASE_KEYS * KEY_BYTES);
        release.keys.as_flattened_mut().copy_from_slice(keys);
        release.launches.as_flattened_mut().copy_from_slice(launches);
        let unused = release.keys[key_count..].as_flattened().iter();
        let unused = unused.chain(release.launches[launch_count..].as_flattened()).chain(&b[3..8]);
        unused.copied().all(|b| b == 0).then_some(release)
    }
}

/// Whether a guest with `policy` may get the pages of one with `own`: it has every flag of that one and
/// NODBG, and asks for no older version of the API.
pub const fn is_as_strict(policy: u32, own: u32) -> bool {
    let (flags, wanted) = (policy & 0xffff, own & 0xffff | crate::config::POLICY_NODBG);
    // Bits 16 to 23 are the major version, 24 to 31 the minor one.
    flags & wanted == wanted && (policy >> 16).swap_bytes() >= (own >> 16).swap_bytes()
}
