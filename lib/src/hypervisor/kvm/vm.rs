//! A VM and its slots.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::dirty_log::KvmDirtyLog;
use super::vcpu::KvmVcpu;
use crate::hypervisor::{DirtyLog, HypervisorError, Slot, SlotId, Vcpu, Vm};
use crate::sev::{
    self,
    kernel::{KernelContext, KernelPlatform, VmKind},
};

pub(super) struct KvmVm {
    // Before the slots' memory: the VM must be gone when the memory goes.
    fd: Arc<VmFd>,
    /// Where the kernel leaves clearing it to us.
    log: Option<Arc<KvmDirtyLog>>,
    cpuid: CpuId,
    slots: HashMap<SlotId, Slot>,
    /// Has a descriptor of its own: whoever keeps it keeps the VM, but no vCPU that could touch the slots'
    /// memory.
    sev: Option<Arc<KernelContext>>,
}

impl KvmVm {
    /// # Errors
    /// No descriptors left for the encryption context.
    #[expect(unsafe_code, reason = "UNSAFETY: VmFd lends its descriptor as a number alone")]
    pub fn new(
        fd: VmFd,
        cpuid: CpuId,
        platform: Option<&KernelPlatform>,
        manual_log: bool,
    ) -> Result<Self, HypervisorError> {
        // SAFETY: `fd` is open until this function has long duplicated it.
        let lent = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let sev = platform
            .map(|platform| platform.context(lent, VmKind::Default))
            .transpose()
            .map_err(|source| HypervisorError::Kernel { call: "fcntl(F_DUPFD)", source })?;
        let fd = Arc::new(fd);
        let log = manual_log.then(|| Arc::new(KvmDirtyLog::new(Arc::clone(&fd))));
        Ok(Self { fd, log, cpuid, slots: HashMap::new(), sev })
    }
}

impl Vm for KvmVm {
    #[expect(unsafe_code, reason = "UNSAFETY: KVM_SET_USER_MEMORY_REGION gives a VM access to our memory")]
    fn set_slot(&mut self, id: SlotId, slot: Slot) -> Result<(), HypervisorError> {
        let refuse = |what| HypervisorError::Slot { slot: id.0, what };
        let end = slot.offset.checked_add(slot.len).ok_or_else(|| refuse("wraps"))?;
        if slot.len == 0 || end > slot.memory.len() {
            return Err(refuse("leaves its memory"));
        }
        if let Some(old) = self.slots.get(&id)
            && (old.gpa, old.len, old.offset, old.read_only)
                != (slot.gpa, slot.len, slot.offset, slot.read_only)
        {
            return Err(refuse("would change its place"));
        }
        let logged = if slot.dirty_log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let protected = if slot.read_only { KVM_MEM_READONLY } else { 0 };
        let region = kvm_userspace_memory_region {
            slot: id.0,
            flags: logged | protected,
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.memory.host_address(slot.view) + slot.offset,
        };
        // SAFETY: the region lies inside `slot.memory` (checked above), which is plain memory reached by
        // volatile access only, and which `self.slots` keeps mapped until the VM is gone.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(HypervisorError::kernel("KVM_SET_USER_MEMORY_REGION"))?;
        if let Some(log) = &self.log {
            log.note(id, slot.dirty_log.then_some(slot.len));
        }
        self.slots.insert(id, slot);
        Ok(())
    }

    #[expect(
        unsafe_code,
        reason = "UNSAFETY: KVM_SET_USER_MEMORY_REGION takes a VM's access to our memory away"
    )]
    fn remove_slot(&mut self, id: SlotId) -> Result<(), HypervisorError> {
        let slot = self.slots.get(&id).ok_or(HypervisorError::Slot { slot: id.0, what: "is not there" })?;
        // api.rst, 4.35: a size of zero deletes the slot.
        let region = kvm_userspace_memory_region {
            slot: id.0,
            flags: 0,
            guest_phys_addr: slot.gpa,
            memory_size: 0,
            userspace_addr: slot.memory.host_address(slot.view) + slot.offset,
        };
        // SAFETY: the VM loses access; its memory is released after the kernel has let go of it.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(HypervisorError::kernel("KVM_SET_USER_MEMORY_REGION"))?;
        if let Some(log) = &self.log {
            log.note(id, None);
        }
        self.slots.remove(&id);
        Ok(())
    }

    fn take_dirty_log(&mut self, id: SlotId) -> Result<Vec<u64>, HypervisorError> {
        let slot = self
            .slots
            .get(&id)
            .filter(|s| s.dirty_log)
            .ok_or(HypervisorError::Slot { slot: id.0, what: "is not logged" })?;
        if let Some(log) = &self.log {
            let marked = log.look(id)?;
            log.clear(id, 0, &marked)?;
            return Ok(marked);
        }
        self.fd.get_dirty_log(id.0, slot.len as usize).map_err(HypervisorError::kernel("KVM_GET_DIRTY_LOG"))
    }

    fn dirty_log(&self) -> Option<Arc<dyn DirtyLog>> {
        self.log.clone().map(|log| log as Arc<dyn DirtyLog>)
    }

    fn create_vcpu(&mut self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        let fd = self.fd.create_vcpu(u64::from(index)).map_err(HypervisorError::kernel("KVM_CREATE_VCPU"))?;
        if let Some(sev) = &self.sev {
            sev.note_vcpu();
        }
        fd.set_cpuid2(&self.cpuid).map_err(HypervisorError::kernel("KVM_SET_CPUID2"))?;
        Ok(Box::new(KvmVcpu::new(fd)))
    }

    fn sev(&self) -> Option<Arc<dyn sev::Context>> {
        self.sev.clone().map(|sev| sev as Arc<dyn sev::Context>)
    }
}
