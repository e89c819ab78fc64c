//! The one thread that writes: everything that waits goes into one transaction, and one sync of the disk is
//! for all.
//!
//! Owns: the order of writes, commits, what is owed to the disk while it takes nothing, whether writing
//! works. Must not know: what is written.
//!
//! Each piece of work takes effect whole or not at all (a savepoint), so that one that is refused does not
//! touch its neighbours. Work whose world has changed already is owed when it cannot be written: it is kept
//! in memory and goes before everything else into the next transaction, once a second until there is one that
//! commits.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::watch;

use super::batch::{Batch, Write, carry_out};
use super::documents::render;
use super::hours::{self, Hours};
use super::keeper::{Keeper, held};
use super::ledger::Log;
use super::mark::Delta;
use super::open::BUSY_TIMEOUT;
use super::rows::Rows;
use super::{DocumentRef, Kind, StoreError};
use crate::chain::chain;
use crate::sync::Locked;
use crate::waiting;

/// Work that one transaction takes at most.
const GROUP: usize = 512;
/// Between two tries to write what is owed, and between two looks whether a disk that took nothing takes
/// something.
const RETRY: Duration = Duration::from_secs(1);
/// Without anything to write for so long, the log is moved into the database: what is in one place cannot be
/// lost in two.
const IDLE: Duration = Duration::from_secs(3);
/// How long a write waits for another process that keeps the database locked, so long that one who only looks
/// is not noticed.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same while writes fail already: those who ask meanwhile are told at once.
const PATIENCE_IN_TROUBLE: Duration = Duration::from_millis(100);
/// A transaction that takes longer than that is said to be stuck: a disk that does not answer gives no error.
const STUCK: Duration = Duration::from_secs(5);
/// Entries of the event log that are owed at most; the oldest give way.
const OWED_EVENTS: usize = 10_000;

/// What is done after the commit, before any reader of a log sees what was written.
pub(super) type Then = Box<dyn FnOnce() + Send>;
/// What is told when readers see it, or when they never will.
pub(super) type Tell = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// What reads and writes as it likes; gives who is told of the commit.
pub(super) type Free = Box<dyn FnOnce(&Rows<'_>) -> Result<Tell, StoreError> + Send>;

/// Work for the writer's thread.
pub(super) enum Work {
    /// Reads and writes as it likes; told whether it was committed.
    Free(Free, Tell),
    /// A batch; one that is owed is kept until it is on disk, and its `then` is done in any case.
    Batch { batch: Batch, owed: bool, then: Then, tell: Tell },
}

/// The end of a log.
pub(super) struct Tail {
    pub log: Log,
    pub kept: u64,
    /// The writer's: the last number given out.
    pub next: AtomicU64,
    /// The last entry on disk.
    pub committed: watch::Sender<u64>,
}

/// What every write goes by.
pub(super) struct Ground {
    /// Every log has one.
    pub tails: [Arc<Tail>; 2],
    pub hours: Hours,
}

/// Whether writing works, for readers on other threads.
#[derive(Debug, Default)]
pub(super) struct Health {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the last write met, and since when writes have been failing.
    failing: Option<(Trouble, Instant)>,
    /// Since when the transaction goes on that is written now.
    writing: Option<Instant>,
    owed: usize,
    lost_events: u64,
}

/// Why the database takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No space is left.
    Full,
    /// Another process keeps it locked.
    Busy,
    /// Its files cannot be read or written, or are damaged.
    Failed,
}

