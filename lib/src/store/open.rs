//! The database file: made, connected to, looked through.
//!
//! Owns: creation, the checks on what is there, schema versions. Must not know: documents.
//!
//! A new file is made under another name and renamed when it is complete and on disk, so under its own name
//! there is never an unfinished one: an empty or half-made file is damage. A file of another program is
//! recognized by its first bytes, before SQLite gets to change anything in it.
//!
//! What is there is believed when everything agrees: SQLite's own check of the file, the schema, every row
//! with its digest, their sum with the database's position, and that with the mark beside it (`start`). Until
//! then nothing is written and nothing is tidied up: what a refused start leaves is what it found.
//!
//! SQLite opens by path, not by descriptor. That the path still leads to the directory that was checked rests
//! on the directories above it, which are the administrator's.

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use rustix::fs::OFlags;

use super::StoreError;
use super::finding::{Finding, damaged_or, untrusted};
use super::ledger::{OUTCOMES, SCHEMA as LEDGER};
use super::mark::{self, Delta, Position, Word};
use super::position::put_first_position;
use super::rows::{self, Rows};
use crate::private_files::{FileLock, PrivateDir, PrivateFileError};

/// `PRAGMA application_id`: "mrvm".
const APPLICATION_ID: u32 = 0x6d72_766d;
/// `PRAGMA user_version` of files that this program writes. 2 added the ledger, 3 the outcomes of its audit
/// log, 4 the digests of rows and the position. 5 gave documents forms that say their version; its tables are
/// those of 4. 6 and 7 have more members in some.
pub(super) const SCHEMA_VERSION: i64 = 7;
/// The first that has a position, digests of rows, and a mark beside it.
const FIRST_MARKED: i64 = 4;
const SCHEMA: &str = "
    CREATE TABLE document (
        kind TEXT NOT NULL,
        id BLOB NOT NULL,
        name TEXT,
        body TEXT NOT NULL,
        digest BLOB NOT NULL,
        PRIMARY KEY (kind, id)
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX document_name ON document (kind, name) WHERE name IS NOT NULL;
    CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE position (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        seq INTEGER NOT NULL,
        rows INTEGER NOT NULL,
        chain BLOB NOT NULL,
        before BLOB NOT NULL,
        sum BLOB NOT NULL
    ) STRICT;
";
/// Tables with rows of ours, and their columns without the digest.
const TABLES: [(&str, &str); 6] = [
    ("document", "kind, id, name, body"),
    ("meta", "key, body"),
    ("event", "seq, at, body"),
    ("audit", "seq, at, body"),
    ("audit_outcome", "seq, at, body"),
    ("keyed", "space, key, expires, body"),
];
/// Bytes of the file header, its magic and where it has the application id, big-endian
/// (<https://sqlite.org/fileformat.html> section 1.3).
const HEADER_LEN: u64 = 100;
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const APPLICATION_ID_AT: std::ops::Range<usize> = 68..72;
/// For somebody who inspects the file with another tool at the same time.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a database is.
pub(super) struct Place {
    pub dir: PrivateDir,
    pub name: String,
    pub mark: String,
}

impl Place {
    pub fn of(path: &Path, make: bool) -> Result<Self, StoreError> {
        let (parent, name) = match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
            (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => (parent, name),
            _ => return Err(StoreError::Files(PrivateFileError::WrongType { path: path.to_owned() })),
        };
        let dir = if make { PrivateDir::open_or_create(parent) } else { PrivateDir::open(parent) };
        let dir = dir.map_err(StoreError::Files)?;
        Ok(Self { dir, name: name.to_owned(), mark: mark::name_of(name) })
    }

    /// Keeps every other daemon out.
    pub fn lock(&self) -> Result<FileLock, StoreError> {
        self.dir.lock(&format!("{}.lock", self.name)).map_err(|error| match error {
            PrivateFileError::Locked { .. } => StoreError::InUse,
            other => StoreError::Files(other),
        })
    }

    pub fn word(&self) -> Result<Word, StoreError> {
        mark::read(&self.dir, &self.mark).map_err(StoreError::Files)
    }

    pub fn has(&self, suffix: &str) -> Result<bool, StoreError> {
        self.dir.contains(&format!("{}{suffix}", self.name)).map_err(StoreError::Files)
    }

    /// Checks the first bytes of a database that is there; says whether one is.
    pub fn check_header(&self) -> Result<bool, StoreError> {
        match self.dir.open_file(&self.name, OFlags::RDWR) {
            Ok(file) => check_header(&self.dir.entry(&self.name), file).map(|()| true),
            Err(PrivateFileError::Missing { .. }) => Ok(false),
            Err(other) => Err(StoreError::Files(other)),
        }
    }
}

fn check_header(path: &Path, file: File) -> Result<(), StoreError> {
    let mut header = Vec::with_capacity(HEADER_LEN as usize);
    file.take(HEADER_LEN).read_to_end(&mut header).map_err(|source| {
        StoreError::Files(PrivateFileError::Io { operation: "read", path: path.to_owned(), source })
    })?;
    if header.is_empty() {
        return Err(StoreError::Empty { path: path.to_owned() });
    }
    let ours = header.starts_with(MAGIC)
        && header.get(APPLICATION_ID_AT) == Some(APPLICATION_ID.to_be_bytes().as_slice());
    if ours { Ok(()) } else { Err(StoreError::Foreign { path: path.to_owned() }) }
}

pub(super) fn create(place: &Place) -> Result<(), StoreError> {
    let (dir, name) = (&place.dir, &place.name);
    let temporary = dir.temporary_name(name);
    // Made by us, with our mode; SQLite takes an empty file for a new database.
    dir.create(&temporary, &[]).map_err(StoreError::Files)?;
    let filled = fill(dir, &temporary)
        .map_err(StoreError::from)
        .and_then(|()| dir.publish(&temporary, name).map_err(StoreError::Files));
    if filled.is_err() {
        discard(dir, &temporary);
    }
    filled
}

/// Removes a database under a temporary name with everything that SQLite put beside it.
pub(super) fn discard(dir: &PrivateDir, temporary: &str) {
    for leftover in ["", "-wal", "-shm", "-journal"] {
        // The first failure is the one to report.
        let _ = dir.remove_if_present(&format!("{temporary}{leftover}"));
    }
}

fn fill(dir: &PrivateDir, temporary: &str) -> rusqlite::Result<()> {
    let connection = connect(dir, temporary)?;
    to_write(&connection)?;
    let begin = format!("BEGIN; {} PRAGMA application_id = {APPLICATION_ID};", schema());
    connection.execute_batch(&begin)?;
    put_first_position(&connection, &Position::first(0, [0; 16]))?;
    connection.execute_batch(&format!("PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))?;
    // The last connection's close moves the log into the file, syncs it and removes the log.
    connection.close().map_err(|(_, error)| error)
}

fn schema() -> String {
    format!("{SCHEMA} {LEDGER} {OUTCOMES}")
}

/// One more connection to a file that [`open`] has accepted and this process holds the lock of.
pub(super) fn another(path: &Path) -> Result<Connection, StoreError> {
    let place = Place::of(path, false)?;
    connect(&place.dir, &place.name)
        .and_then(|connection| to_write(&connection).map(|()| connection))
        .map_err(|error| damaged_or(path, error))
}

/// A connection that leaves everything as it is, also when it is closed.
pub(super) fn look(place: &Place) -> Result<Connection, StoreError> {
    let path = place.dir.entry(&place.name);
    let quiet = || {
        let connection = connect(&place.dir, &place.name)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(connection)
    };
    quiet().map_err(|error: rusqlite::Error| damaged_or(&path, error))
}

fn connect(dir: &PrivateDir, name: &str) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(dir.entry(name), flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Cells are checked as they are read, and nothing in the schema runs code.
    connection.pragma_update(None, "cell_size_check", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    // What a statement may have to take back lies in memory: beyond 64 KiB SQLite would make a file of it in
    // a directory for everybody's, which it has no business in and a confined daemon no way to.
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    Ok(connection)
}

/// Lets a connection write, and have its log tidied up when it is closed.
pub(super) fn to_write(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "query_only", false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // 1 MiB, and not 2 MiB for each: what is written comes in the order of time, so few pages are asked for
    // again, and the kernel has them, too. Setting it reads the file, which is nobody's before it was
    // looked at.
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.pragma_update(None, "foreign_keys", false)
}

/// Gives a database of a version without a position what it lacks; `forward` writes the documents that
/// change.
pub(super) fn upgrade(
    connection: &Connection,
    version: i64,
    forward: impl FnOnce(&Rows<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    connection.execute_batch("BEGIN IMMEDIATE").map_err(StoreError::from)?;
    let upgraded = (|| {
        let mut script = String::from("DROP INDEX document_name;");
        let there = |table: &str| match table {
            "document" | "meta" => true,
            "audit_outcome" => version >= 3,
            _ => version >= 2,
        };
        let old = || TABLES.iter().filter(|(table, _)| there(table));
        old().for_each(|(table, _)| script += &format!("ALTER TABLE {table} RENAME TO old_{table};"));
        if version >= 2 {
            script += "DROP INDEX keyed_expires;";
        }
        script += &schema();
        for (table, columns) in old() {
            script += &format!(
                "INSERT INTO {table} ({columns}, digest) SELECT {columns}, zeroblob(16) FROM old_{table};
                 DROP TABLE old_{table};"
            );
        }
        connection.execute_batch(&script)?;
        rows::seal(connection)?;
        // All that there is is counted below.
        forward(&Rows::new(connection, &Cell::default()))?;
        let found = rows::walk(connection)?.good;
        put_first_position(connection, &Position::first(found.rows as u64, found.sum))?;
        connection.execute_batch(&format!("PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))?;
        Ok(())
    })();
    if upgraded.is_err() {
        // The first failure is the one to report.
        let _ = connection.execute_batch("ROLLBACK");
    }
    upgraded
}

/// Whether databases of this version have a position, and rows digests.
pub(super) const fn has_position(version: i64) -> bool {
    FIRST_MARKED <= version && version <= SCHEMA_VERSION
}

/// Walks the whole file and looks at its schema, which is ours and `more`; gives its version. Damage is found
/// at start, not in the middle of a migration.
pub(super) fn check_file(path: &Path, connection: &Connection, more: &str) -> Result<i64, StoreError> {
    let failed = |error: rusqlite::Error| damaged_or(path, error);
    let version: i64 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    if version > SCHEMA_VERSION {
        return Err(StoreError::TooNew { path: path.to_owned(), found: version, known: SCHEMA_VERSION });
    }
    let verdict = connection
        .pragma_query_value(None, "integrity_check", |row| row.get::<_, String>(0))
        .map_err(failed)?;
    if verdict != "ok" {
        tracing::error!(verdict, "database damaged");
        return Err(StoreError::Corrupt { path: path.to_owned(), source: None });
    }
    let found = schema_of(connection).map_err(failed)?;
    let good = match version {
        FIRST_MARKED..=SCHEMA_VERSION => {
            let right = Connection::open_in_memory().map_err(StoreError::from)?;
            right.execute_batch(&format!("{} {more}", schema())).map_err(StoreError::from)?;
            found == schema_of(&right).map_err(StoreError::from)?
        }
        1..FIRST_MARKED => {
            let has = |name: &str| found.iter().any(|part| part[1] == name);
            ["document", "document_name", "meta"].iter().all(|name| has(name)) && !has("position")
        }
        _ => false,
    };
    if good { Ok(version) } else { Err(untrusted(path, Finding::Part { what: "its schema" })) }
}

/// Everything in the schema: type, name, table, text without what white space there is between its words.
fn schema_of(connection: &Connection) -> rusqlite::Result<Vec<[String; 4]>> {
    let statement = "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema ORDER BY type, name";
    let mut statement = connection.prepare(statement)?;
    let rows = statement.query_map([], |row| {
        let sql: String = row.get(3)?;
        let sql = sql.split_whitespace().collect::<Vec<_>>().join(" ");
        Ok([row.get(0)?, row.get(1)?, row.get(2)?, sql])
    })?;
    rows.collect()
}

/// Whether the rows are those that the database's position was made of.
pub(super) fn check_rows(path: &Path, connection: &Connection, at: &Position) -> Result<(), StoreError> {
    let found = rows::walk(connection)?;
    if !found.damaged.is_empty() {
        return Err(untrusted(path, Finding::Records { damaged: found.damaged }));
    }
    let Delta { rows, sum, .. } = found.good;
    if rows as u64 == at.rows && sum == at.sum {
        return Ok(());
    }
    Err(untrusted(path, Finding::Sum { found: rows as u64, expected: at.rows }))
}
