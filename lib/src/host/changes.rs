//! Changes as careful callers make them: with an id of their own, an expected generation, or only to see what
//! would come.
//!
//! Owns: these forms of the host's requests. Must not know: what a machine or a mirror is.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use super::act::{self, Act, Effect};
use super::events::{Change, EventBody};
use super::guests::task::{self, Command};
use super::migrations::asking::{self, Answer};
use super::migrations::outgoing;
use super::{
    Expected, FieldError, GuestAction, GuestRecord, GuestSpec, GuestState, Host, HostError, Labels,
    MigrationLimits, MigrationRecord, MigrationSpec, MigrationState, MirrorRecord, MirrorSpec, MirrorState,
    PeerRecord, PeerSpec, PlanOptions, validate,
};
use crate::address_space::{MirrorPlan, Strategy};
use crate::mirror::Placement;
use crate::store::{Batch, Kind, StoreError};
use crate::transport::{Endpoint, PeerIdentity};

/// A migration that would begin.
#[derive(Clone, Debug)]
pub struct MigrationPreview {
    /// The record that it would begin with.
    pub record: MigrationRecord,
    /// Its guest.
    pub guest: GuestRecord,
    /// The plan of its mirror.
    pub plan: MirrorPlan,
    /// Whether the destination has said that it would let it in; false where its build cannot be asked.
    pub destination_asked: bool,
}

/// States in which a migration's course can still be changed.
const MOVING: [MigrationState; 4] =
    [MigrationState::Queued, MigrationState::Preparing, MigrationState::Precopy, MigrationState::Switchover];
/// Their names.
const MOVING_NAMES: [&str; 4] = [MOVING[0].name(), MOVING[1].name(), MOVING[2].name(), MOVING[3].name()];

impl Host {
    /// Defines a guest under an id of the caller's choice (`None`: a new one).
    ///
    /// # Errors
    /// As [`Host::define_guest`]; [`HostError::IdTaken`].
    pub async fn define_guest_as(&self, id: Option<Uuid>, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        let record = self.new_guest(id, spec)?;
        // Nobody else gets the name or the id, and nobody sees the guest, until it is on disk.
        let claim = self.inner.claim_guest(record.id, &record.spec.name)?;
        let failed = |e| match e {
            StoreError::NameTaken { .. } => {
                HostError::NameTaken { kind: "guest", name: record.spec.name.clone() }
            }
            e => HostError::storage("storing the guest", e),
        };
        let mut batch = Batch::new();
        batch.put(Kind::Guest, record.id, Some(&record.spec.name), &record).map_err(failed)?;
        EventBody::guest(&record, None, Change::Created).write(&mut batch);
        let riding = act::along(&Effect::Guest(&record), &mut batch);
        let (inner, stored) = (Arc::clone(&self.inner), record.clone());
        let stored = self.inner.ledger.commit_and(batch, move || {
            // Not before: a guest that was refused would leave its owner behind.
            let entry = task::spawn(&inner, stored, GuestState::Stopped);
            inner.guests_mut().insert(entry);
            riding.arrived();
        });
        stored.await.map_err(failed)?;
        drop(claim);
        self.inner.changed();
        Ok(record)
    }

    /// The guest that a definition would make; makes none.
    ///
    /// # Errors
    /// As [`Host::define_guest`].
    pub fn preview_guest(&self, id: Option<Uuid>, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        self.new_guest(id, spec)
    }

    fn new_guest(&self, id: Option<Uuid>, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        self.inner.check_running()?;
        self.check_not_in_maintenance()?;
        let bare = validate::guest(&spec)?;
        let boot = self.inner.boot_facts(&spec)?;
        let layout = self.inner.layout_for(&spec.driver, &bare)?;
        self.inner.check_guest_free(id, &spec.name)?;
        let protection = spec.driver.protection();
        Ok(GuestRecord {
            id: id.unwrap_or_else(Uuid::now_v7),
            spec,
            layout,
            state: GuestState::Stopped,
            generation: 1,
            protection,
            boot,
            readiness: None,
            migration: None,
            moved_to: None,
            unconfirmed: false,
            error: None,
            created_at: Timestamp::now(),
            started_at: None,
        })
    }

