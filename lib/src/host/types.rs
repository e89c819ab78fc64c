//! What a host manages, as values: guests, mirrors, migrations, peers. Domain types; the REST wire has its
//! own.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::address_space::{BlockSpec, GuestLayout, HostLimits, MirrorPlan, Strategy};
use crate::boot_files::BootFiles;
use crate::guest::Readiness;
pub use crate::guest::driver::{
    AccelChoice, DriverSpec, Fill, Labels, LaunchMirror, ProtectionLevel, SevSpec, WorkloadSpec,
};
pub use crate::guest::lifecycle::GuestState;
use crate::memory::Backing;
pub use crate::migration::terms::{
    MigrationLimits, MigrationMode, MigrationState, OnTimeout, Progress, Round, StreamTransport,
};
use crate::mirror::Placement;
use crate::qemu::QemuUsers;
use crate::store::Writing;
use crate::transport::Endpoint;

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

/// Which side of a migration a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationDirection {
    /// The guest leaves this host.
    Outgoing,
    /// It arrives here.
    Incoming,
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
