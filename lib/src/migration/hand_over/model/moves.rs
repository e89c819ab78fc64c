//! How one world becomes another: each step that a host, a helper, the network, a user or bad luck can take.
//!
//! Owns: what is done in each state of the functions under test, with their outcome, and what a kill leaves.
//! Must not know: which worlds are wrong.
//!
//! A host does one thing at a time, and may be killed after each: what a step has written to a disk is there
//! then, what it has in memory is not. A write may be refused, and may be refused and nevertheless be there.

use mirrorvm_helper::op_state::{
    DestinationEvent as HelperEvent, DestinationOp, SourceEvent as Op, SourceOp,
};

use super::world::{Backup, Host, IMPORTS, Look, Record, Session, Stored, World};
use crate::guest::lifecycle::{Event, GuestState};
use crate::migration::hand_over::destination::DestinationEvent;
use crate::migration::hand_over::doubt::{
    Belief, HandOverOutcome, Heard, Journaled, Reply, Settlement, Witness, believe_under, reply_under,
};
use crate::migration::hand_over::guards::{Guard, Guards};
use crate::migration::hand_over::leave::Leave;
use crate::migration::hand_over::places::{
    Place, bar_under, is_new_session_under, makes_way_under, place_under,
};
use crate::migration::hand_over::restart::{
    FoundGuest, FoundMigration, found_guest_under, found_migration_under, is_unconfirmed_under,
};
use crate::migration::hand_over::source::SourceEvent;
use crate::migration::hand_over::{Destination, Source};
use crate::migration::terms::MigrationState;

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub guards: Guards,
    /// Whether hosts are trusted beside helpers: at protection level `none`.
    pub hosts_are_trusted: bool,
    /// How many migrations there may be.
    pub sessions: usize,
    /// How often each daemon may be killed.
    pub crashes: u8,
    /// Whether somebody calls migrations off.
    pub calling_off: bool,
    /// Whether PREPARE is repeated, which TLS does not let anybody do.
    pub repeats: bool,
    /// Whether stores and helpers refuse, and are wrong about that.
    pub refusals: bool,
    /// The host whose state may be put back from a backup, once.
    pub put_back: Option<usize>,
    /// Whether the second host is somebody else's, who does and says what he likes, except that he cannot
    /// make a helper do what it refuses, nor make up a token.
    pub hostile: bool,
    /// A rule of the helpers that does not hold.
    pub broken_helper: Option<HelperRule>,
    /// What is done about a COMMIT that is minted, where it is not done in the program's order.
    pub order: Option<[Destination; 3]>,
}

/// Rules that the helpers keep, and that a hostile host would have to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HelperRule {
    /// COMMIT is minted after START was opened.
    CommitAfterStart,
    /// ABORT is not minted after COMMIT.
    NoAbortAfterCommit,
    /// COMMIT is not minted after ABORT.
    NoCommitAfterAbort,
}

/// A step, and of which session or host it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    AskedToMigrate,
    AskedToStart,
    CalledOffAtSource,
    CalledOffAtDestination,
    AdministratorSays(HandOverOutcome),
    WorthlessTokenByHand(HandOverOutcome),
    SourceHearsPrepared,
    SourcePausesAndSendsState,
    SourcePassesPointOfNoReturn,
    SourceGivesUp,
    SourceStoresStart,
    SourceIsRefusedToStoreStart,
    SourceStoresStartAndIsToldItDidNot,
    SourceMintsStart,
    SourceMintsNoStart,
    SourceLosesMintedStart,
    SourceSendsStart,
    SourceHearsNothing,
    SourceHears(HandOverOutcome),
    SourceHearsNever,
    SourceTakesWord,
    SourceResumes,
    SourceStoresThatItStays,
    SourceStoresThatItLeft,
    RestartedSourceHears(HandOverOutcome),
    RestartedSourceTakesWord,
    RecordIsWrittenAgain,
    DestinationAdmits,
    DestinationTakesState,
    DestinationOpensStart,
    DestinationIsGivenOtherStart,
    DestinationFails,
    DestinationPassesPointOfNoReturn,
    DestinationMintsCommit,
    DestinationMintsNoCommit,
    DestinationLosesMintedCommit,
    DestinationStoresCommit,
    DestinationIsRefusedToStoreCommit,
    DestinationStoresCommitAndIsToldItDidNot,
    DestinationIsAskedToGo,
    DestinationTellsCommit,
    DestinationRunsGuest,
    DestinationShowsGuest,
    DestinationAborts,
    DestinationAbortsAndCannotStoreIt,
    DestinationLooksForAnswer,
    DestinationAnswers,
    HostileHostClaimsNever,
    HostileHostHasCommitMinted,
    HostileHostHasAbortMinted,
    NetworkLosesAll,
    DaemonIsKilled,
    DaemonEnds,
    DaemonStarts,
    StateIsBackedUp,
    StateIsPutBack,
    PeerSaysWhoseItIs,
    GuestIsConfirmed,
}

