//! A guest's life as its owner leads it: starting, holding, stopping, ending by itself; its labels and RAM.
//!
//! Owns: in which order a turn is stored, made and shown. Must not know: what a migration does with a machine
//! that it has.

use crate::codes::Capability;
use jiff::Timestamp;

use crate::host::guests::command::{LabelChange, Reply};
use crate::host::guests::decide::{Course, no_block, wrong_state};
use crate::host::machines::Made;
use crate::host::migrations::audits;
use crate::host::migrations::hand_over::Together;
use crate::host::validate;
use crate::host::{Ask, Fault, GuestAction, GuestRecord, GuestState, HostError, NotRun, ResourceKind};

use crate::addr::Gpa;
use crate::address_space::{BlockSpec, GuestLayout};
use crate::guest::lifecycle::Event;
use crate::guest::{Machine, MachineEnd, MachineError, MachineNews, PlugError};

use super::Owner;

/// How long a guest that starts may take to say that it can be migrated.
const FIRST_WORD: std::time::Duration = std::time::Duration::from_secs(3);

impl Owner {
    pub(super) fn relabel(&mut self, change: LabelChange, ask: &Ask) -> Result<GuestRecord, HostError> {
        let record = self.entry.record();
        self.standing(&record).relabel(self.labels_sent)?;
        self.check(ask)?;
        let labels = change(&record.spec.labels);
        validate::labels(&labels)?;
        if ask.dry_run {
            let spec = crate::host::GuestSpec { labels, ..record.spec };
            return Ok(GuestRecord { spec, ..record });
        }
        self.store(self.state, |r| r.spec.labels = labels)
    }

    pub(super) fn act(&mut self, action: GuestAction, ask: &Ask, reply: Reply<GuestRecord>) {
        let record = self.entry.record();
        let unconfirmed = || self.entry.unconfirmed();
        let course = self.check(ask).and_then(|()| self.standing(&record).act(action, unconfirmed));
        let answer = match (course, action) {
            (Err(refused), _) => Err(refused),
            (Ok(course), _) if ask.dry_run => self.would_act(record, course),
            (Ok(Course::Stays), _) => Ok(record),
            (Ok(Course::Confirm), _) => self.store(self.state, |r| r.unconfirmed = false),
            (Ok(Course::Turn { next, .. }), GuestAction::Start) => return self.start(next, reply),
            (Ok(Course::Turn { next, .. }), GuestAction::Stop) => return self.stop(next, reply),
            (
                Ok(Course::Turn { next, .. }),
                GuestAction::Pause | GuestAction::Resume | GuestAction::Confirm,
            ) => self.hold(action, next),
        };
        let _ = reply.send(answer);
    }

    /// The guest as an action would leave it.
    pub(super) fn would_act(&self, record: GuestRecord, course: Course) -> Result<GuestRecord, HostError> {
        match course {
            Course::Stays => Ok(record),
            Course::Confirm => Ok(GuestRecord { unconfirmed: false, ..record }),
            Course::Turn { next, goal } => {
                if next == GuestState::Starting {
                    self.inner.check_starts_in_its_ram(&record)?;
                    self.inner.has_memory_for(&record)?;
                }
                Ok(GuestRecord { state: goal, ..record })
            }
        }
    }

    pub(super) fn stop(&mut self, next: GuestState, reply: Reply<GuestRecord>) {
        let accepted = self.store(next, |_| {});
        let refused = accepted.is_err();
        let _ = reply.send(accepted);
        if refused {
            return;
        }
        self.drop_body();
        self.step(Event::Stopped);
        self.publish(|r| r.error = None);
    }

