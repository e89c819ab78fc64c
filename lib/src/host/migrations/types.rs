//! A migration as values: what a caller wants moved where and how, how it is, how a doubt is ended. Domain
//! types; the REST wire has its own.

use jiff::Timestamp;
use uuid::Uuid;

use crate::address_space::{MirrorPlan, Strategy};
use crate::guest::driver::Labels;
use crate::guest::lifecycle::GuestState;
use crate::host::faults::Fault;
use crate::host::guests::types::{GuestRecord, GuestSpec};
use crate::host::mirrors::types::{MirrorOptions, WorkerInfo};
pub use crate::migration::HandOverOutcome;
pub use crate::migration::terms::{
    Audit, AuditMode, AuditState, Evidence, MigrationLimits, MigrationMode, MigrationState, NotRun,
    OnTimeout, Progress, Round, StreamTransport, Suite,
};

/// Where a migration goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A known peer, by id or name.
    Host(String),
    /// A host that gave a ticket for one migration: its text.
    Ticket(String),
}

/// The mirror that a migration uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorChoice {
    /// One that exists.
    Existing(Uuid),
    /// One that is made for the migration and removed after it.
    Template(Strategy),
}

/// What happens to the source's guest after success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceAfter {
    /// It stays defined, as `stopped` with `moved_to`.
    KeepStopped,
    /// It is removed.
    Delete,
}

/// What a caller wants moved, where and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationSpec {
    /// The guest, by id or name.
    pub guest: String,
    /// Where to.
    pub destination: Destination,
    /// How.
    pub mode: MigrationMode,
    /// Through which mirror.
    pub mirror: MirrorChoice,
    /// More of the mirror that is made for the migration.
    pub template: MirrorOptions,
    /// Helper workers and connections, 1 to 16.
    pub streams: u16,
    /// How they cross.
    pub stream_transport: StreamTransport,
    /// By what the helpers seal.
    pub suite: Suite,
    /// Limits.
    pub limits: MigrationLimits,
    /// What becomes of the source's guest.
    pub source_after: SourceAfter,
    /// Whether both hosts digest every page of RAM at the pause point, by a path that does not go through the
    /// helper. Stretches the pause by [`Progress::verify_ms`].
    pub verify: bool,
    /// When the helpers compare RAM at both ends.
    pub audit: AuditMode,
}

/// Which side of a migration a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationDirection {
    /// The guest leaves this host.
    Outgoing,
    /// It arrives here.
    Incoming,
}

/// A migration as one host knows it.
#[derive(Clone, Debug)]
pub struct MigrationRecord {
    /// UUIDv7, the same at both hosts.
    pub id: Uuid,
    /// Which side this is.
    pub direction: MigrationDirection,
    /// The guest, the same id at both hosts.
    pub guest: Uuid,
    /// The guest's name.
    pub guest_name: String,
    /// The guest's labels when it began.
    pub labels: Labels,
    /// Name of the other host.
    pub peer: String,
    /// Its identity; empty in records of earlier builds.
    pub peer_identity: String,
    /// Its place among the migrations of this host: one that began later has a higher one, whatever the clock
    /// said.
    pub order: u64,
    /// What was asked for; `None` at the destination.
    pub spec: Option<MigrationSpec>,
    /// Layout of the mirror's address space.
    pub strategy: Strategy,
    /// By what the helpers seal.
    pub suite: Suite,
    /// Now.
    pub state: MigrationState,
    /// Goes up with every change.
    pub generation: u64,
    /// How far.
    pub progress: Progress,
    /// Rounds so far.
    pub rounds: Vec<Round>,
    /// The mirror's workers: CPU time and exits for this migration.
    pub workers: Vec<WorkerInfo>,
    /// Share of the time that the workers used, percent; `None`: there was no mirror yet.
    pub helper_busy_percent: Option<u8>,
    /// The guest's state here after the end.
    pub guest_state_after: Option<GuestState>,
    /// Why it failed, or is in doubt.
    pub error: Option<Fault>,
    /// When cancelling was asked for; the outcome is `state`.
    pub cancel_requested_at: Option<Timestamp>,
    /// Whether COMMIT is minted and the destination's store does not take it yet.
    pub committing: bool,
    /// What became of the audit; `None`: none was asked for, or the guest has not moved yet.
    pub audit: Option<Audit>,
    /// What the source's helper was shown of the destination; `None`: it has not come to that, or this is the
    /// destination.
    pub evidence: Option<Evidence>,
    /// An administrator's word, if it was that which ended a doubt.
    pub resolution: Option<Resolution>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it left the queue.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

impl MigrationRecord {
    /// A migration as it is when it begins: at its source it waits for its turn, at its destination it is on
    /// its way. The place in the host's order is given when it is stored.
    pub(in crate::host) fn begun(
        id: Uuid,
        direction: MigrationDirection,
        guest: (Uuid, &GuestSpec),
        peer: &str,
        peer_identity: String,
        (strategy, suite): (Strategy, Suite),
    ) -> Self {
        let now = Timestamp::now();
        let (state, started_at) = match direction {
            MigrationDirection::Outgoing => (MigrationState::Queued, None),
            MigrationDirection::Incoming => (MigrationState::Preparing, Some(now)),
        };
        Self {
            id,
            direction,
            guest: guest.0,
            guest_name: guest.1.name.clone(),
            labels: guest.1.labels.clone(),
            peer: peer.to_owned(),
            peer_identity,
            order: 0,
            spec: None,
            strategy,
            suite,
            state,
            generation: 1,
            progress: Progress::default(),
            rounds: Vec::new(),
            workers: Vec::new(),
            helper_busy_percent: None,
            guest_state_after: None,
            error: None,
            cancel_requested_at: None,
            committing: false,
            audit: None,
            evidence: None,
            resolution: None,
            created_at: now,
            started_at,
            finished_at: None,
        }
    }
}

/// An administrator's word on a migration in doubt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// What is taken to be so.
    pub outcome: HandOverOutcome,
    /// How the administrator knows.
    pub reason: String,
    /// When it was said.
    pub at: Timestamp,
}

/// What a destination's helper said of a hand-over, to be carried to the source by hand. Sealed by the
/// helpers' session: of no use to anybody else, and only the source's helper can tell whether it is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandOverToken {
    /// The migration.
    pub session: Uuid,
    /// What the token says.
    pub outcome: HandOverOutcome,
    /// COMMIT or ABORT, sealed.
    pub token: Vec<u8>,
}

/// What ends a doubt that the hosts cannot end between themselves.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The destination's token: the helper checks it.
    Token(HandOverToken),
    /// An administrator's word, which nobody checks.
    Word(Resolution),
}

/// A digest of every page of guest RAM at the pause point of a verified migration: SHA-256, the first
/// 16 bytes, in order of RAM blocks and pages, the helper's block left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageDigests {
    /// One entry a page.
    pub digests: Vec<[u8; 16]>,
}

/// A migration that began, or would begin.
#[derive(Clone, Debug)]
pub struct Begun {
    /// The record that it began with.
    pub record: MigrationRecord,
    /// Of a dry run: what else is known of it.
    pub preview: Option<MigrationPreview>,
}

/// A migration that would begin.
#[derive(Clone, Debug)]
pub struct MigrationPreview {
    /// Its guest.
    pub guest: GuestRecord,
    /// The plan of its mirror.
    pub plan: MirrorPlan,
    /// Whether the destination has said that it would let it in; false where its build cannot be asked.
    pub destination_asked: bool,
}
