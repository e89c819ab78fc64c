//! Migrations on the wire.

use jiff::Timestamp;
use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::host::{
    Destination, MigrationDirection, MigrationLimits, MigrationMode, MigrationRecord, MigrationSpec,
    MigrationState, MirrorChoice, MirrorOptions, OnTimeout, Round, SourceAfter, StreamTransport, bounds,
};
use mirrorvm::mirror::Placement;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::mirrors::Worker;
use super::patch::PlacementBody;
use super::resolution::MigrationResolution;
use super::strategies::{ShiftBody, StrategyBody};
use super::{Fault, Preview};
use crate::problem::{MAX_SAFE_INTEGER, ProblemError};

/// What to migrate, to which host, and how.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "guest": "g1",
    "destination": {"kind": "host", "host": "b"},
    "mode": "precopy",
    "mirror": {"kind": "template", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}},
    "streams": 1,
    "limits": {"downtime_ms": 300},
    "on_success": {"source": "keep_stopped"},
    "verify": false
}))]
pub struct MigrationCreate {
    /// The guest, by id or name.
    #[schema(example = "g1")]
    pub guest: String,
    /// The host to migrate to.
    pub destination: DestinationBody,
    /// Whether memory moves while the guest runs.
    #[serde(default)]
    #[schema(default = "precopy")]
    pub mode: ModeBody,
    /// The mirror to migrate through. Absent: one is made by the strategy `shifted` with `4gib`; for an
    /// SEV-ES guest it is the mirror that the guest was launched with.
    #[serde(default)]
    pub mirror: MirrorChoiceBody,
    /// How many streams move pages in parallel; each has a worker of the mirror and a connection. An existing
    /// mirror must have as many workers. Absent: chosen by this host's processors and their load (no more
    /// than the workers of an SEV-ES guest's mirror), or 1 with an existing mirror.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16)]
    pub streams: u16,
    /// How the streams of sealed pages cross the network.
    #[serde(default)]
    #[schema(default = "sealed")]
    pub stream_transport: StreamTransportBody,
    /// Limits of the migration. They can be changed while it runs.
    #[serde(default)]
    pub limits: LimitsBody,
    /// What to do after success.
    #[serde(default)]
    pub on_success: OnSuccessBody,
    /// Whether both hosts compute a digest of every page of RAM while the guest is paused, by a path that
    /// does not involve the helper. This makes the pause longer by `verify_ms`.
    #[serde(default)]
    #[schema(default = false)]
    pub verify: bool,
    /// Which choices the caller left to the daemon.
    #[serde(skip)]
    #[schema(ignore)]
    pub left_open: LeftOpen,
}

/// Which choices a caller left to the daemon. Where a guest can have only one mirror, that mirror decides
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOpen {
    /// Whether the caller did not choose a mirror.
    pub mirror: bool,
    /// Whether the caller did not choose a number of streams.
    pub streams: bool,
}

/// The host that a guest migrates to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Destination)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DestinationBody {
    /// A host that is registered here.
    #[schema(title = "DestinationHost")]
    Host {
        /// The host, by id or name.
        #[schema(example = "b")]
        host: String,
    },
    /// A host that has issued a ticket for this migration (`POST /v1/incoming-migrations` there). The
    /// migration gets the ticket's session as its id.
    #[schema(title = "DestinationTicket")]
    Ticket {
        /// The text of the ticket.
        #[schema(example = "mvmt1.7b...", max_length = 4096)]
        ticket: String,
    },
}

/// How memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MigrationMode)]
#[serde(rename_all = "snake_case")]
pub enum ModeBody {
    /// Memory moves in rounds while the guest runs; the guest is paused for the last one.
    Precopy,
    /// The guest is paused first, and all memory moves in one go.
    StopAndCopy,
}

/// The mirror that a migration goes through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MirrorChoice)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MirrorChoiceBody {
    /// A mirror that is made for the migration and removed when it ends.
    #[schema(title = "MirrorTemplate")]
    Template {
        /// The strategy by which its address space is laid out.
        strategy: StrategyBody,
        /// On which processors its vCPU threads run and how they are scheduled. Null or absent: like the
        /// daemon's threads.
        #[serde(skip_serializing_if = "Option::is_none")]
        placement: Option<PlacementBody>,
        /// The helper image, by id or name. Null or absent: the built-in one. The destination must have the
        /// same image.
        #[serde(skip_serializing_if = "Option::is_none")]
        helper_image: Option<String>,
    },
    /// A mirror that exists.
    #[schema(title = "MirrorExisting")]
    Existing {
        /// Id of the mirror.
        mirror: Uuid,
    },
}

