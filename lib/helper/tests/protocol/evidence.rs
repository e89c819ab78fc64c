//! A source's helper lets nothing go before it has seen evidence that its guest's owner would take.

use mirrorvm_abi::evidence::{
    CERTIFICATE_SIGNED_BYTES, EVIDENCE_BYTES, RELEASE_BYTES, REPORT_BYTES, Release, SIGNATURES_AT,
};
use mirrorvm_helper::evidence::{Unfit, check, mnonce};

use super::*;
use crate::support::evidence::Platform;

const LAUNCH: [u8; 32] = [0x17; 32];
const POLICY: u32 = config::POLICY_NODBG | 1 << 1 | 1 << 16 | 40 << 24;

fn demand(platform: &Platform) -> Release {
    Release::demanded(&[platform.chip.public()], &[[1; 32], LAUNCH]).unwrap()
}

/// A source that has greeted, and what it is asked to begin.
struct Asked {
    side: Side,
    own: Greeting,
    begin: Begin,
}

fn asked(release: [u8; RELEASE_BYTES], seed: u64) -> Asked {
    let setup = Setup::default();
    let guard = (config::PROTECTION_MODELLED, POLICY);
    let mut side = Side::guarded(setup.workers, &setup.allowed, seed, guard);
    side.machine.ram.borrow_mut().iter_mut().for_each(|page| *page = Rng(seed).page());
    side.machine.release.set(release);
    let own = side.hello();
    let peer = Side::new(1, &setup.allowed, !seed).hello();
    let begin = Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: false,
        audit: false,
        suite: Suite::Aes256Gcm,
        streams: 1,
        session: setup.session,
        transcript: setup.transcript,
        peer,
    };
    Asked { side, own, begin }
}

impl Asked {
    fn nonce(&self) -> [u8; 16] {
        mnonce(&self.begin.peer, &self.own, &self.begin.session)
    }

    fn begin(&mut self, evidence: &[u8]) -> Result<(), Status> {
        let payload = [&self.begin.encode()[..], evidence].concat();
        self.side.control(Op::Begin, &payload).map(drop)
    }

    /// Begins, is refused, and has nothing of the guest's in its mailbox.
    fn refused(mut self, evidence: &[u8], why: &str) {
        let before = self.side.machine.published.borrow().len();
        assert_eq!(self.begin(evidence), Err(Status::EvidenceRefused), "{why}");
        assert_eq!(self.side.export(0, 1, &[0]), Err((Status::WrongState, 0)), "{why}");
        assert_eq!(self.side.control(Op::EndEpoch, &[]), Err(Status::WrongState), "{why}");
        assert_eq!(self.side.control(Op::Pause, &[]), Err(Status::WrongState), "{why}");
        assert_eq!(*self.side.machine.pages_read.borrow(), [], "{why}: no page was looked at");
        // Completions and cursors alone.
        let longest = self.side.machine.published.borrow()[before..].iter().map(Vec::len).max();
        assert!(longest.is_none_or(|len| len <= mirrorvm_abi::mailbox::ENTRY_BYTES), "{why}");
        // What it had drawn for the session is spent: evidence cannot be tried out.
        let good = Platform::of(1).evidence(self.nonce(), LAUNCH, POLICY);
        assert_eq!(self.begin(&good), Err(Status::WrongState), "{why}: no second try");
    }
}

#[test]
fn pages_leave_for_a_guest_whose_evidence_is_what_the_owner_demands() {
    let platform = Platform::of(1);
    let more =
        [POLICY, POLICY | 1 << 2, POLICY | 1 << 5, POLICY + (1 << 24), POLICY + (1 << 16) - (40 << 24)];
    for policy in more {
        let mut source = asked(demand(&platform).encode(), 7);
        source.begin(&platform.evidence(source.nonce(), LAUNCH, policy)).unwrap();
        source.side.export(0, 1, &[0]).unwrap();
    }
    // The platform's owner stands for it as well as the chip does.
    let mut source =
        asked(Release::demanded(&[[3; 96], platform.owner.public()], &[LAUNCH]).unwrap().encode(), 7);
    source.begin(&platform.evidence(source.nonce(), LAUNCH, POLICY)).unwrap();
    source.side.export(0, 1, &[0]).unwrap();
}

