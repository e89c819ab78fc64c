//! Asking a destination about one migration that was not begun.
//!
//! Owns: what the question says of the guest (as PREPARE would, without secrets), and what the answers mean
//! for whoever asks. Must not know: what the destination goes by, how a migration runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::address_space::Strategy;
use crate::guest::{CarriedReadiness, ReadinessReason};
use crate::host::guests::entry::GuestEntry;
use crate::host::inner::Inner;
use crate::host::migrations::definition::Definition;
use crate::host::migrations::findings::{Finding, finding};
use crate::host::peers::probe::{PeerSilence, silence, unreadable_identity};
use crate::host::{
    GuestRecord, GuestState, HostError, MigrationSpec, MirrorChoice, PeerRecord, ProtectionLevel,
};
use crate::memory::Secret;
use crate::migration::wire::Prepare;
use crate::migration::{Suite, check, suite_names};
use crate::transport::PeerIdentity;

/// Longest time that a destination has for its answer. It may have to read a kernel and an initial RAM disk
/// for it.
const PATIENCE: Duration = Duration::from_secs(15);

/// What this host can see of a migration before it starts.
pub(in crate::host) struct Looked {
    /// The id that it must have.
    pub id: Option<Uuid>,
    pub guest: Arc<GuestEntry>,
    pub record: GuestRecord,
    /// Where it goes, if that is known.
    pub peer: Option<PeerRecord>,
    pub strategy: Option<Strategy>,
    /// All that speaks against it here, whatever the destination says.
    pub against: Vec<HostError>,
}

/// What a destination says of a migration.
#[derive(Clone, Debug)]
pub(in crate::host) enum Answer {
    /// It would let it in now, if this is empty.
    Against(Vec<Finding>),
    /// It does not know the question.
    Unknown,
    /// It does not answer as it should.
    Silent(PeerSilence),
}

/// Asks, on a thread that may block. `None`: there is nobody to ask, or nothing to ask about; why that is so
/// was found already.
pub(in crate::host) async fn ask(
    inner: &Arc<Inner>,
    looked: &Looked,
    spec: &MigrationSpec,
) -> Option<Answer> {
    let peer = looked.peer.clone()?;
    let question = question(inner, looked, spec)?;
    let inner = Arc::clone(inner);
    let asked = tokio::task::spawn_blocking(move || put(&inner, &peer, &question));
    let gone = |_| Answer::Silent(PeerSilence::failed());
    Some(asked.await.unwrap_or_else(gone))
}

fn put(inner: &Inner, peer: &PeerRecord, question: &Prepare) -> Answer {
    let Ok(identity) = peer.spec.identity.parse::<PeerIdentity>() else {
        return Answer::Silent(unreadable_identity());
    };
    let begun = Instant::now();
    let address = (peer.spec.address.clone(), identity);
    match check(&address, &inner.identity, &inner.name, PATIENCE, question) {
        Ok(Some(verdict)) => Answer::Against(verdict.against.into_iter().map(finding).collect()),
        Ok(None) => Answer::Unknown,
        Err(fault) => Answer::Silent(silence(&fault, begun.elapsed(), PATIENCE)),
    }
}

/// The guest as PREPARE would present it now.
fn question(inner: &Inner, looked: &Looked, spec: &MigrationSpec) -> Option<Prepare> {
    let Looked { guest, record, .. } = looked;
    let (strategy, image) = match &spec.mirror {
        MirrorChoice::Template(strategy) => {
            let image =
                inner.helper_image(&record.spec.driver, spec.template.helper_image.as_deref()).ok()?;
            (*strategy, image)
        }
        MirrorChoice::Existing(id) => {
            let mirror = inner.mirror_entry(*id)?.record();
            (mirror.strategy, inner.image_measuring(&mirror.helper_measurement).ok()??)
        }
    };
    Some(Prepare {
        session: looked.id.unwrap_or_else(Uuid::now_v7),
        guest: record.id,
        // Only the machine knows its type.
        definition: Definition::of(record, None).write().ok()?,
        layout: record.layout.clone(),
        strategy,
        streams: spec.streams,
        stream_transport: spec.stream_transport,
        suite: spec.suite.name().to_owned(),
        suites: suite_names(&Suite::of_helper(image.header())),
        mask: Secret::filled(|_| {}),
        helper_measurement: image.measurement(),
        nonce: [0; 32],
        public_key: [0; 32],
        secret: Secret::filled(|_| {}),
        readiness: readiness(inner, guest, record),
        paused: record.state == GuestState::Paused,
        elide_zero: record.protection == ProtectionLevel::None,
        verify: spec.verify,
        stall_timeout_ms: spec.limits.stall_timeout_ms,
        // Of the link that asks nobody knows yet which version it speaks.
        audit: None,
    })
}

/// What the guest says of being migrated; of one that does not run, what it is going to say.
fn readiness(inner: &Inner, guest: &GuestEntry, record: &GuestRecord) -> CarriedReadiness {
    let declaration = inner.known_declaration(guest, record);
    let encrypted = inner.facts(&record.spec.driver).sev.is_some();
    let expected = if encrypted { ReadinessReason::Announced } else { ReadinessReason::NotEncrypted };
    CarriedReadiness { reason: guest.readiness().map_or(expected, |r| r.reason), declaration }
}
