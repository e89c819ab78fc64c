//! The task that owns a guest: its machine, its mirrors, its record. Everybody else sends it messages.
//!
//! Blocking work (making machines and mirrors) runs on this task through `block_in_place`: while it does,
//! messages wait, and the published record says what goes on.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::host::act::{self, Act, Effect, Riding};
use crate::host::events::{Change, EventBody};
use crate::host::guests::command::{Command, Envelope, GiveBack, LabelChange, Lease, Reply, Vanish};
use crate::host::guests::entry::GuestEntry;
use crate::host::inner::Inner;
use crate::host::machines::Made;
use crate::host::migrations::endings::{self, Ending};
use crate::host::migrations::hand_over::Together;
use crate::host::mirrors::batches::BatchSession;
use crate::host::mirrors::entry::MirrorEntry;
use crate::host::validate;
use crate::host::{
    BatchRefusal, Expected, ExportSpec, Fault, FieldError, GuestAction, GuestRecord, GuestState, HostError,
    ImportReport, ImportStep, MigrationRecord, MirrorChoice, MirrorOptions, MirrorSpec, MirrorState,
    ProtectionLevel, SealedBatch,
};
use mirrorvm_abi::op::Status;

use crate::addr::{Gpa, RamPage};
use crate::address_space::{Addressing, BlockSpec, GuestLayout};
use crate::guest::lifecycle::Event;
use crate::guest::{EndWatch, Machine, MachineEnd, MachineError, PlugError, Readiness};
use crate::mirror::{BatchFault, BatchTerms, LaneError, Mirror, Placement, parse_records};
use crate::pages::PageSet;
use crate::store::{Batch, Kind, StoreError};

/// Messages that wait at most; more make senders wait.
const QUEUE: usize = 32;

/// How long a guest that starts may take to say that it can be migrated.
const FIRST_WORD: std::time::Duration = std::time::Duration::from_secs(3);

/// The owner's state.
struct Owner {
    inner: Arc<Inner>,
    entry: Arc<GuestEntry>,
    state: GuestState,
    machine: Option<Box<dyn Machine>>,
    mirrors: HashMap<Uuid, Mirror>,
    /// Exports and imports under way, by mirror.
    batches: HashMap<Uuid, BatchSession>,
    /// The migration that has the guest: by its claim from the queue on, then by the lease, to its end.
    lent: Option<Uuid>,
    /// While a migration has the machine: whether the guest has ended.
    away: Option<(Uuid, EndWatch)>,
    /// Whether its labels have gone to the destination.
    labels_sent: bool,
    /// The guest's readiness as of the last generation.
    shown: Option<Readiness>,
}

/// Starts the task of a guest in `state`.
pub(in crate::host) fn spawn(inner: &Arc<Inner>, record: GuestRecord, state: GuestState) -> Arc<GuestEntry> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let entry = Arc::new(GuestEntry::new(record, sender));
    let owner = Owner {
        inner: Arc::clone(inner),
        entry: Arc::clone(&entry),
        state,
        machine: None,
        mirrors: HashMap::new(),
        batches: HashMap::new(),
        lent: None,
        away: None,
        labels_sent: false,
        shown: None,
    };
    inner.runtime.spawn(owner.run(receiver));
    entry
}

