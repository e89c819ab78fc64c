//! Outgoing migrations: leasing the guest, running the source's course, settling doubt, giving back.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::entries::{GuestEntry, MigrationEntry};
use super::guest_task::{Command, GiveBack, Lease};
use super::inner::Inner;
use super::{
    Destination, DriverSpec, Fault, GuestRecord, GuestState, HostError, MigrationDirection, MigrationLimits,
    MigrationMode, MigrationRecord, MigrationSpec, MigrationState, MirrorChoice, OnTimeout, PeerRecord,
    PlanOptions, Progress, ProtectionLevel, SourceAfter, Ticket, validate,
};
use crate::address_space::Strategy;
use crate::guest::Machine;
use crate::migration::wire::Outcome;
use crate::migration::{
    Control, Journal, MigrationFault, Outgoing, PeerAddress, SourceEnd, resolve, run_source,
};
use crate::mirror::Mirror;
use crate::sev::Policy;
use crate::transport::PeerIdentity;

/// A migration that may start.
pub(super) struct Prepared {
    pub record: MigrationRecord,
    pub guest: Arc<GuestEntry>,
    pub peer: PeerRecord,
}

/// What this host can see of a migration before it starts.
pub(super) struct Looked {
    /// The id that it must have.
    pub id: Option<Uuid>,
    pub guest: Arc<GuestEntry>,
    pub record: GuestRecord,
    /// Where it goes, if that is known.
    pub peer: Option<PeerRecord>,
    strategy: Option<Strategy>,
    /// All that speaks against it here, whatever the destination says.
    pub against: Vec<HostError>,
}

/// Looks at everything about a migration that this host can see before it starts.
///
/// # Errors
/// Values that cannot be, no such guest: then there is nothing to look at.
pub(super) fn look(inner: &Arc<Inner>, id: Option<Uuid>, spec: &MigrationSpec) -> Result<Looked, HostError> {
    let ticket = ticket_of(&spec.destination)?;
    // A ticket is good for one session, and a session's id is its migration's.
    let id = match &ticket {
        Some(ticket) => Some(ticket_id(ticket, id)?),
        None => id,
    };
    validate::migration(spec)?;
    let guest = inner.find_guest(&spec.guest)?;
    let record = guest.record();
    let mut against = Vec::new();
    note(&mut against, inner.check_running());
    if id.is_some_and(|id| inner.migration_entry(id).is_some()) {
        against.push(HostError::IdTaken { kind: "migration" });
    }
    let peer = match (&spec.destination, ticket) {
        (_, Some(ticket)) => Some(ticket.peer()?),
        (Destination::Host(key) | Destination::Ticket(key), None) => note(&mut against, inner.find_peer(key)),
    };
    if peer.as_ref().is_some_and(|p| p.spec.identity.parse().ok().as_ref() == Some(inner.identity.pin())) {
        against.push(HostError::DestinationIsSelf);
    }
    if let Some(migration) = record.migration {
        against.push(HostError::GuestMigrating { migration });
    } else if !matches!(record.state, GuestState::Running | GuestState::Paused) {
        let current = record.state.name();
        against.push(HostError::WrongState { kind: "guest", current, allowed: &["running", "paused"] });
    }
    let strategy = match &spec.mirror {
        MirrorChoice::Template(strategy) => {
            // Refused now rather than after the lease.
            let helper_image = spec.template.helper_image.clone();
            let options = PlanOptions { helper_image, ..PlanOptions::default() };
            let plan = inner.plan(&guest, *strategy, u32::from(spec.streams), &options);
            note(&mut against, plan).map(|_| *strategy)
        }
        MirrorChoice::Existing(id) => {
            note(&mut against, existing_mirror(inner, *id, record.id, spec.streams))
        }
    };
    note(&mut against, check_throttle(&record.spec.driver, &spec.limits));
    note(&mut against, inner.check_driver(&record.spec.driver));
    note(&mut against, check_guest(&guest, &record, spec));
    if let Some(strategy) = strategy {
        note(&mut against, check_precopy(inner, &guest, &record, spec, strategy));
    }
    Ok(Looked { id, guest, record, peer, strategy, against })
}

fn note<T>(against: &mut Vec<HostError>, found: Result<T, HostError>) -> Option<T> {
    found.map_err(|e| against.push(e)).ok()
}

