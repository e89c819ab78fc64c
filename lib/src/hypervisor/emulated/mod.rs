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

use std::sync::{Arc, Mutex, Weak};

use super::{Hypervisor, HypervisorError, Vm};
use crate::address_space::HostLimits;
use crate::sev;
use crate::sev::model::ModelPlatform;
use crate::sync::Locked;

/// The software machine of this process.
pub struct EmulatedHost {
    limits: HostLimits,
    platform: Option<Arc<ModelPlatform>>,
    /// The VMs that it made.
    machines: Mutex<Vec<Weak<vm::Machine>>>,
}

/// Copies of helpers' memories, by the machines they are in.
pub struct HelperCopies(Vec<(Arc<vm::Machine>, helper::Copied)>);

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
        Self { limits: LIMITS, platform: Some(platform), machines: Mutex::new(Vec::new()) }
    }

    /// A host without SEV.
    pub const fn without_sev() -> Self {
        let limits = HostLimits { c_bit: None, phys_bit_reduction: 0, ..LIMITS };
        Self { limits, platform: None, machines: Mutex::new(Vec::new()) }
    }

    /// The same host with other limits for address spaces. A C-bit that lies below 2^(MAXPHYADDR - reduction)
    /// makes addresses ambiguous; planners refuse it.
    pub const fn with_limits(mut self, limits: HostLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Copies the memory of every helper that runs here, between two requests: as any host can that holds
    /// the pages, encrypted or not. What it is good for is to be put back.
    pub fn copy_helpers(&self) -> HelperCopies {
        let machines: Vec<_> = self.machines.locked().iter().filter_map(Weak::upgrade).collect();
        let copy = |machine: Arc<vm::Machine>| {
            let memory = machine.helper.locked().clone();
            memory.map(|memory| (machine, memory.copy()))
        };
        HelperCopies(machines.into_iter().filter_map(copy).collect())
    }

    /// Puts copies back, as if nothing had happened since; registers and rings stay as they are, so that a
    /// helper goes on with its next request.
    pub fn put_helpers_back(&self, copies: &HelperCopies) {
        for (machine, copied) in &copies.0 {
            if let Some(memory) = machine.helper.locked().clone() {
                memory.put_back(copied);
            }
        }
    }
}

impl Hypervisor for EmulatedHost {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn create_vm(&self) -> Result<Box<dyn Vm>, HypervisorError> {
        let vm = vm::EmulatedVm::new(self.limits, self.platform.as_ref().map(ModelPlatform::context));
        let mut machines = self.machines.locked();
        machines.retain(|machine| machine.strong_count() > 0);
        machines.push(vm.machine());
        Ok(Box::new(vm))
    }

    fn limits(&self) -> HostLimits {
        self.limits
    }

    fn sev(&self) -> Option<Arc<dyn sev::Platform>> {
        self.platform.clone().map(|p| p as Arc<dyn sev::Platform>)
    }
}
