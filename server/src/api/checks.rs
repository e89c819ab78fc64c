//! Looks at migrations that were not started, on the wire.

use mirrorvm::host::{Finding, MigrationCheck as Check};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

/// One finding of a check.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CheckFinding {
    /// A stable code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "peer_unreachable")]
    pub code: String,
    /// What was found, in a sentence.
    pub detail: String,
    /// What would help, in a sentence.
    pub fix: String,
}

impl From<Finding> for CheckFinding {
    fn from(f: Finding) -> Self {
        Self { code: f.code, detail: f.detail, fix: f.fix }
    }
}

/// What a migration would cost. Estimated from the guest's size, its definition, and what earlier migrations
/// measured.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationEstimate {
    /// Milliseconds until the guest would be paused.
    #[schema(example = 900)]
    pub precopy_ms: u64,
    /// Length of the pause in milliseconds. Null when it cannot be estimated.
    #[schema(example = 12)]
    pub downtime_ms: Option<u64>,
    /// The shortest pause that is possible whatever the number of pages left, in milliseconds. A
    /// `limits.downtime_ms` below it is never met.
    #[schema(example = 30)]
    pub downtime_floor_ms: u64,
    /// Whether pre-copy would get done. Null when it is not known how fast the guest writes.
    pub converges: Option<bool>,
    /// Bytes of page content per second that the estimate assumes.
    #[schema(example = 300_000_000)]
    pub throughput_bytes_per_second: u64,
}

/// Whether a migration would work, as both hosts see it now.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationCheck {
    /// Id of the guest.
    pub guest: Uuid,
    /// Whether both hosts have said that nothing stands in the way at the moment.
    pub migratable: bool,
    /// Everything that stands in the way.
    pub blockers: Vec<CheckFinding>,
    /// What could not be found out. `migratable` is false while this list is not empty.
    pub unknowns: Vec<CheckFinding>,
    /// What does not stand in the way but may come as a surprise, such as `queued`: the migration would wait
    /// for a slot.
    pub warnings: Vec<CheckFinding>,
    /// What the migration would cost. Null when there is no estimate.
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
