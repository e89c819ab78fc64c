//! What a guest's owner stores and shows, in this order.
//!
//! Owns: what is to be is stored before it is shown, what is so already is shown whether or not it can be
//! stored, and is owed then. Must not know: what has changed.

use std::sync::Arc;

use crate::host::act::{self, Effect, Riding};
use crate::host::events::{Change, EventBody};
use crate::host::migrations::endings::{self, Ending};
use crate::host::migrations::hand_over::Together;
use crate::host::{GuestRecord, GuestState, HostError, MigrationRecord};

use crate::store::{Batch, Kind, StoreError};

use super::Owner;

impl Owner {
    /// Makes the record say what is to be: with its event on disk first, then shown. When the store refuses,
    /// nothing has changed. Which of `store`, `happened` and `publish` is for what: docs/publishing.md.
    pub(super) fn store(
        &mut self,
        state: GuestState,
        change: impl FnOnce(&mut GuestRecord),
    ) -> Result<GuestRecord, HostError> {
        let failed = |e| HostError::storage("storing the guest", e);
        let (record, batch, riding) = self.next(state, change).map_err(failed)?;
        let show = self.showing(Some(record.clone()), None);
        let then = move || {
            show();
            riding.arrived();
        };
        self.inner.ledger.commit_blocking(batch, then).map_err(failed)?;
        self.state = state;
        self.is_shown();
        Ok(record)
    }

    /// Makes the record say what is so already. What the store does not take now is shown nevertheless, and
    /// owed to it; whoever asked for it is to be told so.
    pub(super) fn happened(
        &mut self,
        change: impl FnOnce(&mut GuestRecord),
    ) -> (GuestRecord, Result<(), HostError>) {
        self.happened_with(change, |_, _| {})
    }

    /// The same with more in the transaction.
    fn happened_with(
        &mut self,
        change: impl FnOnce(&mut GuestRecord),
        and: impl FnOnce(&GuestRecord, &mut Batch),
    ) -> (GuestRecord, Result<(), HostError>) {
        let (record, batch, riding) = match self.next(self.state, change) {
            Ok((record, mut batch, riding)) => {
                and(&record, &mut batch);
                (record, batch, riding)
            }
            Err(error) => {
                tracing::error!(%error, "a guest's record cannot be written");
                return (self.entry.record(), Err(HostError::internal("writing the guest", error)));
            }
        };
        let stored = self.inner.ledger.owe_blocking(batch, self.showing(Some(record.clone()), None));
        self.is_shown();
        if stored.is_ok() {
            riding.arrived();
        }
        (record, stored.map_err(HostError::owed))
    }

    /// As [`Owner::happened`], where nobody waits for an answer.
    pub(super) fn publish(&mut self, change: impl FnOnce(&mut GuestRecord)) -> GuestRecord {
        self.publish_also(change, |_, _| {})
    }

    /// The same with more in the transaction.
    pub(super) fn publish_also(
        &mut self,
        change: impl FnOnce(&mut GuestRecord),
        and: impl FnOnce(&GuestRecord, &mut Batch),
    ) -> GuestRecord {
        let (record, stored) = self.happened_with(change, and);
        if let Err(error) = stored {
            tracing::error!(error = %crate::chain::chain(&error), guest = %record.id, "a guest's record is not stored yet");
        }
        record
    }

    /// As [`Owner::publish`], together with the last word of a migration that ends with it, which is told the
    /// guest's state.
    pub(super) fn publish_with(&mut self, change: impl FnOnce(&mut GuestRecord), with: Option<Together>) {
        let Some(with) = with else {
            self.publish(change);
            return;
        };
        let record = self.turned(change);
        let migration = MigrationRecord { guest_state_after: Some(self.state), ..with.migration };
        let with = Together { migration, ..with };
        let ending = self.ending(Some(record.clone()), &with);
        endings::owe(&self.inner, &ending, self.showing(Some(record), Some(with.migration)));
        self.is_shown();
    }

    /// The next record in the state that the guest is in.
    pub(super) fn turned(&self, change: impl FnOnce(&mut GuestRecord)) -> GuestRecord {
        let mut record = self.entry.record();
        change(&mut record);
        record.state = self.state;
        record.generation += 1;
        record
    }

    /// What is stored of a turn of a hand-over, with the events of what is shown then.
    pub(super) fn ending(&self, record: Option<GuestRecord>, with: &Together) -> Ending {
        let before = self.entry.record();
        let guest = match &record {
            Some(record) => EventBody::guest(record, Some(&before), Change::Updated),
            None => EventBody::guest(&before, None, Change::Deleted),
        };
        let labels = before.spec.labels.clone();
        let migration = EventBody::migration(&with.migration, labels, Change::StateChanged);
        Ending {
            guest: self.entry.id,
            record,
            migration: with.migration.clone(),
            hand_over: with.hand_over.clone(),
            events: vec![guest, migration],
        }
    }

    /// Shows the records of guest (`None`: it is not here any more) and migration, which are stored with the
    /// events of that.
    pub(super) fn showing(
        &self,
        guest: Option<GuestRecord>,
        migration: Option<MigrationRecord>,
    ) -> impl FnOnce() + Clone + Send + 'static {
        let (inner, entry) = (Arc::clone(&self.inner), Arc::clone(&self.entry));
        move || {
            match guest {
                Some(guest) => entry.show(guest, &mut inner.guests_mut()),
                None => _ = inner.guests_mut().remove(&entry.id),
            }
            if let Some(migration) = migration
                && let Some(entry) = inner.migration_entry(migration.id)
            {
                entry.show_told(migration);
            }
        }
    }

    /// The next record, with everything that is to be stored together with it.
    pub(super) fn next(
        &self,
        state: GuestState,
        change: impl FnOnce(&mut GuestRecord),
    ) -> Result<(GuestRecord, Batch, Riding), StoreError> {
        let before = self.entry.record();
        let mut record = before.clone();
        change(&mut record);
        record.state = state;
        record.generation = before.generation + 1;
        let mut batch = Batch::new();
        batch.put(Kind::Guest, record.id, Some(&record.spec.name), &record)?;
        EventBody::guest(&record, Some(&before), Change::Updated).write(&mut batch);
        let riding = act::along(&Effect::Guest(&record), &mut batch);
        Ok((record, batch, riding))
    }

    pub(super) fn is_shown(&mut self) {
        self.shown = self.entry.readiness();
        self.inner.changed();
    }
}
