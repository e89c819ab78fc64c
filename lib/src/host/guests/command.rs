//! What a guest's owner is asked, and what is handed over with it: a leaf that those who ask and the owner
//! share.
//!
//! Owns: the list of commands. Must not know: what the owner does about one.

use std::sync::Arc;

use tokio::sync::oneshot;
use uuid::Uuid;

use crate::addr::{Gpa, RamPage};
use crate::address_space::{BlockSpec, GuestLayout};
use crate::guest::{EndWatch, Machine, MachineEnd};
use crate::host::act::Act;
use crate::host::migrations::hand_over::Together;
use crate::host::{
    Ask, Audit, ExportSpec, Fault, GuestAction, GuestRecord, GuestState, HostError, ImportReport, ImportStep,
    Labels, MirrorChoice, MirrorOptions, MirrorRecord, MirrorSpec, SealedBatch,
};
use crate::migration::Held;
use crate::mirror::Mirror;

pub(in crate::host) type Reply<T> = oneshot::Sender<Result<T, HostError>>;

/// A command and the act that it is part of; by reference, because commands are of very different sizes, and
/// a queue keeps the room that once was needed.
pub(in crate::host) type Envelope = Box<(Command, Option<Act>)>;

/// Makes labels of those there are.
pub(in crate::host) type LabelChange = Box<dyn FnOnce(&Labels) -> Labels + Send>;

/// What a guest's task is asked.
pub(in crate::host) enum Command {
    Act(GuestAction, Ask, Reply<GuestRecord>),
    Undefine(Ask, Reply<GuestRecord>),
    /// Other labels.
    Relabel {
        change: LabelChange,
        ask: Ask,
        reply: Reply<GuestRecord>,
    },
    /// The labels that go along with a migration: from now to its end there are no others.
    HoldLabels {
        migration: Uuid,
        reply: Reply<Labels>,
    },
    /// The labels with which an incoming guest left.
    AdoptLabels(Labels, Reply<()>),
    CreateMirror(MirrorSpec, Ask, Reply<MirrorRecord>),
    DeleteMirror(Uuid, Ask, Reply<MirrorRecord>),
    /// Something that is not stored has changed: a new generation shows it.
    Touch,
    /// One RAM block more for a stopped guest.
    AddBlock(BlockSpec, Ask, Reply<GuestRecord>),
    /// Plugs a RAM block at an address, or unplugs it.
    Replug {
        block: String,
        gpa: Option<Gpa>,
        ask: Ask,
        /// With the block where it is then.
        reply: Reply<GuestLayout>,
    },
    /// Seals pages through a mirror.
    Export {
        mirror: Uuid,
        spec: ExportSpec,
        pages: Vec<RamPage>,
        ask: Ask,
        reply: Reply<SealedBatch>,
    },
    /// Goes on with an import through a mirror.
    Import {
        mirror: Uuid,
        step: ImportStep,
        ask: Ask,
        reply: Reply<ImportReport>,
    },
    /// A migration that is about to be recorded wants the guest for itself, from now to its end; in a
    /// dry run: whether it could have it.
    Claim {
        migration: Uuid,
        choice: MirrorChoice,
        streams: u16,
        dry_run: bool,
        reply: Reply<()>,
    },
    /// A migration that never took the machine gives its claim back.
    Release {
        migration: Uuid,
        done: oneshot::Sender<()>,
    },
    /// A migration takes machine and mirror.
    Lend {
        migration: Uuid,
        choice: MirrorChoice,
        template: MirrorOptions,
        streams: u16,
        reply: Reply<Lease>,
    },
    /// The migration that has the guest holds it for its last round.
    Held,
    /// It lets it run on, until it holds it again.
    RunsOn,
    /// START is about to go out: stored, with the migration's record, before it does.
    StartSent(Box<Together>, Reply<()>),
    /// START went out and no token came back yet.
    InDoubt(Reply<()>),
    /// A migration ends here, and the guest stays.
    GiveBack(Box<GiveBack>),
    /// A migration ends here, and the guest is another host's: stored, or nothing has changed.
    HandedOver {
        peer: String,
        /// Whether the definition goes too.
        delete: bool,
        with: Box<Together>,
        reply: Reply<()>,
    },
    /// A machine waits for its memory: who tells whether it is still there.
    Watch(Uuid, EndWatch),
    /// COMMIT is minted: stored, with the records of guest and migration as they will be, or nothing has
    /// changed.
    Commit {
        paused: bool,
        with: Box<Together>,
        reply: Reply<()>,
    },
    /// The machine ended by itself.
    Ended(MachineEnd),
    /// The guest arrived from another host.
    Arrived {
        machine: Box<dyn Machine>,
        paused: bool,
        fault: Option<Fault>,
        /// The mirror of an SEV-ES guest, which it keeps.
        mirror: Option<Box<Mirror>>,
        /// The audit that has the mirror.
        audit: Option<Arc<Held>>,
        done: oneshot::Sender<()>,
    },
    /// The audit of a migration has ended.
    Audited {
        migration: Uuid,
        audit: Audit,
    },
    /// After a restart: doubt is settled; `peer` has the guest, or nobody. Stored, or nothing has changed.
    Settled {
        peer: Option<String>,
        /// Whether the definition goes too.
        delete: bool,
        with: Box<Together>,
        reply: Reply<()>,
    },
    /// All known peers were asked: one has the guest, or it is this host's.
    Confirmed {
        moved_to: Option<String>,
        done: oneshot::Sender<()>,
    },
    /// The import failed: the guest never was here. Stored, or nothing has changed.
    Vanish(Box<Vanish>),
    /// The daemon goes.
    Shutdown(oneshot::Sender<()>),
}

/// What a migration gets.
pub(in crate::host) struct Lease {
    pub machine: Box<dyn Machine>,
    pub mirror: Mirror,
    pub mirror_id: Uuid,
    pub transient: bool,
    pub was_running: bool,
    pub record: GuestRecord,
}

/// What a migration brings back.
pub(in crate::host) struct GiveBack {
    pub machine: Box<dyn Machine>,
    pub mirror: Mirror,
    pub mirror_id: Uuid,
    pub keep_mirror: bool,
    /// Whether it runs.
    pub running: bool,
    /// The migration's last word, but for the guest's state.
    pub with: Together,
    pub done: oneshot::Sender<GuestState>,
}

/// An import that failed.
pub(in crate::host) struct Vanish {
    /// What was here before under the guest's id, which is here again.
    pub replaced: Option<GuestRecord>,
    /// Its last word; `None`: it had not come so far as to have a record.
    pub with: Option<Together>,
    /// Whether the guest goes although that cannot be stored.
    pub force: bool,
    pub reply: Reply<()>,
}
