//! Incoming migrations: who may come, making a place, and the answer to "what became of it".

use std::sync::{Arc, Mutex, mpsc};

use jiff::Timestamp;
use uuid::Uuid;

use crate::boot_files::BootFiles;
use crate::codes::{Code, PeerRefusal};
use crate::host::faults::migration_fault;
use crate::host::guests::command::{Command, Vanish};
use crate::host::guests::task;
use crate::host::inner::Inner;
use crate::host::machines::{GuestMemory, IncomingMachine, MakeError};
use crate::host::migrations::admission::{Arriving, definition_of, document_bytes, record_of, taken};
use crate::host::migrations::confirm;
use crate::host::migrations::definition::Definition;
use crate::host::migrations::entry::MigrationEntry;
use crate::host::migrations::hand_over::{HandOver, Settlement, Together};
use crate::host::migrations::journal::{hand_over, storing};
use crate::host::migrations::refusals::{
    first, machine_refusal, no_leave, no_room, not_stored, refuse, refused_by, session_exists, ticket_unread,
};
use crate::host::migrations::reserve::Reserve;
use crate::host::{
    Audit, GuestRecord, GuestState, HostError, Labels, LaunchMirror, MigrationDirection, MigrationRecord,
    MigrationState, NotRun, ProtectionLevel, ResourceKind, bounds, validate,
};
use crate::migration::hand_over::{Journaled, Reply, answer};
use crate::migration::wire::{self, FIND_MAX, Outcome, Prepare, Purpose, Refused, kind};
use crate::migration::{
    Arrival, Arrived, Held, MigrationFault, NotStored, Receiver, Spoken, Suite, accept_hello, serve_check,
    serve_import,
};
use crate::mirror::SealedToken;
use crate::store::{Batch, Kind, StoreError};
use crate::sync::Locked;
use crate::transport::{Link, LogBudget, PeerIdentity};

/// Serves one link of an admitted peer, on its own thread.
pub(in crate::host) fn serve(inner: &Arc<Inner>, mut link: Link) {
    let identity = *link.peer();
    let Some(peer) = peer_name(inner, &identity) else { return };
    let (purpose, agreed) = match accept_hello(&mut link, &inner.identity, &inner.name) {
        Ok(agreed) => agreed,
        Err(fault) => {
            static SAID: LogBudget = LogBudget::new();
            if let Some(unlogged) = SAID.take() {
                tracing::info!(peer, unlogged, fault = %crate::chain::chain(&fault), "a peer's hello was not accepted");
            }
            let _ = link.close();
            return;
        }
    };
    // Not by such a question: two hosts that have both to ask would never rest.
    if !matches!(purpose, Purpose::Find { .. }) {
        inner.peer_heard.notify_one();
    }
    match purpose {
        Purpose::Migrate {} => {
            serve_import(Spoken { link, agreed }, &peer, &Destination::new(inner, identity));
        }
        Purpose::Stream { session, index } => {
            // Only the peer that brought the session adds streams to it.
            let wanted = inner.streams().get(&session).cloned();
            if let Some((_, sender)) = wanted.filter(|(owner, _)| *owner == identity) {
                // Of those that nobody waits for any more, none is kept.
                let _ = sender.try_send((index, link));
            }
        }
        Purpose::Resolve { session } => resolve(inner, link, &identity, session),
        Purpose::Check {} => serve_check(link, &peer, |prepare| {
            let against =
                definition_of(inner, prepare).map_err(|refusal| vec![refusal]).and_then(|definition| {
                    Arriving { inner, identity: &identity, prepare, definition: &definition }.admit()
                });
            against.err().unwrap_or_default()
        }),
        Purpose::Find { guests } => {
            // For hosts that are known; a ticket is for one migration.
            let text = identity.to_string();
            let known = inner.peers().values().any(|p| p.spec.identity == text);
            let found: Vec<_> =
                guests.iter().take(FIND_MAX).map(|g| confirm::holding(inner, *g, &text)).collect();
            if known && wire::send(&mut link, kind::FOUND, &found).is_ok() {
                let _ = link.close();
            }
        }
        // Told by who accepts a hello.
        Purpose::Unknown => {}
        Purpose::Ask {} => {
            if wire::send(&mut link, kind::ABILITIES, &inner.capabilities().to_peers()).is_ok() {
                let _ = link.close();
            }
        }
    }
}

