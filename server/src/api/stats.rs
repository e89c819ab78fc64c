//! Counters of guests and mirrors on the wire.

use jiff::Timestamp;
use mirrorvm::host::{GuestStats as Stats, MirrorRecord};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::mirrors::Worker;

/// A guest's counters.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestStats {
    /// Virtual CPUs.
    #[schema(example = 1)]
    pub vcpus: u32,
    /// Since it last began to run here; null when it has no machine.
    pub uptime_ms: Option<u64>,
    /// Bytes that it ever printed.
    pub console_bytes: u64,
    /// Its RAM.
    pub memory: GuestMemoryStats,
}

/// Counters of a guest's RAM.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestMemoryStats {
    /// Bytes over all blocks, the helper's not counted.
    pub total_bytes: u64,
    /// Bytes whose pages the guest shares with the host; null when it has no machine.
    pub shared_bytes: Option<u64>,
}

impl From<Stats> for GuestStats {
    fn from(s: Stats) -> Self {
        Self {
            vcpus: s.vcpus,
            uptime_ms: s.uptime_ms,
            console_bytes: s.console_bytes,
            memory: GuestMemoryStats { total_bytes: s.total_bytes, shared_bytes: s.shared_bytes },
        }
    }
}

/// A mirror's counters.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorStats {
    /// The mirror.
    pub mirror: Uuid,
    /// Exits from guest mode of all its vCPUs since it was made.
    pub exits: u64,
    /// CPU time of all its vCPUs' threads, nanoseconds.
    pub cpu_ns: u64,
    /// Its vCPUs.
    pub workers: Vec<Worker>,
}

impl From<MirrorRecord> for MirrorStats {
    fn from(r: MirrorRecord) -> Self {
        let workers: Vec<Worker> = r.workers.into_iter().map(Worker::from).collect();
        Self {
            mirror: r.id,
            exits: workers.iter().map(|w| w.exits).sum(),
            cpu_ns: workers.iter().map(|w| w.cpu_ns).sum(),
            workers,
        }
    }
}

/// One line of what the host noted about a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorLogLine {
    /// The event's id.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub id: String,
    /// When.
    pub time: Timestamp,
    /// What.
    #[schema(example = "mirror.state_changed: ready")]
    pub message: String,
}

/// What the host noted about a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorLog {
    /// Lines, the oldest first; only those whose events are still kept.
    pub items: Vec<MirrorLogLine>,
}
