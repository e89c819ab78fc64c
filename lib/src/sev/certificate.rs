//! Certificates of Diffie-Hellman keys (PDH, and a guest owner's) in the firmware's encoding, and those keys.
//!
//! Owns: the 2084 bytes of a version 1 certificate (SEV API specification, appendix C; layout as in
//! sev-tool's sevapi.h) as far as Diffie-Hellman keys go, ECDH on P-384. Must not know: chains. A certificate
//! made here carries no signature: the model has no PEK, and a guest owner's key needs none. Who speaks to
//! real hardware must verify the chain PDH, PEK, CEK, ASK, ARK before trusting a PDH; nothing here does.

use p384::elliptic_curve::sec1::ToSec1Point;
use p384::{PublicKey, SecretKey};
use zeroize::Zeroizing;

use super::random::Random;
use super::session::part;
use super::{PdhCert, SevError};

/// Bytes of a certificate.
pub const CERTIFICATE_BYTES: usize = 0x824;

const VERSION: u32 = 1;
const USAGE_INVALID: u32 = 0x1000;
const USAGE_PDH: u32 = 0x1003;
const ALGO_ECDH_SHA256: u32 = 0x0003;
const ALGO_ECDH_SHA384: u32 = 0x0103;
const CURVE_P384: u32 = 2;

const USAGE_AT: usize = 8;
const ALGO_AT: usize = 12;
const CURVE_AT: usize = 16;
const X_AT: usize = 20;
const Y_AT: usize = 92;
const POINT_END: usize = 164;
const SIG1_USAGE_AT: usize = 0x414;
const SIG2_USAGE_AT: usize = 0x61c;
/// Bytes of a coordinate; 72 are reserved for it.
const COORDINATE: usize = 48;

/// A private Diffie-Hellman key and its certificate. The key is wiped when dropped and never printed.
pub(crate) struct DhKey {
    secret: SecretKey,
    certificate: PdhCert,
}

impl std::fmt::Debug for DhKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DhKey")
    }
}

impl DhKey {
    pub fn generate(random: &mut Random) -> Self {
        let secret = loop {
            let mut bytes = Zeroizing::new([0; COORDINATE]);
            random.fill(&mut *bytes);
            // Zero, or not below the group's order: once in 2^190.
            if let Ok(secret) = SecretKey::from_slice(&*bytes) {
                break secret;
            }
        };
        let certificate = encode(&secret.public_key());
        Self { secret, certificate }
    }

    pub fn certificate(&self) -> &PdhCert {
        &self.certificate
    }

    /// The secret shared with the holder of `peer`'s key: the point's x, big-endian.
    ///
    /// # Errors
    /// [`SevError::Malformed`] for what is no certificate of a P-384 Diffie-Hellman key.
    pub fn agree(&self, peer: &PdhCert) -> Result<Zeroizing<[u8; COORDINATE]>, SevError> {
        let shared = self.secret.diffie_hellman(&decode(peer)?);
        let mut z = Zeroizing::new([0; COORDINATE]);
        z.copy_from_slice(shared.raw_secret_bytes());
        Ok(z)
    }
}

fn encode(key: &PublicKey) -> PdhCert {
    let mut bytes = vec![0; CERTIFICATE_BYTES];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, VERSION);
    put(USAGE_AT, USAGE_PDH);
    put(ALGO_AT, ALGO_ECDH_SHA256);
    put(CURVE_AT, CURVE_P384);
    put(SIG1_USAGE_AT, USAGE_INVALID);
    put(SIG2_USAGE_AT, USAGE_INVALID);
    let point = key.to_sec1_point(false);
    // 0x04, x, y; big-endian there, little-endian here.
    let (x, y) = point.as_bytes()[1..].split_at(COORDINATE);
    for (at, coordinate) in [(X_AT, x), (Y_AT, y)] {
        bytes[at..at + COORDINATE].iter_mut().zip(coordinate.iter().rev()).for_each(|(to, from)| *to = *from);
    }
    PdhCert(bytes)
}