#[test]
fn evidence_of_anything_else_is_refused_with_no_page_out() {
    let platform = Platform::of(1);
    let source = |seed| asked(demand(&platform).encode(), seed);
    let good = |s: &Asked| platform.evidence(s.nonce(), LAUNCH, POLICY);

    source(7).refused(&[], "missing");
    let s = source(7);
    let stale = platform.evidence(mnonce(&s.begin.peer, &s.own, &[8; 16]), LAUNCH, POLICY);
    s.refused(&stale, "of another session");
    let replayed = good(&source(8));
    source(7).refused(&replayed, "of another nonce");
    let s = source(7);
    let turned = platform.evidence(mnonce(&s.own, &s.begin.peer, &s.begin.session), LAUNCH, POLICY);
    s.refused(&turned, "of the other role");
    let s = source(7);
    let other = Greeting { public_key: [9; 32], ..s.begin.peer };
    s.refused(
        &platform.evidence(mnonce(&other, &source(7).own, &[9; 16]), LAUNCH, POLICY),
        "of another helper's key",
    );
    let flags = POLICY & 0xffff;
    for (policy, why) in [
        (POLICY & !config::POLICY_NODBG, "of a guest that can be debugged"),
        (POLICY & !2, "of a guest whose key may be shared"),
        (flags, "of a guest that any firmware may run"),
        (flags | 1 << 16 | 39 << 24, "of a guest that older firmware may run"),
        (flags | 255 << 24, "of a guest that firmware of an older major version may run"),
    ] {
        let s = source(7);
        let evidence = platform.evidence(s.nonce(), LAUNCH, policy);
        s.refused(&evidence, why);
    }
    let s = source(7);
    s.refused(&platform.evidence(source(7).nonce(), [0x18; 32], POLICY), "of another launch");
    let s = source(7);
    s.refused(&Platform::of(40).evidence(source(7).nonce(), LAUNCH, POLICY), "of a chip that nobody trusts");
    // A report by a key that is certified by nobody, under another one's certificate.
    let s = source(7);
    let report = Platform::of(40).report(s.nonce(), LAUNCH, POLICY).encode();
    s.refused(&[&report[..], &platform.certificate()].concat(), "not signed by the certificate's key");
    for len in [REPORT_BYTES, EVIDENCE_BYTES - 1, EVIDENCE_BYTES + 1] {
        let mut s = source(7);
        let mut cut = good(&s).to_vec();
        cut.resize(len, 0);
        assert_eq!(s.begin(&cut), Err(Status::BadRequest), "{len} bytes");
        assert_eq!(s.side.export(0, 1, &[0]), Err((Status::WrongState, 0)));
    }
}

#[test]
fn a_demand_that_was_taken_away_or_makes_no_sense_is_met_by_nothing() {
    let platform = Platform::of(1);
    let good = demand(&platform).encode();
    let mut all = vec![[0; RELEASE_BYTES], [0xff; RELEASE_BYTES]];
    for (at, value) in [
        (0, 0),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 2),
        (1, 5),
        (2, 0),
        (2, 1),
        (2, 5),
        (3, 1),
        (RELEASE_BYTES - 1, 1),
    ] {
        let mut bad = good;
        bad[at] = value;
        all.push(bad);
    }
    for (i, bad) in all.into_iter().enumerate() {
        // Two keys of which one is zero can be read: nobody signs by that.
        let evidence = |s: &Asked| platform.evidence(s.nonce(), [0x18; 32], POLICY);
        let s = asked(bad, 7);
        let evidence = evidence(&s);
        s.refused(&evidence, &format!("release {i}"));
    }
}

