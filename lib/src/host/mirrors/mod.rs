//! Mirrors of a host's guests: what is asked of one.
//!
//! Owns: plans, making, placing and removing mirrors; in its files what is sealed and opened through them.
//! Must not know: HTTP; how a helper works.

pub(super) mod batches;
pub(super) mod entry;
pub(super) mod types;

use crate::host::ResourceKind;
use std::sync::Arc;

use uuid::Uuid;

use self::entry::MirrorEntry;
use super::events::Change;
use super::guests::command::Command;
use super::lists::{self, Page, PageRequest, Place, Selector};
use super::registry::Facet;
use super::{
    Ask, Host, HostError, MirrorOptions, MirrorRecord, MirrorSpec, MirrorState, PlanOptions, validate,
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
        let there = self.inner.mirrors().having(&Facet::Guest(guest.id)).next().map(|m| m.record());
        let there = there.map(|m| (m.strategy, m.workers.len() as u32));
        Some(there.unwrap_or((sev.mirror.strategy, sev.mirror.workers)))
    }

    /// Makes a mirror of a running or paused guest; returns when the helper is ready.
    ///
    /// # Errors
    /// A guest that does not run, has a mirror already or is migrating; an id that is taken; refusals of the
    /// planner; a host without what it takes.
    pub async fn create_mirror(&self, spec: MirrorSpec, ask: &Ask) -> Result<MirrorRecord, HostError> {
        self.inner.check_running()?;
        validate::mirror(&spec)?;
        if ask.id.is_some_and(|id| self.inner.mirror_entry(id).is_some()) {
            return Err(HostError::IdTaken { kind: ResourceKind::Mirror });
        }
        let guest = self.inner.find_guest(&spec.guest)?;
        guest.ask(|reply| Command::CreateMirror(spec, ask.clone(), reply)).await
    }

    /// One mirror.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn mirror(&self, id: Uuid) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        self.inner.mirror_entry(id).map(|m| m.record()).ok_or_else(missing)
    }

    /// All mirrors by creation.
    pub fn mirrors(&self) -> Vec<MirrorRecord> {
        self.inner.mirror_entries().iter().map(|m| m.record()).collect()
    }

    /// A page of the mirrors of `guest` (by id or name; `None`: of any) that are in one of `states` (empty:
    /// in any) and whose guests have `labels`.
    pub fn mirror_page(
        &self,
        asked: &PageRequest,
        guest: Option<&str>,
        states: &[MirrorState],
        labels: &[Selector],
    ) -> Page<MirrorRecord> {
        // A guest that is not there has no mirrors.
        let guest = guest.map(|key| self.inner.find_guest(key).map_or(Uuid::nil(), |g| g.id));
        let mut groups: Vec<Vec<Facet>> = guest.iter().map(|id| vec![Facet::Guest(*id)]).collect();
        groups.extend(labels.iter().filter_map(|l| self.inner.of_guests_with(l)));
        let look = |entry: Arc<MirrorEntry>| {
            let is_one = guest.is_none_or(|id| entry.guest == id)
                && (labels.is_empty() || Selector::all_hold(labels, &self.inner.labels_of(entry.guest)));
            let record = is_one.then(|| entry.record())?;
            Some(record).filter(|r| states.is_empty() || states.contains(&r.state))
        };
        let chunk =
            |after: Option<&Place>, most| self.inner.mirrors().chunk(asked.order, after, &groups, most);
        lists::page(asked, chunk, look)
    }

    /// Removes a mirror that no migration has; gives it as it was.
    ///
    /// # Errors
    /// No such mirror, in use, [`HostError::GenerationMismatch`].
    pub async fn delete_mirror(&self, id: Uuid, ask: &Ask) -> Result<MirrorRecord, HostError> {
        let record = self.mirror(id)?;
        let guest = self.inner.find_guest(&record.guest.to_string())?;
        guest.ask(|reply| Command::DeleteMirror(id, ask.clone(), reply)).await
    }

    /// Changes where a mirror's vCPU threads run and how they are scheduled: `change` gets what holds now,
    /// and nobody else changes it meanwhile.
    ///
    /// # Errors No such mirror or processor, [`HostError::GenerationMismatch`], the kernel's refusal, what
    /// `change` says.
    pub fn place_mirror(
        &self,
        id: Uuid,
        change: impl Fn(&Placement) -> Result<Placement, HostError>,
        ask: &Ask,
    ) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        let entry = self.inner.mirror_entry(id).ok_or_else(missing)?;
        let record = entry.record();
        if record.state == MirrorState::Failed {
            let allowed = &["creating", "ready", "busy"];
            return Err(HostError::WrongState {
                kind: ResourceKind::Mirror.into(),
                current: "failed",
                allowed,
            });
        }
        let checked = |now: &Placement| {
            let placement = change(now)?;
            let errors = validate::parts_of_placement("/placement", &placement);
            if errors.is_empty() { Ok(placement) } else { Err(HostError::Invalid(errors)) }
        };
        if ask.dry_run {
            let placement = checked(&record.placement)?;
            ask.check(ResourceKind::Mirror, record.generation)?;
            return Ok(MirrorRecord { placement, ..record });
        }
        let record = entry.place(checked, &ask.expected)?;
        self.inner.tell_mirror(&entry, Change::Updated);
        self.inner.changed();
        Ok(record)
    }
}