impl Owner {
    async fn run(mut self, mut commands: mpsc::Receiver<Envelope>) {
        let mut poll = tokio::time::interval(std::time::Duration::from_millis(250));
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let watching =
                (self.machine.is_some() && self.state != GuestState::Failed) || self.away.is_some();
            let command = tokio::select! {
                command = commands.recv() => command,
                _ = poll.tick(), if watching => {
                    self.look_after_machine();
                    continue;
                }
            };
            let Some((command, act)) = command else { return };
            if tokio::task::block_in_place(|| Act::sync_scope(act, || self.handle(command))) {
                return;
            }
        }
    }

    /// Machines in other processes do not call back when they end.
    fn look_after_machine(&mut self) {
        if let Some(end) = self.machine.as_ref().and_then(|m| m.ended()) {
            tokio::task::block_in_place(|| self.ended(end));
        } else if let Some(end) = self.away.as_ref().and_then(|(_, watch)| watch.look()) {
            self.ended_away(&end);
        }
    }

    /// The guest ended while a migration has its machine: there is nothing more to move.
    fn ended_away(&mut self, end: &MachineEnd) {
        let Some((migration, _)) = self.away.take() else { return };
        tracing::info!(guest = %self.entry.id, %migration, %end, "a guest ended while it was being migrated");
        if let Some(entry) = self.inner.migration_entry(migration) {
            entry.control.guest_ended(end);
        }
    }

    /// Does one thing; true when the task is over.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Act(action, expected, reply) => match self.check(&expected) {
                Ok(()) => self.act(action, reply),
                Err(e) => _ = reply.send(Err(e)),
            },
            Command::Undefine(expected, reply) => match self.check(&expected) {
                Ok(()) => return self.undefine(reply),
                Err(e) => _ = reply.send(Err(e)),
            },
            Command::Relabel { change, expected, act, reply } => {
                let _ = reply.send(self.relabel(change, &expected, act));
            }
            Command::HoldLabels { migration, reply } => {
                self.labels_sent = self.lent == Some(migration);
                let _ = reply.send(Ok(self.entry.record().spec.labels));
            }
            Command::AdoptLabels(labels, reply) => {
                let _ = reply.send(self.store(self.state, |r| r.spec.labels = labels).map(|_| ()));
            }
            Command::CreateMirror(spec, id, reply) => {
                let _ = reply.send(self.create_mirror(&spec, false, id).map(|e| e.record()));
            }
            Command::DeleteMirror(id, expected, reply) => {
                let _ = reply.send(self.delete_mirror(id, &expected));
            }
            Command::Touch => {
                if self.entry.readiness() != self.shown {
                    self.publish(|_| {});
                }
            }
            Command::AddBlock(block, expected, reply) => {
                let added = self.check(&expected).and_then(|()| self.add_block(block));
                let _ = reply.send(added);
            }
            Command::Replug { block, gpa, reply } => {
                let _ = reply.send(self.replug(&block, gpa));
            }
            Command::Export { mirror, spec, pages, expected, act, reply } => {
                let _ = reply.send(self.export(mirror, &spec, &pages, &expected, act));
            }
            Command::Import { mirror, step, expected, act, reply } => {
                let _ = reply.send(self.import(mirror, step, &expected, act));
            }
            Command::Claim { migration, choice, streams, act, reply } => {
                let _ = reply.send(self.claim(migration, &choice, streams, act));
            }
            Command::Release { migration, done } => {
                self.release(migration);
                let _ = done.send(());
            }
            Command::Lend { migration, choice, template, streams, reply } => {
                let lease = self.lend(migration, &choice, template, streams);
                if let Err(Ok(lease)) = reply.send(lease) {
                    self.take_back(lease.machine, lease.mirror, lease.mirror_id, !lease.transient);
                    self.publish(|r| r.migration = None);
                }
            }
            Command::Held => self.held(Event::HoldForHandOver, GuestState::Paused),
            Command::RunsOn => self.held(Event::Resume, GuestState::Running),
            Command::StartSent(with, reply) => {
                let _ = reply.send(self.start_sent(&with));
            }
            Command::HandedOver { peer, delete, with, reply } => {
                return self.handed_over(Some(peer), delete, &with, reply);
            }
            Command::Watch(migration, watch) => self.away = Some((migration, watch)),
            Command::Commit { paused, with, reply } => {
                let _ = reply.send(self.commit(paused, &with));
            }
            Command::InDoubt(reply) => {
                self.step(Event::HoldForHandOver);
                self.step(Event::StartSent);
                self.publish(|_| {});
                let _ = reply.send(Ok(()));
            }
            Command::GiveBack(back) => self.give_back(*back),
            Command::Ended(end) => self.ended(end),
            Command::Arrived { machine, paused, fault, mirror, done } => {
                if let Some(mirror) = mirror {
                    self.keep_mirror(*mirror);
                }
                self.arrived(machine, paused, fault);
                let _ = done.send(());
            }
            Command::Settled { peer, delete, with, reply } => {
                return self.handed_over(peer, delete, &with, reply);
            }
            Command::Confirmed { moved_to, done } => {
                // Somebody may have been faster.
                if self.entry.record().unconfirmed {
                    let stored = self.store(self.state, |r| {
                        r.unconfirmed = false;
                        r.moved_to = moved_to;
                    });
                    if let Err(error) = stored {
                        tracing::error!(error = %crate::host::faults::chain(&error), guest = %self.entry.id,
                            "a guest stays unconfirmed: its record is not stored");
                    }
                }
                let _ = done.send(());
            }
            Command::Vanish(vanish) => return self.vanish(*vanish),
            Command::Shutdown(done) => {
                self.drop_body();
                let _ = done.send(());
                return true;
            }
        }
        false
    }

    fn check(&self, expected: &Expected) -> Result<(), HostError> {
        expected.check("guest", self.entry.record().generation)
    }

    /// Labels belong to the guest and travel with it: after they were sent, and before they are here, there
    /// is nobody to whom a change could be acknowledged.
    fn relabel(
        &mut self,
        change: LabelChange,
        expected: &Expected,
        act: bool,
    ) -> Result<GuestRecord, HostError> {
        let record = self.entry.record();
        let elsewhere = matches!(self.state, GuestState::InDoubt | GuestState::Incoming);
        if let Some(migration) = record.migration.filter(|_| self.labels_sent || elsewhere) {
            return Err(HostError::GuestMigrating { migration });
        }
        self.check(expected)?;
        let labels = change(&record.spec.labels);
        validate::labels(&labels)?;
        if !act {
            let spec = crate::host::GuestSpec { labels, ..record.spec };
            return Ok(GuestRecord { spec, ..record });
        }
        self.store(self.state, |r| r.spec.labels = labels)
    }

    fn act(&mut self, action: GuestAction, reply: Reply<GuestRecord>) {
        if let Some(migration) = self.lent {
            let _ = reply.send(Err(HostError::GuestMigrating { migration }));
            return;
        }
        let (done, event) = match action {
            GuestAction::Confirm => {
                let record = self.entry.record();
                let confirmed = match record.unconfirmed {
                    true => self.store(self.state, |r| r.unconfirmed = false),
                    false => Ok(record),
                };
                let _ = reply.send(confirmed);
                return;
            }
            GuestAction::Start => {
                (self.state == GuestState::Running || self.state == GuestState::Starting, Event::Start)
            }
            GuestAction::Pause => (self.state == GuestState::Paused, Event::Pause),
            GuestAction::Resume => (self.state == GuestState::Running, Event::Resume),
            GuestAction::Stop => (self.state == GuestState::Stopped, Event::Stop),
        };
        // Idempotent in effect: a guest that is there already is left alone.
        if done {
            let _ = reply.send(Ok(self.entry.record()));
            return;
        }
        let record = self.entry.record();
        if let (GuestAction::Start, Some(peer)) = (action, record.moved_to) {
            let _ = reply.send(Err(HostError::GuestMoved { peer }));
            return;
        }
        if record.unconfirmed && matches!(action, GuestAction::Start | GuestAction::Resume) {
            let _ = reply.send(Err(self.entry.unconfirmed()));
            return;
        }
        let Ok(next) = self.state.step(event) else {
            let _ = reply.send(Err(wrong_state(self.state, action)));
            return;
        };
        match action {
            GuestAction::Start => self.start(next, reply),
            // Answered above.
            GuestAction::Confirm => {}
            GuestAction::Pause | GuestAction::Resume => {
                let _ = reply.send(self.hold(action, next));
            }
            GuestAction::Stop => {
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
        }
    }

    /// Answers as soon as the start is accepted, which it is when there is memory for the guest; how it goes
    /// on is in the record.
    fn start(&mut self, next: GuestState, reply: Reply<GuestRecord>) {
        let before = self.entry.record();
        let memory = match self.inner.memory_for(&before.spec, &before.layout, before.boot.as_ref()) {
            Ok(memory) => memory,
            Err(refused) => {
                let _ = reply.send(Err(refused));
                return;
            }
        };
        let record = match self.store(next, |r| r.error = None) {
            Ok(record) => record,
            Err(refused) => {
                let _ = reply.send(Err(refused));
                return;
            }
        };
        let _ = reply.send(Ok(record.clone()));
        match self.inner.make_machine(&record, &self.entry, memory, None) {
            Ok(Made { mut machine, layout, mirror }) => {
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
                            r.started_at = Some(Timestamp::now());
                        });
                    }
                    Err(e) => self.broke(&crate::host::faults::machine_fault(&e)),
                }
            }
            Err(e) => {
                tracing::error!(guest = %record.id, error = %crate::host::faults::chain(&e), "a guest cannot be started");
                self.broke(&e.fault());
            }
        }
    }

    /// Takes the mirror that an SEV-ES guest was launched with.
    fn keep_mirror(&mut self, mirror: Mirror) {
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
    fn has_launch_mirror(&self) -> bool {
        self.inner.facts(&self.entry.record().spec.driver).sev.is_some_and(|s| s.es)
    }

    fn add_block(&mut self, block: BlockSpec) -> Result<GuestRecord, HostError> {
        if let Some(migration) = self.lent {
            return Err(HostError::GuestMigrating { migration });
        }
        let before = self.entry.record();
        let record = crate::host::guests::ram::with_block(&self.inner, &before, block)?;
        self.store(self.state, |r| *r = record)
    }

    fn replug(&mut self, block: &str, gpa: Option<Gpa>) -> Result<(), HostError> {
        if let Some(migration) = self.lent {
            return Err(HostError::GuestMigrating { migration });
        }
        // What is not there is not there in any state.
        let missing = || HostError::NotFound { kind: "RAM block", key: block.chars().take(80).collect() };
        self.entry.record().layout.block(block).ok_or_else(missing)?;
        // A mirror's slots show what was plugged when it was made.
        if let Some(other) = self.mirrors.keys().next().filter(|_| !self.has_launch_mirror()) {
            return Err(HostError::InUse { kind: "guest", user: format!("mirror {other}") });
        }
        let machine =
            self.machine.as_mut().filter(|_| matches!(self.state, GuestState::Running | GuestState::Paused));
        let machine = machine.ok_or(HostError::WrongState {
            kind: "guest",
            current: self.state.name(),
            allowed: &["running", "paused"],
        })?;
        let done = match gpa {
            Some(gpa) => machine.plug(block, gpa),
            None => machine.unplug(block),
        };
        done.map_err(|e| match e {
            MachineError::Plug(PlugError::NoBlock) => missing(),
            MachineError::Plug(e) => HostError::PlugRefused(e),
            MachineError::Unsupported { what } => {
                HostError::CapabilityMissing { what: "plugging", why: format!("this driver cannot {what}") }
            }
            e => HostError::internal("plugging or unplugging a RAM block", e),
        })?;
        let layout = machine.ram().layout();
        self.happened(|r| r.layout = (*layout).clone()).1
    }

    fn hold(&mut self, action: GuestAction, next: GuestState) -> Result<GuestRecord, HostError> {
        let machine = self.machine.as_mut().ok_or_else(|| wrong_state(GuestState::Stopped, action))?;
        let pauses = action == GuestAction::Pause;
        let done = if pauses { machine.pause() } else { machine.resume() };
        done.map_err(|e| HostError::internal("holding or resuming the guest", e))?;
        let refused = match self.store(next, |_| {}) {
            Ok(record) => return Ok(record),
            Err(refused) => refused,
        };
        // What cannot be stored is not made.
        let machine = self.machine.as_mut().ok_or_else(|| wrong_state(GuestState::Stopped, action))?;
        let undone = if pauses { machine.resume() } else { machine.pause() };
        if let Err(error) = undone {
            tracing::error!(error = %crate::host::faults::chain(&error), guest = %self.entry.id, "a guest stays as it is");
            self.state = next;
            let (record, stored) = self.happened(|_| {});
            return stored.map(|()| record);
        }
        Err(refused)
    }

    fn undefine(&mut self, reply: Reply<()>) -> bool {
        let refusal = match (self.lent, self.state) {
            (Some(migration), _) => Some(HostError::GuestMigrating { migration }),
            (None, GuestState::Stopped | GuestState::Failed) => None,
            (None, state) => Some(HostError::WrongState {
                kind: "guest",
                current: state.name(),
                allowed: &["stopped", "failed"],
            }),
        };
        if let Some(e) = refusal {
            let _ = reply.send(Err(e));
            return false;
        }
        // On disk first: a guest that is acknowledged to be gone must not come back.
        if let Err(e) = self.inner.delete_guest(&self.entry.record()) {
            let _ = reply.send(Err(HostError::storage("deleting the guest", e)));
            return false;
        }
        self.drop_body();
        let _ = reply.send(Ok(()));
        true
    }

    fn create_mirror(
        &mut self,
        spec: &MirrorSpec,
        transient: bool,
        id: Option<Uuid>,
    ) -> Result<Arc<MirrorEntry>, HostError> {
        // A transient one is made for the migration that has the guest.
        if let Some(migration) = self.lent.filter(|_| !transient) {
            return Err(HostError::GuestMigrating { migration });
        }
        if self.has_launch_mirror() {
            return Err(HostError::MirrorAtLaunch);
        }
        // One in each place: a helper's memory is one block, and two mirrors would run over each other in it.
        let private = spec.strategy.has_private_helper();
        if let Some((other, _)) = self.mirrors.iter().find(|(_, m)| m.is_private() == private) {
            return Err(HostError::InUse { kind: "guest", user: format!("mirror {other}") });
        }
        let machine =
            self.machine.as_ref().filter(|_| matches!(self.state, GuestState::Running | GuestState::Paused));
        let machine = machine.ok_or(HostError::WrongState {
            kind: "guest",
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

    fn delete_mirror(&mut self, id: Uuid, expected: &Expected) -> Result<(), HostError> {
        if let Some(entry) = self.inner.mirror_entry(id) {
            expected.check("mirror", entry.record().generation)?;
        }
        if let Some(migration) = self.lent.filter(|_| self.mirrors.contains_key(&id)) {
            return Err(HostError::InUse { kind: "mirror", user: format!("migration {migration}") });
        }
        if self.mirrors.contains_key(&id) && self.has_launch_mirror() {
            return Err(HostError::MirrorAtLaunch);
        }
        if self.mirrors.remove(&id).is_some() {
            self.batches.remove(&id);
            self.inner.forget_mirror(id);
            return Ok(());
        }
        match self.lent {
            Some(migration) if self.inner.mirror_entry(id).is_some() => {
                Err(HostError::InUse { kind: "mirror", user: format!("migration {migration}") })
            }
            _ => Err(HostError::NotFound { kind: "mirror", key: id.to_string() }),
        }
    }

    /// A mirror that is here, and not with a migration.
    fn own_mirror(&self, id: Uuid, expected: &Expected) -> Result<&Mirror, HostError> {
        if let Some(entry) = self.inner.mirror_entry(id) {
            if let Some(migration) = self.lent {
                return Err(HostError::GuestMigrating { migration });
            }
            expected.check("mirror", entry.record().generation)?;
            if entry.record().state == MirrorState::Failed {
                let allowed = &["ready", "busy"];
                return Err(HostError::WrongState { kind: "mirror", current: "failed", allowed });
            }
        }
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        self.mirrors.get(&id).ok_or_else(missing)
    }

    fn terms<'a>(
        session: Uuid,
        record: &'a GuestRecord,
        layout: &'a GuestLayout,
        addressing: Addressing,
    ) -> BatchTerms<'a> {
        BatchTerms { session, guest: record.id, layout, addressing }
    }

    fn export(
        &mut self,
        id: Uuid,
        spec: &ExportSpec,
        pages: &[RamPage],
        expected: &Expected,
        act: bool,
    ) -> Result<SealedBatch, HostError> {
        let mirror = self.own_mirror(id, expected)?;
        let plan = Arc::clone(mirror.plan());
        crate::host::mirrors::batches::check_reach(&plan, &self.shared_pages(), spec)?;
        let in_use = |session: &BatchSession| {
            let user = format!("the export or import {}", session.import());
            HostError::InUse { kind: "mirror", user }
        };
        let running = match self.batches.get(&id) {
            Some(BatchSession::Exporting { import, importer, nonce, epoch })
                if *import == spec.import && *importer == spec.nonce =>
            {
                Some((*nonce, *epoch))
            }
            Some(other) => return Err(in_use(other)),
            None => None,
        };
        let mut batch = SealedBatch {
            import: spec.import,
            epoch: running.map_or(1, |(_, epoch)| epoch),
            nonce: running.map_or([0; 32], |(nonce, _)| nonce),
            addressing: plan.addressing,
            pages: pages.len() as u32,
            records: Vec::new(),
            token: [0; mirrorvm_abi::record::TOKEN_BYTES],
            last: spec.last,
            guest_state: self.state,
        };
        if !act {
            return Ok(batch);
        }
        let record = self.entry.record();
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        let mirror = self.mirrors.get_mut(&id).ok_or_else(missing)?;
        let sealed = match running {
            Some(_) => Ok(batch.nonce),
            None => {
                let layout = record.layout.clone();
                let terms = Self::terms(spec.import, &record, &layout, plan.addressing);
                mirror.begin_export(&terms, spec.nonce)
            }
        };
        let sealed = sealed.and_then(|nonce| Ok((nonce, mirror.export_batch(pages, batch.epoch)?)));
        let (nonce, (records, token)) = match sealed {
            Ok(done) => done,
            Err(e) => {
                // A session half open is of no use to anybody.
                let _ = mirror.cancel();
                self.end_batches(id);
                return Err(helper_error(e));
            }
        };
        batch.nonce = nonce;
        batch.records = records;
        batch.token = token;
        if spec.last {
            let ended = mirror.cancel();
            self.end_batches(id);
            ended.map_err(helper_error)?;
        } else {
            let (import, importer, epoch) = (spec.import, spec.nonce, batch.epoch + 1);
            self.batches.insert(id, BatchSession::Exporting { import, importer, nonce, epoch });
            if running.is_none() {
                self.inner.set_mirror_state(id, MirrorState::Busy, None);
            }
        }
        Ok(batch)
    }

    fn end_batches(&mut self, id: Uuid) {
        if self.batches.remove(&id).is_some() {
            self.inner.set_mirror_state(id, MirrorState::Ready, None);
        }
    }

    /// Pages that the guest shares with its host: never sealed.
    fn shared_pages(&self) -> PageSet {
        self.machine.as_ref().map(|m| m.encryption().shared()).unwrap_or_default()
    }

    fn import(
        &mut self,
        id: Uuid,
        step: ImportStep,
        expected: &Expected,
        act: bool,
    ) -> Result<ImportReport, HostError> {
        let _ = self.own_mirror(id, expected)?;
        let record = self.entry.record();
        if record.protection != ProtectionLevel::None {
            let why = "writing earlier pages into an encrypted guest is a rollback, to which its owner has not agreed";
            return Err(HostError::PolicyForbids { why: why.to_owned() });
        }
        if self.state != GuestState::Paused && !matches!(step, ImportStep::Close(_)) {
            let current = self.state.name();
            return Err(HostError::WrongState { kind: "guest", current, allowed: &["paused"] });
        }
        match step {
            ImportStep::Open => self.open_import(id, act),
            ImportStep::Batch(batch) => self.import_batch(id, &record, &batch, act),
            ImportStep::Close(import) => {
                let session = self.batches.get(&id).copied();
                match session {
                    Some(
                        BatchSession::Opened { import: i, .. } | BatchSession::Receiving { import: i, .. },
                    ) if i == import => {
                        if act {
                            self.renew_helper(id, &record)?;
                        }
                        Ok(ImportReport { import, state: "closed", nonce: None, written: Vec::new() })
                    }
                    _ => Err(HostError::NotFound { kind: "import", key: import.to_string() }),
                }
            }
        }
    }

    fn open_import(&mut self, id: Uuid, act: bool) -> Result<ImportReport, HostError> {
        if let Some(session) = self.batches.get(&id) {
            let user = format!("the export or import {}", session.import());
            return Err(HostError::InUse { kind: "mirror", user });
        }
        let import = Uuid::now_v7();
        if !act {
            return Ok(ImportReport { import, state: "open", nonce: None, written: Vec::new() });
        }
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        let nonce = self.mirrors.get_mut(&id).ok_or_else(missing)?.hello().map_err(helper_error)?;
        self.batches.insert(id, BatchSession::Opened { import, nonce });
        self.inner.set_mirror_state(id, MirrorState::Busy, None);
        Ok(ImportReport { import, state: "open", nonce: Some(nonce), written: Vec::new() })
    }

    fn import_batch(
        &mut self,
        id: Uuid,
        record: &GuestRecord,
        batch: &SealedBatch,
        act: bool,
    ) -> Result<ImportReport, HostError> {
        let missing = || HostError::NotFound { kind: "import", key: batch.import.to_string() };
        let bad =
            |at: &str, code, detail: String| HostError::Invalid(vec![FieldError::new(at, code, detail)]);
        let session = self.batches.get(&id).copied().filter(|s| s.import() == batch.import);
        let (begun, epoch, open) = match session.ok_or_else(missing)? {
            BatchSession::Opened { nonce, .. } => (None, 1, Some(nonce)),
            BatchSession::Receiving { exporter, epoch, .. } => (Some(exporter), epoch, None),
            BatchSession::Exporting { .. } => return Err(missing()),
        };
        let headers =
            parse_records(&batch.records).map_err(|e| bad("/batch/records", "not_records", e.to_string()))?;
        let mirror = self.mirrors.get_mut(&id).ok_or_else(missing)?;
        let plan = Arc::clone(mirror.plan());
        if batch.addressing != plan.addressing {
            let detail = "the mirror's strategy calls pages by other addresses than the exporting one's";
            return Err(bad("/batch/addressing", "other_addressing", detail.to_owned()));
        }
        if headers.len() != batch.pages as usize {
            let detail = format!("the batch has {} records", headers.len());
            return Err(bad("/batch/pages", "out_of_range", detail));
        }
        // As far as the host can tell; the helper says whether they may be written.
        let named: Vec<RamPage> = headers.iter().map_while(|h| plan.ram_page(h.page)).collect();
        if !act {
            let state = if begun.is_some() { "receiving" } else { "open" };
            return Ok(ImportReport { import: batch.import, state, nonce: open, written: Vec::new() });
        }
        let begin = match begun {
            Some(_) => Ok(()),
            None => {
                let terms = Self::terms(batch.import, record, &record.layout, plan.addressing);
                mirror.begin_import(&terms, batch.nonce).map_err(BatchFault::Lane)
            }
        };
        let done = begin.and_then(|()| mirror.import_batch((&batch.records, &headers), epoch, &batch.token));
        let refused = match done {
            Ok(()) if !batch.last => {
                let (import, exporter) = (batch.import, begun.unwrap_or(batch.nonce));
                let next = BatchSession::Receiving { import, exporter, epoch: epoch + 1 };
                self.batches.insert(id, next);
                None
            }
            Ok(()) => {
                self.renew_helper(id, record)?;
                None
            }
            Err(BatchFault::Refused { status, index }) => {
                self.renew_helper(id, record)?;
                Some((crate::host::mirrors::batches::code_of(status), index))
            }
            Err(BatchFault::Lane(e)) => {
                self.renew_helper(id, record)?;
                return Err(helper_error(e));
            }
        };
        let written = refused.map_or(named.len(), |(_, index)| index.min(named.len()));
        let written = crate::host::mirrors::batches::runs(named.into_iter().take(written));
        match refused {
            None => {
                let state = if batch.last { "closed" } else { "receiving" };
                Ok(ImportReport { import: batch.import, state, nonce: None, written })
            }
            Some((code, index)) => Err(HostError::BatchRefused(BatchRefusal { code, index, written })),
        }
    }

    /// A helper that has imported is never a source again: the mirror gets a fresh one, with the session's
    /// keys gone.
    fn renew_helper(&mut self, id: Uuid, record: &GuestRecord) -> Result<(), HostError> {
        self.batches.remove(&id);
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        let entry = self.inner.mirror_entry(id).ok_or_else(missing)?;
        let shown = entry.record();
        let (old, machine) = (self.mirrors.remove(&id), self.machine.as_ref());
        let workers = old.as_ref().map_or(1, Mirror::worker_count);
        // Before the next one: they may use the same memory.
        drop(old);
        let made = machine.ok_or_else(missing).and_then(|machine| {
            let image = self.inner.image_measuring(&shown.helper_measurement)?.ok_or_else(missing)?;
            let mirror = self.inner.make_mirror(record, machine.as_ref(), shown.strategy, workers, &image)?;
            mirror.place(&shown.placement).map_err(crate::host::mirrors::entry::placement_error)?;
            Ok(mirror)
        });
        match made {
            Ok(mirror) => {
                entry.revive(mirror.watch());
                self.mirrors.insert(id, mirror);
                self.inner.tell_mirror(&entry, Change::StateChanged);
                self.inner.changed();
                Ok(())
            }
            Err(e) => {
                self.inner.forget_mirror(id);
                Err(e)
            }
        }
    }

    /// Whether a migration may have the guest with this mirror, as it is now.
    fn can_lend(&self, choice: &MirrorChoice, streams: u16) -> Result<(), HostError> {
        if !matches!(self.state, GuestState::Running | GuestState::Paused) {
            let current = self.state.name();
            return Err(HostError::WrongState { kind: "guest", current, allowed: &["running", "paused"] });
        }
        let chosen = self.chosen_mirror(choice)?;
        // Nothing else may look into a guest that leaves.
        if let Some(other) = self.mirrors.keys().find(|id| Some(**id) != chosen) {
            return Err(HostError::InUse { kind: "guest", user: format!("mirror {other}") });
        }
        let Some((id, mirror)) = chosen.and_then(|id| Some((id, self.mirrors.get(&id)?))) else {
            return Ok(());
        };
        if let Some(session) = self.batches.get(&id) {
            let user = format!("the export or import {}", session.import());
            return Err(HostError::InUse { kind: "mirror", user });
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
    fn chosen_mirror(&self, choice: &MirrorChoice) -> Result<Option<Uuid>, HostError> {
        match choice {
            MirrorChoice::Existing(id) if self.mirrors.contains_key(id) => Ok(Some(*id)),
            MirrorChoice::Existing(id) => Err(HostError::NotFound { kind: "mirror", key: id.to_string() }),
            MirrorChoice::Template(strategy) if self.has_launch_mirror() => {
                let made = self.mirrors.iter().find(|(_, m)| m.plan().strategy == *strategy);
                Ok(Some(*made.ok_or(HostError::MirrorAtLaunch)?.0))
            }
            MirrorChoice::Template(_) => Ok(None),
        }
    }

    /// Looks and takes in one step: of several migrations that ask at once one gets the guest.
    fn claim(
        &mut self,
        migration: Uuid,
        choice: &MirrorChoice,
        streams: u16,
        act: bool,
    ) -> Result<(), HostError> {
        if let Some(migration) = self.lent {
            return Err(HostError::GuestMigrating { migration });
        }
        if self.entry.record().unconfirmed {
            return Err(self.entry.unconfirmed());
        }
        self.can_lend(choice, streams)?;
        if act {
            // What was asked for is the migration: its own record is the one that says it is done.
            Act::sync_scope(None, || self.store(self.state, |r| r.migration = Some(migration)))?;
            self.lent = Some(migration);
        }
        Ok(())
    }

    fn release(&mut self, migration: Uuid) {
        if self.lent == Some(migration) {
            self.lent = None;
            self.publish(|r| r.migration = None);
        }
    }

    fn lend(
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
                return Err(HostError::NotFound { kind: "mirror", key: id.to_string() });
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
        let missing = || HostError::NotFound { kind: "mirror", key: mirror_id.to_string() };
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
    fn held(&mut self, event: Event, to: GuestState) {
        if self.away.is_none() || self.state == to {
            return;
        }
        self.step(event);
        let (before, record) = (self.entry.record(), self.turned(|_| {}));
        self.inner.events.guest(&record, Some(&before), Change::Updated);
        self.entry.show(record);
        self.is_shown();
    }

    /// From here on a crash leaves guest and migration in doubt. Shown is what is so, as long as somebody
    /// knows: held. See docs/publishing.md.
    fn start_sent(&self, with: &Together) -> Result<(), HostError> {
        let record = GuestRecord { state: GuestState::InDoubt, ..self.turned(|_| {}) };
        // What a crash leaves is told by whoever finds it.
        let ending = Ending { events: Vec::new(), ..self.ending(Some(record), with) };
        let shown = self.showing(Some(self.turned(|_| {})), None);
        let stored = endings::store(&self.inner, &ending, None, shown);
        stored.map_err(|e| HostError::storage("storing START", e))
    }

    /// A guest that arrives is this host's: stored as it will be, shown when it is so (docs/publishing.md).
    fn commit(&self, paused: bool, with: &Together) -> Result<(), HostError> {
        let record = self.turned(|r| {
            r.migration = None;
            r.started_at = Some(Timestamp::now());
        });
        let state = if paused { GuestState::Paused } else { GuestState::Running };
        let record = GuestRecord { state, ..record };
        let ending = Ending { events: Vec::new(), ..self.ending(Some(record), with) };
        // Whether it lives is the guest's business from here on, not the import's.
        let stored = endings::store(&self.inner, &ending, with.space.as_ref(), || {});
        stored.map_err(|e| HostError::storage("storing COMMIT", e))
    }

    fn give_back(&mut self, back: GiveBack) {
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
    fn handed_over(&mut self, peer: Option<String>, delete: bool, with: &Together, reply: Reply<()>) -> bool {
        let delete = delete && peer.is_some();
        let record = self.turned(|r| {
            r.migration = None;
            r.unconfirmed &= peer.is_none();
            r.moved_to = peer;
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
    fn vanish(&mut self, vanish: Vanish) -> bool {
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
                endings::store(&self.inner, &ending, with.space.as_ref(), shown.clone())
            }
            None => self.was_never_here(replaced.as_ref(), &before, &events, shown.clone()),
        };
        let gone = stored.is_ok() || force;
        if gone {
            if stored.is_err() {
                shown();
            }
            self.away = None;
            self.inner.changed();
        }
        let _ = reply.send(stored.map_err(|e| HostError::storage("storing an import's end", e)));
        gone
    }

    /// An import that had not come so far as to have a record.
    fn was_never_here(
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

    fn take_back(&mut self, machine: Box<dyn Machine>, mirror: Mirror, mirror_id: Uuid, keep_mirror: bool) {
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

    fn arrived(&mut self, machine: Box<dyn Machine>, paused: bool, fault: Option<Fault>) {
        self.away = None;
        self.entry.attach(machine.as_ref());
        self.machine = Some(machine);
        self.step(Event::Arrived);
        if paused {
            self.step(Event::Pause);
        }
        self.publish(|r| {
            r.migration = None;
            r.started_at = Some(Timestamp::now());
        });
        if let Some(fault) = fault {
            self.broke(&fault);
        }
        // It may have ended before it was ours to look after.
        self.look_after_machine_now();
    }

    fn look_after_machine_now(&mut self) {
        if let Some(end) = self.machine.as_ref().and_then(|m| m.ended()) {
            self.ended(end);
        }
    }

    fn ended(&mut self, end: MachineEnd) {
        if self.away.is_some() {
            return self.ended_away(&end);
        }
        if self.machine.is_none() || self.state == GuestState::Failed {
            return;
        }
        self.ended_with(end, None);
    }

    /// Stopped, by its own word, or failed; what ended it is in the record either way.
    fn ended_with(&mut self, end: MachineEnd, with: Option<Together>) {
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

    fn broke(&mut self, fault: &Fault) {
        self.broke_with(fault, None);
    }

    fn broke_with(&mut self, fault: &Fault, with: Option<Together>) {
        self.step(Event::Broke);
        self.drop_body();
        let migration = self.lent;
        self.publish_with(|r| (r.error, r.migration) = (Some(fault.clone()), migration), with);
    }

    fn drop_body(&mut self) {
        self.batches.clear();
        for (id, mirror) in self.mirrors.drain() {
            drop(mirror);
            self.inner.forget_mirror(id);
        }
        self.machine = None;
    }

    fn step(&mut self, event: Event) {
        match self.state.step(event) {
            Ok(next) => self.state = next,
            Err(_) => tracing::error!(state = ?self.state, ?event, "a guest's life cycle took no such turn"),
        }
    }

    /// Makes the record say what is to be: with its event on disk first, then shown. When the store refuses,
    /// nothing has changed. Which of `store`, `happened` and `publish` is for what: docs/publishing.md.
    fn store(
        &mut self,
        state: GuestState,
        change: impl FnOnce(&mut GuestRecord),
    ) -> Result<GuestRecord, HostError> {
        let failed = |e| HostError::storage("storing the guest", e);
        let (record, batch, riding) = self.next(state, change).map_err(failed)?;
        let (entry, shown) = (Arc::clone(&self.entry), record.clone());
        let then = move || {
            entry.show(shown);
            riding.arrived();
        };
        self.inner.ledger.commit_blocking(batch, then).map_err(failed)?;
        self.state = state;
        self.is_shown();
        Ok(record)
    }

    /// Makes the record say what is so already. What the store does not take now is shown nevertheless, and
    /// owed to it; whoever asked for it is to be told so.
    fn happened(&mut self, change: impl FnOnce(&mut GuestRecord)) -> (GuestRecord, Result<(), HostError>) {
        let (record, batch, riding) = match self.next(self.state, change) {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(%error, "a guest's record cannot be written");
                return (self.entry.record(), Err(HostError::internal("writing the guest", error)));
            }
        };
        let (entry, shown) = (Arc::clone(&self.entry), record.clone());
        let stored = self.inner.ledger.owe_blocking(batch, move || entry.show(shown));
        self.is_shown();
        if stored.is_ok() {
            riding.arrived();
        }
        (record, stored.map_err(HostError::owed))
    }

    /// As [`Owner::happened`], where nobody waits for an answer.
    fn publish(&mut self, change: impl FnOnce(&mut GuestRecord)) -> GuestRecord {
        let (record, stored) = self.happened(change);
        if let Err(error) = stored {
            tracing::error!(error = %crate::host::faults::chain(&error), guest = %record.id, "a guest's record is not stored yet");
        }
        record
    }

    /// As [`Owner::publish`], together with the last word of a migration that ends with it, which is told the
    /// guest's state.
    fn publish_with(&mut self, change: impl FnOnce(&mut GuestRecord), with: Option<Together>) {
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
    fn turned(&self, change: impl FnOnce(&mut GuestRecord)) -> GuestRecord {
        let mut record = self.entry.record();
        change(&mut record);
        record.state = self.state;
        record.generation += 1;
        record
    }

    /// What is stored of a turn of a hand-over, with the events of what is shown then.
    fn ending(&self, record: Option<GuestRecord>, with: &Together) -> Ending {
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
    fn showing(
        &self,
        guest: Option<GuestRecord>,
        migration: Option<MigrationRecord>,
    ) -> impl FnOnce() + Clone + Send + 'static {
        let (inner, entry) = (Arc::clone(&self.inner), Arc::clone(&self.entry));
        move || {
            match guest {
                Some(guest) => entry.show(guest),
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
    fn next(
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

    fn is_shown(&mut self) {
        self.shown = self.entry.readiness();
        self.inner.changed();
    }
}

/// What a helper's refusal of a control operation, or its failure, is to a caller.
fn helper_error(e: LaneError) -> HostError {
    match e {
        LaneError::Refused { status: Status::WrongState | Status::Busy, .. } => {
            HostError::WrongState { kind: "helper", current: "in a session", allowed: &["idle"] }
        }
        LaneError::Refused { status: Status::PolicyForbids, .. } => {
            HostError::PolicyForbids { why: "the guest must not leave its platform, in no part".to_owned() }
        }
        LaneError::Refused { status: Status::PageRefused, index } => {
            HostError::Invalid(vec![FieldError::new(
                "/ranges",
                "not_reachable",
                format!("the helper refuses page {index} of the ranges"),
            )])
        }
        e => HostError::internal("an operation of the helper", e),
    }
}

/// The state that an action would lead to; the one that it is when the guest is there already.
pub(in crate::host) fn after(
    guest: &GuestEntry,
    record: &GuestRecord,
    action: GuestAction,
) -> Result<GuestState, HostError> {
    let (goal, event) = match action {
        GuestAction::Confirm => return Ok(record.state),
        GuestAction::Start => (GuestState::Running, Event::Start),
        GuestAction::Pause => (GuestState::Paused, Event::Pause),
        GuestAction::Resume => (GuestState::Running, Event::Resume),
        GuestAction::Stop => (GuestState::Stopped, Event::Stop),
    };
    if record.state == goal {
        return Ok(goal);
    }
    if let (GuestAction::Start, Some(peer)) = (action, &record.moved_to) {
        return Err(HostError::GuestMoved { peer: peer.clone() });
    }
    if record.unconfirmed && matches!(action, GuestAction::Start | GuestAction::Resume) {
        return Err(guest.unconfirmed());
    }
    match record.state.step(event) {
        Ok(_) => Ok(goal),
        Err(_) => Err(wrong_state(record.state, action)),
    }
}

fn wrong_state(state: GuestState, action: GuestAction) -> HostError {
    let allowed: &'static [&'static str] = match action {
        GuestAction::Start | GuestAction::Confirm => &["stopped"],
        GuestAction::Pause => &["running"],
        GuestAction::Resume => &["paused"],
        GuestAction::Stop => &["running", "paused", "failed"],
    };
    HostError::WrongState { kind: "guest", current: state.name(), allowed }
}
