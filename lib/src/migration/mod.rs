//! Live migration: rounds over a peer link, the hand-over, and its two op-state machines.
//!
//! Owns: the peer protocol, the source's and the destination's course, convergence, verification. Must not
//! know: who asked, where records are stored (see [`Journal`] and [`Receiver`]), HTTP. A migration owns its
//! machine and mirror while it runs; it gives them back with the outcome.
//!
//! ```text
//! source                                 destination
//!   Hello, Prepare{layout, nonce} ---->    admits, makes machine and mirror
//!                      <---- Prepared{nonce, evidence}
//!   per epoch: EpochBegin ------------->
//!     streams: Records*, EpochEnd
//!   Shared* --------------------------->   pages that the guest shares, and only here: this link has TLS
//!   EpochToken ------------------------>   totals agree
//!                      <---- EpochAck
//!   (pause, last epoch) State --------->   vCPU and device state
//!   [journal] START token ------------->   digest agrees; COMMIT token is minted, and never ABORT from then on
//!                      <---- Committing       while [journal] fails: the guest is kept and held at both ends
//!                                           [journal]
//!                      <---- Committed{token}   or   Aborted{token}
//!                                           the guest runs
//!   COMMIT token opens: the source's guest is done
//!   DIGESTS* ------------------------->   compared with what was opened, while the guest runs (or before COMMIT)
//!   DIGESTS_END ---------------------->
//!                      <---- AUDITED
//! ```
//!
//! Every link begins as mutual TLS 1.3 between pinned identities. Streams then go on without it, unless the
//! caller wants otherwise: what they carry is sealed helper to helper, and its headers are masked
//! (`records`). Somebody on the path can break such a stream, as he can break any connection, and gets
//! nothing else: a record that he made or changed does not open, one that he dropped is missed by the epoch's
//! token, and either way the destination gives up before START.

mod audit;
mod control;
mod destination;
mod error;
mod evidence;
mod finder;
pub(crate) mod hand_over;
mod landing;
mod peer;
mod pump;
pub mod records;
mod rounds;
mod sink;
mod source;
pub mod stages;
pub mod terms;
mod threads;
mod transcript;
pub mod wire;

pub use audit::{Held, Kept};
pub use control::{Control, Live, PastPointOfNoReturn};
pub use destination::{Arrival, Arrived, NotStored, Receiver, serve_check, serve_import};
pub use error::MigrationFault;
pub use hand_over::HandOverOutcome;
pub use peer::{Agreed, PeerAddress, Spoken, accept_hello, ask, check, find, open_control, resolve};
pub use rounds::{Bound, Convergence, Decision, Fixed, Observation};
pub use source::{Departure, Journal, Outgoing, Sequel, SourceEnd, Terms, run_source};
pub(crate) use source::{hear, resume_here};
pub use terms::{
    Audit, AuditMode, AuditState, Evidence, MigrationLimits, MigrationMode, MigrationState, NotRun,
    OnTimeout, Progress, Round, StreamTransport, Suite, suite_names,
};
pub use transcript::transcript;
