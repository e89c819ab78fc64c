//! What readers see of guests, mirrors and migrations without asking their owners.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::guest::{Console, EncryptionStatus, Machine, MigrationControl, Readiness};
use crate::host::act::Act;
use crate::host::events::{Change, Told};
use crate::host::guests::task::{Asked, Command};
use crate::host::{
    ConsoleChunk, Expected, Fault, GuestRecord, GuestState, HandOverToken, HostError, MigrationRecord,
    MirrorRecord, MirrorState, PageDigests, WorkerInfo,
};
use crate::memory::Backing;
use crate::migration::Control;
use crate::mirror::{MirrorStats, MirrorWatch, Placement};
use crate::waiting;

/// What can be seen of a guest's machine without asking its owner.
#[derive(Clone)]
struct Senses {
    console: Arc<Console>,
    encryption: Arc<EncryptionStatus>,
    control: Arc<MigrationControl>,
    backings: Arc<[Backing]>,
    since: Instant,
}

/// A guest as others reach it.
pub(in crate::host) struct GuestEntry {
    pub id: Uuid,
    record: RwLock<Arc<GuestRecord>>,
    sender: mpsc::Sender<Asked>,
    senses: RwLock<Option<Senses>>,
    /// While it is unconfirmed: what is missing to know whose it is.
    missing: RwLock<Vec<String>>,
}

impl GuestEntry {
    pub fn new(record: GuestRecord, sender: mpsc::Sender<Asked>) -> Self {
        let id = record.id;
        let record = RwLock::new(Arc::new(record));
        Self { id, record, sender, senses: RwLock::default(), missing: RwLock::default() }
    }

    pub fn record(&self) -> GuestRecord {
        Arc::unwrap_or_clone(self.shown())
    }

    /// The record without a copy of it, unless its machine has something to say beyond.
    pub fn shown(&self) -> Arc<GuestRecord> {
        let record = self.published();
        match self.readiness_in(record.state) {
            None if record.readiness.is_none() => record,
            readiness => Arc::new(GuestRecord { readiness, ..Arc::unwrap_or_clone(record) }),
        }
    }

    /// Notes what is missing to know whose an unconfirmed guest is; says whether that is news.
    pub fn wait_for(&self, missing: Vec<String>) -> bool {
        let mut noted = self.missing.write().unwrap_or_else(PoisonError::into_inner);
        let news = *noted != missing;
        *noted = missing;
        news
    }

    /// Why an unconfirmed guest does not start.
    pub fn unconfirmed(&self) -> HostError {
        let missing = self.missing.read().unwrap_or_else(PoisonError::into_inner).clone();
        HostError::GuestUnconfirmed { missing }
    }

