//! What is appended and what expires: event log, audit log, and keyed records with a time to live.
//!
//! Owns: their tables, one writer thread that commits in batches, retention. Must not know: what bodies mean.
//!
//! The ledger is in the store's file, over connections of its own. Writers hand their work to one thread, which runs
//! everything that waits in one transaction: a commit costs a sync of the disk, and 32 callers share it. Whoever waits
//! is told after the commit; watchers of a log see entries only when they are on disk.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::{DocumentRef, MAX_DOCUMENT, StoreError, open};

/// Work that waits at most; more make writers wait.
const QUEUE: usize = 4096;
/// Work that one transaction takes at most.
const BATCH: usize = 512;
/// Rows that one look through a log reads at most, matching or not.
pub const SCAN_MAX: usize = 20_000;
/// Entries of the event log that are kept, when nobody says otherwise.
pub const EVENTS_KEPT: u64 = 100_000;
/// Entries of the audit log that are kept.
pub const AUDIT_KEPT: u64 = 1_000_000;

/// Tables of the ledger: part of the schema from version 2 on.
pub(super) const SCHEMA: &str = "
    CREATE TABLE event (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
    CREATE TABLE audit (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
    CREATE TABLE keyed (
        space TEXT NOT NULL,
        key TEXT NOT NULL,
        expires INTEGER,
        body TEXT NOT NULL,
        PRIMARY KEY (space, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX keyed_expires ON keyed (expires) WHERE expires IS NOT NULL;
";

/// An append-only log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Changes of resources.
    Event,
    /// Who asked for what.
    Audit,
}

impl Log {
    const fn table(self) -> &'static str {
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
    const fn stored(self) -> &'static str {
        match self {
            Self::Idempotency => "idempotency",
            Self::Token => "token",
            Self::Ticket => "ticket",
        }
    }
}

/// An entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place: 1 for the first ever, without gaps.
    pub seq: u64,
    /// When it was appended, to the millisecond.
    pub at: Timestamp,
    /// What was appended.
    pub body: String,
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
    /// Whether more follow.
    pub more: bool,
}

/// Why a look through a log found nothing.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// What should follow is not kept any more, or never was.
    #[error("the log holds {} to {}", .0.oldest, .0.latest)]
    Expired(Bounds),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

type Told = Box<dyn FnOnce(bool) + Send>;
type Work = Box<dyn FnOnce(&Transaction<'_>) -> rusqlite::Result<Told> + Send>;

/// The open ledger.
pub struct Ledger {
    epoch: String,
    sender: Option<SyncSender<Work>>,
    writer: Option<JoinHandle<()>>,
    reader: Mutex<Connection>,
    events: Arc<Tail>,
    audit: Arc<Tail>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// The end of a log.
struct Tail {
    log: Log,
    kept: u64,
    /// The writer's: the last number given out.
    next: AtomicU64,
    /// The last entry on disk.
    committed: watch::Sender<u64>,
}

impl Ledger {
    /// Opens the ledger in the database at `path`, which a [`Store`](super::Store) of this process has open. Keeps
    /// `events_kept` events.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`], [`StoreError::Files`].
    pub fn open(path: &Path, events_kept: u64) -> Result<Self, StoreError> {
        let (mut writer, reader) = (open::another(path)?, open::another(path)?);
        let epoch = epoch_of(&mut writer)?;
        let tail = |log: Log, kept: u64| -> Result<Arc<Tail>, StoreError> {
            let last = bounds_of(&reader, log)?.latest;
            let (next, committed) = (AtomicU64::new(last), watch::Sender::new(last));
            Ok(Arc::new(Tail { log, kept, next, committed }))
        };
        let (events, audit) = (tail(Log::Event, events_kept.max(1))?, tail(Log::Audit, AUDIT_KEPT)?);
        let (sender, receiver) = sync_channel(QUEUE);
        let tails = [Arc::clone(&events), Arc::clone(&audit)];
        let thread = std::thread::Builder::new().name("ledger".into());
        let writer = thread.spawn(move || write_all(writer, &receiver, &tails)).map_err(|source| {
            StoreError::Files(super::PrivateFileError::Io {
                operation: "start the writer of",
                path: path.to_owned(),
                source,
            })
        })?;
        let reader = Mutex::new(reader);
        Ok(Self { epoch, sender: Some(sender), writer: Some(writer), reader, events, audit })
    }

    /// Made with the database: numbers of another epoch mean nothing here. 16 hexadecimal digits.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Appends without waiting for the disk. Entries get their numbers in the order of the calls.
    pub fn append(&self, log: Log, body: String) {
        self.queue(self.appending(log, body, Box::new(|_| {})));
    }

    /// Appends; returns when the entry is on disk.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub async fn append_durably(&self, log: Log, body: String) -> Result<(), StoreError> {
        let (told, done) = oneshot::channel();
        self.queue(self.appending(log, body, Box::new(move |ok| _ = told.send(ok))));
        if done.await == Ok(true) { Ok(()) } else { Err(failed()) }
    }

    fn appending(&self, log: Log, body: String, told: Told) -> Work {
        let (tail, at) = (Arc::clone(self.tail(log)), Timestamp::now().as_millisecond());
        Box::new(move |t| {
            let seq = tail.next.load(Ordering::SeqCst) + 1;
            let statement = match tail.log {
                Log::Event => "INSERT INTO event (seq, at, body) VALUES (?1, ?2, ?3)",
                Log::Audit => "INSERT INTO audit (seq, at, body) VALUES (?1, ?2, ?3)",
            };
            t.prepare_cached(statement)?.execute(params![seq as i64, at, body])?;
            tail.next.store(seq, Ordering::SeqCst);
            Ok(told)
        })
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
        let bounds = bounds_of(&reader, log)?;
        if after > bounds.latest || after + 1 < bounds.oldest {
            return Err(LookError::Expired(bounds));
        }
        let sql = format!("SELECT seq, at, body FROM {} WHERE seq > ?1 ORDER BY seq LIMIT ?2", log.table());
        let mut statement = reader.prepare_cached(&sql).map_err(StoreError::from)?;
        let rows = statement.query_map(params![after as i64, SCAN_MAX as i64], entry_of);
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
    pub fn find(&self, space: Space, key: &str) -> Result<Option<String>, StoreError> {
        self.reader()
            .prepare_cached(
                "SELECT body FROM keyed WHERE space = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)",
            )
            .and_then(|mut s| s.query_row(params![space.stored(), key, now()], |row| row.get(0)).optional())
            .map_err(StoreError::from)
    }

    /// Every record of a space that has not expired, by key.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn all(&self, space: Space) -> Result<Vec<(String, String)>, StoreError> {
        let reader = self.reader();
        let mut statement = reader
            .prepare_cached(
                "SELECT key, body FROM keyed WHERE space = ?1 AND (expires IS NULL OR expires > ?2)
                 ORDER BY key",
            )
            .map_err(StoreError::from)?;
        let rows = statement.query_map(params![space.stored(), now()], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.and_then(Iterator::collect).map_err(StoreError::from)
    }

    /// Writes a record unless its key is there (an expired one does not count). Gives what is there otherwise.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], [`StoreError::Sqlite`].
    pub async fn claim(
        &self,
        space: Space,
        key: String,
        expires: Option<Timestamp>,
        body: String,
    ) -> Result<Option<String>, StoreError> {
        check_length(&key, &body)?;
        self.run(move |t| {
            t.prepare_cached("DELETE FROM keyed WHERE expires <= ?1")?.execute([now()])?;
            let there = t
                .prepare_cached("SELECT body FROM keyed WHERE space = ?1 AND key = ?2")?
                .query_row(params![space.stored(), key], |row| row.get::<_, String>(0))
                .optional()?;
            if there.is_none() {
                put(t, space, &key, expires, &body)?;
            }
            Ok(there)
        })
        .await
    }

    /// Writes a record, replacing the one with this key.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], [`StoreError::Sqlite`].
    pub async fn put(
        &self,
        space: Space,
        key: String,
        expires: Option<Timestamp>,
        body: String,
    ) -> Result<(), StoreError> {
        check_length(&key, &body)?;
        self.run(move |t| put(t, space, &key, expires, &body)).await
    }

    /// As [`Ledger::put`], without waiting for the disk.
    pub fn put_soon(&self, space: Space, key: String, expires: Timestamp, body: String) {
        self.queue(Box::new(move |t| {
            put(t, space, &key, Some(expires), &body)?;
            Ok(Box::new(|_| {}))
        }));
    }

    /// Removes a record; says whether it was there and had not expired. Of several callers one is told so.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub async fn take(&self, space: Space, key: String) -> Result<Option<String>, StoreError> {
        self.run(move |t| taken(t, space, &key)).await
    }

    /// As [`Ledger::take`], from a thread of its own.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn take_blocking(&self, space: Space, key: String) -> Result<Option<String>, StoreError> {
        self.submit(move |t| taken(t, space, &key)).blocking_recv().ok().flatten().ok_or_else(failed)
    }

    /// Returns when everything appended so far is on disk, or cannot get there.
    pub async fn flush(&self) {
        let _ = self.run(|_| Ok(())).await;
    }

    async fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<R> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.submit(work).await.ok().flatten().ok_or_else(failed)
    }

    fn submit<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<R> + Send + 'static,
    ) -> oneshot::Receiver<Option<R>> {
        let (told, done) = oneshot::channel();
        self.queue(Box::new(move |t| {
            let result = work(t)?;
            Ok(Box::new(move |ok: bool| drop(told.send(ok.then_some(result)))))
        }));
        done
    }

    fn queue(&self, work: Work) {
        // A writer that is gone has logged why; who waits is told by its dropped sender.
        if let Some(sender) = &self.sender {
            let _ = sender.send(work);
        }
    }

    fn tail(&self, log: Log) -> &Arc<Tail> {
        match log {
            Log::Event => &self.events,
            Log::Audit => &self.audit,
        }
    }

    fn reader(&self) -> MutexGuard<'_, Connection> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
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

