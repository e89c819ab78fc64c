//! What shows a source's helper where its pages would go: asked for at the destination, handed on at the
//! source.
//!
//! Owns: whether evidence is demanded and there, and words for what is wrong with it. Must not know: whether
//! it does; that the helper decides, which has the owner's demands from the owner. What is said here of a
//! refusal is this host's own look at the same bytes.

use mirrorvm_abi::evidence::{
    CERTIFICATE_BYTES, EVIDENCE_BYTES, PekCertificate, REPORT_BYTES, Release, Report,
};
use mirrorvm_abi::op::{Begin, Greeting, Status};
use mirrorvm_helper::evidence::{Unfit, check, mnonce};

use super::peer::Agreed;
use super::transcript::sha256;
use super::wire::{self, EVIDENCE_SINCE};
use super::{Evidence, MigrationFault};
use crate::guest::Machine;
use crate::mirror::LaneError;
use crate::sev::Policy;

/// Evidence of the guest that waits in `machine` for pages. `None` where the source does not know such a
/// thing, where the guest is not encrypted, and where its platform does not attest to it; whether it can do
/// without is the source's matter. The guest's own context asks for the report: KVM lets no mirror do that.
pub(super) fn of_destination(
    machine: &dyn Machine,
    agreed: &Agreed,
    (own, source): (&Greeting, &Greeting),
    session: &[u8; 16],
) -> Option<wire::Evidence> {
    if agreed.protocol < EVIDENCE_SINCE {
        return None;
    }
    let launched = machine.launched_helper()?;
    let asked = launched
        .platform
        .endorsement()
        .and_then(|endorsed| Ok((launched.context.attestation(&mnonce(own, source, session))?, endorsed)));
    match asked {
        Ok((report, endorsed)) => {
            Some(wire::Evidence { report: report.to_vec(), certificate: endorsed.pek.to_vec() })
        }
        Err(error) => {
            tracing::warn!(error = %crate::chain::chain(&error), "the platform does not attest to the guest");
            None
        }
    }
}

/// What the owner of a guest that leaves demands, as far as this host knows.
pub(super) struct Demand {
    release: Release,
    policy: Policy,
}

impl Demand {
    /// Of the guest of `machine`, on a link of which `agreed` is known.
    ///
    /// # Errors
    /// [`MigrationFault::EvidenceMissing`] where the other host's build knows no evidence.
    pub fn of(machine: &dyn Machine, agreed: &Agreed) -> Result<Self, MigrationFault> {
        let launched = machine.launched_helper();
        let policy = launched.as_ref().map_or(Policy(0), |helper| helper.policy);
        let release = launched.and_then(|helper| helper.release).map_or(Release::NOT_DEMANDED, |r| *r);
        Self::new(release, policy, agreed.protocol)
    }

    fn new(release: Release, policy: Policy, protocol: u32) -> Result<Self, MigrationFault> {
        if release.is_demanded() && protocol < EVIDENCE_SINCE {
            let why = "the other host's build does not know such a thing; run the same build there";
            return Err(MigrationFault::EvidenceMissing { why });
        }
        Ok(Self { release, policy })
    }

    /// What the helper is given. Without a demand what came does not matter, and is not looked at.
    ///
    /// # Errors
    /// [`MigrationFault::EvidenceMissing`]; [`MigrationFault::Protocol`] for parts of impossible lengths.
    pub fn meet(
        &self,
        evidence: Option<&wire::Evidence>,
    ) -> Result<Option<Box<[u8; EVIDENCE_BYTES]>>, MigrationFault> {
        if !self.release.is_demanded() {
            return Ok(None);
        }
        let why = "its platform attests to nothing";
        evidence.ok_or(MigrationFault::EvidenceMissing { why })?.bytes().map(Some)
    }

    /// The fault behind a session that did not begin.
    pub fn refused(
        &self,
        error: LaneError,
        evidence: Option<&[u8; EVIDENCE_BYTES]>,
        own: &Greeting,
        begin: &Begin,
    ) -> MigrationFault {
        let LaneError::Refused { status: Status::EvidenceRefused, .. } = error else { return error.into() };
        let nonce = mnonce(&begin.peer, own, &begin.session);
        let judged = evidence.map(|evidence| check(&self.release, evidence, &nonce, self.policy.0));
        let why = match judged {
            Some(Err(unfit)) => words(unfit),
            // What this host knows of the demands is not what the owner gave the helper.
            Some(Ok(())) | None => "its owner demands something else than this host knows",
        };
        MigrationFault::EvidenceRefused { why }
    }

    /// What is told of evidence that the helper took.
    pub fn shown_by(&self, evidence: Option<&[u8; EVIDENCE_BYTES]>) -> Evidence {
        let shown = || {
            let evidence = evidence.filter(|_| self.release.is_demanded())?;
            let report = Report::decode(evidence.first_chunk::<REPORT_BYTES>()?)?;
            let certificate = PekCertificate::decode(evidence.last_chunk::<CERTIFICATE_BYTES>()?)?;
            let key = mirrorvm_helper::evidence::signer(self.release.keys(), &certificate)?;
            Some(Evidence::Verified { launch_digest: report.launch_digest, platform: sha256(key) })
        };
        shown().unwrap_or(Evidence::NotDemanded)
    }
}

