//! The logs: entries that are appended, numbered and read in order.
//!
//! Owns: what a log and an entry are, looking through a log. Must not know: what entries say, who writes
//! them.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::watch;

use super::Ledger;
use crate::store::form::{self, Document};
use crate::store::{DocumentRef, StoreError};

/// Rows that one look through a log reads at most, matching or not.
pub const SCAN_MAX: usize = 20_000;

/// An append-only log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Changes of resources, for followers.
    Event,
    /// Who asked for what.
    Audit,
}

impl Log {
    pub(in crate::store) const fn table(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Audit => "audit",
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
    /// The entry's text.
    pub body: String,
}

impl Entry {
    /// What was appended to `log`, as what it is.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`].
    pub fn read<T: Document>(&self, log: Log) -> Result<T, StoreError> {
        let document = || DocumentRef::Entry(log, self.seq);
        form::read(self.body.as_bytes())
            .map_err(|source| StoreError::Unreadable { document: document(), source })
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

impl Ledger {
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

    /// What a log holds for readers that stand at entry `after`.
    ///
    /// # Errors
    /// As [`Ledger::look`].
    pub fn bounds_after(&self, log: Log, after: u64) -> Result<Bounds, LookError> {
        self.following(&self.reader(), log, after)
    }

    fn following(&self, reader: &Connection, log: Log, after: u64) -> Result<Bounds, LookError> {
        // What is on disk is shown when those who wrote it have been told.
        let committed = *self.tail(log).committed.borrow();
        let bounds = bounds_of(reader, log)?;
        let bounds = Bounds { latest: bounds.latest.min(committed), ..bounds };
        if after > bounds.latest || after + 1 < bounds.oldest {
            return Err(LookError::Expired(bounds));
        }
        Ok(bounds)
    }

    /// The entry of the event log with this number, if it is there.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] and its kind.
    pub fn event(&self, seq: u64) -> Result<Option<Entry>, StoreError> {
        let reader = self.reader();
        let statement = reader.prepare_cached("SELECT seq, at, body FROM event WHERE seq = ?1");
        let read = |mut s: rusqlite::CachedStatement<'_>| s.query_row([seq as i64], entry_of).optional();
        statement.and_then(read).map_err(StoreError::from)
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
        let bounds = self.following(&reader, log, after)?;
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
}

fn entry_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let at: i64 = row.get(1)?;
    // A time beyond all times is damage; the entry is worth more than its time.
    let at = Timestamp::from_millisecond(at).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok(Entry { seq: row.get::<_, i64>(0)? as u64, at, body: row.get(2)? })
}

pub(super) fn bounds_of(connection: &Connection, log: Log) -> Result<Bounds, StoreError> {
    let sql = match log {
        Log::Event => "SELECT (SELECT min(seq) FROM event), (SELECT max(seq) FROM event)",
        Log::Audit => "SELECT (SELECT min(seq) FROM audit), (SELECT max(seq) FROM audit)",
    };
    let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?));
    let (oldest, latest) =
        connection.prepare_cached(sql).and_then(|mut s| s.query_row([], read)).map_err(StoreError::from)?;
    Ok(Bounds { oldest: oldest.unwrap_or(1) as u64, latest: latest.unwrap_or(0) as u64 })
}
