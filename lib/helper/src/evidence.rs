//! What a source's helper looks at before it makes keys: whether the other helper is where the guest's owner
//! lets pages go.
//!
//! Owns: the nonce that ties a report to one session, and which evidence does. Must not know: how the
//! evidence came about, what a host makes of a refusal. The owner's demands come with the guest's secret, so
//! no host has changed them.

use mirrorvm_abi::evidence::{
    CERTIFICATE_BYTES, COORDINATE_BYTES, EVIDENCE_BYTES, KEY_BYTES, MNONCE_BYTES, PekCertificate,
    REPORT_BYTES, Release, Report, Signature, is_as_strict,
};
use mirrorvm_abi::op::Greeting;
use ring::{digest, signature};

/// For what else a host may have a report made, this is not in it.
const LABEL: &[u8] = b"mirrorvm evidence v1";
/// Who is attested: a report for a source would say something else.
const ROLE: &[u8] = b"destination";

/// What the report about a session's destination has to name: the first bytes of SHA-256 over label, role,
/// what the destination's helper answered to `Hello`, what the source's did, and the session's id. Another
/// session, another nonce of either helper, another key or the roles the other way round are another nonce.
pub fn mnonce(destination: &Greeting, source: &Greeting, session: &[u8; 16]) -> [u8; MNONCE_BYTES] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(LABEL);
    context.update(ROLE);
    context.update(&destination.encode());
    context.update(&source.encode());
    context.update(session);
    let mut nonce = [0; MNONCE_BYTES];
    nonce.copy_from_slice(&context.finish().as_ref()[..MNONCE_BYTES]);
    nonce
}

/// Why evidence does not do. A helper answers the same to all of them; a host that looks itself can say more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is no report of a PEK, or no certificate of one.
    Malformed,
    /// The report was made for something else: another session, nonce, key or role.
    Nonce,
    /// No key that the owner trusts has signed the platform's certificate.
    Platform,
    /// The report is not signed by the certificate's key.
    Report,
    /// The guest there was not launched as the owner demands.
    Launch,
    /// The guest's policy there allows what it does not here.
    Policy,
}

/// Whether `evidence` shows that the helper which `nonce` was made for belongs to a guest that `release`
/// allows, where the guest here has `policy`. Without a demand anything does.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn check(
    release: &Release,
    evidence: &[u8; EVIDENCE_BYTES],
    nonce: &[u8; MNONCE_BYTES],
    policy: u32,
) -> Result<(), Unfit> {
    let report = evidence.first_chunk::<REPORT_BYTES>().and_then(Report::decode).ok_or(Unfit::Malformed)?;
    let certificate: Option<&[u8; CERTIFICATE_BYTES]> = evidence.last_chunk();
    let certificate = certificate.and_then(PekCertificate::decode).ok_or(Unfit::Malformed)?;
    // What costs nothing first; none of it is a secret.
    if report.mnonce != *nonce {
        return Err(Unfit::Nonce);
    }
    if !release.launches().contains(&report.launch_digest) {
        return Err(Unfit::Launch);
    }
    if !is_as_strict(report.policy, policy) {
        return Err(Unfit::Policy);
    }
    signer(release.keys(), &certificate).ok_or(Unfit::Platform)?;
    if verifies(&certificate.key, &report.signed(), &report.signature) { Ok(()) } else { Err(Unfit::Report) }
}

/// Which of `keys` has signed a certificate, the first of them.
pub fn signer<'k>(
    keys: &'k [[u8; KEY_BYTES]],
    certificate: &PekCertificate<'_>,
) -> Option<&'k [u8; KEY_BYTES]> {
    let by = |key| certificate.signatures.iter().flatten().any(|s| verifies(key, certificate.signed, s));
    keys.iter().find(|key| by(key))
}

/// Whether `signature` over `message` is of whoever has the private half of `key`.
#[inline(never)]
fn verifies(key: &[u8; KEY_BYTES], message: &[u8], signature: &Signature) -> bool {
    let mut point = [0x04; 1 + KEY_BYTES];
    point[1..].copy_from_slice(key);
    let (der, len) = der(signature);
    signature::UnparsedPublicKey::new(&signature::ECDSA_P384_SHA256_ASN1, point)
        .verify(message, &der[..len])
        .is_ok()
}

/// Most bytes of a signature in DER: a sequence of two integers, each with a byte before it that shows that
/// it is positive.
const DER_MAX: usize = 2 + 2 * (2 + 1 + COORDINATE_BYTES);

/// A signature as its verification takes it, and how long that is. Numbers that no signature has come out as
/// what is refused.
fn der(signature: &Signature) -> ([u8; DER_MAX], usize) {
    let (mut der, mut len) = ([0; DER_MAX], 2);
    for number in signature.0.chunks_exact(COORDINATE_BYTES) {
        let zeroes = number.iter().take_while(|b| **b == 0).count().min(COORDINATE_BYTES - 1);
        let number = &number[zeroes..];
        let sign = usize::from(number[0] & 0x80 != 0);
        der[len] = 2;
        der[len + 1] = (sign + number.len()) as u8;
        let at = len + 2 + sign;
        der[at..at + number.len()].copy_from_slice(number);
        len = at + number.len();
    }
    der[0] = 0x30;
    der[1] = (len - 2) as u8;
    (der, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_short_as_they_are_and_positive() {
        let pair = |r: &[u8], s: &[u8]| {
            let mut both = [0; KEY_BYTES];
            both[COORDINATE_BYTES - r.len()..COORDINATE_BYTES].copy_from_slice(r);
            both[KEY_BYTES - s.len()..].copy_from_slice(s);
            let (der, len) = der(&Signature(both));
            der[..len].to_vec()
        };
        assert_eq!(pair(&[1], &[0x7f, 0]), [0x30, 7, 2, 1, 1, 2, 2, 0x7f, 0]);
        assert_eq!(pair(&[0x80], &[]), [0x30, 7, 2, 2, 0, 0x80, 2, 1, 0]);
        let full = pair(&[0xff; COORDINATE_BYTES], &[0x80; COORDINATE_BYTES]);
        assert_eq!((full.len(), full[1]), (DER_MAX, DER_MAX as u8 - 2));
        assert_eq!(full[..5], [0x30, 102, 2, 49, 0]);
    }

    #[test]
    fn every_part_of_what_a_session_is_makes_another_nonce() {
        let greeting = |n: u8, k: u8| Greeting { nonce: [n; 32], public_key: [k; 32] };
        let (destination, source, session) = (greeting(1, 2), greeting(3, 4), [5; 16]);
        let nonce = mnonce(&destination, &source, &session);
        for other in [
            mnonce(&source, &destination, &session),
            mnonce(&greeting(9, 2), &source, &session),
            mnonce(&greeting(1, 9), &source, &session),
            mnonce(&destination, &greeting(9, 4), &session),
            mnonce(&destination, &greeting(3, 9), &session),
            mnonce(&destination, &source, &[9; 16]),
        ] {
            assert_ne!(other, nonce);
        }
        let all: [&[u8]; 5] = [LABEL, ROLE, &destination.encode(), &source.encode(), &session];
        let whole = digest::digest(&digest::SHA256, &all.concat());
        assert_eq!(nonce, whole.as_ref()[..MNONCE_BYTES], "as a guest's owner would compute it");
    }
}
