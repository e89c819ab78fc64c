//! Bodies of `PATCH`: JSON merge patches (RFC 7396) of what can change while a resource lives.

use std::collections::BTreeMap;

use mirrorvm::host::{HostError, Labels, MigrationLimits, PeerSpec, bounds};
use mirrorvm::mirror::{NICE, Placement, Scheduler};
use mirrorvm::reading::FieldError;
use mirrorvm::transport::Endpoint;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node, Patch, one_of};
use super::migrations::{LimitsBody, OnTimeoutBody};
use crate::problem::ProblemError;

/// Labels to set; a label set to null is removed, and labels that are not named stay. Null in place of the
/// object removes all.
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

/// What to change about a guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"labels": {"rack": "r2", "old": null}}))]
pub struct GuestUpdate {
    /// Labels to set; a label set to null is removed, and labels that are not named stay. Null in place of
    /// the object removes all.
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

/// What to change about a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"placement": {"cpus": [0, 1]}}))]
pub struct MirrorUpdate {
    /// On which processors its vCPU threads run and how they are scheduled. Null: anywhere, like the daemon's
    /// threads.
    #[schema(value_type = Option<PlacementUpdate>, required = false)]
    pub placement: Patch<PlacementUpdate>,
}

/// What to change about where a mirror's vCPU threads run. What is not named stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlacementUpdate {
    /// Numbers of logical processors of the host. Null or empty: any.
    #[schema(value_type = Option<Vec<u32>>, required = false, max_items = 1024, example = json!([0, 1]))]
    pub cpus: Patch<Vec<u64>>,
    /// How the threads are scheduled. Null: like the daemon's threads.
    #[schema(value_type = Option<SchedulerUpdate>, required = false)]
    pub scheduler: Patch<SchedulerUpdate>,
}

/// What to change about how threads are scheduled. Another `kind` begins with its own defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SchedulerUpdate {
    /// `other`, `batch`, `idle` or `fifo`.
    #[schema(value_type = Option<String>, required = false, nullable = false, example = "batch")]
    pub kind: Option<SchedulerKind>,
    /// Nice value of `other` and `batch`: -20 (the largest share of a processor) to 19.
    #[schema(required = false, nullable = false, minimum = -20, maximum = 19)]
    pub nice: Option<i8>,
    /// Priority of `fifo`: 1 to 99 (runs first).
    #[schema(required = false, nullable = false, minimum = 1, maximum = 99)]
    pub priority: Option<u8>,
}

/// Kinds of schedulers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerKind {
    /// `SCHED_OTHER`.
    Other,
    /// `SCHED_BATCH`.
    Batch,
    /// `SCHED_IDLE`.
    Idle,
    /// `SCHED_FIFO`.
    Fifo,
}

impl SchedulerKind {
    /// All of them, by name.
    const ALL: [(&'static str, Self); 4] =
        [("other", Self::Other), ("batch", Self::Batch), ("idle", Self::Idle), ("fifo", Self::Fifo)];

    fn of(scheduler: Scheduler) -> Self {
        match scheduler {
            Scheduler::Other { .. } => Self::Other,
            Scheduler::Batch { .. } => Self::Batch,
            Scheduler::Idle => Self::Idle,
            Scheduler::Fifo { .. } => Self::Fifo,
        }
    }
}

impl Decode for SchedulerKind {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &Self::ALL)
    }
}

impl Decode for SchedulerUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let kind = f.optional_not_null("kind");
        let nice = if f.has("nice") { f.signed_or("nice", NICE, 0).map(Some) } else { Some(None) };
        let priority = f.optional_int_not_null("priority", bounds::PRIORITY);
        f.done()?;
        Some(Self { kind: kind?, nice: nice?, priority: priority? })
    }
}

impl Decode for PlacementUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let cpus = f.patch("cpus");
        let scheduler = f.patch("scheduler");
        f.done()?;
        Some(Self { cpus: cpus?, scheduler: scheduler? })
    }
}