    /// As [`Host::guest_action`], of a guest at the expected generation.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`], [`HostError::Maintenance`].
    pub async fn guest_action_at(
        &self,
        key: &str,
        action: GuestAction,
        expected: Expected,
    ) -> Result<GuestRecord, HostError> {
        let guest = self.inner.find_guest(key)?;
        self.check_action(&guest.record(), action)?;
        guest.ask(|reply| Command::Act(action, expected, reply)).await
    }

    /// The guest as an action would leave it; does nothing.
    ///
    /// # Errors
    /// As [`Host::guest_action_at`].
    pub fn preview_action(
        &self,
        key: &str,
        action: GuestAction,
        expected: &Expected,
    ) -> Result<GuestRecord, HostError> {
        let guest = self.inner.find_guest(key)?;
        let mut record = guest.record();
        expected.check("guest", record.generation)?;
        self.check_action(&record, action)?;
        if let Some(migration) = record.migration {
            return Err(HostError::GuestMigrating { migration });
        }
        if action == GuestAction::Start && record.state == GuestState::Stopped {
            self.inner.has_memory_for(&record)?;
        }
        record.state = task::after(&guest, &record, action)?;
        record.unconfirmed &= action != GuestAction::Confirm;
        Ok(record)
    }

    fn check_action(&self, record: &GuestRecord, action: GuestAction) -> Result<(), HostError> {
        if action != GuestAction::Start {
            return Ok(());
        }
        self.inner.check_running()?;
        if record.state == GuestState::Stopped {
            self.check_not_in_maintenance()?;
        }
        self.check_driver(&record.spec.driver)
    }

    /// As [`Host::delete_guest`], of a guest at the expected generation.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`].
    pub async fn delete_guest_at(&self, key: &str, expected: Expected) -> Result<(), HostError> {
        self.inner.find_guest(key)?.ask(|reply| Command::Undefine(expected, reply)).await
    }

    /// The guest that a deletion would remove; removes none.
    ///
    /// # Errors
    /// As [`Host::delete_guest_at`].
    pub fn preview_delete_guest(&self, key: &str, expected: &Expected) -> Result<GuestRecord, HostError> {
        let record = self.guest(key)?;
        expected.check("guest", record.generation)?;
        match (record.migration, record.state) {
            (Some(migration), _) => Err(HostError::GuestMigrating { migration }),
            (None, GuestState::Stopped | GuestState::Failed) => Ok(record),
            (None, state) => Err(HostError::WrongState {
                kind: "guest",
                current: state.name(),
                allowed: &["stopped", "failed"],
            }),
        }
    }

    /// Gives a guest other labels; without `act` it only says what the guest would be. They go along with a
    /// migration, also when they change while it runs, up to the moment at which the guest's state leaves
    /// with them.
    ///
    /// # Errors
    /// No such guest, labels that cannot be, [`HostError::GenerationMismatch`], [`HostError::GuestMigrating`]
    /// between that moment and the migration's end.
    pub async fn relabel_guest(
        &self,
        key: &str,
        labels: Labels,
        expected: Expected,
        act: bool,
    ) -> Result<GuestRecord, HostError> {
        self.change_labels(key, |_| labels, expected, act).await
    }

    /// As [`Host::relabel_guest`], with labels that `change` makes of those there are at that very moment:
    /// changes that come together all count.
    ///
    /// # Errors
    /// As [`Host::relabel_guest`].
    pub async fn change_labels(
        &self,
        key: &str,
        change: impl FnOnce(&Labels) -> Labels + Send + 'static,
        expected: Expected,
        act: bool,
    ) -> Result<GuestRecord, HostError> {
        let guest = self.inner.find_guest(key)?;
        let change = Box::new(change);
        guest.ask(|reply| Command::Relabel { change, expected, act, reply }).await
    }

