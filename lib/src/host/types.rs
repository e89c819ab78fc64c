//! What a host manages, as values: guests, mirrors, migrations, peers. Domain types; the REST wire has its
//! own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::address_space::{BlockSpec, GuestLayout, HostLimits, MirrorPlan, Strategy};
use crate::boot_files::BootFiles;
use crate::guest::Readiness;
pub use crate::guest::lifecycle::GuestState;
use crate::memory::Backing;
use crate::mirror::Placement;
use crate::qemu::QemuUsers;
use crate::sev::Policy;
use crate::store::Writing;
use crate::transport::Endpoint;

/// Labels of a resource: at most 64, keys 1 to 63 and values 0 to 255 bytes.
pub type Labels = BTreeMap<String, String>;

/// What a caller wants a guest to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Name, unique on the host: 1 to 64 of `[A-Za-z0-9._-]`, starting alphanumeric, not shaped like a UUID.
    pub name: String,
    /// How it runs.
    pub driver: DriverSpec,
    /// Its RAM blocks.
    pub blocks: Vec<BlockSpec>,
    /// What RAM lies on; `None`: the fastest that the host has for the driver. Another host may choose
    /// another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// Free labels.
    pub labels: Labels,
}

/// How a guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DriverSpec {
    /// This process is the VMM, on `/dev/kvm`; the guest is the built-in workload.
    Embedded {
        /// 1 to 16.
        vcpus: u32,
        /// What the workload does.
        workload: WorkloadSpec,
        /// Encrypts its memory, on a host with SEV.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sev: Option<SevSpec>,
    },
    /// A software machine with a model of SEV; needs no `/dev/kvm`. The guest is the built-in workload.
    Emulated {
        /// 1 to 16.
        vcpus: u32,
        /// What the workload does.
        workload: WorkloadSpec,
        /// Encrypts its memory under the model of SEV; `None`: not encrypted.
        sev: Option<SevSpec>,
    },
    /// A QEMU process that boots a Linux kernel. One RAM block, at GPA 0, whole MiB.
    Qemu {
        /// 1 to 16.
        vcpus: u32,
        /// Kernel image, a path on the host.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        append: String,
        /// Accelerator.
        accel: AccelChoice,
    },
}

impl DriverSpec {
    /// The API's name.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embedded { .. } => "embedded",
            Self::Emulated { .. } => "emulated",
            Self::Qemu { .. } => "qemu",
        }
    }

    /// Virtual CPUs.
    pub const fn vcpus(&self) -> u32 {
        match self {
            Self::Embedded { vcpus, .. } | Self::Emulated { vcpus, .. } | Self::Qemu { vcpus, .. } => *vcpus,
        }
    }

    /// Whether its machine can hold back its vCPUs, as [`crate::guest::Machine::can_throttle`] says of a
    /// machine that is there.
    pub const fn can_throttle(&self) -> bool {
        match self {
            Self::Embedded { .. } | Self::Emulated { .. } => true,
            Self::Qemu { .. } => false,
        }
    }

    /// How its memory is encrypted.
    pub const fn sev(&self) -> Option<&SevSpec> {
        match self {
            Self::Embedded { sev, .. } | Self::Emulated { sev, .. } => sev.as_ref(),
            Self::Qemu { .. } => None,
        }
    }

    /// What protects a guest of this driver.
    pub const fn protection(&self) -> ProtectionLevel {
        match self {
            Self::Emulated { sev: Some(_), .. } => ProtectionLevel::Modelled,
            Self::Embedded { sev: Some(SevSpec { es: true, .. }), .. } => ProtectionLevel::SevEs,
            Self::Embedded { sev: Some(_), .. } => ProtectionLevel::Sev,
            Self::Embedded { .. } | Self::Emulated { .. } | Self::Qemu { .. } => ProtectionLevel::None,
        }
    }
}

/// How a guest's memory is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SevSpec {
    /// The policy, in force for the guest's life; [`SevSpec::DEFAULT_POLICY`] when nothing else was asked
    /// for.
    pub policy: Policy,
    /// Whether vCPU registers are encrypted too (SEV-ES).
    pub es: bool,
    /// SEV-ES: the mirror that is made with the guest. Its vCPUs' save areas have to be measured before the
    /// launch ends, so that there is no other later.
    pub mirror: LaunchMirror,
}

impl SevSpec {
    /// Policy of a guest that asks for none: not debuggable. A guest without NODBG can be read through its
    /// mirror.
    pub const DEFAULT_POLICY: u32 = Policy::NODBG;
}

