//! What is appended and what expires: event log, audit log, and keyed records with a time to live; and
//! writing anything together with an entry of theirs.
//!
//! Owns: their tables, retention, the way to the writer's thread. Must not know: what bodies mean.
//!
//! The ledger is in the store's file, over connections of its own. Writers hand their work to one thread,
//! which runs everything that waits in one transaction: a commit costs a sync of the disk, and 32 callers
//! share it. Whoever waits is told after the commit; readers and watchers of a log see entries only when they
//! are on disk and whoever wrote them has been told.

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::hours::{self, Clocks, Count, Hours, Kernel, Note};
use super::rows::Rows;
use super::writer::{self, Ground, Health, Tail, Tell, Work, Writing};
use super::{Batch, DocumentRef, Store, StoreError, open};
use crate::sync::Locked;
use crate::waiting;

/// Work that waits at most; more make writers wait.
const QUEUE: usize = 4096;
/// Rows that one look through a log reads at most, matching or not.
pub const SCAN_MAX: usize = 20_000;
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

/// An append-only log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Changes of resources, for followers.
    Event,
    /// Who asked for what.
    Audit,
}

impl Log {
    pub(super) const fn table(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Audit => "audit",
        }
    }
}

/// Records that are found by a key of the caller's; each space has its own keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Answers to requests that may be repeated.
    Idempotency,
    /// Hashes of bearer tokens with what they allow.
    Token,
    /// One-time tickets for incoming migrations.
    Ticket,
}

impl Space {
    pub(super) const fn stored(self) -> &'static str {
        match self {
            Self::Idempotency => "idempotency",
            Self::Token => "token",
            Self::Ticket => "ticket",
        }
    }

    /// What is promised is kept for as long; what opens something opens it no longer.
    pub(super) const fn count(self) -> Count {
        match self {
            Self::Idempotency => Count::AtLeast,
            Self::Token | Self::Ticket => Count::AtMost,
        }
    }

    const ALL: [Self; 3] = [Self::Idempotency, Self::Token, Self::Ticket];
}

/// A record with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The record's text.
    pub body: String,
    /// How long it is there; `None`: it has no end.
    pub left: Option<Duration>,
}

/// An entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place: 1 for the first ever, without gaps.
    pub seq: u64,
    /// When it was appended, to the millisecond.
    pub at: Timestamp,
    /// The entry's text.
    pub body: String,
}

impl Entry {
    /// What was appended to `log`, as what it is.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`].
    pub fn read<T: DeserializeOwned>(&self, log: Log) -> Result<T, StoreError> {
        let document = || DocumentRef::Entry(log, self.seq);
        serde_json::from_str(&self.body)
            .map_err(|source| StoreError::Unreadable { document: document(), source })
    }
}

impl Space {
    /// The record that is kept under `key`, as what it is. One that cannot be read is not as good as none:
    /// whoever is told that there is none would act on it.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`].
    pub fn read<T: DeserializeOwned>(self, key: &str, body: &str) -> Result<T, StoreError> {
        let document = || DocumentRef::Keyed(self, key.to_owned());
        serde_json::from_str(body).map_err(|source| StoreError::Unreadable { document: document(), source })
    }
}

/// What a log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Oldest entry that is kept; one above `latest` when there is none.
    pub oldest: u64,
    /// Newest entry; 0 when there never was one.
    pub latest: u64,
}

/// One look through a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Entries that were wanted, in order.
    pub entries: Vec<Entry>,
    /// The last entry that was looked at, wanted or not: where the next look continues.
    pub seen: u64,
    /// Whether more entries follow.
    pub more: bool,
}

