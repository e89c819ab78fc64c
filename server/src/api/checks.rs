//! Looks at migrations that were not started, on the wire.

use mirrorvm::host::{Finding, MigrationCheck as Check};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

/// Something that a look found.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CheckFinding {
    /// Stable code, `snake_case`; an open list.
    #[schema(example = "peer_unreachable")]
    pub code: String,
    /// What it is, for people.
    pub detail: String,
    /// What would help.
    pub fix: String,
}

impl From<Finding> for CheckFinding {
    fn from(f: Finding) -> Self {
        Self { code: f.code, detail: f.detail, fix: f.fix }
    }
}

/// What a migration would take. Reckoned from the guest's size, its definition and what earlier migrations
/// measured.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationEstimate {
    /// Until the guest would be paused.
    #[schema(example = 900)]
    pub precopy_ms: u64,
    /// The pause; null: not known.
    #[schema(example = 12)]
    pub downtime_ms: Option<u64>,
    /// The shortest pause that can be had, whatever the number of pages: a `limits.downtime_ms` below it is
    /// never met.
    #[schema(example = 30)]
    pub downtime_floor_ms: u64,
    /// Whether pre-copy would get done; null: how fast the guest writes is not known.
    pub converges: Option<bool>,
    /// Page content per second that this is reckoned with.
    #[schema(example = 300_000_000)]
    pub throughput_bytes_per_second: u64,
}

/// Whether a migration would work.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationCheck {
    /// The guest.
    pub guest: Uuid,
    /// Whether both hosts have said that nothing stands in the way now.
    pub migratable: bool,
    /// What stands in the way, all at once.
    pub blockers: Vec<CheckFinding>,
    /// What could not be found out. As long as there is any of it, `migratable` is false.
    pub unknowns: Vec<CheckFinding>,
    /// What does not stand in the way, and may surprise. `queued`: the migration would wait for a slot, not
    /// fail.
    pub warnings: Vec<CheckFinding>,
    /// What it would take.
    pub estimate: Option<MigrationEstimate>,
}

impl From<Check> for MigrationCheck {
    fn from(check: Check) -> Self {
        Self {
            guest: check.guest,
            migratable: check.blockers.is_empty() && check.unknowns.is_empty(),
            blockers: check.blockers.into_iter().map(CheckFinding::from).collect(),
            unknowns: check.unknowns.into_iter().map(CheckFinding::from).collect(),
            warnings: check.warnings.into_iter().map(CheckFinding::from).collect(),
            estimate: check.estimate.map(|e| MigrationEstimate {
                precopy_ms: e.precopy_ms.min(crate::problem::MAX_SAFE_INTEGER),
                downtime_ms: e.downtime_ms.map(|d| d.min(crate::problem::MAX_SAFE_INTEGER)),
                downtime_floor_ms: e.downtime_floor_ms.min(crate::problem::MAX_SAFE_INTEGER),
                converges: e.converges,
                throughput_bytes_per_second: e.throughput_bytes_per_second,
            }),
        }
    }
}
