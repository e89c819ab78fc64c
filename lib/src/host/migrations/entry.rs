//! What readers see of a migration without asking whoever runs it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};
use std::time::Instant;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::host::events::{Change, Told};
use crate::host::registry::{Facet, Listed, Registry};
use crate::host::{HandOverToken, HostError, MigrationRecord, PageDigests, WorkerInfo};
use crate::migration::Control;
use crate::mirror::{MirrorStats, MirrorWatch};
use crate::sync::{Locked, Shared};
use crate::waiting;

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
    guest: Uuid,
    guest_name: Arc<str>,
    created_at: Timestamp,
    /// The registry that it is in, which is to find it by what it is shown as.
    among: OnceLock<Weak<RwLock<Registry<Self>>>>,
    record: RwLock<MigrationRecord>,
    /// Whether it is on disk: until then it may still be refused, and lists do not have it.
    listed: AtomicBool,
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

impl Listed for MigrationEntry {
    fn id(&self) -> Uuid {
        self.id
    }

    fn name(&self) -> Option<Arc<str>> {
        None
    }

    fn created_at(&self) -> Timestamp {
        self.created_at
    }

    fn facets(&self) -> Vec<Facet> {
        let (state, labels) = {
            let record = self.record.to_read();
            (record.state, Facet::of_labels(&record.labels).collect::<Vec<_>>())
        };
        let state = if state.is_terminal() { state } else { self.control.state() };
        let of_guest = [Facet::Guest(self.guest), Facet::GuestName(Arc::clone(&self.guest_name))];
        of_guest.into_iter().chain([Facet::State(state.name())]).chain(labels).collect()
    }
}

impl MigrationEntry {
    pub fn new(record: MigrationRecord, control: Arc<Control>) -> Self {
        let told = Mutex::new(Told { state: record.state, rounds: record.rounds.len() });
        Self {
            since: Instant::now(),
            elapsed_before_ms: record.progress.elapsed_ms,
            id: record.id,
            guest: record.guest,
            guest_name: record.guest_name.as_str().into(),
            created_at: record.created_at,
            among: OnceLock::new(),
            record: RwLock::new(record),
            listed: AtomicBool::new(false),
            writing: Mutex::default(),
            changing: Mutex::default(),
            control,
            told,
            workers: RwLock::default(),
            digests: RwLock::default(),
            tokens: Mutex::default(),
        }
    }

    /// Lists it from now on: it is stored, and what becomes of it is told.
    pub fn list(&self) {
        self.listed.store(true, Ordering::Release);
    }

    /// Whether lists have it.
    pub fn is_listed(&self) -> bool {
        self.listed.load(Ordering::Acquire)
    }

    /// Gives it its place among the host's migrations, before anybody is told of it.
    pub fn put_in_order(&self, order: u64) {
        self.record.to_write().order = order;
    }

    /// Begins to take tokens; those that nobody takes before the receiver goes are refused.
    pub fn take_tokens(&self) -> mpsc::Receiver<Carried> {
        let (sender, receiver) = mpsc::channel(1);
        *self.tokens.locked() = Some(sender);
        receiver
    }

    /// Where tokens go, while somebody settles a doubt.
    pub fn tokens(&self) -> Option<mpsc::Sender<Carried>> {
        self.tokens.locked().clone()
    }

    /// The record with the live part as it is now.
    pub fn record(&self) -> MigrationRecord {
        let mut record = self.record.to_read().clone();
        if !record.state.is_terminal() {
            let live = self.control.live();
            record.state = live.state;
            record.progress = live.progress;
            record.rounds = live.rounds;
            record.committing = live.committing;
            record.audit = live.audit;
            record.evidence = live.evidence.or(record.evidence);
            record.generation += live.version;
            if let Some(workers) = &*self.workers.to_read() {
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
        let _alone = self.changing.locked();
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
            let _alone = self.writing.locked();
            act()
        })
    }

    /// A record that was made earlier, with what was asked for since: that is in the record that is shown.
    pub fn with_asked(&self, made: MigrationRecord) -> MigrationRecord {
        let now = self.record.to_read();
        MigrationRecord {
            spec: now.spec.clone().or(made.spec),
            resolution: now.resolution.clone().or(made.resolution),
            cancel_requested_at: now.cancel_requested_at.or(made.cancel_requested_at),
            ..made
        }
    }

    /// Does something beside the record while nobody changes it, and waits for nothing meanwhile.
    pub fn hold<T>(&self, act: impl FnOnce(MigrationRecord) -> T) -> T {
        let _alone = self.changing.locked();
        act(self.record())
    }

    /// Shows a record that is stored with the event of it.
    pub fn show_told(&self, record: MigrationRecord) {
        let _alone = self.changing.locked();
        let generation = record.generation.max(self.record().generation + 1);
        let record = MigrationRecord { generation, ..self.with_asked(record) };
        *self.told.locked() = Told { state: record.state, rounds: record.rounds.len() };
        self.show(record);
    }

    fn show(&self, record: MigrationRecord) {
        if record.state.is_terminal() {
            *self.workers.to_write() = None;
        }
        *self.record.to_write() = record;
        self.refresh();
    }

    /// Puts it into a registry, which finds it by what it is shown as from now on; says whether its id was
    /// free there.
    pub fn join(self: &Arc<Self>, registry: &Arc<RwLock<Registry<Self>>>) -> bool {
        let mut entries = registry.to_write();
        if entries.contains_key(&self.id) {
            return false;
        }
        // An entry is in one registry for life.
        let _ = self.among.set(Arc::downgrade(registry));
        entries.insert(Arc::clone(self));
        true
    }

    /// Has its registry find it by what it is now. No lock of an entry is held meanwhile that the registry
    /// takes.
    pub fn refresh(&self) {
        let Some(registry) = self.among.get().and_then(Weak::upgrade) else { return };
        // Most of what changes is nothing that it is found by.
        if registry.to_read().is_stale(&self.id) {
            registry.to_write().refresh_id(&self.id);
        }
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
        *self.workers.to_write() = Some(workers);
    }

    /// Calls `tell` for what changed since it was called last.
    pub fn tell(&self, mut tell: impl FnMut(&MigrationRecord, Change)) {
        let mut told = self.told.locked();
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
        *self.digests.to_write() = digests.map(|digests| Arc::new(PageDigests { digests }));
    }

    pub fn page_digests(&self) -> Option<Arc<PageDigests>> {
        self.digests.to_read().clone()
    }
}