/// What is wrong with it, for whoever runs this host.
const fn words(unfit: Unfit) -> &'static str {
    match unfit {
        Unfit::Malformed => "it is no attestation report with the certificate of a PEK",
        Unfit::Nonce => "the report was not made for this migration",
        Unfit::Platform => "no key of `platforms` has signed the certificate of the destination's platform",
        Unfit::Report => "the report is not signed by the destination's platform",
        Unfit::Launch => "the guest there was launched as something else (another build, layout or C-bit)",
        Unfit::Policy => "the guest's policy there is less strict than here",
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm_abi::record::Suite;

    use super::*;
    use crate::sev::model::{AsidLimits, ModelPlatform};
    use crate::sev::{Context as _, Platform as _, modelled_chip};

    fn greeting(fill: u8) -> Greeting {
        Greeting { nonce: [fill; 32], public_key: [fill + 1; 32] }
    }

    fn begin() -> Begin {
        Begin {
            source: true,
            elide_zero: false,
            fresh: false,
            digests: false,
            audit: false,
            suite: Suite::Aes256Gcm,
            streams: 1,
            session: [9; 16],
            transcript: [8; 32],
            peer: greeting(1),
        }
    }

    /// Evidence of a guest of the model with this policy, for this nonce; and what it was launched with.
    fn evidence(policy: u32, nonce: &[u8; 16]) -> (wire::Evidence, [u8; 32]) {
        let platform = ModelPlatform::seeded(3, AsidLimits::default());
        let memory = crate::memory::Mapping::memfd("t", 4096).unwrap();
        let guest = platform.context();
        guest.init(false).unwrap();
        guest.launch_start(Policy(policy), None).unwrap();
        guest.launch_update_data(&memory, 0, 4096).unwrap();
        guest.launch_measure().unwrap();
        guest.launch_finish().unwrap();
        let report = guest.attestation(nonce).unwrap().to_vec();
        let certificate = platform.endorsement().unwrap().pek.to_vec();
        (wire::Evidence { report, certificate }, sha256(&[0; 4096]))
    }

    #[test]
    fn without_a_demand_anything_goes_and_with_one_a_build_that_knows_none_is_refused_first() {
        let none = Demand::new(Release::NOT_DEMANDED, Policy(0), 5).unwrap();
        let broken = wire::Evidence { report: vec![1], certificate: vec![] };
        assert!(none.meet(None).unwrap().is_none() && none.meet(Some(&broken)).unwrap().is_none());
        assert_eq!(none.shown_by(None), Evidence::NotDemanded);

        let release = Release::demanded(&[modelled_chip()], &[[1; 32]]).unwrap();
        let refused = Demand::new(release, Policy(1), EVIDENCE_SINCE - 1).err();
        assert!(matches!(refused, Some(MigrationFault::EvidenceMissing { .. })));
        let demand = Demand::new(release, Policy(1), EVIDENCE_SINCE).unwrap();
        assert!(matches!(demand.meet(None), Err(MigrationFault::EvidenceMissing { .. })));
        assert!(matches!(demand.meet(Some(&broken)), Err(MigrationFault::Protocol(_))));
    }

    #[test]
    fn a_refusal_is_told_by_what_this_host_sees() {
        let (own, begin) = (greeting(5), begin());
        let nonce = mnonce(&begin.peer, &own, &begin.session);
        let (good, launched) = evidence(1, &nonce);
        let told = |keys: [u8; 96], launch: [u8; 32], shown: &wire::Evidence| {
            let release = Release::demanded(&[keys], &[launch]).unwrap();
            let demand = Demand::new(release, Policy(1), EVIDENCE_SINCE).unwrap();
            let bytes = demand.meet(Some(shown)).unwrap();
            let error = LaneError::Refused { status: Status::EvidenceRefused, index: 0 };
            match demand.refused(error, bytes.as_deref(), &own, &begin) {
                MigrationFault::EvidenceRefused { why } => why,
                other => panic!("{other:?}"),
            }
        };
        let chip = modelled_chip();
        for (why, expected) in [
            (told(chip, launched, &evidence(1, &[7; 16]).0), words(Unfit::Nonce)),
            (told(chip, [1; 32], &good), words(Unfit::Launch)),
            (told([1; 96], launched, &good), words(Unfit::Platform)),
            (told(chip, launched, &evidence(0, &nonce).0), words(Unfit::Policy)),
            (told(chip, launched, &good), "its owner demands something else than this host knows"),
        ] {
            assert_eq!(why, expected);
        }
        let release = Release::demanded(&[[2; 96], chip], &[launched]).unwrap();
        let demand = Demand::new(release, Policy(1), EVIDENCE_SINCE).unwrap();
        let bytes = demand.meet(Some(&good)).unwrap();
        let verified = Evidence::Verified { launch_digest: launched, platform: sha256(&chip) };
        assert_eq!(demand.shown_by(bytes.as_deref()), verified);
        // Whatever else the helper refuses is its own fault.
        let error = LaneError::Refused { status: Status::NoSecret, index: 0 };
        let fault = demand.refused(error, bytes.as_deref(), &own, &begin);
        assert!(matches!(fault, MigrationFault::Helper(LaneError::Refused { status: Status::NoSecret, .. })));
    }
}