fn decode(certificate: &PdhCert) -> Result<PublicKey, SevError> {
    let bad = |why| SevError::Malformed { what: "Diffie-Hellman certificate", why };
    let bytes = &certificate.0[..];
    if bytes.len() != CERTIFICATE_BYTES {
        return Err(bad("is not 2084 bytes long"));
    }
    let get = |at| u32::from_le_bytes(part(bytes, at));
    if get(0) != VERSION {
        return Err(bad("is not of version 1"));
    }
    if bytes[6..8] != [0, 0] {
        return Err(bad("has reserved bytes set"));
    }
    if get(USAGE_AT) != USAGE_PDH {
        return Err(bad("is not of a Diffie-Hellman key"));
    }
    if ![ALGO_ECDH_SHA256, ALGO_ECDH_SHA384].contains(&get(ALGO_AT)) {
        return Err(bad("is not for ECDH"));
    }
    if get(CURVE_AT) != CURVE_P384 {
        return Err(bad("is not on P-384"));
    }
    let padding = [X_AT + COORDINATE..Y_AT, Y_AT + COORDINATE..POINT_END, POINT_END..SIG1_USAGE_AT];
    if padding.into_iter().any(|span| bytes[span].iter().any(|b| *b != 0)) {
        return Err(bad("has reserved bytes set"));
    }
    let mut point = [0x04; 1 + 2 * COORDINATE];
    for (to, at) in [(1, X_AT), (1 + COORDINATE, Y_AT)] {
        let coordinate = bytes[at..at + COORDINATE].iter().rev();
        point[to..to + COORDINATE].iter_mut().zip(coordinate).for_each(|(to, from)| *to = *from);
    }
    PublicKey::from_sec1_bytes(&point).map_err(|_| bad("has no point of the curve"))
}

impl PdhCert {
    /// Checks that these bytes are a certificate of a P-384 Diffie-Hellman key. Signatures are not looked at.
    ///
    /// # Errors
    /// [`SevError::Malformed`].
    pub fn check(&self) -> Result<(), SevError> {
        decode(self).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_and_a_third_does_not() {
        let mut random = Random::seeded(1);
        let [a, b, c] = [(); 3].map(|()| DhKey::generate(&mut random));
        let ab = a.agree(b.certificate()).unwrap();
        assert_eq!(*ab, *b.agree(a.certificate()).unwrap());
        assert_ne!(*ab, *c.agree(a.certificate()).unwrap());
        assert_eq!(a.certificate().0.len(), 2084);
        assert_eq!(format!("{a:?}"), "DhKey");
    }

    #[test]
    fn the_layout_is_the_published_one() {
        let key = DhKey::generate(&mut Random::seeded(2));
        let bytes = &key.certificate().0;
        assert_eq!(bytes[..20], [1, 0, 0, 0, 0, 0, 0, 0, 3, 0x10, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(
            (&bytes[0x414..0x418], &bytes[0x61c..0x620]),
            (&[0, 0x10, 0, 0][..], &[0, 0x10, 0, 0][..])
        );
        let big_endian = key.secret.public_key().to_sec1_point(false);
        let x: Vec<u8> = bytes[20..68].iter().rev().copied().collect();
        assert_eq!(big_endian.as_bytes()[1..49], x);
    }

    #[test]
    fn what_is_no_certificate_is_refused_and_nothing_panics() {
        let good = DhKey::generate(&mut Random::seeded(3)).certificate().clone();
        good.check().unwrap();
        for len in [0, 1, CERTIFICATE_BYTES - 1, CERTIFICATE_BYTES + 1] {
            assert!(matches!(PdhCert(vec![1; len]).check(), Err(SevError::Malformed { .. })), "{len}");
        }
        // Every byte before the signatures matters, but those that hold the API version.
        for at in (0..SIG1_USAGE_AT).filter(|at| ![4, 5].contains(at)) {
            let mut bad = good.clone();
            bad.0[at] ^= 0x40;
            assert!(bad.check().is_err(), "byte {at}");
        }
    }
    proptest::proptest! {
        #[test]
        fn bytes_from_anywhere_are_answered(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..CERTIFICATE_BYTES + 2),
            whole: bool, head: bool,
        ) {
            if whole {
                bytes.resize(CERTIFICATE_BYTES, 0);
            }
            if whole && head {
                let good = DhKey::generate(&mut Random::seeded(3));
                bytes[..X_AT].copy_from_slice(&good.certificate().0[..X_AT]);
            }
            // A random point is on the curve once in 2^384.
            proptest::prop_assert!(PdhCert(bytes).check().is_err());
        }
    }
}