/// How the streams of sealed pages cross the network between two hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = StreamTransport)]
#[serde(rename_all = "snake_case")]
pub enum StreamTransportBody {
    /// Without TLS, once mutual TLS has shown both hosts who the other is. Records are sealed from helper to
    /// helper, and their headers are masked. Control messages, and pages that the guest shares with its host,
    /// stay inside TLS.
    #[default]
    Sealed,
    /// Inside TLS: everything is encrypted twice.
    Tls,
}

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
}

/// What to do after success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OnSuccess)]
#[serde(deny_unknown_fields)]
pub struct OnSuccessBody {
    /// What to do with the guest's definition on this host.
    #[serde(default)]
    #[schema(default = "keep_stopped")]
    pub source: SourceAfterBody,
}

/// What to do with the guest's definition at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = SourceAfter)]
#[serde(rename_all = "snake_case")]
pub enum SourceAfterBody {
    /// The definition is removed.
    Delete,
    /// The definition is kept. The guest is `stopped`, and `moved_to` says where it went.
    KeepStopped,
}

const DEFAULT_MIRROR: MirrorChoiceBody = MirrorChoiceBody::Template {
    strategy: StrategyBody::Shifted { shift: ShiftBody::FourGib {} },
    placement: None,
    helper_image: None,
};

impl Decode for MigrationCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let guest = f.required("guest");
        let destination = f.required("destination");
        let mode = f.or("mode", ModeBody::Precopy);
        let left_open = LeftOpen { mirror: !f.has("mirror"), streams: !f.has("streams") };
        let mirror = f.or("mirror", DEFAULT_MIRROR);
        let made = !matches!(mirror, Some(MirrorChoiceBody::Existing { .. }));
        let streams = f.int_or("streams", bounds::STREAMS, if made { default_streams() } else { 1 });
        let stream_transport = f.or("stream_transport", StreamTransportBody::Sealed);
        let limits = f.or("limits", LimitsBody::from(MigrationLimits::default()));
        let on_success = f.or("on_success", OnSuccessBody { source: SourceAfterBody::KeepStopped });
        let verify = f.or("verify", false);
        f.done()?;
        Some(Self {
            guest: guest?,
            destination: destination?,
            mode: mode?,
            mirror: mirror?,
            streams: streams?,
            stream_transport: stream_transport?,
            limits: limits?,
            on_success: on_success?,
            verify: verify?,
            left_open,
        })
    }
}

/// How many streams suit this host now, by its processors and the average number of threads that wanted one
/// over the last minute (proc_loadavg(5)).
fn default_streams() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    streams_for(cpus, load)
}

/// One stream for each processor, because a stream is four threads over both hosts, and at most eight, which
/// fill any link. Where every processor is wanted twice over already, half as many, so that the guests are
/// not slowed down further.
fn streams_for(cpus: usize, load: f64) -> u16 {
    let most = cpus.clamp(1, 8);
    let taken = load >= 2.0 * cpus as f64;
    (if taken { most.div_ceil(2) } else { most }) as u16
}

impl Decode for StreamTransportBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("sealed", Self::Sealed), ("tls", Self::Tls)])
    }
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

impl Decode for DestinationBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match f.kind(&["host", "ticket"])? {
            "host" => {
                let host = f.required("host");
                f.done()?;
                Some(Self::Host { host: host? })
            }
            _ => {
                let ticket = f.required("ticket");
                f.done()?;
                Some(Self::Ticket { ticket: ticket? })
            }
        }
    }
}

impl Decode for ModeBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("precopy", Self::Precopy), ("stop_and_copy", Self::StopAndCopy)])
    }
}

