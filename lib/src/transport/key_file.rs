//! A host's key as it is copied into a backup, and put back.
//!
//! Owns: that a key that is there is never replaced. Must not know: backups.

use std::path::Path;

use zeroize::Zeroizing;

use super::identity::{IdentityError, KEY_FILE, MAX_PEM_BYTES};
use crate::private_files::{PrivateDir, PrivateFileError};

/// The key in an identity's directory, in PEM.
///
/// # Errors
/// [`IdentityError::Missing`]; a file that others can reach.
pub(crate) fn read(dir: &Path) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
    let read = PrivateDir::open(dir).and_then(|dir| dir.read(KEY_FILE, MAX_PEM_BYTES));
    read.map_err(|error| match error {
        PrivateFileError::Missing { .. } => IdentityError::Missing,
        other => other.into(),
    })
}

/// Puts a key where there is none; says whether it did.
///
/// # Errors
/// A directory that others can reach, a disk that does not take it.
pub(crate) fn put_if_missing(dir: &Path, pem: &[u8]) -> Result<bool, IdentityError> {
    match PrivateDir::open_or_create(dir)?.create(KEY_FILE, pem) {
        Ok(()) => Ok(true),
        Err(PrivateFileError::Exists { .. }) => Ok(false),
        Err(other) => Err(other.into()),
    }
}
