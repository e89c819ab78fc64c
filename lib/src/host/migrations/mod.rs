//! Migrations from and to this host: what is asked of both ends, how each goes, and how it is ended.

pub(super) mod admission;
pub(super) mod asking;
pub(super) mod checks;
pub(super) mod confirm;
pub(super) mod endings;
pub(super) mod entry;
pub(super) mod incoming;
pub(super) mod outgoing;
pub(super) mod reserve;
pub(super) mod resolution;
pub(super) mod tickets;
