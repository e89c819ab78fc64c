//! Outgoing migrations from their beginning on: leasing the guest, running the source's course, settling
//! doubt, giving back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::audits;
use super::definition::Definition;
use super::entry::MigrationEntry;
use super::hand_over::Together;
use super::reserve::Reserve;
use super::resolution;
use crate::codes::Code;
use crate::guest::Machine;
use crate::host::faults::migration_fault;
use crate::host::guests::command::{Command, GiveBack, Lease};
use crate::host::guests::entry::GuestEntry;
use crate::host::inner::Inner;
use crate::host::{
    Fault, GuestRecord, GuestState, HandOverOutcome, HostError, Labels, MigrationRecord, MigrationSpec,
    MigrationState, NotRun, PeerRecord, ProtectionLevel, ResourceKind, SourceAfter, Subject,
};
use crate::migration::hand_over::{Belief, Heard, Source, SourceEvent, Witness, believe};
use crate::migration::wire::Outcome;
use crate::migration::{
    Departure, Held, Journal, Kept, MigrationFault, Outgoing, PeerAddress, Sequel, SourceEnd, Terms, hear,
    resolve, resume_here, run_source,
};
use crate::mirror::Mirror;
use crate::pages::PageSet;
use crate::transport::{LinkError, PeerIdentity};

/// One migration, from the guest that it gets to what its record says in the end.
pub(super) struct Run {
    pub inner: Arc<Inner>,
    pub entry: Arc<MigrationEntry>,
    pub guest: Arc<GuestEntry>,
    pub peer: PeerRecord,
}

impl Run {
    /// Runs it on this thread, to its end.
    pub fn run(&self, space: Reserve) {
        let started = self.entry.change(|r| r.started_at = Some(Timestamp::now()));
        if self.entry.control.is_cancelled() {
            drop(space);
            self.release();
            return self.finish(MigrationState::Canceled, None);
        }
        let Some(spec) = started.spec else { return self.release() };
        let lease = self.guest.ask_blocking(|reply| Command::Lend {
            migration: self.entry.id,
            choice: spec.mirror.clone(),
            template: spec.template.clone(),
            streams: spec.streams,
            reply,
        });
        match lease {
            Ok(lease) => self.with_lease(&spec, lease, Arc::new(space)),
            Err(error) => {
                drop(space);
                tracing::warn!(error = %crate::chain::chain(&error), "a migration got no guest");
                let fault = match &error {
                    HostError::WrongState {
                        kind: Subject::Resource(ResourceKind::Guest), current, ..
                    } => {
                        let detail = format!("the guest is {current}: it ended before the migration began");
                        Fault::new(Code::GuestEnded, detail)
                    }
                    error => crate::host::faults::host_fault(error),
                };
                self.release();
                self.finish(MigrationState::Failed, Some(fault));
            }
        }
    }

    /// Gives the guest back that was claimed and never taken. Before the end is told: whoever sees that finds
    /// it free.
    fn release(&self) {
        let (done, told) = tokio::sync::oneshot::channel();
        if self.guest.tell_blocking(Command::Release { migration: self.entry.id, done }) {
            let _ = told.blocking_recv();
        }
    }