impl Decode for MirrorChoiceBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match f.kind(&["template", "existing"])? {
            "template" => {
                let strategy = f.required("strategy");
                let placement = f.optional("placement");
                let helper_image = f.optional("helper_image");
                f.done()?;
                Some(Self::Template {
                    strategy: strategy?,
                    placement: placement?,
                    helper_image: helper_image?,
                })
            }
            _ => {
                let mirror = f.required("mirror");
                f.done()?;
                Some(Self::Existing { mirror: mirror? })
            }
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

impl Decode for OnSuccessBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let source = f.or("source", SourceAfterBody::KeepStopped);
        f.done()?;
        Some(Self { source: source? })
    }
}

impl Decode for SourceAfterBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("delete", Self::Delete), ("keep_stopped", Self::KeepStopped)])
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
        }
    }
}

impl From<MigrationCreate> for MigrationSpec {
    fn from(body: MigrationCreate) -> Self {
        let (mirror, template) = match body.mirror {
            MirrorChoiceBody::Template { strategy, placement, helper_image } => {
                let placement = placement.map(Placement::from).unwrap_or_default();
                (MirrorChoice::Template(strategy.into()), MirrorOptions { placement, helper_image })
            }
            MirrorChoiceBody::Existing { mirror } => {
                (MirrorChoice::Existing(mirror), MirrorOptions::default())
            }
        };
        Self {
            guest: body.guest,
            destination: match body.destination {
                DestinationBody::Host { host } => Destination::Host(host),
                DestinationBody::Ticket { ticket } => Destination::Ticket(ticket),
            },
            mode: match body.mode {
                ModeBody::Precopy => MigrationMode::Precopy,
                ModeBody::StopAndCopy => MigrationMode::StopAndCopy,
            },
            mirror,
            template,
            streams: body.streams,
            stream_transport: match body.stream_transport {
                StreamTransportBody::Sealed => StreamTransport::Sealed,
                StreamTransportBody::Tls => StreamTransport::Tls,
            },
            limits: body.limits.into(),
            source_after: match body.on_success.source {
                SourceAfterBody::Delete => SourceAfter::Delete,
                SourceAfterBody::KeepStopped => SourceAfter::KeepStopped,
            },
            verify: body.verify,
        }
    }
}

impl From<MigrationSpec> for MigrationCreate {
    fn from(spec: MigrationSpec) -> Self {
        Self {
            guest: spec.guest,
            destination: match spec.destination {
                Destination::Host(host) => DestinationBody::Host { host },
                Destination::Ticket(ticket) => DestinationBody::Ticket { ticket },
            },
            mode: match spec.mode {
                MigrationMode::Precopy => ModeBody::Precopy,
                MigrationMode::StopAndCopy => ModeBody::StopAndCopy,
            },
            mirror: match spec.mirror {
                MirrorChoice::Template(strategy) => MirrorChoiceBody::Template {
                    strategy: strategy.into(),
                    placement: (spec.template.placement != Placement::default())
                        .then(|| spec.template.placement.into()),
                    helper_image: spec.template.helper_image,
                },
                MirrorChoice::Existing(mirror) => MirrorChoiceBody::Existing { mirror },
            },
            streams: spec.streams,
            stream_transport: match spec.stream_transport {
                StreamTransport::Sealed => StreamTransportBody::Sealed,
                StreamTransport::Tls => StreamTransportBody::Tls,
            },
            limits: spec.limits.into(),
            on_success: OnSuccessBody {
                source: match spec.source_after {
                    SourceAfter::Delete => SourceAfterBody::Delete,
                    SourceAfter::KeepStopped => SourceAfterBody::KeepStopped,
                },
            },
            verify: spec.verify,
            left_open: LeftOpen::default(),
        }
    }
}

