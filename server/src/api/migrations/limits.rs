//! Limits of a migration, in a request and in the resource.

use mirrorvm::host::{MigrationLimits, OnTimeout, bounds};
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::decode::{Decode, Errors, Fields, Node, one_of};

/// What to do when a migration has not reached its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OnTimeout)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeoutBody {
    /// The migration fails as `not_converging`, and the guest goes on here.
    #[default]
    Cancel,
    /// The guest is paused and the rest is sent, however long that takes.
    Force,
    /// The guest's vCPUs are slowed down step by step until the migration converges. It fails as
    /// `not_converging` when even that does not help. Not available for `qemu` guests.
    Throttle,
}

/// Limits of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MigrationLimits)]
#[serde(deny_unknown_fields)]
pub struct LimitsBody {
    /// Bytes of page content per second, over all streams together. Null or absent: as fast as possible.
    #[schema(minimum = 1048576, maximum = 1125899906842624u64)]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause of a live migration, in milliseconds. A pause that turns out longer is broken off, as
    /// long as the destination has not been told to start the guest: the guest goes on here, and another
    /// pause is tried later. A pause may exceed the limit by a tenth and at least 5 ms, and by what the
    /// destination takes beyond the prediction.
    #[serde(default)]
    #[schema(default = 300, minimum = 0, maximum = 3600000)]
    pub downtime_ms: u64,
    /// Longest time from the first page to the switchover, in milliseconds.
    #[serde(default)]
    #[schema(default = 3600000, minimum = 1, maximum = 604800000)]
    pub timeout_ms: u64,
    /// How long the peer may be silent before the migration is given up, in milliseconds.
    #[serde(default)]
    #[schema(default = 30000, minimum = 1000, maximum = 600000)]
    pub stall_timeout_ms: u64,
    /// What to do when `timeout_ms` has passed before the switchover.
    #[serde(default)]
    #[schema(default = "cancel")]
    pub on_timeout: OnTimeoutBody,
    /// Whether the guest's vCPUs are slowed down step by step as soon as rounds do not get shorter. Not
    /// available for `qemu` guests.
    #[serde(default)]
    #[schema(default = false)]
    pub auto_throttle: bool,
    /// How long the comparison of memory may take (`audit`), in milliseconds. Then it ends as `not_run`. This
    /// limit can be changed until the comparison has ended.
    #[serde(default)]
    #[schema(default = 60000, minimum = 1, maximum = 3600000)]
    pub audit_timeout_ms: u64,
}

impl Decode for OnTimeoutBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let known = [("cancel", Self::Cancel), ("force", Self::Force), ("throttle", Self::Throttle)];
        one_of(node, errors, &known)
    }
}

impl From<OnTimeoutBody> for OnTimeout {
    fn from(body: OnTimeoutBody) -> Self {
        match body {
            OnTimeoutBody::Cancel => Self::Cancel,
            OnTimeoutBody::Force => Self::Force,
            OnTimeoutBody::Throttle => Self::Throttle,
        }
    }
}

impl From<OnTimeout> for OnTimeoutBody {
    fn from(what: OnTimeout) -> Self {
        match what {
            OnTimeout::Cancel => Self::Cancel,
            OnTimeout::Force => Self::Force,
            OnTimeout::Throttle => Self::Throttle,
        }
    }
}

impl Decode for LimitsBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let d = MigrationLimits::default();
        let mut f = Fields::open(node, errors)?;
        let bandwidth = f.optional_int("bandwidth_bytes_per_second", bounds::BANDWIDTH);
        let downtime_ms = f.int_or("downtime_ms", bounds::DOWNTIME_MS, d.downtime_ms);
        let timeout_ms = f.int_or("timeout_ms", bounds::TIMEOUT_MS, d.timeout_ms);
        let stall_timeout_ms = f.int_or("stall_timeout_ms", bounds::STALL_TIMEOUT_MS, d.stall_timeout_ms);
        let on_timeout = f.or("on_timeout", OnTimeoutBody::Cancel);
        let auto_throttle = f.or("auto_throttle", d.auto_throttle);
        let audit_timeout_ms = f.int_or("audit_timeout_ms", bounds::AUDIT_TIMEOUT_MS, d.audit_timeout_ms);
        f.done()?;
        Some(Self {
            bandwidth_bytes_per_second: bandwidth?,
            downtime_ms: downtime_ms?,
            timeout_ms: timeout_ms?,
            stall_timeout_ms: stall_timeout_ms?,
            on_timeout: on_timeout?,
            auto_throttle: auto_throttle?,
            audit_timeout_ms: audit_timeout_ms?,
        })
    }
}

impl Default for LimitsBody {
    fn default() -> Self {
        MigrationLimits::default().into()
    }
}

impl From<MigrationLimits> for LimitsBody {
    fn from(limits: MigrationLimits) -> Self {
        Self {
            bandwidth_bytes_per_second: limits.bandwidth_bytes_per_second,
            downtime_ms: limits.downtime_ms,
            timeout_ms: limits.timeout_ms,
            stall_timeout_ms: limits.stall_timeout_ms,
            on_timeout: limits.on_timeout.into(),
            auto_throttle: limits.auto_throttle,
            audit_timeout_ms: limits.audit_timeout_ms,
        }
    }
}

impl From<LimitsBody> for MigrationLimits {
    fn from(body: LimitsBody) -> Self {
        Self {
            bandwidth_bytes_per_second: body.bandwidth_bytes_per_second,
            downtime_ms: body.downtime_ms,
            timeout_ms: body.timeout_ms,
            stall_timeout_ms: body.stall_timeout_ms,
            on_timeout: body.on_timeout.into(),
            auto_throttle: body.auto_throttle,
            audit_timeout_ms: body.audit_timeout_ms,
        }
    }
}
