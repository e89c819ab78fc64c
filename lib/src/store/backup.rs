//! A copy of a database in one file of its own.
//!
//! Owns: its form, that it is whole before it has its name. Must not know: who wants one, or puts it back.
//!
//! A backup is a database file of its own that needs no log and no mark, with one more table for what belongs
//! to the host and is not in its database.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};
use rustix::fs::{CWD, RenameFlags};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::form::Document;
use super::mark::{Position, digest_of};
use super::open::{self, Place};
use super::position::position_of;
use super::{Kind, PrivateFileError, StoreError, documents};

/// What a backup has beside the tables of a database.
pub(super) const RIDERS: &str = "CREATE TABLE rider (name TEXT PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL) STRICT, WITHOUT ROWID;";

/// A file that goes into a backup with the database.
#[derive(Clone)]
pub struct Rider {
    /// What it is found by.
    pub name: String,
    /// What is in it.
    pub body: Zeroizing<Vec<u8>>,
}

/// The documents of a database that somebody looks at.
pub struct Documents<'c>(pub(super) &'c Connection);

impl Documents<'_> {
    /// All of a kind, by id.
    ///
    /// # Errors
    /// One that cannot be read.
    pub fn list<T: Document>(&self, kind: Kind) -> Result<Vec<(Uuid, T)>, StoreError> {
        documents::list(self.0, kind)
    }
}

/// Copies a database into a new file that nobody else can read; gives the position that the copy has. One of
/// a version that has none is copied alone: no build puts it back.
pub(super) fn copy(
    place: &Place,
    to: &Path,
    riders: impl FnOnce(&Documents<'_>) -> Result<Vec<Rider>, StoreError>,
) -> Result<Option<Position>, StoreError> {
    let temporary = beside(to)?;
    let failed = |operation, source| file_error(operation, to, source);
    let copied = (|| {
        let mut private = OpenOptions::new();
        let file = private.read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.map_err(|e| failed("create", e))?;
        let source = open::look(place)?;
        let query_only = source.pragma_update(None, "query_only", false);
        query_only
            .and_then(|()| source.execute("VACUUM INTO ?1", [utf8(&temporary)?]))
            .map_err(StoreError::from)?;
        let copy = Connection::open_with_flags(&temporary, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let version = open::check_file(to, &copy, "")?;
        let position = open::has_position(version).then(|| position_of(to, &copy)).transpose()?;
        if let Some(position) = &position {
            open::check_rows(to, &copy, position)?;
            // Those that belong to what was copied, whatever has changed since.
            let riders = riders(&Documents(&copy))?;
            copy.execute_batch(RIDERS)?;
            for Rider { name, body } in riders {
                let digest = digest_of(&[name.as_bytes(), &body]);
                let put = "INSERT INTO rider (name, body, digest) VALUES (?1, ?2, ?3)";
                copy.execute(put, params![name, body.as_slice(), digest])?;
            }
        }
        copy.close().map_err(|(_, error)| error)?;
        file.sync_all().map_err(|e| failed("write", e))?;
        rustix::fs::renameat_with(CWD, &temporary, CWD, to, RenameFlags::NOREPLACE)
            .map_err(|e| failed("make", e.into()))?;
        sync_parent(to).map_err(|e| failed("make", e))?;
        Ok(position)
    })();
    if copied.is_err() {
        // The first failure is the one to report.
        let _ = std::fs::remove_file(&temporary);
    }
    copied
}

/// Whether there is a whole backup at `to` of a database that was of this version and at this position.
pub(super) fn is_backup_of(to: &Path, version: i64, at: &Position) -> bool {
    let look = || {
        let place = Place::of(to, false)?;
        place.check_header()?;
        let connection = open::look(&place)?;
        let found = (open::check_file(to, &connection, RIDERS)?, position_of(to, &connection)?);
        open::check_rows(to, &connection, &found.1)?;
        Ok::<_, StoreError>(found == (version, *at))
    };
    look().unwrap_or(false)
}

/// A name in the same directory, for the time until the file is whole.
fn beside(to: &Path) -> Result<PathBuf, StoreError> {
    let wrong = || StoreError::Files(PrivateFileError::WrongType { path: to.to_owned() });
    let name = to.file_name().ok_or_else(wrong)?.to_string_lossy();
    if to.symlink_metadata().is_ok() {
        return Err(StoreError::Files(PrivateFileError::Exists { path: to.to_owned() }));
    }
    Ok(to.with_file_name(format!(".{name}.{}.new", Uuid::new_v4().simple())))
}

fn sync_parent(of: &Path) -> io::Result<()> {
    let parent = of.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(parent)?.sync_all()
}

fn utf8(path: &Path) -> rusqlite::Result<&str> {
    path.to_str().ok_or_else(|| rusqlite::Error::InvalidPath(path.to_owned()))
}

pub(super) fn file_error(operation: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::of_files(PrivateFileError::Io { operation, path: path.to_owned(), source })
}
