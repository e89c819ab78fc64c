//! A host's state directory without its daemon: looked at, copied, put back.
//!
//! Owns: what belongs to a host beside its database. Must not know: who asks; requests.

use std::path::{Path, PathBuf};

use crate::store::state_files::{self, Accepted, Documents, Facts, Rider};
use crate::store::{Kind, StoreError};
use crate::transport::{IdentityError, key_file};

use super::OpenError;
use super::images::files;
use super::images::types::ImageRecord;
use super::open::DATABASE;
use super::stored;

/// What the host's key is found by in a backup.
const KEY: &str = "host-key";

/// What helps where the file of a helper image is not what was uploaded.
const HELP: &str = "upload the same content again with PUT /v1/helper-images/{image}/content, delete the image, or put a backup \
                    back with `mirrorvmd state restore`";

/// The files of all helper images that the database tells of.
fn image_riders(state_dir: &Path, documents: &Documents<'_>) -> Result<Vec<Rider>, StoreError> {
    let records: Vec<_> =
        documents.list::<ImageRecord>(Kind::HelperImage)?.into_iter().map(|(_, record)| record).collect();
    files::riders(state_dir, &records)
        .map_err(|wrong| state_files::incomplete(&state_dir.join(DATABASE), wrong, HELP))
}

fn check_images(state_dir: &Path) -> Result<(), StoreError> {
    let look = |documents: &Documents<'_>| image_riders(state_dir, documents).map(drop);
    state_files::look(&state_dir.join(DATABASE), look)
}

/// Looks at everything in a host's database and at its helper images and changes nothing, also while its
/// daemon runs.
///
/// # Errors
/// What is wrong with it.
pub fn check_state(state_dir: &Path) -> Result<Facts, StoreError> {
    let facts = state_files::check(&state_dir.join(DATABASE))?;
    match check_images(state_dir) {
        // One that was deleted meanwhile is not there the next time.
        Err(StoreError::Untrusted { .. }) if facts.live => check_images(state_dir)?,
        found => found?,
    }
    Ok(facts)
}

/// Copies a host's database, helper images and key into one new file of mode 0600, also while its daemon
/// runs. With that file anybody can be this host to its peers.
///
/// # Errors
/// A state that is not whole, a file of that name, a disk that does not take it.
pub fn backup_state(state_dir: &Path, to: &Path) -> Result<Facts, OpenError> {
    let key = match key_file::read(&state_dir.join("identity")) {
        Ok(body) => vec![Rider { name: KEY.to_owned(), body }],
        Err(IdentityError::Missing) => Vec::new(),
        Err(other) => return Err(other.into()),
    };
    let riders = |documents: &Documents<'_>| {
        let mut riders = image_riders(state_dir, documents)?;
        riders.extend(key);
        Ok(riders)
    };
    Ok(state_files::backup(&state_dir.join(DATABASE), to, riders)?)
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
    /// Helper images that did not come from the backup, and what helps, if there are any.
    pub incomplete: Option<String>,
}

/// Puts a backup in the place of a host's database, the helper images' files in their places, and its key
/// where there is none; no daemon may run. Every guest is unconfirmed from then on. `entry` goes into the
/// audit log.
///
/// # Errors
/// A running daemon, a backup that is not whole, a disk that does not take it.
pub fn restore_state(from: &Path, state_dir: &Path, entry: &str) -> Result<StateRestored, OpenError> {
    let restored = state_files::restore(from, &state_dir.join(DATABASE), entry)?;
    let mut key = false;
    for rider in &restored.riders {
        files::put_back(state_dir, rider).map_err(StoreError::of_files)?;
    }
    for rider in restored.riders.iter().filter(|r| r.name == KEY) {
        key = key_file::put_if_missing(&state_dir.join("identity"), &rider.body)?;
    }
    // A backup of an earlier build has none.
    let incomplete = match check_images(state_dir) {
        Err(error @ StoreError::Untrusted { .. }) => Some(error.to_string()),
        looked => looked.map(|()| None)?,
    };
    Ok(StateRestored { facts: restored.facts, replaced: restored.replaced, key, incomplete })
}

/// Makes what is there of a host's database the truth; no daemon may run. Every guest is unconfirmed from
/// then on. `entry` makes the audit log's entry from what was wrong.
///
/// # Errors
/// A running daemon, files that cannot be read as a database at all.
pub fn accept_state(state_dir: &Path, entry: impl FnOnce(&str) -> String) -> Result<Accepted, StoreError> {
    state_files::accept(&state_dir.join(DATABASE), stored::renew, entry)
}
