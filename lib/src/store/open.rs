//! Opening the database file, or refusing to.
//!
//! Owns: creation, the checks on what is there, schema versions. Must not know: documents.
//!
//! A new file is made under another name and renamed when it is complete and on disk, so under its own name there is
//! never an unfinished one: an empty or half-made file is damage. A file of another program is recognized by its first
//! bytes, before SQLite gets to change anything in it.
//!
//! SQLite opens by path, not by descriptor. That the path still leads to the directory that was checked rests on the
//! directories above it, which are the administrator's.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::OFlags;

use super::StoreError;
use super::ledger::{OUTCOMES, SCHEMA as LEDGER};
use crate::private_files::{FileLock, PrivateDir, PrivateFileError};

/// `PRAGMA application_id`: "mrvm".
const APPLICATION_ID: u32 = 0x6d72_766d;
/// `PRAGMA user_version` of files that this program writes.
/// 2 added the ledger, 3 the outcomes of its audit log.
const SCHEMA_VERSION: i64 = 3;
const SCHEMA: &str = "
    CREATE TABLE document (
        kind TEXT NOT NULL,
        id BLOB NOT NULL,
        name TEXT,
        body TEXT NOT NULL,
        PRIMARY KEY (kind, id)
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX document_name ON document (kind, name) WHERE name IS NOT NULL;
    CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT, WITHOUT ROWID;
";
/// Bytes of the file header, its magic and where it has the application id, big-endian
/// (<https://sqlite.org/fileformat.html> section 1.3).
const HEADER_LEN: u64 = 100;
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const APPLICATION_ID_AT: std::ops::Range<usize> = 68..72;
/// For somebody who inspects the file with another tool at the same time.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection, and the lock to hold as long as it lives.
pub(super) fn open(path: &Path) -> Result<(Connection, FileLock), StoreError> {
    let (parent, name) = match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => (parent, name),
        _ => return Err(StoreError::Files(PrivateFileError::WrongType { path: path.to_owned() })),
    };
    let dir = PrivateDir::open_or_create(parent).map_err(StoreError::Files)?;
    let lock = dir.lock(&format!("{name}.lock")).map_err(|error| match error {
        PrivateFileError::Locked { .. } => StoreError::InUse,
        other => StoreError::Files(other),
    })?;
    match dir.open_file(name, OFlags::RDWR) {
        Ok(file) => check_header(path, file)?,
        Err(PrivateFileError::Missing { .. }) => create(&dir, name)?,
        Err(other) => return Err(StoreError::Files(other)),
    }
    let connection = connect(&dir, name).map_err(|error| classify(path, error))?;
    // Damage is found before anything is added to the file.
    check_content(path, &connection)?;
    check_version(path, &connection)?;
    Ok((connection, lock))
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

fn create(dir: &PrivateDir, name: &str) -> Result<(), StoreError> {
    let temporary = dir.temporary_name(name);
    // Made by us, with our mode; SQLite takes an empty file for a new database.
    dir.create(&temporary, &[]).map_err(StoreError::Files)?;
    let filled = fill(dir, &temporary)
        .map_err(StoreError::from)
        .and_then(|()| dir.publish(&temporary, name).map_err(StoreError::Files));
    if filled.is_err() {
        for leftover in ["", "-wal", "-shm", "-journal"] {
            // The first failure is the one to report.
            let _ = dir.remove_if_present(&format!("{temporary}{leftover}"));
        }
    }
    filled
}

fn fill(dir: &PrivateDir, temporary: &str) -> rusqlite::Result<()> {
    let connection = connect(dir, temporary)?;
    connection.execute_batch(&format!(
        "BEGIN; {SCHEMA} {LEDGER} {OUTCOMES} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    ))?;
    // The last connection's close moves the log into the file, syncs it and removes the log.
    connection.close().map_err(|(_, error)| error)
}

/// One more connection to a file that [`open`] has accepted and this process holds the lock of.
pub(super) fn another(path: &Path) -> Result<Connection, StoreError> {
    let wrong = || StoreError::Files(PrivateFileError::WrongType { path: path.to_owned() });
    let parent = path.parent().ok_or_else(wrong)?;
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(wrong)?;
    let dir = PrivateDir::open(parent).map_err(StoreError::Files)?;
    connect(&dir, name).map_err(|error| classify(path, error))
}

fn connect(dir: &PrivateDir, name: &str) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(dir.entry(name), flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", false)?;
    // Cells are checked as they are read, and nothing in the schema runs code.
    connection.pragma_update(None, "cell_size_check", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    Ok(connection)
}

fn check_version(path: &Path, connection: &Connection) -> Result<(), StoreError> {
    let version = connection
        .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        .map_err(|error| classify(path, error))?;
    match version {
        SCHEMA_VERSION => Ok(()),
        1 | 2 => {
            let missing = if version == 1 { LEDGER } else { "" };
            let added =
                format!("BEGIN; {missing} {OUTCOMES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;");
            connection.execute_batch(&added).map_err(|error| classify(path, error))
        }
        found if found > SCHEMA_VERSION => {
            Err(StoreError::TooNew { path: path.to_owned(), found, known: SCHEMA_VERSION })
        }
        _ => Err(StoreError::Corrupt { path: path.to_owned(), source: None }),
    }
}

/// Walks the whole file: damage is found at start, not in the middle of a migration.
fn check_content(path: &Path, connection: &Connection) -> Result<(), StoreError> {
    let verdict = connection
        .pragma_query_value(None, "integrity_check", |row| row.get::<_, String>(0))
        .map_err(|error| classify(path, error))?;
    if verdict != "ok" {
        tracing::error!(verdict, "database damaged");
        return Err(StoreError::Corrupt { path: path.to_owned(), source: None });
    }
    let tables = "SELECT count(*) FROM sqlite_schema WHERE name IN ('document', 'document_name', 'meta')";
    match connection.query_row(tables, [], |row| row.get::<_, i64>(0)) {
        Ok(3) => Ok(()),
        Ok(_) => Err(StoreError::Corrupt { path: path.to_owned(), source: None }),
        Err(error) => Err(classify(path, error)),
    }
}

fn classify(path: &Path, error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => StoreError::Foreign { path: path.to_owned() },
        Some(ErrorCode::DatabaseCorrupt) => {
            StoreError::Corrupt { path: path.to_owned(), source: Some(error) }
        }
        _ => StoreError::from(error),
    }
}
