//! What an administrator sets of this host: labels, maintenance, migration slots. Kept in the database.

use std::sync::Arc;

use super::act::{self, Effect};
use super::events::{Change, EventBody, ResourceKind};
use super::{Ask, FieldError, Host, HostError, Labels, bounds, validate};
use crate::memory::Secret;
use crate::store::Batch;
use crate::sync::{Locked, Shared};
use crate::waiting;

/// Key of the document.
pub(in crate::host) const KEY: &str = "host_settings";

/// What can be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSettings {
    /// Free labels.
    pub labels: Labels,
    /// No guest is defined, started or let in; those that are here go on and may leave.
    pub maintenance: bool,
    /// Outgoing migrations that run at once, 1 to 16; more wait as `queued`.
    pub migration_slots: u32,
    /// Goes up with every change.
    pub generation: u64,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self { labels: Labels::new(), maintenance: false, migration_slots: 4, generation: 1 }
    }
}

impl Host {
    /// What is set.
    pub fn settings(&self) -> HostSettings {
        self.inner.settings.to_read().clone()
    }

    /// Sets something else.
    ///
    /// # Errors
    /// Values that cannot be, [`HostError::GenerationMismatch`], storage.
    pub fn change_settings(
        &self,
        change: impl FnOnce(&mut HostSettings),
        ask: &Ask,
    ) -> Result<HostSettings, HostError> {
        waiting::with_thread(|| {
            let _alone = self.inner.changing_settings.locked();
            self.change_settings_alone(change, ask)
        })
    }

    fn change_settings_alone(
        &self,
        change: impl FnOnce(&mut HostSettings),
        ask: &Ask,
    ) -> Result<HostSettings, HostError> {
        let settings = self.settings();
        let mut next = settings.clone();
        change(&mut next);
        next.generation = settings.generation + 1;
        validate::labels(&next.labels)?;
        if !bounds::MIGRATION_SLOTS.contains(&u64::from(next.migration_slots)) {
            let (low, high) = (bounds::MIGRATION_SLOTS.start(), bounds::MIGRATION_SLOTS.end());
            let detail = format!("{} is not between {low} and {high}", next.migration_slots);
            return Err(HostError::Invalid(vec![FieldError::new(
                "/migration_slots",
                "out_of_range",
                detail,
            )]));
        }
        ask.check(ResourceKind::Host, settings.generation)?;
        if ask.dry_run {
            return Ok(next);
        }
        let failed = |e| HostError::storage("storing the settings", e);
        let mut batch = Batch::new();
        batch.meta_put(KEY, &next).map_err(failed)?;
        let mut body = EventBody::new(ResourceKind::Host, Change::Updated, self.inner.id, next.generation);
        body.name = Some(self.inner.name.clone());
        body.labels = next.labels.clone();
        body.data.insert("maintenance".into(), next.maintenance.into());
        body.write(&mut batch);
        let riding = act::along(&Effect::Settings(&next), &mut batch);
        let (inner, shown) = (std::sync::Arc::clone(&self.inner), next.clone());
        let show = move || {
            *inner.settings.to_write() = shown;
            riding.arrived();
        };
        self.inner.ledger.commit_blocking(batch, show).map_err(failed)?;
        self.resize_slots(settings.migration_slots, next.migration_slots);
        self.inner.changed();
        Ok(next)
    }

    /// A secret of this host's, kept with the database: for marks that its API hands out and takes back.
    pub fn page_secret(&self) -> Secret<32> {
        self.inner.page_secret.clone()
    }

    /// Fewer slots take effect as migrations end: none is called off.
    fn resize_slots(&self, before: u32, after: u32) {
        let slots = Arc::clone(&self.inner.outgoing_slots);
        if after > before {
            slots.add_permits((after - before) as usize);
        } else if before > after {
            self.inner.runtime.spawn(async move {
                if let Ok(permits) = slots.acquire_many_owned(before - after).await {
                    permits.forget();
                }
            });
        }
    }

    pub(super) fn check_not_in_maintenance(&self) -> Result<(), HostError> {
        if self.inner.in_maintenance() { Err(HostError::Maintenance) } else { Ok(()) }
    }
}

impl super::inner::Inner {
    pub(super) fn in_maintenance(&self) -> bool {
        self.settings.to_read().maintenance
    }

    /// What an earlier daemon was told.
    pub(super) fn load_settings(&self) -> Result<(), crate::store::StoreError> {
        if let Some(stored) = self.store.meta_get::<HostSettings>(KEY)? {
            let default = HostSettings::default().migration_slots;
            let (more, fewer) = (
                stored.migration_slots.saturating_sub(default),
                default.saturating_sub(stored.migration_slots),
            );
            self.outgoing_slots.add_permits(more as usize);
            self.outgoing_slots.forget_permits(fewer as usize);
            *self.settings.to_write() = stored;
        }
        Ok(())
    }
}
