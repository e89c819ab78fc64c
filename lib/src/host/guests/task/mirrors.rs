//! The mirrors that a guest's owner keeps: making one, taking one's launch along, letting one go.
//!
//! Owns: how many mirrors a guest has, and of what kind. Must not know: what is sealed through one.

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::mirrors::entry::MirrorEntry;
use crate::host::{Ask, HostError, MirrorRecord, MirrorSpec, MirrorState, NotRun, PlanOptions, ResourceKind};

use crate::mirror::{Mirror, Placement};

use super::Owner;

impl Owner {
    /// Takes the mirror that an SEV-ES guest was launched with.
    pub(super) fn keep_mirror(&mut self, mirror: Mirror) {
        let record = self.entry.record();
        match self.inner.register_mirror(&record, &mirror, false, None, Placement::default()) {
            Ok(entry) => {
                self.mirrors.insert(entry.id, mirror);
            }
            // Of a fresh id: there is nothing else of it.
            Err(error) => tracing::error!(%error, "a mirror could not be registered"),
        }
    }

    /// Whether the guest's mirror was made with it, and no other can be.
    pub(super) fn has_launch_mirror(&self) -> bool {
        self.inner.facts(&self.entry.record().spec.driver).sev.is_some_and(|s| s.es)
    }

    /// Makes the mirror that somebody asks for, or says what it would be.
    pub(super) fn ask_for_mirror(&mut self, spec: &MirrorSpec, ask: &Ask) -> Result<MirrorRecord, HostError> {
        if !ask.dry_run {
            return self.create_mirror(spec, false, ask.id).map(|entry| entry.record());
        }
        self.may_have_mirror(spec, false)?;
        let record = self.entry.record();
        let image = self.inner.helper_image(&record.spec.driver, spec.options.helper_image.as_deref())?;
        self.inner.check_driver(&record.spec.driver)?;
        let options =
            PlanOptions { helper_image: spec.options.helper_image.clone(), ..PlanOptions::default() };
        let plan = self.inner.plan(&self.entry, spec.strategy, spec.workers, &options)?;
        Ok(MirrorRecord {
            id: ask.id.unwrap_or_else(Uuid::now_v7),
            guest: record.id,
            strategy: spec.strategy,
            state: MirrorState::Creating,
            generation: 1,
            plan: Arc::new(plan),
            workers: Vec::new(),
            placement: spec.options.placement.clone(),
            helper_measurement: image.measurement(),
            error: None,
            created_at: Timestamp::now(),
            ready_after_us: 0,
        })
    }

    /// Whether the guest can have a mirror of this strategy now, besides those that it has.
    pub(super) fn may_have_mirror(&self, spec: &MirrorSpec, transient: bool) -> Result<(), HostError> {
        let record = self.entry.record();
        let standing = self.standing(&record);
        // A transient one is made for the migration that has the guest.
        if !transient {
            standing.is_free()?;
        }
        if self.has_launch_mirror() {
            return Err(HostError::MirrorAtLaunch);
        }
        // One in each place: a helper's memory is one block, and two mirrors would run over each other in it.
        let private = spec.strategy.has_private_helper();
        if let Some((other, _)) = self.mirrors.iter().find(|(_, m)| m.is_private() == private) {
            return Err(HostError::InUse { kind: ResourceKind::Guest, user: format!("mirror {other}") });
        }
        standing.is_live()
    }

    pub(super) fn create_mirror(
        &mut self,
        spec: &MirrorSpec,
        transient: bool,
        id: Option<Uuid>,
    ) -> Result<Arc<MirrorEntry>, HostError> {
        self.may_have_mirror(spec, transient)?;
        self.end_audit(NotRun::MirrorNeeded);
        let machine = self.machine.as_ref();
        let machine = machine.ok_or(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: self.state.name(),
            allowed: &["running", "paused"],
        })?;
        let record = self.entry.record();
        let options = &spec.options;
        let image = self.inner.helper_image(&record.spec.driver, options.helper_image.as_deref())?;
        let mirror =
            self.inner.make_mirror(&record, machine.as_ref(), spec.strategy, spec.workers, &image)?;
        mirror.place(&options.placement).map_err(crate::host::mirrors::entry::placement_error)?;
        let entry = self.inner.register_mirror(&record, &mirror, transient, id, options.placement.clone())?;
        self.mirrors.insert(entry.id, mirror);
        Ok(entry)
    }

    pub(super) fn delete_mirror(&mut self, id: Uuid, ask: &Ask) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        let record = self.inner.mirror_entry(id).ok_or_else(missing)?.record();
        ask.check(ResourceKind::Mirror, record.generation)?;
        if let Some(migration) = self.lent.filter(|_| self.mirrors.contains_key(&id)) {
            return Err(HostError::InUse {
                kind: ResourceKind::Mirror,
                user: format!("migration {migration}"),
            });
        }
        if self.mirrors.contains_key(&id) && self.has_launch_mirror() {
            return Err(HostError::MirrorAtLaunch);
        }
        match (self.mirrors.contains_key(&id), self.lent) {
            (true, _) if ask.dry_run => Ok(record),
            (true, _) => {
                self.mirrors.remove(&id);
                self.batches.remove(&id);
                self.inner.forget_mirror(id);
                Ok(record)
            }
            (false, Some(migration)) => {
                Err(HostError::InUse { kind: ResourceKind::Mirror, user: format!("migration {migration}") })
            }
            (false, None) => Err(missing()),
        }
    }

    /// A mirror that is here, and not with a migration.
    pub(super) fn own_mirror(&self, id: Uuid, ask: &Ask) -> Result<&Mirror, HostError> {
        if let Some(entry) = self.inner.mirror_entry(id) {
            if let Some(migration) = self.lent {
                return Err(HostError::GuestMigrating { migration });
            }
            ask.check(ResourceKind::Mirror, entry.record().generation)?;
            if entry.record().state == MirrorState::Failed {
                let allowed = &["ready", "busy"];
                return Err(HostError::WrongState {
                    kind: ResourceKind::Mirror.into(),
                    current: "failed",
                    allowed,
                });
            }
        }
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        self.mirrors.get(&id).ok_or_else(missing)
    }
}
