//! Incoming migrations: who may come, making a place, and the answer to "what became of it".

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::admission::{Arriving, first, no_leave, record_of, taken};
use super::entries::MigrationEntry;
use super::guest_task::{self, Command};
use super::inner::Inner;
use super::make::{GuestMemory, IncomingMachine, MakeError};
use super::outgoing::{fault_of, new_control};
use super::{
    GuestRecord, GuestState, HostError, LaunchMirror, MigrationDirection, MigrationRecord, MigrationState,
    Progress,
};
use crate::boot_files::BootFiles;
use crate::guest::MachineError;
use crate::memory::MemoryError;
use crate::migration::wire::{self, Outcome, Prepare, Purpose, Refused, kind};
use crate::migration::{Arrival, Arrived, MigrationFault, Receiver, accept_hello, serve_check, serve_import};
use crate::mirror::SealedToken;
use crate::store::Kind;
use crate::transport::{Link, LogBudget, PeerIdentity};

/// The destination's journal of one session.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct HandOver {
    /// Who may ask.
    peer: String,
    settled: Settlement,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Settlement {
    /// The import goes on, or went with the daemon: COMMIT was not minted, or nobody saw it.
    Open,
    /// COMMIT is out.
    Committed { token: Vec<u8> },
    /// The import failed; ABORT was minted if there is a token.
    Aborted { token: Option<Vec<u8>> },
}