/// Checks everything about a migration that can be checked here before it starts: what [`look`] has nothing against.
pub(super) fn prepare(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: MigrationSpec,
) -> Result<Prepared, HostError> {
    prepared(look(inner, id, &spec)?, spec)
}

/// A migration that this host has nothing against.
pub(super) fn prepared(looked: Looked, spec: MigrationSpec) -> Result<Prepared, HostError> {
    let Looked { id, guest, record, peer, strategy, against } = looked;
    if let Some(first) = against.into_iter().next() {
        return Err(first);
    }
    // Whatever is missing was against it.
    let (Some(peer), Some(strategy)) = (peer, strategy) else {
        return Err(HostError::internal("looking at a migration", "something is missing without a reason"));
    };
    let migration = MigrationRecord {
        id: id.unwrap_or_else(Uuid::now_v7),
        direction: MigrationDirection::Outgoing,
        guest: record.id,
        guest_name: record.spec.name,
        labels: record.spec.labels,
        peer: peer.spec.name.clone(),
        spec: Some(spec),
        strategy,
        state: MigrationState::Queued,
        generation: 1,
        progress: Progress { total_bytes: record.layout.ram_bytes(), ..Progress::default() },
        rounds: Vec::new(),
        workers: Vec::new(),
        helper_busy_percent: None,
        guest_state_after: None,
        error: None,
        cancel_requested_at: None,
        created_at: Timestamp::now(),
        started_at: None,
        finished_at: None,
    };
    Ok(Prepared { record: migration, guest, peer })
}

/// Whether somebody can find the pages that a running guest changes: its driver's log, or the helper's scan.
fn check_precopy(
    inner: &Inner,
    guest: &GuestEntry,
    record: &GuestRecord,
    spec: &MigrationSpec,
    strategy: Strategy,
) -> Result<(), HostError> {
    if spec.mode != MigrationMode::Precopy || !matches!(record.spec.driver, DriverSpec::Qemu { .. }) {
        return Ok(());
    }
    let plan = inner.plan(guest, strategy, u32::from(spec.streams), &PlanOptions::default())?;
    if plan.can_scan() {
        return Ok(());
    }
    let why = "QEMU does not export its dirty log, and the guest's helper has no room for page digests (it is larger \
               than 4 TiB, or was defined by an earlier version); use mode stop_and_copy";
    Err(HostError::CapabilityMissing { what: "precopy of this qemu guest", why: why.to_owned() })
}

fn ticket_of(destination: &Destination) -> Result<Option<Ticket>, HostError> {
    match destination {
        Destination::Host(_) => Ok(None),
        Destination::Ticket(text) => Ticket::parse(text).map(Some),
    }
}

fn ticket_id(ticket: &Ticket, chosen: Option<Uuid>) -> Result<Uuid, HostError> {
    let bad = |at: &str, code, detail: &str| {
        Err(HostError::Invalid(vec![super::FieldError::new(at, code, detail)]))
    };
    if ticket.expires_at <= Timestamp::now() {
        return bad("/destination/ticket", "expired_ticket", "the ticket has expired");
    }
    if chosen.is_some_and(|id| id != ticket.session) {
        let detail = "the ticket is for the migration with the id of its session";
        return bad("/destination/ticket", "wrong_id", detail);
    }
    Ok(ticket.session)
}

/// Asks the guest's owner whether the migration may have the guest; with `act` it has it then, until it gives it back.
pub(super) async fn claim(prepared: &Prepared, act: bool) -> Result<(), HostError> {
    let Prepared { record, guest, .. } = prepared;
    let Some(spec) = &record.spec else { return Ok(()) };
    let (migration, choice, streams) = (record.id, spec.mirror.clone(), spec.streams);
    guest.ask(|reply| Command::Claim { migration, choice, streams, act, reply }).await
}

/// Asks the guest's owner whether a migration might have the guest now; takes nothing.
pub(super) async fn may_claim(guest: &GuestEntry, spec: &MigrationSpec) -> Result<(), HostError> {
    let (migration, choice, streams) = (Uuid::nil(), spec.mirror.clone(), spec.streams);
    guest.ask(|reply| Command::Claim { migration, choice, streams, act: false, reply }).await
}

