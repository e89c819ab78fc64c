//! Mirrors on the wire.

use jiff::Timestamp;
use mirrorvm::host::{MirrorOptions, MirrorRecord, MirrorSpec, WorkerInfo, bounds};
use mirrorvm::mirror::Placement;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node};
use super::patch::PlacementBody;
use super::strategies::StrategyBody;
use super::{Fault, Preview, sha256_text};

/// What a mirror is to be.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "guest": "g1", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}, "workers": 1
}))]
pub struct MirrorCreate {
    /// The guest, by id or name; running or paused.
    #[schema(example = "g1")]
    pub guest: String,
    /// Layout of its address space.
    pub strategy: StrategyBody,
    /// Mirror vCPUs.
    #[serde(default)]
    #[schema(default = 1, minimum = 1, maximum = 16)]
    pub workers: u32,
    /// Where its vCPU threads run; null or absent: as the daemon.
    pub placement: Option<PlacementBody>,
    /// The helper image, by id or name; null or absent: the built-in one. An encrypted guest has the one that
    /// it was launched with.
    #[schema(example = "helper-2")]
    pub helper_image: Option<String>,
}

impl Decode for MirrorCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let guest = f.required("guest");
        let strategy = f.required("strategy");
        let workers = f.int_or("workers", bounds::WORKERS, 1);
        let placement = f.optional("placement");
        let helper_image = f.optional("helper_image");
        f.done()?;
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

/// A mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Mirror {
    /// UUIDv7.
    pub id: Uuid,
    /// Its guest.
    pub guest: Uuid,
    /// Layout of its address space; `layout` has it in full.
    pub strategy: StrategyBody,
    /// `creating`, `ready`, `busy` or `failed`; more may come.
    #[schema(example = "ready")]
    pub state: &'static str,
    /// Goes up with every change; the ETag in quotes.
    pub generation: u64,
    /// Its vCPUs.
    pub workers: Vec<Worker>,
    /// SHA-256 of the helper image.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// Why it failed.
    pub error: Option<Fault>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Microseconds from the request to the helper's first idle doorbell.
    pub ready_after_us: u64,
    /// Where its vCPU threads run.
    pub placement: PlacementBody,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// A mirror vCPU.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Worker {
    /// Kernel thread id.
    pub tid: u32,
    /// Exits from guest mode since it was made.
    pub exits: u64,
    /// CPU time of its thread, nanoseconds.
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

/// One page of mirrors.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorList {
    /// Mirrors by creation.
    pub items: Vec<Mirror>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}