    fn with_lease(&self, spec: &MigrationSpec, lease: Lease, space: Arc<Reserve>) {
        let Lease { mut machine, mut mirror, mirror_id, transient, was_running, record } = lease;
        self.entry.attach(mirror.watch());
        let stays = |fault| (SourceEnd::NotMoved { fault, resumed: was_running }, None);
        let identity = self.peer.spec.identity.parse::<PeerIdentity>();
        let identity =
            identity.map_err(|_| MigrationFault::Protocol("the peer's stored identity cannot be read"));
        let told = identity.and_then(|i| Ok((i, definition(&record, machine.as_mut())?)));
        let (end, peer) = match told {
            Err(fault) => stays(fault),
            Ok((identity, definition)) => {
                let peer = (self.peer.spec.address.clone(), identity);
                let out = Outgoing {
                    id: self.entry.id,
                    departure: Departure {
                        guest: record.id,
                        definition: &definition,
                        layout: &record.layout,
                        protection: record.protection,
                    },
                    terms: Terms {
                        mode: spec.mode,
                        streams: spec.streams,
                        stream_transport: spec.stream_transport,
                        suite: spec.suite,
                        verify: spec.verify,
                        audit: spec.audit,
                    },
                    peer,
                    identity: &self.inner.identity,
                    host: &self.inner.name,
                    helper_measurement: mirror.helper_measurement(),
                    control: &self.entry.control,
                    journal: self,
                };
                let peer = out.peer.clone();
                (run_source(&out, machine.as_mut(), &mut mirror, was_running), Some(peer))
            }
        };
        let end = match (end, peer) {
            (SourceEnd::InDoubt { fault }, Some(peer)) => {
                self.settle(spec, fault, peer, machine.as_mut(), &mut mirror, was_running)
            }
            (end, _) => end,
        };
        let back = Back { machine, mirror, mirror_id, keep_mirror: !transient };
        self.give_back(spec, end, back, space);
    }