/// A migration, as this host knows it. The other host has a record of its own under the same id.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Migration {
    /// Id, a UUIDv7. Both hosts use the same.
    pub id: Uuid,
    /// `outgoing`: the guest leaves this host. `incoming`: it arrives here.
    #[schema(example = "outgoing")]
    pub direction: &'static str,
    /// Id of the guest, which is the same on both hosts.
    pub guest: Uuid,
    /// Name of the guest.
    pub guest_name: String,
    /// Name of the other host.
    pub peer: String,
    /// What was asked for, with defaults filled in. Null at the destination.
    pub request: Option<MigrationCreate>,
    /// The strategy by which the mirror's address space is laid out.
    pub strategy: StrategyBody,
    /// `queued`, `preparing`, `precopy`, `switchover`, `finishing`, `succeeded`, `failed`, `canceled` or
    /// `in_doubt`. More states may be added.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Rises with every change. The `ETag` header has it in quotes.
    pub generation: u64,
    /// How far the migration has got. It is kept after the end.
    pub progress: MigrationProgress,
    /// State of the guest on this host after the end.
    pub guest_state_after: Option<&'static str>,
    /// Statements about how the migration is going: `Stalled`, `Converging`, `HelperUnresponsive`.
    pub conditions: Vec<Condition>,
    /// Why the migration failed, or why it is in doubt.
    pub error: Option<Fault>,
    /// Whether the guest belongs to the destination already, but the destination's disk does not accept the
    /// record of it. Both hosts hold the guest until it does, and then the guest runs at the destination.
    /// Only free space or a working disk is needed.
    pub committing: bool,
    /// What an administrator said had become of the guest, if it was that which ended a doubt.
    pub resolution: Option<MigrationResolution>,
    /// Whether `cancel` can still succeed.
    pub cancelable: bool,
    /// When cancelling was asked for. `state` tells what came of it.
    pub cancel_requested_at: Option<Timestamp>,
    /// When the migration was asked for.
    pub created_at: Timestamp,
    /// When the migration left the queue.
    pub started_at: Option<Timestamp>,
    /// When the migration ended.
    pub finished_at: Option<Timestamp>,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// How far a migration has got.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationProgress {
    /// State of the migration, repeated for those who read only the progress.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Milliseconds since the migration was asked for.
    pub elapsed_ms: u64,
    /// Estimated milliseconds to the end. Null when unknown.
    pub remaining_ms: Option<u64>,
    /// Milliseconds that a pause would take if the switchover came now. Null when unknown.
    pub expected_downtime_ms: Option<u64>,
    /// The shortest pause that is possible whatever the number of pages left, in milliseconds. Null when
    /// unknown. With a `limits.downtime_ms` below it the migration does not switch over by itself.
    pub downtime_floor_ms: Option<u64>,
    /// Measured length of the pause in milliseconds, from the guest's last instruction at the source to its
    /// first at the destination, without `verify_ms`. Null when there was no pause yet.
    pub downtime_ms: Option<f64>,
    /// Milliseconds until the first page was sent.
    pub setup_ms: u64,
    /// Milliseconds that verification added to the pause.
    pub verify_ms: Option<f64>,
    /// Share of the time during which the guest's vCPUs are held back, in percent.
    #[schema(minimum = 0, maximum = 99)]
    pub throttle_percent: u8,
    /// Progress of guest memory.
    pub memory: MemoryProgress,
    /// What the helper has done.
    pub helper: HelperProgress,
    /// How much of guest memory is encrypted, by the guest's own account.
    pub encryption: EncryptionProgress,
}

/// How far the guest's memory has moved.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MemoryProgress {
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes of page content that have been moved, over all rounds.
    pub processed_bytes: u64,
    /// Bytes that are still to be sent in this round.
    pub remaining_bytes: u64,
    /// Number of zero pages. For each of them a sealed mark was sent and no content.
    pub zero_pages: u64,
    /// Number of pages whose content was sent, over all rounds.
    pub normal_pages: u64,
    /// Bytes of the pages whose content was sent.
    pub normal_bytes: u64,
    /// Bytes of one page.
    #[schema(example = 4096)]
    pub page_size_bytes: u64,
    /// Pages that the guest writes per second, measured over about the last second.
    pub dirty_pages_per_second: u64,
    /// Bytes of page content per second over all streams, as last measured.
    pub throughput_bytes_per_second: u64,
    /// Number of the round, from 1. 0 before the first.
    pub iteration: u32,
    /// Bytes that were moved while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes that were moved while the guest was paused.
    pub downtime_bytes: u64,
    /// Bytes that were moved after the guest ran at the destination.
    pub postcopy_bytes: u64,
}

