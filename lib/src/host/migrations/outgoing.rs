//! Outgoing migrations up to their beginning: what speaks against one here, and one that begins.

use std::sync::Arc;

use uuid::Uuid;

use crate::address_space::Strategy;
use crate::codes::Capability;
use crate::guest::drivers::FindsWrites;
use crate::host::guests::command::Command;
use crate::host::guests::entry::GuestEntry;
use crate::host::inner::Inner;
use crate::host::migrations::asking::{self, Answer, Looked};
use crate::host::migrations::entry::MigrationEntry;
use crate::host::migrations::policy::{check_policy, check_throttle};
use crate::host::migrations::reserve::Reserve;
use crate::host::migrations::run::Run;
use crate::host::{
    Begun, Destination, GuestRecord, GuestState, HostError, MigrationDirection, MigrationMode,
    MigrationPreview, MigrationRecord, MigrationSpec, MigrationState, MirrorChoice, PeerRecord, PlanOptions,
    Progress, ProtectionLevel, ResourceKind, Ticket, validate,
};
use crate::migration::{Suite, suite_names};
use crate::private_files::PrivateFileError;
use crate::store::StoreError;
use crate::store::form;

/// A migration that may start.
pub(in crate::host) struct Prepared {
    pub record: MigrationRecord,
    pub guest: Arc<GuestEntry>,
    pub peer: PeerRecord,
}

/// Looks at everything about a migration that this host can see before it starts.
///
/// # Errors
/// Values that cannot be, no such guest: then there is nothing to look at.
pub(in crate::host) fn look(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: &MigrationSpec,
) -> Result<Looked, HostError> {
    let ticket = spec.destination.ticket()?;
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
        against.push(HostError::IdTaken { kind: ResourceKind::Migration });
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
    } else if record.unconfirmed {
        against.push(guest.unconfirmed());
    } else if !matches!(record.state, GuestState::Running | GuestState::Paused) {
        let current = record.state.name();
        against.push(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current,
            allowed: &["running", "paused"],
        });
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
    note(&mut against, check_suite(inner, &record, spec));
    note(&mut against, check_throttle(inner, &record.spec.driver, &spec.limits));
    note(&mut against, inner.check_driver(&record.spec.driver));
    note(&mut against, check_guest(inner, &guest, &record, spec));
    if let Some(strategy) = strategy {
        note(&mut against, check_precopy(inner, &guest, &record, spec, strategy));
    }
    Ok(Looked { id, guest, record, peer, strategy, against })
}

/// Sets the disk space aside that the migration's last records take.
///
/// # Errors
/// There is none.
fn set_aside(inner: &Inner, record: &MigrationRecord, guest: &GuestRecord) -> Result<Reserve, HostError> {
    let bytes = document_bytes(guest, record.spec.as_ref());
    Reserve::take(&inner.state_dir, record.id, bytes).map_err(|e| no_room(inner, e))
}

/// Whether [`set_aside`] would find it; keeps nothing.
///
/// # Errors
/// It would not.
pub(in crate::host) async fn has_room(
    inner: &Arc<Inner>,
    guest: &GuestRecord,
    spec: &MigrationSpec,
) -> Result<(), HostError> {
    let (inner, bytes) = (Arc::clone(inner), document_bytes(guest, Some(spec)));
    let tried = tokio::task::spawn_blocking(move || {
        Reserve::try_out(&inner.state_dir, Uuid::now_v7(), bytes).map_err(|e| no_room(&inner, e))
    });
    tried.await.map_err(|e| HostError::internal("looking for disk space", e))?
}

fn document_bytes(guest: &GuestRecord, spec: Option<&MigrationSpec>) -> usize {
    let documents = [form::length(guest), spec.map_or(0, form::length)];
    documents.iter().sum()
}

fn no_room(inner: &Inner, source: std::io::Error) -> HostError {
    let file =
        PrivateFileError::Io { operation: "set disk space aside in", path: inner.state_dir.clone(), source };
    HostError::storage("setting disk space aside for how the migration ends", StoreError::of_files(file))
}

fn note<T>(against: &mut Vec<HostError>, found: Result<T, HostError>) -> Option<T> {
    found.map_err(|e| against.push(e)).ok()
}

/// Checks everything about a migration that can be checked here before it starts: what [`look`] has nothing
/// against.
pub(in crate::host) fn prepare(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: MigrationSpec,
) -> Result<Prepared, HostError> {
    prepared(look(inner, id, &spec)?, spec)
}

