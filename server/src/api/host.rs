//! The host itself on the wire.

use mirrorvm::host::{Capabilities, HostInfo, HostSettings};
use mirrorvm::store::{Trouble, Writing};
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Preview;
use super::layout::HostLimitsBody;

/// About this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Host {
    /// Made when the state directory was.
    pub id: Uuid,
    /// Name.
    #[schema(example = "a")]
    pub name: String,
    /// Kernel release.
    #[schema(example = "6.12.0")]
    pub kernel: String,
    /// CPU model.
    pub cpu: String,
    /// Logical CPUs.
    pub cpus: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// What `KVM_GET_API_VERSION` says; null when `/dev/kvm` does not open.
    #[schema(example = 12)]
    pub kvm_api_version: Option<i32>,
    /// Limits for address spaces.
    pub limits: HostLimitsBody,
    /// This host's identity on the peer link: what peers pin.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// Where other hosts connect for migrations to this one: what to register there as its `address`. Null:
    /// no incoming migrations, or the peer listener is on all addresses and the daemon was not told
    /// (`advertise`) by which of them others reach it.
    #[schema(example = "192.0.2.1:7801")]
    pub peer_address: Option<String>,
    /// Where its peer listener is; null: no incoming migrations.
    #[schema(example = "0.0.0.0:7801")]
    pub peer_listen: Option<String>,
    /// What it has to do.
    pub load: HostLoad,
    /// Whether its database takes what is to be stored.
    pub storage: HostStorage,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Whether nothing new is taken: no guest is defined, started or let in.
    pub maintenance: bool,
    /// Outgoing migrations that run at once; more wait as `queued`.
    #[schema(example = 4)]
    pub migration_slots: u32,
    /// Goes up with every change of `labels`, `maintenance` and `migration_slots`; the ETag in quotes.
    #[schema(example = 1)]
    pub generation: u64,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What a host has to do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostLoad {
    /// Guests.
    pub guests: u64,
    /// Mirrors.
    pub mirrors: u64,
    /// Migrations that have not ended.
    pub active_migrations: u64,
}

/// A host's database.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostStorage {
    /// `ok`; or what writing has been meeting: `full` (no space is left), `busy` (another process keeps the
    /// database locked), `failed` (the disk).
    #[schema(example = "ok")]
    pub state: &'static str,
    /// For how long writing has been failing.
    pub failing_ms: u64,
    /// Changes that have happened and are kept in memory until they can be written.
    pub owed_changes: u64,
}

impl From<Writing> for HostStorage {
    fn from(writing: Writing) -> Self {
        Self {
            state: match writing.failing.map(|(trouble, _)| trouble) {
                None => "ok",
                Some(Trouble::Full) => "full",
                Some(Trouble::Busy) => "busy",
                Some(Trouble::Failed) => "failed",
            },
            failing_ms: writing.failing.map_or(0, |(_, since)| since.as_millis() as u64),
            owed_changes: writing.owed as u64,
        }
    }
}

impl Host {
    /// From what the library says of the host.
    pub fn new(info: HostInfo, capabilities: &Capabilities, settings: HostSettings) -> Self {
        Self {
            id: info.id,
            name: info.name,
            kernel: info.kernel,
            cpu: info.cpu,
            cpus: info.cpus as u64,
            memory_bytes: info.memory_bytes,
            kvm_api_version: capabilities.kvm_api_version,
            limits: capabilities.limits.into(),
            identity: info.identity,
            peer_address: info.peer_address.map(|a| a.to_string()),
            peer_listen: info.peer_listen.map(|a| a.to_string()),
            load: HostLoad {
                guests: info.guests as u64,
                mirrors: info.mirrors as u64,
                active_migrations: info.active_migrations as u64,
            },
            storage: info.storage.into(),
            labels: settings.labels,
            maintenance: settings.maintenance,
            migration_slots: settings.migration_slots,
            generation: settings.generation,
            preview: None,
        }
    }
}