/// What the helper has done for a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperProgress {
    /// Number of pages that it sealed or opened, including marks for zero pages.
    pub pages_encrypted: u64,
    /// Number of pages that were sent without it, because the guest shares them with its host.
    pub pages_plain: u64,
    /// How many requests the helper refused.
    pub helper_errors: u64,
    /// How much of their time the helper's vCPU threads spent working for this migration, in percent. Null
    /// when there was no mirror yet.
    #[schema(minimum = 0, maximum = 100)]
    pub helper_busy_percent: Option<u8>,
    /// The helper's vCPUs: CPU time for this migration, and exits since each was made.
    pub per_worker: Vec<Worker>,
}

/// How much of guest memory is encrypted. The source shows it as of the beginning of the latest round; the
/// destination learns it with the guest's state. At level `none` memory counts as encrypted unless the guest
/// shares it, because it is sent sealed all the same.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionProgress {
    /// Bytes that are private to the guest.
    pub encrypted_bytes: u64,
    /// Bytes that the guest shares with its host.
    pub shared_bytes: u64,
    /// Bytes for which this host does not know it yet.
    pub unknown_bytes: u64,
    /// How many pages the guest shared or took back while the migration ran, counted at the source.
    pub status_changes: u64,
}

/// A statement about how a migration is going.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Condition {
    /// Name of the statement: `Stalled`, `Converging` or `HelperUnresponsive`. More may be added.
    #[serde(rename = "type")]
    #[schema(example = "Converging")]
    pub kind: &'static str,
    /// Whether the statement holds: `true`, `false` or `unknown`.
    #[schema(example = "true")]
    pub status: &'static str,
    /// Why, as a code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "dirty_rate_below_throughput")]
    pub reason: &'static str,
    /// Why, and what would help, in a sentence. Absent where the reason says it all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(
        nullable = false,
        example = "the shortest pause is about 420 ms: raise limits.downtime_ms to that"
    )]
    pub detail: Option<String>,
}

impl Condition {
    fn of(record: &MigrationRecord) -> Vec<Self> {
        let p = &record.progress;
        let moving = record.state == MigrationState::Precopy;
        let code = record.error.as_ref().map_or("", |e| e.code.as_str());
        let dirty = p.dirty_pages_per_second.saturating_mul(PAGE_SIZE);
        let is = |kind, so: Option<bool>, reason| Self {
            kind,
            status: so.map_or("unknown", |so| if so { "true" } else { "false" }),
            reason,
            detail: None,
        };
        let limit = record.spec.as_ref().map(|s| s.limits.downtime_ms);
        let floor = p.downtime_floor_ms.filter(|floor| moving && limit.is_some_and(|limit| *floor > limit));
        let measured = moving && p.iteration > 1 && p.throughput_bytes_per_second > 0;
        let converging = match (code, measured) {
            ("not_converging", _) => is("Converging", Some(false), "not_converging"),
            _ if floor.is_some() => Self {
                detail: floor.map(|ms| {
                    format!(
                        "the shortest pause is about {ms} ms: raise limits.downtime_ms to that, or ask for the switchover"
                    )
                }),
                ..is("Converging", Some(false), "downtime_limit_below_floor")
            },
            (_, true) if dirty < p.throughput_bytes_per_second => {
                is("Converging", Some(true), "dirty_rate_below_throughput")
            }
            (_, true) => is("Converging", Some(false), "dirty_rate_above_throughput"),
            (_, false) => is("Converging", None, "not_measured"),
        };
        let stalled = match code {
            "peer_lost" => is("Stalled", Some(true), "peer_lost"),
            _ if record.state == MigrationState::InDoubt => is("Stalled", Some(true), "in_doubt"),
            _ if record.committing => is("Stalled", Some(true), "committing"),
            _ => is("Stalled", Some(false), "progress"),
        };
        let helper = is(
            "HelperUnresponsive",
            Some(code == "helper_failed"),
            if code == "helper_failed" { "helper_failed" } else { "answers" },
        );
        vec![stalled, converging, helper]
    }
}