/// The mirror that an SEV-ES guest is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchMirror {
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Mirror vCPUs, 1 to 16.
    pub workers: u32,
}

/// What fills a workload guest's RAM before it starts to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Incompressible data.
    Random,
    /// Nothing: pages that the guest never writes stay zero.
    Zero,
}

/// What the built-in workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Initial content of RAM.
    pub fill: Fill,
    /// Bytes that are rewritten over and over, a multiple of 4 KiB; at most half of the RAM.
    pub working_set_bytes: u64,
    /// How fast they are rewritten, in bytes per second. 0: counter and console only.
    pub dirty_bytes_per_second: u64,
    /// Milliseconds after which the guest clears MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes
    /// offline; `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdraws_readiness_after_ms: Option<u64>,
}

/// Which accelerator a QEMU guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccelChoice {
    /// KVM where a stock guest can run under it, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// What the hardware gives a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProtectionLevel {
    /// Nothing: the host can read and write the guest's memory. Sealing protects the pages on the way.
    None,
    /// A model of SEV in software: memory is ciphertext, and the host holds the keys. It shows what SEV does,
    /// and protects nothing.
    Modelled,
    /// SEV: memory is encrypted; registers are not, and an active host can remap memory.
    Sev,
    /// SEV-ES: memory and registers are encrypted; an active host can remap memory.
    SevEs,
}

impl ProtectionLevel {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Modelled => "modelled",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
        }
    }
}

/// Why a resource is in a failed state, or what ended it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Stable code, `snake_case`.
    pub code: String,
    /// A sentence for people; never host paths, addresses of this process or key material.
    pub detail: String,
}

/// A guest as the host knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// What was asked for.
    pub spec: GuestSpec,
    /// RAM blocks with their addresses, the helper's block included.
    pub layout: GuestLayout,
    /// Now.
    pub state: GuestState,
    /// Goes up with every change.
    pub generation: u64,
    /// What the hardware gives it.
    pub protection: ProtectionLevel,
    /// What it boots from, where its driver reads files of the host; guests of earlier versions have none.
    #[serde(default)]
    pub boot: Option<BootFiles>,
    /// What the guest says of being migrated; `None` while it has no machine. Live: not stored.
    #[serde(skip)]
    pub readiness: Option<Readiness>,
    /// The migration that has it now.
    pub migration: Option<Uuid>,
    /// The host that it was handed over to, after a migration that kept it here as stopped.
    pub moved_to: Option<String>,
    /// Whether the host's state may be older than what its peers know of the guest: it does not start before
    /// they were asked.
    #[serde(default)]
    pub unconfirmed: bool,
    /// Why it failed, or what ended it without having been asked for here.
    pub error: Option<Fault>,
    /// When it was defined, on whichever host that was.
    pub created_at: Timestamp,
    /// When it last began to run here.
    pub started_at: Option<Timestamp>,
}

/// A piece of console output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleChunk {
    /// Offset of the first byte of `data` in everything that the guest ever printed. Above the offset asked
    /// for when older output is no longer kept.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
    /// Offset after the newest byte there is.
    pub end: u64,
}

/// One RAM block with what is known of its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlockInfo {
    /// The block.
    pub block: crate::address_space::RamBlock,
    /// What it lies on; of a guest without a machine, what the host would choose now.
    pub backing: Backing,
    /// Bytes of the largest pages that the host gives such memory.
    pub page_size: u64,
    /// Bytes whose pages are private.
    pub private_bytes: u64,
    /// Bytes whose pages the guest shares with the host.
    pub shared_bytes: u64,
    /// Bytes of unknown status (the guest is not running).
    pub unknown_bytes: u64,
}

/// What a caller wants a mirror to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// The guest, by id or name.
    pub guest: String,
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Mirror vCPUs, 1 to 16.
    pub workers: u32,
    /// The rest.
    pub options: MirrorOptions,
}

/// What a caller may leave out of a mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MirrorOptions {
    /// Where its vCPU threads run.
    pub placement: Placement,
    /// The helper image, by id or name; `None`: the built-in one.
    pub helper_image: Option<String>,
}

/// A mirror's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorState {
    /// Being made.
    Creating,
    /// The helper waits for work.
    Ready,
    /// A migration has it.
    Busy,
    /// The helper or its vCPU broke down.
    Failed,
}

impl MirrorState {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Failed => "failed",
        }
    }
}

/// One mirror vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Kernel thread id, from our own thread.
    pub tid: u32,
    /// Times it left the guest mode since it was made.
    pub exits: u64,
    /// CPU time of its thread, nanoseconds.
    pub cpu_ns: u64,
}

