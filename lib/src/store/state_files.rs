//! What an administrator does with a database: look whether it is whole, copy it, put a copy back, go on with
//! what is left.
//!
//! Owns: these acts on the database and its mark. Must not know: what documents mean, who asks.
//!
//! What is put back, or gone on with, is a database that others may know more than: it says so in a document,
//! and whoever opens it next has to act upon that.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::Connection;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::backup::{RIDERS, copy, file_error};
use super::finding::{Finding, older_than, untrusted};
use super::forward::{self, Step};
use super::ledger::Log;
use super::mark::{self, Delta, Digest, Position, Verdict, Word, digest_of};
use super::open::{self, Place};
use super::position::{position_of, put_first_position};
use super::rows::{self, Rows};
use super::singles::{self, EPOCH, Epoch};
use super::{DocumentRef, Renew, StoreError};

pub use super::backup::{Documents, Rider};
pub use super::singles::{Doubt, UNCONFIRMED, Unconfirmed};

/// What a database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Changes since its first.
    pub changes: u64,
    /// How many records there are.
    pub records: u64,
    /// Whether a daemon has it open.
    pub live: bool,
}

/// Looks at a database's documents, also while a daemon has it open.
///
/// # Errors
/// A database that cannot be read; those of `at`.
pub fn look<T>(
    path: &Path,
    at: impl FnOnce(&Documents<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let connection = open::look(&Place::of(path, false)?)?;
    at(&Documents(&connection))
}

/// What belongs to a database and is not in it, is not what it should be; `help` says what to do.
pub fn incomplete(path: &Path, wrong: Vec<String>, help: &'static str) -> StoreError {
    untrusted(path, Finding::Beside { wrong, help })
}

/// Looks at everything in a database and changes nothing, also while a daemon has it open.
///
/// # Errors
/// What is wrong with it.
pub fn check(path: &Path) -> Result<Facts, StoreError> {
    let place = Place::of(path, false)?;
    // Held while we look: no daemon begins meanwhile.
    let lock = match place.lock() {
        Ok(lock) => Some(lock),
        Err(StoreError::InUse) => None,
        Err(other) => return Err(other),
    };
    // Before the database: one that goes on is not behind it.
    let word = place.word()?;
    let judge = if lock.is_some() { mark::judge } else { mark::judge_live };
    check_held(path, &place, &word, judge).map(|facts| Facts { live: lock.is_none(), ..facts })
}

fn gone(path: &Path, word: &Word) -> StoreError {
    let acknowledged = match word {
        Word::At(at) => Some(at.seq),
        Word::Missing | Word::Damaged => None,
    };
    untrusted(path, Finding::Gone { acknowledged })
}

/// Copies a database, also while a daemon has it open, into a new file that nobody else can read, together
/// with the riders. What the file holds is checked before it gets its name.
///
/// # Errors
/// A database that is not whole, a file of that name, a disk that does not take it.
pub fn backup(
    path: &Path,
    to: &Path,
    riders: impl FnOnce(&Documents<'_>) -> Result<Vec<Rider>, StoreError>,
) -> Result<Facts, StoreError> {
    let facts = check(path)?;
    match copy(&Place::of(path, false)?, to, riders)? {
        Some(position) => Ok(Facts { changes: position.seq, records: position.rows, ..facts }),
        None => Err(untrusted(path, Finding::Part { what: "its schema" })),
    }
}

/// What came of putting a backup back.
pub struct Restored {
    /// What the backup held.
    pub facts: Facts,
    /// What belongs to the host and is not in its database.
    pub riders: Vec<Rider>,
    /// Where the database is now that was there before.
    pub replaced: Option<PathBuf>,
}

/// Puts a backup in the place of the database, which is kept under another name; no daemon may run. `entry`
/// goes into the audit log.
///
/// # Errors
/// A running daemon, a backup that is not whole, a disk that does not take it. The database that was there is
/// as it was, or there is none yet that a daemon would start with.
pub fn restore(from: &Path, path: &Path, entry: &str) -> Result<Restored, StoreError> {
    let place = Place::of(path, true)?;
    let _lock = place.lock()?;
    let temporary = place.dir.temporary_name(&place.name);
    let copied = put_copy(from, &place, &temporary, entry);
    let (position, facts, riders) = match copied {
        Ok(copied) => copied,
        Err(error) => {
            open::discard(&place.dir, &temporary);
            return Err(error);
        }
    };
    let replaced = set_aside(&place)?;
    place.dir.publish(&temporary, &place.name).map_err(StoreError::of_files)?;
    mark::make(&place.dir, &place.mark, &position).map_err(StoreError::of_files)?;
    Ok(Restored { facts, riders, replaced })
}

/// Copies a backup under a temporary name, checks the copy, and makes it a database that says what it is.
fn put_copy(
    from: &Path,
    place: &Place,
    temporary: &str,
    entry: &str,
) -> Result<(Position, Facts, Vec<Rider>), StoreError> {
    place.dir.create(temporary, &[]).map_err(StoreError::of_files)?;
    let copy = place.dir.entry(temporary);
    let failed = |operation, source| file_error(operation, from, source);
    let mut source = File::open(from).map_err(|e| failed("read", e))?;
    let mut target = OpenOptions::new().write(true).open(&copy).map_err(|e| failed("copy", e))?;
    io::copy(&mut source, &mut target).map_err(|e| failed("copy", e))?;
    let at = Place { name: temporary.to_owned(), ..Place::of(&place.dir.entry(&place.name), false)? };
    at.check_header().map_err(|error| named(from, error))?;
    let connection = open::look(&at).map_err(|error| named(from, error))?;
    let version = open::check_file(from, &connection, RIDERS)?;
    if !open::has_position(version) {
        return Err(untrusted(from, Finding::Part { what: "its schema" }));
    }
    let found = position_of(from, &connection)?;
    open::check_rows(from, &connection, &found)?;
    let riders = riders_in(from, &connection)?;
    open::to_write(&connection)?;
    // Nothing is left of the riders in the pages that were theirs.
    connection.pragma_update(None, "secure_delete", true)?;
    connection.execute_batch("BEGIN IMMEDIATE; DROP TABLE rider;")?;
    let position = begin_anew(&connection, version, found.seq, Doubt::Restored, entry)?;
    connection.execute_batch("COMMIT")?;
    connection.close().map_err(|(_, error)| error)?;
    target.sync_all().map_err(|e| failed("copy", e))?;
    Ok((position, Facts { changes: found.seq, records: found.rows, live: false }, riders))
}

fn riders_in(from: &Path, connection: &Connection) -> Result<Vec<Rider>, StoreError> {
    let mut statement = connection.prepare("SELECT name, body, digest FROM rider ORDER BY name")?;
    let mut rows = statement.query([])?;
    let mut riders = Vec::new();
    while let Some(row) = rows.next()? {
        let (name, body): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let body = Zeroizing::new(body);
        if row.get::<_, Digest>(2)? != digest_of(&[name.as_bytes(), &body]) {
            return Err(untrusted(from, Finding::Records { damaged: vec![name] }));
        }
        riders.push(Rider { name, body });
    }
    Ok(riders)
}

/// What going on with what is there left behind.
#[derive(Debug)]
pub struct Accepted {
    /// What was wrong; `None`: nothing was, and nothing was done.
    pub finding: Option<String>,
    /// What there is now.
    pub facts: Facts,
    /// Where files are now that are no use to the database any more.
    pub replaced: Option<PathBuf>,
}

/// Makes what is there the truth: records that are not what was written are removed, and the mark is made
/// anew. With no database there, an empty one is made; one of a version without a mark is brought forward as
/// [`Store::open`](super::Store::open) does. No daemon may run. `entry` makes the audit log's entry from what
/// was wrong.
///
/// # Errors
/// A running daemon, a file that cannot be read as a database at all.
pub fn accept(path: &Path, renew: Renew, entry: impl FnOnce(&str) -> String) -> Result<Accepted, StoreError> {
    let place = Place::of(path, false)?;
    let _lock = place.lock()?;
    let word = place.word()?;
    let wrong = match check_held(path, &place, &word, mark::judge) {
        Ok(facts) => return Ok(Accepted { finding: None, facts, replaced: None }),
        Err(StoreError::Untrusted { finding, .. }) => finding.bare(path),
        Err(other) => return Err(other),
    };
    let mut replaced = None;
    if !place.check_header()? {
        replaced = set_aside(&place)?;
        open::create(&place)?;
    }
    let connection = open::look(&place)?;
    let mut version = open::check_file(path, &connection, "")?;
    let step = (!open::has_position(version))
        .then(|| Step::prepare(&place, &connection, version, None, renew))
        .transpose()?;
    open::to_write(&connection)?;
    if let Some(step) = step {
        forward::upgrade(&connection, &step)?;
        step.tell(path);
        version = open::SCHEMA_VERSION;
    }
    let acknowledged = match &word {
        Word::At(at) => at.seq,
        Word::Missing | Word::Damaged => 0,
    };
    let found = position_of(path, &connection).map_or(0, |at| at.seq);
    connection.execute_batch("BEGIN IMMEDIATE")?;
    rows::remove_damaged(&connection)?;
    let seq = found.max(acknowledged);
    let position = begin_anew(&connection, version, seq, Doubt::Accepted, &entry(&wrong))?;
    connection.execute_batch("COMMIT")?;
    connection.close().map_err(|(_, error)| error)?;
    mark::make(&place.dir, &place.mark, &position).map_err(StoreError::of_files)?;
    let facts = Facts { changes: position.seq, records: position.rows, live: false };
    Ok(Accepted { finding: Some(wrong), facts, replaced })
}

/// As [`check`], by whoever has the lock or knows how to judge without it.
fn check_held(
    path: &Path,
    place: &Place,
    word: &Word,
    judge: fn(&Position, &Word) -> Verdict,
) -> Result<Facts, StoreError> {
    if !place.check_header()? {
        return Err(gone(path, word));
    }
    let connection = open::look(place)?;
    // Everything that is looked at is of one moment.
    connection.execute_batch("BEGIN")?;
    let version = open::check_file(path, &connection, "")?;
    if !open::has_position(version) {
        return match word {
            Word::Missing => Ok(Facts { changes: 0, records: 0, live: false }),
            word => Err(older_than(path, word)),
        };
    }
    let position = position_of(path, &connection)?;
    if let Verdict::Refused(refusal) = judge(&position, word) {
        return Err(untrusted(path, Finding::of(refusal, path, position.seq)));
    }
    open::check_rows(path, &connection, &position)?;
    Ok(Facts { changes: position.seq, records: position.rows, live: false })
}

/// Within a transaction: gives a database a history of its own from here on. What it says of guests is in
/// doubt, the numbers of its logs mean nothing to those who read them before, and the audit log says why.
fn begin_anew(
    connection: &Connection,
    version: i64,
    seq: u64,
    doubt: Doubt,
    entry: &str,
) -> Result<Position, StoreError> {
    let before = rows::walk(connection)?.good;
    let account = Cell::new(Delta::default());
    let rows = Rows::new(connection, &account);
    let unwritable = |key: &str| {
        let document = DocumentRef::Meta(key.to_owned());
        move |source| StoreError::Unwritable { document, source }
    };
    let (unconfirmed, epoch) = (Unconfirmed { doubt }, Epoch::fresh());
    let bare = match doubt {
        Doubt::Restored => "restored",
        Doubt::Accepted => "accepted",
    };
    let doubt = singles::written_for(version, &unconfirmed, bare).map_err(unwritable(UNCONFIRMED))?;
    rows.meta(UNCONFIRMED, &doubt)?;
    let epoch = singles::written_for(version, &epoch, &epoch.epoch).map_err(unwritable(EPOCH))?;
    rows.meta(EPOCH, &epoch)?;
    let last: Option<i64> = connection.query_row("SELECT max(seq) FROM audit", [], |row| row.get(0))?;
    rows.entry(Log::Audit, last.unwrap_or_default() as u64 + 1, Timestamp::now(), entry)?;
    let position = Position::anew(seq, before.rows as u64, before.sum).next(&account.get());
    connection.execute("DELETE FROM position", [])?;
    put_first_position(connection, &position)?;
    Ok(position)
}

/// Gives what is there of a database another name; gives that.
fn set_aside(place: &Place) -> Result<Option<PathBuf>, StoreError> {
    let other = format!("{}.replaced-{}", place.name, Uuid::now_v7().simple());
    let mut moved = false;
    for suffix in ["", "-wal", "-shm"] {
        if place.has(suffix)? {
            let (from, to) = (format!("{}{suffix}", place.name), format!("{other}{suffix}"));
            place.dir.publish(&from, &to).map_err(StoreError::of_files)?;
            moved = true;
        }
    }
    Ok(moved.then(|| place.dir.entry(&other)))
}

/// The same error about the file that somebody named, in place of a copy of it.
fn named(path: &Path, error: StoreError) -> StoreError {
    let path = path.to_owned();
    match error {
        StoreError::Empty { .. } => StoreError::Empty { path },
        StoreError::Foreign { .. } => StoreError::Foreign { path },
        StoreError::Corrupt { source, .. } => StoreError::Corrupt { path, source },
        other => other,
    }
}
