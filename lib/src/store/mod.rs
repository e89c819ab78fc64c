//! The host's one database file: a small typed document store.
//!
//! Owns: the file, its schema and version, durability (what a call returned `Ok` for survives `kill -9` and
//! power loss), the lock that keeps a second daemon out. Must not know: what documents mean; callers bring
//! types with forms ([`form`]).
//!
//! SQLite in WAL mode with `synchronous=FULL`: a commit is on disk before it is acknowledged, and a torn tail
//! of the log is a commit that never was. Which commits there were is told by a mark outside the log
//! (`mark`), and what they wrote by digests of the rows (`rows`), so that a log or a page that lost something
//! is not taken for one that never had it. A file that is not ours, not whole or newer than us is refused,
//! never repaired and never replaced: an empty store in place of a lost one would tell guests that they do
//! not exist.
//!
//! Blocking; `Send + Sync`. Calls run one at a time.

mod backup;
mod batch;
mod documents;
mod finding;
pub mod form;
mod forward;
mod hours;
mod keeper;
pub mod ledger;
mod mark;
mod open;
mod position;
mod rows;
mod singles;
mod start;
pub mod state_files;
mod writer;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use uuid::Uuid;

use crate::private_files::FileLock;
pub use crate::private_files::PrivateFileError;
use crate::sync::Locked;
pub use batch::Batch;
pub use documents::Transaction;
pub use finding::Finding;
use form::{Document, Unread};
pub use forward::Renew;
use keeper::{Keeper, held};
pub use ledger::Ledger;
use ledger::{Log, Space};
use mark::Delta;
use rows::Rows;
pub use writer::{Trouble, Writing};

/// Longest document taken, in bytes of JSON.
pub const MAX_DOCUMENT: usize = 8 << 20;

/// What a document is about. Names are unique within a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A guest's definition and state.
    Guest,
    /// What is known of a migration.
    Migration,
    /// A pinned peer host.
    Peer,
    /// What decides where a guest may run while it moves.
    HandOver,
    /// A helper image that was uploaded.
    HelperImage,
}

impl Kind {
    pub(super) const ALL: [Self; 5] =
        [Self::Guest, Self::Migration, Self::Peer, Self::HandOver, Self::HelperImage];

    /// The name in the file; never changes.
    const fn stored(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Migration => "migration",
            Self::Peer => "peer",
            Self::HandOver => "hand-over",
            Self::HelperImage => "helper-image",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.stored())
    }
}

/// Which document an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DocumentRef {
    /// One of a kind's documents.
    Document(Kind, Uuid),
    /// A document of which there is one, by its key.
    Meta(String),
    /// An entry of a log.
    Entry(Log, u64),
    /// A record with a key.
    Keyed(Space, String),
}

impl std::fmt::Display for DocumentRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Document(kind, id) => write!(f, "{kind} {id}"),
            Self::Meta(key) => write!(f, "meta document {key}"),
            Self::Entry(log, seq) => write!(f, "entry {seq} of the {} log", log.table()),
            Self::Keyed(space, key) => write!(f, "{} {key}", space.stored()),
        }
    }
}

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process, or another `Store` in this one, has the file.
    #[error("the state is in use by another daemon")]
    InUse,
    /// The directory or a file in it did not pass the checks, or could not be read or written.
    #[error("the state directory cannot be used")]
    Files(#[source] PrivateFileError),
    /// The file is empty: it was ours once and has lost its content, or was put there by someone else.
    #[error("{path} is empty; `mirrorvmd state restore` puts a backup in its place")]
    Empty {
        /// Path of the database file.
        path: PathBuf,
    },
    /// Not a database, or a database of another program.
    #[error("{path} is not a mirrorvm database")]
    Foreign {
        /// Path of the database file.
        path: PathBuf,
    },
    /// Written by a later version of this program.
    #[error("{path} has schema version {found}, this program knows up to {known}")]
    TooNew {
        /// Path of the database file.
        path: PathBuf,
        /// Version of the file.
        found: i64,
        /// Latest version that we know.
        known: i64,
    },
    /// Written by an earlier version of this program, and what it was could not be saved.
    #[error(
        "{path} is of schema version {found} and was left as it is: before it is changed a backup of it is made, and \
         that cannot be written to {to}; make room there, or move away what has the name"
    )]
    NotSaved {
        /// Path of the database file.
        path: PathBuf,
        /// Version of the file.
        found: i64,
        /// Where the backup was to be.
        to: PathBuf,
        /// Why it is not there.
        #[source]
        source: Box<StoreError>,
    },
    /// The database is damaged.
    #[error("{path} is damaged; `mirrorvmd state restore` puts a backup in its place")]
    Corrupt {
        /// Path of the database file.
        path: PathBuf,
        /// What SQLite says, if it stopped over the damage.
        #[source]
        source: Option<rusqlite::Error>,
    },
    /// Something of what was acknowledged is not there, or nobody can say whether it is.
    #[error("{}", finding.told(path))]
    Untrusted {
        /// Path of the database file.
        path: PathBuf,
        /// What was found.
        finding: Finding,
    },
    /// A document is not understood: it does not fit its form, or is of a later version.
    #[error("{document} cannot be read")]
    Unreadable {
        /// The document at fault.
        document: DocumentRef,
        /// What of it.
        #[source]
        source: Unread,
    },
    /// A document cannot be written as JSON.
    #[error("{document} cannot be written")]
    Unwritable {
        /// The document at fault.
        document: DocumentRef,
        /// What the serializer says.
        #[source]
        source: serde_json::Error,
    },
    /// A document is longer than [`MAX_DOCUMENT`].
    #[error("{document} has {bytes} bytes, at most {MAX_DOCUMENT} are stored")]
    TooLong {
        /// The document at fault.
        document: DocumentRef,
        /// Its length in bytes.
        bytes: usize,
    },
    /// `insert` of an id that exists.
    #[error("{kind} {id} exists already")]
    Exists {
        /// Kind of the document.
        kind: Kind,
        /// Id of the document.
        id: Uuid,
    },
    /// Another document of this kind has the name.
    #[error("the name of {kind} {id} is taken")]
    NameTaken {
        /// The kind of both.
        kind: Kind,
        /// The one that was to be written.
        id: Uuid,
    },
    /// Another process keeps the database locked. Trying again later helps.
    #[error("another process keeps the database locked")]
    Busy(#[source] rusqlite::Error),
    /// No space is left where the database is. Trying again helps when there is.
    #[error("no space is left for the database")]
    Full(#[source] rusqlite::Error),
    /// The system does not read or write the database's files as it should.
    #[error("the database's files cannot be read or written")]
    Io(#[source] rusqlite::Error),
    /// What is stored is not what was written.
    #[error("{what} is damaged")]
    Damaged {
        /// The document, or the row or part of the file.
        what: String,
        /// What SQLite says, if it stopped over the damage.
        #[source]
        source: Option<rusqlite::Error>,
    },
    /// SQLite failed for another reason.
    #[error("the database failed")]
    Sqlite(#[source] rusqlite::Error),
}

impl From<rusqlite::Error> for StoreError {
    /// By what would help: waiting, room, the disk, a backup.
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy(error),
            Some(ErrorCode::DiskFull) => Self::Full(error),
            Some(
                ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied,
            ) => Self::Io(error),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged { what: "the database".to_owned(), source: Some(error) }
            }
            _ => Self::Sqlite(error),
        }
    }
}