/// A migration that this host has nothing against.
pub(in crate::host) fn prepared(looked: Looked, spec: MigrationSpec) -> Result<Prepared, HostError> {
    let Looked { id, guest, record, peer, strategy, against } = looked;
    if let Some(first) = against.into_iter().next() {
        return Err(first);
    }
    // Whatever is missing was against it.
    let (Some(peer), Some(strategy)) = (peer, strategy) else {
        return Err(HostError::internal("looking at a migration", "something is missing without a reason"));
    };
    let suite = spec.suite;
    let migration = MigrationRecord {
        spec: Some(spec),
        progress: Progress { total_bytes: record.layout.ram_bytes(), ..Progress::default() },
        ..MigrationRecord::begun(
            id.unwrap_or_else(Uuid::now_v7),
            MigrationDirection::Outgoing,
            (record.id, &record.spec),
            &peer.spec.name,
            peer.spec.identity.clone(),
            (strategy, suite),
        )
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
    let FindsWrites::Scan { lacks, why } = inner.driver(&record.spec.driver)?.finds_writes() else {
        return Ok(());
    };
    if spec.mode != MigrationMode::Precopy {
        return Ok(());
    }
    let plan = inner.plan(guest, strategy, u32::from(spec.streams), &PlanOptions::default())?;
    if plan.has_digests() {
        return Ok(());
    }
    Err(HostError::lacks(lacks, why))
}

fn ticket_id(ticket: &Ticket, chosen: Option<Uuid>) -> Result<Uuid, HostError> {
    let bad = |at: &str, code, detail: &str| {
        Err(HostError::Invalid(vec![crate::host::FieldError::new(at, code, detail)]))
    };
    // Whether it has expired is for the destination to say, by the clock that it was made with.
    if chosen.is_some_and(|id| id != ticket.session) {
        let detail = "the ticket is for the migration with the id of its session";
        return bad("/destination/ticket", "wrong_id", detail);
    }
    Ok(ticket.session)
}

/// The guest is the migration's from now on, until it gives it back.
async fn claim(prepared: &Prepared) -> Result<(), HostError> {
    let Prepared { record, guest, .. } = prepared;
    let Some(spec) = &record.spec else { return Ok(()) };
    let (migration, choice, streams) = (record.id, spec.mirror.clone(), spec.streams);
    guest.ask(|reply| Command::Claim { migration, choice, streams, dry_run: false, reply }).await
}

/// Whether a migration might have the guest now; takes nothing.
pub(in crate::host) async fn may_claim(guest: &GuestEntry, spec: &MigrationSpec) -> Result<(), HostError> {
    let (migration, choice, streams) = (Uuid::nil(), spec.mirror.clone(), spec.streams);
    guest.ask(|reply| Command::Claim { migration, choice, streams, dry_run: true, reply }).await
}

/// The migration that [`create`] would begin, if both hosts have nothing against it; starts none.
pub(in crate::host) async fn would_create(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: MigrationSpec,
) -> Result<Begun, HostError> {
    let mut looked = look(inner, id, &spec)?;
    if !looked.against.is_empty() {
        return Err(looked.against.swap_remove(0));
    }
    may_claim(&looked.guest, &spec).await?;
    has_room(inner, &looked.record, &spec).await?;
    let destination_asked = match asking::ask(inner, &looked, &spec).await {
        Some(Answer::Against(reasons)) if reasons.is_empty() => true,
        Some(Answer::Against(reasons)) => return Err(HostError::DestinationRefuses(reasons)),
        Some(Answer::Silent(silence)) => return Err(HostError::PeerSilent(silence)),
        Some(Answer::Unknown) | None => false,
    };
    let streams = u32::from(spec.streams);
    let Prepared { record, guest: entry, .. } = prepared(looked, spec)?;
    let guest = entry.record();
    let helper_image = record.spec.as_ref().and_then(|s| s.template.helper_image.clone());
    let options = PlanOptions { helper_image, ..PlanOptions::default() };
    let plan = inner.plan(&entry, record.strategy, streams, &options)?;
    Ok(Begun { record, preview: Some(MigrationPreview { guest, plan, destination_asked }) })
}

/// Records and starts a migration. From the answer on, and while it waits in the queue, it alone has the
/// guest.
pub(in crate::host) async fn create(
    inner: &Arc<Inner>,
    id: Option<Uuid>,
    spec: MigrationSpec,
) -> Result<MigrationRecord, HostError> {
    let prepared = prepare(inner, id, spec)?;
    claim(&prepared).await?;
    let (guest, migration) = (Arc::clone(&prepared.guest), prepared.record.id);
    // Held from here on until the end is stored: a disk that fills up meanwhile must not leave the guest in
    // doubt, nor end the migration when its turn comes.
    let (theirs, record, at) = (Arc::clone(inner), prepared.record.clone(), guest.record());
    let space = tokio::task::spawn_blocking(move || set_aside(&theirs, &record, &at)).await;
    let space = space.unwrap_or_else(|e| Err(HostError::internal("setting disk space aside", e)));
    let begun = space.and_then(|space| begin(inner, prepared, space));
    if begun.is_err() {
        let (done, told) = tokio::sync::oneshot::channel();
        if guest.tell(Command::Release { migration, done }).await {
            let _ = told.await;
        }
    }
    begun
}

/// A migration whose guest is claimed and for whose end there is room: recorded, then queued.
fn begin(inner: &Arc<Inner>, prepared: Prepared, space: Reserve) -> Result<MigrationRecord, HostError> {
    let Prepared { record: migration, guest, peer } = prepared;
    let id = migration.id;
    let limits = migration.spec.as_ref().map(|s| s.limits).unwrap_or_default();
    let entry = Arc::new(MigrationEntry::new(
        migration,
        Arc::new(inner.new_control(id, MigrationState::Queued, limits)),
    ));
    // Whoever forgets a peer looks for its migrations alone. A ticket's destination is no known peer.
    inner.while_peers_stay(|| -> Result<_, HostError> {
        if !peer.id.is_nil() && !inner.peers().contains_key(&peer.id) {
            return Err(HostError::missing(ResourceKind::PeerHost, peer.spec.name.clone()));
        }
        inner.begin_migration(&entry, |_| Ok(()))
    })?;
    let record = entry.record();
    let (theirs, slots) = (Arc::clone(inner), Arc::clone(&inner.outgoing_slots));
    inner.runtime.spawn(async move {
        let mut changes = theirs.changes();
        let mut slot = std::pin::pin!(slots.acquire_owned());
        // Called off in the queue, or nothing left to be moved: ends now, not when a slot is free.
        let _slot = loop {
            let there = matches!(guest.record().state, GuestState::Running | GuestState::Paused);
            if entry.control.is_cancelled() || !there {
                break None;
            }
            tokio::select! {
                slot = &mut slot => break slot.ok(),
                _ = changes.changed() => {}
            }
        };
        let _ =
            tokio::task::spawn_blocking(move || Run { inner: theirs, entry, guest, peer }.run(space)).await;
    });
    Ok(record)
}

/// What the guest itself has to say: its policy, its readiness.
fn check_guest(
    inner: &Inner,
    guest: &GuestEntry,
    record: &GuestRecord,
    spec: &MigrationSpec,
) -> Result<(), HostError> {
    if let Some(sev) = inner.facts(&record.spec.driver).sev {
        check_policy(sev.policy)?;
    }
    if spec.verify && matches!(record.protection, ProtectionLevel::Sev | ProtectionLevel::SevEs) {
        let why = "no host can read an encrypted guest's pages to digest them";
        return Err(HostError::lacks(Capability::Verify, why));
    }
    match guest.readiness() {
        Some(r) if !r.ready => Err(HostError::GuestNotReady { why: r.reason.sentence() }),
        _ => Ok(()),
    }
}

fn existing_mirror(inner: &Inner, id: Uuid, guest: Uuid, streams: u16) -> Result<Strategy, HostError> {
    let mirror = inner.mirror_entry(id).filter(|m| m.guest == guest);
    let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
    let record = mirror.ok_or_else(missing)?.record();
    if record.workers.len() < usize::from(streams) {
        let detail =
            format!("{streams} streams need as many workers, and the mirror has {}", record.workers.len());
        return Err(HostError::Invalid(vec![crate::host::FieldError::new(
            "/streams",
            "out_of_range",
            detail,
        )]));
    }
    Ok(record.strategy)
}

/// Whether the helper that the guest would leave through seals by what is asked for. What else is wrong with
/// it is found by whoever looks at the mirror.
fn check_suite(inner: &Inner, record: &GuestRecord, spec: &MigrationSpec) -> Result<(), HostError> {
    let image = match &spec.mirror {
        MirrorChoice::Template(_) => {
            inner.helper_image(&record.spec.driver, spec.template.helper_image.as_deref()).ok()
        }
        MirrorChoice::Existing(id) => inner
            .mirror_entry(*id)
            .and_then(|mirror| inner.image_measuring(&mirror.record().helper_measurement).ok().flatten()),
    };
    let Some(image) = image else { return Ok(()) };
    let has = Suite::of_helper(image.header());
    if has.contains(&spec.suite) {
        return Ok(());
    }
    let (wanted, has) = (spec.suite.name(), suite_names(&has).join(", "));
    Err(HostError::lacks(
        Capability::Suite,
        format!("the helper image does not seal by {wanted}, but by {has}"),
    ))
}
