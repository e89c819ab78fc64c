//! A credential in use: what is read with it does not go on when it is withdrawn or ends.
//!
//! Owns: waiting for that end. Must not know: what is being read.

use std::time::Instant;

use tokio::sync::watch;
use uuid::Uuid;

use super::tokens;
use crate::state::AppState;

/// The token or session that a request was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Id of the token or session.
    pub id: Uuid,
    /// Until when it was good at the time of the request, unless it is withdrawn or used again.
    pub until: Instant,
}

/// Returns when the credential is no longer good. `withdrawals` must have been taken before the credential
/// was looked at, so that no withdrawal falls in between.
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
