//! A credential in use: what is read with it does not go on when it is withdrawn or ends.
//!
//! Owns: waiting for that end. Must not know: what is being read.

use std::time::Instant;

use tokio::sync::watch;
use uuid::Uuid;

use super::tokens;
use crate::state::AppState;

/// The token or session of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: Uuid,
    /// Until when it was good when the request came, unless it is withdrawn or used again.
    pub until: Instant,
}

/// Returns when the credential is good no longer. `withdrawals` was taken before the credential was looked
/// at, so that none falls between.
pub async fn over(state: AppState, lease: Lease, mut withdrawals: watch::Receiver<u64>) {
    let mut until = lease.until;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {}
            changed = withdrawals.changed() => if changed.is_err() { return },
        }
        // What cannot be looked at is not good.
        match tokens::good_until(&state, lease.id) {
            Ok(Some(later)) => until = later,
            Ok(None) | Err(_) => return,
        }
    }
}
