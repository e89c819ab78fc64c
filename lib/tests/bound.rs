//! What two ends of a migration agree on is in the helpers' keys: ends that differ in one thing of it, and be
//! it a bit, open nothing of each other's.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use mirrorvm::addr::{Gpa, RamPage};
use mirrorvm::address_space::{BlockSpec, GuestLayout, PspVia, Shift, Strategy};
use mirrorvm::guest::{CarriedReadiness, ReadinessReason};
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::Secret;
use mirrorvm::migration::wire::{self, AuditWish, PROTOCOL_VERSIONS, Prepare, Prepared};
use mirrorvm::migration::{Agreed, StreamTransport, transcript};
use mirrorvm::mirror::LaneError;
use mirrorvm::transport::PeerIdentity;
use mirrorvm_abi::op::{Begin, Status};
use uuid::Uuid;

use support::{Pair, ordinary_begin, random_fill};

fn layout(bytes: u64) -> GuestLayout {
    GuestLayout::assign(&[BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) }])
        .unwrap()
}

fn agreed() -> Agreed {
    Agreed {
        protocol: PROTOCOL_VERSIONS[0],
        caller_speaks: vec![PROTOCOL_VERSIONS[0], 90],
        answerer_speaks: vec![PROTOCOL_VERSIONS[0], 91],
        caller: PeerIdentity::from_bytes([1; 32]),
        answerer: PeerIdentity::from_bytes([2; 32]),
    }
}

fn prepare() -> Prepare {
    Prepare {
        session: Uuid::from_bytes([3; 16]),
        guest: Uuid::from_bytes([4; 16]),
        definition: "red".into(),
        layout: layout(8 << 20),
        strategy: Strategy::Shifted { shift: Shift::FourGib },
        streams: 1,
        stream_transport: StreamTransport::Sealed,
        suite: "aes-256-gcm".into(),
        suites: vec!["aes-256-gcm".into(), "aes-256-gcm-siv".into()],
        mask: Secret::copied(&[5; 32]),
        helper_measurement: [6; 32],
        nonce: [7; 32],
        public_key: [8; 32],
        secret: Secret::copied(&[9; 32]),
        readiness: CarriedReadiness { reason: ReadinessReason::NotEncrypted, declaration: None },
        paused: false,
        elide_zero: false,
        verify: false,
        stall_timeout_ms: 30_000,
        audit: Some(AuditWish::After),
    }
}

fn prepared() -> Prepared {
    let evidence = Some(wire::Evidence { report: vec![12; 208], certificate: vec![13; 2084] });
    Prepared {
        nonce: [10; 32],
        public_key: [11; 32],
        suites: vec!["aes-256-gcm".into(), "other".into()],
        evidence,
    }
}

type Change = fn(&mut Agreed, &mut Prepare, &mut Prepared);