fn peer_name(inner: &Inner, identity: &PeerIdentity) -> Option<String> {
    let text = identity.to_string();
    let known = inner.peers().values().find(|p| p.spec.identity == text).map(|p| p.spec.name.clone());
    known.or_else(|| inner.ticket_holder(identity))
}

/// What became of a session: for the peer that brought it, and nobody else.
fn resolve(inner: &Inner, mut link: Link, identity: &PeerIdentity, session: Uuid) {
    let under_way = || inner.migration_entry(session).is_some_and(|m| !m.record().state.is_terminal());
    let theirs = |h: &HandOver| h.peer == identity.to_string();
    let journaled = |h: HandOver| Journaled { settled: h.settled, old_state: h.unconfirmed };
    let journal = || Ok(hand_over(inner, session)?.filter(theirs).map(journaled));
    let reply = match answer(under_way, journal) {
        Ok(reply) => reply,
        Err(error) => {
            let error: StoreError = error;
            tracing::error!(%session, error = %crate::chain::chain(&error), "a source asks, and the journal cannot be read");
            let refusal = refuse(PeerRefusal::Storage, "the destination's storage failed");
            let _ = wire::send(&mut link, kind::REFUSED, &refusal).map(|()| link.close());
            return;
        }
    };
    let outcome = reply.map(|reply| match reply {
        Reply::Committed(token) => Outcome::Committed { token },
        Reply::Aborted(token) => Outcome::Aborted { token },
        Reply::Never => Outcome::NeverCommitted {},
        Reply::Pending => Outcome::Pending {},
    });
    let sent = match outcome {
        Some(outcome) => wire::send(&mut link, kind::OUTCOME, &outcome),
        None => {
            let refusal = refuse(PeerRefusal::UnknownSession, "no such session");
            wire::send(&mut link, kind::REFUSED, &refusal)
        }
    };
    if sent.is_ok() {
        let _ = link.close();
    }
}

struct Destination<'a> {
    inner: &'a Arc<Inner>,
    identity: PeerIdentity,
    /// What this host had under the guest's id before: a guest that left earlier. Comes back if the import
    /// fails.
    replaced: Mutex<Option<GuestRecord>>,
    /// Disk space for the last records.
    space: Mutex<Option<Arc<Reserve>>>,
}

/// The mirror that an SEV-ES guest is launched with here: that of its definition, so that it is launched as
/// its like is at every host, whatever number of streams it comes by.
fn launch_mirror(inner: &Inner, definition: &Definition, prepare: &Prepare) -> LaunchMirror {
    let defined = inner.facts(&definition.spec.driver).sev.map(|sev| sev.mirror);
    let fewest = u32::from(prepare.streams);
    match defined {
        Some(defined) if defined.strategy == prepare.strategy && defined.workers >= fewest => defined,
        Some(_) | None => LaunchMirror { strategy: prepare.strategy, workers: fewest },
    }
}

/// Sets disk space aside for how a hand-over ends, whatever fills the disk meanwhile.
fn set_aside(inner: &Inner, prepare: &Prepare) -> Result<Reserve, Refused> {
    let taken = Reserve::take(&inner.state_dir, prepare.session, document_bytes(inner, prepare));
    taken.map_err(no_room)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.locked()
}

impl<'a> Destination<'a> {
    fn new(inner: &'a Arc<Inner>, identity: PeerIdentity) -> Self {
        let (replaced, space) = (Mutex::default(), Mutex::default());
        Self { inner, identity, replaced, space }
    }

