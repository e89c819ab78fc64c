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

/// What is to be moved, where and how.
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
    /// Where to.
    pub destination: DestinationBody,
    /// How memory is moved.
    #[serde(default)]
    #[schema(default = "precopy")]
    pub mode: ModeBody,
    /// Through which mirror; absent: a template of `shifted` with `4gib`, and of an SEV-ES guest the mirror
    /// that it was launched with.
    #[serde(default)]
    pub mirror: MirrorChoiceBody,
    /// Helper workers and connections, no more than an existing mirror has workers; absent: by this host's
    /// processors and their load, no more than an SEV-ES guest's mirror has workers, or 1 with an existing
    /// mirror.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16)]
    pub streams: u16,
    /// How the streams of sealed pages cross.
    #[serde(default)]
    #[schema(default = "sealed")]
    pub stream_transport: StreamTransportBody,
    /// Limits.
    #[serde(default)]
    pub limits: LimitsBody,
    /// What happens after success.
    #[serde(default)]
    pub on_success: OnSuccessBody,
    /// Whether both hosts digest every page of RAM at the pause point, by a path that does not go through the
    /// helper. Stretches the pause by `verify_ms`.
    #[serde(default)]
    #[schema(default = false)]
    pub verify: bool,
    /// What the caller left to the daemon.
    #[serde(skip)]
    #[schema(ignore)]
    pub left_open: LeftOpen,
}

/// What a caller left to the daemon: where a guest has only one mirror, that decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOpen {
    /// Through which mirror.
    pub mirror: bool,
    /// How many streams.
    pub streams: bool,
}

/// Where a migration goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Destination)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DestinationBody {
    /// A known host.
    #[schema(title = "DestinationHost")]
    Host {
        /// Its id or name.
        #[schema(example = "b")]
        host: String,
    },
    /// A host that gave a ticket for this migration (`POST /v1/incoming-migrations` there). The migration
    /// gets the ticket's session as its id.
    #[schema(title = "DestinationTicket")]
    Ticket {
        /// The ticket's text.
        #[schema(example = "mvmt1.7b...", max_length = 4096)]
        ticket: String,
    },
}

/// How memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MigrationMode)]
#[serde(rename_all = "snake_case")]
pub enum ModeBody {
    /// In rounds while the guest runs.
    Precopy,
    /// In one go while it is paused.
    StopAndCopy,
}

/// The mirror that a migration uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MirrorChoice)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MirrorChoiceBody {
    /// One that is made for the migration and removed after it.
    #[schema(title = "MirrorTemplate")]
    Template {
        /// Layout of its address space.
        strategy: StrategyBody,
        /// Where its vCPU threads run; null or absent: as the daemon.
        #[serde(skip_serializing_if = "Option::is_none")]
        placement: Option<PlacementBody>,
        /// The helper image, by id or name; null or absent: the built-in one. The destination must have it,
        /// too.
        #[serde(skip_serializing_if = "Option::is_none")]
        helper_image: Option<String>,
    },
    /// One that exists.
    #[schema(title = "MirrorExisting")]
    Existing {
        /// Its id.
        mirror: Uuid,
    },
}

/// How the streams of sealed pages cross between hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = StreamTransport)]
#[serde(rename_all = "snake_case")]
pub enum StreamTransportBody {
    /// As they are, once mutual TLS has shown both hosts who the other is: records are sealed helper to
    /// helper, and their headers are masked. Control messages and pages that the guest shares stay inside
    /// TLS.
    #[default]
    Sealed,
    /// Inside TLS as well: everything is encrypted twice.
    Tls,
}

/// What happens when a migration has not come to its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OnTimeout)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeoutBody {
    /// It fails as `not_converging`; the guest goes on here.
    #[default]
    Cancel,
    /// The guest is paused and the rest is sent, however long that takes.
    Force,
    /// The guest's vCPUs are held back step by step until it converges; it fails as `not_converging` when
    /// even that does not help. Not for `qemu` guests.
    Throttle,
}