fn write_all(mut connection: Connection, work: &Receiver<Work>, tails: &[Arc<Tail>]) {
    while let Ok(first) = work.recv() {
        let batch: Vec<Work> =
            std::iter::once(first).chain(std::iter::from_fn(|| work.try_recv().ok())).take(BATCH).collect();
        let before: Vec<u64> = tails.iter().map(|t| t.next.load(Ordering::SeqCst)).collect();
        let mut told = Vec::with_capacity(batch.len());
        let result = connection.transaction_with_behavior(TransactionBehavior::Immediate).and_then(|t| {
            for work in batch {
                match work(&t) {
                    Ok(tell) => told.push(tell),
                    Err(error) => tracing::error!(%error, "the ledger did not take a record"),
                }
            }
            for tail in tails {
                forget_old(&t, tail)?;
            }
            t.commit()
        });
        if let Err(error) = &result {
            tracing::error!(%error, "the ledger could not be written");
            tails.iter().zip(before).for_each(|(t, n)| t.next.store(n, Ordering::SeqCst));
        }
        for tail in tails {
            let next = tail.next.load(Ordering::SeqCst);
            tail.committed.send_if_modified(|n| std::mem::replace(n, next) != next);
        }
        // Whoever is told finds the entry at the log's end.
        told.into_iter().for_each(|tell| tell(result.is_ok()));
    }
}

