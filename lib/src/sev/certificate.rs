//! Certificates in the firmware's encoding, and keys that have some: Diffie-Hellman keys (PDH, and a guest
//! owner's), and the model's PEK, which signs attestation reports.
//!
//! Owns: the 2084 bytes of a version 1 certificate (SEV API specification, appendix C; layout as in
//! sev-tool's sevapi.h, offsets in `mirrorvm_abi::evidence`), ECDH and ECDSA on P-384. Must not know: what is
//! reported, who believes it. Certificates of Diffie-Hellman keys that are made here carry no signature. Who
//! speaks to real hardware must verify the chain PDH, PEK, CEK, ASK, ARK before trusting a PDH; nothing here
//! does.

use mirrorvm_abi::evidence::{
    ALGO_AT, ALGO_ECDH_SHA256, ALGO_ECDH_SHA384, ALGO_ECDSA_SHA256, CERTIFICATE_BYTES,
    CERTIFICATE_SIGNED_BYTES as SIG1_USAGE_AT, CERTIFICATE_VERSION as VERSION,
    COORDINATE_BYTES as COORDINATE, CURVE_AT, CURVE_P384, KEY_BYTES, MNONCE_BYTES, NUMBER_ROOM,
    POINT_AT as X_AT, PekCertificate, REPORT_BYTES, Release, Report, SIGNATURES_AT, Signature, USAGE_AT,
    USAGE_CEK, USAGE_INVALID, USAGE_OCA, USAGE_PDH, USAGE_PEK, certified_key, numbers,
};
use mirrorvm_helper::evidence::{Unfit, check};
use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::hazmat::PrehashSigner;
use p384::elliptic_curve::sec1::ToSec1Point;
use p384::{PublicKey, SecretKey};
use ring::digest;
use zeroize::Zeroizing;

use super::random::Random;
use super::session::part;
use super::{Endorsement, PdhCert, PlatformKey, SevError};

const Y_AT: usize = X_AT + NUMBER_ROOM;
const POINT_END: usize = Y_AT + NUMBER_ROOM;

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
        let secret = drawn(random);
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

/// A secret key.
fn drawn(random: &mut Random) -> SecretKey {
    loop {
        let mut bytes = Zeroizing::new([0; COORDINATE]);
        random.fill(&mut *bytes);
        // Zero, or not below the group's order: once in 2^190.
        if let Ok(secret) = SecretKey::from_slice(&*bytes) {
            return secret;
        }
    }
}

/// A public key's coordinates.
fn public(key: &PublicKey) -> PlatformKey {
    let mut pair = [0; KEY_BYTES];
    // 0x04, x, y.
    pair.copy_from_slice(&key.to_sec1_point(false).as_bytes()[1..]);
    pair
}

/// A certificate that nobody has signed.
fn unsigned(usage: u32, algorithm: u32, key: &PlatformKey) -> [u8; CERTIFICATE_BYTES] {
    let mut bytes = [0; CERTIFICATE_BYTES];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, VERSION);
    put(USAGE_AT, usage);
    put(ALGO_AT, algorithm);
    put(CURVE_AT, CURVE_P384);
    SIGNATURES_AT.into_iter().for_each(|at| put(at, USAGE_INVALID));
    bytes[X_AT..POINT_END].copy_from_slice(&numbers(key));
    bytes
}

fn encode(key: &PublicKey) -> PdhCert {
    PdhCert(unsigned(USAGE_PDH, ALGO_ECDH_SHA256, &public(key)).to_vec())
}

/// SHA-256 of a platform's key, in hexadecimal: short enough for people to compare.
pub fn key_fingerprint(key: &PlatformKey) -> String {
    let hash = digest::digest(&digest::SHA256, key);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The one chip of which all modelled processors are, unless a test makes another. Anybody can read its key
/// here: that it stands for a platform shows how such a thing goes, and nothing else.
const MODELLED_CHIP: &[u8; COORDINATE] = b"mirrorvm: a modelled chip's key, and no secret!!";

/// The model's key that signs attestation reports (PEK). Wiped when dropped and never printed.
pub(crate) struct Pek {
    secret: SigningKey,
    endorsement: Endorsement,
}

impl std::fmt::Debug for Pek {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pek")
    }
}

impl Pek {
    /// One that the modelled chip stands for, and an owner that nobody knows.
    pub fn modelled(random: &mut Random) -> Self {
        let chip = SecretKey::from_slice(MODELLED_CHIP).expect("a number below the group's order");
        Self::certified(random, &chip)
    }

    /// One of a chip of its own.
    pub fn of_another_chip(random: &mut Random) -> Self {
        let chip = drawn(random);
        Self::certified(random, &chip)
    }

    fn certified(random: &mut Random, chip: &SecretKey) -> Self {
        let (secret, owner) = (drawn(random), SigningKey::from(drawn(random)));
        let mut certificate = unsigned(USAGE_PEK, ALGO_ECDSA_SHA256, &public(&secret.public_key()));
        let signers = [(USAGE_OCA, owner), (USAGE_CEK, SigningKey::from(chip.clone()))];
        for (at, (usage, key)) in SIGNATURES_AT.into_iter().zip(signers) {
            let signature = sign(&key, &certificate[..SIG1_USAGE_AT]).encode();
            certificate[at..at + 4].copy_from_slice(&usage.to_le_bytes());
            certificate[at + 4..at + 8].copy_from_slice(&ALGO_ECDSA_SHA256.to_le_bytes());
            certificate[at + 8..at + 8 + signature.len()].copy_from_slice(&signature);
        }
        let endorsement = Endorsement { pek: Box::new(certificate), chip: public(&chip.public_key()) };
        Self { secret: SigningKey::from(secret), endorsement }
    }

