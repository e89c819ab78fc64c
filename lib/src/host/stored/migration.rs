//! A migration on disk, as either end knows it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::address_space::Strategy;
use crate::host::{
    Audit, AuditMode, AuditState, Destination, Evidence, Fault, GuestState, HandOverOutcome, Labels,
    MigrationDirection, MigrationLimits, MigrationMode, MigrationRecord, MigrationSpec, MigrationState,
    MirrorChoice, MirrorOptions, NotRun, OnTimeout, Progress, Resolution, Round, SourceAfter,
    StreamTransport, Suite, WorkerInfo,
};
use crate::store::form::{Part, Wrong, fill, form, words};

form! {
    MigrationForm of MigrationRecord, version 7 by forward {
        id: Uuid,
        direction: MigrationDirection,
        guest: Uuid,
        guest_name: String,
        labels: Labels,
        peer: String,
        peer_identity: String,
        order: u64,
        spec: Option<MigrationSpec>,
        strategy: Strategy,
        suite: Suite,
        state: MigrationState,
        generation: u64,
        progress: Progress,
        rounds: Vec<Round>,
        workers: Vec<WorkerInfo>,
        helper_busy_percent: Option<u8>,
        guest_state_after: Option<GuestState>,
        error: Option<Fault>,
        cancel_requested_at: Option<Timestamp>,
        committing: bool,
        audit: Option<Audit>,
        evidence: Option<Evidence>,
        resolution: Option<Resolution>,
        created_at: Timestamp,
        started_at: Option<Timestamp>,
        finished_at: Option<Timestamp>,
    }
}

/// Version 6 had no audits and no evidence. Version 5 knew one suite, and did not name it.
fn forward(from: u64, document: &mut Value) {
    if from < 5 {
        to_version_5(document);
    }
    let suite = || [("suite", json!("aes-256-gcm"))];
    fill(document, suite());
    fill(document, [("audit", Value::Null), ("evidence", Value::Null)]);
    if let Some(spec) = document.get_mut("spec").filter(|spec| spec.is_object()) {
        fill(spec, suite());
        fill(spec, [("audit", json!("never"))]);
        if let Some(limits) = spec.get_mut("limits") {
            fill(limits, [("audit_timeout_ms", json!(60_000))]);
        }
    }
}

/// Version 4 left out what earlier builds did not have, and had the program's own names for where a guest
/// goes and through which mirror.
fn to_version_5(document: &mut Value) {
    let none = Value::Null;
    fill(
        document,
        [
            ("labels", json!({})),
            ("peer_identity", json!("")),
            ("order", json!(0)),
            ("workers", json!([])),
            ("helper_busy_percent", none.clone()),
            ("committing", json!(false)),
            ("resolution", none.clone()),
        ],
    );
    if let Some(progress) = document.get_mut("progress") {
        fill(
            progress,
            [
                ("downtime_floor_ms", none.clone()),
                ("shared_bytes", none.clone()),
                ("status_changes", json!(0)),
                ("throttle_percent", json!(0)),
            ],
        );
    }
    let Some(spec) = document.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    fill(spec, [("template", json!({})), ("stream_transport", json!("sealed"))]);
    if let Some(template) = spec.get_mut("template") {
        fill(template, [("placement", json!({})), ("helper_image", none.clone())]);
        if let Some(placement) = template.get_mut("placement") {
            fill(placement, [("cpus", json!([])), ("scheduler", none.clone())]);
        }
    }
    if let Some(limits) = spec.get_mut("limits") {
        fill(
            limits,
            [
                ("bandwidth_bytes_per_second", none),
                ("downtime_ms", json!(300)),
                ("timeout_ms", json!(3_600_000)),
                ("stall_timeout_ms", json!(30_000)),
                ("on_timeout", json!("cancel")),
                ("auto_throttle", json!(false)),
            ],
        );
    }
    for (member, before, now) in [
        ("destination", "Host", "host"),
        ("destination", "Ticket", "ticket"),
        ("mirror", "Existing", "existing"),
        ("mirror", "Template", "template"),
    ] {
        let choice = spec.get_mut(member).and_then(Value::as_object_mut);
        if let Some((choice, value)) = choice.and_then(|c| c.remove(before).map(|value| (c, value))) {
            choice.insert(now.to_owned(), value);
        }
    }
}