/// Limits of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MigrationLimits)]
#[serde(deny_unknown_fields)]
pub struct LimitsBody {
    /// Bytes of page content per second over all streams; null or absent: as fast as it goes.
    #[schema(minimum = 1048576, maximum = 1125899906842624u64)]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause of a live migration. A pause that turns out longer is broken off while it can be, until
    /// the destination is told to start the guest; the guest goes on and another is tried later. Tolerance: a
    /// tenth, at least 5 ms, and what the destination takes beyond the prediction.
    #[serde(default)]
    #[schema(default = 300, minimum = 0, maximum = 3600000)]
    pub downtime_ms: u64,
    /// Longest time from the first page to the switchover.
    #[serde(default)]
    #[schema(default = 3600000, minimum = 1, maximum = 604800000)]
    pub timeout_ms: u64,
    /// Longest silence of the peer.
    #[serde(default)]
    #[schema(default = 30000, minimum = 1000, maximum = 600000)]
    pub stall_timeout_ms: u64,
    /// What happens after `timeout_ms`.
    #[serde(default)]
    #[schema(default = "cancel")]
    pub on_timeout: OnTimeoutBody,
    /// Whether the guest's vCPUs are held back, step by step, as soon as rounds do not shrink. Not for `qemu`
    /// guests.
    #[serde(default)]
    #[schema(default = false)]
    pub auto_throttle: bool,
}

/// What happens after success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OnSuccess)]
#[serde(deny_unknown_fields)]
pub struct OnSuccessBody {
    /// What becomes of the guest here.
    #[serde(default)]
    #[schema(default = "keep_stopped")]
    pub source: SourceAfterBody,
}

/// What becomes of the source's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = SourceAfter)]
#[serde(rename_all = "snake_case")]
pub enum SourceAfterBody {
    /// It is removed.
    Delete,
    /// It stays defined, `stopped` with `moved_to`.
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

/// What suits this host now: its processors and how many threads want one, on average over a minute
/// (proc_loadavg(5)).
fn default_streams() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    streams_for(cpus, load)
}

/// One a processor: a stream is four threads over both hosts. Eight fill any link. Where everything is taken
/// twice over already, half as many: more would only be in the way of the guests.
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

impl Decode for Uuid {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let id = Self::try_parse(&text).ok();
        if id.is_none() {
            node.invalid(errors, "this is not a UUID");
        }
        id
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

/// A migration as this host knows it; the other host has a record of its own under the same id.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Migration {
    /// UUIDv7, the same at both hosts.
    pub id: Uuid,
    /// `outgoing`: the guest leaves this host. `incoming`: it arrives here.
    #[schema(example = "outgoing")]
    pub direction: &'static str,
    /// The guest, the same id at both hosts.
    pub guest: Uuid,
    /// The guest's name.
    pub guest_name: String,
    /// Name of the other host.
    pub peer: String,
    /// What was asked for, defaults filled in; null at the destination.
    pub request: Option<MigrationCreate>,
    /// Layout of the mirror's address space.
    pub strategy: StrategyBody,
    /// `queued`, `preparing`, `precopy`, `switchover`, `finishing`, `succeeded`, `failed`, `canceled` or
    /// `in_doubt`; more may come.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Goes up with every change; the ETag in quotes.
    pub generation: u64,
    /// How far it is; kept after the end.
    pub progress: MigrationProgress,
    /// The guest's state here after the end.
    pub guest_state_after: Option<&'static str>,
    /// What can be said of how it goes: `Stalled`, `Converging`, `HelperUnresponsive`.
    pub conditions: Vec<Condition>,
    /// Why it failed, or is in doubt.
    pub error: Option<Fault>,
    /// Whether the guest is the destination's already and its store does not take that yet: both hosts hold
    /// the guest, and it runs at the destination as soon as the store takes it. Nothing but room, or a disk
    /// that works, is needed.
    pub committing: bool,
    /// What an administrator said that became of it, if it was that which ended a doubt.
    pub resolution: Option<MigrationResolution>,
    /// Whether `cancel` may still work.
    pub cancelable: bool,
    /// When cancelling was asked for; the outcome is `state`.
    pub cancel_requested_at: Option<Timestamp>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it left the queue.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// How far a migration is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationProgress {
    /// The migration's state, repeated for readers of progress alone.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Since the request.
    pub elapsed_ms: u64,
    /// Estimate to the end; null: unknown.
    pub remaining_ms: Option<u64>,
    /// Pause that the next switchover would cost; null: unknown.
    pub expected_downtime_ms: Option<u64>,
    /// The shortest pause that can be had, whatever the number of pages; null: unknown. With
    /// `limits.downtime_ms` below it the migration does not switch over by itself.
    pub downtime_floor_ms: Option<u64>,
    /// The pause as measured, from the guest's last instruction at the source to its first at the
    /// destination, `verify_ms` taken off; null: there was none yet.
    pub downtime_ms: Option<f64>,
    /// Until the first page.
    pub setup_ms: u64,
    /// Time that verification added to the pause.
    pub verify_ms: Option<f64>,
    /// Share of their time that the guest's vCPUs are held back.
    #[schema(minimum = 0, maximum = 99)]
    pub throttle_percent: u8,
    /// Guest memory.
    pub memory: MemoryProgress,
    /// The helper's work.
    pub helper: HelperProgress,
    /// What of guest memory is encrypted, by the guest's word.
    pub encryption: EncryptionProgress,
}