/// Serves one link of an admitted peer, on its own thread.
pub(super) fn serve(inner: &Arc<Inner>, mut link: Link) {
    let identity = *link.peer();
    let Some(peer) = peer_name(inner, &identity) else { return };
    let hello = match accept_hello(&mut link, &inner.name) {
        Ok(h) => h,
        Err(fault) => {
            static SAID: LogBudget = LogBudget::new();
            if let Some(unlogged) = SAID.take() {
                tracing::info!(peer, unlogged, fault = %fault.chain(), "a peer's hello was not accepted");
            }
            let _ = link.close();
            return;
        }
    };
    match hello.purpose {
        Purpose::Migrate {} => {
            serve_import(link, &peer, &Destination { inner, identity, replaced: Mutex::default() });
        }
        Purpose::Stream { session, index } => {
            // Only the peer that brought the session adds streams to it.
            let wanted = inner.streams().get(&session).cloned();
            if let Some((_, sender)) = wanted.filter(|(owner, _)| *owner == identity) {
                // Of those that nobody waits for any more, none is kept.
                let _ = sender.try_send((index, link));
            }
        }
        Purpose::Resolve { session } => answer(inner, link, &identity, session),
        Purpose::Check {} => serve_check(link, &peer, |prepare| {
            Arriving { inner, identity: &identity, prepare }.admit().err().unwrap_or_default()
        }),
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
fn answer(inner: &Inner, mut link: Link, identity: &PeerIdentity, session: Uuid) {
    let known = inner.store.get::<HandOver>(Kind::HandOver, session).ok().flatten();
    let outcome = known.filter(|h| h.peer == identity.to_string()).map(|h| match h.settled {
        Settlement::Committed { token } => Outcome::Committed { token },
        Settlement::Aborted { token: Some(token) } => Outcome::Aborted { token },
        Settlement::Aborted { token: None } => Outcome::NeverCommitted {},
        Settlement::Open => {
            let alive = inner.migration_entry(session).is_some_and(|m| !m.record().state.is_terminal());
            if alive { Outcome::Pending {} } else { Outcome::NeverCommitted {} }
        }
    });
    let sent = match outcome {
        Some(outcome) => wire::send(&mut link, kind::OUTCOME, &outcome),
        None => {
            let refusal = Refused { code: "unknown_session".into(), detail: "no such session".into() };
            wire::send(&mut link, kind::REFUSED, &refusal)
        }
    };
    if sent.is_ok() {
        let _ = link.close();
    }
}

/// Whether a session's COMMIT was noted: its guest was this host's from then on.
pub(super) fn was_committed(inner: &Inner, session: Uuid) -> bool {
    let known = inner.store.get::<HandOver>(Kind::HandOver, session).ok().flatten();
    known.is_some_and(|h| matches!(h.settled, Settlement::Committed { .. }))
}

/// Streams of one migration.
pub(super) const STREAMS_MAX: u16 = 16;

struct Destination<'a> {
    inner: &'a Arc<Inner>,
    identity: PeerIdentity,
    /// What this host had under the guest's id before: a guest that left earlier. Comes back if the import fails.
    replaced: Mutex<Option<GuestRecord>>,
}

/// Whether a session was here before; each is good for one import.
pub(super) fn has_seen(inner: &Inner, session: Uuid) -> Result<bool, Refused> {
    let there = inner.migration_entry(session).is_some()
        || matches!(inner.store.get::<HandOver>(Kind::HandOver, session), Ok(Some(_)));
    Ok(there)
}

/// Least room on disk that an import begins with: what its last records and the database around them may take.
const RECORDS: u64 = 2 << 20;

/// Whether there is disk space for how a migration ends.
pub(super) fn room_on_disk(inner: &Inner, _prepare: &Prepare) -> Result<(), Refused> {
    match rustix::fs::statvfs(&inner.state_dir) {
        Ok(s) if s.f_bavail.saturating_mul(s.f_frsize) < RECORDS => {
            let detail = "the destination has no disk space to store how the migration ends";
            Err(refuse("no_storage", detail))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

pub(super) fn refuse(code: &str, detail: impl Into<String>) -> Refused {
    Refused { code: code.into(), detail: detail.into() }
}

impl Destination<'_> {
    const fn arriving<'p>(&'p self, prepare: &'p Prepare) -> Arriving<'p> {
        Arriving { inner: self.inner, identity: &self.identity, prepare }
    }

    /// Takes the guest's id and name, also from a record of a guest that left for another host earlier.
    fn reserve(
        &self,
        prepare: &Prepare,
        boot: Option<BootFiles>,
    ) -> Result<Arc<super::entries::GuestEntry>, Refused> {
        let inner = self.inner;
        let record = record_of(prepare, boot);
        let mut guests = inner.guests_mut();
        let old = guests.get(&prepare.guest).map(|g| g.record());
        let taken = taken(&guests, prepare);
        if !taken.is_empty() {
            return Err(first(taken));
        }
        let stored = inner.store.put(Kind::Guest, record.id, Some(&record.spec.name), &record);
        stored.map_err(|_| refuse("storage", "the destination's storage failed"))?;
        inner.events.guest(&record, None, super::events::Change::Created);
        let entry = guest_task::spawn(inner, record, GuestState::Incoming);
        if let Some(left) = guests.insert(Arc::clone(&entry)) {
            left.dismiss();
        }
        *self.replaced.lock().unwrap_or_else(PoisonError::into_inner) = old;
        Ok(entry)
    }

    fn make(
        &self,
        prepare: &Prepare,
        entry: &super::entries::GuestEntry,
        (memory, peer): (GuestMemory, &str),
    ) -> Result<Arrival, Refused> {
        let inner = self.inner;
        let record = entry.record();
        let incoming = IncomingMachine {
            secret: Zeroizing::new(prepare.secret),
            machine_type: prepare.machine_type.as_deref(),
            readiness: prepare.readiness.clone(),
            mirror: LaunchMirror { strategy: prepare.strategy, workers: u32::from(prepare.streams) },
        };
        let image = self.arriving(prepare).image()?;
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
        let control = Arc::new(new_control(
            inner,
            prepare.session,
            MigrationState::Preparing,
            super::MigrationLimits::default(),
        ));
        let migration = MigrationRecord {
            id: prepare.session,
            direction: MigrationDirection::Incoming,
            guest: prepare.guest,
            guest_name: prepare.spec.name.clone(),
            labels: prepare.spec.labels.clone(),
            peer: peer.to_owned(),
            spec: None,
            strategy: prepare.strategy,
            state: MigrationState::Preparing,
            generation: 1,
            progress: Progress::default(),
            rounds: Vec::new(),
            workers: Vec::new(),
            helper_busy_percent: None,
            guest_state_after: None,
            error: None,
            cancel_requested_at: None,
            created_at: Timestamp::now(),
            started_at: Some(Timestamp::now()),
            finished_at: None,
        };
        let hand_over = HandOver { peer: self.identity.to_string(), settled: Settlement::Open };
        let entry = Arc::new(MigrationEntry::new(migration, Arc::clone(&control)));
        entry.attach(mirror.watch());
        let noted = {
            // Whoever forgets a peer looks for its migrations under this lock, so leave is asked for under it, too. A
            // ticket is used up here, by a migration that everything else allows.
            let peers = inner.peers();
            let known = peers.values().any(|p| p.spec.identity == hand_over.peer);
            if !inner.use_ticket(prepare.session, &self.identity) && !known {
                return Err(no_leave());
            }
            inner.begin_migration(&entry, |b| {
                b.put(Kind::HandOver, prepare.session, None, &hand_over).map(|_| ())
            })
        };
        noted.map_err(|e| match e {
            HostError::IdTaken { .. } => refuse("session_exists", "the destination has seen this session"),
            e => {
                tracing::error!(error = %super::chain(&e), "an import could not be noted");
                refuse("storage", "the destination's storage failed")
            }
        })?;
        let (sender, streams) = mpsc::sync_channel(usize::from(STREAMS_MAX));
        inner.streams().insert(prepare.session, (self.identity, sender));
        Ok(Arrival { machine, mirror, control, streams })
    }

    /// Removes a guest that never arrived, and waits until it is gone. What was here before it comes back.
    fn vanish(&self, entry: &super::entries::GuestEntry) {
        let (done, gone) = tokio::sync::oneshot::channel();
        if entry.tell_blocking(Command::Vanish(done)) {
            let _ = gone.blocking_recv();
        }
        let Some(old) = self.replaced.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        self.inner.guest_is_back(&old);
        let entry = guest_task::spawn(self.inner, old, GuestState::Stopped);
        self.inner.guests_mut().insert(entry);
        self.inner.changed();
    }

    fn guest_entry(&self, session: Uuid) -> Option<Arc<super::entries::GuestEntry>> {
        let guest = self.inner.migration_entry(session)?.record().guest;
        self.inner.guests().get(&guest).cloned()
    }

    fn settle(&self, session: Uuid, settled: Settlement) -> Result<(), crate::store::StoreError> {
        let hand_over = HandOver { peer: self.identity.to_string(), settled };
        self.inner.store.put(Kind::HandOver, session, None, &hand_over)
    }

    fn finish(
        &self,
        session: Uuid,
        state: MigrationState,
        fault: Option<&MigrationFault>,
        after: Option<GuestState>,
    ) {
        self.inner.streams().remove(&session);
        let Some(entry) = self.inner.migration_entry(session) else { return };
        self.inner.migration_happened(&entry, |r| {
            r.state = state;
            r.error = fault.filter(|_| state != MigrationState::Canceled).map(fault_of);
            r.finished_at = Some(Timestamp::now());
            r.guest_state_after = after;
        });
    }
}

impl Receiver for Destination<'_> {
    fn admit(&self, prepare: &Prepare, peer: &str) -> Result<Arrival, Refused> {
        let arriving = self.arriving(prepare);
        let boot = arriving.admit().map_err(first)?;
        let memory = self.inner.memory_for(&prepare.spec, &prepare.layout, boot.as_ref());
        let memory = memory.map_err(|e| refused_by(&e))?;
        let entry = self.reserve(prepare, boot)?;
        self.make(prepare, &entry, (memory, peer)).inspect_err(|_| self.vanish(&entry))
    }

    fn commit(
        &self,
        session: Uuid,
        token: &SealedToken,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.settle(session, Settlement::Committed { token: token.to_vec() })?)
    }

    fn arrived(&self, session: Uuid, arrived: Arrived) {
        let Arrived { machine, mirror, paused, digests, fault } = arrived;
        if let Some(entry) = self.guest_entry(session) {
            let (done, told) = tokio::sync::oneshot::channel();
            let fault = fault.as_ref().map(fault_of);
            // Others get a fresh one when they need it; this is the only one that the guest can have.
            let keeps = entry.record().spec.driver.sev().is_some_and(|s| s.es);
            let mirror = keeps.then(|| Box::new(mirror));
            if entry.tell_blocking(Command::Arrived { machine, paused, fault, mirror, done }) {
                let _ = told.blocking_recv();
            }
        }
        if let Some(entry) = self.inner.migration_entry(session) {
            entry.keep_digests(digests);
        }
        let after = self.guest_entry(session).map(|g| g.record().state);
        self.finish(session, MigrationState::Succeeded, fault.as_ref(), after);
    }

    fn aborted(&self, session: Uuid, token: Option<&SealedToken>, fault: &MigrationFault) {
        let token = token.map(|t| t.to_vec());
        if let Err(error) = self.settle(session, Settlement::Aborted { token }) {
            // What stays is `Open` without an import: the answer is then that COMMIT never was, and that is so.
            tracing::error!(%error, "an aborted import could not be noted");
        }
        if let Some(entry) = self.guest_entry(session) {
            self.vanish(&entry);
        }
        let canceled = matches!(fault, MigrationFault::Canceled) || fault.code() == "canceled";
        let state = if canceled { MigrationState::Canceled } else { MigrationState::Failed };
        self.finish(session, state, Some(fault), None);
    }
}

pub(super) fn refused_by(e: &HostError) -> Refused {
    let code = match e {
        HostError::NoMemory(_) => "no_memory",
        HostError::NoResources { .. } => "no_resources",
        HostError::PlanRefused(_) => "plan_refused",
        HostError::CapabilityMissing { .. } => "capability_missing",
        HostError::PolicyForbids { .. } => "policy_forbids",
        HostError::NotLaunched { .. } => "helper_not_launched",
        HostError::Invalid(_) => "invalid",
        HostError::ShuttingDown => "shutting_down",
        _ => "destination_failed",
    };
    let detail = match e {
        HostError::Invalid(list) => {
            list.iter().map(|f| format!("{}: {}", f.pointer, f.detail)).collect::<Vec<_>>().join("; ")
        }
        HostError::PlanRefused(list) => list.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        e => e.to_string(),
    };
    refuse(code, detail)
}

pub(super) fn machine_refusal(e: &MachineError) -> Refused {
    tracing::warn!(error = %super::chain(e), "no machine could be made for an import");
    match e {
        MachineError::Memory(MemoryError::NotEnough(shortage)) => refuse("no_memory", shortage.to_string()),
        MachineError::Unsupported { .. } => refuse("capability_missing", e.to_string()),
        MachineError::BootFile { .. } | MachineError::BootFileChanged { .. } => {
            refuse("invalid", format!("/driver/{e}"))
        }
        MachineError::NoUser => refuse("no_resources", e.to_string()),
        MachineError::Qemu(_) => {
            let super::Fault { code, detail } = super::machine_fault(e);
            refuse(&code, detail)
        }
        _ => refuse("destination_failed", e.to_string()),
    }
}
