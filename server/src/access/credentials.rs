//! Credentials of this run of the daemon: what nobody can have from an earlier one, because it was only ever in memory.
//!
//! Owns: where they are. Must not know: requests.

use super::admin_token::AdminToken;

/// What the daemon has given out since it started, beside the tokens in its database.
#[derive(Debug, Default)]
pub struct Credentials {
    admin: AdminToken,
}

impl Credentials {
    /// The token in `admin.token`.
    pub fn admin(&self) -> &AdminToken {
        &self.admin
    }
}
