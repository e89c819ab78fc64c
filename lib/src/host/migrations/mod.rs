//! Migrations from and to this host: what is asked of one.
//!
//! Owns: beginning, limiting, switching over, calling off and forgetting; in its files what is asked of both
//! ends before, how each goes, and how it is ended. Must not know: HTTP; how pages move.

pub(super) mod admission;
pub(super) mod asking;
pub(super) mod audits;
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
pub(super) mod run;
pub(super) mod ticket;
pub(super) mod tickets;
pub(super) mod types;

use crate::host::{ResourceKind, Subject};
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use self::entry::MigrationEntry;
use super::act::Act;
use super::lists::{self, Page, PageRequest, Place, Selector};
use super::registry::{Facet, Listed as _};
use super::{
    Ask, Audit, Begun, Host, HostError, MigrationLimits, MigrationRecord, MigrationSpec, MigrationState,
    PageDigests, validate,
};

/// States in which a migration's course can still be changed: [`MigrationState::is_moving`].
const MOVING: [&str; 4] = [
    MigrationState::Queued.name(),
    MigrationState::Preparing.name(),
    MigrationState::Precopy.name(),
    MigrationState::Switchover.name(),
];

/// Whether limits mean anything to it: it moves, or its audit goes on.
fn may_be_limited(record: &MigrationRecord) -> bool {
    record.state.is_moving() || record.audit.as_ref().is_some_and(Audit::is_pending)
}

impl Host {
    /// Starts a migration; returns when it is recorded. A dry run asks the destination, too.
    ///
    /// # Errors
    /// Values that cannot be, unknown guest or peer, a state that does not allow it, refusals of the planner,
    /// [`HostError::IdTaken`]; of a dry run also [`HostError::DestinationRefuses`] and
    /// [`HostError::PeerSilent`].
    pub async fn create_migration(&self, spec: MigrationSpec, ask: &Ask) -> Result<Begun, HostError> {
        if ask.dry_run {
            return outgoing::would_create(&self.inner, ask.id, spec).await;
        }
        // In a task of its own: a caller that goes away in the middle leaves no guest claimed for nothing.
        let (inner, id) = (Arc::clone(&self.inner), ask.id);
        let part = Act::scope(Act::current(), async move { outgoing::create(&inner, id, spec).await });
        let begun = self.inner.runtime.spawn(part);
        let record = begun.await.map_err(|e| HostError::internal("starting the migration", e))??;
        Ok(Begun { record, preview: None })
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
        let all = self.inner.migration_entries();
        all.iter().filter(|m| m.is_listed()).map(|m| m.record()).collect()
    }

    /// A page of the migrations of `guest` (by id or name; `None`: of any) that are in one of `states`
    /// (empty: in any) and whose guests have `labels`: those that the guest has here now, or, of one that is
    /// gone, those that it had when it left.
    pub fn migration_page(
        &self,
        asked: &PageRequest,
        guest: Option<&str>,
        states: &[MigrationState],
        labels: &[Selector],
    ) -> Page<MigrationRecord> {
        let guest = guest.map(|key| match Uuid::try_parse(key) {
            Ok(id) => Facet::Guest(id),
            Err(_) => Facet::GuestName(key.into()),
        });
        let mut groups: Vec<Vec<Facet>> = guest.iter().map(|guest| vec![guest.clone()]).collect();
        if !states.is_empty() {
            groups.push(states.iter().map(|s| Facet::State(s.name())).collect());
        }
        for label in labels {
            let here = self.inner.of_guests_with(label);
            groups.extend(here.map(|here| here.into_iter().chain([label.into()]).collect()));
        }
        let look = |entry: Arc<MigrationEntry>| {
            // Records are long: the rest need not be put together.
            let may_be = entry.is_listed() && Facet::are_of_each(&entry.facets(), &groups);
            let record = may_be.then(|| entry.record())?;
            let here = || self.inner.guests().get(&record.guest).map(|g| g.labels());
            let is_one = (states.is_empty() || states.contains(&record.state))
                && (labels.is_empty()
                    || Selector::all_hold(labels, here().as_ref().unwrap_or(&record.labels)));
            is_one.then_some(record)
        };
        let chunk =
            |after: Option<&Place>, most| self.inner.migrations().chunk(asked.order, after, &groups, most);
        lists::page(asked, chunk, look)
    }

