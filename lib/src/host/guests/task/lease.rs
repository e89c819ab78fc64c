//! Machine and mirror on loan to a migration: taken once, given back once, or another host's from then on.
//!
//! Owns: who has the machine, and what is stored of each turn of a hand-over. Must not know: how pages move.

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::act::Act;
use crate::host::events::{Change, EventBody};
use crate::host::guests::command::{GiveBack, Lease, Reply, Vanish};
use crate::host::migrations::audits;
use crate::host::migrations::endings::{self, Ending};
use crate::host::migrations::hand_over::Together;
use crate::host::{
    FieldError, GuestRecord, GuestState, HostError, MirrorChoice, MirrorOptions, MirrorSpec, MirrorState,
    NotRun, ResourceKind,
};

use crate::guest::Machine;
use crate::guest::lifecycle::Event;
use crate::mirror::Mirror;
use crate::store::{Batch, Kind, StoreError};

use super::Owner;

impl Owner {
    /// Whether a migration may have the guest with this mirror, as it is now.
    pub(super) fn can_lend(&self, choice: &MirrorChoice, streams: u16) -> Result<(), HostError> {
        self.standing(&self.entry.record()).is_live()?;
        if let Some(found) = self.audited_mirror(choice) {
            return found;
        }
        let chosen = self.chosen_mirror(choice)?;
        // Nothing else may look into a guest that leaves.
        if let Some(other) = self.mirrors.keys().find(|id| Some(**id) != chosen) {
            return Err(HostError::InUse { kind: ResourceKind::Guest, user: format!("mirror {other}") });
        }
        let Some((id, mirror)) = chosen.and_then(|id| Some((id, self.mirrors.get(&id)?))) else {
            return Ok(());
        };
        if let Some(session) = self.batches.get(&id) {
            let user = format!("the export or import {}", session.import());
            return Err(HostError::InUse { kind: ResourceKind::Mirror, user });
        }
        if mirror.worker_count() < u32::from(streams) {
            let there = mirror.worker_count();
            let detail =
                format!("{streams} streams need as many workers, and the guest's mirror has {there}");
            return Err(HostError::Invalid(vec![FieldError::new("/streams", "out_of_range", detail)]));
        }
        Ok(())
    }

    /// The mirror that is there for a choice; `None`: one is to be made.
    pub(super) fn chosen_mirror(&self, choice: &MirrorChoice) -> Result<Option<Uuid>, HostError> {
        match choice {
            MirrorChoice::Existing(id) if self.mirrors.contains_key(id) => Ok(Some(*id)),
            MirrorChoice::Existing(id) => Err(HostError::missing(ResourceKind::Mirror, id.to_string())),
            MirrorChoice::Template(strategy) if self.has_launch_mirror() => {
                let made = self.mirrors.iter().find(|(_, m)| m.plan().strategy == *strategy);
                Ok(Some(*made.ok_or(HostError::MirrorAtLaunch)?.0))
            }
            MirrorChoice::Template(_) => Ok(None),
        }
    }

    /// Looks and takes in one step: of several migrations that ask at once one gets the guest.
    pub(super) fn claim(
        &mut self,
        migration: Uuid,
        choice: &MirrorChoice,
        streams: u16,
        dry_run: bool,
    ) -> Result<(), HostError> {
        let record = self.entry.record();
        self.standing(&record).is_free()?;
        if record.unconfirmed {
            return Err(self.entry.unconfirmed());
        }
        self.can_lend(choice, streams)?;
        if !dry_run {
            // A guest that goes on at once does not wait for what is known of how it came.
            self.end_audit(NotRun::MirrorNeeded);
            // What was asked for is the migration: its own record is the one that says it is done.
            Act::sync_scope(None, || self.store(self.state, |r| r.migration = Some(migration)))?;
            self.lent = Some(migration);
        }
        Ok(())
    }

    pub(super) fn release(&mut self, migration: Uuid) {
        if self.lent == Some(migration) {
            self.lent = None;
            self.publish(|r| r.migration = None);
        }
    }