    /// Answers as soon as the start is accepted, which it is when there is memory for the guest; how it goes
    /// on is in the record.
    pub(super) fn start(&mut self, next: GuestState, reply: Reply<GuestRecord>) {
        let before = self.entry.record();
        let fits = self.inner.check_starts_in_its_ram(&before);
        let memory =
            fits.and_then(|()| self.inner.memory_for(&before.spec, &before.layout, before.boot.as_ref()));
        let memory = match memory {
            Ok(memory) => memory,
            Err(refused) => {
                let _ = reply.send(Err(refused));
                return;
            }
        };
        let record = match self.store(next, |r| (r.error, r.audit) = (None, None)) {
            Ok(record) => record,
            Err(refused) => {
                let _ = reply.send(Err(refused));
                return;
            }
        };
        let _ = reply.send(Ok(record.clone()));
        match self.inner.make_machine(&record, &self.entry, memory, None) {
            Ok(Made { mut machine, layout, settled, mirror }) => {
                if let Some(mirror) = mirror {
                    self.keep_mirror(mirror);
                }
                let resumed = machine.resume();
                if resumed.is_ok() && machine.announces_itself() {
                    // So that who sees it running sees it ready, too.
                    machine.migration_control().await_word(FIRST_WORD);
                }
                self.entry.attach(machine.as_ref());
                self.machine = Some(machine);
                match resumed {
                    Ok(()) => {
                        self.step(Event::Started);
                        self.publish(|r| {
                            r.layout = layout;
                            if let Some(settled) = settled {
                                r.spec.driver = settled;
                            }
                            r.started_at = Some(Timestamp::now());
                        });
                    }
                    Err(e) => self.broke(&crate::host::faults::machine_fault(&e)),
                }
            }
            Err(e) => {
                tracing::error!(guest = %record.id, error = %crate::chain::chain(&e), "a guest cannot be started");
                self.broke(&e.fault());
            }
        }
    }

    pub(super) fn add_block(&mut self, block: BlockSpec, ask: &Ask) -> Result<GuestRecord, HostError> {
        self.check(ask)?;
        let before = self.entry.record();
        self.standing(&before).is_free()?;
        let record = crate::host::guests::ram::with_block(&self.inner, &before, block)?;
        if ask.dry_run { Ok(record) } else { self.store(self.state, |r| *r = record) }
    }