    fn published(&self) -> Arc<GuestRecord> {
        Arc::clone(&self.record.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn name(&self) -> String {
        self.published().spec.name.clone()
    }

    pub fn show(&self, record: GuestRecord) {
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(record);
    }

    /// A machine came: its console and page status can be read from now on, also after it is gone.
    pub fn attach(&self, machine: &dyn Machine) {
        let senses = Senses {
            console: Arc::clone(machine.console()),
            encryption: Arc::clone(machine.encryption()),
            control: Arc::clone(machine.migration_control()),
            backings: machine.ram().backings(),
            since: Instant::now(),
        };
        *self.senses.write().unwrap_or_else(PoisonError::into_inner) = Some(senses);
    }

    pub fn encryption(&self) -> Option<Arc<EncryptionStatus>> {
        self.senses().map(|s| s.encryption)
    }

    /// Milliseconds since the guest's last machine came, whatever the wall clock did meanwhile.
    pub fn uptime_ms(&self) -> Option<u64> {
        self.senses().map(|s| s.since.elapsed().as_millis() as u64)
    }

    /// What the blocks of the guest's last machine lie on, in the layout's order.
    pub fn backings(&self) -> Option<Arc<[Backing]>> {
        self.senses().map(|s| s.backings)
    }

    /// What the guest's last machine said of being migrated.
    pub fn readiness(&self) -> Option<Readiness> {
        self.readiness_in(self.published().state)
    }

    fn readiness_in(&self, state: GuestState) -> Option<Readiness> {
        let live = matches!(state, GuestState::Running | GuestState::Paused | GuestState::InDoubt);
        self.senses().filter(|_| live).map(|s| s.control.readiness())
    }

    fn senses(&self) -> Option<Senses> {
        self.senses.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn console(&self, offset: Option<u64>, max: usize) -> ConsoleChunk {
        let console = self.senses().map(|s| s.console);
        let (offset, data, end) = console.map_or((0, Vec::new(), 0), |c| c.read(offset, max));
        ConsoleChunk { offset, data, end }
    }

    /// Sends a command that is answered with a result.
    pub async fn ask<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, HostError>>) -> Command,
    ) -> Result<T, HostError> {
        let (reply, answer) = oneshot::channel();
        let gone = || HostError::NotFound { kind: "guest", key: self.id.to_string() };
        self.sender.send((make(reply), Act::current())).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The same from a thread of its own.
    pub fn ask_blocking<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, HostError>>) -> Command,
    ) -> Result<T, HostError> {
        let (reply, answer) = oneshot::channel();
        let gone = || HostError::NotFound { kind: "guest", key: self.id.to_string() };
        self.sender.blocking_send((make(reply), Act::current())).map_err(|_| gone())?;
        answer.blocking_recv().map_err(|_| gone())?
    }

    /// Sends a command from a thread of its own; false when the guest is gone.
    pub fn tell_blocking(&self, command: Command) -> bool {
        self.sender.blocking_send((command, None)).is_ok()
    }

    /// Ends the owner of an entry that was replaced.
    pub fn dismiss(&self) {
        let (done, _) = oneshot::channel();
        if self.sender.try_send((Command::Shutdown(done), None)).is_err() {
            tracing::warn!(guest = %self.id, "a replaced guest's owner could not be dismissed");
        }
    }

    /// Sends a command that nobody asked for; false when the guest is gone.
    pub async fn tell(&self, command: Command) -> bool {
        self.sender.send((command, None)).await.is_ok()
    }

    pub fn sender(&self) -> mpsc::Sender<Asked> {
        self.sender.clone()
    }
}

/// A mirror as others see it.
pub(in crate::host) struct MirrorEntry {
    pub id: Uuid,
    pub guest: Uuid,
    record: RwLock<MirrorRecord>,
    watch: RwLock<MirrorWatch>,
}

impl MirrorEntry {
    pub fn new(record: MirrorRecord, watch: MirrorWatch) -> Self {
        Self { id: record.id, guest: record.guest, record: RwLock::new(record), watch: RwLock::new(watch) }
    }

    pub fn set_state(&self, state: MirrorState, error: Option<Fault>) {
        let mut record = self.record.write().unwrap_or_else(PoisonError::into_inner);
        record.state = state;
        record.error = error;
        record.generation += 1;
    }

    /// Sets where its threads run, and notes it, if it is at the expected generation then.
    pub fn place(&self, placement: Placement, expected: &Expected) -> Result<MirrorRecord, HostError> {
        let watch = self.watch();
        {
            let mut record = self.record.write().unwrap_or_else(PoisonError::into_inner);
            expected.check("mirror", record.generation)?;
            watch.place(&placement).map_err(crate::host::placement_error)?;
            record.placement = placement;
            record.generation += 1;
        }
        Ok(self.record())
    }