    pub(super) fn lend(
        &mut self,
        migration: Uuid,
        choice: &MirrorChoice,
        template: MirrorOptions,
        streams: u16,
    ) -> Result<Lease, HostError> {
        if let Some(migration) = self.lent.filter(|other| *other != migration) {
            return Err(HostError::GuestMigrating { migration });
        }
        // Again: the guest may have ended by itself since the claim.
        self.can_lend(choice, streams)?;
        let was_running = self.state == GuestState::Running;
        let (mirror_id, transient) = match (choice, self.chosen_mirror(choice)?) {
            (_, Some(id)) => (id, false),
            (MirrorChoice::Existing(id), None) => {
                return Err(HostError::missing(ResourceKind::Mirror, id.to_string()));
            }
            (MirrorChoice::Template(strategy), None) => {
                let spec = MirrorSpec {
                    guest: String::new(),
                    strategy: *strategy,
                    workers: u32::from(streams),
                    options: template,
                };
                (self.create_mirror(&spec, true, None)?.id, true)
            }
        };
        let missing = || HostError::missing(ResourceKind::Mirror, mirror_id.to_string());
        let mirror = self.mirrors.remove(&mirror_id).ok_or_else(missing)?;
        let Some(machine) = self.machine.take() else { return Err(missing()) };
        self.lent = Some(migration);
        self.away = Some((migration, machine.end_watch()));
        self.inner.set_mirror_state(mirror_id, MirrorState::Busy, None);
        let record = self.publish(|r| r.migration = Some(migration));
        Ok(Lease { machine, mirror, mirror_id, transient, was_running, record })
    }

    /// Shown at once and not stored: every microsecond counts, and a crash finds the guest stopped either
    /// way.
    pub(super) fn held(&mut self, event: Event, to: GuestState) {
        if self.away.is_none() || self.state == to {
            return;
        }
        self.step(event);
        let (before, record) = (self.entry.record(), self.turned(|_| {}));
        self.entry.show(record.clone(), &mut self.inner.guests_mut());
        // Who reads the guest because of the event finds it so.
        self.inner.events.guest(&record, Some(&before), Change::Updated);
        self.is_shown();
    }

    /// From here on a crash leaves guest and migration in doubt. Shown is what is so, as long as somebody
    /// knows: held. See docs/publishing.md.
    pub(super) fn start_sent(&self, with: &Together) -> Result<(), HostError> {
        let record = GuestRecord { state: GuestState::InDoubt, ..self.turned(|_| {}) };
        // What a crash leaves is told by whoever finds it.
        let ending = Ending { events: Vec::new(), ..self.ending(Some(record), with) };
        let shown = self.showing(Some(self.turned(|_| {})), None);
        let stored = endings::store(&self.inner, &ending, None, shown);
        stored.map_err(|e| HostError::storage("storing START", e))
    }

    /// A guest that arrives is this host's: stored as it will be, shown when it is so (docs/publishing.md).
    pub(super) fn commit(&self, paused: bool, with: &Together) -> Result<(), HostError> {
        let record = self.turned(|r| {
            r.migration = None;
            r.audit = audits::of_guest(&with.migration);
            r.started_at = Some(Timestamp::now());
        });
        let state = if paused { GuestState::Paused } else { GuestState::Running };
        let record = GuestRecord { state, ..record };
        let ending = Ending { events: Vec::new(), ..self.ending(Some(record), with) };
        // Whether it lives is the guest's business from here on, not the import's.
        let stored = endings::store(&self.inner, &ending, with.space.as_ref(), || {});
        stored.map_err(|e| HostError::storage("storing COMMIT", e))
    }

    pub(super) fn give_back(&mut self, back: GiveBack) {
        let GiveBack { machine, mirror, mirror_id, keep_mirror, running, with, done } = back;
        if self.state == GuestState::InDoubt {
            self.step(Event::HandedBack);
        }
        let end = machine.ended();
        self.take_back(machine, mirror, mirror_id, keep_mirror);
        match end {
            Some(end) => self.ended_with(end, Some(with)),
            None => {
                self.step(if running { Event::Resume } else { Event::Pause });
                self.publish_with(|r| r.migration = None, Some(with));
            }
        }
        let _ = done.send(self.state);
    }