impl Step {
    /// Whether the step happens by itself when nothing more goes wrong and nobody asks for anything.
    pub const fn comes_by_itself(self) -> bool {
        match self {
            Self::AskedToMigrate
            | Self::AskedToStart
            | Self::CalledOffAtSource
            | Self::CalledOffAtDestination
            | Self::AdministratorSays(_)
            | Self::WorthlessTokenByHand(_)
            | Self::SourceIsRefusedToStoreStart
            | Self::SourceStoresStartAndIsToldItDidNot
            | Self::SourceMintsNoStart
            | Self::SourceLosesMintedStart
            | Self::RecordIsWrittenAgain
            | Self::DestinationIsGivenOtherStart
            | Self::DestinationMintsNoCommit
            | Self::DestinationLosesMintedCommit
            | Self::DestinationIsRefusedToStoreCommit
            | Self::DestinationStoresCommitAndIsToldItDidNot
            | Self::DestinationIsAskedToGo
            | Self::DestinationAbortsAndCannotStoreIt
            | Self::HostileHostClaimsNever
            | Self::HostileHostHasCommitMinted
            | Self::HostileHostHasAbortMinted
            | Self::NetworkLosesAll
            | Self::DaemonIsKilled
            | Self::StateIsBackedUp
            | Self::StateIsPutBack => false,
            Self::SourceHearsPrepared
            | Self::SourcePausesAndSendsState
            | Self::SourcePassesPointOfNoReturn
            | Self::SourceGivesUp
            | Self::SourceStoresStart
            | Self::SourceMintsStart
            | Self::SourceSendsStart
            | Self::SourceHearsNothing
            | Self::SourceHears(_)
            | Self::SourceHearsNever
            | Self::SourceTakesWord
            | Self::SourceResumes
            | Self::SourceStoresThatItStays
            | Self::SourceStoresThatItLeft
            | Self::RestartedSourceHears(_)
            | Self::RestartedSourceTakesWord
            | Self::DestinationAdmits
            | Self::DestinationTakesState
            | Self::DestinationOpensStart
            | Self::DestinationFails
            | Self::DestinationPassesPointOfNoReturn
            | Self::DestinationMintsCommit
            | Self::DestinationStoresCommit
            | Self::DestinationTellsCommit
            | Self::DestinationRunsGuest
            | Self::DestinationShowsGuest
            | Self::DestinationAborts
            | Self::DestinationLooksForAnswer
            | Self::DestinationAnswers
            | Self::DaemonEnds
            | Self::DaemonStarts
            | Self::PeerSaysWhoseItIs
            | Self::GuestIsConfirmed => true,
        }
    }
}

/// Calls `each` with every step that may be taken, the session or host that takes it, and the world after it.
pub fn steps(world: &World, terms: &Terms, each: &mut impl FnMut(Step, u8, World)) {
    for at in 0..2 {
        host_steps(world, terms, at, &mut |step, next| each(step, at as u8, next));
    }
    for id in 0..terms.sessions as u8 {
        let Some(s) = world.sessions[usize::from(id)] else { continue };
        let one = One { world, terms, id, s };
        let mut each = |step, next| each(step, id, next);
        if world.hosts[usize::from(s.from)].up {
            one.source(&mut each);
        }
        if world.hosts[s.destination_host()].up {
            one.destination(&mut each);
        }
        one.around(&mut each);
    }
}

fn host_steps(world: &World, terms: &Terms, at: usize, each: &mut impl FnMut(Step, World)) {
    let host = world.hosts[at];
    let with = |host: Host| {
        let mut next = *world;
        next.hosts[at] = host;
        next
    };
    if !host.up {
        if let Some(backup) = host.backup {
            each(Step::StateIsPutBack, put_back(world, at, backup));
        }
        return each(Step::DaemonStarts, restarted(world, terms, at));
    }
    // What a hostile host's daemon does is not the point.
    if terms.hostile && at == 1 {
        return;
    }
    if host.crashes > 0 {
        let mut next = killed(world, at);
        next.hosts[at].crashes -= 1;
        each(Step::DaemonIsKilled, next);
    }
    if world.each_session().any(|s| s.destination_host() == at && s.destination == Some(Destination::Left)) {
        each(Step::DaemonEnds, killed(world, at));
    }
    // Once, and again only after it was put back, which is once, too.
    if terms.put_back == Some(at) && host.backup.is_none() && host.crashes > 0 {
        each(Step::StateIsBackedUp, with(Host { backup: Some(backup(world, at)), ..host }));
    }
    let Some(record) = host.shown else { return };
    if record.unconfirmed && record.state != GuestState::InDoubt {
        confirm(world, terms, at, record, each);
    }
    if host.disk != host.shown {
        each(Step::RecordIsWrittenAgain, with(Host { disk: host.shown, ..host }));
    }
    if host.lent.is_some() {
        return;
    }
    let startable = record.state.step(Event::Start).is_ok();
    if startable && bar_under(Event::Start, record.moved, record.unconfirmed, terms.guards).is_none() {
        let record = Some(Record { state: GuestState::Running, ..record });
        each(Step::AskedToStart, with(Host { disk: record, shown: record, runs: true, ..host }));
    }
    let free = world.sessions[..terms.sessions].iter().position(Option::is_none);
    if let Some(id) = free.filter(|_| record.state == GuestState::Running && host.runs && !record.unconfirmed)
    {
        let record = Some(Record { migration: Some(id as u8), ..record });
        let mut next = with(Host { disk: record, shown: record, lent: Some(id as u8), ..host });
        next.sessions[id] = Some(Session::begun(at as u8));
        each(Step::AskedToMigrate, next);
    }
}