/// Every member, and a way in which it can be another.
fn members() -> Vec<(&'static str, Change)> {
    // A member that is new does not compile here until it is in the list below.
    let Agreed { protocol: _, caller_speaks: _, answerer_speaks: _, caller: _, answerer: _ } = &agreed();
    let Prepare {
        session: _,
        guest: _,
        definition: _,
        layout: _,
        strategy: _,
        streams: _,
        stream_transport: _,
        suite: _,
        suites: _,
        mask: _,
        helper_measurement: _,
        nonce: _,
        public_key: _,
        secret: _,
        readiness: _,
        paused: _,
        elide_zero: _,
        verify: _,
        stall_timeout_ms: _,
        audit: _,
    } = &prepare();
    let Prepared { nonce: _, public_key: _, suites: _, evidence: _ } = &prepared();
    vec![
        ("the version that is spoken", |a, _, _| a.protocol += 1),
        ("a version that the source offers", |a, _, _| a.caller_speaks[1] += 1),
        ("a version that is taken out of the source's offer", |a, _, _| a.caller_speaks.truncate(1)),
        ("a version that the destination has", |a, _, _| a.answerer_speaks[1] += 1),
        ("a version that is taken out of the destination's offer", |a, _, _| a.answerer_speaks.truncate(1)),
        ("who offered a version", |a, _, _| a.answerer_speaks.insert(0, a.caller_speaks.pop().unwrap())),
        ("the source's identity", |a, _, _| a.caller = PeerIdentity::from_bytes([99; 32])),
        ("the destination's identity", |a, _, _| a.answerer = PeerIdentity::from_bytes([99; 32])),
        ("which host is the source", |a, _, _| std::mem::swap(&mut a.caller, &mut a.answerer)),
        ("the session", |_, p, _| p.session = Uuid::from_bytes([99; 16])),
        ("the guest", |_, p, _| p.guest = Uuid::from_bytes([99; 16])),
        ("the definition", |_, p, _| p.definition = "rod".into()),
        ("the layout of RAM", |_, p, _| p.layout = layout(4 << 20)),
        ("the strategy", |_, p, _| p.strategy = Strategy::PspCopied { via: PspVia::LaunchUpdate }),
        ("a parameter of the strategy", |_, p, _| p.strategy = Strategy::Shifted { shift: Shift::MaxPhys }),
        ("the streams", |_, p, _| p.streams = 2),
        ("how they cross", |_, p, _| p.stream_transport = StreamTransport::Tls),
        ("the suite", |_, p, _| p.suite = "aes-256-gcm-siv".into()),
        ("a suite that is taken out of the source's offer", |_, p, _| p.suites.truncate(1)),
        ("a suite that is taken out of the destination's offer", |_, _, d| d.suites.truncate(1)),
        ("the destination's nonce", |_, _, d| d.nonce[31] ^= 1),
        ("the destination's public key", |_, _, d| d.public_key[31] ^= 1),
        ("the destination's report", |_, _, d| d.evidence.as_mut().unwrap().report[207] ^= 1),
        ("its platform's certificate", |_, _, d| d.evidence.as_mut().unwrap().certificate[2083] ^= 1),
        ("whether there is evidence", |_, _, d| d.evidence = None),
        ("the mask", |_, p, _| p.mask[31] ^= 1),
        ("the helper's image", |_, p, _| p.helper_measurement[31] ^= 1),
        ("the nonce", |_, p, _| p.nonce[31] ^= 1),
        ("the public key", |_, p, _| p.public_key[31] ^= 1),
        ("the secret", |_, p, _| p.secret[31] ^= 1),
        ("the readiness", |_, p, _| p.readiness.reason = ReadinessReason::Announced),
        ("whether it is paused", |_, p, _| p.paused = true),
        ("whether zero pages show", |_, p, _| p.elide_zero = true),
        ("whether it is verified", |_, p, _| p.verify = true),
        ("when RAM is compared", |_, p, _| p.audit = Some(AuditWish::BeforeCommit)),
        ("whether RAM is compared", |_, p, _| p.audit = None),
        ("how long a peer may be silent", |_, p, _| p.stall_timeout_ms += 1),
    ]
}

fn digest(agreed: &Agreed, prepare: &Prepare, prepared: &Prepared) -> [u8; 32] {
    transcript(agreed, &wire::written(prepare).unwrap(), &wire::written(prepared).unwrap())
}

/// The first page of a session whose ends hold these transcripts.
fn first_page(source: [u8; 32], destination: [u8; 32]) -> Result<(), LaneError> {
    let on = EmulatedHost::without_sev();
    let mut pair = Pair::new(&on, 1 << 20, 1);
    random_fill(&pair.source_ram, 7);
    let (s, d) = (pair.source.hello().unwrap(), pair.destination.hello().unwrap());
    let begin = Begin { transcript: source, ..ordinary_begin(d) };
    pair.source.begin(&begin).unwrap();
    let theirs = Begin { source: false, transcript: destination, peer: s, ..begin };
    pair.destination.begin(&theirs).unwrap();
    pair.carry(&[RamPage::new(0)], 1)
}

#[test]
fn ends_that_differ_in_one_thing_that_they_agreed_on_open_nothing_of_each_others() {
    let here = digest(&agreed(), &prepare(), &prepared());
    first_page(here, digest(&agreed(), &prepare(), &prepared())).expect("ends that agree do");
    for (what, change) in members() {
        let (mut other, mut message, mut answer) = (agreed(), prepare(), prepared());
        change(&mut other, &mut message, &mut answer);
        let refused = first_page(here, digest(&other, &message, &answer));
        assert_eq!(refused, Err(LaneError::Refused { status: Status::Unsealed, index: 0 }), "{what}");
    }
}
