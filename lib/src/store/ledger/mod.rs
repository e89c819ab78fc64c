//! What is appended and what expires: event log, audit log, and keyed records with a time to live; and
//! writing anything together with an entry of theirs.
//!
//! Owns: their tables, retention, the way to the writer's thread; reading is with `logs` and `keyed`.
//! Must not know: what bodies mean.
//!
//! The ledger is in the store's file, over connections of its own. Writers hand their work to one thread,
//! which runs everything that waits in one transaction: a commit costs a sync of the disk, and 32 callers
//! share it. Whoever waits is told after the commit; readers and watchers of a log see entries only when they
//! are on disk and whoever wrote them has been told.

mod keyed;
mod logs;

#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use jiff::Timestamp;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

use super::hours::{self, Clocks, Hours, Kernel, Note};
use super::rows::Rows;
use super::singles::{EPOCH, Epoch};
use super::writer::{self, Ground, Health, Tail, Tell, Work, Writing};
use super::{Batch, Store, StoreError, open};
use crate::sync::Locked;
use crate::threads::{self, Role};
use crate::waiting;
use logs::bounds_of;

pub use keyed::{Kept, Space};
pub use logs::{Bounds, Entry, Log, Look, LookError, SCAN_MAX};

/// Work that waits at most; more make writers wait.
const QUEUE: usize = 4096;
/// Entries of the event log that are kept, when nobody says otherwise.
pub const EVENTS_KEPT: u64 = 100_000;
/// Entries of the audit log that are kept.
pub const AUDIT_KEPT: u64 = 1_000_000;