/// A mirror as the host knows it.
#[derive(Clone, Debug)]
pub struct MirrorRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// Its guest.
    pub guest: Uuid,
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Now.
    pub state: MirrorState,
    /// Goes up with every change.
    pub generation: u64,
    /// The executed plan.
    pub plan: std::sync::Arc<MirrorPlan>,
    /// Its vCPUs.
    pub workers: Vec<WorkerInfo>,
    /// Where its vCPU threads run.
    pub placement: Placement,
    /// SHA-256 of the helper image.
    pub helper_measurement: [u8; 32],
    /// Why it failed.
    pub error: Option<Fault>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Microseconds from the request to the helper's first idle doorbell.
    pub ready_after_us: u64,
}

/// Where a migration goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// A known peer, by id or name.
    Host(String),
    /// A host that gave a ticket for one migration: its text.
    Ticket(String),
}

/// How memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationMode {
    /// In rounds while the guest runs.
    Precopy,
    /// In one go while it is paused.
    StopAndCopy,
}

/// The mirror that a migration uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MirrorChoice {
    /// One that exists.
    Existing(Uuid),
    /// One that is made for the migration and removed after it.
    Template(Strategy),
}

/// What happens to the source's guest after success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceAfter {
    /// It stays defined, as `stopped` with `moved_to`.
    KeepStopped,
    /// It is removed.
    Delete,
}

/// What happens when a migration has not come to its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is given up as `not_converging`; the guest goes on here.
    #[default]
    Cancel,
    /// The guest is paused and the rest is sent, however long that takes.
    Force,
    /// The guest's vCPUs are held back step by step until it converges; given up when even that does not
    /// help.
    Throttle,
}

/// How the streams of sealed pages cross between hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamTransport {
    /// As they are, once mutual TLS has shown both ends who the other is: records are sealed helper to
    /// helper, and their headers are masked. Control messages and pages that the guest shares stay inside
    /// TLS.
    #[default]
    Sealed,
    /// Inside TLS as well: everything is encrypted twice.
    Tls,
}

/// Limits of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationLimits {
    /// Bytes of page content per second over all streams; `None`: as fast as it goes.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause of a live migration, milliseconds. Kept up to START, with a tolerance of a tenth and at
    /// least 5 ms; what the destination takes beyond the prediction from there on comes on top.
    pub downtime_ms: u64,
    /// Longest time from the first page to the switchover, milliseconds.
    pub timeout_ms: u64,
    /// Longest silence of the peer, milliseconds.
    pub stall_timeout_ms: u64,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// Whether the guest's vCPUs are held back, step by step, as soon as rounds do not shrink.
    pub auto_throttle: bool,
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_second: None,
            downtime_ms: 300,
            timeout_ms: 3_600_000,
            stall_timeout_ms: 30_000,
            on_timeout: OnTimeout::Cancel,
            auto_throttle: false,
        }
    }
}

/// What a caller wants moved, where and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationSpec {
    /// The guest, by id or name.
    pub guest: String,
    /// Where to.
    pub destination: Destination,
    /// How.
    pub mode: MigrationMode,
    /// Through which mirror.
    pub mirror: MirrorChoice,
    /// More of the mirror that is made for the migration.
    #[serde(default)]
    pub template: MirrorOptions,
    /// Helper workers and connections, 1 to 16.
    pub streams: u16,
    /// How they cross.
    #[serde(default)]
    pub stream_transport: StreamTransport,
    /// Limits.
    pub limits: MigrationLimits,
    /// What becomes of the source's guest.
    pub source_after: SourceAfter,
    /// Whether both hosts digest every page of RAM at the pause point, by a path that does not go through the
    /// helper. Stretches the pause by [`Progress::verify_ms`].
    pub verify: bool,
}

/// A migration's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// Waits for a migration slot of the host.
    Queued,
    /// Mirrors are made, the destination gets ready.
    Preparing,
    /// Pages move while the guest runs.
    Precopy,
    /// The guest is paused; the last pages and its state move.
    Switchover,
    /// START is out; the destination's answer is awaited.
    Finishing,
    /// The guest runs at the destination.
    Succeeded,
    /// It did not work; the guest is where it was.
    Failed,
    /// Called off; the guest is where it was.
    Canceled,
    /// START is out and no token settles what became of it.
    InDoubt,
}

impl MigrationState {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::Finishing => "finishing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
            Self::InDoubt => "in_doubt",
        }
    }

    /// Whether nothing more will happen.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Canceled)
    }
}