/// Records and starts a migration. From the answer on, and while it waits in the queue, it alone has the guest.
pub(super) async fn create(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: MigrationSpec,
) -> Result<MigrationRecord, HostError> {
    let prepared = prepare(inner, id, spec)?;
    claim(&prepared, true).await?;
    let (guest, migration) = (Arc::clone(&prepared.guest), prepared.record.id);
    let begun = begin(inner, prepared);
    if begun.is_err() {
        let (done, told) = tokio::sync::oneshot::channel();
        if guest.tell(Command::Release { migration, done }).await {
            let _ = told.await;
        }
    }
    begun
}

/// A migration whose guest is claimed: recorded, then queued.
fn begin(inner: &Arc<Inner>, prepared: Prepared) -> Result<MigrationRecord, HostError> {
    let Prepared { record: migration, guest, peer } = prepared;
    let id = migration.id;
    let limits = migration.spec.as_ref().map(|s| s.limits).unwrap_or_default();
    let entry = Arc::new(MigrationEntry::new(
        migration,
        Arc::new(new_control(inner, id, MigrationState::Queued, limits)),
    ));
    {
        // Whoever forgets a peer looks for its migrations under this lock. A ticket's destination is no known peer.
        let peers = inner.peers();
        if !peer.id.is_nil() && !peers.contains_key(&peer.id) {
            return Err(HostError::NotFound { kind: "host", key: peer.spec.name });
        }
        inner.begin_migration(&entry, |_| Ok(()))?;
    }
    let record = entry.record();
    let (theirs, slots) = (Arc::clone(inner), Arc::clone(&inner.outgoing_slots));
    inner.runtime.spawn(async move {
        let mut changes = theirs.changes();
        let mut slot = std::pin::pin!(slots.acquire_owned());
        // Called off in the queue: ends now, not when a slot is free.
        let _slot = loop {
            if entry.control.is_cancelled() {
                break None;
            }
            tokio::select! {
                slot = &mut slot => break slot.ok(),
                _ = changes.changed() => {}
            }
        };
        let _ = tokio::task::spawn_blocking(move || Run { inner: theirs, entry, guest, peer }.run()).await;
    });
    Ok(record)
}

/// What the guest itself has to say: its policy, its readiness.
fn check_guest(guest: &GuestEntry, record: &GuestRecord, spec: &MigrationSpec) -> Result<(), HostError> {
    if let Some(sev) = record.spec.driver.sev() {
        check_policy(sev.policy)?;
    }
    if spec.verify && matches!(record.protection, ProtectionLevel::Sev | ProtectionLevel::SevEs) {
        let why = "no host can read an encrypted guest's pages to digest them".to_owned();
        return Err(HostError::CapabilityMissing { what: "verify", why });
    }
    match guest.readiness() {
        Some(r) if !r.ready => Err(HostError::GuestNotReady { why: r.reason.sentence() }),
        _ => Ok(()),
    }
}

/// Whether the guest's vCPUs can be held back, if the limits ask for it. A migration that found out only when its
/// rounds do not shrink would have moved pages for nothing.
pub(super) fn check_throttle(driver: &DriverSpec, limits: &MigrationLimits) -> Result<(), HostError> {
    if driver.can_throttle() {
        return Ok(());
    }
    let field = if limits.auto_throttle {
        "/limits/auto_throttle"
    } else if limits.on_timeout == OnTimeout::Throttle {
        "/limits/on_timeout"
    } else {
        return Ok(());
    };
    let why = format!("{field}: the guest's driver cannot hold back its vCPUs");
    Err(HostError::CapabilityMissing { what: "throttling", why })
}

/// Whether a policy lets a guest leave, and have a mirror.
pub(super) fn check_policy(policy: Policy) -> Result<(), HostError> {
    if policy.has(Policy::NOSEND) {
        let why = "NOSEND: the guest must not leave its platform".to_owned();
        return Err(HostError::PolicyForbids { why });
    }
    if !policy.has(Policy::NODBG) {
        let why = "NODBG is not set: whoever has a mirror of the guest can read it (DBG_DECRYPT)".to_owned();
        return Err(HostError::PolicyForbids { why });
    }
    Ok(())
}