/// Tables of the ledger: part of the schema from version 2 on.
pub(super) const SCHEMA: &str = "
    CREATE TABLE event (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT;
    CREATE TABLE audit (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT;
    CREATE TABLE keyed (
        space TEXT NOT NULL,
        key TEXT NOT NULL,
        expires INTEGER,
        body TEXT NOT NULL,
        digest BLOB NOT NULL,
        PRIMARY KEY (space, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX keyed_expires ON keyed (expires) WHERE expires IS NOT NULL;
";
/// What came of what the audit log says was begun; `seq` is the entry's. Part of the schema from version 3
/// on.
pub(super) const OUTCOMES: &str = "
    CREATE TABLE audit_outcome (
        seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL, digest BLOB NOT NULL
    ) STRICT;
";

/// The logs and keyed records of an open database.
pub struct Ledger {
    epoch: String,
    sender: Option<SyncSender<Work>>,
    writer: Option<JoinHandle<()>>,
    health: Arc<Health>,
    reader: Mutex<Connection>,
    ground: Arc<Ground>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Ledger {
    /// Opens the ledger in the database that a store has open. Keeps `events_kept` events.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`], [`StoreError::Files`].
    pub fn open(store: &Store, events_kept: u64) -> Result<Self, StoreError> {
        Self::open_by(Box::new(Kernel), store, events_kept)
    }

    fn open_by(clocks: Box<dyn Clocks>, store: &Store, events_kept: u64) -> Result<Self, StoreError> {
        let path = &store.path;
        let (writer, reader) = (open::another(path)?, open::another(path)?);
        let keeper = Arc::clone(&store.keeper);
        let (epoch, hours) =
            store.transaction(|t| Ok::<_, StoreError>((epoch_of(t)?, hours_of(t, clocks)?)))?;
        let tail = |log: Log, kept: u64| -> Result<Arc<Tail>, StoreError> {
            let last = bounds_of(&reader, log)?.latest;
            let (next, committed) = (AtomicU64::new(last), watch::Sender::new(last));
            Ok(Arc::new(Tail { log, kept, next, committed }))
        };
        let (events, audit) = (tail(Log::Event, events_kept.max(1))?, tail(Log::Audit, AUDIT_KEPT)?);
        let (sender, receiver) = sync_channel(QUEUE);
        let ground = Arc::new(Ground { tails: [events, audit], hours });
        let health = Arc::new(Health::default());
        let (its, theirs) = (Arc::clone(&ground), Arc::clone(&health));
        let thread = std::thread::Builder::new().name("ledger".into());
        let writing = move || {
            threads::begin(Role::Store);
            writer::write_all(writer, &keeper, &receiver, &its, &theirs)
        };
        let writer = thread.spawn(writing).map_err(|source| {
            StoreError::Files(super::PrivateFileError::Io {
                operation: "start the writer of",
                path: path.clone(),
                source,
            })
        })?;
        let reader = Mutex::new(reader);
        Ok(Self { epoch, sender: Some(sender), writer: Some(writer), health, reader, ground })
    }

    /// Made with the database: numbers of another epoch mean nothing here. 16 hexadecimal digits.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Appends without waiting for the disk; an entry that the disk does not take is owed. Entries get their
    /// numbers in the order of the calls.
    pub fn append(&self, log: Log, body: String) {
        let mut batch = Batch::new();
        batch.append(log, body);
        self.queue_batch(batch, true, || {}, |_| {});
    }

    /// Appends; returns the entry's number when it is on disk.
    ///
    /// # Errors
    /// Whatever keeps the database from taking it.
    pub async fn append_durably(&self, log: Log, body: String) -> Result<u64, StoreError> {
        let (ground, at) = (Arc::clone(&self.ground), Timestamp::now());
        self.run(move |t| writer::append(t, &ground, log, at, &body)).await
    }

    /// Writes a batch; returns when it is on disk.
    ///
    /// # Errors
    /// Nothing of it was written: whatever keeps the database from taking it.
    pub async fn commit(&self, batch: Batch) -> Result<(), StoreError> {
        self.commit_and(batch, || {}).await
    }

    /// The same; calls `then` when the batch is on disk, before any reader of a log sees an entry of it. It
    /// is called on the writer's thread and must not wait for anybody who waits for the ledger: no lock that
    /// it takes is ever held by somebody who writes.
    ///
    /// # Errors
    /// As [`Ledger::commit`]; `then` is not called.
    pub async fn commit_and(
        &self,
        batch: Batch,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<(), StoreError> {
        let (told, done) = oneshot::channel();
        self.queue_batch(batch, false, then, move |result| _ = told.send(result));
        done.await.unwrap_or_else(|_| Err(gone()))
    }

    /// As [`Ledger::commit_and`], for those who may wait: the thread waits with them.
    ///
    /// # Errors
    /// As [`Ledger::commit`].
    pub fn commit_blocking(
        &self,
        batch: Batch,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<(), StoreError> {
        let (told, done) = sync_channel(1);
        self.queue_batch(batch, false, then, move |result| _ = told.send(result));
        waiting::with_thread(|| done.recv()).unwrap_or_else(|_| Err(gone()))
    }

    /// Writes what has happened already; returns when it is on disk, or when the disk does not take it now.
    /// It is then owed: it will be written before everything that is written later, as soon as that works.
    /// `then` is called in either case.
    ///
    /// # Errors
    /// Why it is not on disk yet.
    pub fn owe_blocking(&self, batch: Batch, then: impl FnOnce() + Send + 'static) -> Result<(), StoreError> {
        let (told, done) = sync_channel(1);
        self.queue_batch(batch, true, then, move |result| _ = told.send(result));
        waiting::with_thread(|| done.recv()).unwrap_or_else(|_| Err(gone()))
    }

    /// As [`Ledger::owe_blocking`], without a thread that waits.
    ///
    /// # Errors
    /// As there.
    pub async fn owe(&self, batch: Batch) -> Result<(), StoreError> {
        let (told, done) = oneshot::channel();
        self.queue_batch(batch, true, || {}, move |result| _ = told.send(result));
        done.await.unwrap_or_else(|_| Err(gone()))
    }

    fn queue_batch(
        &self,
        batch: Batch,
        owed: bool,
        then: impl FnOnce() + Send + 'static,
        tell: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        self.queue(Work::Batch { batch, owed, then: Box::new(then), tell: Box::new(tell) });
    }

    /// Whether writing works, and what is not on disk yet.
    pub fn writing(&self) -> Writing {
        self.health.now()
    }

    /// Writes something for its own sake.
    ///
    /// # Errors
    /// Whatever keeps the database from taking it.
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.run(writer::probe).await
    }

    /// Returns when everything appended so far is on disk, or cannot get there.
    pub async fn flush(&self) {
        let _ = self.run(|_| Ok(())).await;
    }

    async fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Rows<'_>) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let (told, done) = oneshot::channel();
        self.submit(work, move |result| _ = told.send(result));
        done.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Has `work` done; `told` hears what it gave when that is on disk, or what kept it from getting there.
    fn submit<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Rows<'_>) -> Result<R, StoreError> + Send + 'static,
        told: impl FnOnce(Result<R, StoreError>) + Send + 'static,
    ) {
        // Whoever comes first has it: the work that was done, or its refusal.
        let told = Arc::new(Mutex::new(Some(told)));
        let take = |told: &Mutex<Option<_>>| told.locked().take();
        let refused = Arc::clone(&told);
        let work = move |t: &Rows<'_>| {
            let found = work(t)?;
            let tell = move |result: Result<(), StoreError>| {
                if let Some(told) = take(&told) {
                    told(result.map(|()| found));
                }
            };
            Ok(Box::new(tell) as Tell)
        };
        let otherwise = move |result: Result<(), StoreError>| {
            if let Some(told) = take(&refused) {
                told(Err(result.err().unwrap_or_else(gone)));
            }
        };
        self.queue(Work::Free(Box::new(work), Box::new(otherwise)));
    }

    fn queue(&self, work: Work) {
        writer::send(self.sender.as_ref(), work);
    }

    fn tail(&self, log: Log) -> &Arc<Tail> {
        let [events, audit] = &self.ground.tails;
        match log {
            Log::Event => events,
            Log::Audit => audit,
        }
    }

    fn reader(&self) -> MutexGuard<'_, Connection> {
        self.reader.locked()
    }
}

impl Drop for Ledger {
    /// Everything that was appended gets to the disk first.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn epoch_of(t: &super::Transaction<'_>) -> Result<String, StoreError> {
    if let Some(Epoch { epoch }) = t.meta_get(EPOCH)? {
        return Ok(epoch);
    }
    let fresh = Epoch::fresh();
    t.meta_put(EPOCH, &fresh)?;
    Ok(fresh.epoch)
}

/// Goes on counting time, and notes from where.
fn hours_of(t: &super::Transaction<'_>, clocks: Box<dyn Clocks>) -> Result<Hours, StoreError> {
    let hours = Hours::new(t.meta_get::<Note>(hours::KEY)?.as_ref(), clocks);
    t.meta_put(hours::KEY, &hours.note())?;
    Ok(hours)
}

fn gone() -> StoreError {
    // The writer's thread has ended; its log says why.
    StoreError::Sqlite(rusqlite::Error::ExecuteReturnedResults)
}