#[test]
fn without_a_demand_everything_is_as_before() {
    let none = Release::NOT_DEMANDED.encode();
    for evidence in [&[][..], &[0; EVIDENCE_BYTES]] {
        let mut s = asked(none, 7);
        s.begin(evidence).unwrap();
        s.side.export(0, 1, &[0]).unwrap();
    }
    // A destination is told nothing of the kind, and demands nothing.
    let mut s = asked(demand(&Platform::of(1)).encode(), 7);
    s.begin.source = false;
    assert_eq!(s.begin(&[0; EVIDENCE_BYTES]), Err(Status::BadRequest));
    let mut s = asked(demand(&Platform::of(1)).encode(), 7);
    s.begin.source = false;
    s.begin(&[]).unwrap();
}

#[test]
fn each_check_stands_by_itself() {
    let (platform, other) = (Platform::of(1), Platform::of(40));
    let release = demand(&platform);
    let judged = |evidence: [u8; EVIDENCE_BYTES]| check(&release, &evidence, &[6; 16], POLICY);
    assert_eq!(judged(platform.evidence([6; 16], LAUNCH, POLICY)), Ok(()));
    assert_eq!(judged(platform.evidence([7; 16], LAUNCH, POLICY)), Err(Unfit::Nonce));
    assert_eq!(judged(platform.evidence([6; 16], [2; 32], POLICY)), Err(Unfit::Launch));
    assert_eq!(judged(platform.evidence([6; 16], LAUNCH, 0)), Err(Unfit::Policy));
    assert_eq!(judged(other.evidence([6; 16], LAUNCH, POLICY)), Err(Unfit::Platform));
    let mut mixed = platform.evidence([6; 16], LAUNCH, POLICY);
    mixed[..REPORT_BYTES].copy_from_slice(&other.report([6; 16], LAUNCH, POLICY).encode());
    assert_eq!(judged(mixed), Err(Unfit::Report));
    assert_eq!(judged([0; EVIDENCE_BYTES]), Err(Unfit::Malformed));
}

/// The place for the owner's signature: nobody relies on it here.
const OTHER_PLACE: std::ops::Range<usize> = REPORT_BYTES + SIGNATURES_AT[0]..REPORT_BYTES + SIGNATURES_AT[1];

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_flipped_bit_of_evidence_anywhere_is_refused(at in any::<prop::sample::Index>(), region in 0..4usize, bit in 0..8u8) {
        let platform = Platform::of(1);
        let mut evidence = platform.evidence([6; 16], LAUNCH, POLICY);
        // Half of a certificate is room that is zero: what holds something is to be hit as well.
        let region = [
            0..REPORT_BYTES,
            REPORT_BYTES..REPORT_BYTES + 164,
            REPORT_BYTES + SIGNATURES_AT[1]..REPORT_BYTES + SIGNATURES_AT[1] + 152,
            0..EVIDENCE_BYTES,
        ][region].clone();
        let at = region.start + at.index(region.len());
        evidence[at] ^= 1 << bit;
        let judged = check(&demand(&platform), &evidence, &[6; 16], POLICY);
        prop_assert_eq!(judged.is_ok(), OTHER_PLACE.contains(&at), "bit {} of byte {}: {:?}", bit, at, judged);
        const { assert!(SIGNATURES_AT[0] == CERTIFICATE_SIGNED_BYTES) };
    }

    #[test]
    fn bytes_from_anywhere_are_no_evidence(bytes in prop::collection::vec(any::<u8>(), EVIDENCE_BYTES), head: bool) {
        let platform = Platform::of(1);
        let mut evidence: [u8; EVIDENCE_BYTES] = bytes.try_into().unwrap();
        if head {
            let good = platform.evidence([6; 16], LAUNCH, POLICY);
            evidence[..52].copy_from_slice(&good[..52]);
            evidence[REPORT_BYTES..].copy_from_slice(&good[REPORT_BYTES..]);
        }
        prop_assert!(check(&demand(&platform), &evidence, &[6; 16], POLICY).is_err());
    }
}