    pub fn endorsement(&self) -> &Endorsement {
        &self.endorsement
    }

    /// A report about a guest.
    pub fn report(
        &self,
        mnonce: [u8; MNONCE_BYTES],
        launch_digest: [u8; 32],
        policy: super::Policy,
    ) -> [u8; REPORT_BYTES] {
        let unsigned =
            Report { mnonce, launch_digest, policy: policy.0, signature: Signature([0; KEY_BYTES]) };
        Report { signature: sign(&self.secret, &unsigned.signed()), ..unsigned }.encode()
    }
}

/// ECDSA with SHA-256; the nonce by RFC 6979.
fn sign(key: &SigningKey, message: &[u8]) -> Signature {
    let hash = digest::digest(&digest::SHA256, message);
    let signature: p384::ecdsa::Signature =
        key.sign_prehash(hash.as_ref()).expect("a hash longer than half of the curve's numbers");
    let mut pair = [0; KEY_BYTES];
    pair.copy_from_slice(&signature.to_bytes());
    Signature(pair)
}

/// The public half of the key that stands for every modelled platform.
pub fn modelled_chip() -> PlatformKey {
    public(&SecretKey::from_slice(MODELLED_CHIP).expect("a number below the group's order").public_key())
}

impl Endorsement {
    /// Whether `report` is what this platform says of a guest that was launched as `launch` with `policy`,
    /// for whoever asked with `mnonce`: the helper's own look, with this platform's chip as what is trusted.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(
        &self,
        report: &[u8; REPORT_BYTES],
        mnonce: &[u8; MNONCE_BYTES],
        launch: [u8; 32],
        policy: super::Policy,
    ) -> Result<(), Unfit> {
        let release = Release::demanded(&[self.chip], &[launch]).ok_or(Unfit::Malformed)?;
        let both = [&report[..], &self.pek[..]].concat();
        let evidence = both.as_slice().try_into().map_err(|_| Unfit::Malformed)?;
        check(&release, evidence, mnonce, policy.0)
    }

    /// Of PEK, OCA and CEK certificates, one after the other.
    ///
    /// # Errors
    /// [`SevError::Malformed`] for what is no such chain. Its signatures are not looked at.
    pub fn from_chain(chain: &[u8]) -> Result<Self, SevError> {
        let malformed = |why| SevError::Malformed { what: "platform's certificate chain", why };
        let (certificates, rest) = chain.as_chunks::<CERTIFICATE_BYTES>();
        let ([pek, _, cek], []) = (certificates, rest) else {
            return Err(malformed("is not of three certificates"));
        };
        PekCertificate::decode(pek)
            .ok_or(malformed("does not begin with the certificate of a PEK for ECDSA with SHA-256"))?;
        let chip = certified_key(cek, USAGE_CEK, &[ALGO_ECDSA_SHA256])
            .ok_or(malformed("does not end with the certificate of a chip's key"))?;
        Ok(Self { pek: Box::new(*pek), chip })
    }
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
    use p384::ecdsa::signature::hazmat::PrehashVerifier;

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
    fn reports_and_certificates_are_what_a_helper_takes_and_a_chain_is_read() {
        let mut random = Random::seeded(4);
        let (own, other) = (Pek::modelled(&mut random), Pek::of_another_chip(&mut random));
        assert_eq!(own.endorsement().chip, modelled_chip());
        assert_ne!(other.endorsement().chip, modelled_chip());
        let (nonce, launch, policy) = ([7; 16], [8; 32], super::super::Policy(0x0105_0001));
        let release = Release::demanded(&[modelled_chip()], &[launch]).unwrap();
        let judged = |pek: &Pek| {
            let report = pek.report(nonce, launch, policy);
            let evidence = [&report[..], &pek.endorsement().pek[..]].concat().try_into().unwrap();
            check(&release, &evidence, &nonce, policy.0)
        };
        assert_eq!((judged(&own), judged(&other)), (Ok(()), Err(Unfit::Platform)));

        // By the other implementation that is here.
        let report = Report::decode(&own.report(nonce, launch, policy)).unwrap();
        let certificate = PekCertificate::decode(&own.endorsement().pek).unwrap();
        let key = p384::ecdsa::VerifyingKey::from_sec1_bytes(&[&[4][..], &certificate.key].concat()).unwrap();
        let signature = p384::ecdsa::Signature::from_slice(&report.signature.0).unwrap();
        let hash = digest::digest(&digest::SHA256, &report.signed());
        key.verify_prehash(hash.as_ref(), &signature).unwrap();

        let cek = unsigned(USAGE_CEK, ALGO_ECDSA_SHA256, &modelled_chip());
        let chain =
            [&own.endorsement().pek[..], &unsigned(USAGE_OCA, ALGO_ECDSA_SHA256, &[1; 96]), &cek].concat();
        assert_eq!(&Endorsement::from_chain(&chain).unwrap(), own.endorsement());
        for bad in
            [&chain[1..], &chain[..2 * CERTIFICATE_BYTES], &[&cek[..], &chain[CERTIFICATE_BYTES..]].concat()]
        {
            assert!(matches!(Endorsement::from_chain(bad), Err(SevError::Malformed { .. })));
        }
        assert_eq!(format!("{own:?}"), "Pek");
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