    /// After START without an answer: asks until a token tells, an administrator does, or the daemon goes.
    fn settle(
        &self,
        spec: &MigrationSpec,
        fault: MigrationFault,
        (mut address, identity): PeerAddress,
        machine: &mut dyn Machine,
        mirror: &mut Mirror,
        was_running: bool,
    ) -> SourceEnd {
        tracing::warn!(migration = %self.entry.id, fault = %crate::chain::chain(&fault), "in doubt; asking the destination");
        let mut tokens = self.entry.take_tokens();
        // The guest first: whoever sees the migration in doubt finds the guest so. An owner that is gone has
        // nothing to show.
        let _ = self.guest.ask_blocking(Command::InDoubt);
        // Whatever ends it, nobody waits for digests there any more.
        let audit = self.entry.control.live().audit.filter(|a| !a.is_pending());
        self.entry.control.update(|l| {
            (l.state, l.committing) = (MigrationState::InDoubt, false);
            l.audit = audit.or_else(|| audits::lost(spec.audit));
        });
        self.note(|r| r.error = Some(migration_fault(&fault)));
        let hosts_are_trusted = self.guest.record().protection == ProtectionLevel::None;
        let mut doubt = Doubt { verify: spec.verify, machine, mirror, was_running, hosts_are_trusted };
        let mut patience = Duration::from_millis(100);
        loop {
            if self.inner.is_stopping() {
                return SourceEnd::InDoubt { fault };
            }
            // A peer that was renumbered since is the same one: its key says so, and what is known of it says
            // where.
            if let Ok(peer) = self.inner.find_peer(&self.peer.id.to_string()) {
                address = peer.spec.address;
            }
            let peer = (address.clone(), identity);
            let answer = resolve(&peer, &self.inner.identity, &self.inner.name, self.entry.id);
            let (heard, token) = heard(answer.ok());
            if let Some(end) = doubt.hear(heard, &token) {
                return end;
            }
            let next_look = Instant::now() + patience;
            while Instant::now() < next_look && !self.inner.is_stopping() {
                if let Some(word) = self.entry.record().resolution {
                    tracing::warn!(migration = %self.entry.id, outcome = word.outcome.name(), reason = word.reason,
                        "a doubt is ended by an administrator's word");
                    if let Some(end) = doubt.hear(Heard::Word(word.outcome), &[]) {
                        return end;
                    }
                }
                if let Ok((carried, reply)) = tokens.try_recv() {
                    let heard = Heard::Token { outcome: carried.outcome, by_hand: true };
                    let end = doubt.hear(heard, &carried.token);
                    let _ = reply.send(end.as_ref().map(|_| ()).ok_or_else(resolution::token_refused));
                    if let Some(end) = end {
                        return end;
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            patience = (patience * 2).min(Duration::from_secs(5));
        }
    }

    fn give_back(&self, spec: &MigrationSpec, end: SourceEnd, back: Back, space: Arc<Reserve>) {
        let Back { machine, mirror, mirror_id, keep_mirror } = back;
        match end {
            SourceEnd::InDoubt { .. } => {
                // The daemon goes while in doubt: the record stays so, and the next daemon asks on.
                self.note(|_| {});
                drop((machine, mirror));
            }
            SourceEnd::Succeeded { digests, sequel } => {
                // The memory goes before anybody is told, so that whoever sees the end finds nothing left; an
                // audit keeps it for as long as it takes.
                let shared = machine.encryption().shared();
                let held = match &sequel {
                    Sequel::Audit(_) => {
                        let bytes = self.inner.claimed_bytes(&self.guest.record());
                        Some(Arc::new(Held::new(Kept { machine: Some(machine), mirror }, bytes)))
                    }
                    Sequel::Nothing => {
                        drop((machine, mirror));
                        None
                    }
                };
                if let Some(held) = &held {
                    self.inner.audits.keep(self.entry.id, self.guest.id, held);
                }
                self.inner.forget_mirror(mirror_id);
                self.entry.keep_digests(digests);
                self.handed_over(spec, space);
                if let Some(held) = held {
                    follow(&self.inner, &self.entry, &self.guest, (sequel, held), shared);
                }
            }
            SourceEnd::NotMoved { fault, resumed } => {
                let state = match fault {
                    MigrationFault::Canceled => MigrationState::Canceled,
                    _ => MigrationState::Failed,
                };
                let error = (state == MigrationState::Failed).then(|| {
                    tracing::warn!(migration = %self.entry.id, fault = %crate::chain::chain(&fault), "a migration failed");
                    migration_fault(&fault)
                });
                let ended = last_word(state, error);
                let migration = self.entry.next(|r| ended(r));
                let (done, state) = tokio::sync::oneshot::channel();
                let with = Together { migration, hand_over: None, space: None };
                let back = GiveBack { machine, mirror, mirror_id, keep_mirror, running: resumed, with, done };
                // Whatever is stored now has the room that was set aside.
                drop(space);
                self.guest.tell_blocking(Command::GiveBack(Box::new(back)));
                // The owner shows both ends together; without one, this is all there is to tell.
                if state.blocking_recv().is_err() {
                    self.finish_as(ended);
                }
            }
        }
    }

    /// The guest is the destination's. That is told when it is stored, however long that takes: until then a
    /// restart would find the migration in doubt, and so would whoever asks.
    fn handed_over(&self, spec: &MigrationSpec, space: Arc<Reserve>) {
        let ended = last_word(MigrationState::Succeeded, None);
        let change = |r: &mut MigrationRecord| {
            ended(r);
            r.guest_state_after = Some(GuestState::Stopped);
        };
        let delete = spec.source_after == SourceAfter::Delete;
        let mut patience = Duration::from_millis(20);
        loop {
            let space = Some(Arc::clone(&space));
            let with = Box::new(Together { migration: self.entry.next(change), hand_over: None, space });
            let peer = self.peer.spec.name.clone();
            match self.guest.ask_blocking(|reply| Command::HandedOver { peer, delete, with, reply }) {
                // The guest's owner has gone with the daemon.
                Ok(()) | Err(HostError::NotFound { .. }) => return,
                Err(error) => {
                    tracing::error!(migration = %self.entry.id, error = %crate::chain::chain(&error),
                        "that the guest was handed over cannot be stored yet");
                }
            }
            if self.inner.is_stopping() {
                return;
            }
            std::thread::sleep(patience);
            patience = (patience * 2).min(Duration::from_secs(1));
        }
    }

    /// The last word on a migration that never had the guest.
    fn finish(&self, state: MigrationState, error: Option<Fault>) {
        self.finish_as(last_word(state, error));
    }

    fn finish_as(&self, ended: impl Fn(&mut MigrationRecord)) {
        self.note(|r| {
            ended(r);
            r.guest_state_after = Some(self.guest.record().state);
        });
    }

    fn note(&self, change: impl FnOnce(&mut MigrationRecord)) {
        self.inner.migration_happened(&self.entry, change);
    }
}

/// Carries out the audit of a guest that left, beside everything else.
fn follow(
    inner: &Arc<Inner>,
    entry: &Arc<MigrationEntry>,
    guest: &Arc<GuestEntry>,
    (sequel, held): (Sequel, Arc<Held>),
    shared: PageSet,
) {
    let (inner, entry, guest) = (Arc::clone(inner), Arc::clone(entry), Arc::clone(guest));
    let runtime = inner.runtime.clone();
    runtime.spawn_blocking(move || {
        let audit = sequel.audit(&held, &shared, &entry.control);
        // The memory goes before anybody is told, so that whoever sees the end finds nothing left.
        held.free(NotRun::PeerLost);
        inner.audits.forget(entry.id);
        let Some(audit) = audit else { return };
        inner.audited(&entry, audit.clone());
        guest.tell_blocking(Command::Audited { migration: entry.id, audit });
    });
}

/// What a migration's record says from its end on.
fn last_word(state: MigrationState, error: Option<Fault>) -> impl Fn(&mut MigrationRecord) {
    let finished_at = Some(Timestamp::now());
    move |r| {
        r.state = state;
        r.committing = false;
        r.error.clone_from(&error);
        r.finished_at = finished_at;
    }
}

/// What a migration had of a guest.
struct Back {
    machine: Box<dyn Machine>,
    mirror: Mirror,
    mirror_id: Uuid,
    keep_mirror: bool,
}

/// A guest after START of which nobody knows yet whose it is.
struct Doubt<'a> {
    verify: bool,
    machine: &'a mut dyn Machine,
    mirror: &'a mut Mirror,
    was_running: bool,
    hosts_are_trusted: bool,
}

impl Doubt<'_> {
    /// The end, if what is heard tells whose the guest is; `token` is empty where it is none.
    fn hear(&mut self, heard: Heard, token: &[u8]) -> Option<SourceEnd> {
        let outcome = hear(heard, token, self.mirror, self.hosts_are_trusted).ok().flatten()?;
        match Source::Waiting.step(SourceEvent::Told(outcome)) {
            Source::Gone => {
                let opened = matches!(heard, Heard::Token { .. });
                let digests = if self.verify && opened { self.machine.page_digests() } else { None };
                Some(SourceEnd::Succeeded { digests, sequel: Sequel::Nothing })
            }
            Source::Back => {
                let reason = match heard {
                    Heard::Word(_) => MigrationFault::Resolved,
                    Heard::Token { .. } | Heard::Never | Heard::Nothing => {
                        MigrationFault::PeerLost(LinkError::Broken)
                    }
                };
                Some(resume_here(self.machine, self.was_running, reason))
            }
            Source::Here | Source::Noting | Source::Minting | Source::Sending | Source::Waiting => None,
        }
    }
}

/// What an answer of the destination's host says, and the token that it gave.
fn heard(answer: Option<Outcome>) -> (Heard, Vec<u8>) {
    let said = |outcome| Heard::Token { outcome, by_hand: false };
    match answer {
        Some(Outcome::Committed { token }) => (said(HandOverOutcome::Committed), token),
        Some(Outcome::Aborted { token }) => (said(HandOverOutcome::NeverCommitted), token),
        Some(Outcome::NeverCommitted {}) => (Heard::Never, Vec::new()),
        Some(Outcome::Pending {}) | None => (Heard::Nothing, Vec::new()),
    }
}

/// Whose the guest is by what is heard when the helper is gone.
const fn told_by_records(heard: Heard) -> Option<HandOverOutcome> {
    match believe(heard, Witness::Records) {
        Belief::Ends(outcome) => Some(outcome),
        Belief::WhenOpened(_) | Belief::CannotBeOpened | Belief::Stays => None,
    }
}

impl Journal for Run {
    fn held(&self) {
        // Not waited for: the guest's owner does one thing after the other, and START is journaled by it,
        // too.
        self.guest.tell_blocking(Command::Held);
    }

