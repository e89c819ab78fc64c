//! Bringing a database of an earlier version forward: it is saved as it is, and then changed in one
//! transaction.
//!
//! Owns: which documents change, the backup beside the database, the change. Must not know: what documents
//! mean; who opens the database brings what renews them.
//!
//! Every document is read before anything is written, so that one that is not understood leaves everything as
//! it was. The backup is named after the version and the position that it holds: what an attempt that ended
//! early has left is found again by its name, and used when it is whole. Documents and version change
//! together, by way of the keeper, as every other commit. Entries of the logs and keyed records stay as they
//! are: they go by themselves, and whoever reads them reads every version that there was.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, TransactionBehavior};
use uuid::Uuid;

use super::form::Unread;
use super::keeper::Keeper;
use super::mark::{Delta, Position};
use super::open::{self, Place, SCHEMA_VERSION};
use super::rows::Rows;
use super::{DocumentRef, Kind, PrivateFileError, StoreError, backup, singles};

/// Gives a document the form that this build writes; `None`: it has it, or is none that is known.
pub type Renew = fn(&DocumentRef, &[u8]) -> Result<Option<String>, Unread>;

/// A document that looks otherwise from now on.
struct Change {
    which: Which,
    body: String,
}

enum Which {
    Document(Kind, Uuid, Option<String>),
    Meta(String),
}

/// What leads a database from its version to this one; it is saved already.
pub(super) struct Step {
    from: i64,
    saved: PathBuf,
    changes: Vec<Change>,
}

impl Step {
    /// Finds out what changes, and saves the database as it is; `at` is its position, where its version has
    /// one.
    pub fn prepare(
        place: &Place,
        connection: &Connection,
        from: i64,
        at: Option<&Position>,
        renew: Renew,
    ) -> Result<Self, StoreError> {
        let changes = changes(connection, renew)?;
        Ok(Self { from, saved: save(place, from, at)?, changes })
    }

    /// Within a transaction: writes the documents that change.
    pub fn write(&self, rows: &Rows<'_>) -> Result<(), StoreError> {
        for Change { which, body } in &self.changes {
            match which {
                Which::Document(kind, id, name) => {
                    super::documents::put(rows, *kind, *id, name.as_deref(), body)?;
                }
                Which::Meta(key) => rows.meta(key, body)?,
            }
        }
        Ok(())
    }

    /// Changes a database that has a position: all of it, or nothing.
    pub fn take(&self, connection: &mut Connection, keeper: &mut Keeper) -> Result<(), StoreError> {
        let t = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let account = Cell::new(Delta::default());
        self.write(&Rows::new(&t, &account))?;
        t.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        keeper.commit(t, &account.get())
    }

    /// Says what was done.
    pub fn tell(&self, path: &Path) {
        tracing::warn!(
            documents = self.changes.len(),
            "{} was of version {} and is of version {SCHEMA_VERSION} now, which earlier builds do not open; what it was is in \
             {}, and `mirrorvmd state restore` of the build that wrote it puts that back",
            path.display(),
            self.from,
            self.saved.display(),
        );
    }
}

/// The documents that look otherwise in this version.
fn changes(connection: &Connection, renew: Renew) -> Result<Vec<Change>, StoreError> {
    let mut changes = Vec::new();
    for kind in Kind::ALL {
        let mut statement = connection.prepare("SELECT id, name, body FROM document WHERE kind = ?1")?;
        let mut rows = statement.query([kind.stored()])?;
        while let Some(row) = rows.next()? {
            let id = Uuid::from_bytes(row.get(0)?);
            let document = DocumentRef::Document(kind, id);
            match renew(&document, row.get_ref(2)?.as_bytes().map_err(rusqlite::Error::from)?) {
                Ok(None) => {}
                Ok(Some(body)) => {
                    changes.push(Change { which: Which::Document(kind, id, row.get(1)?), body });
                }
                Err(source) => return Err(StoreError::Unreadable { document, source }),
            }
        }
    }
    let mut statement = connection.prepare("SELECT key, body FROM meta")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        let body = row.get_ref(1)?.as_bytes().map_err(rusqlite::Error::from)?;
        let document = DocumentRef::Meta(key.clone());
        let ours = singles::renewed(&key, body);
        match ours.unwrap_or_else(|| renew(&document, body)) {
            Ok(None) => {}
            Ok(Some(body)) => changes.push(Change { which: Which::Meta(key), body }),
            Err(source) => return Err(StoreError::Unreadable { document, source }),
        }
    }
    Ok(changes)
}

/// A backup of the database beside it, whole and on disk.
fn save(place: &Place, version: i64, at: Option<&Position>) -> Result<PathBuf, StoreError> {
    let which = match at {
        Some(at) => format!("{}-{:08x}", at.seq, u32::from_be_bytes([0, 1, 2, 3].map(|n| at.chain[n]))),
        None => Uuid::now_v7().simple().to_string(),
    };
    let name = format!("{}.v{version}-{which}", place.name);
    let (path, to) = (place.dir.entry(&place.name), place.dir.entry(&name));
    let failed = |source| StoreError::NotSaved {
        path: path.clone(),
        found: version,
        to: to.clone(),
        source: Box::new(source),
    };
    clear(place, &name).map_err(failed)?;
    if place.dir.contains(&name).map_err(StoreError::Files)? {
        if at.is_some_and(|at| backup::is_backup_of(&to, version, at)) {
            return Ok(to);
        }
        return Err(failed(StoreError::Files(PrivateFileError::Exists { path: to.clone() })));
    }
    backup::copy(place, &to, |_| Ok(Vec::new())).map_err(failed)?;
    Ok(to)
}

/// Removes what attempts that ended early have left of such a backup.
fn clear(place: &Place, name: &str) -> Result<(), StoreError> {
    let path = place.dir.entry("");
    let failed = |source| PrivateFileError::Io { operation: "read", path: path.clone(), source };
    let begins = format!(".{name}.");
    for entry in std::fs::read_dir(&path).map_err(failed).map_err(StoreError::Files)? {
        let found = entry.map_err(failed).map_err(StoreError::Files)?.file_name();
        if let Some(found) = found.to_str().filter(|found| found.starts_with(&begins)) {
            place.dir.remove_if_present(found).map_err(StoreError::Files)?;
        }
    }
    Ok(())
}

/// A database of a time before there were positions, which gets its tables anew.
pub(super) fn upgrade(connection: &Connection, step: &Step) -> Result<(), StoreError> {
    open::upgrade(connection, step.from, |rows| step.write(rows))
}