/// The open store. Dropping it releases the file.
pub struct Store {
    // Dropped in this order: the connection is closed before the lock goes.
    connection: Mutex<Connection>,
    keeper: Arc<Mutex<Keeper>>,
    path: PathBuf,
    _lock: FileLock,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database file at `path`, creating it (mode 0600) and its directory (mode 0700) if there is
    /// none. Checks the whole file, so it takes time in proportion to its size. One of an earlier version is
    /// brought forward, its documents by `renew`, after a backup was made beside it.
    pub fn open(path: &Path, renew: Renew) -> Result<Self, StoreError> {
        Ok(Self::of(path, start::open(path, renew)?))
    }

    fn of(path: &Path, opened: start::Opened) -> Self {
        let start::Opened { connection, keeper, lock } = opened;
        let (connection, keeper) = (Mutex::new(connection), Arc::new(Mutex::new(keeper)));
        Self { connection, keeper, path: path.to_owned(), _lock: lock }
    }

    /// Runs `work` with everything it writes taking effect together on its `Ok`, and not at all on its `Err`
    /// or panic. Calling the store itself from `work`, instead of the transaction, never returns.
    pub fn transaction<R, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut connection = self.lock();
        let mut keeper = held(&self.keeper);
        // Dropped without commit, it rolls back.
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(StoreError::from)?;
        let account = Cell::new(Delta::default());
        let result = work(&Transaction::new(Rows::new(&transaction, &account)))?;
        keeper.commit(transaction, &account.get())?;
        Ok(result)
    }

    /// Writes a document, replacing the one with this id if there is one (and its name by `name`).
    pub fn put<T: Document>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        self.transaction(|t| t.put(kind, id, name, document))
    }

    /// Writes a new document; fails if the id exists or the name is taken.
    pub fn insert<T: Document>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        self.transaction(|t| t.insert(kind, id, name, document))
    }

    /// Reads a document; `None` if there is none.
    pub fn get<T: Document>(&self, kind: Kind, id: Uuid) -> Result<Option<T>, StoreError> {
        documents::get(&self.lock(), kind, id)
    }

    /// Reads the document that has `name`; `None` if there is none.
    pub fn get_by_name<T: Document>(&self, kind: Kind, name: &str) -> Result<Option<(Uuid, T)>, StoreError> {
        documents::get_by_name(&self.lock(), kind, name)
    }

    /// Reads all documents of a kind in the order of their ids (of UUIDv7: of creation). One unreadable
    /// document fails the call: a list with a gap would be a lie.
    pub fn list<T: Document>(&self, kind: Kind) -> Result<Vec<(Uuid, T)>, StoreError> {
        documents::list(&self.lock(), kind)
    }

    /// Removes a document; says whether there was one.
    pub fn delete(&self, kind: Kind, id: Uuid) -> Result<bool, StoreError> {
        self.transaction(|t| t.delete(kind, id))
    }

    /// Writes the singleton `key`.
    pub fn meta_put<T: Document>(&self, key: &str, document: &T) -> Result<(), StoreError> {
        self.transaction(|t| t.meta_put(key, document))
    }

    /// Removes the singleton `key`; none is fine, too.
    pub fn meta_delete(&self, key: &str) -> Result<(), StoreError> {
        self.transaction(|t| t.meta_delete(key))
    }

    /// Reads the singleton `key`; `None` if there is none.
    pub fn meta_get<T: Document>(&self, key: &str) -> Result<Option<T>, StoreError> {
        documents::meta_get(&self.lock(), key)
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic in a transaction has rolled it back; the connection is as good as before.
        self.connection.locked()
    }
}