/// What a kill leaves.
fn killed(world: &World, at: usize) -> World {
    let mut next = *world;
    next.hosts[at] = Host { up: false, shown: None, runs: false, lent: None, theirs: None, ..next.hosts[at] };
    for s in next.sessions.iter_mut().flatten() {
        if usize::from(s.from) == at {
            (s.source, s.source_leave, s.asks) = (None, Leave::Open, false);
            (s.source_helper, s.source_key) = (SourceOp::Running, 0);
        } else {
            (s.destination, s.destination_leave, s.look) = (None, Leave::Open, Look::None);
            (s.destination_helper, s.import, s.unstored) = (DestinationOp::Idle, 0, None);
        }
    }
    next
}

/// What the next daemon makes of it.
fn restarted(world: &World, terms: &Terms, at: usize) -> World {
    let guards = terms.guards;
    let old_state = world.hosts[at].put_back;
    let mut next = *world;
    let mut doubted = None;
    for (id, s) in next.sessions.iter_mut().enumerate() {
        let Some(s) = s else { continue };
        if usize::from(s.from) == at {
            match found_migration_under(s.source_record, false, guards) {
                FoundMigration::Ended | FoundMigration::Moved => {}
                FoundMigration::InDoubt => {
                    (s.asks, s.asked) = (true, true);
                    doubted = Some(id as u8);
                }
                FoundMigration::Failed => s.source_record = MigrationState::Failed,
            }
        } else if let Some(record) = s.destination_record {
            s.old_journal |= old_state && s.journal == Some(Settlement::Open);
            let committed = matches!(s.journal, Some(Settlement::Committed { .. }));
            match found_migration_under(record, committed, guards) {
                FoundMigration::Ended | FoundMigration::InDoubt => {}
                FoundMigration::Moved => s.destination_record = Some(MigrationState::Succeeded),
                FoundMigration::Failed => s.destination_record = Some(MigrationState::Failed),
            }
        }
    }
    let found = world.hosts[at].disk.and_then(|record| {
        let came = record.migration.and_then(|id| world.sessions[usize::from(id)]);
        let came = came.filter(|s| s.destination_host() == at);
        let committed = came.is_some_and(|s| matches!(s.journal, Some(Settlement::Committed { .. })));
        let unconfirmed = is_unconfirmed_under(record.unconfirmed, old_state, record.moved, guards);
        let record = Record { unconfirmed, ..record };
        match found_guest_under(record.state, committed, old_state, doubted.is_some(), guards) {
            FoundGuest::NeverArrived => came.filter(|s| s.replaced).map(|_| Record::LEFT),
            FoundGuest::Held => {
                Some(Record { state: GuestState::InDoubt, migration: doubted.or(record.migration), ..record })
            }
            FoundGuest::Stopped => Some(Record { state: GuestState::Stopped, migration: None, ..record }),
        }
    });
    let host = &mut next.hosts[at];
    (host.up, host.disk, host.shown, host.put_back) = (true, found, found, false);
    next
}

/// What is on a disk now.
fn backup(world: &World, at: usize) -> Backup {
    let of = |s: Option<Session>| {
        s.map(|s| match usize::from(s.from) == at {
            true => Stored::Outgoing { record: s.source_record, word: s.word },
            false => {
                let (journal, replaced, record) = (s.journal, s.replaced, s.destination_record);
                Stored::Incoming { journal, replaced, record }
            }
        })
    };
    Backup { record: world.hosts[at].disk, sessions: world.sessions.map(of) }
}

/// The disk is again as it was. Of sessions that began later it has nothing.
fn put_back(world: &World, at: usize, backup: Backup) -> World {
    let mut next = *world;
    next.hosts[at] = Host { disk: backup.record, backup: None, put_back: true, ..next.hosts[at] };
    for (s, stored) in next.sessions.iter_mut().zip(backup.sessions) {
        let Some(s) = s else { continue };
        match stored {
            Some(Stored::Outgoing { record, word }) => (s.source_record, s.word) = (record, word),
            Some(Stored::Incoming { journal, replaced, record }) => {
                (s.journal, s.replaced, s.destination_record) = (journal, replaced, record);
            }
            // Ended, as far as this host knows.
            None if usize::from(s.from) == at => {
                (s.source_record, s.word) = (MigrationState::Canceled, None);
            }
            None => (s.journal, s.replaced, s.destination_record) = (None, false, None),
        }
    }
    next
}