impl StoreError {
    /// What kind of trouble it is that the database takes nothing; `None` when it is about what was to be
    /// written.
    pub fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::NotSaved { source, .. } => source.trouble(),
            Self::Full(_) => Some(Trouble::Full),
            Self::Busy(_) | Self::InUse => Some(Trouble::Busy),
            Self::Io(_)
            | Self::Damaged { .. }
            | Self::Sqlite(_)
            | Self::Files(_)
            | Self::Empty { .. }
            | Self::Foreign { .. }
            | Self::TooNew { .. }
            | Self::Untrusted { .. }
            | Self::Corrupt { .. } => Some(Trouble::Failed),
            Self::Unreadable { .. }
            | Self::Unwritable { .. }
            | Self::TooLong { .. }
            | Self::Exists { .. }
            | Self::NameTaken { .. } => None,
        }
    }

    /// What SQLite means by its result code `code` (<https://sqlite.org/rescode.html>).
    pub fn of_sqlite(code: i32) -> Self {
        Self::from(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None))
    }

    /// What a file beside the database means for those who want something stored.
    pub fn of_files(error: super::PrivateFileError) -> Self {
        match &error {
            super::PrivateFileError::Io { source, .. }
                if source.kind() == std::io::ErrorKind::StorageFull
                    || source.kind() == std::io::ErrorKind::QuotaExceeded =>
            {
                Self::of_sqlite(rusqlite::ffi::SQLITE_FULL)
            }
            _ => Self::Files(error),
        }
    }

    /// The same error for another of those whose work it failed.
    fn for_another(&self) -> Self {
        let copy = |e: &rusqlite::Error| match e {
            rusqlite::Error::SqliteFailure(code, text) => rusqlite::Error::SqliteFailure(*code, text.clone()),
            // Others cannot be copied, and the list of them is not closed. The writer has logged the reason
            // itself.
            _ => rusqlite::Error::ExecuteReturnedResults,
        };
        match self {
            Self::Full(e) => Self::Full(copy(e)),
            Self::Busy(e) => Self::Busy(copy(e)),
            Self::Io(e) => Self::Io(copy(e)),
            Self::Sqlite(e) => Self::Sqlite(copy(e)),
            Self::Damaged { what, source } => {
                Self::Damaged { what: what.clone(), source: source.as_ref().map(copy) }
            }
            Self::InUse => Self::InUse,
            // No less a failure of the database for those whose work it was not about.
            Self::Files(_)
            | Self::Empty { .. }
            | Self::Foreign { .. }
            | Self::TooNew { .. }
            | Self::NotSaved { .. }
            | Self::Corrupt { .. }
            | Self::Untrusted { .. }
            | Self::Unreadable { .. }
            | Self::Unwritable { .. }
            | Self::TooLong { .. }
            | Self::Exists { .. }
            | Self::NameTaken { .. } => Self::Sqlite(rusqlite::Error::ExecuteReturnedResults),
        }
    }
}

/// How writing goes at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writing {
    /// What the last write met and for how long writes have been failing; `None` while they work.
    pub failing: Option<(Trouble, Duration)>,
    /// Changes that have happened and are not on disk yet.
    pub owed: usize,
    /// Events that were given up, because too many were owed.
    pub lost_events: u64,
}

impl Health {
    pub fn now(&self) -> Writing {
        let state = self.state.locked();
        let stuck =
            state.writing.filter(|since| since.elapsed() >= STUCK).map(|since| (Trouble::Failed, since));
        Writing {
            failing: state.failing.or(stuck).map(|(trouble, since)| (trouble, since.elapsed())),
            owed: state.owed,
            lost_events: state.lost_events,
        }
    }

    fn is_failing(&self) -> bool {
        self.now().failing.is_some()
    }

    fn begins(&self) {
        self.state.locked().writing = Some(Instant::now());
    }

    fn note(&self, trouble: Option<Trouble>, owed: &Owed) {
        let mut state = self.state.locked();
        state.writing = None;
        state.failing = trouble.map(|t| (t, state.failing.map_or_else(Instant::now, |(_, since)| since)));
        state.owed = owed.batches.len();
        state.lost_events = owed.lost_events;
    }
}

/// What has happened and is not on disk.
#[derive(Default)]
struct Owed {
    batches: VecDeque<Batch>,
    lost_events: u64,
}

impl Owed {
    fn add(&mut self, batch: Batch) {
        // A later word on a document makes an earlier one needless.
        for write in batch.writes() {
            if let Write::Put { kind, id, .. } | Write::Delete { kind, id } = write {
                self.forget_earlier(*kind, *id);
            }
        }
        self.batches.push_back(batch);
        let events =
            |b: &Batch| b.writes().iter().all(|w| matches!(w, Write::Append { log: Log::Event, .. }));
        while self.batches.len() > OWED_EVENTS {
            let Some(oldest) = self.batches.iter().position(events) else { break };
            self.batches.remove(oldest);
            self.lost_events += 1;
        }
    }

