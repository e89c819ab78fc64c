//! What readers see of a guest without asking its owner, and how its owner is asked.

use std::sync::{Arc, RwLock};
use std::time::Instant;

use flume::{Sender, TrySendError, WeakSender};
use jiff::Timestamp;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::guest::{Console, EncryptionStatus, Machine, MigrationControl, Readiness};
use crate::host::act::Act;
use crate::host::guests::command::{Command, Envelope};
use crate::host::registry::{Facet, Listed, Registry};
use crate::host::{ConsoleChunk, GuestRecord, GuestState, HostError, Labels, ResourceKind};
use crate::memory::Backing;
use crate::sync::Shared;

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
    name: Arc<str>,
    created_at: Timestamp,
    record: RwLock<Arc<GuestRecord>>,
    /// The one that lasts: what waits in a queue goes with the last of them, and whoever waits for its
    /// answer learns so. The owner takes it away when it ends.
    sender: RwLock<Option<Sender<Envelope>>>,
    senses: RwLock<Option<Senses>>,
    /// While it is unconfirmed: what is missing to know whose it is.
    missing: RwLock<Vec<String>>,
}

/// Tells a guest's owner what nobody asked for, without keeping its queue.
pub(in crate::host) struct Teller(Option<WeakSender<Envelope>>);

impl Teller {
    /// The command is lost where the queue is full or the owner gone.
    pub fn tell(&self, command: Command) {
        if let Some(sender) = self.0.as_ref().and_then(WeakSender::upgrade) {
            let _ = sender.try_send(Box::new((command, None)));
        }
    }
}

impl Listed for GuestEntry {
    fn id(&self) -> Uuid {
        self.id
    }

    fn name(&self) -> Option<Arc<str>> {
        Some(Arc::clone(&self.name))
    }

    fn created_at(&self) -> Timestamp {
        self.created_at
    }

    fn facets(&self) -> Vec<Facet> {
        let record = self.published();
        Facet::of_labels(&record.spec.labels).chain([Facet::State(record.state.name())]).collect()
    }
}

impl GuestEntry {
    pub fn new(record: GuestRecord, sender: Sender<Envelope>) -> Self {
        let (id, name, created_at) = (record.id, record.spec.name.as_str().into(), record.created_at);
        let (record, sender) = (RwLock::new(Arc::new(record)), RwLock::new(Some(sender)));
        Self { id, name, created_at, record, sender, senses: RwLock::default(), missing: RwLock::default() }
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
        let mut noted = self.missing.to_write();
        let news = *noted != missing;
        *noted = missing;
        news
    }

    /// Why an unconfirmed guest does not start.
    pub fn unconfirmed(&self) -> HostError {
        let missing = self.missing.to_read().clone();
        HostError::GuestUnconfirmed { missing }
    }

    fn published(&self) -> Arc<GuestRecord> {
        Arc::clone(&self.record.to_read())
    }

    pub fn labels(&self) -> Labels {
        self.published().spec.labels.clone()
    }

    /// Shows another record, by which the guest is found among `others` from the same moment on.
    pub fn show(self: &Arc<Self>, record: GuestRecord, others: &mut Registry<Self>) {
        *self.record.to_write() = Arc::new(record);
        others.refresh(self);
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
        *self.senses.to_write() = Some(senses);
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
        self.senses.to_read().clone()
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
        let gone = || HostError::missing(ResourceKind::Guest, self.id.to_string());
        let sender = self.sender().ok_or_else(gone)?;
        sender.into_send_async(Box::new((make(reply), Act::current()))).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The same from a thread of its own.
    pub fn ask_blocking<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, HostError>>) -> Command,
    ) -> Result<T, HostError> {
        let (reply, answer) = oneshot::channel();
        let gone = || HostError::missing(ResourceKind::Guest, self.id.to_string());
        let sender = self.sender().ok_or_else(gone)?;
        sender.send(Box::new((make(reply), Act::current()))).map_err(|_| gone())?;
        drop(sender);
        answer.blocking_recv().map_err(|_| gone())?
    }

    /// Sends a command from a thread of its own; false when the guest is gone.
    pub fn tell_blocking(&self, command: Command) -> bool {
        self.sender().is_some_and(|sender| sender.send(Box::new((command, None))).is_ok())
    }

    /// Ends the owner of an entry that was replaced.
    pub fn dismiss(&self) {
        let (done, _) = oneshot::channel();
        let told = self.sender().is_none_or(|sender| {
            !matches!(sender.try_send(Box::new((Command::Shutdown(done), None))), Err(TrySendError::Full(_)))
        });
        if !told {
            tracing::warn!(guest = %self.id, "a replaced guest's owner could not be dismissed");
        }
    }

    /// Sends a command that nobody asked for; false when the guest is gone.
    pub async fn tell(&self, command: Command) -> bool {
        match self.sender() {
            Some(sender) => sender.into_send_async(Box::new((command, None))).await.is_ok(),
            None => false,
        }
    }

    /// For those who tell the owner something for as long as there is one.
    pub fn teller(&self) -> Teller {
        Teller(self.sender.to_read().as_ref().map(Sender::downgrade))
    }

    /// The owner has ended: nothing more is taken, and what waits is dropped.
    pub fn close(&self) {
        self.sender.to_write().take();
    }

    fn sender(&self) -> Option<Sender<Envelope>> {
        self.sender.to_read().clone()
    }
}