    /// A view of its workers.
    pub fn watch(&self) -> MirrorWatch {
        self.watch.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its helper was started anew: other threads.
    pub fn revive(&self, watch: MirrorWatch) {
        *self.watch.write().unwrap_or_else(PoisonError::into_inner) = watch;
        self.set_state(MirrorState::Ready, None);
    }

    /// The record with the workers as they are now.
    pub fn record(&self) -> MirrorRecord {
        let mut record = self.record.read().unwrap_or_else(PoisonError::into_inner).clone();
        let stats = self.watch().stats();
        if let Some(end) = stats.iter().find_map(|s| s.ended) {
            record.state = MirrorState::Failed;
            record.error = Some(Fault { code: "helper_failed".into(), detail: end.to_string() });
        }
        record.workers =
            stats.iter().map(|s| WorkerInfo { tid: s.tid, exits: s.exits, cpu_ns: s.cpu_ns }).collect();
        record
    }
}

/// A migration's view of its mirror's workers.
struct Workers {
    watch: MirrorWatch,
    /// CPU time of each when the migration got it.
    base: Vec<u64>,
    since: Instant,
}

impl Workers {
    fn show(&self, record: &mut MigrationRecord) {
        let stats = self.watch.stats();
        let spent = |(s, base): (&MirrorStats, &u64)| WorkerInfo {
            tid: s.tid,
            exits: s.exits,
            cpu_ns: s.cpu_ns.saturating_sub(*base),
        };
        record.workers = stats.iter().zip(&self.base).map(spent).collect();
        let spent: u64 = record.workers.iter().map(|w| w.cpu_ns).sum();
        let there = self.since.elapsed().as_nanos() as u64 * record.workers.len() as u64;
        record.helper_busy_percent = (spent * 100).checked_div(there).map(|p| p.min(100) as u8);
    }
}

/// A migration as others see it.
pub(in crate::host) struct MigrationEntry {
    pub id: Uuid,
    record: RwLock<MigrationRecord>,
    /// Held by whoever writes the record to disk, from the look at it until what was written is shown: of
    /// two, the later looks at what the earlier wrote. Never taken by the ledger's own thread. Locked before
    /// `changing`.
    writing: Mutex<()>,
    /// Held by whoever changes the record in memory, from the look at it to its replacement; never while
    /// somebody waits for the disk, as the ledger's thread takes it, too.
    changing: Mutex<()>,
    pub control: Arc<Control>,
    told: Mutex<Told>,
    /// The mirror's workers, while the migration has them.
    workers: RwLock<Option<Workers>>,
    pub digests: RwLock<Option<Arc<PageDigests>>>,
    /// Where whoever settles a doubt takes tokens that were carried by hand.
    tokens: Mutex<Option<mpsc::Sender<Carried>>>,
    since: Instant,
    /// What had elapsed when an earlier daemon wrote the record.
    elapsed_before_ms: u64,
}

/// A token that was carried by hand, and who waits to hear whether it is taken.
pub(in crate::host) type Carried = (HandOverToken, oneshot::Sender<Result<(), HostError>>);

impl MigrationEntry {
    pub fn new(record: MigrationRecord, control: Arc<Control>) -> Self {
        let told = Mutex::new(Told { state: record.state, rounds: record.rounds.len() });
        Self {
            since: Instant::now(),
            elapsed_before_ms: record.progress.elapsed_ms,
            id: record.id,
            record: RwLock::new(record),
            writing: Mutex::default(),
            changing: Mutex::default(),
            control,
            told,
            workers: RwLock::default(),
            digests: RwLock::default(),
            tokens: Mutex::default(),
        }
    }

    /// Gives it its place among the host's migrations, before anybody is told of it.
    pub fn put_in_order(&self, order: u64) {
        self.record.write().unwrap_or_else(PoisonError::into_inner).order = order;
    }