/// Which side of a migration a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationDirection {
    /// The guest leaves this host.
    Outgoing,
    /// It arrives here.
    Incoming,
}

/// One pass over memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// Pages sent sealed, marks for zero pages included.
    pub pages_sealed: u64,
    /// Pages sent as they are, because the guest shares them with its host.
    pub pages_shared: u64,
    /// Of these, pages that are all zero: a sealed mark crossed, no content.
    pub pages_zero: u64,
    /// Bytes of page content that crossed.
    pub bytes: u64,
    /// Duration, microseconds.
    pub duration_us: u64,
    /// Pages that the guest dirtied meanwhile; 0 for the last round.
    pub dirtied_pages: u64,
    /// Whether the guest was paused.
    pub paused: bool,
}

/// How far a migration is; kept after its end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, Default)]
pub struct Progress {
    /// Since the request, milliseconds.
    pub elapsed_ms: u64,
    /// Until the first page, milliseconds.
    pub setup_ms: u64,
    /// Estimate to the end; `None`: unknown.
    pub remaining_ms: Option<u64>,
    /// Pause that the next switchover would cost, milliseconds.
    pub expected_downtime_ms: Option<u64>,
    /// The shortest pause that can be had, whatever the number of pages, milliseconds; `None`: not known yet.
    /// A limit below it is never met.
    #[serde(default)]
    pub downtime_floor_ms: Option<u64>,
    /// The pause as measured from the guest's last instruction here to its first there, `verify_ms` taken
    /// off.
    pub downtime_ms: Option<f64>,
    /// Time that verification added to the pause.
    pub verify_ms: Option<f64>,
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes of page content moved so far, all rounds.
    pub processed_bytes: u64,
    /// Bytes of this round still to go.
    pub remaining_bytes: u64,
    /// Pages moved sealed, all rounds, marks for zero pages included.
    pub pages_sealed: u64,
    /// Pages moved unsealed (shared pages), all rounds.
    pub pages_shared: u64,
    /// Of these, pages that are all zero: a sealed mark crossed, no content.
    pub pages_zero: u64,
    /// Pages that the guest dirties per second, over about the last second that was looked at.
    pub dirty_pages_per_second: u64,
    /// Page content per second, all streams, as last measured.
    pub throughput_bytes_per_second: u64,
    /// Round, from 1; 0 before the first.
    pub iteration: u32,
    /// Bytes moved while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes moved while it was paused.
    pub downtime_bytes: u64,
    /// Refusals that the helper answered.
    pub helper_errors: u64,
    /// Bytes whose pages the guest shares with its host, as this host knew last; `None`: nobody has told it
    /// yet.
    #[serde(default)]
    pub shared_bytes: Option<u64>,
    /// Pages that the guest shared or took back while the migration ran, at the source.
    #[serde(default)]
    pub status_changes: u64,
    /// Share of their time that the guest's vCPUs are held, percent.
    #[serde(default)]
    pub throttle_percent: u8,
}

/// A migration as one host knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// UUIDv7, the same at both hosts.
    pub id: Uuid,
    /// Which side this is.
    pub direction: MigrationDirection,
    /// The guest, the same id at both hosts.
    pub guest: Uuid,
    /// The guest's name.
    pub guest_name: String,
    /// The guest's labels when it began.
    #[serde(default)]
    pub labels: Labels,
    /// Name of the other host.
    pub peer: String,
    /// Its identity; empty in records of earlier builds.
    #[serde(default)]
    pub peer_identity: String,
    /// Its place among the migrations of this host: one that began later has a higher one, whatever the clock
    /// said.
    #[serde(default)]
    pub order: u64,
    /// What was asked for; `None` at the destination.
    pub spec: Option<MigrationSpec>,
    /// Layout of the mirror's address space.
    pub strategy: Strategy,
    /// Now.
    pub state: MigrationState,
    /// Goes up with every change.
    pub generation: u64,
    /// How far.
    pub progress: Progress,
    /// Rounds so far.
    pub rounds: Vec<Round>,
    /// The mirror's workers: CPU time and exits for this migration.
    #[serde(default)]
    pub workers: Vec<WorkerInfo>,
    /// Share of the time that the workers used, percent; `None`: there was no mirror yet.
    #[serde(default)]
    pub helper_busy_percent: Option<u8>,
    /// The guest's state here after the end.
    pub guest_state_after: Option<GuestState>,
    /// Why it failed, or is in doubt.
    pub error: Option<Fault>,
    /// When cancelling was asked for; the outcome is `state`.
    pub cancel_requested_at: Option<Timestamp>,
    /// Whether COMMIT is minted and the destination's store does not take it yet.
    #[serde(default)]
    pub committing: bool,
    /// An administrator's word, if it was that which ended a doubt.
    #[serde(default)]
    pub resolution: Option<Resolution>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it left the queue.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// What became of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandOverOutcome {
    /// The guest is the destination's.
    Committed,
    /// It never was, and never will be.
    NeverCommitted,
}

