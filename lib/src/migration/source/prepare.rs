//! PREPARE and the streams: what both ends agree on before a page moves.

use mirrorvm_abi::op::{Begin, Greeting};
use ring::rand::{SecureRandom, SystemRandom};

use super::Course;
use crate::guest::ProtectionLevel;
use crate::memory::Secret;
use crate::migration::evidence::Demand;
use crate::migration::peer::{Agreed, open_control};
use crate::migration::pump::Stream;
use crate::migration::records::Mask;
use crate::migration::terms::{Suite, suite_names};
use crate::migration::transcript::transcript;
use crate::migration::wire::{self, AUDITS_SINCE, AuditWish, Prepare, Prepared, Purpose, kind};
use crate::migration::{AuditMode, MigrationFault, MigrationMode, NotRun, StreamTransport};
use crate::transport::Link;

impl Course<'_, '_> {
    pub(super) fn prepare(
        &mut self,
        link: &mut Link,
        agreed: &Agreed,
    ) -> Result<Vec<Stream>, MigrationFault> {
        let out = self.out;
        let stall = out.control.patience();
        let watched = Some(out.control);
        self.agree_on_audit(agreed)?;
        let demand = Demand::of(self.machine, agreed)?;
        let own = self.mirror.hello()?;
        let Greeting { nonce, public_key } = own;
        let prepare = Prepare {
            session: out.id,
            guest: out.departure.guest,
            definition: out.departure.definition.to_owned(),
            layout: out.departure.layout.clone(),
            strategy: self.mirror.plan().strategy,
            streams: out.terms.streams,
            stream_transport: out.terms.stream_transport,
            suite: out.terms.suite.name().to_owned(),
            suites: suite_names(&Suite::of_helper(self.mirror.helper_header())),
            mask: fresh_key()?,
            helper_measurement: out.helper_measurement,
            nonce,
            public_key,
            secret: Secret::copied(self.machine.migration_secret()),
            paused: !self.was_running,
            // At level `none` the hosts can see which pages are zero anyway; at others it is nobody's
            // business.
            elide_zero: out.departure.protection == ProtectionLevel::None,
            readiness: self.machine.migration_control().carry(),
            verify: out.terms.verify,
            stall_timeout_ms: out.control.limits().stall_timeout_ms,
            audit: self.audit.ok(),
        };
        let message = wire::written(&prepare)?;
        link.send(kind::PREPARE, &message)?;
        let (_, payload) = wire::expect(link, &[kind::PREPARED], wire::PREPARED_MAX)?;
        let transcript = transcript(agreed, &message, &payload);
        drop(message);
        let prepared: Prepared = wire::parse(&payload)?;
        let begin = Begin {
            source: true,
            elide_zero: prepare.elide_zero,
            fresh: false,
            // Only where somebody will ask: they cost an export a quarter of its speed and more.
            digests: out.terms.mode == MigrationMode::Precopy && !self.machine.can_log_dirty(),
            audit: self.audit.is_ok(),
            suite: out.terms.suite.of_records(),
            streams: out.terms.streams,
            session: *out.id.as_bytes(),
            transcript,
            peer: Greeting { nonce: prepared.nonce, public_key: prepared.public_key },
        };
        let evidence = demand.meet(prepared.evidence.as_ref())?;
        let begun = self.mirror.begin_with(&begin, evidence.as_deref());
        begun.map_err(|error| demand.refused(error, evidence.as_deref(), &own, &begin))?;
        out.control.update(|live| live.evidence = Some(demand.shown_by(evidence.as_deref())));
        self.session = true;
        let mut streams = Vec::new();
        for index in 0..out.terms.streams {
            let purpose = Purpose::Stream { session: out.id, index };
            let mut link = open_control(&out.peer, out.identity, out.host, purpose, stall, watched)?.link;
            let mask = match out.terms.stream_transport {
                StreamTransport::Sealed => {
                    link.leave_tls()?;
                    Some(Mask::new(&prepare.mask, index))
                }
                StreamTransport::Tls => None,
            };
            streams.push(Stream::new(link, mask));
        }
        Ok(streams)
    }
}

impl Course<'_, '_> {
    /// Whether there will be an audit: if it is wanted and both ends can.
    fn agree_on_audit(&mut self, agreed: &Agreed) -> Result<(), MigrationFault> {
        let why = if agreed.protocol < AUDITS_SINCE {
            Some(NotRun::PeerVersion)
        } else if !self.mirror.plan().has_digests() {
            Some(NotRun::NoRoom)
        } else {
            None
        };
        self.audit = match (self.out.terms.audit, why) {
            (AuditMode::Never, _) => Err(None),
            (AuditMode::BeforeCommit, Some(why)) => return Err(MigrationFault::AuditNotRun { why }),
            (AuditMode::After, Some(why)) => Err(Some(why)),
            (AuditMode::After, None) => Ok(AuditWish::After),
            (AuditMode::BeforeCommit, None) => Ok(AuditWish::BeforeCommit),
        };
        Ok(())
    }
}

/// A key that nothing else has.
fn fresh_key() -> Result<Secret<32>, MigrationFault> {
    Secret::try_filled(|key: &mut [u8; 32]| {
        SystemRandom::new().fill(key).map_err(|_| MigrationFault::Protocol("the system has no randomness"))
    })
}