/// A guest of a state that was put back: the other host is asked, and what it said is believed, however late.
fn confirm(world: &World, terms: &Terms, at: usize, record: Record, each: &mut impl FnMut(Step, World)) {
    let with = |host: Host| {
        let mut next = *world;
        next.hosts[at] = host;
        next
    };
    let (host, other) = (world.hosts[at], world.hosts[1 - at]);
    if let Some(moved) = host.theirs {
        let record = Some(Record { unconfirmed: false, moved, ..record });
        return each(
            Step::GuestIsConfirmed,
            with(Host { theirs: None, disk: record, shown: record, ..host }),
        );
    }
    if !other.up {
        return;
    }
    let theirs = match other.shown {
        Some(r) => {
            let migration = r.migration.and_then(|id| world.sessions[usize::from(id)]);
            let leaving = migration
                .is_some_and(|s| usize::from(s.from) != at && (s.source_leave == Leave::Past || s.asks));
            match place_under(r.state, r.unconfirmed, r.moved, leaving, terms.guards) {
                Place::Here => true,
                // There is no third host.
                Place::Elsewhere => false,
                Place::Undecided => return,
            }
        }
        None => world
            .each_session()
            .any(|s| s.destination_host() != at && s.destination_record == Some(MigrationState::Succeeded)),
    };
    each(Step::PeerSaysWhoseItIs, with(Host { theirs: Some(theirs), ..host }));
}

const OUTCOMES: [HandOverOutcome; 2] = [HandOverOutcome::Committed, HandOverOutcome::NeverCommitted];

/// One session in a world.
struct One<'a> {
    world: &'a World,
    terms: &'a Terms,
    id: u8,
    s: Session,
}

