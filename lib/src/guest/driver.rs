//! How a guest runs: its driver with what that driver wants to know, and what protects the guest.
//!
//! Owns: the words for drivers, workloads and protection. Must not know: hosts, records, requests.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::address_space::Strategy;
use crate::sev::Policy;

/// Labels of a resource: at most 64, keys 1 to 63 and values 0 to 255 bytes.
pub type Labels = BTreeMap<String, String>;

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