impl SchedulerUpdate {
    /// The scheduler that results from this change of `now`.
    fn over(self, now: Option<Scheduler>) -> Result<Scheduler, FieldError> {
        let error = |member: &str, code, detail: String| {
            Err(FieldError::new(format!("/placement/scheduler/{member}"), code, detail))
        };
        let Some(kind) = self.kind.or(now.map(SchedulerKind::of)) else {
            let detail = "the threads have no scheduler of their own yet: say which `kind` it is to be";
            return error("kind", "missing", detail.into());
        };
        let same = now.filter(|now| SchedulerKind::of(*now) == kind);
        let nice = self.nice.or(match same {
            Some(Scheduler::Other { nice } | Scheduler::Batch { nice }) => Some(nice),
            Some(Scheduler::Idle | Scheduler::Fifo { .. }) | None => None,
        });
        let priority = self.priority.or(match same {
            Some(Scheduler::Fifo { priority }) => Some(priority),
            Some(Scheduler::Other { .. } | Scheduler::Batch { .. } | Scheduler::Idle) | None => None,
        });
        let has_none =
            |member: &str| error(member, "unknown_field", format!("this kind of scheduler has no {member}"));
        match (kind, nice, priority) {
            (SchedulerKind::Other | SchedulerKind::Batch | SchedulerKind::Idle, _, Some(_)) => {
                has_none("priority")
            }
            (SchedulerKind::Idle | SchedulerKind::Fifo, Some(_), _) => has_none("nice"),
            (SchedulerKind::Other, nice, None) => Ok(Scheduler::Other { nice: nice.unwrap_or(0) }),
            (SchedulerKind::Batch, nice, None) => Ok(Scheduler::Batch { nice: nice.unwrap_or(0) }),
            (SchedulerKind::Idle, None, None) => Ok(Scheduler::Idle),
            (SchedulerKind::Fifo, None, Some(priority)) => Ok(Scheduler::Fifo { priority }),
            (SchedulerKind::Fifo, None, None) => {
                error("priority", "missing", "`fifo` needs a priority, from 1 to 99".into())
            }
        }
    }
}

impl MirrorUpdate {
    /// The placement that results from this change of `now`.
    ///
    /// # Errors
    /// [`HostError::Invalid`]: the scheduler that would result is none.
    pub fn placed(&self, now: &Placement) -> Result<Placement, HostError> {
        let update = match &self.placement {
            Patch::Keep => return Ok(now.clone()),
            Patch::Clear => return Ok(Placement::default()),
            Patch::Set(update) => update,
        };
        let cpus = match &update.cpus {
            Patch::Keep => now.cpus.clone(),
            Patch::Clear => Vec::new(),
            Patch::Set(cpus) => numbers(cpus),
        };
        let scheduler = match update.scheduler {
            Patch::Keep => now.scheduler,
            Patch::Clear => None,
            Patch::Set(change) => Some(change.over(now.scheduler).map_err(|e| HostError::Invalid(vec![e]))?),
        };
        Ok(Placement { cpus, scheduler })
    }
}

/// Numbers of processors. What is no processor of any machine is refused by the host, which knows how many
/// there are.
fn numbers(cpus: &[u64]) -> Vec<u32> {
    cpus.iter().map(|c| u32::try_from(*c).unwrap_or(u32::MAX)).collect()
}

/// On which processors a mirror's vCPU threads run, and how they are scheduled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Placement)]
#[serde(deny_unknown_fields)]
pub struct PlacementBody {
    /// Numbers of logical processors of the host. Empty: any.
    #[schema(max_items = 1024, example = json!([0, 1]))]
    pub cpus: Vec<u32>,
    /// How the threads are scheduled. Absent: like the daemon's threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<SchedulerBody>,
}

/// How the kernel schedules threads, see sched(7). `capability_missing` is the answer when the kernel does
/// not let the daemon choose this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Scheduler)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SchedulerBody {
    /// `SCHED_OTHER`, the kernel's default.
    #[schema(title = "SchedulerOther")]
    Other {
        /// Nice value: -20 (the largest share of a processor) to 19.
        #[serde(default)]
        #[schema(default = 0, minimum = -20, maximum = 19)]
        nice: i8,
    },
    /// `SCHED_BATCH`, for work that nobody waits for.
    #[schema(title = "SchedulerBatch")]
    Batch {
        /// Nice value: -20 (the largest share of a processor) to 19.
        #[serde(default)]
        #[schema(default = 0, minimum = -20, maximum = 19)]
        nice: i8,
    },
    /// `SCHED_IDLE`: runs only when nothing else wants the processor.
    #[schema(title = "SchedulerIdle")]
    Idle {},
    /// `SCHED_FIFO`: runs before all ordinary threads, until it sleeps.
    #[schema(title = "SchedulerFifo")]
    Fifo {
        /// Priority: 1 to 99 (runs first).
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
        let cpus = numbers(&cpus?);
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

/// What to change about a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"limits": {"bandwidth_bytes_per_second": 104857600}}))]
pub struct MigrationUpdate {
    /// Limits to set. Those that are not named stay.
    #[schema(required = false, nullable = false)]
    pub limits: Option<LimitsUpdate>,
}

/// Limits to set. Null sets a limit back to its default.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsUpdate {
    /// Bytes of page content per second, over all streams together. Null: as fast as possible.
    #[schema(value_type = Option<u64>, required = false, minimum = 1048576, maximum = 1125899906842624u64)]
    pub bandwidth_bytes_per_second: Patch<u64>,
    /// Longest pause that pre-copy aims for, in milliseconds.
    #[schema(value_type = Option<u64>, required = false, minimum = 0, maximum = 3600000)]
    pub downtime_ms: Patch<u64>,
    /// Longest time before the hand-over, in milliseconds.
    #[schema(value_type = Option<u64>, required = false, minimum = 1, maximum = 604800000)]
    pub timeout_ms: Patch<u64>,
    /// How long the peer may be silent before the migration is given up, in milliseconds.
    #[schema(value_type = Option<u64>, required = false, minimum = 1000, maximum = 600000)]
    pub stall_timeout_ms: Patch<u64>,
    /// What to do when `timeout_ms` has passed before the switchover.
    #[schema(value_type = Option<OnTimeoutBody>, required = false)]
    pub on_timeout: Patch<OnTimeoutBody>,
    /// Whether the guest's vCPUs are slowed down step by step as soon as rounds do not get shorter.
    #[schema(value_type = Option<bool>, required = false)]
    pub auto_throttle: Patch<bool>,
    /// How long the comparison of memory may take, in milliseconds.
    #[schema(value_type = Option<u64>, required = false, minimum = 1, maximum = 3600000)]
    pub audit_timeout_ms: Patch<u64>,
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
        let audit_timeout_ms = f.patch_int("audit_timeout_ms", bounds::AUDIT_TIMEOUT_MS);
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

impl Decode for MigrationUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let limits = f.optional_not_null("limits");
        f.done()?;
        Some(Self { limits: limits? })
    }
}