fn existing_mirror(inner: &Inner, id: Uuid, guest: Uuid, streams: u16) -> Result<Strategy, HostError> {
    let mirror = inner.mirror_entry(id).filter(|m| m.guest == guest);
    let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
    let record = mirror.ok_or_else(missing)?.record();
    if record.workers.len() < usize::from(streams) {
        let detail =
            format!("{streams} streams need as many workers, and the mirror has {}", record.workers.len());
        return Err(HostError::Invalid(vec![super::FieldError::new("/streams", "out_of_range", detail)]));
    }
    Ok(record.strategy)
}

/// A handle whose changes the host's watchers see.
pub(super) fn new_control(
    inner: &Arc<Inner>,
    id: Uuid,
    state: MigrationState,
    limits: MigrationLimits,
) -> Control {
    let weak = Arc::downgrade(inner);
    let changed = move || {
        if let Some(inner) = weak.upgrade() {
            inner.migration_changed(id);
        }
    };
    Control::new(state, limits, Box::new(changed))
}

struct Run {
    inner: Arc<Inner>,
    entry: Arc<MigrationEntry>,
    guest: Arc<GuestEntry>,
    peer: PeerRecord,
}

impl Run {
    fn run(&self) {
        let started = self.entry.change(|r| r.started_at = Some(Timestamp::now()));
        if self.entry.control.is_cancelled() {
            self.release();
            return self.record_end(MigrationState::Canceled, &MigrationFault::Canceled, None);
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
            Ok(lease) => self.with_lease(&spec, lease),
            Err(error) => {
                tracing::warn!(error = %super::chain(&error), "a migration got no guest");
                let fault = super::host_fault(&error);
                self.release();
                self.finish(MigrationState::Failed, Some(fault), None);
            }
        }
    }

    /// Gives the guest back that was claimed and never taken. Before the end is told: whoever sees that finds it free.
    fn release(&self) {
        let (done, told) = tokio::sync::oneshot::channel();
        if self.guest.tell_blocking(Command::Release { migration: self.entry.id, done }) {
            let _ = told.blocking_recv();
        }
    }