    /// Makes a mirror under an id of the caller's choice (`None`: a new one).
    ///
    /// # Errors
    /// As [`Host::create_mirror`]; [`HostError::IdTaken`].
    pub async fn create_mirror_as(
        &self,
        id: Option<Uuid>,
        spec: MirrorSpec,
    ) -> Result<MirrorRecord, HostError> {
        self.inner.check_running()?;
        validate::mirror(&spec)?;
        if id.is_some_and(|id| self.inner.mirror_entry(id).is_some()) {
            return Err(HostError::IdTaken { kind: "mirror" });
        }
        let guest = self.inner.find_guest(&spec.guest)?;
        guest.ask(|reply| Command::CreateMirror(spec, id, reply)).await
    }

    /// The guest and the plan that a mirror would have; makes none.
    ///
    /// # Errors
    /// As [`Host::create_mirror_as`].
    pub fn preview_mirror(
        &self,
        id: Option<Uuid>,
        spec: &MirrorSpec,
    ) -> Result<(GuestRecord, MirrorPlan), HostError> {
        validate::mirror(spec)?;
        if id.is_some_and(|id| self.inner.mirror_entry(id).is_some()) {
            return Err(HostError::IdTaken { kind: "mirror" });
        }
        let record = self.guest(&spec.guest)?;
        if let Some(migration) = record.migration {
            return Err(HostError::GuestMigrating { migration });
        }
        let private = |s: Strategy| matches!(s, Strategy::PspCopied { .. });
        let same_place = |m: &MirrorRecord| private(m.strategy) == private(spec.strategy);
        let others = self.inner.mirror_entries();
        let other = others.iter().find(|m| m.guest == record.id && same_place(&m.record()));
        if let Some(other) = other {
            return Err(HostError::InUse { kind: "guest", user: format!("mirror {}", other.id) });
        }
        if !matches!(record.state, GuestState::Running | GuestState::Paused) {
            let current = record.state.name();
            return Err(HostError::WrongState { kind: "guest", current, allowed: &["running", "paused"] });
        }
        self.inner.check_driver(&record.spec.driver)?;
        let guest = self.inner.find_guest(&record.id.to_string())?;
        let helper_image = spec.options.helper_image.clone();
        let options = PlanOptions { helper_image, ..PlanOptions::default() };
        let plan = self.inner.plan(&guest, spec.strategy, spec.workers, &options)?;
        Ok((record, plan))
    }

    /// As [`Host::delete_mirror`], of a mirror at the expected generation.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`].
    pub async fn delete_mirror_at(&self, id: Uuid, expected: Expected) -> Result<(), HostError> {
        let record = self.mirror(id)?;
        let guest = self.inner.find_guest(&record.guest.to_string())?;
        guest.ask(|reply| Command::DeleteMirror(id, expected, reply)).await
    }