    fn forget_earlier(&mut self, of: Kind, which: uuid::Uuid) {
        for batch in &mut self.batches {
            batch.keep(|w| match w {
                Write::Put { kind, id, .. } | Write::Delete { kind, id } => (*kind, *id) != (of, which),
                Write::MetaPut { .. }
                | Write::MetaDelete { .. }
                | Write::Append { .. }
                | Write::Outcome { .. }
                | Write::KeyedPut { .. }
                | Write::KeyedDelete { .. } => true,
            });
        }
        self.batches.retain(|b| !b.is_empty());
    }
}

/// Writes until nobody can send any more, then once more what is owed.
pub(super) fn write_all(
    mut connection: Connection,
    keeper: &Mutex<Keeper>,
    work: &Receiver<Work>,
    ground: &Ground,
    health: &Health,
) {
    let mut owed = Owed::default();
    let mut tidied = None;
    let mut noted = Instant::now();
    let _alive = Alive(health);
    loop {
        let at = held(keeper).seq();
        let first = if owed.batches.is_empty() && !health.is_failing() {
            let is_tidy = tidied == Some(at);
            match work.recv_timeout(if is_tidy { hours::NOTE_EVERY } else { IDLE }) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) if is_tidy => None,
                Err(RecvTimeoutError::Timeout) => {
                    if tidy(&connection, keeper) {
                        tidied = Some(at);
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        } else {
            match work.recv_timeout(RETRY) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        };
        let more = std::iter::from_fn(|| work.try_recv().ok());
        let group: Vec<Work> = first.into_iter().chain(more).take(GROUP).collect();
        write_group(&mut connection, keeper, group, &mut owed, ground, health, &mut noted);
    }
    write_group(&mut connection, keeper, Vec::new(), &mut owed, ground, health, &mut noted);
    if !owed.batches.is_empty() {
        tracing::error!(
            owed = owed.batches.len(),
            "changes that happened could not be stored before the end"
        );
    }
}

/// Moves the log into the database and empties it, unless somebody reads or writes just now; says whether
/// that is done.
fn tidy(connection: &Connection, keeper: &Mutex<Keeper>) -> bool {
    // Those who write wait for nobody who waits for a reader.
    let _held = held(keeper);
    let checkpoint = || {
        connection.busy_timeout(Duration::ZERO)?;
        let left: i64 = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        Ok::<_, rusqlite::Error>(left == 0)
    };
    let done = checkpoint();
    if let Err(error) = connection.busy_timeout(BUSY_TIMEOUT) {
        tracing::error!(%error, "the database could not be told to wait");
    }
    match done {
        Ok(done) => done,
        Err(error) => {
            tracing::warn!(%error, "the database's log could not be moved into it");
            false
        }
    }
}

/// Held by the thread that writes: if it ends in a panic, nothing is written any more, and that is said.
struct Alive<'a>(&'a Health);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.0.state.locked();
            state.failing = Some((Trouble::Failed, Instant::now()));
        }
    }
}

/// Work that was done within the transaction, and waits for its commit.
struct Done {
    tell: Tell,
    then: Option<Then>,
    /// To be owed if it is not committed.
    batch: Option<Batch>,
}

impl Done {
    /// There is no commit for it.
    fn failed(self, error: StoreError, owed: &mut Owed, told: &mut Vec<(Tell, Result<(), StoreError>)>) {
        if let Some(batch) = self.batch {
            if let Some(then) = self.then {
                then();
            }
            // What can never be written would never be off the list.
            if error.trouble().is_some() {
                owed.add(batch);
            }
        }
        told.push((self.tell, Err(error)));
    }
}

