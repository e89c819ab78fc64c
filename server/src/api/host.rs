//! The host itself on the wire.

use mirrorvm::guest::Hex;
use mirrorvm::host::{Capabilities, HostInfo, HostPlatformKey, HostSettings};
use mirrorvm::memory::SecretMemory;
use mirrorvm::sev::key_fingerprint;
use mirrorvm::store::{Trouble, Writing};
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Preview;
use super::layout::HostLimitsBody;
use crate::confine::{Confinement, Force};

/// The host that this daemon runs on.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Host {
    /// Id of the host, made together with its state directory.
    pub id: Uuid,
    /// Name of the host.
    #[schema(example = "a")]
    pub name: String,
    /// Release of the running kernel.
    #[schema(example = "6.12.0")]
    pub kernel: String,
    /// Model of the processor.
    pub cpu: String,
    /// Number of logical processors.
    pub cpus: u64,
    /// Size of the host's memory in bytes.
    pub memory_bytes: u64,
    /// The answer to `KVM_GET_API_VERSION`. Null when `/dev/kvm` does not open.
    #[schema(example = 12)]
    pub kvm_api_version: Option<i32>,
    /// What this host allows an address space to look like.
    pub limits: HostLimitsBody,
    /// The digest of this host's public key, which peers pin.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// The key that stands for the host's security processor. Null when it shows no certificates.
    pub platform_key: Option<PlatformKey>,
    /// Where other hosts connect to migrate guests here: the `address` to register there. Null when no
    /// migrations are let in, or when the peer listener is on all addresses and the daemon was not told
    /// (`advertise`) by which of them others reach it.
    #[schema(example = "192.0.2.1:7801")]
    pub peer_address: Option<String>,
    /// The address on which the peer listener is. Null when no migrations are let in.
    #[schema(example = "0.0.0.0:7801")]
    pub peer_listen: Option<String>,
    /// How much the host has to do.
    pub load: HostLoad,
    /// Whether the host's database accepts writes.
    pub storage: HostStorage,
    /// What the daemon is confined by.
    pub confinement: HostConfinement,
    /// Labels of your choice.
    pub labels: BTreeMap<String, String>,
    /// Whether the host is in maintenance: no guest can be defined or started, and no migration is let in.
    pub maintenance: bool,
    /// How many outgoing migrations run at once. Further ones wait as `queued`.
    #[schema(example = 4)]
    pub migration_slots: u32,
    /// Rises with every change of `labels`, `maintenance` and `migration_slots`. The `ETag` header has it in
    /// quotes.
    #[schema(example = 1)]
    pub generation: u64,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// The key that stands for a host's security processor: on SEV the chip's own (CEK), which its owner checks
/// against AMD's certificates before he trusts it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PlatformKey {
    /// Whether it is that of the model, which every host without SEV has and anybody can use.
    pub modelled: bool,
    /// The public key on P-384, x and y: what a guest's `sev.attestation.platforms` names.
    #[schema(pattern = "^[0-9a-f]{192}$")]
    pub key: String,
    /// SHA-256 of the key.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub fingerprint: String,
}

impl From<HostPlatformKey> for PlatformKey {
    fn from(of: HostPlatformKey) -> Self {
        let fingerprint = format!("sha256:{}", key_fingerprint(&of.key));
        Self { modelled: of.modelled, key: Hex(of.key).to_string(), fingerprint }
    }
}

/// How much a host has to do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostLoad {
    /// Number of guests.
    pub guests: u64,
    /// Number of mirrors.
    pub mirrors: u64,
    /// Number of migrations that have not ended.
    pub active_migrations: u64,
}

/// Whether a host's database accepts writes.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostStorage {
    /// `ok`, or why writes fail: `full` (no space is left), `busy` (another process keeps the database
    /// locked) or `failed` (the disk).
    #[schema(example = "ok")]
    pub state: &'static str,
    /// For how many milliseconds writes have been failing.
    pub failing_ms: u64,
    /// How many changes have happened that are kept in memory until they can be written.
    pub owed_changes: u64,
}

/// What the daemon is confined by: what a fault in it, or somebody who takes it over, cannot do. QEMU's
/// processes have confinements of their own.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostConfinement {
    /// What the configuration asks for: `enforce`, `log` or `none`.
    #[schema(example = "enforce")]
    pub mode: &'static str,
    /// System calls, by what a thread is for.
    pub seccomp: HostForce,
    /// Files, and ports to listen on.
    pub landlock: HostForce,
    /// Version of Landlock's interface in this kernel. Null when it has none, or when nobody asked.
    #[schema(example = 6)]
    pub landlock_abi: Option<i32>,
    /// What a daemon of root's keeps of root's powers.
    pub capabilities: HostForce,
    /// The capabilities that were kept.
    #[schema(example = json!(["CAP_IPC_LOCK", "CAP_SYS_NICE"]))]
    pub capabilities_kept: Vec<&'static str>,
    /// Whether secrets lie in memory that is never written to swap space.
    pub secrets_locked: HostForce,
}

/// How much of one of the means is in force.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostForce {
    /// `enforced`; `partial`, as much as the kernel can; `logged`; `off`, by the configuration; or
    /// `unavailable`.
    #[schema(example = "enforced")]
    pub state: &'static str,
    /// What is missing, and why. Null unless it is `partial` or `unavailable`.
    pub why: Option<String>,
}

impl From<Force> for HostForce {
    fn from(force: Force) -> Self {
        let (state, why) = match force {
            Force::Enforced => ("enforced", None),
            Force::Partial(why) => ("partial", Some(why)),
            Force::Logged => ("logged", None),
            Force::Off => ("off", None),
            Force::Unavailable(why) => ("unavailable", Some(why)),
        };
        Self { state, why }
    }
}

impl From<SecretMemory> for HostForce {
    fn from(memory: SecretMemory) -> Self {
        match memory {
            SecretMemory::Locked => Force::Enforced.into(),
            SecretMemory::Unlocked(why) => Force::Partial(why).into(),
        }
    }
}

impl From<Confinement> for HostConfinement {
    fn from(confinement: Confinement) -> Self {
        Self {
            mode: confinement.mode.name(),
            secrets_locked: confinement.secrets().into(),
            seccomp: confinement.seccomp.into(),
            landlock: confinement.landlock.into(),
            landlock_abi: confinement.landlock_abi,
            capabilities: confinement.capabilities.into(),
            capabilities_kept: confinement.kept,
        }
    }
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
    /// Combines what the library tells of the host with its capabilities and settings.
    pub fn new(
        info: HostInfo,
        capabilities: &Capabilities,
        settings: HostSettings,
        confinement: Confinement,
    ) -> Self {
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
            platform_key: info.platform_key.map(PlatformKey::from),
            peer_address: info.peer_address.map(|a| a.to_string()),
            peer_listen: info.peer_listen.map(|a| a.to_string()),
            load: HostLoad {
                guests: info.guests as u64,
                mirrors: info.mirrors as u64,
                active_migrations: info.active_migrations as u64,
            },
            storage: info.storage.into(),
            confinement: confinement.into(),
            labels: settings.labels,
            maintenance: settings.maintenance,
            migration_slots: settings.migration_slots,
            generation: settings.generation,
            preview: None,
        }
    }
}