    /// Sets where a mirror's vCPU threads run and how they are scheduled.
    ///
    /// # Errors
    /// No such mirror or processor, [`HostError::GenerationMismatch`], the kernel's refusal.
    pub fn place_mirror(
        &self,
        id: Uuid,
        placement: Placement,
        expected: &Expected,
        act: bool,
    ) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        let entry = self.inner.mirror_entry(id).ok_or_else(missing)?;
        let record = entry.record();
        if record.state == MirrorState::Failed {
            let allowed = &["creating", "ready", "busy"];
            return Err(HostError::WrongState { kind: "mirror", current: "failed", allowed });
        }
        let errors = validate::placement("/placement", &placement);
        if !errors.is_empty() {
            return Err(HostError::Invalid(errors));
        }
        expected.check("mirror", record.generation)?;
        if !act {
            return Ok(MirrorRecord { placement, ..record });
        }
        let record = entry.place(placement, expected)?;
        self.inner.tell_mirror(&entry, Change::Updated);
        self.inner.changed();
        Ok(record)
    }

    /// Starts a migration under an id of the caller's choice (`None`: a new one).
    ///
    /// # Errors
    /// As [`Host::create_migration`]; [`HostError::IdTaken`].
    pub async fn create_migration_as(
        &self,
        id: Option<Uuid>,
        spec: MigrationSpec,
    ) -> Result<MigrationRecord, HostError> {
        // In a task of its own: a caller that goes away in the middle leaves no guest claimed for nothing.
        let inner = Arc::clone(&self.inner);
        let part = Act::scope(Act::current(), async move { outgoing::create(&inner, id, spec).await });
        let begun = self.inner.runtime.spawn(part);
        begun.await.map_err(|e| HostError::internal("starting the migration", e))?
    }

    /// The record that a migration would begin with, if both hosts have nothing against it; starts none.
    ///
    /// # Errors
    /// As [`Host::create_migration_as`]; [`HostError::DestinationRefuses`], [`HostError::PeerSilent`].
    pub async fn preview_migration(
        &self,
        id: Option<Uuid>,
        spec: MigrationSpec,
    ) -> Result<MigrationPreview, HostError> {
        let mut looked = outgoing::look(&self.inner, id, &spec)?;
        if !looked.against.is_empty() {
            return Err(looked.against.swap_remove(0));
        }
        outgoing::may_claim(&looked.guest, &spec).await?;
        outgoing::has_room(&self.inner, &looked.record, &spec).await?;
        let destination_asked = match asking::ask(&self.inner, &looked, &spec).await {
            Some(Answer::Against(reasons)) if reasons.is_empty() => true,
            Some(Answer::Against(reasons)) => return Err(HostError::DestinationRefuses(reasons)),
            Some(Answer::Silent(silence)) => return Err(HostError::PeerSilent(silence)),
            Some(Answer::Unknown) | None => false,
        };
        let streams = u32::from(spec.streams);
        let prepared = outgoing::prepared(looked, spec)?;
        let guest = prepared.guest.record();
        let strategy = prepared.record.strategy;
        let helper_image = prepared.record.spec.as_ref().and_then(|s| s.template.helper_image.clone());
        let options = PlanOptions { helper_image, ..PlanOptions::default() };
        let plan = self.inner.plan(&prepared.guest, strategy, streams, &options)?;
        Ok(MigrationPreview { record: prepared.record, guest, plan, destination_asked })
    }

    /// As [`Host::cancel_migration`], of a migration at the expected generation.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`].
    pub async fn cancel_migration_at(
        &self,
        id: Uuid,
        expected: &Expected,
    ) -> Result<MigrationRecord, HostError> {
        self.cancel(id, expected)
    }

    /// As [`Host::delete_migration`], of a migration at the expected generation. One that has ended does not
    /// change any more, so the check holds until it is gone.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`].
    pub async fn delete_migration_at(&self, id: Uuid, expected: &Expected) -> Result<(), HostError> {
        let entry = self.migration_entry(id)?;
        // One that has ended does not change any more; what was looked at is what is deleted, by one of those
        // who ask.
        entry.alone(|| {
            let record = self.migration_entry(id)?.record();
            expected.check("migration", record.generation)?;
            if !record.state.is_terminal() {
                return Err(HostError::WrongState {
                    kind: "migration",
                    current: record.state.name(),
                    allowed: &["succeeded", "failed", "canceled"],
                });
            }
            self.inner.forget_migration(&record)
        })
    }

    /// Gives a migration other limits, also while it runs: bandwidth holds from the next batch on, the rest
    /// from the next look at it. How long the destination waits in silence was told to it at the start and
    /// stays.
    ///
    /// # Errors
    /// No such migration, another state, limits that cannot be, [`HostError::GenerationMismatch`].
    pub fn limit_migration(
        &self,
        id: Uuid,
        limits: MigrationLimits,
        expected: &Expected,
        act: bool,
    ) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        let now = entry.record();
        let spec = now.spec.clone().filter(|_| MOVING.contains(&now.state));
        let Some(spec) = spec else {
            let current = now.state.name();
            return Err(HostError::WrongState { kind: "migration", current, allowed: &MOVING_NAMES });
        };
        let spec = MigrationSpec { limits, ..spec };
        validate::migration(&spec)?;
        let guest = self.inner.find_guest(&now.guest.to_string())?;
        outgoing::check_throttle(&guest.record().spec.driver, &limits)?;
        expected.check("migration", now.generation)?;
        if !act {
            return Ok(MigrationRecord { spec: Some(spec), ..now });
        }
        let store = |now: &MigrationRecord| {
            if !MOVING.contains(&now.state) {
                let current = now.state.name();
                return Err(HostError::WrongState { kind: "migration", current, allowed: &MOVING_NAMES });
            }
            expected.check("migration", now.generation)?;
            // On disk before it holds.
            let generation = now.generation + 1;
            let next = MigrationRecord { spec: Some(spec.clone()), generation, ..now.clone() };
            self.inner.store_migration(&next)
        };
        let record = entry.write(store, |r| {
            entry.control.set_limits(limits);
            r.spec = Some(spec.clone());
        })?;
        self.inner.migration_changed(id);
        Ok(record)
    }

    /// Asks a migration that copies while its guest runs for the switchover now, whatever pause it costs.
    /// Asking again changes nothing. Without `act` it is only checked whether that could be asked.
    ///
    /// # Errors
    /// No such migration, another state, [`HostError::GenerationMismatch`].
    pub fn switch_over_migration(
        &self,
        id: Uuid,
        expected: &Expected,
        act: bool,
    ) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        entry.hold(|now| {
            expected.check("migration", now.generation)?;
            if now.spec.is_none() || !MOVING.contains(&now.state) {
                let current = now.state.name();
                return Err(HostError::WrongState { kind: "migration", current, allowed: &MOVING_NAMES });
            }
            if act {
                entry.control.switch_over().map_err(|_| HostError::PastPointOfNoReturn)?;
            }
            Ok(())
        })?;
        if act {
            self.inner.migration_changed(id);
        }
        Ok(entry.record())
    }

    /// The peer that would be added; adds none.
    ///
    /// # Errors
    /// As [`Host::add_peer`].
    pub async fn preview_peer(&self, id: Option<Uuid>, spec: PeerSpec) -> Result<PeerRecord, HostError> {
        self.inner.check_running()?;
        let identity = validate::peer(&spec)?;
        self.check_not_self(&spec.address, &identity)?;
        self.check_leads_elsewhere(&spec.address).await?;
        // In one spelling, so that a pin can be compared as text.
        let spec = PeerSpec { identity: identity.to_string(), ..spec };
        if id.is_some_and(|id| self.inner.peers().contains_key(&id)) {
            return Err(HostError::IdTaken { kind: "host" });
        }
        if self.inner.peers().values().any(|p| p.spec.name == spec.name) {
            return Err(HostError::NameTaken { kind: "host", name: spec.name });
        }
        check_only_one(&self.inner.peers(), None, &spec.identity)?;
        let id = id.unwrap_or_else(Uuid::now_v7);
        Ok(PeerRecord { id, spec, generation: 1, created_at: Timestamp::now() })
    }

    /// A host is no peer of its own: nothing could go there.
    fn check_not_self(&self, address: &Endpoint, identity: &PeerIdentity) -> Result<(), HostError> {
        let mut errors = Vec::new();
        if identity == self.inner.identity.pin() {
            let detail = format!(
                "{identity} is this host itself; give the identity that the other host's `/v1/host` shows"
            );
            errors.push(FieldError::new("/identity", "own_identity", detail));
        }
        if self.is_own_address(address) {
            let detail = format!("at {address} this host itself listens; give the other host's address");
            errors.push(FieldError::new("/address", "own_address", detail));
        }
        if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
    }

    /// Whether a peer's name leads to somebody else, as far as that can be known now: wherever it leads
    /// later, nobody is taken for a peer who has not the peer's key.
    ///
    /// # Errors
    /// It leads here.
    pub async fn check_leads_elsewhere(&self, address: &Endpoint) -> Result<(), HostError> {
        let own = self.own_addresses_of(address).await;
        let Some(at) = own.first() else { return Ok(()) };
        let detail =
            format!("{address} is {at}, where this host itself listens; give the other host's address");
        Err(HostError::Invalid(vec![FieldError::new("/address", "own_address", detail)]))
    }

    /// Adds a peer under an id of the caller's choice (`None`: a new one).
    ///
    /// # Errors
    /// As [`Host::add_peer`]; [`HostError::IdTaken`].
    pub async fn add_peer_as(&self, id: Option<Uuid>, spec: PeerSpec) -> Result<PeerRecord, HostError> {
        let record = self.preview_peer(id, spec).await?;
        self.inner.change_peers(|| -> Result<_, HostError> {
            if self.inner.peers().contains_key(&record.id) {
                return Err(HostError::IdTaken { kind: "host" });
            }
            if self.inner.peers().values().any(|p| p.spec.name == record.spec.name) {
                return Err(HostError::NameTaken { kind: "host", name: record.spec.name.clone() });
            }
            check_only_one(&self.inner.peers(), None, &record.spec.identity)?;
            self.inner.store_peer(&record, Change::Created)?;
            self.inner.peers_mut().insert(record.id, record.clone());
            Ok(())
        })?;
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(record)
    }

    /// Says other things of a peer: everything but its name.
    ///
    /// # Errors
    /// No such peer, values that cannot be, [`HostError::GenerationMismatch`].
    pub fn change_peer(
        &self,
        key: &str,
        change: impl FnOnce(PeerSpec) -> PeerSpec,
        expected: &Expected,
        act: bool,
    ) -> Result<PeerRecord, HostError> {
        let id = self.inner.find_peer(key)?.id;
        let missing = || HostError::NotFound { kind: "host", key: key.to_owned() };
        let record = self.inner.change_peers(|| -> Result<_, HostError> {
            let now = self.inner.peers().get(&id).cloned().ok_or_else(missing)?;
            let spec = change(now.spec.clone());
            // Conditions come last: a request that cannot work is told so, whatever it expects (RFC 9110,
            // section 13.2.1).
            let identity = validate::peer(&spec)?;
            self.check_not_self(&spec.address, &identity)?;
            // Of two that an earlier build took each may still be changed in all else.
            if now.spec.identity != identity.to_string() {
                check_only_one(&self.inner.peers(), Some(id), &identity.to_string())?;
            }
            expected.check("host", now.generation)?;
            let spec = PeerSpec { identity: identity.to_string(), name: now.spec.name.clone(), ..spec };
            let record = PeerRecord { spec, generation: now.generation + 1, ..now };
            if act {
                self.inner.store_peer(&record, Change::Updated)?;
                self.inner.peers_mut().insert(id, record.clone());
            }
            Ok(record)
        })?;
        if !act {
            return Ok(record);
        }
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(record)
    }

    /// As [`Host::delete_peer`], of a peer at the expected generation.
    ///
    /// # Errors
    /// As there; [`HostError::GenerationMismatch`].
    pub async fn delete_peer_at(
        &self,
        key: &str,
        expected: &Expected,
        act: bool,
    ) -> Result<PeerRecord, HostError> {
        let peer = self.inner.find_peer(key)?;
        let missing = || HostError::NotFound { kind: "host", key: key.to_owned() };
        let now = self.inner.change_peers(|| -> Result<_, HostError> {
            let now = self.inner.peers().get(&peer.id).cloned().ok_or_else(missing)?;
            let user =
                self.migrations().into_iter().find(|m| m.peer == now.spec.name && !m.state.is_terminal());
            if let Some(m) = user {
                return Err(HostError::InUse { kind: "host", user: format!("migration {}", m.id) });
            }
            expected.check("host", now.generation)?;
            if act {
                self.inner.store_peer(&now, Change::Deleted)?;
                self.inner.peers_mut().remove(&peer.id);
            }
            Ok(now)
        })?;
        if !act {
            return Ok(now);
        }
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(now)
    }
}

/// A host is known under one name: of two with one identity nobody could say whose migration came in, or
/// which address is the one that is out of date.
fn check_only_one(
    peers: &HashMap<Uuid, PeerRecord>,
    but: Option<Uuid>,
    identity: &str,
) -> Result<(), HostError> {
    let known = peers.values().find(|p| Some(p.id) != but && p.spec.identity == identity);
    let Some(known) = known else { return Ok(()) };
    let name = &known.spec.name;
    let detail = format!(
        "{identity} is the identity of the host {name}; change that one, or give the identity that the \
         other host's `/v1/host` shows"
    );
    Err(HostError::Invalid(vec![FieldError::new("/identity", "duplicate_identity", detail)]))
}