impl One<'_> {
    /// The world with another session.
    fn with(&self, change: impl FnOnce(&mut Session)) -> World {
        let mut next = *self.world;
        if let Some(s) = &mut next.sessions[usize::from(self.id)] {
            change(s);
        }
        next
    }

    /// The world with another session and another of its hosts.
    fn and(&self, at: usize, change: impl FnOnce(&mut Session), host: impl FnOnce(&mut Host)) -> World {
        let mut next = self.with(change);
        host(&mut next.hosts[at]);
        next
    }

    const fn helper(&self) -> Witness {
        Witness::Helper { hosts_are_trusted: self.terms.hosts_are_trusted }
    }

    /// Whose the guest is by what a source hears, where `opens` says whether the helper would open it.
    fn tells(&self, heard: Heard, witness: Witness, opens: bool) -> Option<HandOverOutcome> {
        match believe_under(heard, witness, self.terms.guards) {
            Belief::Ends(outcome) => Some(outcome),
            Belief::WhenOpened(outcome) => opens.then_some(outcome),
            Belief::CannotBeOpened | Belief::Stays => None,
        }
    }

    fn source(&self, each: &mut impl FnMut(Step, World)) {
        let (s, terms, at) = (&self.s, self.terms, usize::from(self.s.from));
        let Some(source) = s.source else {
            if s.asks {
                self.settle_after_restart(each);
            }
            return;
        };
        let after = |event| Some(source.step_under(event, terms.guards));
        match source {
            Source::Here => {
                if let Ok(helper) = s.source_helper.step(Op::Begin) {
                    for import in imports(s.prepared) {
                        let begun = |s: &mut Session| (s.source_helper, s.source_key) = (helper, import);
                        each(Step::SourceHearsPrepared, self.with(begun));
                    }
                }
                if let Ok(helper) = s.source_helper.step(Op::Pause) {
                    let sent = |s: &mut Session| {
                        s.source_helper = helper;
                        s.state |= bit(s.source_key);
                    };
                    let held = |h: &mut Host| {
                        h.runs = false;
                        h.shown = h.shown.map(|r| Record { state: GuestState::Paused, ..r });
                    };
                    each(Step::SourcePausesAndSendsState, self.and(at, sent, held));
                }
                if s.source_helper == SourceOp::PausedExport {
                    let leave = s.source_leave.pass();
                    let event = if leave == Leave::Past { SourceEvent::Passed } else { SourceEvent::Failed };
                    let passed = |s: &mut Session| (s.source_leave, s.source) = (leave, after(event));
                    each(Step::SourcePassesPointOfNoReturn, self.with(passed));
                }
                each(Step::SourceGivesUp, self.with(|s| s.source = after(SourceEvent::Failed)));
            }
            Source::Noting => self.note_start(after, each),
            Source::Minting => {
                let Ok(helper) = s.source_helper.step(Op::Start) else { return };
                let minted = |s: &mut Session| {
                    (s.source_helper, s.source) = (helper, after(SourceEvent::Minted));
                };
                each(Step::SourceMintsStart, self.with(minted));
                if terms.refusals {
                    let lost = |s: &mut Session| s.source = after(SourceEvent::NotMinted);
                    each(Step::SourceMintsNoStart, self.with(lost));
                    let late = |s: &mut Session| {
                        (s.source_helper, s.source) = (helper, after(SourceEvent::NotMinted));
                    };
                    each(Step::SourceLosesMintedStart, self.with(late));
                }
            }
            Source::Sending => {
                let sent = |s: &mut Session| {
                    s.start |= bit(s.source_key);
                    s.source = after(SourceEvent::Sent);
                };
                each(Step::SourceSendsStart, self.with(sent));
            }
            Source::Waiting => self.wait(source, each),
            Source::Back => self.come_back(each),
            Source::Gone => {
                each(Step::SourceStoresThatItLeft, self.settled(HandOverOutcome::Committed));
            }
        }
    }

    /// What is stored before START is minted, and what comes of it.
    fn note_start(&self, after: impl Fn(SourceEvent) -> Option<Source>, each: &mut impl FnMut(Step, World)) {
        let at = usize::from(self.s.from);
        let written = |event| {
            let noted = |s: &mut Session| {
                (s.source_record, s.source) = (MigrationState::InDoubt, after(event));
            };
            // Stored is what a crash would leave; shown is that the guest is held.
            let held = |h: &mut Host| {
                h.disk = h.shown.map(|r| Record { state: GuestState::InDoubt, ..r });
            };
            self.and(at, noted, held)
        };
        each(Step::SourceStoresStart, written(SourceEvent::Noted));
        if self.terms.refusals {
            let refused = |s: &mut Session| s.source = after(SourceEvent::NotNoted);
            each(Step::SourceIsRefusedToStoreStart, self.with(refused));
            each(Step::SourceStoresStartAndIsToldItDidNot, written(SourceEvent::NotNoted));
        }
    }

    /// After START: what the link brings, what the destination answers, what others say.
    fn wait(&self, source: Source, each: &mut impl FnMut(Step, World)) {
        let (s, guards, at) = (&self.s, self.terms.guards, usize::from(self.s.from));
        let silent = source.step_under(SourceEvent::Silence, guards);
        if silent != source {
            each(Step::SourceHearsNothing, self.with(|s| s.source = Some(silent)));
        } else if !s.asks {
            let asks = |s: &mut Session| (s.asks, s.asked) = (true, true);
            let shown = |h: &mut Host| {
                h.shown = h.shown.map(|r| Record { state: GuestState::InDoubt, ..r });
                h.disk = h.shown;
            };
            each(Step::SourceHearsNothing, self.and(at, asks, shown));
        }
        let mut hears = |step, heard, opens, op: Option<Op>| {
            let Some(outcome) = self.tells(heard, self.helper(), opens) else { return };
            let told = |s: &mut Session| {
                s.source = Some(source.step_under(SourceEvent::Told(outcome), guards));
                s.asks = false;
                if let Some(Ok(helper)) = op.filter(|_| opens).map(|op| s.source_helper.step(op)) {
                    s.source_helper = helper;
                }
            };
            each(step, self.with(told));
        };
        for (tokens, outcome, op) in [
            (s.commit, HandOverOutcome::Committed, Op::CommitToken),
            (s.abort, HandOverOutcome::NeverCommitted, Op::AbortToken),
        ] {
            for import in imports(tokens) {
                let opens = import == s.source_key && s.source_helper.step(op).is_ok();
                let heard = Heard::Token { outcome, by_hand: false };
                hears(Step::SourceHears(outcome), heard, opens, Some(op));
            }
        }
        // Only who asks is told by a host, by hand, or by an administrator.
        if !s.asks {
            return;
        }
        if s.never {
            hears(Step::SourceHearsNever, Heard::Never, false, None);
        }
        if let Some(outcome) = s.word {
            hears(Step::SourceTakesWord, Heard::Word(outcome), false, None);
        }
        for outcome in OUTCOMES {
            let heard = Heard::Token { outcome, by_hand: true };
            hears(Step::WorthlessTokenByHand(outcome), heard, false, None);
        }
    }

    /// The guest goes on here, which is stored afterwards.
    fn come_back(&self, each: &mut impl FnMut(Step, World)) {
        let at = usize::from(self.s.from);
        if !self.world.hosts[at].runs {
            let cancelled = |s: &mut Session| {
                s.source_helper = s.source_helper.step(Op::Cancel).unwrap_or(s.source_helper)
            };
            let runs = |h: &mut Host| {
                h.runs = true;
                h.shown = h.shown.map(|r| Record { state: GuestState::Running, ..r });
            };
            return each(Step::SourceResumes, self.and(at, cancelled, runs));
        }
        let ended = |s: &mut Session| {
            (s.source, s.source_record, s.asks) = (None, MigrationState::Failed, false);
            (s.source_leave, s.source_helper, s.source_key) = (Leave::Open, SourceOp::Running, 0);
        };
        let back = |h: &mut Host| {
            h.lent = None;
            h.shown = h.shown.map(|r| Record { migration: None, ..r });
            h.disk = h.shown;
        };
        each(Step::SourceStoresThatItStays, self.and(at, ended, back));
    }

    /// The end of a session whose guest's memory is gone here, stored.
    fn settled(&self, outcome: HandOverOutcome) -> World {
        let moved = outcome == HandOverOutcome::Committed;
        let ended = |s: &mut Session| {
            s.source_record = if moved { MigrationState::Succeeded } else { MigrationState::Failed };
            (s.source, s.asks) = (None, false);
            (s.source_leave, s.source_helper, s.source_key) = (Leave::Open, SourceOp::Running, 0);
        };
        let stopped = |h: &mut Host| {
            let left = |r: Record| Record {
                state: GuestState::Stopped,
                moved,
                unconfirmed: r.unconfirmed && !moved,
                migration: None,
            };
            (h.lent, h.shown) = (None, h.shown.map(left));
            h.disk = h.shown;
        };
        self.and(usize::from(self.s.from), ended, stopped)
    }

    fn settle_after_restart(&self, each: &mut impl FnMut(Step, World)) {
        let s = &self.s;
        let mut hears = |step, heard| {
            if let Some(outcome) = self.tells(heard, Witness::Records, false) {
                each(step, self.settled(outcome));
            }
        };
        for (tokens, outcome) in
            [(s.commit, HandOverOutcome::Committed), (s.abort, HandOverOutcome::NeverCommitted)]
        {
            if tokens != 0 {
                hears(Step::RestartedSourceHears(outcome), Heard::Token { outcome, by_hand: false });
            }
        }
        if s.never {
            hears(Step::RestartedSourceHears(HandOverOutcome::NeverCommitted), Heard::Never);
        }
        if let Some(outcome) = s.word {
            hears(Step::RestartedSourceTakesWord, Heard::Word(outcome));
        }
        for outcome in OUTCOMES {
            hears(Step::WorthlessTokenByHand(outcome), Heard::Token { outcome, by_hand: true });
        }
    }

    fn destination(&self, each: &mut impl FnMut(Step, World)) {
        let (s, terms) = (&self.s, self.terms);
        let at = s.destination_host();
        self.answer(each);
        let after = |at: Destination, event| {
            Some(match terms.order {
                Some(order) => at.step_in(event, terms.guards, order),
                None => at.step_under(event, terms.guards),
            })
        };
        let Some(destination) = s.destination else { return self.admit(each) };
        let after = |event| after(destination, event);
        if terms.hostile && destination != Destination::Receiving {
            return;
        }
        match destination {
            Destination::Receiving => {
                let helper = s.destination_helper;
                if let Ok(helper) = helper.step(HelperEvent::State)
                    && s.state & bit(s.import) != 0
                {
                    each(Step::DestinationTakesState, self.with(|s| s.destination_helper = helper));
                }
                for key in imports(s.start) {
                    let Ok(opened) = helper.step(HelperEvent::StartToken) else { break };
                    let genuine = key == s.import;
                    let failed = helper.step(HelperEvent::Fail).unwrap_or(helper);
                    let (step, helper, event) = if genuine {
                        (Step::DestinationOpensStart, opened, DestinationEvent::Started)
                    } else {
                        (Step::DestinationIsGivenOtherStart, failed, DestinationEvent::Failed)
                    };
                    let taken = |s: &mut Session| {
                        (s.destination_helper, s.destination) = (helper, after(event));
                    };
                    each(step, self.with(taken));
                }
                if !terms.hostile {
                    let failed = |s: &mut Session| s.destination = after(DestinationEvent::Failed);
                    each(Step::DestinationFails, self.with(failed));
                }
            }
            Destination::Complete => {
                let leave = s.destination_leave.pass();
                let event =
                    if leave == Leave::Past { DestinationEvent::Passed } else { DestinationEvent::Failed };
                let passed = |s: &mut Session| (s.destination_leave, s.destination) = (leave, after(event));
                each(Step::DestinationPassesPointOfNoReturn, self.with(passed));
                each(Step::DestinationFails, self.with(|s| s.destination = after(DestinationEvent::Failed)));
            }
            Destination::Minting => {
                let Ok(helper) = s.destination_helper.step(HelperEvent::Commit) else { return };
                let minted = |s: &mut Session| {
                    (s.destination_helper, s.destination) = (helper, after(DestinationEvent::Minted));
                };
                each(Step::DestinationMintsCommit, self.with(minted));
                if terms.refusals {
                    let none = |s: &mut Session| s.destination = after(DestinationEvent::NotMinted);
                    each(Step::DestinationMintsNoCommit, self.with(none));
                    let lost = |s: &mut Session| {
                        (s.destination_helper, s.destination) = (helper, after(DestinationEvent::NotMinted));
                    };
                    each(Step::DestinationLosesMintedCommit, self.with(lost));
                }
            }
            Destination::Noting => self.note_commit(after, each),
            Destination::Telling => {
                let told = |s: &mut Session| {
                    s.commit |= bit(s.import);
                    (s.told, s.destination) = (true, after(DestinationEvent::Told));
                };
                each(Step::DestinationTellsCommit, self.with(told));
            }
            Destination::Running => {
                let ran = |s: &mut Session| (s.ran, s.destination) = (true, after(DestinationEvent::Ran));
                each(Step::DestinationRunsGuest, self.and(at, ran, |h| h.runs = true));
            }
            Destination::Here => {
                let arrived = |s: &mut Session| {
                    (s.destination, s.destination_leave) = (None, Leave::Open);
                    (s.destination_helper, s.import) = (DestinationOp::Idle, 0);
                    s.destination_record = Some(MigrationState::Succeeded);
                };
                let shown = |h: &mut Host| (h.shown, h.disk) = (Some(Record::RUNS), Some(Record::RUNS));
                each(Step::DestinationShowsGuest, self.and(at, arrived, shown));
            }
            Destination::GivingUp => self.give_up(each),
            Destination::Left => {}
        }
    }

    fn admit(&self, each: &mut impl FnMut(Step, World)) {
        let (s, guards) = (&self.s, self.terms.guards);
        let at = s.destination_host();
        let there = self.world.hosts[at].shown;
        let free = there.is_none_or(|r| makes_way_under(r.state, r.moved, guards));
        let new = is_new_session_under(s.known().is_some(), s.destination_record.is_some(), guards);
        if !s.prepare || s.imports == IMPORTS || !free || !new {
            return;
        }
        let admitted = |s: &mut Session| {
            s.imports += 1;
            s.prepare &= self.terms.repeats;
            (s.import, s.replaced) = (s.imports, there.is_some());
            (s.journal, s.destination_record) = (Some(Settlement::Open), Some(MigrationState::Preparing));
            s.old_journal = false;
            (s.destination, s.destination_leave) = (Some(Destination::Receiving), Leave::Open);
            s.destination_helper =
                DestinationOp::Idle.step(HelperEvent::Begin).unwrap_or(DestinationOp::Idle);
            s.prepared |= bit(s.import);
        };
        let incoming = Record {
            state: GuestState::Incoming,
            moved: false,
            unconfirmed: false,
            migration: Some(self.id),
        };
        let placed = |h: &mut Host| {
            (h.shown, h.disk, h.runs, h.lent) = (Some(incoming), Some(incoming), false, None);
        };
        each(Step::DestinationAdmits, self.and(at, admitted, placed));
    }

    /// COMMIT on disk, and what comes of it.
    fn note_commit(
        &self,
        after: impl Fn(DestinationEvent) -> Option<Destination>,
        each: &mut impl FnMut(Step, World),
    ) {
        let at = self.s.destination_host();
        let written = |event| {
            let noted = |s: &mut Session| {
                s.journal = Some(Settlement::Committed { token: s.import });
                s.old_journal = false;
                s.destination_record = Some(MigrationState::Succeeded);
                s.destination = after(event);
            };
            self.and(at, noted, |h| h.disk = Some(Record::RUNS))
        };
        each(Step::DestinationStoresCommit, written(DestinationEvent::Noted));
        each(Step::DestinationIsAskedToGo, self.with(|s| s.destination = after(DestinationEvent::Leaving)));
        if self.terms.refusals {
            let refused = |s: &mut Session| s.destination = after(DestinationEvent::NotNoted);
            each(Step::DestinationIsRefusedToStoreCommit, self.with(refused));
            each(Step::DestinationStoresCommitAndIsToldItDidNot, written(DestinationEvent::NotNoted));
        }
    }

    /// ABORT if the helper mints it, the guest's place gone; stored and told.
    fn give_up(&self, each: &mut impl FnMut(Step, World)) {
        let at = self.s.destination_host();
        let minted = self.s.destination_helper.step(HelperEvent::Fail).is_ok();
        let over = |s: &mut Session| {
            let token = minted.then_some(s.import);
            s.abort |= token.map_or(0, bit);
            (s.destination, s.destination_leave) = (None, Leave::Open);
            (s.destination_helper, s.import) = (DestinationOp::Idle, 0);
            token
        };
        let before = self.s.replaced.then_some(Record::LEFT);
        let stored = |s: &mut Session| {
            s.journal = Some(Settlement::Aborted { token: over(s) });
            s.destination_record = Some(MigrationState::Failed);
        };
        let gone = |h: &mut Host| (h.shown, h.disk, h.runs) = (before, before, false);
        each(Step::DestinationAborts, self.and(at, stored, gone));
        if self.terms.refusals {
            let kept = |s: &mut Session| s.unstored = Some(over(s));
            let gone = |h: &mut Host| (h.shown, h.runs) = (before, false);
            each(Step::DestinationAbortsAndCannotStoreIt, self.and(at, kept, gone));
        }
    }

    /// The answer to a question that may come at any time, by two looks.
    fn answer(&self, each: &mut impl FnMut(Step, World)) {
        let (s, guards) = (&self.s, self.terms.guards);
        if !s.asked {
            return;
        }
        let first = if guards.hold(Guard::UnderWayIsLookedAtFirst) {
            Look::UnderWay(s.destination.is_some())
        } else {
            Look::Journal(s.known())
        };
        if s.look == Look::None {
            return each(Step::DestinationLooksForAnswer, self.with(|s| s.look = first));
        }
        let (under_way, known) = match s.look {
            Look::UnderWay(under_way) => (under_way, s.known()),
            Look::Journal(known) => (s.destination.is_some(), known),
            Look::None => return,
        };
        let reply = known
            .map(|settled| reply_under(Journaled { settled, old_state: s.old_journal }, under_way, guards));
        let said = |s: &mut Session| {
            s.look = Look::None;
            match reply {
                Some(Reply::Committed(import)) => (s.commit, s.told) = (s.commit | bit(import), true),
                Some(Reply::Aborted(import)) => s.abort |= bit(import),
                Some(Reply::Never) => s.never = true,
                Some(Reply::Pending) | None => {}
            }
        };
        each(Step::DestinationAnswers, self.with(said));
    }

    /// What users, the network and a hostile host do.
    fn around(&self, each: &mut impl FnMut(Step, World)) {
        let (s, terms) = (&self.s, self.terms);
        let anything = s.prepared | s.state | s.start | s.commit | s.abort;
        if s.prepare || s.never || anything != 0 {
            let lost = |s: &mut Session| {
                (s.prepare, s.never) = (false, false);
                (s.prepared, s.state, s.start, s.commit, s.abort) = (0, 0, 0, 0, 0);
            };
            each(Step::NetworkLosesAll, self.with(lost));
        }
        if terms.calling_off {
            let moving = !matches!(s.source, None | Some(Source::Back | Source::Gone));
            if let Ok(leave) = s.source_leave.call_off_under(terms.guards)
                && leave != s.source_leave
                && moving
            {
                each(Step::CalledOffAtSource, self.with(|s| s.source_leave = leave));
            }
            let moving = !matches!(s.destination, None | Some(Destination::GivingUp | Destination::Left));
            if let Ok(leave) = s.destination_leave.call_off_under(terms.guards)
                && leave != s.destination_leave
                && moving
            {
                each(Step::CalledOffAtDestination, self.with(|s| s.destination_leave = leave));
            }
        }
        // An administrator who has looked at both hosts: only to who is in doubt, and once.
        if s.asks && s.word.is_none() && self.world.hosts[usize::from(s.from)].up {
            for outcome in OUTCOMES.into_iter().filter(|o| s.is_true(*o)) {
                each(Step::AdministratorSays(outcome), self.with(|s| s.word = Some(outcome)));
            }
        }
        if terms.hostile && s.destination.is_some() {
            self.hostile(each);
        }
    }

    /// A host that has its helper mint what it can, and says what it likes.
    fn hostile(&self, each: &mut impl FnMut(Step, World)) {
        let (s, broken) = (&self.s, self.terms.broken_helper);
        if s.asked && !s.never {
            each(Step::HostileHostClaimsNever, self.with(|s| s.never = true));
        }
        let helper = s.destination_helper;
        let breaks = |rule, at| broken == Some(rule) && helper == at;
        let commit = helper.step(HelperEvent::Commit).is_ok()
            || breaks(HelperRule::NoCommitAfterAbort, DestinationOp::FailedImport)
            || breaks(HelperRule::CommitAfterStart, DestinationOp::StateImport);
        if commit {
            let minted = |s: &mut Session| {
                s.destination_helper = DestinationOp::LiveImport;
                s.commit |= bit(s.import);
                // He runs it as soon as he can; that he keeps a journal is not expected.
                s.journal = Some(Settlement::Committed { token: s.import });
            };
            each(Step::HostileHostHasCommitMinted, self.and(s.destination_host(), minted, |h| h.runs = true));
        }
        let abort = helper.step(HelperEvent::Fail);
        if abort.is_ok() || breaks(HelperRule::NoAbortAfterCommit, DestinationOp::LiveImport) {
            let minted = |s: &mut Session| {
                s.destination_helper = abort.unwrap_or(helper);
                s.abort |= bit(s.import);
            };
            each(Step::HostileHostHasAbortMinted, self.with(minted));
        }
    }
}

const fn bit(import: u8) -> u8 {
    1 << import
}

/// The imports in a set.
fn imports(set: u8) -> impl Iterator<Item = u8> {
    (1..=IMPORTS).filter(move |import| set & bit(*import) != 0)
}
