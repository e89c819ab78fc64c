//! Bodies of `PATCH`: JSON merge patches (RFC 7396) of what can change while a resource lives.

use std::collections::BTreeMap;

use mirrorvm::host::{Labels, MigrationLimits, PeerSpec, bounds};
use mirrorvm::mirror::{NICE, Placement, Scheduler};
use mirrorvm::transport::Endpoint;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node, Patch};
use super::migrations::{LimitsBody, OnTimeoutBody};
use crate::problem::ProblemError;

/// Labels to set, and with null to remove; what is not named stays. Null instead of the object removes all.
pub type LabelsPatch = Patch<BTreeMap<String, Option<String>>>;

/// Applies a patch to labels.
pub fn relabel(labels: &Labels, patch: LabelsPatch) -> Labels {
    let mut labels = labels.clone();
    match patch {
        Patch::Keep => {}
        Patch::Clear => labels.clear(),
        Patch::Set(changes) => {
            for (key, value) in changes {
                match value {
                    Some(value) => _ = labels.insert(key, value),
                    None => _ = labels.remove(&key),
                }
            }
        }
    }
    labels
}

/// What to change of a guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"labels": {"rack": "r2", "old": null}}))]
pub struct GuestUpdate {
    /// Labels to set, and with null to remove; others stay. Null removes all.
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>, required = false)]
    pub labels: LabelsPatch,
}

impl Decode for GuestUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let labels = f.patch("labels");
        f.done()?;
        Some(Self { labels: labels? })
    }
}

/// What to change of a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"placement": {"cpus": [0, 1]}}))]
pub struct MirrorUpdate {
    /// Where its vCPU threads run; null: anywhere.
    #[schema(value_type = Option<PlacementBody>, required = false)]
    pub placement: Patch<PlacementBody>,
}

/// Where a mirror's vCPU threads run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Placement)]
#[serde(deny_unknown_fields)]
pub struct PlacementBody {
    /// Logical processors of the host; empty: any.
    #[schema(max_items = 1024, example = json!([0, 1]))]
    pub cpus: Vec<u32>,
    /// How they are scheduled; null or absent: as the daemon.
    pub scheduler: Option<SchedulerBody>,
}

/// How the kernel schedules threads, sched(7). `capability_missing` says that the kernel does not let the
/// daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Scheduler)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SchedulerBody {
    /// `SCHED_OTHER`, as most.
    #[schema(title = "SchedulerOther")]
    Other {
        /// -20 (most of a processor) to 19.
        #[serde(default)]
        #[schema(default = 0, minimum = -20, maximum = 19)]
        nice: i8,
    },
    /// `SCHED_BATCH`: for work that nobody waits for.
    #[schema(title = "SchedulerBatch")]
    Batch {
        /// -20 (most of a processor) to 19.
        #[serde(default)]
        #[schema(default = 0, minimum = -20, maximum = 19)]
        nice: i8,
    },
    /// `SCHED_IDLE`: what is left over.
    #[schema(title = "SchedulerIdle")]
    Idle {},
    /// `SCHED_FIFO`: before all others, until it sleeps.
    #[schema(title = "SchedulerFifo")]
    Fifo {
        /// 1 to 99 (first of all).
        #[schema(minimum = 1, maximum = 99)]
        priority: u8,
    },
}

impl Decode for SchedulerBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match f.kind(&["other", "batch", "idle", "fifo"])? {
            "idle" => f.done().map(|()| Self::Idle {}),
            "fifo" => {
                let priority = f.int("priority", bounds::PRIORITY);
                f.done()?;
                Some(Self::Fifo { priority: priority? })
            }
            kind => {
                let nice = f.signed_or("nice", NICE, 0);
                f.done()?;
                let nice = nice?;
                Some(if kind == "batch" { Self::Batch { nice } } else { Self::Other { nice } })
            }
        }
    }
}

impl From<PlacementBody> for Placement {
    fn from(body: PlacementBody) -> Self {
        let scheduler = body.scheduler.map(|s| match s {
            SchedulerBody::Other { nice } => Scheduler::Other { nice },
            SchedulerBody::Batch { nice } => Scheduler::Batch { nice },
            SchedulerBody::Idle {} => Scheduler::Idle,
            SchedulerBody::Fifo { priority } => Scheduler::Fifo { priority },
        });
        Self { cpus: body.cpus, scheduler }
    }
}

