//! Evidence of a destination, and what a guest's owner demands of it, as they reach a source's helper.
//!
//! What is read is written again as it was. No bytes are taken for evidence but those that say what was
//! signed, whatever else differs; a demand that cannot be read is none.

use std::sync::LazyLock;

use mirrorvm_abi::evidence::{
    CERTIFICATE_BYTES, CERTIFICATE_SIGNED_BYTES, EVIDENCE_BYTES, PekCertificate, RELEASE_BYTES, REPORT_BYTES,
    REPORT_SIGNED_BYTES, Release, Report, SIGNATURES_AT,
};
use mirrorvm_helper::evidence::check;

use crate::support::evidence::Platform;
use crate::{Bytes, Seed};

const NONCE: [u8; 16] = [6; 16];
const LAUNCH: [u8; 32] = [0x17; 32];
/// NODBG, API 1.40.
const POLICY: u32 = 1 | 1 << 16 | 40 << 24;

struct Good {
    evidence: [u8; EVIDENCE_BYTES],
    release: Release,
}

static GOOD: LazyLock<Good> = LazyLock::new(|| {
    let platform = Platform::of(1);
    Good {
        evidence: platform.evidence(NONCE, LAUNCH, POLICY),
        release: Release::demanded(&[platform.chip.public()], &[LAUNCH]).unwrap(),
    }
});

/// First byte 0: a release part. 1: evidence, as it is. 2: edits of good evidence, each of an offset (2
/// bytes) and what is added there.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    match bytes.u8() {
        0 => {
            let mut part = [0; RELEASE_BYTES];
            let given = bytes.up_to(RELEASE_BYTES);
            part[..given.len()].copy_from_slice(given);
            if let Some(release) = Release::decode(&part) {
                assert_eq!(release.encode(), part);
                assert_eq!(
                    release.is_demanded(),
                    !release.keys().is_empty() && !release.launches().is_empty()
                );
            }
        }
        1 => {
            let mut evidence = [0; EVIDENCE_BYTES];
            let given = bytes.up_to(EVIDENCE_BYTES);
            evidence[..given.len()].copy_from_slice(given);
            judge(&evidence);
        }
        _ => {
            let mut evidence = GOOD.evidence;
            while !bytes.is_empty() {
                let (at, add) = (usize::from(bytes.u16()) % EVIDENCE_BYTES, bytes.u8());
                evidence[at] = evidence[at].wrapping_add(add);
            }
            judge(&evidence);
        }
    }
}

fn judge(evidence: &[u8; EVIDENCE_BYTES]) {
    let (report, certificate) = evidence.split_first_chunk::<REPORT_BYTES>().unwrap();
    let certificate: &[u8; CERTIFICATE_BYTES] = certificate.try_into().unwrap();
    if let Some(read) = Report::decode(report) {
        assert_eq!(read.encode(), *report);
    }
    if let Some(read) = PekCertificate::decode(certificate) {
        assert_eq!(read.signed[..], certificate[..CERTIFICATE_SIGNED_BYTES]);
        for (at, signature) in SIGNATURES_AT.into_iter().zip(read.signatures) {
            assert!(signature.is_none_or(|s| certificate[at + 8..].starts_with(&s.encode())));
        }
    }
    let good = &GOOD.evidence;
    if check(&GOOD.release, evidence, &NONCE, POLICY).is_ok() {
        assert_eq!(evidence[..REPORT_SIGNED_BYTES], good[..REPORT_SIGNED_BYTES]);
        let signed = REPORT_BYTES..REPORT_BYTES + CERTIFICATE_SIGNED_BYTES;
        assert_eq!(evidence[signed.clone()], good[signed]);
    }
}

/// Good ones, and each of their parts cut or turned.
pub fn seeds() -> Vec<Seed> {
    let edits = |edits: &[(usize, u8)]| {
        let edit = |(at, add): &(usize, u8)| {
            let [low, high] = (*at as u16).to_le_bytes();
            [low, high, *add]
        };
        [&[2][..], &edits.iter().flat_map(edit).collect::<Vec<_>>()].concat()
    };
    let release = |release: &Release| [&[0][..], &release.encode()].concat();
    let mut all: Vec<Seed> = vec![
        ("good".into(), edits(&[])),
        ("good-whole".into(), [&[1][..], &GOOD.evidence].concat()),
        ("report-alone".into(), [&[1][..], &GOOD.evidence[..REPORT_BYTES]].concat()),
        ("release".into(), release(&GOOD.release)),
        ("release-none".into(), release(&Release::NOT_DEMANDED)),
        ("release-zero".into(), vec![0]),
    ];
    let places = [
        ("nonce", 0),
        ("launch", 16),
        ("policy", 48),
        ("usage", 52),
        ("algorithm", 56),
        ("r", 64),
        ("s", 136),
        ("certificate-version", REPORT_BYTES),
        ("certificate-key", REPORT_BYTES + 20),
        ("owners-signature", REPORT_BYTES + SIGNATURES_AT[0] + 8),
        ("chips-usage", REPORT_BYTES + SIGNATURES_AT[1]),
        ("chips-signature", REPORT_BYTES + SIGNATURES_AT[1] + 8),
    ];
    all.extend(places.map(|(name, at)| (format!("edit-{name}"), edits(&[(at, 1)]))));
    all
}
