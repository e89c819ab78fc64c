//! Guests of a host: what is asked of one by id or name.
//!
//! Owns: definitions, actions, labels, the end of a definition; in its files the owner of each guest and its
//! RAM. Must not know: HTTP; how a machine runs.

pub(super) mod command;
pub(super) mod decide;
pub(super) mod entry;
pub(super) mod ram;
pub(super) mod task;
pub(super) mod types;

use crate::host::ResourceKind;
use std::sync::Arc;

use uuid::Uuid;

use self::command::Command;
use self::entry::GuestEntry;
use super::act::{self, Effect};
use super::events::{Change, EventBody};
use super::lists::{self, Page, PageRequest, Place, Selector};
use super::registry::Facet;
use super::{
    Ask, ConsoleChunk, GuestAction, GuestRecord, GuestSpec, GuestState, GuestStats, Host, HostError, Labels,
    validate,
};
use crate::addr::PAGE_SIZE;
use crate::store::{Batch, Kind, StoreError};

impl Host {
    /// Defines a guest.
    ///
    /// # Errors
    /// Values that cannot be, a name or an id that is taken, files that cannot be read, maintenance, storage.
    pub async fn define_guest(&self, spec: GuestSpec, ask: &Ask) -> Result<GuestRecord, HostError> {
        let record = self.new_guest(ask.id, spec)?;
        if ask.dry_run {
            return Ok(record);
        }
        // Nobody else gets the name or the id, and nobody sees the guest, until it is on disk.
        let claim = self.inner.claim_guest(record.id, &record.spec.name)?;
        let failed = |e| match e {
            StoreError::NameTaken { .. } => {
                HostError::NameTaken { kind: ResourceKind::Guest, name: record.spec.name.clone() }
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

    fn new_guest(&self, id: Option<Uuid>, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        self.inner.check_running()?;
        self.check_not_in_maintenance()?;
        let bare = match validate::guest(&self.inner.drivers, &spec) {
            Err(HostError::Invalid(mut errors)) => {
                // All at once; but what of a file is too large is known where the guest's memory is.
                let has_memory = !errors.iter().any(|e| e.pointer.starts_with("/memory"));
                if let (true, Err(HostError::Invalid(more))) = (has_memory, self.inner.boot_facts(&spec)) {
                    errors.extend(more);
                }
                return Err(HostError::Invalid(errors));
            }
            bare => bare?,
        };
        let boot = self.inner.boot_facts(&spec)?;
        let layout = self.inner.layout_for(&spec.driver, &bare)?;
        ram::check_starts_in(&self.inner, &spec, &layout)?;
        self.inner.check_guest_free(id, &spec.name)?;
        let protection = self.inner.facts(&spec.driver).protection;
        Ok(GuestRecord::defined(id.unwrap_or_else(Uuid::now_v7), spec, layout, protection, boot))
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
        self.inner.guests().values().map(|g| g.shown()).collect()
    }

    /// How many guests are in each state; those that no guest is in are left out.
    pub fn guests_by_state(&self) -> Vec<(GuestState, usize)> {
        let guests = self.inner.guests();
        let count = |state: &GuestState| (*state, guests.count(&Facet::State(state.name())));
        GuestState::ALL.iter().map(count).filter(|(_, count)| *count > 0).collect()
    }

    /// A page of the guests that are in one of `states` (empty: in any) and have `labels`.
    pub fn guest_page(
        &self,
        asked: &PageRequest,
        states: &[GuestState],
        labels: &[Selector],
    ) -> Page<Arc<GuestRecord>> {
        let mut groups: Vec<Vec<Facet>> = labels.iter().map(|l| vec![l.into()]).collect();
        if !states.is_empty() {
            groups.push(states.iter().map(|s| Facet::State(s.name())).collect());
        }
        let is_one = |g: &Arc<GuestRecord>| {
            (states.is_empty() || states.contains(&g.state)) && Selector::all_hold(labels, &g.spec.labels)
        };
        let chunk =
            |after: Option<&Place>, most| self.inner.guests().chunk(asked.order, after, &groups, most);
        lists::page(asked, chunk, |entry: Arc<GuestEntry>| Some(entry.shown()).filter(is_one))
    }

    /// Asks for an action; returns as soon as it is accepted (the state says how it goes on). Idempotent in
    /// effect: starting a running guest returns it as it is.
    ///
    /// # Errors
    /// A state in which the action makes no sense, a migration that has the guest, a host without what the
    /// guest's driver needs, [`HostError::GenerationMismatch`], [`HostError::Maintenance`].
    pub async fn guest_action(
        &self,
        key: &str,
        action: GuestAction,
        ask: &Ask,
    ) -> Result<GuestRecord, HostError> {
        let guest = self.inner.find_guest(key)?;
        self.check_action(&guest.record(), action)?;
        guest.ask(|reply| Command::Act(action, ask.clone(), reply)).await
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

    /// Undefines a stopped or failed guest; gives it as it was.
    ///
    /// # Errors
    /// Another state, a migration that has it, [`HostError::GenerationMismatch`], storage.
    pub async fn delete_guest(&self, key: &str, ask: &Ask) -> Result<GuestRecord, HostError> {
        self.inner.find_guest(key)?.ask(|reply| Command::Undefine(ask.clone(), reply)).await
    }

    /// Gives a guest other labels: those that `change` makes of what there is at that very moment, so that
    /// changes that come together all count. They go along with a migration, also when they change while it
    /// runs, up to the moment at which the guest's state leaves with them.
    ///
    /// # Errors
    /// No such guest, labels that cannot be, [`HostError::GenerationMismatch`], [`HostError::GuestMigrating`]
    /// between that moment and the migration's end.
    pub async fn change_labels(
        &self,
        key: &str,
        change: impl FnOnce(&Labels) -> Labels + Send + 'static,
        ask: &Ask,
    ) -> Result<GuestRecord, HostError> {
        let guest = self.inner.find_guest(key)?;
        let change = Box::new(change);
        guest.ask(|reply| Command::Relabel { change, ask: ask.clone(), reply }).await
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