impl From<Placement> for PlacementBody {
    fn from(placement: Placement) -> Self {
        let scheduler = placement.scheduler.map(|s| match s {
            Scheduler::Other { nice } => SchedulerBody::Other { nice },
            Scheduler::Batch { nice } => SchedulerBody::Batch { nice },
            Scheduler::Idle => SchedulerBody::Idle {},
            Scheduler::Fifo { priority } => SchedulerBody::Fifo { priority },
        });
        Self { cpus: placement.cpus, scheduler }
    }
}

impl Decode for PlacementBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let cpus: Option<Vec<u64>> = f.required("cpus");
        let scheduler = f.optional("scheduler");
        f.done()?;
        // What is no processor of any machine is refused by the host, which knows how many there are.
        let cpus = cpus?.into_iter().map(|c| u32::try_from(c).unwrap_or(u32::MAX)).collect();
        Some(Self { cpus, scheduler: scheduler? })
    }
}

impl Decode for MirrorUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let placement = f.patch("placement");
        f.done()?;
        Some(Self { placement: placement? })
    }
}

/// What to change of a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"limits": {"bandwidth_bytes_per_second": 104857600}}))]
pub struct MigrationUpdate {
    /// Limits to set; those that are not named stay.
    #[schema(required = false, nullable = false)]
    pub limits: Option<LimitsUpdate>,
}

/// Limits to set; null sets a limit's default.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsUpdate {
    /// Bytes of page content per second over all streams; null: as fast as it goes.
    #[schema(value_type = Option<u64>, required = false, minimum = 1048576, maximum = 1125899906842624u64)]
    pub bandwidth_bytes_per_second: Patch<u64>,
    /// Longest pause that pre-copy aims for.
    #[schema(value_type = Option<u64>, required = false, minimum = 0, maximum = 3600000)]
    pub downtime_ms: Patch<u64>,
    /// Longest time before hand-over.
    #[schema(value_type = Option<u64>, required = false, minimum = 1, maximum = 604800000)]
    pub timeout_ms: Patch<u64>,
    /// Longest silence of the peer.
    #[schema(value_type = Option<u64>, required = false, minimum = 1000, maximum = 600000)]
    pub stall_timeout_ms: Patch<u64>,
    /// What happens after `timeout_ms`.
    #[schema(value_type = Option<OnTimeoutBody>, required = false)]
    pub on_timeout: Patch<OnTimeoutBody>,
    /// Whether the guest's vCPUs are held back, step by step, as soon as rounds do not shrink.
    #[schema(value_type = Option<bool>, required = false)]
    pub auto_throttle: Patch<bool>,
}

impl Decode for LimitsUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let bandwidth = f.patch_int("bandwidth_bytes_per_second", bounds::BANDWIDTH);
        let downtime_ms = f.patch_int("downtime_ms", bounds::DOWNTIME_MS);
        let timeout_ms = f.patch_int("timeout_ms", bounds::TIMEOUT_MS);
        let stall_timeout_ms = f.patch_int("stall_timeout_ms", bounds::STALL_TIMEOUT_MS);
        let on_timeout = f.patch("on_timeout");
        let auto_throttle = f.patch("auto_throttle");
        f.done()?;
        Some(Self {
            bandwidth_bytes_per_second: bandwidth?,
            downtime_ms: downtime_ms?,
            timeout_ms: timeout_ms?,
            stall_timeout_ms: stall_timeout_ms?,
            on_timeout: on_timeout?,
            auto_throttle: auto_throttle?,
        })
    }
}

impl Decode for MigrationUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let limits = f.optional_not_null("limits");
        f.done()?;
        Some(Self { limits: limits? })
    }
}

impl LimitsUpdate {
    /// The limits as they would be.
    pub fn apply(&self, now: MigrationLimits) -> MigrationLimits {
        let (now, default) = (LimitsBody::from(now), MigrationLimits::default());
        MigrationLimits {
            bandwidth_bytes_per_second: match self.bandwidth_bytes_per_second {
                Patch::Keep => now.bandwidth_bytes_per_second,
                Patch::Clear => None,
                Patch::Set(value) => Some(value),
            },
            downtime_ms: self.downtime_ms.clone().over(now.downtime_ms, default.downtime_ms),
            timeout_ms: self.timeout_ms.clone().over(now.timeout_ms, default.timeout_ms),
            stall_timeout_ms: self
                .stall_timeout_ms
                .clone()
                .over(now.stall_timeout_ms, default.stall_timeout_ms),
            on_timeout: self.on_timeout.clone().over(now.on_timeout, default.on_timeout.into()).into(),
            auto_throttle: self.auto_throttle.clone().over(now.auto_throttle, default.auto_throttle),
        }
    }
}

