//! Guests of a host: what is asked of one by id or name.
//!
//! Owns: definitions, actions, labels, the end of a definition; in its files the owner of each guest and its
//! RAM. Must not know: HTTP; how a machine runs.

pub(super) mod command;
pub(super) mod entry;
pub(super) mod ram;
pub(super) mod registry;
pub(super) mod task;
pub(super) mod types;

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use self::command::Command;
use super::act::{self, Effect};
use super::events::{Change, EventBody};
use super::{
    ConsoleChunk, Expected, GuestAction, GuestRecord, GuestSpec, GuestState, GuestStats, Host, HostError,
    Labels, validate,
};
use crate::addr::PAGE_SIZE;
use crate::store::{Batch, Kind, StoreError};

impl Host {
    /// Defines a guest.
    ///
    /// # Errors
    /// Values that cannot be, a name that is taken, storage.
    pub async fn define_guest(&self, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        self.define_guest_as(None, spec).await
    }

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
        let bare = validate::guest(&self.inner.drivers, &spec)?;
        let boot = self.inner.boot_facts(&spec)?;
        let layout = self.inner.layout_for(&spec.driver, &bare)?;
        self.inner.check_guest_free(id, &spec.name)?;
        let protection = self.inner.facts(&spec.driver).protection;
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

    /// One guest, by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn guest(&self, key: &str) -> Result<GuestRecord, HostError> {
        self.inner.find_guest(key).map(|g| g.record())
    }

    /// All guests by creation.
    pub fn guests(&self) -> Vec<Arc<GuestRecord>> {
        let mut list: Vec<_> = self.inner.guests().values().map(|g| g.shown()).collect();
        list.sort_by_key(|r| (r.created_at, r.id));
        list
    }

    /// Asks for an action; returns as soon as it is accepted (the state says how it goes on). Idempotent in
    /// effect: starting a running guest returns it as it is.
    ///
    /// # Errors
    /// A state in which the action makes no sense, a migration that has the guest, a host without KVM or
    /// QEMU.
    pub async fn guest_action(&self, key: &str, action: GuestAction) -> Result<GuestRecord, HostError> {
        self.guest_action_at(key, action, Expected::any()).await
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
        self.inner.check_starts(&record.spec.driver)
    }

    /// Undefines a stopped or failed guest.
    ///
    /// # Errors
    /// Another state, or a migration that has it.
    pub async fn delete_guest(&self, key: &str) -> Result<(), HostError> {
        self.delete_guest_at(key, Expected::any()).await
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

    /// Console output from `offset` (`None`: the oldest kept), at most `max` bytes.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn console(&self, key: &str, offset: Option<u64>, max: usize) -> Result<ConsoleChunk, HostError> {
        Ok(self.inner.find_guest(key)?.console(offset, max))
    }

    /// A guest's counters.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn guest_stats(&self, key: &str) -> Result<GuestStats, HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        let live = has_machine(record.state);
        let shared =
            guest.encryption().filter(|_| live).map(|e| e.shared().iter().count() as u64 * PAGE_SIZE);
        Ok(GuestStats {
            vcpus: self.inner.facts(&record.spec.driver).vcpus,
            uptime_ms: guest.uptime_ms().filter(|_| live),
            console_bytes: guest.console(Some(u64::MAX), 1).end,
            total_bytes: record.layout.ram_bytes(),
            shared_bytes: shared,
        })
    }
}

const fn has_machine(state: GuestState) -> bool {
    matches!(state, GuestState::Running | GuestState::Paused | GuestState::InDoubt)
}
