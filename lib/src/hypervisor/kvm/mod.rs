//! The traits on `/dev/kvm`. The one door to the kernel's virtualization.

mod dirty_log;
mod kick;
mod state;
mod vcpu;
mod vm;

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
    KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::{Hypervisor, HypervisorError, Vm};
use crate::address_space::HostLimits;
use crate::sev::{self, kernel::KernelPlatform};

/// KVM's stable API version (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Bit of KVM_CAP_EXIT_HYPERCALL: hypercall 12, KVM_HC_MAP_GPA_RANGE.
const MAP_GPA_RANGE: i32 = 1 << 12;
/// MSR_KVM_MIGRATION_CONTROL (KVM's x86 msr.rst).
const MSR_KVM_MIGRATION_CONTROL: u32 = 0x4b56_4d08;

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
        // What is missing, and why, is told by `sev::kernel::probe`.
        Self::with_sev(KernelPlatform::open().ok())
    }

    /// The same, with this security processor, or none.
    ///
    /// # Errors
    /// As [`KvmHost::open`].
    pub fn with_sev(sev: Option<KernelPlatform>) -> Result<Self, HypervisorError> {
        let kvm = Kvm::new().map_err(|e| {
            let source = std::io::Error::from_raw_os_error(e.errno());
            HypervisorError::NoKvm { fix: super::kvm_access::kvm_denied_fix(), source }
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HypervisorError::ApiVersion { version });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HypervisorError::kernel("KVM_GET_SUPPORTED_CPUID"))?;
        kick::install_handler()?;
        Ok(Self { kvm, cpuid, sev: sev.map(Arc::new) })
    }

    /// Asks for the exits by which a guest tells of migration: KVM_HC_MAP_GPA_RANGE, and
    /// MSR_KVM_MIGRATION_CONTROL, which the kernel would otherwise take by itself (api.rst, 4.97, 7.22 and
    /// 7.30). A kernel that has no such exit leaves guests without a way to tell, which is how they then
    /// appear.
    fn leave_to_us(&self, vm: &VmFd) -> Result<(), HypervisorError> {
        let enable = |cap, value: u64| {
            let cap = kvm_enable_cap { cap, args: [value, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&cap).map_err(HypervisorError::kernel("KVM_ENABLE_CAP"))
        };
        let hypercalls = self.kvm.check_extension_raw(u64::from(KVM_CAP_EXIT_HYPERCALL));
        if hypercalls & MAP_GPA_RANGE != 0 {
            enable(KVM_CAP_EXIT_HYPERCALL, MAP_GPA_RANGE as u64)?;
        }
        if self.kvm.check_extension_raw(u64::from(KVM_CAP_X86_USER_SPACE_MSR)) > 0 {
            enable(KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_FILTER))?;
            let denied = MsrFilterRange {
                flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
                base: MSR_KVM_MIGRATION_CONTROL,
                msr_count: 1,
                bitmap: &[0],
            };
            vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[denied])
                .map_err(HypervisorError::kernel("KVM_X86_SET_MSR_FILTER"))?;
        }
        Ok(())
    }

    /// Asks the kernel to leave clearing dirty logs to us, and to begin them with every page marked instead
    /// of protecting all memory at once (api.rst, 7.21). False where it does not know that.
    fn clear_log_by_hand(&self, vm: &VmFd) -> Result<bool, HypervisorError> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        if self.kvm.check_extension_raw(u64::from(cap)) & wanted as i32 != wanted as i32 {
            return Ok(false);
        }
        let cap = kvm_enable_cap { cap, args: [u64::from(wanted), 0, 0, 0], ..Default::default() };
        vm.enable_cap(&cap).map_err(HypervisorError::kernel("KVM_ENABLE_CAP"))?;
        Ok(true)
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

    /// What KVM_GET_API_VERSION says.
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
        self.leave_to_us(&fd)?;
        let manual_log = self.clear_log_by_hand(&fd)?;
        Ok(Box::new(vm::KvmVm::new(fd, self.cpuid.clone(), self.sev.as_deref(), manual_log)?))
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
