//! The dirty log of a KVM VM, cleared by hand.
//!
//! Owns: KVM_GET_DIRTY_LOG without its side effect, KVM_CLEAR_DIRTY_LOG. Must not know: what the pages are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::hypervisor::{DirtyLog, HypervisorError, SlotId};
use crate::sync::Locked;

// include/uapi/linux/kvm.h: _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log).
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, kvm_bindings::KVMIO, 0xc0, kvm_clear_dirty_log);

/// The logged slots of a VM.
pub(super) struct KvmDirtyLog {
    fd: Arc<VmFd>,
    /// Bytes of the slots that are logged now.
    slots: Mutex<HashMap<SlotId, u64>>,
}

impl KvmDirtyLog {
    pub fn new(fd: Arc<VmFd>) -> Self {
        Self { fd, slots: Mutex::default() }
    }

    /// Notes that a slot of `bytes` is logged, or (`None`) is not.
    pub fn note(&self, id: SlotId, bytes: Option<u64>) {
        let mut slots = self.slots.locked();
        match bytes {
            Some(bytes) => slots.insert(id, bytes),
            None => slots.remove(&id),
        };
    }

    fn bytes(&self, id: SlotId) -> Result<u64, HypervisorError> {
        let slots = self.slots.locked();
        slots.get(&id).copied().ok_or(HypervisorError::Slot { slot: id.0, what: "is not logged" })
    }
}

impl DirtyLog for KvmDirtyLog {
    fn look(&self, id: SlotId) -> Result<Vec<u64>, HypervisorError> {
        let bytes = self.bytes(id)?;
        self.fd.get_dirty_log(id.0, bytes as usize).map_err(HypervisorError::kernel("KVM_GET_DIRTY_LOG"))
    }

    #[expect(unsafe_code, reason = "UNSAFETY: KVM_CLEAR_DIRTY_LOG reads a bitmap by its address")]
    fn clear(&self, id: SlotId, first: u64, bits: &[u64]) -> Result<(), HypervisorError> {
        let refuse = |what| HypervisorError::Slot { slot: id.0, what };
        let pages = self.bytes(id)? / 4096;
        // api.rst, 4.121: whole words, but for the slot's last pages.
        let left = pages.checked_sub(first).filter(|_| first.is_multiple_of(64));
        let left = left.ok_or_else(|| refuse("does not have the page"))?;
        let count = left.min(bits.len() as u64 * 64);
        if count == 0 {
            return Ok(());
        }
        let command = kvm_clear_dirty_log {
            slot: id.0,
            num_pages: u32::try_from(count).map_err(|_| refuse("has too many pages for one call"))?,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the command is as the kernel wants it; it reads `num_pages` bits, rounded up to whole
        // words, from `bits`, which has that many and outlives the call, and writes nothing.
        let answer = unsafe { ioctl_with_ref(&*self.fd, KVM_CLEAR_DIRTY_LOG(), &command) };
        if answer == 0 {
            return Ok(());
        }
        Err(HypervisorError::Kernel { call: "KVM_CLEAR_DIRTY_LOG", source: std::io::Error::last_os_error() })
    }
}