/// Why a look through a log found nothing.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// What should follow is not kept any more, or never was.
    #[error("the log holds {} to {}", .0.oldest, .0.latest)]
    Expired(Bounds),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

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
        let writing = move || writer::write_all(writer, &keeper, &receiver, &its, &theirs);
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

    /// What came of entries of the audit log, by their numbers; those that nothing came of are left out.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] and its kind.
    pub fn outcomes(&self, seqs: &[u64]) -> Result<Vec<Entry>, StoreError> {
        let reader = self.reader();
        let mut statement = reader
            .prepare_cached("SELECT seq, at, body FROM audit_outcome WHERE seq = ?1")
            .map_err(StoreError::from)?;
        let mut found = Vec::new();
        for seq in seqs {
            let row = statement.query_row([*seq as i64], entry_of).optional().map_err(StoreError::from)?;
            found.extend(row);
        }
        Ok(found)
    }

    /// What a log holds on disk.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn bounds(&self, log: Log) -> Result<Bounds, StoreError> {
        bounds_of(&self.reader(), log)
    }

    /// The number of the newest entry on disk, as it grows.
    pub fn watch(&self, log: Log) -> watch::Receiver<u64> {
        self.tail(log).committed.subscribe()
    }

    /// Up to `limit` wanted entries that follow entry `after`; looks at no more than [`SCAN_MAX`].
    ///
    /// # Errors
    /// [`LookError::Expired`] when what follows `after` is not kept any more, or `after` never was.
    pub fn look(
        &self,
        log: Log,
        after: u64,
        limit: usize,
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Look, LookError> {
        let reader = self.reader();
        // What is on disk is shown when those who wrote it have been told.
        let committed = *self.tail(log).committed.borrow();
        let bounds = bounds_of(&reader, log)?;
        let bounds = Bounds { latest: bounds.latest.min(committed), ..bounds };
        if after > bounds.latest || after + 1 < bounds.oldest {
            return Err(LookError::Expired(bounds));
        }
        let sql = format!(
            "SELECT seq, at, body FROM {} WHERE seq > ?1 AND seq <= ?3 ORDER BY seq LIMIT ?2",
            log.table()
        );
        let mut statement = reader.prepare_cached(&sql).map_err(StoreError::from)?;
        let asked = params![after as i64, SCAN_MAX as i64, bounds.latest as i64];
        let rows = statement.query_map(asked, entry_of);
        let mut look = Look { entries: Vec::new(), seen: after, more: false };
        for row in rows.map_err(StoreError::from)? {
            let entry = row.map_err(StoreError::from)?;
            look.seen = entry.seq;
            if wanted(&entry) {
                look.entries.push(entry);
            }
            if look.entries.len() >= limit {
                break;
            }
        }
        look.more = look.seen < bounds.latest;
        Ok(look)
    }

    /// Up to `limit` wanted entries before entry `before` (`None`: from the newest), newest first.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn look_back(
        &self,
        log: Log,
        before: Option<u64>,
        limit: usize,
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Look, StoreError> {
        let reader = self.reader();
        let sql =
            format!("SELECT seq, at, body FROM {} WHERE seq < ?1 ORDER BY seq DESC LIMIT ?2", log.table());
        let mut statement = reader.prepare_cached(&sql).map_err(StoreError::from)?;
        let before = before.and_then(|b| i64::try_from(b).ok()).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![before, SCAN_MAX as i64], entry_of);
        let mut look = Look { entries: Vec::new(), seen: 0, more: false };
        for row in rows.map_err(StoreError::from)? {
            let entry = row.map_err(StoreError::from)?;
            look.seen = entry.seq;
            if wanted(&entry) {
                look.entries.push(entry);
            }
            if look.entries.len() >= limit {
                break;
            }
        }
        look.more = look.seen > bounds_of(&reader, log)?.oldest;
        Ok(look)
    }

    /// The record with this key, unless it has expired.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn find(&self, space: Space, key: &str) -> Result<Option<Kept>, StoreError> {
        self.reader()
            .prepare_cached(
                "SELECT body, expires FROM keyed
                 WHERE space = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)",
            )
            .and_then(|mut s| {
                let read = |row: &rusqlite::Row<'_>| Ok(self.kept(space, row.get(0)?, row.get(1)?));
                s.query_row(params![space.stored(), key, self.now(space)], read).optional()
            })
            .map_err(StoreError::from)
    }

    /// Every record of a space that has not expired, by key.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn all(&self, space: Space) -> Result<Vec<(String, Kept)>, StoreError> {
        let reader = self.reader();
        let mut statement = reader
            .prepare_cached(
                "SELECT key, body, expires FROM keyed WHERE space = ?1 AND (expires IS NULL OR expires > ?2)
                 ORDER BY key",
            )
            .map_err(StoreError::from)?;
        let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, self.kept(space, row.get(1)?, row.get(2)?)));
        let rows = statement.query_map(params![space.stored(), self.now(space)], read);
        rows.and_then(Iterator::collect).map_err(StoreError::from)
    }

    fn kept(&self, space: Space, body: String, expires: Option<i64>) -> Kept {
        Kept { body, left: expires.map(|end| self.ground.hours.left(space.count(), end)) }
    }

    fn now(&self, space: Space) -> i64 {
        self.ground.hours.now(space.count())
    }

    /// Writes a record unless its key is there (an expired one does not count). Gives what is there
    /// otherwise.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], whatever keeps the database from taking it.
    pub async fn claim(
        &self,
        space: Space,
        key: String,
        life: Option<Duration>,
        body: String,
    ) -> Result<Option<String>, StoreError> {
        let mut batch = Batch::new();
        batch.keyed_put(space, key.clone(), life, body)?;
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            for space in Space::ALL {
                t.expire_keyed(space, ground.hours.now(space.count())).map_err(StoreError::from)?;
            }
            let there = t
                .prepare_cached("SELECT body FROM keyed WHERE space = ?1 AND key = ?2")
                .and_then(|mut s| {
                    s.query_row(params![space.stored(), key], |row| row.get::<_, String>(0)).optional()
                })
                .map_err(StoreError::from)?;
            if there.is_none() {
                writer::write_batch(t, &batch, &ground)?;
            }
            Ok(there)
        })
        .await
    }

    /// Writes a record, replacing the one with this key.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], whatever keeps the database from taking it.
    pub async fn put(
        &self,
        space: Space,
        key: String,
        life: Option<Duration>,
        body: String,
    ) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        batch.keyed_put(space, key, life, body)?;
        self.commit(batch).await
    }

    /// Removes a record; says whether it was there and had not expired. Of several callers one is told so.
    ///
    /// # Errors
    /// Whatever keeps the database from taking it.
    pub async fn take(&self, space: Space, key: String) -> Result<Option<String>, StoreError> {
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            t.take_keyed(space, &key, ground.hours.now(space.count())).map_err(StoreError::from)
        })
        .await
    }

    /// The same together with a batch: nothing of it is written when there was no record.
    ///
    /// # Errors
    /// As [`Ledger::take`].
    pub async fn take_with(
        &self,
        space: Space,
        key: String,
        batch: Batch,
    ) -> Result<Option<String>, StoreError> {
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            let now = ground.hours.now(space.count());
            let there = t.take_keyed(space, &key, now).map_err(StoreError::from)?;
            if there.is_some() {
                writer::write_batch(t, &batch, &ground)?;
            }
            Ok(there)
        })
        .await
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