impl LimitsUpdate {
    /// The limits that result from this change.
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
            audit_timeout_ms: self
                .audit_timeout_ms
                .clone()
                .over(now.audit_timeout_ms, default.audit_timeout_ms),
        }
    }
}

/// What to change about a registered host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"address": "192.0.2.8:7801"}))]
pub struct PeerHostUpdate {
    /// Address of its peer listener: an IP address or DNS name, and a port.
    #[schema(required = false, nullable = false, example = "192.0.2.8:7801")]
    pub address: Option<String>,
    /// The identity that is pinned for it: the digest of its public key.
    #[schema(required = false, nullable = false, pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: Option<String>,
    /// Labels to set; a label set to null is removed, and labels that are not named stay. Null in place of
    /// the object removes all.
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

/// What to change about this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"maintenance": true}))]
pub struct HostUpdate {
    /// Labels to set; a label set to null is removed, and labels that are not named stay. Null in place of
    /// the object removes all.
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>, required = false)]
    pub labels: LabelsPatch,
    /// Whether the host is in maintenance: no guest can be defined or started, and no migration is let in.
    #[schema(required = false, nullable = false)]
    pub maintenance: Option<bool>,
    /// How many outgoing migrations run at once. Further ones wait as `queued`.
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

    use mirrorvm::reading::Json;

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
    fn placements_merge() {
        let fifo = Placement { cpus: vec![1], scheduler: Some(Scheduler::Fifo { priority: 7 }) };
        let update = |patch: &serde_json::Value| {
            decode::<MirrorUpdate>(&Json::from(&json!({"placement": patch}))).map_err(|_| "not decoded")
        };
        let after = |patch: serde_json::Value| update(&patch).unwrap().placed(&fifo).unwrap();
        assert_eq!(after(json!({})), fifo);
        assert_eq!(after(json!(null)), Placement::default());
        assert_eq!(after(json!({"cpus": [0, 1]})), Placement { cpus: vec![0, 1], ..fifo.clone() });
        assert_eq!(after(json!({"cpus": null})), Placement { cpus: vec![], ..fifo.clone() });
        let scheduler = |patch| after(json!({"scheduler": patch})).scheduler;
        assert_eq!(scheduler(json!({"priority": 9})), Some(Scheduler::Fifo { priority: 9 }));
        assert_eq!(scheduler(json!({"kind": "batch"})), Some(Scheduler::Batch { nice: 0 }));
        assert_eq!(scheduler(json!({"kind": "other", "nice": -3})), Some(Scheduler::Other { nice: -3 }));
        assert_eq!(scheduler(json!({"kind": "idle"})), Some(Scheduler::Idle));
        assert_eq!(scheduler(json!(null)), None);
        let refused = |now: &Placement, patch: serde_json::Value| match update(&json!({"scheduler": patch}))
            .unwrap()
            .placed(now)
        {
            Err(HostError::Invalid(errors)) => (errors[0].pointer.clone(), errors[0].code),
            other => panic!("{other:?}"),
        };
        let at = |member: &str| format!("/placement/scheduler/{member}");
        assert_eq!(refused(&fifo, json!({"nice": 1})), (at("nice"), "unknown_field"));
        assert_eq!(refused(&fifo, json!({"kind": "idle", "priority": 1})), (at("priority"), "unknown_field"));
        assert_eq!(refused(&Placement::default(), json!({"nice": 1})), (at("kind"), "missing"));
        assert_eq!(refused(&Placement::default(), json!({"kind": "fifo"})), (at("priority"), "missing"));
        for bad in [json!({"kind": "x"}), json!({"nice": 20}), json!({"priority": 0}), json!({"nice": null})]
        {
            assert!(update(&json!({"scheduler": bad})).is_err(), "{bad}");
        }
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
