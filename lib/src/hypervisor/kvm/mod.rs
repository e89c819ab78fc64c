//! The traits on `/dev/kvm`. The one door to the kernel's virtualization.

pub mod kick;
mod state;
mod vcpu;
mod vm;

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::{Hypervisor, HypervisorError, Vm};
use crate::address_space::HostLimits;
use crate::sev::{self, kernel::KernelPlatform};

/// KVM's stable API version (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// An opened `/dev/kvm`.
pub struct KvmHost {
    kvm: Kvm,
    cpuid: CpuId,
    /// Where SEV guests can run.
    sev: Option<Arc<KernelPlatform>>,
}

impl KvmHost {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`HypervisorError::NoKvm`] or another API version.
    pub fn open() -> Result<Self, HypervisorError> {
        let kvm = Kvm::new()
            .map_err(|e| HypervisorError::NoKvm { source: std::io::Error::from_raw_os_error(e.errno()) })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HypervisorError::ApiVersion { version });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HypervisorError::kernel("KVM_GET_SUPPORTED_CPUID"))?;
        kick::install_handler()?;
        // What is missing, and why, is told by `sev::kernel::probe`.
        let sev = KernelPlatform::open().ok().map(Arc::new);
        Ok(Self { kvm, cpuid, sev })
    }

    /// Capabilities with the kernel's answer, by the kernel's names.
    pub fn capabilities(&self) -> Vec<(&'static str, i32)> {
        let check = |cap| self.kvm.check_extension_int(cap);
        let raw = |number| self.kvm.check_extension_raw(number);
        vec![
            ("KVM_CAP_USER_MEMORY", check(Cap::UserMemory)),
            ("KVM_CAP_READONLY_MEM", check(Cap::ReadonlyMem)),
            ("KVM_CAP_NR_MEMSLOTS", check(Cap::NrMemslots)),
            ("KVM_CAP_MAX_VCPUS", check(Cap::MaxVcpus)),
            ("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", raw(168)),
            ("KVM_CAP_DIRTY_LOG_RING", raw(192)),
            ("KVM_CAP_X86_USER_SPACE_MSR", raw(188)),
            // Reported by kernels without SEV too: "present" is not "works".
            ("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", raw(197)),
            ("KVM_CAP_EXIT_HYPERCALL", raw(201)),
        ]
    }

    /// The API version.
    pub const fn api_version(&self) -> i32 {
        API_VERSION
    }
}

impl Hypervisor for KvmHost {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vm(&self) -> Result<Box<dyn Vm>, HypervisorError> {
        let fd = self.kvm.create_vm().map_err(HypervisorError::kernel("KVM_CREATE_VM"))?;
        Ok(Box::new(vm::KvmVm::new(fd, self.cpuid.clone(), self.sev.as_deref())?))
    }

    fn limits(&self) -> HostLimits {
        let leaf = |function| self.cpuid.as_slice().iter().find(|e| e.function == function);
        // AMD APM vol. 3, Fn8000_0008 and Fn8000_001F; the latter counts only when KVM passes it on.
        let encryption = leaf(0x8000_001f).filter(|e| e.eax & 0b10 != 0);
        HostLimits {
            max_phys_bits: leaf(0x8000_0008).map_or(36, |e| (e.eax & 0xff) as u8),
            c_bit: encryption.map(|e| (e.ebx & 0x3f) as u8),
            phys_bit_reduction: encryption.map_or(0, |e| (e.ebx >> 6 & 0x3f) as u8),
            slot_budget: u32::try_from(self.kvm.get_nr_memslots()).unwrap_or(32),
            gib_pages: leaf(0x8000_0001).is_some_and(|e| e.edx & (1 << 26) != 0),
        }
    }

    fn sev(&self) -> Option<Arc<dyn sev::Platform>> {
        self.sev.clone().map(|sev| sev as Arc<dyn sev::Platform>)
    }
}