    /// The guest is another host's, or (`peer` is `None`) nobody's. True when it is not defined here any
    /// more.
    pub(super) fn handed_over(
        &mut self,
        peer: Option<String>,
        delete: bool,
        with: &Together,
        reply: Reply<()>,
    ) -> bool {
        let delete = delete && peer.is_some();
        let record = self.turned(|r| {
            r.migration = None;
            r.unconfirmed &= peer.is_none();
            r.moved_to = peer;
            r.audit = audits::of_guest(&with.migration);
        });
        let record = (!delete).then_some(GuestRecord { state: GuestState::Stopped, ..record });
        let ending = self.ending(record.clone(), with);
        let shown = self.showing(record, Some(with.migration.clone()));
        if let Err(error) = endings::store(&self.inner, &ending, with.space.as_ref(), shown) {
            let _ = reply.send(Err(HostError::storage("storing the end of a hand-over", error)));
            return false;
        }
        self.lent = None;
        self.away = None;
        self.labels_sent = false;
        self.state = GuestState::Stopped;
        self.is_shown();
        let _ = reply.send(Ok(()));
        delete
    }

    /// True when the guest is gone.
    pub(super) fn vanish(&mut self, vanish: Vanish) -> bool {
        let Vanish { replaced, with, force, reply } = vanish;
        let before = self.entry.record();
        let mut events = vec![EventBody::guest(&before, None, Change::Deleted)];
        events.extend(replaced.as_ref().map(|old| EventBody::guest(old, None, Change::Created)));
        let shown = self.showing(None, with.as_ref().map(|w| w.migration.clone()));
        let stored = match &with {
            Some(with) => {
                let mut ending = self.ending(replaced, with);
                // The last is the migration's.
                events.extend(ending.events.pop());
                let ending = Ending { events, ..ending };
                let stored = endings::store(&self.inner, &ending, with.space.as_ref(), shown.clone());
                if stored.is_err() && force {
                    // It has happened. What was written into the space, if anything was, is older than what
                    // is owed by the time that the guest comes again.
                    endings::owe(&self.inner, &ending, shown);
                }
                stored
            }
            None => {
                let stored = self.was_never_here(replaced.as_ref(), &before, &events, shown.clone());
                if stored.is_err() && force {
                    shown();
                }
                stored
            }
        };
        let gone = stored.is_ok() || force;
        if gone {
            self.away = None;
            self.inner.changed();
        }
        let _ = reply.send(stored.map_err(|e| HostError::storage("storing an import's end", e)));
        gone
    }

    /// An import that had not come so far as to have a record.
    pub(super) fn was_never_here(
        &self,
        replaced: Option<&GuestRecord>,
        before: &GuestRecord,
        events: &[EventBody],
        then: impl FnOnce() + Send + 'static,
    ) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        match replaced {
            Some(old) => _ = batch.put(Kind::Guest, old.id, Some(&old.spec.name), old)?,
            None => _ = batch.delete(Kind::Guest, before.id),
        }
        if let Some(session) = before.migration {
            batch.delete(Kind::HandOver, session);
        }
        events.iter().for_each(|event| event.write(&mut batch));
        self.inner.ledger.commit_blocking(batch, then)
    }

    pub(super) fn take_back(
        &mut self,
        machine: Box<dyn Machine>,
        mirror: Mirror,
        mirror_id: Uuid,
        keep_mirror: bool,
    ) {
        self.lent = None;
        self.away = None;
        self.labels_sent = false;
        self.machine = Some(machine);
        if keep_mirror {
            self.mirrors.insert(mirror_id, mirror);
            self.inner.set_mirror_state(mirror_id, MirrorState::Ready, None);
        } else {
            drop(mirror);
            self.inner.forget_mirror(mirror_id);
        }
    }
}