fn forget_old(t: &Transaction<'_>, tail: &Tail) -> rusqlite::Result<()> {
    let below = tail.next.load(Ordering::SeqCst).saturating_sub(tail.kept);
    if below > 0 {
        let sql = match tail.log {
            Log::Event => "DELETE FROM event WHERE seq <= ?1",
            Log::Audit => "DELETE FROM audit WHERE seq <= ?1",
        };
        t.prepare_cached(sql)?.execute([below as i64])?;
    }
    Ok(())
}

fn put(
    t: &Transaction<'_>,
    space: Space,
    key: &str,
    expires: Option<Timestamp>,
    body: &str,
) -> rusqlite::Result<()> {
    t.prepare_cached(
        "INSERT INTO keyed (space, key, expires, body) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (space, key) DO UPDATE SET expires = excluded.expires, body = excluded.body",
    )?
    .execute(params![space.stored(), key, expires.map(Timestamp::as_millisecond), body])
    .map(|_| ())
}

fn taken(t: &Transaction<'_>, space: Space, key: &str) -> rusqlite::Result<Option<String>> {
    t.prepare_cached(
        "DELETE FROM keyed WHERE space = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3) RETURNING body",
    )?
    .query_row(params![space.stored(), key, now()], |row| row.get(0))
    .optional()
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

fn epoch_of(connection: &mut Connection) -> Result<String, StoreError> {
    let fresh = format!("\"{:016x}\"", Uuid::new_v4().as_u64_pair().0);
    connection
        .execute("INSERT INTO meta (key, body) VALUES ('epoch', ?1) ON CONFLICT (key) DO NOTHING", [fresh])
        .and_then(|_| connection.query_row("SELECT body FROM meta WHERE key = 'epoch'", [], |r| r.get(0)))
        .map(|text: String| text.trim_matches('"').to_owned())
        .map_err(StoreError::from)
}

fn check_length(key: &str, body: &str) -> Result<(), StoreError> {
    if body.len() > MAX_DOCUMENT {
        return Err(StoreError::TooLong { document: DocumentRef::Meta(key.to_owned()), bytes: body.len() });
    }
    Ok(())
}

fn failed() -> StoreError {
    // The writer has logged the reason itself.
    StoreError::Sqlite(rusqlite::Error::ExecuteReturnedResults)
}

fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use jiff::ToSpan as _;

    use super::*;
    use crate::store::Store;

    fn open(dir: &Path, kept: u64) -> (Store, Ledger) {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = dir.join("host.db");
        let store = Store::open(&path).unwrap();
        (store, Ledger::open(&path, kept).unwrap())
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
        let past = Timestamp::now() - 1.second();
        ledger.put(Space::Ticket, "old".into(), Some(past), "x".into()).await.unwrap();
        ledger.put(Space::Ticket, "new".into(), Some(past + 1.hour()), "y".into()).await.unwrap();
        assert_eq!(ledger.find(Space::Ticket, "old").unwrap(), None);
        assert_eq!(ledger.all(Space::Ticket).unwrap(), [("new".to_owned(), "y".to_owned())]);
        assert_eq!(ledger.take(Space::Ticket, "old".into()).await.unwrap(), None);
        assert_eq!(ledger.claim(Space::Ticket, "old".into(), None, "z".into()).await.unwrap(), None);
        assert_eq!(ledger.find(Space::Ticket, "old").unwrap().as_deref(), Some("z"));
    }

    #[test]
    fn a_file_of_schema_1_gets_the_tables() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), 10));
        let raw = Connection::open(dir.path().join("host.db")).unwrap();
        raw.execute_batch(
            "DROP TABLE event; DROP TABLE audit; DROP TABLE keyed; PRAGMA user_version = 1;
             DELETE FROM meta;",
        )
        .unwrap();
        drop(raw);
        let (_store, ledger) = open(dir.path(), 10);
        ledger.append(Log::Audit, "x".into());
        assert_eq!(ledger.epoch().len(), 16);
    }
}