form! {
    MigrationSpecForm of MigrationSpec {
        guest: String,
        destination: Destination,
        mode: MigrationMode,
        mirror: MirrorChoice,
        template: MirrorOptions,
        streams: u16,
        stream_transport: StreamTransport,
        suite: Suite,
        limits: MigrationLimits,
        source_after: SourceAfter,
        verify: bool,
        audit: AuditMode,
    }
}

/// The form of a [`Destination`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationForm {
    Host(String),
    Ticket(String),
}

impl Part for Destination {
    type Form = DestinationForm;

    fn form(&self) -> DestinationForm {
        match self {
            Self::Host(host) => DestinationForm::Host(host.clone()),
            Self::Ticket(ticket) => DestinationForm::Ticket(ticket.clone()),
        }
    }

    fn of(form: DestinationForm) -> Result<Self, Wrong> {
        Ok(match form {
            DestinationForm::Host(host) => Self::Host(host),
            DestinationForm::Ticket(ticket) => Self::Ticket(ticket),
        })
    }
}

/// The form of a [`MirrorChoice`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorChoiceForm {
    Existing(Uuid),
    Template(<Strategy as Part>::Form),
}

impl Part for MirrorChoice {
    type Form = MirrorChoiceForm;

    fn form(&self) -> MirrorChoiceForm {
        match self {
            Self::Existing(mirror) => MirrorChoiceForm::Existing(*mirror),
            Self::Template(strategy) => MirrorChoiceForm::Template(strategy.form()),
        }
    }

    fn of(form: MirrorChoiceForm) -> Result<Self, Wrong> {
        Ok(match form {
            MirrorChoiceForm::Existing(mirror) => Self::Existing(mirror),
            MirrorChoiceForm::Template(strategy) => Self::Template(Strategy::of(strategy)?),
        })
    }
}

form! {
    LimitsForm of MigrationLimits {
        bandwidth_bytes_per_second: Option<u64>,
        downtime_ms: u64,
        timeout_ms: u64,
        stall_timeout_ms: u64,
        on_timeout: OnTimeout,
        auto_throttle: bool,
        audit_timeout_ms: u64,
    }
}

form! {
    ProgressForm of Progress {
        elapsed_ms: u64,
        setup_ms: u64,
        remaining_ms: Option<u64>,
        expected_downtime_ms: Option<u64>,
        downtime_floor_ms: Option<u64>,
        downtime_ms: Option<f64>,
        verify_ms: Option<f64>,
        total_bytes: u64,
        processed_bytes: u64,
        remaining_bytes: u64,
        pages_sealed: u64,
        pages_shared: u64,
        pages_zero: u64,
        dirty_pages_per_second: u64,
        throughput_bytes_per_second: u64,
        iteration: u32,
        precopy_bytes: u64,
        downtime_bytes: u64,
        helper_errors: u64,
        shared_bytes: Option<u64>,
        status_changes: u64,
        throttle_percent: u8,
    }
}

form! {
    RoundForm of Round {
        number: u32,
        pages_sealed: u64,
        pages_shared: u64,
        pages_zero: u64,
        bytes: u64,
        duration_us: u64,
        dirtied_pages: u64,
        paused: bool,
    }
}

form! {
    AuditForm of Audit {
        state: AuditState,
        compared_pages: u64,
        left_out_pages: u64,
        cpu_us: u64,
    }
}

/// The form of an [`AuditState`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum AuditStateForm {
    Pending {},
    Proven {},
    Mismatch { pages: u64, first: Vec<u64> },
    NotRun { why: NotRunForm },
}

