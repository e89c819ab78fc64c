//! Credentials of this run of the daemon: what nobody can have from an earlier one, because it was only ever
//! in memory.
//!
//! Owns: where they are, where browsers find the daemon, and that whoever uses a credential hears when one is
//! withdrawn. Must not know: requests.

use std::sync::OnceLock;

use tokio::sync::watch;

use super::admin_token::AdminToken;
use super::sessions::Sessions;

/// The credentials that the daemon has given out since it started, except the tokens in its database.
#[derive(Debug)]
pub struct Credentials {
    admin: AdminToken,
    sessions: Sessions,
    origins: OnceLock<Vec<String>>,
    withdrawn: watch::Sender<u64>,
}

impl Default for Credentials {
    fn default() -> Self {
        Self {
            admin: AdminToken::default(),
            sessions: Sessions::default(),
            origins: OnceLock::new(),
            withdrawn: watch::Sender::new(0),
        }
    }
}

impl Credentials {
    /// The token in `admin.token`.
    pub fn admin(&self) -> &AdminToken {
        &self.admin
    }

    /// Sessions of browsers, and the links that open them.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Where a browser finds the daemon, as `http://127.0.0.1:8080`; empty where it serves no network.
    pub fn origins(&self) -> &[String] {
        self.origins.get().map_or(&[], Vec::as_slice)
    }

    /// Notes where, once the sockets are open. Calling it again has no effect.
    pub fn set_origins(&self, origins: Vec<String>) {
        let _ = self.origins.set(origins);
    }

    /// A counter that changes whenever a credential is withdrawn. Whoever depends on one looks for itself
    /// which it was.
    pub fn withdrawals(&self) -> watch::Receiver<u64> {
        self.withdrawn.subscribe()
    }

    /// Announces that a credential was withdrawn.
    pub fn say_withdrawn(&self) {
        self.withdrawn.send_modify(|n| *n = n.wrapping_add(1));
    }
}