    /// Asks for cancellation; the outcome is in the record's state. Ended already: the record as it is.
    ///
    /// # Errors
    /// No such migration, [`HostError::GenerationMismatch`], [`HostError::PastPointOfNoReturn`] once START
    /// may have gone out.
    pub async fn cancel_migration(&self, id: Uuid, ask: &Ask) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        let asked = entry.hold(|record| {
            ask.check(ResourceKind::Migration, record.generation)?;
            if record.state.is_terminal() {
                return Ok(false);
            }
            if ask.dry_run {
                return if entry.control.is_past() { Err(HostError::PastPointOfNoReturn) } else { Ok(false) };
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

    /// Forgets a migration that has ended; gives it as it was.
    ///
    /// # Errors
    /// No such migration, one that has not ended, [`HostError::GenerationMismatch`], storage.
    pub async fn delete_migration(&self, id: Uuid, ask: &Ask) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        // One that has ended does not change any more; what was looked at is what is deleted, by one of those
        // who ask.
        entry.alone(|| {
            let record = self.migration_entry(id)?.record();
            ask.check(ResourceKind::Migration, record.generation)?;
            if !record.state.is_terminal() {
                return Err(HostError::WrongState {
                    kind: ResourceKind::Migration.into(),
                    current: record.state.name(),
                    allowed: &["succeeded", "failed", "canceled"],
                });
            }
            if !ask.dry_run {
                self.inner.forget_migration(&record)?;
            }
            Ok(record)
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
        ask: &Ask,
    ) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        let now = entry.record();
        let spec = now.spec.clone().filter(|_| may_be_limited(&now));
        let Some(spec) = spec else {
            let current = now.state.name();
            return Err(HostError::WrongState {
                kind: ResourceKind::Migration.into(),
                current,
                allowed: &MOVING,
            });
        };
        let spec = MigrationSpec { limits, ..spec };
        validate::migration(&spec)?;
        let guest = self.inner.find_guest(&now.guest.to_string())?;
        policy::check_throttle(&self.inner, &guest.record().spec.driver, &limits)?;
        ask.check(ResourceKind::Migration, now.generation)?;
        if ask.dry_run {
            return Ok(MigrationRecord { spec: Some(spec), ..now });
        }
        let store = |now: &MigrationRecord| {
            if !may_be_limited(now) {
                let current = now.state.name();
                return Err(HostError::WrongState {
                    kind: ResourceKind::Migration.into(),
                    current,
                    allowed: &MOVING,
                });
            }
            ask.check(ResourceKind::Migration, now.generation)?;
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
    /// Asking again changes nothing.
    ///
    /// # Errors
    /// No such migration, another state, [`HostError::GenerationMismatch`].
    pub fn switch_over_migration(&self, id: Uuid, ask: &Ask) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        entry.hold(|now| {
            ask.check(ResourceKind::Migration, now.generation)?;
            if now.spec.is_none() || !now.state.is_moving() {
                let current = now.state.name();
                return Err(HostError::WrongState {
                    kind: ResourceKind::Migration.into(),
                    current,
                    allowed: &MOVING,
                });
            }
            if !ask.dry_run {
                entry.control.switch_over().map_err(|_| HostError::PastPointOfNoReturn)?;
            }
            Ok(())
        })?;
        if !ask.dry_run {
            self.inner.migration_changed(id);
        }
        Ok(entry.record())
    }

    /// Digests of every page at the pause point, of a migration with `verify`.
    ///
    /// # Errors
    /// [`HostError::NotFound`] without.
    pub fn page_digests(&self, id: Uuid) -> Result<Arc<PageDigests>, HostError> {
        let missing = || HostError::missing(Subject::PageDigests, id.to_string());
        self.migration_entry(id)?.page_digests().ok_or_else(missing)
    }

    pub(super) fn migration_entry(&self, id: Uuid) -> Result<Arc<MigrationEntry>, HostError> {
        let missing = || HostError::missing(ResourceKind::Migration, id.to_string());
        self.inner.migration_entry(id).ok_or_else(missing)
    }
}
