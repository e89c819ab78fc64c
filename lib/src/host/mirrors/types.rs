//! A mirror as values: what a caller wants it to be, and how it is. Domain types; the REST wire has its own.

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::address_space::{MirrorPlan, Strategy};
use crate::host::faults::Fault;
use crate::mirror::Placement;
use crate::named::named;

/// What a caller wants a mirror to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// The guest, by id or name.
    pub guest: String,
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Mirror vCPUs, 1 to 16.
    pub workers: u32,
    /// The rest.
    pub options: MirrorOptions,
}

/// What a caller may leave out of a mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorOptions {
    /// Where its vCPU threads run.
    pub placement: Placement,
    /// The helper image, by id or name; `None`: the built-in one.
    pub helper_image: Option<String>,
}

named! {
    /// A mirror's state.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum MirrorState {
        /// Being made.
        Creating = "creating",
        /// The helper waits for work.
        Ready = "ready",
        /// A migration has it.
        Busy = "busy",
        /// The helper or its vCPU broke down.
        Failed = "failed",
    }
}

/// One mirror vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerInfo {
    /// Kernel thread id, from our own thread.
    pub tid: u32,
    /// Times it left the guest mode since it was made.
    pub exits: u64,
    /// CPU time of its thread, nanoseconds.
    pub cpu_ns: u64,
}

/// A mirror as the host knows it.
#[derive(Clone, Debug)]
pub struct MirrorRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// Its guest.
    pub guest: Uuid,
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Now.
    pub state: MirrorState,
    /// Goes up with every change.
    pub generation: u64,
    /// The executed plan.
    pub plan: Arc<MirrorPlan>,
    /// Its vCPUs.
    pub workers: Vec<WorkerInfo>,
    /// Where its vCPU threads run.
    pub placement: Placement,
    /// SHA-256 of the helper image.
    pub helper_measurement: [u8; 32],
    /// Why it failed.
    pub error: Option<Fault>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Microseconds from the request to the helper's first idle doorbell.
    pub ready_after_us: u64,
}
