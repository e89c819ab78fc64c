//! What a caller wants moved, where and how.

use mirrorvm::host::{
    AuditMode, Destination, MigrationMode, MigrationSpec, MirrorChoice, MirrorOptions, SourceAfter,
    StreamTransport, Suite, bounds, parts_of_placement,
};
use mirrorvm::mirror::Placement;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::LimitsBody;
use crate::api::decode::{Decode, Errors, Fields, Node, one_of};
use crate::api::patch::PlacementBody;
use crate::api::strategies::{ShiftBody, StrategyBody};

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
    /// The suite by which the helpers seal pages and tokens. Both hosts' capabilities name those that they
    /// have.
    #[serde(default)]
    #[schema(default = "aes-256-gcm")]
    pub suite: SuiteBody,
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
    /// When the helpers compare memory at both ends: the source's digests every private page once the guest
    /// stands still there for good, the destination's compares that with what it opened.
    #[serde(default)]
    #[schema(default = "after")]
    pub audit: AuditBody,
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

/// The suite by which helpers seal pages and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Suite)]
pub enum SuiteBody {
    /// AES-256-GCM under a fresh key for each request of up to 128 pages. A host that sets a helper's memory
    /// back between two requests gains nothing by it. The fastest.
    #[default]
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// AES-256-GCM-SIV under such keys. Also where a host sets a helper's memory and registers back in the
    /// midst of a request, it learns no more than whether a page has changed. Several times slower.
    #[serde(rename = "aes-256-gcm-siv")]
    Aes256GcmSiv,
}

/// When the helpers compare memory at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = AuditMode)]
#[serde(rename_all = "snake_case")]
pub enum AuditBody {
    /// When the guest runs at the destination. The pause is no longer for it. A page that differs is told by
    /// `audit`, an event and a metric, and changes nothing by itself.
    #[default]
    After,
    /// Before the guest may run at the destination: the pause is longer by the time that it takes. When a
    /// page differs or there is no verdict, the migration fails as `audit_mismatch` or `audit_not_run`, and
    /// the guest goes on at the source.
    BeforeCommit,
    /// Not at all.
    Never,
}

impl Decode for AuditBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let known = [("after", Self::After), ("before_commit", Self::BeforeCommit), ("never", Self::Never)];
        one_of(node, errors, &known)
    }
}

impl From<AuditBody> for AuditMode {
    fn from(body: AuditBody) -> Self {
        match body {
            AuditBody::After => Self::After,
            AuditBody::BeforeCommit => Self::BeforeCommit,
            AuditBody::Never => Self::Never,
        }
    }
}

impl From<AuditMode> for AuditBody {
    fn from(mode: AuditMode) -> Self {
        match mode {
            AuditMode::After => Self::After,
            AuditMode::BeforeCommit => Self::BeforeCommit,
            AuditMode::Never => Self::Never,
        }
    }
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
        let suite = f.or("suite", SuiteBody::Aes256Gcm);
        let limits = f.or("limits", LimitsBody::default());
        let on_success = f.or("on_success", OnSuccessBody { source: SourceAfterBody::KeepStopped });
        let verify = f.or("verify", false);
        let audit = f.or("audit", AuditBody::After);
        let done = f.done();
        if let (false, Some(MirrorChoiceBody::Template { placement: Some(placement), .. })) =
            (errors.is_empty(), &mirror)
        {
            // The host will not see it.
            errors.extend(parts_of_placement("/mirror/placement", &placement.clone().into()));
        }
        done?;
        Some(Self {
            guest: guest?,
            destination: destination?,
            mode: mode?,
            mirror: mirror?,
            streams: streams?,
            stream_transport: stream_transport?,
            suite: suite?,
            limits: limits?,
            on_success: on_success?,
            verify: verify?,
            audit: audit?,
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

impl Decode for SuiteBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let [gcm, siv] = [Suite::Aes256Gcm, Suite::Aes256GcmSiv].map(Suite::name);
        one_of(node, errors, &[(gcm, Self::Aes256Gcm), (siv, Self::Aes256GcmSiv)])
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
            suite: match body.suite {
                SuiteBody::Aes256Gcm => Suite::Aes256Gcm,
                SuiteBody::Aes256GcmSiv => Suite::Aes256GcmSiv,
            },
            limits: body.limits.into(),
            source_after: match body.on_success.source {
                SourceAfterBody::Delete => SourceAfter::Delete,
                SourceAfterBody::KeepStopped => SourceAfter::KeepStopped,
            },
            verify: body.verify,
            audit: body.audit.into(),
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
            suite: match spec.suite {
                Suite::Aes256Gcm => SuiteBody::Aes256Gcm,
                Suite::Aes256GcmSiv => SuiteBody::Aes256GcmSiv,
            },
            limits: spec.limits.into(),
            on_success: OnSuccessBody {
                source: match spec.source_after {
                    SourceAfter::Delete => SourceAfterBody::Delete,
                    SourceAfter::KeepStopped => SourceAfterBody::KeepStopped,
                },
            },
            verify: spec.verify,
            audit: spec.audit.into(),
            left_open: LeftOpen::default(),
        }
    }
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
                "streams": streams, "stream_transport": "sealed", "suite": "aes-256-gcm",
                "limits": {"bandwidth_bytes_per_second": null, "downtime_ms": 300, "timeout_ms": 3_600_000,
                    "stall_timeout_ms": 30_000, "auto_throttle": false, "on_timeout": "cancel",
                    "audit_timeout_ms": 60_000},
                "on_success": {"source": "keep_stopped"}, "verify": false, "audit": "after",
            })
        );
    }

    #[test]
    fn a_request_comes_back_as_it_was_sent() {
        let body = json!({
            "guest": "g", "destination": {"kind": "host", "host": "b"}, "mode": "stop_and_copy",
            "mirror": {"kind": "existing", "mirror": "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"},
            "streams": 16, "stream_transport": "tls", "suite": "aes-256-gcm-siv",
            "limits": {"bandwidth_bytes_per_second": 1_048_576, "downtime_ms": 2, "timeout_ms": 3, "stall_timeout_ms": 1000,
                "auto_throttle": true, "on_timeout": "force", "audit_timeout_ms": 4},
            "on_success": {"source": "delete"}, "verify": true, "audit": "before_commit",
        });
        let spec = MigrationSpec::from(decode::<MigrationCreate>(&Json::from(&body)).unwrap());
        assert_eq!(serde_json::to_value(MigrationCreate::from(spec)).unwrap(), body);
    }
}
