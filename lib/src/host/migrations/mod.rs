//! Migrations from and to this host: what is asked of one.
//!
//! Owns: beginning, limiting, switching over, calling off and forgetting; in its files what is asked of both
//! ends before, how each goes, and how it is ended. Must not know: HTTP; how pages move.

pub(super) mod admission;
pub(super) mod asking;
pub(super) mod checks;
pub(super) mod confirm;
pub(super) mod definition;
pub(super) mod endings;
pub(super) mod entry;
pub(super) mod findings;
pub(super) mod hand_over;
pub(super) mod incoming;
pub(super) mod journal;
pub(super) mod outgoing;
pub(super) mod policy;
pub(super) mod refusals;
pub(super) mod reserve;
pub(super) mod resolution;
pub(super) mod ticket;
pub(super) mod tickets;
pub(super) mod types;

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use self::asking::Answer;
use self::entry::MigrationEntry;
use super::act::Act;
use super::{
    Expected, GuestRecord, Host, HostError, MigrationLimits, MigrationRecord, MigrationSpec, MigrationState,
    PageDigests, PlanOptions, validate,
};
use crate::address_space::MirrorPlan;

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
    /// Starts a migration; returns when it is recorded.
    ///
    /// # Errors
    /// Values that cannot be, unknown guest or peer, a state that does not allow it, refusals of the planner.
    pub async fn create_migration(&self, spec: MigrationSpec) -> Result<MigrationRecord, HostError> {
        self.create_migration_as(None, spec).await
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

    /// One migration.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn migration(&self, id: Uuid) -> Result<MigrationRecord, HostError> {
        self.migration_entry(id).map(|m| m.record())
    }

    /// All migrations by creation.
    pub fn migrations(&self) -> Vec<MigrationRecord> {
        let mut list: Vec<_> = self.inner.migration_entries().iter().map(|m| m.record()).collect();
        list.sort_by_key(|r| (r.created_at, r.id));
        list
    }

    /// Asks for cancellation; the outcome is in the record's state. Ended already: the record as it is.
    ///
    /// # Errors
    /// [`HostError::PastPointOfNoReturn`] once START may have gone out.
    pub async fn cancel_migration(&self, id: Uuid) -> Result<MigrationRecord, HostError> {
        self.cancel(id, &Expected::any())
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

    fn cancel(&self, id: Uuid, expected: &Expected) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        let asked = entry.hold(|record| {
            expected.check("migration", record.generation)?;
            if record.state.is_terminal() {
                return Ok(false);
            }
            entry.control.cancel().map(|()| true).map_err(|_| HostError::PastPointOfNoReturn)
        })?;
        if !asked {
            return Ok(entry.record());
        }
        // Asked for is asked for, whatever the disk takes: the record says so when it next gets there.
        let record = entry.change(|r| {
            r.cancel_requested_at.get_or_insert(Timestamp::now());
        });
        self.inner.changed();
        Ok(record)
    }

    /// Forgets a migration that has ended.
    ///
    /// # Errors
    /// It has not.
    pub async fn delete_migration(&self, id: Uuid) -> Result<(), HostError> {
        self.delete_migration_at(id, &Expected::any()).await
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
        policy::check_throttle(&self.inner, &guest.record().spec.driver, &limits)?;
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

    /// Digests of every page at the pause point, of a migration with `verify`.
    ///
    /// # Errors
    /// [`HostError::NotFound`] without.
    pub fn page_digests(&self, id: Uuid) -> Result<Arc<PageDigests>, HostError> {
        let missing = || HostError::NotFound { kind: "page digests of migration", key: id.to_string() };
        self.migration_entry(id)?.page_digests().ok_or_else(missing)
    }

    pub(super) fn migration_entry(&self, id: Uuid) -> Result<Arc<MigrationEntry>, HostError> {
        let missing = || HostError::NotFound { kind: "migration", key: id.to_string() };
        self.inner.migration_entry(id).ok_or_else(missing)
    }
}