    const fn arriving<'p>(&'p self, prepare: &'p Prepare, definition: &'p Definition) -> Arriving<'p> {
        Arriving { inner: self.inner, identity: &self.identity, prepare, definition }
    }

    /// Takes the guest's id and name, also from a record of a guest that left for another host earlier.
    fn reserve(
        &self,
        prepare: &Prepare,
        definition: &Definition,
        boot: Option<BootFiles>,
    ) -> Result<Arc<crate::host::guests::entry::GuestEntry>, Refused> {
        let inner = self.inner;
        let record = record_of(inner, prepare, definition, boot);
        let mut guests = inner.guests_mut();
        let old = guests.get(&prepare.guest).map(|g| g.record());
        let taken = taken(&guests, prepare.guest, &definition.spec.name);
        if !taken.is_empty() {
            return Err(first(taken));
        }
        let replaced = old.clone().map(Box::new);
        let open = HandOver {
            peer: self.identity.to_string(),
            settled: Settlement::Open,
            unconfirmed: false,
            replaced,
        };
        let stored = inner.store.transaction(|t| {
            // Again, where nobody can come in between: of two with one session, one is refused and leaves the
            // other alone.
            if t.get::<HandOver>(Kind::HandOver, prepare.session)?.is_some() {
                return Err(StoreError::Exists { kind: Kind::HandOver, id: prepare.session });
            }
            t.put(Kind::Guest, record.id, Some(&record.spec.name), &record)?;
            t.put(Kind::HandOver, prepare.session, None, &open)
        });
        stored.map_err(|e| match e {
            StoreError::Exists { .. } => session_exists(),
            e => not_stored(&storing(e)),
        })?;
        let entry = task::spawn(inner, record.clone(), GuestState::Incoming);
        let left = guests.insert(Arc::clone(&entry));
        // Not under the lock: whoever tells may have to wait for the ledger's thread, which takes it.
        drop(guests);
        inner.events.guest(&record, None, crate::host::events::Change::Created);
        if let Some(left) = left {
            left.dismiss();
        }
        *lock(&self.replaced) = old;
        Ok(entry)
    }

    fn make(
        &self,
        prepare: &Prepare,
        definition: &Definition,
        entry: &crate::host::guests::entry::GuestEntry,
        memory: GuestMemory,
        peer: &str,
    ) -> Result<Arrival, Refused> {
        let inner = self.inner;
        let record = entry.record();
        let incoming = IncomingMachine {
            secret: prepare.secret.clone(),
            machine_type: definition.machine_type.as_deref(),
            paused: prepare.paused,
            readiness: prepare.readiness.clone(),
            mirror: launch_mirror(inner, definition, prepare),
        };
        let image = self.arriving(prepare, definition).image()?;
        let made = inner.make_machine(&record, entry, memory, Some(incoming)).map_err(|e| match e {
            MakeError::Machine(e) => machine_refusal(&e),
            MakeError::Host(e) => refused_by(&e),
        })?;
        let machine = made.machine;
        let mirror = match made.mirror {
            Some(mirror) => mirror,
            None => inner
                .make_mirror(&record, machine.as_ref(), prepare.strategy, u32::from(prepare.streams), &image)
                .map_err(|e| refused_by(&e))?,
        };
        let control = Arc::new(inner.new_control(
            prepare.session,
            MigrationState::Preparing,
            crate::host::MigrationLimits::default(),
        ));
        // Whatever the helper does not have was against it.
        let suite = Suite::named(&prepare.suite)
            .ok_or_else(|| refuse(PeerRefusal::SuiteMissing, "the destination does not know the suite"))?;
        let migration = MigrationRecord::begun(
            prepare.session,
            MigrationDirection::Incoming,
            (prepare.guest, &definition.spec),
            peer,
            self.identity.to_string(),
            (prepare.strategy, suite),
        );
        let session = Arc::new(MigrationEntry::new(migration, Arc::clone(&control)));
        session.attach(mirror.watch());
        // Whoever forgets a peer looks for its migrations alone, so leave is asked for while peers stay. A
        // ticket is used up here, by a migration that everything else allows.
        inner.while_peers_stay(|| {
            let text = self.identity.to_string();
            let known = inner.peers().values().any(|p| p.spec.identity == text);
            let ticket =
                inner.using_ticket(prepare.session, &self.identity).map_err(|e| ticket_unread(&e))?;
            if ticket.is_none() && !known {
                return Err(no_leave());
            }
            // Used up with the import's record or not at all: what is refused costs nobody a ticket.
            let and = |batch: &mut Batch| {
                ticket.map(|using| batch.join(using));
                Ok(())
            };
            inner.begin_migration(&session, and).map_err(|e| match e {
                HostError::IdTaken { .. } => session_exists(),
                e => not_stored(&e),
            })
        })?;
        let (sender, streams) = mpsc::sync_channel(*bounds::STREAMS.end() as usize);
        inner.streams().insert(prepare.session, (self.identity, sender));
        entry.tell_blocking(Command::Watch(prepare.session, machine.end_watch()));
        let fresh = record.protection == ProtectionLevel::None;
        Ok(Arrival { machine, fresh, mirror, control, streams })
    }

    /// Removes a guest that never arrived, and waits until it is gone. What was here before it comes back.
    /// `with`: the import's last word, stored together with that.
    fn vanish(&self, entry: &crate::host::guests::entry::GuestEntry, with: Option<Together>) {
        let replaced = lock(&self.replaced).take();
        let attempt = |force| {
            let (replaced, with) = (replaced.clone(), with.clone());
            entry.ask_blocking(|reply| Command::Vanish(Box::new(Vanish { replaced, with, force, reply })))
        };
        let stored = attempt(false).or_else(|_| attempt(true));
        if let Err(error) = stored {
            // What is stored is an import that is open and that nobody works on: that COMMIT never was, which
            // is so. The token that says it to the source's helper is kept for as long as this daemon lives.
            tracing::error!(error = %crate::chain::chain(&error), "the end of an import could not be stored");
            if let Some(with) = with
                && let Some(hand_over) = with.hand_over
            {
                self.inner.unstored().insert(with.migration.id, hand_over);
            }
        }
        if let Some(old) = replaced {
            let entry = task::spawn(self.inner, old, GuestState::Stopped);
            self.inner.guests_mut().insert(entry);
            self.inner.changed();
        }
    }

    fn guest_entry(&self, session: Uuid) -> Option<Arc<crate::host::guests::entry::GuestEntry>> {
        let guest = self.inner.migration_entry(session)?.record().guest;
        self.inner.guests().get(&guest).cloned()
    }

    fn settled(&self, settled: Settlement) -> HandOver {
        HandOver { peer: self.identity.to_string(), settled, unconfirmed: false, replaced: None }
    }
}