/// Commits, shows, moves the logs on, tells: why in this order is in docs/publishing.md.
fn write_group(
    connection: &mut Connection,
    keeper: &Mutex<Keeper>,
    group: Vec<Work>,
    owed: &mut Owed,
    ground: &Ground,
    health: &Health,
    noted: &mut Instant,
) {
    let tails = &ground.tails;
    let due = noted.elapsed() >= hours::NOTE_EVERY;
    let before = numbers(tails);
    let probing = group.is_empty() && owed.batches.is_empty();
    let mut done = Vec::with_capacity(group.len());
    let mut refused = Vec::new();
    let mut waiting = group.into_iter();
    health.begins();
    let mut keeper = held(keeper);
    let patience = if health.is_failing() { PATIENCE_IN_TROUBLE } else { PATIENCE };
    let result = begin(connection, patience).and_then(|t| {
        let account = Cell::new(Delta::default());
        let rows = Rows::new(&t, &account);
        for batch in &owed.batches {
            match within_savepoint(&rows, tails, || write_batch(&rows, batch, ground)) {
                // What can never be written must not keep back what can.
                Err(error) if error.trouble().is_none() => {
                    tracing::error!(%error, "a change that happened cannot be stored");
                }
                other => other?,
            }
        }
        for work in waiting.by_ref() {
            do_work(&rows, work, ground, &mut done, &mut refused)?;
        }
        for tail in tails {
            forget_old(&rows, tail)?;
        }
        if due {
            note(&rows, &ground.hours)?;
        } else if probing {
            probe(&rows)?;
        }
        keeper.commit(t, &account.get())
    });
    let unmarked = !keeper.is_marked();
    drop(keeper);
    if let Err(error) = &result {
        if !health.is_failing() || !probing {
            tracing::error!(error = chain(error), "the database could not be written");
        }
        restore(tails, &before);
    } else {
        owed.batches.clear();
        if due {
            *noted = Instant::now();
        }
    }
    // What never had its turn fails with the rest.
    for work in waiting {
        done.push(match work {
            Work::Free(_, tell) => Done { tell, then: None, batch: None },
            Work::Batch { batch, owed, then, tell } => {
                Done { tell, then: Some(then), batch: owed.then_some(batch) }
            }
        });
    }
    let mut met = result.as_ref().err().map(|e| e.trouble().unwrap_or(Trouble::Failed));
    met = met.or(unmarked.then_some(Trouble::Failed));
    let mut told = Vec::with_capacity(done.len() + refused.len());
    for (item, error) in refused {
        met = met.or(error.trouble());
        item.failed(error, owed, &mut told);
    }
    for item in done {
        match &result {
            Ok(()) => {
                if let Some(then) = item.then {
                    then();
                }
                told.push((item.tell, Ok(())));
            }
            Err(error) => item.failed(error.for_another(), owed, &mut told),
        }
    }
    health.note(met, owed);
    for tail in tails {
        let next = tail.next.load(Ordering::SeqCst);
        tail.committed.send_if_modified(|n| std::mem::replace(n, next) != next);
    }
    // Last of all: who is told finds what was written.
    told.into_iter().for_each(|(tell, result)| tell(result));
}

/// Does one piece of work; an error is one of the whole transaction.
fn do_work(
    t: &Rows<'_>,
    work: Work,
    ground: &Ground,
    done: &mut Vec<Done>,
    refused: &mut Vec<(Done, StoreError)>,
) -> Result<(), StoreError> {
    let (item, result) = match work {
        Work::Free(work, otherwise) => {
            let mut tell = None;
            let result = within_savepoint(t, &ground.tails, || {
                tell = Some(work(t)?);
                Ok(())
            });
            let tell = tell.filter(|_| result.is_ok()).unwrap_or(otherwise);
            (Done { tell, then: None, batch: None }, result)
        }
        Work::Batch { batch, owed, then, tell } => {
            let result = within_savepoint(t, &ground.tails, || write_batch(t, &batch, ground));
            (Done { tell, then: Some(then), batch: owed.then_some(batch) }, result)
        }
    };
    match result {
        Ok(()) => done.push(item),
        Err(error) if t.is_autocommit() => {
            // SQLite has rolled everything back: the neighbours' work, too.
            let all = error.for_another();
            refused.push((item, error));
            return Err(all);
        }
        Err(error) => {
            if error.trouble().is_some() {
                tracing::error!(%error, "the database did not take a record");
            }
            refused.push((item, error));
        }
    }
    Ok(())
}

