//! Mirrors of a host's guests: what is asked of one.
//!
//! Owns: plans, making, placing and removing mirrors; in its files what is sealed and opened through them.
//! Must not know: HTTP; how a helper works.

pub(super) mod batches;
pub(super) mod entry;
pub(super) mod types;

use uuid::Uuid;

use super::events::Change;
use super::guests::command::Command;
use super::{
    Expected, GuestRecord, GuestState, Host, HostError, MirrorOptions, MirrorRecord, MirrorSpec, MirrorState,
    PlanOptions, validate,
};
use crate::address_space::{MirrorPlan, Strategy};
use crate::mirror::Placement;

impl Host {
    /// Plans an address space; changes nothing.
    ///
    /// # Errors
    /// Every refusal.
    pub fn plan(
        &self,
        key: &str,
        strategy: Strategy,
        workers: u32,
        options: &PlanOptions,
    ) -> Result<MirrorPlan, HostError> {
        let guest = self.inner.find_guest(key)?;
        validate::mirror(&MirrorSpec {
            guest: String::new(),
            strategy,
            workers,
            options: MirrorOptions::default(),
        })?;
        self.inner.plan(&guest, strategy, workers, options)
    }

    /// The only mirror that a guest can have, if it was launched with one (SEV-ES): its strategy and workers,
    /// as it is now or as the guest's definition wants it.
    pub fn launch_mirror(&self, key: &str) -> Option<(Strategy, u32)> {
        let guest = self.inner.find_guest(key).ok()?.record();
        let sev = self.inner.facts(&guest.spec.driver).sev.filter(|sev| sev.es)?;
        let there = self.inner.mirror_entries().into_iter().map(|m| m.record()).find(|m| m.guest == guest.id);
        let there = there.map(|m| (m.strategy, m.workers.len() as u32));
        Some(there.unwrap_or((sev.mirror.strategy, sev.mirror.workers)))
    }

    /// Makes a mirror of a running or paused guest; returns when the helper is ready.
    ///
    /// # Errors
    /// A guest that does not run, has a mirror already or is migrating; refusals; KVM.
    pub async fn create_mirror(&self, spec: MirrorSpec) -> Result<MirrorRecord, HostError> {
        self.create_mirror_as(None, spec).await
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
        let private = |s: Strategy| s.has_private_helper();
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

    /// One mirror.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn mirror(&self, id: Uuid) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        self.inner.mirror_entry(id).map(|m| m.record()).ok_or_else(missing)
    }

    /// All mirrors by creation.
    pub fn mirrors(&self) -> Vec<MirrorRecord> {
        let mut list: Vec<_> = self.inner.mirror_entries().iter().map(|m| m.record()).collect();
        list.sort_by_key(|r| r.id);
        list
    }

    /// Removes a mirror that no migration has.
    ///
    /// # Errors
    /// No such mirror, or in use.
    pub async fn delete_mirror(&self, id: Uuid) -> Result<(), HostError> {
        self.delete_mirror_at(id, Expected::any()).await
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
}
