//! The traits without `/dev/kvm`: a software machine.
//!
//! VMs have slots and page tables as on KVM, and every access of a vCPU goes through a software MMU that
//! walks them. In a VM with an encryption context of the model (`sev::model`), RAM really is ciphertext where
//! the C-bit is set. It does not interpret x86: a vCPU runs this library's own programs (helper, workload,
//! firmware) natively, once it has fetched their very bytes at its entry. It protects nothing and is not
//! fast; it shows whether addresses and bits are right.
//!
//! Owns: slots, MMU, native programs, save areas. Must not know: guests' meaning, mirrors, migration.

mod firmware;
mod helper;
mod mmu;
#[cfg(test)]
mod mmu_tests;
mod programs;
mod registers;
mod save_area;
mod slots;
mod vcpu;
mod vm;
mod workload;

use std::sync::Arc;

use super::{Hypervisor, HypervisorError, Vm};
use crate::address_space::HostLimits;
use crate::sev;
use crate::sev::model::ModelPlatform;

/// The software machine of this process.
pub struct EmulatedHost {
    limits: HostLimits,
    platform: Option<Arc<ModelPlatform>>,
}

/// As QEMU describes an EPYC: 48 bits of physical addresses, of which encryption takes one, and the C-bit
/// right above what is left (`cbitpos=47,reduced-phys-bits=1`). The slots are KVM's.
const LIMITS: HostLimits = HostLimits {
    max_phys_bits: 48,
    c_bit: Some(47),
    phys_bit_reduction: 1,
    slot_budget: 32764,
    gib_pages: true,
};

impl EmulatedHost {
    /// A host with this security processor. Its VMs are plain until their context is initialized.
    pub const fn new(platform: Arc<ModelPlatform>) -> Self {
        Self { limits: LIMITS, platform: Some(platform) }
    }

    /// A host without SEV.
    pub const fn without_sev() -> Self {
        Self { limits: HostLimits { c_bit: None, phys_bit_reduction: 0, ..LIMITS }, platform: None }
    }

    /// The same host with other limits for address spaces. A C-bit that lies below 2^(MAXPHYADDR - reduction)
    /// makes addresses ambiguous; planners refuse it.
    pub const fn with_limits(mut self, limits: HostLimits) -> Self {
        self.limits = limits;
        self
    }
}

impl Hypervisor for EmulatedHost {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn create_vm(&self) -> Result<Box<dyn Vm>, HypervisorError> {
        Ok(Box::new(vm::EmulatedVm::new(self.limits, self.platform.as_ref().map(ModelPlatform::context))))
    }

    fn limits(&self) -> HostLimits {
        self.limits
    }

    fn sev(&self) -> Option<Arc<dyn sev::Platform>> {
        self.platform.clone().map(|p| p as Arc<dyn sev::Platform>)
    }
}
