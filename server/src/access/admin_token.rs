//! `admin.token` in the state directory: how whoever may read that directory gets in over TCP.
//!
//! Owns: the file and the token in it, new at each start. Must not know: requests.
//!
//! Nothing of the token but the file is on disk: an earlier run's is good for nothing the moment its daemon
//! is gone, whatever became of the file. It is written only where the API is served over TCP or TLS; over the
//! Unix socket the same user is known without it.

use std::sync::{Mutex, MutexGuard};

use mirrorvm::PrivateFileError;
use mirrorvm::host::Host;
use uuid::Uuid;

use super::Role;
use super::tokens::{NewToken, Origin, TokenRecord};
use crate::problem::Problem;
use mirrorvm::sync::Locked;

/// Name of the file in the state directory.
pub const FILE: &str = "admin.token";

/// Why the admin token could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AdminTokenError {
    /// The file cannot be written.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// The token of this run, until it is withdrawn.
#[derive(Debug, Default)]
pub struct AdminToken(Mutex<Option<TokenRecord>>);

impl AdminToken {
    /// Makes the token and writes it, replacing whatever has the file's name.
    ///
    /// # Errors
    /// [`AdminTokenError`]; then there is no token.
    pub fn write(&self, host: &Host) -> Result<(), AdminTokenError> {
        let new = NewToken {
            id: Uuid::now_v7(),
            name: FILE.to_owned(),
            role: Role::Admin,
            guest: None,
            life: None,
            created_by: "daemon".to_owned(),
        };
        let made: Result<_, Problem> = TokenRecord::make(new, Origin::AdminFile);
        let (record, secret) = made.map_err(|_| AdminTokenError::Random)?;
        let mut line = record.text(&secret);
        line.push('\n');
        host.replace_private_file(FILE, line.as_bytes())?;
        *self.lock() = Some(record);
        Ok(())
    }

    /// The token, if there is one.
    pub fn record(&self) -> Option<TokenRecord> {
        self.lock().clone()
    }

    /// Withdraws the token if it has this id, and removes its file.
    pub fn withdraw(&self, host: &Host, id: Uuid) -> Option<TokenRecord> {
        let record = self.lock().take_if(|r| r.id == id)?;
        remove(host);
        Some(record)
    }

    fn lock(&self) -> MutexGuard<'_, Option<TokenRecord>> {
        self.0.locked()
    }
}

/// Removes the file: because the daemon ends, or because an earlier one was killed before it could.
pub fn remove(host: &Host) {
    if let Err(error) = host.remove_private_file(FILE) {
        // What is in it opens nothing.
        tracing::warn!(%error, "admin.token could not be removed");
    }
}