impl HandOverOutcome {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::NeverCommitted => "never_committed",
        }
    }
}

/// An administrator's word on a migration in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// What is taken to be so.
    pub outcome: HandOverOutcome,
    /// How the administrator knows.
    pub reason: String,
    /// When it was said.
    pub at: Timestamp,
}

/// What a destination's helper said of a hand-over, to be carried to the source by hand. Sealed by the
/// helpers' session: of no use to anybody else, and only the source's helper can tell whether it is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandOverToken {
    /// The migration.
    pub session: Uuid,
    /// What the token says.
    pub outcome: HandOverOutcome,
    /// COMMIT or ABORT, sealed.
    pub token: Vec<u8>,
}

/// What ends a doubt that the hosts cannot end between themselves.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The destination's token: the helper checks it.
    Token(HandOverToken),
    /// An administrator's word, which nobody checks.
    Word(Resolution),
}

/// A digest of every page of guest RAM at the pause point of a verified migration: SHA-256, the first
/// 16 bytes, in order of RAM blocks and pages, the helper's block left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageDigests {
    /// One entry a page.
    pub digests: Vec<[u8; 16]>,
}

/// What a caller says of another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerSpec {
    /// Name, unique among peers; shaped as a guest's name.
    pub name: String,
    /// Where its peer listener is.
    pub address: Endpoint,
    /// Its pinned identity: `sha256:` and 64 hex digits over its public key.
    pub identity: String,
    /// Free labels.
    pub labels: Labels,
}

/// A known peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// What was said of it.
    pub spec: PeerSpec,
    /// Goes up with every change.
    pub generation: u64,
    /// When it was added.
    pub created_at: Timestamp,
}

/// Something that this host cannot do, and what would help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingCapability {
    /// Stable code: `kvm`, `sev`, `qemu`, ...
    pub code: &'static str,
    /// Why it is missing.
    pub why: String,
    /// What to do about it.
    pub fix: String,
}

/// What this host can do.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Drivers that work here.
    pub drivers: Vec<&'static str>,
    /// `KVM_GET_API_VERSION`, when `/dev/kvm` opens.
    pub kvm_api_version: Option<i32>,
    /// Named KVM capabilities with what `KVM_CHECK_EXTENSION` says.
    pub kvm_caps: Vec<(&'static str, i32)>,
    /// Limits for address spaces.
    pub limits: HostLimits,
    /// Strategies that this build executes.
    pub strategies: Vec<&'static str>,
    /// Oldest and newest helper ABI.
    pub helper_abi: (u32, u32),
    /// SHA-256 of the built-in helper image.
    pub helper_measurement: [u8; 32],
    /// Versions of the peer protocol.
    pub protocol_versions: Vec<u32>,
    /// Why `accel: auto` picks what it picks, when QEMU is there.
    pub qemu_accel: Option<(&'static str, &'static str)>,
    /// Whom QEMU processes run as; `None`: as the daemon's user.
    pub qemu_users: Option<QemuUsers>,
    /// What is missing.
    pub missing: Vec<MissingCapability>,
}

/// About this host.
#[derive(Clone, Debug)]
pub struct HostInfo {
    /// Made when the state directory was.
    pub id: Uuid,
    /// Name, by default the kernel's node name.
    pub name: String,
    /// Kernel release.
    pub kernel: String,
    /// CPU model.
    pub cpu: String,
    /// Logical CPUs.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// This host's identity on the peer link, as [`PeerSpec::identity`].
    pub identity: String,
    /// Where others are to connect for migrations to it; `None` without a listener, or while that is on all
    /// addresses and none is advertised.
    pub peer_address: Option<Endpoint>,
    /// Where its peer listener is.
    pub peer_listen: Option<SocketAddr>,
    /// Guests by state.
    pub guests: usize,
    /// Mirrors.
    pub mirrors: usize,
    /// Migrations that have not ended.
    pub active_migrations: usize,
    /// Whether its database takes what is to be stored.
    pub storage: Writing,
}