    fn with_lease(&self, spec: &MigrationSpec, lease: Lease) {
        let Lease { mut machine, mut mirror, mirror_id, transient, was_running, record } = lease;
        self.entry.attach(mirror.watch());
        let (end, peer) = match self.peer.spec.identity.parse::<PeerIdentity>() {
            Err(_) => {
                let fault = MigrationFault::Protocol("the peer's stored identity cannot be read");
                (SourceEnd::NotMoved { fault }, None)
            }
            Ok(identity) => {
                let peer = (self.peer.spec.address.clone(), identity);
                let out = Outgoing {
                    id: self.entry.id,
                    guest: &record,
                    spec,
                    peer,
                    identity: &self.inner.identity,
                    host: &self.inner.name,
                    helper_measurement: mirror.helper_measurement(),
                    machine_type: machine.machine_type().ok().flatten(),
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
        self.give_back(spec, end, machine, mirror, mirror_id, !transient, was_running);
    }

    /// After START without an answer: asks until a token tells, or the daemon goes.
    fn settle(
        &self,
        spec: &MigrationSpec,
        fault: MigrationFault,
        (mut address, identity): PeerAddress,
        machine: &mut dyn Machine,
        mirror: &mut Mirror,
        was_running: bool,
    ) -> SourceEnd {
        tracing::warn!(migration = %self.entry.id, fault = %fault.chain(), "in doubt; asking the destination");
        self.entry.control.enter(MigrationState::InDoubt);
        self.note(|r| r.error = Some(fault_of(&fault)));
        self.guest.tell_blocking(Command::InDoubt);
        let hosts_are_trusted = self.guest.record().protection == ProtectionLevel::None;
        let mut patience = Duration::from_millis(100);
        loop {
            if self.inner.is_stopping() {
                return SourceEnd::InDoubt { fault };
            }
            // A peer that was renumbered since is the same one: its key says so, and what is known of it says where.
            if let Ok(peer) = self.inner.find_peer(&self.peer.id.to_string()) {
                address = peer.spec.address;
            }
            let peer = (address.clone(), identity);
            let answer = resolve(&peer, &self.inner.identity, &self.inner.name, self.entry.id);
            let reason = MigrationFault::PeerLost(crate::transport::LinkError::Broken);
            match answer {
                Ok(Outcome::Committed { token }) => {
                    if token.as_slice().try_into().is_ok_and(|t| mirror.check_commit(t).is_ok()) {
                        let digests = if spec.verify { machine.page_digests() } else { None };
                        return SourceEnd::Succeeded { digests };
                    }
                }
                Ok(Outcome::Aborted { token }) => {
                    if token.as_slice().try_into().is_ok_and(|t| mirror.check_abort(t).is_ok()) {
                        return back_here(machine, was_running, reason);
                    }
                }
                // The destination's host says so, not its helper: enough at protection level `none`, where hosts are
                // trusted anyway. Others stay in doubt until a token tells.
                Ok(Outcome::NeverCommitted {}) if hosts_are_trusted => {
                    return back_here(machine, was_running, reason);
                }
                Ok(Outcome::NeverCommitted {} | Outcome::Pending {}) | Err(_) => {}
            }
            std::thread::sleep(patience);
            patience = (patience * 2).min(Duration::from_secs(5));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "everything that was borrowed goes back at once")]
    fn give_back(
        &self,
        spec: &MigrationSpec,
        end: SourceEnd,
        machine: Box<dyn Machine>,
        mirror: Mirror,
        mirror_id: Uuid,
        keep_mirror: bool,
        running: bool,
    ) {
        let moved = match &end {
            SourceEnd::Succeeded { .. } => {
                Some((self.peer.spec.name.clone(), spec.source_after == SourceAfter::Delete))
            }
            SourceEnd::NotMoved { .. } => None,
            SourceEnd::InDoubt { .. } => {
                // The daemon goes while in doubt: the record stays so, and the next daemon asks on.
                self.note(|_| {});
                drop((machine, mirror));
                return;
            }
        };
        // The memory goes before anybody is told, so that whoever sees the end finds nothing left.
        let machine = moved.is_none().then_some(machine);
        let (done, state) = tokio::sync::oneshot::channel();
        let back = GiveBack { machine, mirror, mirror_id, keep_mirror, running, moved, done };
        self.guest.tell_blocking(Command::GiveBack(Box::new(back)));
        let after = state.blocking_recv().ok();
        match end {
            SourceEnd::Succeeded { digests } => {
                self.entry.keep_digests(digests);
                self.finish(MigrationState::Succeeded, None, after);
            }
            SourceEnd::NotMoved { fault: MigrationFault::Canceled } => {
                self.record_end(MigrationState::Canceled, &MigrationFault::Canceled, after);
            }
            SourceEnd::NotMoved { fault } | SourceEnd::InDoubt { fault } => {
                tracing::warn!(migration = %self.entry.id, fault = %fault.chain(), "a migration failed");
                self.record_end(MigrationState::Failed, &fault, after);
            }
        }
    }

    fn record_end(&self, state: MigrationState, fault: &MigrationFault, after: Option<GuestState>) {
        let error = (state == MigrationState::Failed).then(|| fault_of(fault));
        self.finish(state, error, after);
    }

    /// The record's last word: stored, then shown.
    fn finish(&self, state: MigrationState, error: Option<Fault>, after: Option<GuestState>) {
        self.note(|r| {
            r.state = state;
            r.error = error;
            r.finished_at = Some(Timestamp::now());
            r.guest_state_after = after.or_else(|| Some(self.guest.record().state));
        });
    }

    fn note(&self, change: impl FnOnce(&mut MigrationRecord)) {
        self.inner.migration_happened(&self.entry, change);
    }
}

impl Journal for Run {
    fn start_sent(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let record = self.entry.change(|_| {});
        let doubtful = MigrationRecord { state: MigrationState::InDoubt, ..record };
        Ok(self.inner.store_migration(&doubtful)?)
    }
}

fn back_here(machine: &mut dyn Machine, was_running: bool, reason: MigrationFault) -> SourceEnd {
    if was_running
        && machine.ended().is_none()
        && let Err(error) = machine.resume()
    {
        return SourceEnd::NotMoved { fault: error.into() };
    }
    SourceEnd::NotMoved { fault: reason }
}

/// A fault as the API shows it.
pub(super) fn fault_of(fault: &MigrationFault) -> Fault {
    let detail = match fault {
        // Details of our own faults may name paths; the log has them.
        MigrationFault::Machine(_) | MigrationFault::Mirror(_) | MigrationFault::Journal(_) => {
            fault.to_string()
        }
        _ => fault.chain(),
    };
    Fault { code: fault.code().to_owned(), detail }
}

/// After a restart: a migration that was in doubt. The guest's memory went with the old daemon, so the answer
/// decides only what the records say.
pub(super) async fn settle_after_restart(inner: Arc<Inner>, entry: Arc<MigrationEntry>) {
    let mut patience = Duration::from_millis(200);
    while !inner.is_stopping() {
        let record = entry.record();
        // A ticket's destination is no known peer: the ticket says where it is.
        let ticket = record.spec.as_ref().and_then(|s| ticket_of(&s.destination).ok().flatten());
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
        let end = match answer {
            Some(Outcome::Committed { .. }) => Some((MigrationState::Succeeded, None)),
            Some(Outcome::Aborted { .. } | Outcome::NeverCommitted {}) => Some((
                MigrationState::Failed,
                Some(Fault {
                    code: "source_restarted".into(),
                    detail: "the daemon restarted before the answer to START; the guest's memory is lost"
                        .into(),
                }),
            )),
            Some(Outcome::Pending {}) | None => None,
        };
        if let Some((state, error)) = end {
            let moved = state == MigrationState::Succeeded;
            if let Ok(guest) = inner.find_guest(&record.guest.to_string()) {
                let (done, told) = tokio::sync::oneshot::channel();
                let peer = moved.then(|| record.peer.clone());
                // The guest first: whoever sees the migration's end finds it settled.
                if guest.tell(Command::Settled { peer, done }).await {
                    let _ = told.await;
                }
            }
            let (theirs, ended) = (Arc::clone(&inner), Arc::clone(&entry));
            let note = move || {
                theirs.migration_happened(&ended, |r| {
                    r.state = state;
                    r.error = error;
                    r.finished_at = Some(Timestamp::now());
                    r.guest_state_after = Some(GuestState::Stopped);
                });
            };
            let _ = tokio::task::spawn_blocking(note).await;
            return;
        }
        tokio::time::sleep(patience).await;
        patience = (patience * 2).min(Duration::from_secs(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{AccelChoice, Fill, WorkloadSpec};

    /// What a refusal of the limits says, for a guest of each kind of driver.
    fn refusal(driver: &DriverSpec, auto_throttle: bool, on_timeout: OnTimeout) -> Option<String> {
        let limits = MigrationLimits { auto_throttle, on_timeout, ..MigrationLimits::default() };
        match check_throttle(driver, &limits) {
            Ok(()) => None,
            Err(HostError::CapabilityMissing { what: "throttling", why }) => Some(why),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_driver_that_cannot_throttle_is_not_asked_to() {
        let qemu = DriverSpec::Qemu {
            vcpus: 1,
            kernel: "/k".into(),
            initrd: None,
            append: String::new(),
            accel: AccelChoice::Auto,
        };
        let names =
            |why: Option<String>, field: &str| why.is_some_and(|w| w.starts_with(&format!("{field}:")));
        assert!(names(refusal(&qemu, true, OnTimeout::Cancel), "/limits/auto_throttle"));
        assert!(names(refusal(&qemu, true, OnTimeout::Throttle), "/limits/auto_throttle"));
        assert!(names(refusal(&qemu, false, OnTimeout::Throttle), "/limits/on_timeout"));
        for allowed in [OnTimeout::Cancel, OnTimeout::Force] {
            assert_eq!(refusal(&qemu, false, allowed), None);
        }
        let workload = WorkloadSpec {
            fill: Fill::Zero,
            working_set_bytes: 0,
            dirty_bytes_per_second: 0,
            withdraws_readiness_after_ms: None,
        };
        let embedded = DriverSpec::Embedded { vcpus: 1, workload, sev: None };
        let emulated = DriverSpec::Emulated { vcpus: 1, workload, sev: None };
        for able in [embedded, emulated] {
            assert_eq!(refusal(&able, true, OnTimeout::Throttle), None);
        }
    }
}
