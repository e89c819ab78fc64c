//! What the host can do, on the wire.

use std::collections::BTreeMap;

use mirrorvm::guest::Promise;
use mirrorvm::host::{Capabilities, MissingCapability, ProtectionLevel};
use serde::Serialize;
use utoipa::ToSchema;

use super::sha256_text;
use super::strategies::StrategyInfo;

/// What this host can do, and what it lacks.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostCapabilities {
    /// The drivers that work on this host.
    #[schema(value_type = Vec<String>, example = json!(["embedded", "qemu"]))]
    pub drivers: Vec<&'static str>,
    /// What KVM offers here.
    pub kvm: KvmCapabilities,
    /// How many physical address bits guests have.
    #[schema(example = 48)]
    pub max_phys_bits: u8,
    /// Bit position of the C-bit, which marks encrypted pages. Null without SEV.
    pub c_bit_position: Option<u8>,
    /// How many physical address bits memory encryption takes away.
    pub phys_bit_reduction: u8,
    /// How many memory slots one VM may have.
    pub slot_budget: u32,
    /// Whether the page tables of a guest may use 1 GiB pages.
    pub gib_pages: bool,
    /// All strategies, whether available here or not.
    pub strategies: Vec<StrategyAvailability>,
    /// The range of helper ABI versions that this host runs.
    pub helper_abi: HelperAbiRange,
    /// SHA-256 of the built-in helper image.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// The suites that the built-in helper seals pages by. The first is the default.
    #[schema(example = json!(["aes-256-gcm", "aes-256-gcm-siv"]))]
    pub suites: Vec<&'static str>,
    /// What a guest's protection level promises, for each level that there is.
    pub protection_levels: Vec<ProtectionLevelInfo>,
    /// The versions of the peer protocol that this host speaks.
    pub protocol_versions: Vec<u32>,
    /// How `qemu` guests would run with `accel: auto`. Null when QEMU is not installed.
    pub qemu: Option<QemuCapability>,
    /// What this host lacks, and what would help.
    pub missing: Vec<Missing>,
}

/// What KVM offers on a host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KvmCapabilities {
    /// Whether the daemon can open `/dev/kvm`.
    pub available: bool,
    /// The answer to `KVM_GET_API_VERSION`. Null when `/dev/kvm` does not open.
    #[schema(example = 12)]
    pub api_version: Option<i32>,
    /// KVM's capabilities by name, with the answer to `KVM_CHECK_EXTENSION`.
    #[schema(value_type = BTreeMap<String, i32>)]
    pub capabilities: BTreeMap<&'static str, i32>,
}

/// Whether this host can execute a strategy.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyAvailability {
    /// Name of the strategy.
    #[schema(example = "shifted")]
    pub kind: &'static str,
    /// Whether this host can execute the strategy.
    pub available: bool,
    /// Why the strategy is not available. Null when it is.
    pub unavailable_reason: Option<&'static str>,
}

/// What holds for guests at a protection level, and what does not: the rows of the project's SECURITY.md that
/// depend on the hardware.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProtectionLevelInfo {
    /// The level, as in a guest's `protection`.
    #[schema(example = "sev")]
    pub level: &'static str,
    /// Promises that are kept, by name. More may be added.
    #[schema(example = json!(["memory_hidden_from_passive_host", "pages_authenticated"]))]
    pub kept: Vec<&'static str>,
    /// Promises that are not, by name.
    #[schema(example = json!(["memory_hidden_from_active_host", "memory_integrity"]))]
    pub withdrawn: Vec<&'static str>,
}

impl From<ProtectionLevel> for ProtectionLevelInfo {
    fn from(level: ProtectionLevel) -> Self {
        let (kept, withdrawn): (Vec<Promise>, _) = Promise::ALL.iter().partition(|p| level.keeps(**p));
        let names = |list: Vec<Promise>| list.into_iter().map(Promise::name).collect();
        Self { level: level.name(), kept: names(kept), withdrawn: names(withdrawn) }
    }
}

/// A range of helper ABI versions.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperAbiRange {
    /// Oldest version.
    pub min: u32,
    /// Newest version.
    pub max: u32,
}

/// How QEMU guests run on this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct QemuCapability {
    /// The accelerator that `accel: auto` picks: `kvm` or `tcg`.
    #[schema(example = "tcg")]
    pub accel: &'static str,
    /// Why `auto` picks that accelerator.
    pub reason: &'static str,
    /// The unprivileged users that QEMU processes run as, each guest's as one of its own. Null: all of them
    /// run as the daemon's user, which is not root.
    pub users: Option<QemuUserRange>,
}

/// A range of user ids, both ends included.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct QemuUserRange {
    /// First user id.
    #[schema(example = 65_520)]
    pub first: u32,
    /// Last user id.
    #[schema(example = 65_533)]
    pub last: u32,
}

/// Something that this host cannot do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Missing {
    /// A stable code. The list is open: new codes may be added.
    #[schema(example = "sev")]
    pub code: &'static str,
    /// Why it is missing.
    pub why: String,
    /// What would make it work.
    pub fix: String,
}

impl From<MissingCapability> for Missing {
    fn from(missing: MissingCapability) -> Self {
        Self { code: missing.what.code(), why: missing.why, fix: missing.fix }
    }
}

impl From<Capabilities> for HostCapabilities {
    fn from(c: Capabilities) -> Self {
        let users = c.process_users.map(|users| {
            let (first, last) = users.range();
            QemuUserRange { first, last }
        });
        Self {
            strategies: StrategyInfo::all(&c)
                .into_iter()
                .map(|s| StrategyAvailability {
                    kind: s.kind,
                    available: s.available,
                    unavailable_reason: s.unavailable_reason,
                })
                .collect(),
            drivers: c.drivers,
            kvm: KvmCapabilities {
                available: c.kvm_api_version.is_some(),
                api_version: c.kvm_api_version,
                capabilities: c.kvm_caps.into_iter().collect(),
            },
            max_phys_bits: c.limits.max_phys_bits,
            c_bit_position: c.limits.c_bit,
            phys_bit_reduction: c.limits.phys_bit_reduction,
            slot_budget: c.limits.slot_budget,
            gib_pages: c.limits.gib_pages,
            helper_abi: HelperAbiRange { min: c.helper_abi.0, max: c.helper_abi.1 },
            helper_measurement: sha256_text(&c.helper_measurement),
            suites: c.suites,
            protection_levels: ProtectionLevel::ALL.iter().copied().map(Into::into).collect(),
            protocol_versions: c.protocol_versions,
            qemu: c.accelerator.map(|(accel, reason)| QemuCapability { accel, reason, users }),
            missing: c.missing.into_iter().map(Missing::from).collect(),
        }
    }
}