impl MigrationProgress {
    fn new(state: &'static str, record: &MigrationRecord) -> Self {
        let p = &record.progress;
        let moved = (p.pages_sealed + p.pages_shared).saturating_sub(p.pages_zero);
        Self {
            state,
            elapsed_ms: p.elapsed_ms,
            remaining_ms: p.remaining_ms,
            expected_downtime_ms: p.expected_downtime_ms,
            downtime_floor_ms: p.downtime_floor_ms,
            downtime_ms: p.downtime_ms,
            setup_ms: p.setup_ms,
            verify_ms: p.verify_ms,
            throttle_percent: p.throttle_percent,
            memory: MemoryProgress {
                total_bytes: p.total_bytes,
                processed_bytes: p.processed_bytes,
                remaining_bytes: p.remaining_bytes,
                zero_pages: p.pages_zero,
                normal_pages: moved,
                normal_bytes: moved.saturating_mul(PAGE_SIZE),
                page_size_bytes: PAGE_SIZE,
                dirty_pages_per_second: p.dirty_pages_per_second,
                throughput_bytes_per_second: p.throughput_bytes_per_second,
                iteration: p.iteration,
                precopy_bytes: p.precopy_bytes,
                downtime_bytes: p.downtime_bytes,
                postcopy_bytes: 0,
            },
            helper: HelperProgress {
                pages_encrypted: p.pages_sealed,
                pages_plain: p.pages_shared,
                helper_errors: p.helper_errors,
                helper_busy_percent: record.helper_busy_percent,
                per_worker: record.workers.iter().cloned().map(Worker::from).collect(),
            },
            encryption: EncryptionProgress {
                encrypted_bytes: p.shared_bytes.map_or(0, |shared| p.total_bytes.saturating_sub(shared)),
                shared_bytes: p.shared_bytes.unwrap_or(0),
                unknown_bytes: if p.shared_bytes.is_some() { 0 } else { p.total_bytes },
                status_changes: p.status_changes,
            },
        }
    }
}

impl From<MigrationRecord> for Migration {
    fn from(record: MigrationRecord) -> Self {
        let state = record.state.name();
        let conditions = Condition::of(&record);
        let progress = MigrationProgress::new(state, &record);
        Self {
            id: record.id,
            direction: match record.direction {
                MigrationDirection::Outgoing => "outgoing",
                MigrationDirection::Incoming => "incoming",
            },
            guest: record.guest,
            guest_name: record.guest_name,
            peer: record.peer,
            request: record.spec.map(MigrationCreate::from),
            strategy: record.strategy.into(),
            state,
            generation: record.generation,
            progress,
            guest_state_after: record.guest_state_after.map(|s| s.name()),
            error: record.error.map(Fault::from),
            committing: record.committing,
            resolution: record.resolution.map(MigrationResolution::from),
            cancelable: cancelable(record.state),
            cancel_requested_at: record.cancel_requested_at,
            created_at: record.created_at,
            started_at: record.started_at,
            finished_at: record.finished_at,
            conditions,
            preview: None,
        }
    }
}

const fn cancelable(state: MigrationState) -> bool {
    match state {
        MigrationState::Queued
        | MigrationState::Preparing
        | MigrationState::Precopy
        | MigrationState::Switchover => true,
        MigrationState::Finishing
        | MigrationState::Succeeded
        | MigrationState::Failed
        | MigrationState::Canceled
        | MigrationState::InDoubt => false,
    }
}

/// All states, for filters.
pub(crate) const STATES: [MigrationState; 9] = [
    MigrationState::Queued,
    MigrationState::Preparing,
    MigrationState::Precopy,
    MigrationState::Switchover,
    MigrationState::Finishing,
    MigrationState::Succeeded,
    MigrationState::Failed,
    MigrationState::Canceled,
    MigrationState::InDoubt,
];

/// The state called `name`.
///
/// # Errors
/// A problem with the parameter `state`.
pub(crate) fn parse_state(name: &str) -> Result<MigrationState, Box<ProblemError>> {
    STATES.into_iter().find(|s| s.name() == name).ok_or_else(|| {
        let names: Vec<&str> = STATES.iter().map(|s| s.name()).collect();
        let shown: String = name.chars().take(64).collect();
        let detail = format!("{shown:?} is not one of {}", names.join(", "));
        Box::new(ProblemError::at_parameter("state", "unknown_value", detail))
    })
}

/// One page of a list of migrations.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationList {
    /// Migrations, in the order in which they were asked for unless requested otherwise.
    pub items: Vec<Migration>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}

