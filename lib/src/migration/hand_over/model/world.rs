//! Everything that two hosts, their disks and the network between them can be in, as one value.
//!
//! Owns: what is on a disk, what is in a daemon's memory and goes with it, what the network still holds, and
//! which of these worlds must never be. Must not know: how one world becomes another.

use mirrorvm_helper::op_state::{DestinationOp, SourceOp};

use crate::guest::lifecycle::GuestState;
use crate::migration::hand_over::{Destination, HandOverOutcome, Leave, Settlement, Source};
use crate::migration::terms::MigrationState;

/// Migrations at most, one after the other or one while the other is still in doubt.
pub const SESSIONS: usize = 2;
/// Imports that a destination may begin in one session, where it lets a repeated PREPARE in.
pub const IMPORTS: u8 = 2;

/// What a host's record says of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub state: GuestState,
    pub moved: bool,
    pub unconfirmed: bool,
    /// The migration that has it, or brings it.
    pub migration: Option<u8>,
}

impl Record {
    pub const LEFT: Self =
        Self { state: GuestState::Stopped, moved: true, unconfirmed: false, migration: None };
    pub const RUNS: Self =
        Self { state: GuestState::Running, moved: false, unconfirmed: false, migration: None };
}

/// What is on a host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    pub record: Option<Record>,
    /// Of each session that the host knows: its own migration's record, or what it has of another's.
    pub sessions: [Option<Stored>; SESSIONS],
}

/// What a disk has of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stored {
    Outgoing { record: MigrationState, word: Option<HandOverOutcome> },
    Incoming { journal: Option<Settlement<u8>>, replaced: bool, record: Option<MigrationState> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    /// How often the daemon may still be killed.
    pub crashes: u8,
    pub disk: Option<Record>,
    pub backup: Option<Backup>,
    /// The disk was put back from the backup, and no daemon has seen it yet.
    pub put_back: bool,
    /// What the other host answered to who asks whether it has the guest: itself, or this one.
    pub theirs: Option<bool>,
    pub up: bool,
    // In the daemon's memory.
    pub shown: Option<Record>,
    /// Whether vCPUs execute.
    pub runs: bool,
    /// The outgoing migration that has the guest.
    pub lent: Option<u8>,
}

/// Half of an answer about a session: what the first look saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Look {
    None,
    UnderWay(bool),
    Journal(Option<Settlement<u8>>),
}

/// One migration. Tokens are the number of the import whose keys they are under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    /// The source's host.
    pub from: u8,
    // On the source's disk.
    pub source_record: MigrationState,
    pub word: Option<HandOverOutcome>,
    // In the source's memory.
    pub source: Option<Source>,
    pub source_leave: Leave,
    pub source_helper: SourceOp,
    /// The import that the helper has keys with; 0: none.
    pub source_key: u8,
    /// Whether it asks the destination: with the helper, or after a restart without.
    pub asks: bool,
    /// Whether a question may be on its way.
    pub asked: bool,

    // On the destination's disk.
    pub journal: Option<Settlement<u8>>,
    /// Whether the journal is older than what others may know.
    pub old_journal: bool,
    /// Whether a guest that had left was here before.
    pub replaced: bool,
    pub destination_record: Option<MigrationState>,
    // In the destination's memory.
    pub destination: Option<Destination>,
    pub destination_leave: Leave,
    pub destination_helper: DestinationOp,
    /// The import that goes on; 0: none.
    pub import: u8,
    pub unstored: Option<Option<u8>>,
    pub look: Look,
    /// Imports that were begun.
    pub imports: u8,

    // On the network, which gives each out at any time and as often as it likes: the imports that it is of,
    // as bits.
    pub prepare: bool,
    pub prepared: u8,
    pub state: u8,
    pub start: u8,
    pub commit: u8,
    pub abort: u8,
    pub never: bool,

    // What has been.
    /// COMMIT was told.
    pub told: bool,
    /// The guest has run at the destination.
    pub ran: bool,
}

impl Session {
    pub const fn begun(from: u8) -> Self {
        Self {
            from,
            source_record: MigrationState::Preparing,
            word: None,
            source: Some(Source::Here),
            source_leave: Leave::Open,
            source_helper: SourceOp::Running,
            source_key: 0,
            asks: false,
            asked: false,
            journal: None,
            old_journal: false,
            replaced: false,
            destination_record: None,
            destination: None,
            destination_leave: Leave::Open,
            destination_helper: DestinationOp::Idle,
            import: 0,
            unstored: None,
            look: Look::None,
            imports: 0,
            prepare: true,
            prepared: 0,
            state: 0,
            start: 0,
            commit: 0,
            abort: 0,
            never: false,
            told: false,
            ran: false,
        }
    }

    pub const fn destination_host(&self) -> usize {
        1 - self.from as usize
    }

    /// What the destination's daemon would find if it looked: what it could not store goes before its disk.
    pub const fn known(&self) -> Option<Settlement<u8>> {
        match self.unstored {
            Some(token) => Some(Settlement::Aborted { token }),
            None => self.journal,
        }
    }

    const fn is_committed(&self) -> bool {
        matches!(self.journal, Some(Settlement::Committed { .. }))
    }

