//! Every row of the database with its digest, and what a transaction does to all of them together.
//!
//! Owns: the statements that change rows, what a row's digest covers. Must not know: commits, what rows mean.
//!
//! SQLite's own check finds pages that are not what pages are, and takes a flipped bit in a text for another
//! text. So each row has a digest of its table and of everything else in it, and whoever changes rows keeps
//! account of the digests that come and go: a row that is gone altogether is missed, too.

use std::cell::Cell;
use std::ops::Deref;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use uuid::Uuid;

use super::ledger::{Log, Space};
use super::mark::{Delta, Digest, digest_of};
use super::{Kind, StoreError};

/// A connection in the middle of a transaction, with the account of what that does.
pub(super) struct Rows<'a> {
    connection: &'a Connection,
    account: &'a Cell<Delta>,
}

impl Deref for Rows<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
    }
}

type Changed<T> = rusqlite::Result<T>;

impl<'a> Rows<'a> {
    pub fn new(connection: &'a Connection, account: &'a Cell<Delta>) -> Self {
        Self { connection, account }
    }

    /// What has been done so far; to be put back when that is taken back.
    pub fn account(&self) -> &Cell<Delta> {
        self.account
    }

    fn comes(&self, row: &Digest) {
        let mut delta = self.account.get();
        delta.comes(row);
        self.account.set(delta);
    }

    fn goes(&self, row: &Digest) {
        let mut delta = self.account.get();
        delta.goes(row);
        self.account.set(delta);
    }

    fn replaces(&self, old: Option<Digest>, new: &Digest) {
        if let Some(old) = old {
            self.goes(&old);
        }
        self.comes(new);
    }

    /// Writes a document; `insert` says that there must be none of its id.
    pub fn document(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        body: &str,
        insert: bool,
    ) -> Changed<()> {
        let (kind, id) = (kind.stored(), id.as_bytes());
        let digest = of_document(kind, id, name, body.as_bytes());
        let (old, statement) = if insert {
            (None, "INSERT INTO document (kind, id, name, body, digest) VALUES (?1, ?2, ?3, ?4, ?5)")
        } else {
            let old =
                self.digest("SELECT digest FROM document WHERE kind = ?1 AND id = ?2", params![kind, id])?;
            let put = "INSERT INTO document (kind, id, name, body, digest) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (kind, id) DO UPDATE
                 SET name = excluded.name, body = excluded.body, digest = excluded.digest";
            (old, put)
        };
        self.prepare_cached(statement)?.execute(params![kind, id, name, body, digest])?;
        self.replaces(old, &digest);
        Ok(())
    }

    /// Removes a document; says whether there was one.
    pub fn forget_document(&self, kind: Kind, id: Uuid) -> Changed<bool> {
        let statement = "DELETE FROM document WHERE kind = ?1 AND id = ?2 RETURNING digest";
        self.forget(statement, params![kind.stored(), id.as_bytes()]).map(|gone| gone > 0)
    }

    /// Writes a document of which there is one, by its key.
    pub fn meta(&self, key: &str, body: &str) -> Changed<()> {
        let digest = of_meta(key, body.as_bytes());
        let old = self.digest("SELECT digest FROM meta WHERE key = ?1", [key])?;
        self.prepare_cached(
            "INSERT INTO meta (key, body, digest) VALUES (?1, ?2, ?3)
             ON CONFLICT (key) DO UPDATE SET body = excluded.body, digest = excluded.digest",
        )?
        .execute(params![key, body, digest])?;
        self.replaces(old, &digest);
        Ok(())
    }

    /// Removes a singleton; none is fine, too.
    pub fn forget_meta(&self, key: &str) -> Changed<()> {
        self.forget("DELETE FROM meta WHERE key = ?1 RETURNING digest", [key]).map(|_| ())
    }

