//! The hosts' part in handing a guest over, as pure functions: a state and what happened give the next state.
//!
//! Owns: in which order a source and a destination do things from the point of no return on, what a source in
//! doubt may believe, what a destination answers, what a restart makes of what is stored, and which guest may
//! be started or make way. Must not know: disks, links, machines; whoever has those does as it is told here
//! and says what came of it. The helpers' part is `mirrorvm_helper::op_state`.
//!
//! Every rule that keeps a guest from being run twice or lost is named in [`Guard`]. The model beside these
//! functions takes each of them away in turn and shows what happens then.

mod destination;
mod doubt;
mod guards;
mod leave;
mod places;
mod restart;
mod source;

pub(crate) use destination::{Destination, DestinationEvent};
pub use doubt::HandOverOutcome;
pub(crate) use doubt::{Belief, Heard, Journaled, Reply, Settlement, Witness, answer, believe};
pub(crate) use leave::Leave;
pub(crate) use places::{Bar, Place, bar, is_new_session, makes_way, place};
pub(crate) use restart::{FoundGuest, FoundMigration, found_guest, found_migration, is_unconfirmed};
pub(crate) use source::{Source, SourceEvent};

#[cfg(test)]
mod model;
