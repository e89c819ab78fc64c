//! Mirrors on the wire.

use jiff::Timestamp;
use mirrorvm::host::{MirrorOptions, MirrorRecord, MirrorSpec, WorkerInfo, bounds, parts_of_placement};
use mirrorvm::mirror::Placement;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node};
use super::patch::PlacementBody;
use super::strategies::StrategyBody;
use super::{Fault, Preview, sha256_text};

/// The mirror to make.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "guest": "g1", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}, "workers": 1
}))]
pub struct MirrorCreate {
    /// The guest, by id or name. It must be running or paused.
    #[schema(example = "g1")]
    pub guest: String,
    /// The strategy by which its address space is laid out.
    pub strategy: StrategyBody,
    /// Number of mirror vCPUs.
    #[serde(default)]
    #[schema(default = 1, minimum = 1, maximum = 16)]
    pub workers: u32,
    /// On which processors its vCPU threads run and how they are scheduled. Null or absent: like the daemon's
    /// threads.
    pub placement: Option<PlacementBody>,
    /// The helper image, by id or name. Null or absent: the built-in one. An encrypted guest can only have
    /// the image that it was launched with.
    #[schema(example = "helper-2")]
    pub helper_image: Option<String>,
}

impl Decode for MirrorCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let guest = f.required("guest");
        let strategy = f.required("strategy");
        let workers = f.int_or("workers", bounds::WORKERS, 1);
        let placement: Option<Option<PlacementBody>> = f.optional("placement");
        let helper_image = f.optional("helper_image");
        let done = f.done();
        if let Some(Some(placement)) = placement.as_ref().filter(|_| !errors.is_empty()) {
            // The host will not see it.
            errors.extend(parts_of_placement("/placement", &placement.clone().into()));
        }
        done?;
        Some(Self {
            guest: guest?,
            strategy: strategy?,
            workers: workers?,
            placement: placement?,
            helper_image: helper_image?,
        })
    }
}

impl From<MirrorCreate> for MirrorSpec {
    fn from(body: MirrorCreate) -> Self {
        let placement = body.placement.map(Placement::from).unwrap_or_default();
        let options = MirrorOptions { placement, helper_image: body.helper_image };
        Self { guest: body.guest, strategy: body.strategy.into(), workers: body.workers, options }
    }
}

/// A mirror VM of a guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Mirror {
    /// Id, a UUIDv7.
    pub id: Uuid,
    /// Id of its guest.
    pub guest: Uuid,
    /// The strategy by which its address space is laid out. `layout` shows the result in full.
    pub strategy: StrategyBody,
    /// State of the mirror: `creating`, `ready`, `busy` or `failed`. More states may be added.
    #[schema(example = "ready")]
    pub state: &'static str,
    /// Rises with every change. The `ETag` header has it in quotes.
    pub generation: u64,
    /// The vCPUs of the mirror.
    pub workers: Vec<Worker>,
    /// SHA-256 of the helper image that it runs.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// Why the mirror failed.
    pub error: Option<Fault>,
    /// When the mirror was made.
    #[serde(serialize_with = "super::time::to_ms")]
    pub created_at: Timestamp,
    /// Microseconds from the request until its helper was ready.
    pub ready_after_us: u64,
    /// On which processors its vCPU threads run, and how they are scheduled.
    pub placement: PlacementBody,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// A vCPU of a mirror, which is a worker of its helper.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Worker {
    /// Id of its thread in the kernel.
    pub tid: u32,
    /// How often it has left guest mode since it was made.
    pub exits: u64,
    /// CPU time of its thread, in nanoseconds.
    pub cpu_ns: u64,
}

impl From<WorkerInfo> for Worker {
    fn from(info: WorkerInfo) -> Self {
        Self { tid: info.tid, exits: info.exits, cpu_ns: info.cpu_ns }
    }
}

impl From<MirrorRecord> for Mirror {
    fn from(record: MirrorRecord) -> Self {
        Self {
            id: record.id,
            guest: record.guest,
            strategy: record.strategy.into(),
            state: record.state.name(),
            generation: record.generation,
            workers: record.workers.into_iter().map(Worker::from).collect(),
            helper_measurement: sha256_text(&record.helper_measurement),
            error: record.error.map(Fault::from),
            created_at: record.created_at,
            ready_after_us: record.ready_after_us,
            placement: record.placement.into(),
            preview: None,
        }
    }
}

/// One page of a list of mirrors.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorList {
    /// Mirrors, in the order in which they were made unless asked for otherwise.
    pub items: Vec<Mirror>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
    /// Follow `/v1/events` after it to learn what changes from here on: everything before it is in the list
    /// already. Of a list in several pages, that of the first counts.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub events_cursor: String,
}
