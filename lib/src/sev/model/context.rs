//! One VM's encryption context in the model: KVM's rules, above the firmware.
//!
//! Source: arch/x86/kvm/svm/sev.c and Documentation/virt/kvm/x86/amd-memory-encryption.rst. KVM answers
//! ENOTTY where the VM is no SEV guest, EINVAL to a mirror for all but four commands, EPERM to SEV commands
//! of an SNP guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::commands::refused;
use super::regions::Regions;
use super::{MemoryKey, ModelPlatform};
use crate::memory::Mapping;
use crate::sev::SevError;
use crate::sev::copy::{CopyFacts, CopyRefusal, check};
use crate::sync::Locked;

/// Where the save areas of a VM's vCPUs are, in the order of the vCPUs; a page each.
pub type SaveAreas = Box<dyn Fn() -> Vec<(Arc<Mapping>, u64)> + Send + Sync>;

/// One VM's context in the model.
pub struct ModelContext {
    pub(super) platform: Arc<ModelPlatform>,
    itself: Weak<Self>,
    /// As the memory controller holds it, once it does: it never changes for a VM.
    key: OnceLock<Arc<MemoryKey>>,
    /// KVM's `migration_in_progress`: this VM takes part in a copy.
    copying: AtomicBool,
    vm: Mutex<VmState>,
    save_areas: Mutex<Option<Arc<SaveAreas>>>,
}

/// What KVM keeps for a VM, under the VM's lock.
#[derive(Default)]
pub(super) struct VmState {
    pub vcpus: u32,
    pub sev: Option<Sev>,
    /// Save areas that LAUNCH_UPDATE_VMSA encrypted, by modelled physical address.
    pub protected: Vec<u64>,
}

/// Of a VM with an encryption context.
pub(super) struct Sev {
    pub asid: u32,
    pub es: bool,
    snp: bool,
    /// The firmware's handle; 0 before LAUNCH_START or RECEIVE_START. A mirror has the owner's of the time of
    /// the copy.
    pub handle: u32,
    /// Of a mirror: the VM that owns the context, kept alive.
    owner: Option<Arc<ModelContext>>,
    /// Of an owner: pinned memory.
    pub regions: Regions,
}

impl Sev {
    /// Of a VM that was just initialized.
    pub fn new(asid: u32, es: bool) -> Self {
        Self { asid, es, snp: false, handle: 0, owner: None, regions: Regions::default() }
    }
}

impl std::fmt::Debug for ModelContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vm = self.vm();
        let sev = vm.sev.as_ref();
        f.debug_struct("ModelContext")
            .field("asid", &sev.map(|s| s.asid))
            .field("handle", &sev.map(|s| s.handle))
            .field("mirror", &sev.is_some_and(|s| s.owner.is_some()))
            .field("vcpus", &vm.vcpus)
            .finish_non_exhaustive()
    }
}

/// Who may give a command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// The VM that owns the context.
    Owner,
    /// It, or a mirror.
    Anyone,
}

