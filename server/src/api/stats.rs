//! Counters of guests and mirrors on the wire.

use jiff::Timestamp;
use mirrorvm::host::{GuestStats as Stats, MirrorRecord};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::mirrors::Worker;

/// Counters of a guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestStats {
    /// Number of virtual CPUs.
    #[schema(example = 1)]
    pub vcpus: u32,
    /// Milliseconds since the guest last began to run on this host. Null when it has no machine.
    pub uptime_ms: Option<u64>,
    /// How many bytes it has printed in all.
    pub console_bytes: u64,
    /// Counters of its RAM.
    pub memory: GuestMemoryStats,
}

/// Counters of a guest's RAM.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestMemoryStats {
    /// Bytes of all blocks together, without the helper's block.
    pub total_bytes: u64,
    /// Bytes of pages that the guest shares with the host. Null when it has no machine.
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

/// Counters of a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorStats {
    /// Id of the mirror.
    pub mirror: Uuid,
    /// How often its vCPUs have left guest mode since it was made.
    pub exits: u64,
    /// CPU time of all its vCPU threads, in nanoseconds.
    pub cpu_ns: u64,
    /// The vCPUs of the mirror.
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

/// One thing that the host noted about a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorLogLine {
    /// Id of the event that it was noted as.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub id: String,
    /// When it was noted.
    #[serde(serialize_with = "super::time::to_ms")]
    pub time: Timestamp,
    /// What was noted, in a sentence.
    #[schema(example = "mirror.state_changed: ready")]
    pub message: String,
}

/// What the host has noted about a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorLog {
    /// Lines, the oldest first. Only lines whose events are still kept are there.
    pub items: Vec<MirrorLogLine>,
}
