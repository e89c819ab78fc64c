//! What a destination notes of a hand-over, and what is stored with it.

use std::sync::Arc;

use crate::host::migrations::reserve::Reserve;
use crate::host::{GuestRecord, MigrationRecord};
pub(in crate::host) use crate::migration::hand_over::Settlement;

/// The destination's journal of one session.
#[derive(Clone, Debug)]
pub(in crate::host) struct HandOver {
    /// Who may ask.
    pub peer: String,
    pub settled: Settlement,
    /// Whether more may have come of it than this says: the host's state is older than what others know.
    pub unconfirmed: bool,
    /// While it is open: what was here before under the guest's id, a guest that had left earlier. Is here
    /// again when the import fails, also with its daemon.
    pub replaced: Option<Box<GuestRecord>>,
}

/// What is stored together with a guest's record.
#[derive(Clone)]
pub(in crate::host) struct Together {
    pub migration: MigrationRecord,
    /// At a destination: what decides whose the guest is.
    pub hand_over: Option<HandOver>,
    /// Where it goes while the database takes nothing.
    pub space: Option<Arc<Reserve>>,
}