impl Receiver for Destination<'_> {
    fn admit(&self, prepare: &Prepare, peer: &str) -> Result<Arrival, Refused> {
        let definition = definition_of(self.inner, prepare)?;
        let boot = self.arriving(prepare, &definition).admit().map_err(first)?;
        let memory = self.inner.memory_for(&definition.spec, &prepare.layout, boot.as_ref());
        let memory = memory.map_err(|e| refused_by(&e))?;
        *lock(&self.space) = Some(Arc::new(set_aside(self.inner, prepare)?));
        let entry = self.reserve(prepare, &definition, boot)?;
        self.make(prepare, &definition, &entry, memory, peer).inspect_err(|_| self.vanish(&entry, None))
    }

    fn labels(&self, session: Uuid, labels: Labels) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let missing = || HostError::missing(ResourceKind::Guest, session.to_string());
        let entry = self.guest_entry(session).ok_or_else(missing)?;
        if labels == entry.record().spec.labels {
            return Ok(());
        }
        validate::labels(&labels)?;
        Ok(entry.ask_blocking(|reply| Command::AdoptLabels(labels, reply))?)
    }

    fn commit(&self, session: Uuid, token: &SealedToken, paused: bool) -> Result<(), NotStored> {
        if self.inner.is_stopping() {
            return Err(NotStored::Ever);
        }
        // Neither is forgotten while an import has them.
        let gone = || NotStored::Yet("the import's records are gone".into());
        let migration = self.inner.migration_entry(session).ok_or_else(gone)?;
        let guest = self.guest_entry(session).ok_or_else(gone)?;
        let record = migration.next(|r| {
            r.state = MigrationState::Succeeded;
            r.committing = false;
            r.finished_at = Some(Timestamp::now());
            r.guest_state_after = Some(if paused { GuestState::Paused } else { GuestState::Running });
        });
        let hand_over = Some(self.settled(Settlement::Committed { token: token.to_vec() }));
        let with = Box::new(Together { migration: record, hand_over, space: lock(&self.space).clone() });
        let stored = guest.ask_blocking(|reply| Command::Commit { paused, with, reply });
        stored.map_err(|e| NotStored::Yet(crate::chain::chain(&e).into()))
    }

    fn arrived(&self, session: Uuid, arrived: Arrived) {
        let Arrived { machine, mirror, paused, digests, fault, audit } = arrived;
        let fault = fault.as_ref().map(migration_fault);
        if let Some(entry) = self.guest_entry(session) {
            let (done, told) = tokio::sync::oneshot::channel();
            let fault = fault.clone();
            // Others get a fresh one when they need it; this is the only one that the guest can have.
            let keeps = self.inner.facts(&entry.record().spec.driver).sev.is_some_and(|s| s.es);
            let mirror = mirror.filter(|_| keeps).map(Box::new);
            if entry.tell_blocking(Command::Arrived { machine, paused, fault, mirror, audit, done }) {
                let _ = told.blocking_recv();
            }
        }
        self.inner.streams().remove(&session);
        let Some(entry) = self.inner.migration_entry(session) else { return };
        entry.keep_digests(digests);
        let after = self.guest_entry(session).map(|g| g.record().state);
        self.inner.migration_happened(&entry, |r| {
            r.state = MigrationState::Succeeded;
            r.committing = false;
            r.finished_at = Some(Timestamp::now());
            r.guest_state_after = after;
            r.error = fault;
        });
    }

    fn audited(&self, session: Uuid, guest: Uuid, audit: Audit, held: &Arc<Held>) {
        let owner = self.inner.guests().get(&guest).cloned();
        let keeps = owner
            .as_ref()
            .is_some_and(|owner| self.inner.facts(&owner.record().spec.driver).sev.is_some_and(|s| s.es));
        if !keeps {
            drop(held.give_up(NotRun::PeerLost));
        }
        if let Some(entry) = self.inner.migration_entry(session) {
            self.inner.audited(&entry, audit.clone());
        }
        let told =
            owner.is_some_and(|owner| owner.tell_blocking(Command::Audited { migration: session, audit }));
        if !told {
            drop(held.give_up(NotRun::PeerLost));
        }
    }

    fn aborted(&self, session: Uuid, token: Option<&SealedToken>, fault: &MigrationFault) {
        // Called off here, or there.
        let canceled = fault.code() == Code::Canceled;
        let state = if canceled { MigrationState::Canceled } else { MigrationState::Failed };
        let finished_at = Some(Timestamp::now());
        let end = |r: &mut MigrationRecord| {
            r.state = state;
            r.error = (!canceled).then(|| migration_fault(fault));
            r.finished_at = finished_at;
            r.guest_state_after = None;
        };
        self.inner.streams().remove(&session);
        let Some(entry) = self.inner.migration_entry(session) else { return };
        let hand_over = Some(self.settled(Settlement::Aborted { token: token.map(|t| t.to_vec()) }));
        if let Some(guest) = self.guest_entry(session) {
            let space = lock(&self.space).clone();
            self.vanish(&guest, Some(Together { migration: entry.next(end), hand_over, space }));
        }
        // Shown with the guest's end, if there was a guest.
        if !entry.record().state.is_terminal() {
            self.inner.migration_happened(&entry, end);
        }
    }
}
