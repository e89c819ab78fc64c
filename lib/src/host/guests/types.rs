//! A guest as values: what a caller wants it to be, how it is, what of it can be seen. Domain types; the REST
//! wire has its own.

use jiff::Timestamp;
use uuid::Uuid;

use crate::address_space::{BlockSpec, GuestLayout, RamBlock};
use crate::boot_files::BootFiles;
use crate::guest::Readiness;
use crate::guest::drivers::Definition;
pub use crate::guest::lifecycle::GuestState;
pub use crate::guest::{
    AccelChoice, DriverSpec, Drivers, EmbeddedDriver, EmulatedDriver, Fill, Labels, LaunchMirror,
    MissingCapability, ProtectionLevel, QemuDriver, QemuGuest, SevSpec, WorkloadGuest, WorkloadSpec,
};
use crate::host::faults::Fault;
use crate::memory::Backing;
use crate::migration::terms::Audit;

/// What a caller wants a guest to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// Name, unique on the host: 1 to 64 of `[A-Za-z0-9._-]`, starting alphanumeric, not shaped like a UUID.
    pub name: String,
    /// How it runs.
    pub driver: DriverSpec,
    /// Its RAM blocks.
    pub blocks: Vec<BlockSpec>,
    /// What RAM lies on; `None`: the fastest that the host has for the driver. Another host may choose
    /// another.
    pub backing: Option<Backing>,
    /// Free labels.
    pub labels: Labels,
}

impl GuestSpec {
    /// What of it is its driver's to judge.
    pub(in crate::host) fn definition(&self) -> Definition<'_> {
        Definition { spec: &self.driver, blocks: &self.blocks, backing: self.backing }
    }
}

/// A guest as the host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    pub boot: Option<BootFiles>,
    /// What the guest says of being migrated; `None` while it has no machine. Live: not stored.
    pub readiness: Option<Readiness>,
    /// The migration that has it now.
    pub migration: Option<Uuid>,
    /// The host that it was handed over to, after a migration that kept it here as stopped.
    pub moved_to: Option<String>,
    /// Whether the host's state may be older than what its peers know of the guest: it does not start before
    /// they were asked.
    pub unconfirmed: bool,
    /// The audit of the migration that brought it here, or took it away.
    pub audit: Option<GuestAudit>,
    /// Why it failed, or what ended it without having been asked for here.
    pub error: Option<Fault>,
    /// When it was defined, on whichever host that was.
    pub created_at: Timestamp,
    /// When it last began to run here.
    pub started_at: Option<Timestamp>,
}

impl GuestRecord {
    /// A guest as it is when it has just been defined: stopped, and never anything else.
    pub(in crate::host) fn defined(
        id: Uuid,
        spec: GuestSpec,
        layout: GuestLayout,
        protection: ProtectionLevel,
        boot: Option<BootFiles>,
    ) -> Self {
        Self {
            id,
            spec,
            layout,
            state: GuestState::Stopped,
            generation: 1,
            protection,
            boot,
            readiness: None,
            migration: None,
            moved_to: None,
            unconfirmed: false,
            audit: None,
            error: None,
            created_at: Timestamp::now(),
            started_at: None,
        }
    }
}

/// What is known of whether a guest's pages crossed as they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestAudit {
    /// The migration.
    pub migration: Uuid,
    /// What became of its audit.
    pub audit: Audit,
}

/// What is done to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAction {
    /// `stopped` to `running`.
    Start,
    /// `running` to `paused`.
    Pause,
    /// `paused` to `running`.
    Resume,
    /// To `stopped`; memory is gone.
    Stop,
    /// Makes an unconfirmed guest this host's, whatever its peers would have said.
    Confirm,
}

/// A guest's counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestStats {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Since it last began to run here; `None` when it has no machine.
    pub uptime_ms: Option<u64>,
    /// Bytes that it ever printed.
    pub console_bytes: u64,
    /// Bytes of its RAM.
    pub total_bytes: u64,
    /// Of these, bytes whose pages it shares with the host; `None` when it has no machine.
    pub shared_bytes: Option<u64>,
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
    pub block: RamBlock,
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
