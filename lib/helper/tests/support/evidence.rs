//! A platform that attests to whatever it is told to, by keys that a test knows.

use mirrorvm_abi::evidence::{
    ALGO_AT, ALGO_ECDSA_SHA256, CERTIFICATE_BYTES, CERTIFICATE_SIGNED_BYTES, CERTIFICATE_VERSION, CURVE_AT,
    CURVE_P384, EVIDENCE_BYTES, KEY_BYTES, POINT_AT, Report, SIGNATURES_AT, Signature, USAGE_AT, USAGE_CEK,
    USAGE_OCA, USAGE_PEK, numbers,
};
use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::hazmat::PrehashSigner;

/// A key pair.
pub struct Key(SigningKey);

impl Key {
    pub fn of(seed: u8) -> Self {
        Self(SigningKey::from_slice(&[seed; KEY_BYTES / 2]).unwrap())
    }

    pub fn public(&self) -> [u8; KEY_BYTES] {
        self.0.verifying_key().to_sec1_point(false).as_bytes()[1..].try_into().unwrap()
    }

    pub fn sign(&self, message: &[u8]) -> Signature {
        let hash = ring::digest::digest(&ring::digest::SHA256, message);
        let signature: p384::ecdsa::Signature = self.0.sign_prehash(hash.as_ref()).unwrap();
        Signature(signature.to_bytes().as_slice().try_into().unwrap())
    }
}

/// A platform: the chip's key, its owner's, and the one that signs reports.
pub struct Platform {
    pub chip: Key,
    pub owner: Key,
    pub pek: Key,
}

impl Platform {
    pub fn of(seed: u8) -> Self {
        let [chip, owner, pek] = [0, 1, 2].map(|i| Key::of(seed + i));
        Self { chip, owner, pek }
    }

    /// The PEK's certificate, as real ones are: signed by the owner, then by the chip.
    pub fn certificate(&self) -> [u8; CERTIFICATE_BYTES] {
        let mut b = [0; CERTIFICATE_BYTES];
        let words = [
            (0, CERTIFICATE_VERSION),
            (USAGE_AT, USAGE_PEK),
            (ALGO_AT, ALGO_ECDSA_SHA256),
            (CURVE_AT, CURVE_P384),
        ];
        for (at, word) in words {
            put(&mut b, at, &word.to_le_bytes());
        }
        put(&mut b, POINT_AT, &numbers(&self.pek.public()));
        let signed = b[..CERTIFICATE_SIGNED_BYTES].to_vec();
        for (at, (usage, key)) in
            SIGNATURES_AT.into_iter().zip([(USAGE_OCA, &self.owner), (USAGE_CEK, &self.chip)])
        {
            put(&mut b, at, &usage.to_le_bytes());
            put(&mut b, at + 4, &ALGO_ECDSA_SHA256.to_le_bytes());
            put(&mut b, at + 8, &key.sign(&signed).encode());
        }
        b
    }

    /// A report that its PEK has signed.
    pub fn report(&self, mnonce: [u8; 16], launch_digest: [u8; 32], policy: u32) -> Report {
        let unsigned = Report { mnonce, launch_digest, policy, signature: Signature([0; KEY_BYTES]) };
        Report { signature: self.pek.sign(&unsigned.signed()), ..unsigned }
    }

    /// Such a report with the certificate.
    pub fn evidence(&self, mnonce: [u8; 16], launch_digest: [u8; 32], policy: u32) -> [u8; EVIDENCE_BYTES] {
        let report = self.report(mnonce, launch_digest, policy).encode();
        [&report[..], &self.certificate()].concat().try_into().unwrap()
    }
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}