fn entry_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let at: i64 = row.get(1)?;
    // A time beyond all times is damage; the entry is worth more than its time.
    let at = Timestamp::from_millisecond(at).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok(Entry { seq: row.get::<_, i64>(0)? as u64, at, body: row.get(2)? })
}

fn bounds_of(connection: &Connection, log: Log) -> Result<Bounds, StoreError> {
    let sql = match log {
        Log::Event => "SELECT (SELECT min(seq) FROM event), (SELECT max(seq) FROM event)",
        Log::Audit => "SELECT (SELECT min(seq) FROM audit), (SELECT max(seq) FROM audit)",
    };
    let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?));
    let (oldest, latest) =
        connection.prepare_cached(sql).and_then(|mut s| s.query_row([], read)).map_err(StoreError::from)?;
    Ok(Bounds { oldest: oldest.unwrap_or(1) as u64, latest: latest.unwrap_or(0) as u64 })
}

fn epoch_of(t: &super::Transaction<'_>) -> Result<String, StoreError> {
    if let Some(epoch) = t.meta_get("epoch")? {
        return Ok(epoch);
    }
    let fresh = format!("{:016x}", Uuid::new_v4().as_u64_pair().0);
    t.meta_put("epoch", &fresh)?;
    Ok(fresh)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::hours::tests::Set;
    use super::*;
    use crate::store::{Kind, Store, Trouble};

    fn open(dir: &Path, kept: u64) -> (Store, Ledger) {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = dir.join("host.db");
        let store = Store::open(&path).unwrap();
        {
            let ledger = Ledger::open(&store, kept).unwrap();
            (store, ledger)
        }
    }

    fn seqs(look: &Look) -> Vec<u64> {
        look.entries.iter().map(|e| e.seq).collect()
    }

    #[tokio::test]
    async fn numbers_go_on_after_reopening_and_old_entries_go() {
        let dir = tempfile::tempdir().unwrap();
        let epoch = {
            let (_store, ledger) = open(dir.path(), 10);
            for n in 1..=7 {
                ledger.append(Log::Event, format!("{n}"));
            }
            ledger.append_durably(Log::Event, "8".into()).await.unwrap();
            assert_eq!(*ledger.watch(Log::Event).borrow(), 8);
            assert_eq!(ledger.bounds(Log::Event).unwrap(), Bounds { oldest: 1, latest: 8 });
            let look = ledger.look(Log::Event, 3, 2, |e| e.body != "5").unwrap();
            assert_eq!((seqs(&look), look.seen, look.more), (vec![4, 6], 6, true));
            let rest = ledger.look(Log::Event, look.seen, 9, |_| true).unwrap();
            assert_eq!((seqs(&rest), rest.more), (vec![7, 8], false));
            ledger.epoch().to_owned()
        };
        let (_store, ledger) = open(dir.path(), 10);
        assert_eq!(ledger.epoch(), epoch);
        for n in 9..=30 {
            ledger.append_durably(Log::Event, format!("{n}")).await.unwrap();
        }
        assert_eq!(ledger.bounds(Log::Event).unwrap(), Bounds { oldest: 21, latest: 30 });
        for (after, fits) in [(19, false), (20, true), (30, true), (31, false)] {
            let look = ledger.look(Log::Event, after, 100, |_| true);
            assert_eq!(look.is_ok(), fits, "{after}: {look:?}");
        }
        assert_eq!(ledger.bounds(Log::Audit).unwrap(), Bounds { oldest: 1, latest: 0 });
        let back = ledger.look_back(Log::Event, Some(29), 3, |_| true).unwrap();
        assert_eq!((seqs(&back), back.more), (vec![28, 27, 26], true));
    }

    #[tokio::test]
    async fn one_of_many_claims_and_one_of_many_takes() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, ledger) = open(dir.path(), 10);
        let ledger = Arc::new(ledger);
        let claims = (0..16).map(|n| {
            let ledger = Arc::clone(&ledger);
            tokio::spawn(
                async move { ledger.claim(Space::Idempotency, "k".into(), None, format!("{n}")).await },
            )
        });
        let mut winners = 0;
        for claim in claims.collect::<Vec<_>>() {
            winners += usize::from(claim.await.unwrap().unwrap().is_none());
        }
        assert_eq!(winners, 1);
        assert_eq!(ledger.find(Space::Token, "k").unwrap(), None, "spaces are apart");
        assert!(ledger.take(Space::Idempotency, "k".into()).await.unwrap().is_some());
        assert!(ledger.take(Space::Idempotency, "k".into()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_has_expired_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, ledger) = open(dir.path(), 10);
        let hour = Duration::from_secs(3600);
        ledger.put(Space::Ticket, "old".into(), Some(Duration::ZERO), "x".into()).await.unwrap();
        ledger.put(Space::Ticket, "new".into(), Some(hour), "y".into()).await.unwrap();
        assert_eq!(ledger.find(Space::Ticket, "old").unwrap(), None);
        let all = ledger.all(Space::Ticket).unwrap();
        let [(key, Kept { body, left: Some(left) })] = &all[..] else { panic!("{all:?}") };
        assert!(key == "new" && body == "y" && !left.is_zero() && *left <= hour, "{all:?}");
        assert_eq!(ledger.take(Space::Ticket, "old".into()).await.unwrap(), None);
        assert_eq!(ledger.claim(Space::Ticket, "old".into(), None, "z".into()).await.unwrap(), None);
        let endless = Kept { body: "z".into(), left: None };
        assert_eq!(ledger.find(Space::Ticket, "old").unwrap(), Some(endless));
    }

    #[tokio::test]
    async fn a_key_is_not_forgotten_early_nor_a_token_good_for_longer_whatever_the_wall_clock_says() {
        const HOUR: i64 = 3_600_000;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let set = Set::new();
        let day = Duration::from_secs(24 * 3600);
        let start = || {
            let store = Store::open(&dir.path().join("host.db")).unwrap();
            let ledger = Ledger::open_by(Box::new(set.clone()), &store, 10).unwrap();
            (store, ledger)
        };
        let (mut store, mut ledger) = start();
        for space in [Space::Idempotency, Space::Token] {
            ledger.put(space, "k".into(), Some(day), "x".into()).await.unwrap();
        }
        let there = |ledger: &Ledger| {
            [Space::Idempotency, Space::Token].map(|s| ledger.find(s, "k").unwrap().is_some())
        };
        for step in [20 * 365 * 24 * HOUR, -40 * 365 * 24 * HOUR, HOUR] {
            set.change(|h| h.wall += step);
            assert_eq!(there(&ledger), [true, true], "{step}");
            drop((ledger, store));
            (store, ledger) = start();
            assert_eq!(there(&ledger), [true, true], "{step}, started again");
            // What is claimed is not claimed again, and what has not expired is not tidied away.
            let again = ledger.claim(Space::Idempotency, "k".into(), Some(day), "y".into()).await.unwrap();
            assert_eq!(again.as_deref(), Some("x"));
        }
        set.pass(23 * HOUR);
        drop((ledger, store));
        // Off for two days, and so its clock says: what was promised is kept, what opens something opens it
        // no longer.
        set.reboot("two", 48 * HOUR);
        (store, ledger) = start();
        assert_eq!(there(&ledger), [true, false]);
        set.pass(2 * HOUR);
        assert_eq!(there(&ledger), [true, false], "the hour before was not noted, and may not have been");
        set.pass(23 * HOUR);
        assert_eq!(there(&ledger), [false, false], "nothing is kept for ever");
        assert_eq!(ledger.claim(Space::Idempotency, "k".into(), None, "z".into()).await.unwrap(), None);
        drop((ledger, store));
    }

    /// Lets the database have no page more, or as many as it likes.
    async fn bound(ledger: &Ledger, pages: Option<u64>) {
        let set = move |t: &Rows<'_>| {
            let now: i64 =
                t.pragma_query_value(None, "page_count", |r| r.get(0)).map_err(StoreError::from)?;
            let most = pages.map_or(1 << 30, |more| now + more as i64);
            t.query_row(&format!("PRAGMA max_page_count = {most}"), [], |_| Ok(())).map_err(StoreError::from)
        };
        ledger.run(set).await.unwrap();
    }

    fn document(name: &str, bytes: usize) -> (Uuid, Batch) {
        let (id, mut batch) = (Uuid::now_v7(), Batch::new());
        batch.put(Kind::Guest, id, Some(name), &"x".repeat(bytes)).unwrap();
        (id, batch)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_that_is_refused_does_not_touch_its_neighbours() {
        let dir = tempfile::tempdir().unwrap();
        let (store, ledger) = open(dir.path(), 1000);
        let ledger = Arc::new(ledger);
        let (id, batch) = document("taken", 10);
        ledger.commit(batch).await.unwrap();
        let all = (0..64).map(|n| {
            let ledger = Arc::clone(&ledger);
            tokio::spawn(async move {
                let (id, mut batch) = document(if n % 2 == 0 { "taken" } else { "free" }, 10);
                let mut other = Batch::new();
                // The entry comes first: it must go with the document that is refused.
                other.append(Log::Event, format!("{n}"));
                let (name, _) = (format!("g{n}"), batch.is_empty());
                if n % 2 != 0 {
                    batch = Batch::new();
                    batch.put(Kind::Guest, id, Some(&name), &n).unwrap();
                }
                other.join(batch);
                (n, id, ledger.commit(other).await)
            })
        });
        let mut made = 0;
        for done in all.collect::<Vec<_>>() {
            let (n, id, result) = done.await.unwrap();
            let there = store.get::<serde_json::Value>(Kind::Guest, id).unwrap().is_some();
            assert_eq!(result.is_ok(), n % 2 != 0, "{n}: {result:?}");
            assert_eq!(there, n % 2 != 0, "{n}");
            assert!(result.is_ok() || matches!(result, Err(StoreError::NameTaken { .. })));
            made += u64::from(there);
        }
        let look = ledger.look(Log::Event, 0, 1000, |_| true).unwrap();
        assert_eq!(seqs(&look), (1..=made).collect::<Vec<_>>());
        assert!(look.entries.iter().all(|e| e.body.parse::<u32>().unwrap() % 2 != 0));
        assert!(store.get::<serde_json::Value>(Kind::Guest, id).unwrap().is_some());
        assert_eq!(ledger.writing().failing, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_has_happened_is_owed_and_written_first_as_soon_as_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let (store, ledger) = open(dir.path(), 1000);
        ledger.append_durably(Log::Event, "before".into()).await.unwrap();
        bound(&ledger, Some(2)).await;
        let (refused, batch) = document("refused", 100_000);
        let error = ledger.commit_and(batch, || panic!("it is not on disk")).await.unwrap_err();
        assert_eq!(error.trouble(), Some(Trouble::Full), "{error:?}");
        assert_eq!(ledger.writing().failing.map(|f| f.0), Some(Trouble::Full));
        bound(&ledger, None).await;
        assert_eq!(ledger.writing().failing, None);
        // From here on somebody keeps the database locked.
        let raw = Connection::open(dir.path().join("host.db")).unwrap();
        raw.execute_batch("BEGIN IMMEDIATE").unwrap();
        let (owed, mut batch) = document("owed", 100_000);
        batch.append(Log::Event, "owed".into());
        let shown = Arc::new(AtomicU64::new(0));
        let theirs = Arc::clone(&shown);
        let then = move || theirs.store(1, std::sync::atomic::Ordering::SeqCst);
        let error = tokio::task::block_in_place(|| ledger.owe_blocking(batch, then)).unwrap_err();
        assert_eq!(error.trouble(), Some(Trouble::Busy), "{error:?}");
        assert_eq!(shown.load(std::sync::atomic::Ordering::SeqCst), 1, "it has happened");
        let writing = ledger.writing();
        assert_eq!((writing.failing.map(|f| f.0), writing.owed), (Some(Trouble::Busy), 1));
        // A later word on the same document takes the place of the earlier one.
        let mut later = Batch::new();
        later.put(Kind::Guest, owed, Some("owed"), &"y".repeat(100_000)).unwrap();
        ledger.owe(later).await.unwrap_err();
        assert_eq!(*ledger.watch(Log::Event).borrow(), 1);
        assert_eq!(store.get::<String>(Kind::Guest, owed).unwrap(), None);
        // The lock goes while nobody writes.
        raw.execute_batch("ROLLBACK").unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while ledger.writing() != (Writing { failing: None, owed: 0, lost_events: 0 }) {
            assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(store.get::<String>(Kind::Guest, owed).unwrap(), Some("y".repeat(100_000)));
        assert_eq!(store.get::<String>(Kind::Guest, refused).unwrap(), None);
        ledger.append_durably(Log::Event, "after".into()).await.unwrap();
        let look = ledger.look(Log::Event, 0, 10, |_| true).unwrap();
        let bodies: Vec<&str> = look.entries.iter().map(|e| e.body.as_str()).collect();
        assert_eq!((seqs(&look), bodies), (vec![1, 2, 3], vec!["before", "owed", "after"]));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_write_that_does_not_end_is_trouble_and_is_none_when_it_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, ledger) = open(dir.path(), 10);
        let ledger = Arc::new(ledger);
        let (go_on, goes_on) = sync_channel::<()>(0);
        let stuck = {
            let ledger = Arc::clone(&ledger);
            tokio::spawn(
                async move { ledger.commit_and(document("g", 10).1, move || _ = goes_on.recv()).await },
            )
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while ledger.writing().failing.map(|f| f.0) != Some(Trouble::Failed) {
            assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        drop(go_on);
        stuck.await.unwrap().unwrap();
        ledger.commit(document("h", 10).1).await.unwrap();
        assert_eq!(ledger.writing().failing, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_writer_that_is_gone_is_trouble_and_no_silence() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, ledger) = open(dir.path(), 10);
        let lost = ledger.commit_and(document("g", 10).1, || panic!("a fault of ours, for this test")).await;
        assert!(lost.is_err(), "nobody can say whether it is on disk");
        let refused = ledger.commit(document("h", 10).1).await.unwrap_err();
        assert_eq!(refused.trouble(), Some(Trouble::Failed));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while ledger.writing().failing.map(|f| f.0) != Some(Trouble::Failed) {
            assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn files_of_earlier_schemas_get_what_they_lack_and_keep_what_they_have() {
        const OLD: &str = "
            CREATE TABLE document (kind TEXT NOT NULL, id BLOB NOT NULL, name TEXT, body TEXT NOT NULL,
                PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID;
            CREATE UNIQUE INDEX document_name ON document (kind, name) WHERE name IS NOT NULL;
            CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT, WITHOUT ROWID;
            PRAGMA application_id = 1836217965;";
        const LEDGER: &str = "
            CREATE TABLE event (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
            CREATE TABLE audit (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
            CREATE TABLE keyed (space TEXT NOT NULL, key TEXT NOT NULL, expires INTEGER, body TEXT NOT NULL,
                PRIMARY KEY (space, key)) STRICT, WITHOUT ROWID;
            CREATE INDEX keyed_expires ON keyed (expires) WHERE expires IS NOT NULL;
            INSERT INTO event VALUES (7, 8, 'seventh');
            INSERT INTO keyed VALUES ('token', 'k', NULL, 'v');";
        const OUTCOMES: &str = "CREATE TABLE audit_outcome (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;";
        let id = Uuid::now_v7();
        for version in 1..=3 {
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
            let path = dir.path().join("host.db");
            let raw = Connection::open(&path).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            raw.execute_batch(OLD).unwrap();
            raw.execute("INSERT INTO document VALUES ('guest', ?1, 'g', '5')", [id.as_bytes()]).unwrap();
            if version >= 2 {
                raw.execute_batch(LEDGER).unwrap();
            }
            if version >= 3 {
                raw.execute_batch(OUTCOMES).unwrap();
            }
            raw.pragma_update(None, "user_version", version).unwrap();
            drop(raw);
            for _ in 0..2 {
                let (store, ledger) = open(dir.path(), 10);
                assert_eq!(store.get::<u8>(Kind::Guest, id).unwrap(), Some(5));
                assert_eq!(store.get_by_name::<u8>(Kind::Guest, "g").unwrap(), Some((id, 5)));
                assert_eq!(ledger.epoch().len(), 16);
                if version >= 2 {
                    assert_eq!(ledger.look(Log::Event, 6, 9, |_| true).unwrap().entries[0].body, "seventh");
                    assert_eq!(ledger.find(Space::Token, "k").unwrap().map(|k| k.body).as_deref(), Some("v"));
                }
                ledger.append_durably(Log::Audit, "x".into()).await.unwrap();
            }
            std::fs::remove_file(dir.path().join("host.mark")).unwrap();
            assert!(Store::open(&path).unwrap_err().to_string().contains("host.mark is missing"));
        }
    }

    #[tokio::test]
    async fn without_anything_to_write_the_log_is_moved_into_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, ledger) = open(dir.path(), 10);
        let log = dir.path().join("host.db-wal");
        for n in 0..2 {
            ledger.append_durably(Log::Event, format!("{n}")).await.unwrap();
            assert!(std::fs::metadata(&log).unwrap().len() > 0);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while std::fs::metadata(&log).unwrap().len() > 0 {
                assert!(std::time::Instant::now() < deadline, "the log stays");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        assert_eq!(ledger.bounds(Log::Event).unwrap().latest, 2);
    }
}