    /// Begins to take tokens; those that nobody takes before the receiver goes are refused.
    pub fn take_tokens(&self) -> mpsc::Receiver<Carried> {
        let (sender, receiver) = mpsc::channel(1);
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    /// Where tokens go, while somebody settles a doubt.
    pub fn tokens(&self) -> Option<mpsc::Sender<Carried>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The record with the live part as it is now.
    pub fn record(&self) -> MigrationRecord {
        let mut record = self.record.read().unwrap_or_else(PoisonError::into_inner).clone();
        if !record.state.is_terminal() {
            let live = self.control.live();
            record.state = live.state;
            record.progress = live.progress;
            record.rounds = live.rounds;
            record.committing = live.committing;
            record.generation += live.version;
            if let Some(workers) = &*self.workers.read().unwrap_or_else(PoisonError::into_inner) {
                workers.show(&mut record);
            }
            // Since it was made, or since this daemon took it up again; never by the difference of two
            // readings of a clock that somebody sets.
            let since = self.since.elapsed().as_millis() as u64;
            record.progress.elapsed_ms = self.elapsed_before_ms.saturating_add(since);
        }
        record
    }

    /// The record as `change` would make it, shown to nobody: to be stored first.
    pub fn next(&self, change: impl FnOnce(&mut MigrationRecord)) -> MigrationRecord {
        let mut next = self.record();
        next.generation += 1;
        change(&mut next);
        next
    }

    /// Changes the fixed part, the live part taken over first.
    pub fn change(&self, change: impl FnOnce(&mut MigrationRecord)) -> MigrationRecord {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.change_held(change)
    }

    /// The same once it is on disk: `store` looks at the record and writes the next one. Nobody else writes
    /// meanwhile, so the migration does not end between the look and the change.
    pub fn write(
        &self,
        store: impl FnOnce(&MigrationRecord) -> Result<(), HostError>,
        change: impl FnOnce(&mut MigrationRecord),
    ) -> Result<MigrationRecord, HostError> {
        self.alone(|| {
            store(&self.record())?;
            Ok(self.change(change))
        })
    }

    /// Does something that writes the record, while nobody else does.
    pub fn alone<T>(&self, act: impl FnOnce() -> T) -> T {
        waiting::with_thread(|| {
            let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            act()
        })
    }

    /// A record that was made earlier, with what was asked for since: that is in the record that is shown.
    pub fn with_asked(&self, made: MigrationRecord) -> MigrationRecord {
        let now = self.record.read().unwrap_or_else(PoisonError::into_inner);
        MigrationRecord {
            spec: now.spec.clone().or(made.spec),
            resolution: now.resolution.clone().or(made.resolution),
            cancel_requested_at: now.cancel_requested_at.or(made.cancel_requested_at),
            ..made
        }
    }

    /// Does something beside the record while nobody changes it, and waits for nothing meanwhile.
    pub fn hold<T>(&self, act: impl FnOnce(MigrationRecord) -> T) -> T {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        act(self.record())
    }

    /// Shows a record that is stored with the event of it.
    pub fn show_told(&self, record: MigrationRecord) {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = record.generation.max(self.record().generation + 1);
        let record = MigrationRecord { generation, ..self.with_asked(record) };
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) =
            Told { state: record.state, rounds: record.rounds.len() };
        self.show(record);
    }

    fn show(&self, record: MigrationRecord) {
        if record.state.is_terminal() {
            *self.workers.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = record;
    }

    fn change_held(&self, change: impl FnOnce(&mut MigrationRecord)) -> MigrationRecord {
        let next = self.next(change);
        self.show(next.clone());
        next
    }

    /// Shows what a mirror's workers do for this migration from now on, until it ends.
    pub fn attach(&self, watch: MirrorWatch) {
        let base = watch.stats().iter().map(|s| s.cpu_ns).collect();
        let workers = Workers { watch, base, since: Instant::now() };
        *self.workers.write().unwrap_or_else(PoisonError::into_inner) = Some(workers);
    }

    /// Calls `tell` for what changed since it was called last.
    pub fn tell(&self, mut tell: impl FnMut(&MigrationRecord, Change)) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.record();
        if record.rounds.len() > told.rounds {
            tell(&record, Change::RoundFinished);
        }
        if record.state != told.state {
            tell(&record, Change::StateChanged);
        }
        *told = Told { state: record.state, rounds: record.rounds.len() };
    }

    pub fn keep_digests(&self, digests: Option<Vec<[u8; 16]>>) {
        *self.digests.write().unwrap_or_else(PoisonError::into_inner) =
            digests.map(|digests| Arc::new(PageDigests { digests }));
    }

    pub fn page_digests(&self) -> Option<Arc<PageDigests>> {
        self.digests.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
