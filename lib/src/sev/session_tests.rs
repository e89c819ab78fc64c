//! Tests of sessions: published vectors, every flipped bit, packets.

use proptest::prelude::*;

use super::*;
use crate::sev::CERTIFICATE_BYTES;
use crate::sev::PdhCert;
use crate::sev::certificate::DhKey;

fn hex(text: &str) -> Vec<u8> {
    let text: String = text.split_whitespace().collect();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn zero_session() -> (TransportKeys, Session) {
    let keys = TransportKeys::new([0; 16], [0; 16]);
    let session = keys.wrap(&WrappingKeys::derive(&[0; 16], &[0; 16]), [0; 16], [0; 16], Policy(0));
    (keys, session)
}

/// virtee/sev, src/session/key.rs: `derive` and `mac`; src/session/mod.rs: `initialized::session`.
#[test]
fn the_published_vectors_of_a_session() {
    let master = derive(&[0; 16], "sev-master-secret", &[0; 16]);
    assert_eq!(master.0[..], hex("ab4d269fcc62bedb4511d56c386ce706"));
    let (_, session) = zero_session();
    assert_eq!(session.wrap_tk[..], hex("2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4"));
    assert_eq!(
        session.wrap_mac[..],
        hex("3176c0752738bd9d5e8668953402 0f528c088f16238826b000b327dee6aeed7d")
    );
    assert_eq!(
        session.policy_mac[..],
        hex("aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af")
    );
}

/// virtee/sev, src/session/mod.rs: `initialized::verify`. The digest is that of nothing.
#[test]
fn the_published_vector_of_a_measurement() {
    let tik = hex("66320db73158a35a255d051758e95ed4");
    let keys = TransportKeys::new([0; 16], part(&tik, 0));
    let digest = part(&hex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"), 0);
    let measurement = Measurement {
        mac: part(&hex("6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"), 0),
        nonce: part(&hex("4fbe0bedbad6c86ae8f68971d103e554"), 0),
    };
    let launch = Launch { api: (0, 0x12), build: 0x0f, policy: Policy(0), digest: &digest };
    keys.verify(&launch, &measurement).unwrap();
    for wrong in [
        Launch { api: (1, 0x12), ..launch },
        Launch { api: (0, 0x13), ..launch },
        Launch { build: 0x10, ..launch },
        Launch { policy: Policy(1), ..launch },
    ] {
        assert_eq!(keys.verify(&wrong, &measurement), Err(FirmwareError::BadMeasurement));
    }
}

/// Made with the `sev` crate 8.0.0 (`Session::start_pdh`, NODBG and NOKS, over OpenSSL) for the certificate
/// of the key below: that crate's encoding of its own certificate, its session, and the TEK and TIK that are
/// in it.
#[test]
fn a_session_that_another_implementation_made() {
    let ours = DhKey::generate(&mut Random::seeded(1));
    let mut cert = vec![0; CERTIFICATE_BYTES];
    cert[..20].copy_from_slice(&hex("0100000000000000031000000300000002000000"));
    let (x, y) = (
        hex(
            "92d7e4ac145b3d979deeb67aae2979fd0d5cfcc128b21cce83d97eedd38a0476052c853182fc3acac461944c6ab722f1",
        ),
        hex(
            "afd643bbee06bb105ec31f364f4a34149439b7c5a9161d3533aa5c8c5ad2d47a3f4c14ad1874888bcd3197450ff7c30e",
        ),
    );
    cert[20..68].copy_from_slice(&x);
    cert[92..140].copy_from_slice(&y);
    cert[0x414..0x418].copy_from_slice(&0x1000u32.to_le_bytes());
    cert[0x61c..0x620].copy_from_slice(&0x1000u32.to_le_bytes());
    let session = Session::from_bytes(&part(
        &hex(
            "7d816a20b36bff9532f8d933a2a22c3bbf82a7308c7bdf941f9af1799dd150d990ffd10eeb365dafe3eb93320fa408ac \
         4940e6a98265e502c4eb3536cde12973dd3894951328a9c398234c80845e89e99a301bffc0aafcbc31b443b9ded371ac \
         a132c4df6c411ca281ece813748304a53ba0c8ab9cf779cb1879f286f78a2f21",
        ),
        0,
    ));
    let z = ours.agree(&PdhCert(cert)).unwrap();
    let with = WrappingKeys::derive(&*z, &session.nonce);
    let keys = TransportKeys::unwrap(&with, &session, Policy(Policy::NODBG | Policy::NOKS)).unwrap();
    assert_eq!(keys.tek.0[..], hex("3b84301308b0d642a3380ce4faf14027"));
    assert_eq!(keys.tik.0[..], hex("ea9e2305438c33561cda9e74383465a1"));
}

#[test]
fn no_key_is_printed() {
    let keys = TransportKeys::new([0xa7; 16], [0xb8; 16]);
    let text = format!("{keys:?}");
    assert!(!text.contains("167") && !text.contains("a7") && !text.contains("184"), "{text}");
}

#[test]
fn a_compressed_packet_is_refused_though_authentic() {
    let keys = TransportKeys::new([1; 16], [2; 16]);
    let packet = [3; 16];
    let mac = covered(PacketKind::Data, COMPRESSED, &[4; 16], &packet, |parts| keys.tik.mac(parts));
    let header = PacketHeader { flags: COMPRESSED, iv: [4; 16], mac };
    let opened = keys.open(PacketKind::Data, &header, &packet);
    assert_eq!(opened.err(), Some(FirmwareError::Unsupported));
}

fn flipped<const N: usize>(mut bytes: [u8; N], bit: usize) -> [u8; N] {
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

#[test]
fn every_flipped_bit_of_a_session_is_refused() {
    let with = WrappingKeys::derive(&[5; 48], &[6; 16]);
    let session = TransportKeys::new([1; 16], [2; 16]).wrap(&with, [6; 16], [7; 16], Policy(1));
    assert_eq!(Session::from_bytes(&session.to_bytes()), session);
    for bit in 0..SESSION_BYTES * 8 {
        let bad = Session::from_bytes(&flipped(session.to_bytes(), bit));
        // The nonce is part of the derivation.
        let with = WrappingKeys::derive(&[5; 48], &bad.nonce);
        let unwrapped = TransportKeys::unwrap(&with, &bad, Policy(1));
        assert_eq!(unwrapped.err(), Some(FirmwareError::BadMeasurement), "bit {bit}");
    }
    for policy in (0..32).map(|bit| Policy(1 ^ 1 << bit)) {
        assert_eq!(TransportKeys::unwrap(&with, &session, policy).err(), Some(FirmwareError::BadMeasurement));
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_refused() {
    let keys = TransportKeys::new([1; 16], [2; 16]);
    let (header, packet) = keys.seal(PacketKind::Data, [3; 16], &[4; 64]);
    assert_eq!(PacketHeader::from_bytes(&header.to_bytes()), header);
    for bit in 0..HEADER_BYTES * 8 {
        let bad = PacketHeader::from_bytes(&flipped(header.to_bytes(), bit));
        let opened = keys.open(PacketKind::Data, &bad, &packet);
        assert_eq!(opened.err(), Some(FirmwareError::BadMeasurement), "bit {bit}");
    }
}

proptest! {
    #[test]
    fn packets_open_once_sealed_and_not_when_changed(
        tek: [u8; 16], tik: [u8; 16], iv: [u8; 16], measurement: [u8; 32],
        plain in proptest::collection::vec(any::<u8>(), 1..200), secret: bool, flip: prop::sample::Index,
    ) {
        let kind = if secret { PacketKind::Secret { measurement: &measurement } } else { PacketKind::Data };
        let keys = TransportKeys::new(tek, tik);
        let (header, mut packet) = keys.seal(kind, iv, &plain);
        let opened = keys.open(kind, &header, &packet).unwrap();
        prop_assert_eq!(&opened[..], &plain[..]);
        // Neither kind passes for the other, nor a secret for that of another launch.
        let other = [!measurement[0]; 32];
        for wrong in [PacketKind::Data, PacketKind::Secret { measurement: &other }] {
            if wrong != kind {
                prop_assert_eq!(keys.open(wrong, &header, &packet).err(), Some(FirmwareError::BadMeasurement));
            }
        }
        let bit = flip.index(packet.len() * 8);
        packet[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(keys.open(kind, &header, &packet).err(), Some(FirmwareError::BadMeasurement));
        packet[bit / 8] ^= 1 << (bit % 8);
        packet.pop();
        prop_assert_eq!(keys.open(kind, &header, &packet).err(), Some(FirmwareError::BadMeasurement));
    }

    #[test]
    fn only_the_right_digest_verifies(digest: [u8; 32], nonce: [u8; 16], bit in 0usize..256, policy: u32) {
        let keys = TransportKeys::new([1; 16], [2; 16]);
        let launch = Launch { api: (1, 55), build: 3, policy: Policy(policy), digest: &digest };
        let m = keys.measure(&launch, nonce);
        prop_assert_eq!(Measurement::from_bytes(&m.to_bytes()), m);
        prop_assert!(keys.verify(&launch, &m).is_ok());
        let wrong = flipped(digest, bit);
        let refused = keys.verify(&Launch { digest: &wrong, ..launch }, &m);
        prop_assert_eq!(refused, Err(FirmwareError::BadMeasurement));
    }
}