impl Part for AuditState {
    type Form = AuditStateForm;

    fn form(&self) -> AuditStateForm {
        match self {
            Self::Pending => AuditStateForm::Pending {},
            Self::Proven => AuditStateForm::Proven {},
            Self::Mismatch { pages, first } => {
                AuditStateForm::Mismatch { pages: *pages, first: first.clone() }
            }
            Self::NotRun { why } => AuditStateForm::NotRun { why: why.form() },
        }
    }

    fn of(form: AuditStateForm) -> Result<Self, Wrong> {
        Ok(match form {
            AuditStateForm::Pending {} => Self::Pending,
            AuditStateForm::Proven {} => Self::Proven,
            AuditStateForm::Mismatch { pages, first } => Self::Mismatch { pages, first },
            AuditStateForm::NotRun { why } => Self::NotRun { why: NotRun::of(why)? },
        })
    }
}

/// The form of an [`Evidence`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EvidenceForm {
    NotDemanded {},
    Verified { launch_digest: [u8; 32], platform: [u8; 32] },
}

impl Part for Evidence {
    type Form = EvidenceForm;

    fn form(&self) -> EvidenceForm {
        match *self {
            Self::NotDemanded => EvidenceForm::NotDemanded {},
            Self::Verified { launch_digest, platform } => EvidenceForm::Verified { launch_digest, platform },
        }
    }

    fn of(form: EvidenceForm) -> Result<Self, Wrong> {
        Ok(match form {
            EvidenceForm::NotDemanded {} => Self::NotDemanded,
            EvidenceForm::Verified { launch_digest, platform } => Self::Verified { launch_digest, platform },
        })
    }
}

words! {
    NotRunForm of NotRun {
        Timeout = "timeout",
        PeerLost = "peer_lost",
        PeerVersion = "peer_version",
        NoRoom = "no_room",
        HelperFailed = "helper_failed",
        MemoryNeeded = "memory_needed",
        MirrorNeeded = "mirror_needed",
        GuestStopped = "guest_stopped",
        ShuttingDown = "shutting_down",
        HostRestarted = "host_restarted",
    }
}

words! {
    AuditModeForm of AuditMode {
        After = "after",
        BeforeCommit = "before_commit",
        Never = "never",
    }
}

form! {
    WorkerForm of WorkerInfo {
        tid: u32,
        exits: u64,
        cpu_ns: u64,
    }
}

form! {
    ResolutionForm of Resolution {
        outcome: HandOverOutcome,
        reason: String,
        at: Timestamp,
    }
}

words! {
    OutcomeForm of HandOverOutcome {
        Committed = "committed",
        NeverCommitted = "never_committed",
    }
}

words! {
    DirectionForm of MigrationDirection {
        Outgoing = "outgoing",
        Incoming = "incoming",
    }
}

words! {
    MigrationStateForm of MigrationState {
        Queued = "queued",
        Preparing = "preparing",
        Precopy = "precopy",
        Switchover = "switchover",
        Finishing = "finishing",
        Succeeded = "succeeded",
        Failed = "failed",
        Canceled = "canceled",
        InDoubt = "in_doubt",
    }
}

words! {
    ModeForm of MigrationMode {
        Precopy = "precopy",
        StopAndCopy = "stop_and_copy",
    }
}

words! {
    OnTimeoutForm of OnTimeout {
        Cancel = "cancel",
        Force = "force",
        Throttle = "throttle",
    }
}

words! {
    TransportForm of StreamTransport {
        Sealed = "sealed",
        Tls = "tls",
    }
}

words! {
    SuiteForm of Suite {
        Aes256Gcm = "aes-256-gcm",
        Aes256GcmSiv = "aes-256-gcm-siv",
    }
}

words! {
    SourceAfterForm of SourceAfter {
        KeepStopped = "keep_stopped",
        Delete = "delete",
    }
}