    /// Writes a keyed record, with its end by the count of its space.
    pub fn keyed(&self, space: Space, key: &str, expires: Option<i64>, body: &str) -> Changed<()> {
        let space = space.stored();
        let digest = of_keyed(space, key, expires, body.as_bytes());
        let old =
            self.digest("SELECT digest FROM keyed WHERE space = ?1 AND key = ?2", params![space, key])?;
        self.prepare_cached(
            "INSERT INTO keyed (space, key, expires, body, digest) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (space, key) DO UPDATE
             SET expires = excluded.expires, body = excluded.body, digest = excluded.digest",
        )?
        .execute(params![space, key, expires, body, digest])?;
        self.replaces(old, &digest);
        Ok(())
    }

    /// Removes a keyed record; none is fine, too.
    pub fn forget_keyed(&self, space: Space, key: &str) -> Changed<()> {
        let statement = "DELETE FROM keyed WHERE space = ?1 AND key = ?2 RETURNING digest";
        self.forget(statement, params![space.stored(), key]).map(|_| ())
    }

    /// Removes a keyed record that has not expired and gives what it was.
    pub fn take_keyed(&self, space: Space, key: &str, now: i64) -> Changed<Option<String>> {
        let taken = self
            .prepare_cached(
                "DELETE FROM keyed WHERE space = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)
                 RETURNING digest, body",
            )?
            .query_row(params![space.stored(), key, now], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        if let Some((digest, _)) = &taken {
            self.goes(digest);
        }
        Ok(taken.map(|(_, body)| body))
    }

    /// Removes every keyed record of a space that has expired.
    pub fn expire_keyed(&self, space: Space, now: i64) -> Changed<()> {
        // By the index of ends, not through all that there is of the space.
        let statement = "DELETE FROM keyed WHERE +space = ?1 AND expires <= ?2 RETURNING digest";
        self.forget(statement, params![space.stored(), now]).map(|_| ())
    }

    /// Writes an entry of a log.
    pub fn entry(&self, log: Log, seq: u64, at: Timestamp, body: &str) -> Changed<()> {
        let (seq, at) = (seq as i64, at.as_millisecond());
        let digest = of_entry(log.table(), seq, at, body.as_bytes());
        let statement = match log {
            Log::Event => "INSERT INTO event (seq, at, body, digest) VALUES (?1, ?2, ?3, ?4)",
            Log::Audit => "INSERT INTO audit (seq, at, body, digest) VALUES (?1, ?2, ?3, ?4)",
        };
        self.prepare_cached(statement)?.execute(params![seq, at, body, digest])?;
        self.comes(&digest);
        Ok(())
    }

    /// Writes what came of an entry of the audit log.
    pub fn outcome(&self, seq: u64, at: Timestamp, body: &str) -> Changed<()> {
        let (seq, at) = (seq as i64, at.as_millisecond());
        let digest = of_entry(OUTCOME, seq, at, body.as_bytes());
        let old = self.digest("SELECT digest FROM audit_outcome WHERE seq = ?1", [seq])?;
        self.prepare_cached(
            "INSERT INTO audit_outcome (seq, at, body, digest) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (seq) DO UPDATE SET at = excluded.at, body = excluded.body, digest = excluded.digest",
        )?
        .execute(params![seq, at, body, digest])?;
        self.replaces(old, &digest);
        Ok(())
    }

    /// Removes the entries of a log up to `last`, and what came of them.
    pub fn forget_entries(&self, log: Log, last: u64) -> Changed<()> {
        let statements: &[&str] = match log {
            Log::Event => &["DELETE FROM event WHERE seq <= ?1 RETURNING digest"],
            Log::Audit => &[
                "DELETE FROM audit WHERE seq <= ?1 RETURNING digest",
                "DELETE FROM audit_outcome WHERE seq <= ?1 RETURNING digest",
            ],
        };
        for statement in statements {
            self.forget(statement, [last as i64])?;
        }
        Ok(())
    }

    fn digest(&self, statement: &str, which: impl rusqlite::Params) -> Changed<Option<Digest>> {
        self.prepare_cached(statement)?.query_row(which, |row| row.get(0)).optional()
    }

    fn forget(&self, statement: &str, which: impl rusqlite::Params) -> Changed<usize> {
        let mut statement = self.prepare_cached(statement)?;
        let mut rows = statement.query(which)?;
        let mut gone = 0;
        while let Some(row) = rows.next()? {
            self.goes(&row.get(0)?);
            gone += 1;
        }
        Ok(gone)
    }
}

const OUTCOME: &str = "audit_outcome";

pub(super) fn of_document(kind: &str, id: &[u8], name: Option<&str>, body: &[u8]) -> Digest {
    let named = [u8::from(name.is_some())];
    digest_of(&[b"document", kind.as_bytes(), id, &named, name.unwrap_or_default().as_bytes(), body])
}

pub(super) fn of_meta(key: &str, body: &[u8]) -> Digest {
    digest_of(&[b"meta", key.as_bytes(), body])
}

fn of_keyed(space: &str, key: &str, expires: Option<i64>, body: &[u8]) -> Digest {
    let (ends, at) = ([u8::from(expires.is_some())], expires.unwrap_or_default().to_le_bytes());
    digest_of(&[b"keyed", space.as_bytes(), key.as_bytes(), &ends, &at, body])
}

fn of_entry(table: &str, seq: i64, at: i64, body: &[u8]) -> Digest {
    digest_of(&[table.as_bytes(), &seq.to_le_bytes(), &at.to_le_bytes(), body])
}

/// A table, and how a walk through all of it reads a row.
struct Walked {
    select: &'static str,
    /// Gives the digest that the row should have.
    digest: fn(&Row<'_>) -> rusqlite::Result<Digest>,
    /// What the row is, for people.
    name: fn(&Row<'_>) -> String,
    /// Its key, to have it removed by.
    remove: &'static str,
}

/// How often a column may be read.
fn text(row: &Row<'_>, column: usize) -> String {
    row.get::<_, String>(column).unwrap_or_else(|_| "?".to_owned())
}

fn id(row: &Row<'_>, column: usize) -> String {
    row.get::<_, [u8; 16]>(column).map_or_else(|_| "?".to_owned(), |id| Uuid::from_bytes(id).to_string())
}

fn number(row: &Row<'_>, column: usize) -> String {
    row.get::<_, i64>(column).map_or_else(|_| "?".to_owned(), |n| n.to_string())
}

fn bytes<'r>(row: &'r Row<'_>, column: usize) -> rusqlite::Result<&'r [u8]> {
    Ok(row.get_ref(column)?.as_bytes()?)
}

/// Column 0 is the digest as stored.
const TABLES: [Walked; 6] = [
    Walked {
        select: "SELECT digest, kind, id, name, body FROM document",
        digest: |row| {
            let (kind, name) = (row.get::<_, String>(1)?, row.get::<_, Option<String>>(3)?);
            Ok(of_document(&kind, bytes(row, 2)?, name.as_deref(), bytes(row, 4)?))
        },
        name: |row| match row.get::<_, Option<String>>(3) {
            Ok(Some(name)) => format!("{} {} ({name:?})", text(row, 1), id(row, 2)),
            _ => format!("{} {}", text(row, 1), id(row, 2)),
        },
        remove: "DELETE FROM document WHERE kind = ?2 AND id = ?3",
    },
    Walked {
        select: "SELECT digest, key, body FROM meta",
        digest: |row| Ok(of_meta(&row.get::<_, String>(1)?, bytes(row, 2)?)),
        name: |row| format!("the host's {}", text(row, 1)),
        remove: "DELETE FROM meta WHERE key = ?2",
    },
    Walked {
        select: "SELECT digest, space, key, expires, body FROM keyed",
        digest: |row| {
            let (space, key) = (row.get::<_, String>(1)?, row.get::<_, String>(2)?);
            Ok(of_keyed(&space, &key, row.get(3)?, bytes(row, 4)?))
        },
        // The key of a ticket is its secret.
        name: |row| format!("a record of kind {:?}", text(row, 1)),
        remove: "DELETE FROM keyed WHERE space = ?2 AND key = ?3",
    },
    Walked {
        select: "SELECT digest, seq, at, body FROM event",
        digest: |row| Ok(of_entry("event", row.get(1)?, row.get(2)?, bytes(row, 3)?)),
        name: |row| format!("event {}", number(row, 1)),
        remove: "DELETE FROM event WHERE seq = ?2",
    },
    Walked {
        select: "SELECT digest, seq, at, body FROM audit",
        digest: |row| Ok(of_entry("audit", row.get(1)?, row.get(2)?, bytes(row, 3)?)),
        name: |row| format!("audit entry {}", number(row, 1)),
        remove: "DELETE FROM audit WHERE seq = ?2",
    },
    Walked {
        select: "SELECT digest, seq, at, body FROM audit_outcome",
        digest: |row| Ok(of_entry(OUTCOME, row.get(1)?, row.get(2)?, bytes(row, 3)?)),
        name: |row| format!("the outcome of audit entry {}", number(row, 1)),
        remove: "DELETE FROM audit_outcome WHERE seq = ?2",
    },
];

/// What all rows come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Walk {
    /// Of the rows that are what was written.
    pub good: Delta,
    /// The rows that are not, by what they are.
    pub damaged: Vec<String>,
}

/// Looks at every row.
pub(super) fn walk(connection: &Connection) -> Result<Walk, StoreError> {
    let mut found = Walk::default();
    for table in &TABLES {
        each(connection, table, |row, seen| {
            match seen.good() {
                Some(digest) => found.good.comes(&digest),
                None => found.damaged.push((table.name)(row)),
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// Removes every row that is not what was written; no account is kept.
pub(super) fn remove_damaged(connection: &Connection) -> Result<(), StoreError> {
    for table in &TABLES {
        let mut keys = Vec::new();
        each(connection, table, |row, seen| {
            if seen.good().is_none() {
                keys.push((None, Key::of(row)?));
            }
            Ok(())
        })?;
        change_each(connection, table.remove, keys)?;
    }
    Ok(())
}

/// Gives every row its digest, whatever it has; for a database of a time when rows had none.
pub(super) fn seal(connection: &Connection) -> Result<(), StoreError> {
    for table in &TABLES {
        let mut sealed = Vec::new();
        each(connection, table, |row, seen| {
            sealed.push((Some(seen.right?), Key::of(row)?));
            Ok(())
        })?;
        let update = table.remove.replace("DELETE FROM", "UPDATE").replace("WHERE", "SET digest = ?1 WHERE");
        change_each(connection, &update, sealed)?;
    }
    Ok(())
}

/// A row's digests.
struct Seen {
    /// As it is stored.
    stored: Option<Digest>,
    /// As it should be.
    right: rusqlite::Result<Digest>,
}

impl Seen {
    /// The digest, if it is the right one.
    fn good(&self) -> Option<Digest> {
        self.stored.filter(|stored| self.right.as_ref().is_ok_and(|right| right == stored))
    }
}

/// What a row is found by, as it is found, whatever type damage has made of it; where a table's key is one
/// column, the second is not used.
struct Key([rusqlite::types::Value; 2]);

impl Key {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self([row.get(1)?, row.get(2)?]))
    }
}

/// Calls `seen` with each row, and its digests.
fn each(
    connection: &Connection,
    table: &Walked,
    mut seen: impl FnMut(&Row<'_>, Seen) -> rusqlite::Result<()>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare(table.select).map_err(StoreError::from)?;
    let mut rows = statement.query([]).map_err(StoreError::from)?;
    while let Some(row) = rows.next().map_err(StoreError::from)? {
        let digests = Seen { stored: row.get(0).ok(), right: (table.digest)(row) };
        seen(row, digests).map_err(StoreError::from)?;
    }
    Ok(())
}

/// Carries out a statement for each key, which is its parameters from the second on; the first is a digest.
fn change_each(
    connection: &Connection,
    statement: &str,
    keys: Vec<(Option<Digest>, Key)>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare(statement).map_err(StoreError::from)?;
    for (digest, Key(key)) in keys {
        if let Some(digest) = digest {
            statement.raw_bind_parameter(1, digest).map_err(StoreError::from)?;
        }
        for at in 2..=statement.parameter_count() {
            statement.raw_bind_parameter(at, &key[at - 2]).map_err(StoreError::from)?;
        }
        statement.raw_execute().map_err(StoreError::from)?;
    }
    Ok(())
}