/// What to change of a known host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"address": "192.0.2.8:7801"}))]
pub struct PeerHostUpdate {
    /// Where its peer listener is: IP address or DNS name, and port.
    #[schema(required = false, nullable = false, example = "192.0.2.8:7801")]
    pub address: Option<String>,
    /// Its pinned identity.
    #[schema(required = false, nullable = false, pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: Option<String>,
    /// Labels to set, and with null to remove; others stay. Null removes all.
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>, required = false)]
    pub labels: LabelsPatch,
}

impl Decode for PeerHostUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let address = f.optional_not_null("address");
        let identity = f.optional_not_null("identity");
        let labels = f.patch("labels");
        f.done()?;
        Some(Self { address: address?, identity: identity?, labels: labels? })
    }
}

impl PeerHostUpdate {
    /// Where the host is said to be from now on.
    ///
    /// # Errors
    /// It is no address.
    pub fn new_address(&self) -> Result<Option<Endpoint>, Vec<ProblemError>> {
        self.address.as_deref().map(super::peers::parse_address).transpose()
    }

    /// What the host would be, as a change of what is known of it.
    ///
    /// # Errors
    /// An address that is none.
    pub fn change(self) -> Result<impl FnOnce(PeerSpec) -> PeerSpec, Vec<ProblemError>> {
        let address = self.new_address()?;
        Ok(move |now: PeerSpec| PeerSpec {
            address: address.unwrap_or(now.address),
            identity: self.identity.unwrap_or(now.identity),
            labels: relabel(&now.labels, self.labels),
            name: now.name,
        })
    }
}

/// What to change of this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"maintenance": true}))]
pub struct HostUpdate {
    /// Labels to set, and with null to remove; others stay. Null removes all.
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>, required = false)]
    pub labels: LabelsPatch,
    /// Whether nothing new is taken: no guest is defined, started or let in.
    #[schema(required = false, nullable = false)]
    pub maintenance: Option<bool>,
    /// Outgoing migrations that run at once; more wait as `queued`.
    #[schema(required = false, nullable = false, minimum = 1, maximum = 16)]
    pub migration_slots: Option<u32>,
}

impl Decode for HostUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let labels = f.patch("labels");
        let maintenance = f.optional_not_null("maintenance");
        let migration_slots = f.optional_int_not_null("migration_slots", bounds::MIGRATION_SLOTS);
        f.done()?;
        Some(Self { labels: labels?, maintenance: maintenance?, migration_slots: migration_slots? })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::json::Json;

    use super::*;
    use crate::api::decode::decode;

    #[test]
    fn labels_merge() {
        let now = Labels::from([("a".to_owned(), "1".to_owned()), ("b".into(), "2".into())]);
        let after = |patch: serde_json::Value| {
            let labels = relabel(&now, decode::<GuestUpdate>(&Json::from(&patch)).unwrap().labels);
            serde_json::to_value(labels).unwrap()
        };
        assert_eq!(after(json!({})), json!({"a": "1", "b": "2"}));
        assert_eq!(after(json!({"labels": {"a": null, "c": "3"}})), json!({"b": "2", "c": "3"}));
        assert_eq!(after(json!({"labels": null})), json!({}));
        let errors =
            decode::<GuestUpdate>(&Json::from(&json!({"labels": {"a": 1}, "name": "x"}))).unwrap_err();
        let places: Vec<_> = errors.iter().filter_map(|e| e.pointer.as_deref()).collect();
        assert_eq!(places, ["/labels/a", "/name"]);
    }

    #[test]
    fn limits_merge() {
        let now = MigrationLimits { bandwidth_bytes_per_second: Some(7), ..MigrationLimits::default() };
        let after = |patch: serde_json::Value| {
            decode::<MigrationUpdate>(&Json::from(&json!({"limits": patch})))
                .unwrap()
                .limits
                .unwrap()
                .apply(now)
        };
        assert_eq!(after(json!({})), now);
        assert_eq!(after(json!({"bandwidth_bytes_per_second": null})).bandwidth_bytes_per_second, None);
        assert_eq!(after(json!({"downtime_ms": 5})).downtime_ms, 5);
        assert_eq!(after(json!({"downtime_ms": null})).downtime_ms, 300);
        for null in [json!({"maintenance": null}), json!({"migration_slots": null})] {
            assert!(decode::<HostUpdate>(&Json::from(&null)).is_err(), "{null}");
        }
        assert!(decode::<MigrationUpdate>(&Json::from(&json!({"limits": null}))).is_err());
    }
}
