//! What the host can do, on the wire.

use std::collections::BTreeMap;

use mirrorvm::host::{Capabilities, MissingCapability};
use serde::Serialize;
use utoipa::ToSchema;

use super::sha256_text;
use super::strategies::StrategyInfo;

/// What this host can do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostCapabilities {
    /// Drivers that work here.
    #[schema(value_type = Vec<String>, example = json!(["embedded", "qemu"]))]
    pub drivers: Vec<&'static str>,
    /// KVM.
    pub kvm: KvmCapabilities,
    /// Physical address bits.
    #[schema(example = 48)]
    pub max_phys_bits: u8,
    /// Position of the C-bit; null without SEV.
    pub c_bit_position: Option<u8>,
    /// Physical address bits lost to memory encryption.
    pub phys_bit_reduction: u8,
    /// Memory slots one VM may have.
    pub slot_budget: u32,
    /// Whether a guest may use 1 GiB pages.
    pub gib_pages: bool,
    /// The strategies, available or not.
    pub strategies: Vec<StrategyAvailability>,
    /// Helper ABIs that work.
    pub helper_abi: HelperAbiRange,
    /// SHA-256 of the built-in helper image.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// Versions of the peer protocol.
    pub protocol_versions: Vec<u32>,
    /// What `accel: auto` picks; null when there is no QEMU.
    pub qemu: Option<QemuCapability>,
    /// What is missing, and what would help.
    pub missing: Vec<Missing>,
}

/// What KVM gives.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KvmCapabilities {
    /// Whether `/dev/kvm` opens.
    pub available: bool,
    /// What `KVM_GET_API_VERSION` says.
    #[schema(example = 12)]
    pub api_version: Option<i32>,
    /// Named capabilities with what `KVM_CHECK_EXTENSION` says.
    #[schema(value_type = BTreeMap<String, i32>)]
    pub capabilities: BTreeMap<&'static str, i32>,
}

/// Whether a strategy works here.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyAvailability {
    /// Its name.
    #[schema(example = "shifted")]
    pub kind: &'static str,
    /// Whether this host executes it.
    pub available: bool,
    /// Why not, when it does not.
    pub unavailable_reason: Option<&'static str>,
}

/// A range of helper ABIs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperAbiRange {
    /// Oldest.
    pub min: u32,
    /// Newest.
    pub max: u32,
}

/// What QEMU does here.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct QemuCapability {
    /// What `accel: auto` picks.
    #[schema(example = "tcg")]
    pub accel: &'static str,
    /// Why.
    pub reason: &'static str,
    /// The users that QEMU processes run as, without privileges, each guest's as one of its own while there
    /// are enough; null: all of them run as the daemon's user, who is not root.
    pub users: Option<QemuUserRange>,
}

/// User ids, both ends included.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct QemuUserRange {
    /// The first.
    #[schema(example = 65_520)]
    pub first: u32,
    /// The last.
    #[schema(example = 65_533)]
    pub last: u32,
}

/// Something that this host cannot do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Missing {
    /// Stable code; an open list.
    #[schema(example = "sev")]
    pub code: &'static str,
    /// Why it is missing.
    pub why: String,
    /// What to do about it.
    pub fix: String,
}

impl From<MissingCapability> for Missing {
    fn from(missing: MissingCapability) -> Self {
        Self { code: missing.code, why: missing.why, fix: missing.fix }
    }
}

impl From<Capabilities> for HostCapabilities {
    fn from(c: Capabilities) -> Self {
        let users = c.qemu_users.map(|users| {
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
            protocol_versions: c.protocol_versions,
            qemu: c.qemu_accel.map(|(accel, reason)| QemuCapability { accel, reason, users }),
            missing: c.missing.into_iter().map(Missing::from).collect(),
        }
    }
}
