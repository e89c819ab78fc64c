//! A host's state directory without its daemon: looked at, copied, put back.
//!
//! Owns: what belongs to a host beside its database. Must not know: who asks; requests.

use std::path::{Path, PathBuf};

use crate::store::StoreError;
use crate::store::state_files::{self, Accepted, Facts, Rider};
use crate::transport::{IdentityError, key_file};

use super::OpenError;
use super::open::DATABASE;

/// What the host's key is found by in a backup.
const KEY: &str = "host-key";

/// Looks at everything in a host's database and changes nothing, also while its daemon runs.
///
/// # Errors
/// What is wrong with it.
pub fn check_state(state_dir: &Path) -> Result<Facts, StoreError> {
    state_files::check(&state_dir.join(DATABASE))
}

/// Copies a host's database and key into one new file of mode 0600, also while its daemon runs. With that file anybody can be
/// this host to its peers.
///
/// # Errors
/// A state that is not whole, a file of that name, a disk that does not take it.
pub fn backup_state(state_dir: &Path, to: &Path) -> Result<Facts, OpenError> {
    let riders = match key_file::read(&state_dir.join("identity")) {
        Ok(body) => vec![Rider { name: KEY.to_owned(), body }],
        Err(IdentityError::Missing) => Vec::new(),
        Err(other) => return Err(other.into()),
    };
    Ok(state_files::backup(&state_dir.join(DATABASE), to, &riders)?)
}

/// What came of putting a backup back.
#[derive(Debug)]
pub struct StateRestored {
    /// What the backup held.
    pub facts: Facts,
    /// Where the database is now that was there before.
    pub replaced: Option<PathBuf>,
    /// Whether the host's key came from the backup: there was none.
    pub key: bool,
}

/// Puts a backup in the place of a host's database, and its key where there is none; no daemon may run. Every guest is
/// unconfirmed from then on. `entry` goes into the audit log.
///
/// # Errors
/// A running daemon, a backup that is not whole, a disk that does not take it.
pub fn restore_state(from: &Path, state_dir: &Path, entry: &str) -> Result<StateRestored, OpenError> {
    let restored = state_files::restore(from, &state_dir.join(DATABASE), entry)?;
    let mut key = false;
    for rider in restored.riders.iter().filter(|r| r.name == KEY) {
        key = key_file::put_if_missing(&state_dir.join("identity"), &rider.body)?;
    }
    Ok(StateRestored { facts: restored.facts, replaced: restored.replaced, key })
}

/// Makes what is there of a host's database the truth; no daemon may run. Every guest is unconfirmed from then on. `entry`
/// makes the audit log's entry from what was wrong.
///
/// # Errors
/// A running daemon, files that cannot be read as a database at all.
pub fn accept_state(state_dir: &Path, entry: impl FnOnce(&str) -> String) -> Result<Accepted, StoreError> {
    state_files::accept(&state_dir.join(DATABASE), entry)
}