    fn runs_on(&self) {
        self.guest.tell_blocking(Command::RunsOn);
    }

    fn start_sent(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let migration = self.entry.next(|r| r.state = MigrationState::InDoubt);
        let with = Box::new(Together { migration, hand_over: None, space: None });
        Ok(self.guest.ask_blocking(|reply| Command::StartSent(with, reply))?)
    }

    fn last_labels(&self) -> Result<Labels, Box<dyn std::error::Error + Send + Sync>> {
        let migration = self.entry.id;
        Ok(self.guest.ask_blocking(|reply| Command::HoldLabels { migration, reply })?)
    }
}

/// After a restart: a migration that was in doubt. The guest's memory went with the old daemon, so the answer
/// decides only what the records say.
pub(in crate::host) async fn settle_after_restart(inner: Arc<Inner>, entry: Arc<MigrationEntry>) {
    let mut tokens = entry.take_tokens();
    let mut patience = Duration::from_millis(200);
    while !inner.is_stopping() {
        let record = entry.record();
        // A ticket's destination is no known peer: the ticket says where it is.
        let ticket = record.spec.as_ref().and_then(|s| s.destination.ticket().ok().flatten());
        let peer = match ticket {
            Some(ticket) => ticket.peer().ok(),
            None => inner.find_peer(&record.peer).ok(),
        };
        let address =
            peer.and_then(|p| Some((p.spec.address, p.spec.identity.parse::<PeerIdentity>().ok()?)));
        let answer = match address {
            None => None,
            Some(address) => {
                let (theirs, id) = (Arc::clone(&inner), entry.id);
                let ask = move || resolve(&address, &theirs.identity, &theirs.name, id).ok();
                tokio::task::spawn_blocking(ask).await.ok().flatten()
            }
        };
        let mut outcome = told_by_records(heard(answer).0);
        let next_look = Instant::now() + patience;
        while outcome.is_none() && Instant::now() < next_look {
            outcome = entry.record().resolution.and_then(|w| told_by_records(Heard::Word(w.outcome)));
            if let Ok((carried, reply)) = tokens.try_recv() {
                outcome = outcome
                    .or_else(|| told_by_records(Heard::Token { outcome: carried.outcome, by_hand: true }));
                // The helper that could check it went with the daemon that sent START.
                let _ = reply.send(outcome.map(|_| ()).ok_or_else(resolution::nobody_checks));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if let Some(outcome) = outcome {
            if settled_after_restart(&inner, &entry, outcome).await {
                return;
            }
            tokio::time::sleep(patience).await;
        }
        patience = (patience * 2).min(Duration::from_secs(10));
    }
}

/// Stores and shows the end of a doubt whose guest's memory is lost; false when it could not be stored.
async fn settled_after_restart(
    inner: &Arc<Inner>,
    entry: &Arc<MigrationEntry>,
    outcome: HandOverOutcome,
) -> bool {
    let moved = outcome == HandOverOutcome::Committed;
    let ended = if moved {
        last_word(MigrationState::Succeeded, None)
    } else {
        let detail = "the daemon restarted before the answer to START; the guest's memory is lost".to_owned();
        last_word(MigrationState::Failed, Some(Fault::new(Code::SourceRestarted, detail)))
    };
    let change = move |r: &mut MigrationRecord| {
        ended(r);
        r.guest_state_after = Some(GuestState::Stopped);
    };
    let record = entry.next(&change);
    let delete = record.spec.as_ref().is_some_and(|s| s.source_after == SourceAfter::Delete);
    let Ok(guest) = inner.find_guest(&record.guest.to_string()) else {
        let (inner, entry) = (Arc::clone(inner), Arc::clone(entry));
        let note = move || inner.migration_happened(&entry, change);
        return tokio::task::spawn_blocking(note).await.is_ok();
    };
    let peer = moved.then(|| record.peer.clone());
    let with = Box::new(Together { migration: record, hand_over: None, space: None });
    // Both are shown together: whoever sees the one sees the other.
    let stored = guest.ask(|reply| Command::Settled { peer, delete, with, reply }).await;
    if let Err(error) = &stored {
        tracing::error!(migration = %entry.id, error = %crate::chain::chain(error), "the end of a doubt cannot be stored yet");
    }
    stored.is_ok()
}

/// The document that tells the destination's host of a guest.
fn definition(record: &GuestRecord, machine: &mut dyn Machine) -> Result<String, MigrationFault> {
    let document = Definition::of(record, machine.machine_type()?).write();
    document.map_err(|_| MigrationFault::Protocol("a definition that cannot be written"))
}