/// One pass over guest memory.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRound {
    /// Number of the round, from 1.
    pub number: u32,
    /// Number of pages that were sent, counting zero pages, of which only a mark is sent.
    pub pages: u64,
    /// How many of them the helper sealed.
    pub pages_encrypted: u64,
    /// How many of them the guest shares with its host.
    pub pages_plain: u64,
    /// How many of them were zero: a sealed mark was sent and no content.
    pub zero_pages: u64,
    /// Bytes of page content that were sent.
    pub bytes: u64,
    /// Length of the round in microseconds.
    pub duration_us: u64,
    /// How many pages the guest wrote meanwhile. 0 for the last round.
    pub dirtied_pages: u64,
    /// How many pages the guest wrote per second.
    pub dirty_pages_per_second: u64,
    /// Whether the guest was paused during the round.
    pub paused: bool,
}

impl From<Round> for MigrationRound {
    fn from(r: Round) -> Self {
        let rate = u128::from(r.dirtied_pages) * 1_000_000 / u128::from(r.duration_us.max(1));
        Self {
            number: r.number,
            pages: r.pages_sealed + r.pages_shared,
            pages_encrypted: r.pages_sealed,
            pages_plain: r.pages_shared,
            zero_pages: r.pages_zero,
            bytes: r.bytes,
            duration_us: r.duration_us,
            dirtied_pages: r.dirtied_pages,
            dirty_pages_per_second: u64::try_from(rate).unwrap_or(u64::MAX).min(MAX_SAFE_INTEGER),
            paused: r.paused,
        }
    }
}

/// The rounds of a migration so far.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRoundList {
    /// Rounds, the oldest first.
    pub items: Vec<MigrationRound>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use mirrorvm::reading::Json;

    use super::*;
    use crate::api::decode::decode;

    #[test]
    fn streams_go_by_processors_and_load() {
        for (cpus, load, streams) in [
            (1, 0.0, 1),
            (1, 9.0, 1),
            (2, 3.9, 2),
            (2, 4.0, 1),
            (6, 30.0, 3),
            (64, 20.0, 8),
            (64, 128.0, 4),
            (0, 0.0, 1),
        ] {
            assert_eq!(streams_for(cpus, load), streams, "{cpus} {load}");
        }
        assert!((1..=8).contains(&default_streams()));
    }

    #[test]
    fn the_shortest_request_has_the_documented_defaults() {
        let body = json!({"guest": "g", "destination": {"kind": "host", "host": "b"}});
        let spec = MigrationSpec::from(decode::<MigrationCreate>(&Json::from(&body)).unwrap());
        let streams = spec.streams;
        assert!((1..=8).contains(&streams));
        assert_eq!(
            serde_json::to_value(MigrationCreate::from(spec)).unwrap(),
            json!({
                "guest": "g", "destination": {"kind": "host", "host": "b"}, "mode": "precopy",
                "mirror": {"kind": "template", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}},
                "streams": streams, "stream_transport": "sealed",
                "limits": {"bandwidth_bytes_per_second": null, "downtime_ms": 300, "timeout_ms": 3_600_000,
                    "stall_timeout_ms": 30_000, "auto_throttle": false, "on_timeout": "cancel"},
                "on_success": {"source": "keep_stopped"}, "verify": false,
            })
        );
    }

    #[test]
    fn a_request_comes_back_as_it_was_sent() {
        let body = json!({
            "guest": "g", "destination": {"kind": "host", "host": "b"}, "mode": "stop_and_copy",
            "mirror": {"kind": "existing", "mirror": "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"},
            "streams": 16, "stream_transport": "tls",
            "limits": {"bandwidth_bytes_per_second": 1_048_576, "downtime_ms": 2, "timeout_ms": 3, "stall_timeout_ms": 1000,
                "auto_throttle": true, "on_timeout": "force"},
            "on_success": {"source": "delete"}, "verify": true,
        });
        let spec = MigrationSpec::from(decode::<MigrationCreate>(&Json::from(&body)).unwrap());
        assert_eq!(serde_json::to_value(MigrationCreate::from(spec)).unwrap(), body);
    }

    #[test]
    fn states_are_parsed_by_their_names() {
        for state in STATES {
            assert_eq!(parse_state(state.name()).unwrap(), state);
            assert!(!(cancelable(state) && state.is_terminal()));
        }
        assert!(parse_state("done").is_err());
    }
}