fn within_savepoint(
    t: &Rows<'_>,
    tails: &[Arc<Tail>],
    work: impl FnOnce() -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let before = (numbers(tails), t.account().get());
    t.prepare_cached("SAVEPOINT one").and_then(|mut s| s.execute([])).map_err(StoreError::from)?;
    let result = work();
    if result.is_err() {
        restore(tails, &before.0);
        t.account().set(before.1);
        if t.is_autocommit() {
            return result;
        }
        t.prepare_cached("ROLLBACK TO one").and_then(|mut s| s.execute([])).map_err(StoreError::from)?;
    }
    t.prepare_cached("RELEASE one").and_then(|mut s| s.execute([])).map_err(StoreError::from)?;
    result
}

/// Carries out a batch within the transaction.
pub(super) fn write_batch(t: &Rows<'_>, batch: &Batch, ground: &Ground) -> Result<(), StoreError> {
    let mut numbered =
        |t: &Rows<'_>, log: Log, at: Timestamp, body: &str| append(t, ground, log, at, body).map(|_| ());
    batch.writes().iter().try_for_each(|write| carry_out(t, write, &ground.hours, &mut numbered))
}

/// Appends an entry; gives its number.
pub(super) fn append(
    t: &Rows<'_>,
    ground: &Ground,
    log: Log,
    at: Timestamp,
    body: &str,
) -> Result<u64, StoreError> {
    // Every log has a tail.
    let tail =
        ground.tails.iter().find(|t| t.log == log).ok_or_else(|| {
            StoreError::Sqlite(rusqlite::Error::InvalidParameterName(log.table().to_owned()))
        })?;
    let seq = tail.next.load(Ordering::SeqCst) + 1;
    t.entry(log, seq, at, body).map_err(StoreError::from)?;
    tail.next.store(seq, Ordering::SeqCst);
    Ok(seq)
}

fn numbers(tails: &[Arc<Tail>]) -> Vec<u64> {
    tails.iter().map(|t| t.next.load(Ordering::SeqCst)).collect()
}

fn restore(tails: &[Arc<Tail>], numbers: &[u64]) {
    tails.iter().zip(numbers).for_each(|(t, n)| t.next.store(*n, Ordering::SeqCst));
}

fn begin(connection: &mut Connection, patience: Duration) -> Result<Transaction<'_>, StoreError> {
    connection.busy_timeout(patience).map_err(StoreError::from)?;
    connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(StoreError::from)
}

/// A write for its own sake: whether the disk takes something again.
pub(super) fn probe(t: &Rows<'_>) -> Result<(), StoreError> {
    t.meta("probe", &format!("\"{}\"", uuid::Uuid::new_v4())).map_err(StoreError::from)
}

/// Notes how much time has passed, for the next daemon.
fn note(t: &Rows<'_>, hours: &Hours) -> Result<(), StoreError> {
    let note = render(&hours.note(), || DocumentRef::Meta(hours::KEY.to_owned()))?;
    t.meta(hours::KEY, &note).map_err(StoreError::from)
}

fn forget_old(t: &Rows<'_>, tail: &Tail) -> Result<(), StoreError> {
    let below = tail.next.load(Ordering::SeqCst).saturating_sub(tail.kept);
    if below == 0 {
        return Ok(());
    }
    t.forget_entries(tail.log, below).map_err(StoreError::from)
}

/// Hands work to the thread; work that nobody will do is told so.
pub(super) fn send(sender: Option<&SyncSender<Work>>, work: Work) {
    let left = match sender {
        // More waits than there is room for: the disk is slow.
        Some(sender) => waiting::with_thread(|| sender.send(work)).err().map(|e| e.0),
        None => Some(work),
    };
    if let Some(Work::Free(_, tell) | Work::Batch { tell, .. }) = left {
        tell(Err(StoreError::Sqlite(rusqlite::Error::ExecuteReturnedResults)));
    }
}
