//! Migrations on the wire.
//!
//! Owns: which file has what: the request, its limits, the resource with its progress, its rounds.

mod limits;
mod request;
mod resource;
mod rounds;

pub use limits::{LimitsBody, OnTimeoutBody};
pub use request::{
    AuditBody, DestinationBody, LeftOpen, MigrationCreate, MirrorChoiceBody, ModeBody, OnSuccessBody,
    SourceAfterBody, StreamTransportBody, SuiteBody,
};
pub use resource::{
    Condition, EncryptionProgress, HelperProgress, MemoryProgress, Migration, MigrationList,
    MigrationProgress,
};
pub use rounds::{MigrationRound, MigrationRoundList};