    pub(super) fn replug(
        &mut self,
        block: &str,
        gpa: Option<Gpa>,
        ask: &Ask,
    ) -> Result<GuestLayout, HostError> {
        let record = self.entry.record();
        // A mirror's slots show what was plugged when it was made.
        let mirror = self.mirrors.keys().next().copied().filter(|_| !self.has_launch_mirror());
        self.standing(&record).replug(block, mirror)?;
        if ask.dry_run {
            return self.standing(&record).replugged(block, gpa);
        }
        let machine = self.machine.as_mut().ok_or(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: self.state.name(),
            allowed: &["running", "paused"],
        })?;
        let done = match gpa {
            Some(gpa) => machine.plug(block, gpa),
            None => machine.unplug(block),
        };
        done.map_err(|e| match e {
            MachineError::Plug(PlugError::NoBlock) => no_block(block),
            MachineError::Plug(e) => HostError::PlugRefused(e),
            MachineError::Unsupported { what } => {
                HostError::lacks(Capability::Plugging, format!("this driver cannot {what}"))
            }
            e => HostError::internal("plugging or unplugging a RAM block", e),
        })?;
        let layout = machine.ram().layout();
        let (record, stored) = self.happened(|r| r.layout = (*layout).clone());
        stored.map(|()| record.layout)
    }

    pub(super) fn hold(&mut self, action: GuestAction, next: GuestState) -> Result<GuestRecord, HostError> {
        let machine = self.machine.as_mut().ok_or_else(|| wrong_state(GuestState::Stopped, action))?;
        let pauses = action == GuestAction::Pause;
        let done = if pauses { machine.pause() } else { machine.resume() };
        done.map_err(|e| HostError::internal("holding or resuming the guest", e))?;
        // What held it is over.
        let refused = match self.store(next, |r| r.error = r.error.take().filter(|_| pauses)) {
            Ok(record) => return Ok(record),
            Err(refused) => refused,
        };
        // What cannot be stored is not made.
        let machine = self.machine.as_mut().ok_or_else(|| wrong_state(GuestState::Stopped, action))?;
        let undone = if pauses { machine.resume() } else { machine.pause() };
        if let Err(error) = undone {
            tracing::error!(error = %crate::chain::chain(&error), guest = %self.entry.id, "a guest stays as it is");
            self.state = next;
            let (record, stored) = self.happened(|_| {});
            return stored.map(|()| record);
        }
        Err(refused)
    }

    pub(super) fn undefine(&mut self, ask: &Ask, reply: Reply<GuestRecord>) -> bool {
        let record = self.entry.record();
        let decided = self.check(ask).and_then(|()| self.standing(&record).undefine());
        if decided.is_err() || ask.dry_run {
            let _ = reply.send(decided.map(|()| record));
            return false;
        }
        // On disk first: a guest that is acknowledged to be gone must not come back.
        if let Err(e) = self.inner.delete_guest(&record) {
            let _ = reply.send(Err(HostError::storage("deleting the guest", e)));
            return false;
        }
        self.drop_body();
        // Whoever removes a guest that left wants what is left of it gone.
        self.inner.audits.give_up(NotRun::MemoryNeeded, |guest| guest == record.id);
        let _ = reply.send(Ok(record));
        true
    }

    pub(super) fn arrived(&mut self, machine: Box<dyn Machine>, paused: bool, fault: Option<Fault>) {
        self.away = None;
        let migration = self.entry.record().migration.and_then(|m| self.inner.migration_entry(m));
        let audit = migration.and_then(|migration| audits::of_guest(&migration.record()));
        self.entry.attach(machine.as_ref());
        self.machine = Some(machine);
        self.step(Event::Arrived);
        if paused {
            self.step(Event::Pause);
        }
        self.publish(|r| {
            r.migration = None;
            r.audit = audit;
            r.started_at = Some(Timestamp::now());
        });
        if let Some(fault) = fault {
            self.cannot_run(fault);
        }
        // It may have ended before it was ours to look after.
        self.look_after_machine_now();
    }

    /// The guest is here and does not run, such as when somebody else has its disk: it is paused, and can be
    /// resumed.
    fn cannot_run(&mut self, fault: Fault) {
        if self.machine.as_ref().is_some_and(|m| m.ended().is_some()) {
            return self.broke(&fault);
        }
        if self.state == GuestState::Running {
            self.step(Event::Pause);
        }
        self.publish(|r| r.error = Some(fault));
    }

    /// What a machine says of itself while it goes on.
    pub(super) fn hear_news(&mut self) {
        let news = self.machine.as_mut().map(|m| m.news()).unwrap_or_default();
        for MachineNews::DiskFailed { disk, full } in news {
            if self.state == GuestState::Running {
                self.step(Event::Pause);
            }
            let fault = crate::host::faults::disk_fault(&disk, full);
            tracing::error!(guest = %self.entry.id, disk, full, "a guest is paused: its disk failed");
            self.publish(|r| r.error = Some(fault));
        }
    }

    pub(super) fn look_after_machine_now(&mut self) {
        if let Some(end) = self.machine.as_ref().and_then(|m| m.ended()) {
            self.ended(end);
        }
    }

    pub(super) fn ended(&mut self, end: MachineEnd) {
        if self.away.is_some() {
            return self.ended_away(&end);
        }
        if self.machine.is_none() || self.state == GuestState::Failed {
            return;
        }
        self.ended_with(end, None);
    }

    /// Stopped, by its own word, or failed; what ended it is in the record either way.
    pub(super) fn ended_with(&mut self, end: MachineEnd, with: Option<Together>) {
        let fault = crate::host::faults::end_fault(&end);
        match end {
            MachineEnd::PowerOff | MachineEnd::Reset => {
                self.step(Event::Stop);
                self.drop_body();
                self.step(Event::Stopped);
                let migration = self.lent;
                self.publish_with(|r| (r.error, r.migration) = (Some(fault), migration), with);
            }
            MachineEnd::Panicked | MachineEnd::Crashed { .. } | MachineEnd::Exited { .. } => {
                self.broke_with(&fault, with);
            }
        }
    }

    pub(super) fn broke(&mut self, fault: &Fault) {
        self.broke_with(fault, None);
    }

    pub(super) fn broke_with(&mut self, fault: &Fault, with: Option<Together>) {
        self.step(Event::Broke);
        self.drop_body();
        let migration = self.lent;
        self.publish_with(|r| (r.error, r.migration) = (Some(fault.clone()), migration), with);
    }

    pub(super) fn drop_body(&mut self) {
        let stopping = self.inner.is_stopping();
        self.end_audit(if stopping { NotRun::ShuttingDown } else { NotRun::GuestStopped });
        self.batches.clear();
        for (id, mirror) in self.mirrors.drain() {
            drop(mirror);
            self.inner.forget_mirror(id);
        }
        self.machine = None;
    }

    pub(super) fn step(&mut self, event: Event) {
        match self.state.step(event) {
            Ok(next) => self.state = next,
            Err(_) => {
                tracing::error!(state = self.state.name(), ?event, "a guest's life cycle took no such turn")
            }
        }
    }
}