/// How far memory is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MemoryProgress {
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes of page content moved so far, all rounds.
    pub processed_bytes: u64,
    /// Bytes of this round still to go.
    pub remaining_bytes: u64,
    /// Zero pages: a sealed mark crossed, no content.
    pub zero_pages: u64,
    /// Pages whose content moved, all rounds.
    pub normal_pages: u64,
    /// Their bytes.
    pub normal_bytes: u64,
    /// Bytes in a page.
    #[schema(example = 4096)]
    pub page_size_bytes: u64,
    /// Pages that the guest dirties per second, over about the last second that was looked at.
    pub dirty_pages_per_second: u64,
    /// Page content per second over all streams, as last measured.
    pub throughput_bytes_per_second: u64,
    /// Round, from 1; 0 before the first.
    pub iteration: u32,
    /// Bytes moved while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes moved while it was paused.
    pub downtime_bytes: u64,
    /// Bytes moved after it ran at the destination.
    pub postcopy_bytes: u64,
}

/// What the helper did.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperProgress {
    /// Pages that it sealed or opened, marks for zero pages included.
    pub pages_encrypted: u64,
    /// Pages that crossed without it, as the guest shares them with its host.
    pub pages_plain: u64,
    /// Refusals that it answered.
    pub helper_errors: u64,
    /// Share of their time that its vCPU threads used the processor for this migration; null: there was no
    /// mirror yet.
    #[schema(minimum = 0, maximum = 100)]
    pub helper_busy_percent: Option<u8>,
    /// Its vCPUs: CPU time for this migration, exits since they were made.
    pub per_worker: Vec<Worker>,
}

/// What of guest memory is encrypted. At the source as of the round that began last; the destination is told
/// with the guest's state. RAM of a guest at level `none` counts as encrypted unless it shares it: it crosses
/// sealed all the same.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionProgress {
    /// Bytes that are the guest's own.
    pub encrypted_bytes: u64,
    /// Bytes that it shares with its host.
    pub shared_bytes: u64,
    /// Bytes of which this host does not know it yet.
    pub unknown_bytes: u64,
    /// Pages that it shared or took back while the migration ran; counted at the source.
    pub status_changes: u64,
}

/// Something that can be said of how a migration goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Condition {
    /// `Stalled`, `Converging` or `HelperUnresponsive`; more may come.
    #[serde(rename = "type")]
    #[schema(example = "Converging")]
    pub kind: &'static str,
    /// Whether it is so: `true`, `false` or `unknown`.
    #[schema(example = "true")]
    pub status: &'static str,
    /// Why, for programs; `snake_case`, an open list.
    #[schema(example = "dirty_rate_below_throughput")]
    pub reason: &'static str,
    /// More of why, and what would help, for people; absent where the reason says it all.
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

/// The states by name, for filters.
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

/// One page of migrations.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationList {
    /// Migrations by creation.
    pub items: Vec<Migration>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}

/// One pass over memory.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRound {
    /// Counted from 1.
    pub number: u32,
    /// Pages that crossed, zero pages as a mark included.
    pub pages: u64,
    /// Of these, pages that the helper sealed.
    pub pages_encrypted: u64,
    /// Of these, pages that the guest shares with its host.
    pub pages_plain: u64,
    /// Of these, zero pages: a sealed mark crossed, no content.
    pub zero_pages: u64,
    /// Bytes of page content that crossed.
    pub bytes: u64,
    /// Duration.
    pub duration_us: u64,
    /// Pages that the guest dirtied meanwhile; 0 for the last round.
    pub dirtied_pages: u64,
    /// The same per second.
    pub dirty_pages_per_second: u64,
    /// Whether the guest was paused.
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

/// The rounds of a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRoundList {
    /// Rounds so far, the first first.
    pub items: Vec<MigrationRound>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::json::Json;

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
