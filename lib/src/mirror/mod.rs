//! Mirrors: a plan executed, a helper running on mirror vCPUs, and its rings from the host's side.
//!
//! Owns: the mirror VM, its threads, mailbox access. Must not know: peers, rounds, storage. The helper is
//! code of the guest and not trusted: what comes from the mailbox is copied, then checked.

mod audit;
mod batches;
mod error;
mod image;
mod lane;
#[cfg(test)]
mod lane_tests;
mod launch;
mod placement;
mod psp;
pub(crate) mod records;
mod scan;
mod session;
mod worker;

pub use audit::{AuditScope, DIGESTS_MAX};
pub use batches::{BATCH_BYTES_MAX, BATCH_PAGES_MAX, BatchFault, BatchTerms, NotRecords, parse_records};
pub use error::{LaneError, MirrorError, WorkerEnd};
pub use image::HelperImage;
pub use lane::{Done, Lane, Payload};
pub use launch::{HelperSource, Mirror, MirrorStats, MirrorWatch};
pub use mirrorvm_abi::op::{GREETING_BYTES, Greeting, Verdict};
pub use mirrorvm_abi::record::TOKEN_BYTES;
pub use placement::{FIFO_PRIORITIES, NICE, Placement, PlacementError, Scheduler};
pub use records::SealedGroup;
pub use session::SealedToken;