impl ModelContext {
    pub(super) fn new(platform: &Arc<ModelPlatform>) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            platform: Arc::clone(platform),
            itself: Weak::clone(itself),
            key: OnceLock::new(),
            copying: AtomicBool::new(false),
            vm: Mutex::default(),
            save_areas: Mutex::default(),
        })
    }

    /// The key that the memory controller uses for this VM's ASID; `None` while no guest is activated there.
    /// A mirror has its owner's. A guest received with its key shared has an equal key under an ASID of its
    /// own.
    pub fn memory_key(&self) -> Option<Arc<MemoryKey>> {
        if let Some(key) = self.key.get() {
            return Some(Arc::clone(key));
        }
        let key = self.platform.key(self.asid()?)?;
        Some(Arc::clone(self.key.get_or_init(|| key)))
    }

    /// Itself, as others hold it.
    pub(super) fn shared(&self) -> Arc<Self> {
        // Only a context that is being dropped has no strong reference, and no one can ask that.
        self.itself.upgrade().expect("borrowed from its Arc")
    }

    /// Where the save areas are now.
    pub(super) fn areas(&self) -> Vec<(Arc<Mapping>, u64)> {
        let hook = self.save_areas.locked().clone();
        hook.map_or_else(Vec::new, |hook| hook())
    }

    /// The VM's ASID, from KVM_SEV_INIT2 or the copy on.
    pub fn asid(&self) -> Option<u32> {
        self.vm().sev.as_ref().map(|s| s.asid)
    }

    /// Whether it is an SEV-ES guest.
    pub fn is_es(&self) -> bool {
        self.vm().sev.as_ref().is_some_and(|s| s.es)
    }

    /// Whether its context is another VM's.
    pub fn is_mirror(&self) -> bool {
        self.vm().sev.as_ref().is_some_and(|s| s.owner.is_some())
    }

    /// A vCPU was created (KVM's `created_vcpus`).
    pub fn note_vcpu(&self) {
        self.vm().vcpus += 1;
    }

    /// Makes it an SEV-SNP guest, of which the model knows only what is refused.
    pub fn mark_snp(&self) {
        if let Some(sev) = &mut self.vm().sev {
            sev.snp = true;
        }
    }

    /// Tells where the save areas of the vCPUs created so far are, for LAUNCH_UPDATE_VMSA. The hook must not
    /// hold the context strongly: that would never be dropped. It is called without a lock of the context's.
    pub fn set_save_areas(&self, areas: SaveAreas) {
        *self.save_areas.locked() = Some(Arc::new(areas));
    }

    /// Whether all of `len` bytes at `offset` are registered, and so pinned. Encrypted memory that is not may
    /// become garbage at any time on real hardware: the kernel may move it. A mirror's memory is registered
    /// by its owner.
    pub fn is_registered(&self, memory: &Mapping, offset: u64, len: u64) -> bool {
        let vm = self.vm();
        match vm.sev.as_ref() {
            None => false,
            Some(Sev { owner: Some(owner), .. }) => {
                let owner = Arc::clone(owner);
                drop(vm);
                owner.is_registered(memory, offset, len)
            }
            Some(sev) => sev.regions.cover(memory, offset, len),
        }
    }

    /// Keeps copies from and into this VM off, as another copy would.
    #[cfg(test)]
    pub(super) fn hold_for_copy(&self) -> Result<impl Drop + '_, CopyRefusal> {
        Turn::take(&self.copying)
    }

    pub(super) fn vm(&self) -> MutexGuard<'_, VmState> {
        self.vm.locked()
    }

    fn facts(vm: &VmState) -> CopyFacts {
        CopyFacts {
            encrypted: vm.sev.is_some(),
            mirror: vm.sev.as_ref().is_some_and(|s| s.owner.is_some()),
            snp: vm.sev.as_ref().is_some_and(|s| s.snp),
            has_vcpus: vm.vcpus != 0,
        }
    }

    /// The context for `command`, under the VM's lock, after the checks that KVM makes for all of them.
    pub(super) fn begin(&self, command: &'static str, by: By) -> Result<Begun<'_>, SevError> {
        let vm = self.vm();
        let Some(sev) = vm.sev.as_ref() else { return Err(refused(command, libc::ENOTTY)) };
        if sev.owner.is_some() && by == By::Owner {
            return Err(refused(command, libc::EINVAL));
        }
        if sev.snp {
            return Err(refused(command, libc::EPERM));
        }
        Ok(Begun { handle: sev.handle, asid: sev.asid, vm })
    }

    /// The second half of KVM's LAUNCH_START and RECEIVE_START: the firmware's new guest gets the VM's ASID,
    /// or is forgotten again.
    pub(super) fn bind(
        &self,
        command: &'static str,
        mut begun: Begun<'_>,
        handle: u32,
    ) -> Result<u32, SevError> {
        let mut firmware = self.platform.lock();
        if let Err(code) = firmware.activate(handle, begun.asid) {
            // It was made just now and is not active.
            let forgotten = firmware.decommission(handle);
            debug_assert_eq!(forgotten, Ok(()));
            return Err(SevError::Firmware { command, code });
        }
        if let Some(sev) = &mut begun.vm.sev {
            sev.handle = handle;
        }
        Ok(handle)
    }

    pub(super) fn copy_from_model(&self, source: &Arc<Self>) -> Result<(), CopyRefusal> {
        if std::ptr::eq(self, Arc::as_ptr(source)) {
            return Err(CopyRefusal::Itself);
        }
        if !Arc::ptr_eq(&self.platform, &source.platform) {
            return Err(CopyRefusal::NotAVm);
        }
        let _ours = Turn::take(&self.copying)?;
        let _theirs = Turn::take(&source.copying)?;
        // No other copy of either is under way, so no one takes these two locks the other way round.
        let (mut mirror, owner) = (self.vm(), source.vm());
        check(Self::facts(&mirror), Self::facts(&owner))?;
        let Some(shared) = owner.sev.as_ref() else { return Err(CopyRefusal::SourceNotEncrypted) };
        mirror.sev = Some(Sev {
            asid: shared.asid,
            es: shared.es,
            snp: false,
            handle: shared.handle,
            owner: Some(Arc::clone(source)),
            regions: Regions::default(),
        });
        Ok(())
    }
}

/// A command under way: the VM is locked.
pub(super) struct Begun<'a> {
    pub handle: u32,
    asid: u32,
    pub vm: MutexGuard<'a, VmState>,
}

/// A VM's part in a copy, until dropped.
struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn take(flag: &'a AtomicBool) -> Result<Self, CopyRefusal> {
        match flag.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Ok(Self(flag)),
            Err(_) => Err(CopyRefusal::Busy),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Drop for ModelContext {
    /// KVM's sev_vm_destroy: a mirror lets go of its owner, which cleans up when the last of them is gone.
    fn drop(&mut self) {
        let vm = self.vm.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(sev) = vm.sev.take() else { return };
        if sev.owner.is_some() {
            return;
        }
        let mut firmware = self.platform.lock();
        if sev.handle != 0 {
            let gone = firmware.deactivate(sev.handle).and_then(|()| firmware.decommission(sev.handle));
            debug_assert_eq!(gone, Ok(()), "a started guest can be ended in every state");
        }
        firmware.asids.give_back(sev.asid);
    }
}