    /// Whether nobody works on it any more.
    pub const fn is_over(&self) -> bool {
        self.source.is_none() && !self.asks && self.destination.is_none()
    }

    /// Whether COMMIT neither is stored nor can be any more.
    pub const fn will_never_commit(&self) -> bool {
        !self.is_committed() && matches!(self.destination, None | Some(Destination::GivingUp))
    }

    /// Whether an administrator who knows everything would say this.
    pub const fn is_true(&self, outcome: HandOverOutcome) -> bool {
        match outcome {
            HandOverOutcome::Committed => self.is_committed(),
            HandOverOutcome::NeverCommitted => self.will_never_commit() && !self.ran,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub hosts: [Host; 2],
    pub sessions: [Option<Session>; SESSIONS],
}

impl World {
    /// A guest runs at the first host, and the second knows nothing of it.
    pub const fn beginning(crashes: u8) -> Self {
        let none = Host {
            crashes,
            disk: None,
            backup: None,
            put_back: false,
            theirs: None,
            up: true,
            shown: None,
            runs: false,
            lent: None,
        };
        let some = Host { disk: Some(Record::RUNS), shown: Some(Record::RUNS), runs: true, ..none };
        Self { hosts: [some, none], sessions: [None; SESSIONS] }
    }

    pub fn each_session(&self) -> impl Iterator<Item = &Session> {
        self.sessions.iter().flatten()
    }

    /// What must never be, if this is it.
    pub fn fault(&self, promised: Promised) -> Option<Fault> {
        if self.hosts[0].runs && self.hosts[1].runs {
            return Some(Fault::Twice);
        }
        if self.hosts.iter().all(|h| h.disk.is_some_and(|r| r.moved)) {
            return Some(Fault::Nobodys);
        }
        self.each_session().find_map(|s| self.fault_of(s, promised))
    }

    fn fault_of(&self, s: &Session, promised: Promised) -> Option<Fault> {
        let back = s.source == Some(Source::Back) || s.source_record == MigrationState::Failed;
        if s.ran && back && promised != Promised::Least {
            return Some(Fault::Undone);
        }
        if promised != Promised::Everything {
            return None;
        }
        let not_called_off = s.source_leave == Leave::CalledOff && s.source_helper == SourceOp::PostExport
            || s.destination_leave == Leave::CalledOff && s.destination_helper == DestinationOp::LiveImport;
        if s.told && !s.is_committed() {
            Some(Fault::Forgotten)
        } else if s.source_record == MigrationState::Succeeded && !s.is_committed() {
            Some(Fault::Nowhere)
        } else if s.is_committed() && self.is_displaced(s) {
            Some(Fault::Displaced)
        } else if not_called_off {
            Some(Fault::NotCalledOff)
        } else {
            None
        }
    }

    /// Whether the record of a guest that was committed is gone without having left.
    fn is_displaced(&self, s: &Session) -> bool {
        let at = s.destination_host();
        let left = |other: &Session| {
            usize::from(other.from) == at && other.source_record == MigrationState::Succeeded
        };
        let here = |r: Record| {
            !r.moved && (r.state != GuestState::Incoming || self.sessions_of(r).is_some_and(|of| of == s))
        };
        !self.hosts[at].disk.is_some_and(here) && !self.each_session().any(left)
    }

    fn sessions_of(&self, record: Record) -> Option<&Session> {
        record.migration.and_then(|id| self.sessions[usize::from(id)].as_ref())
    }

    /// Whether both hosts rest and exactly one has the guest.
    pub fn is_settled(&self) -> bool {
        let has = |h: &&Host| {
            let usable = [GuestState::Stopped, GuestState::Running, GuestState::Paused];
            h.shown.is_some_and(|r| !r.moved && !r.unconfirmed && usable.contains(&r.state))
        };
        self.hosts.iter().all(|h| h.up)
            && self.each_session().all(Session::is_over)
            && self.hosts.iter().filter(has).count() == 1
    }

    /// Whether a source whose hosts are not trusted waits for a token that does not exist and never will: the
    /// destination's helper is gone, or does not answer. What ends this is an administrator's word.
    pub fn is_known_doubt(&self) -> bool {
        self.each_session().any(|s| {
            let no_token = matches!(s.known(), Some(Settlement::Open | Settlement::Aborted { token: None }));
            s.source == Some(Source::Waiting) && s.destination.is_none() && no_token
        })
    }
}

/// How much of this is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promised {
    Everything,
    /// Where the destination's state was put back: what it has forgotten is forgotten.
    WithOldDestination,
    /// Where the source's was, or the destination is somebody else's.
    Least,
}

/// What must never be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Two hosts run the guest.
    Twice,
    /// The source has given the guest up, and the destination does not have it.
    Nowhere,
    /// Each host says that the other has it.
    Nobodys,
    /// The destination has given up a guest whose COMMIT it had stored.
    Displaced,
    /// COMMIT was told, and the destination does not know of it.
    Forgotten,
    /// The guest has run at the destination, and the source goes on from where it was before.
    Undone,
    /// Somebody was told that a migration is called off, and it went on to START or COMMIT.
    NotCalledOff,
}
