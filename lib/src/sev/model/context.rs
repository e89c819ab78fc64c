//! One VM's encryption context in the model: KVM's rules, above the firmware.
//!
//! Source: arch/x86/kvm/svm/sev.c and Documentation/virt/kvm/x86/amd-memory-encryption.rst. KVM answers ENOTTY where the VM
//! is no SEV guest, EINVAL to a mirror for all but four commands, EPERM to SEV commands of an SNP guest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::firmware::Span;
use super::regions::Regions;
use super::{MemoryKey, ModelPlatform};
use crate::addr::PAGE_SIZE;
use crate::memory::Mapping;
use crate::sev::copy::{CopyFacts, CopyRefusal, check};
use crate::sev::{
    Context, CopySource, GuestStatus, Measurement, OwnerSession, PacketHeader, PdhCert, PlatformCerts,
    Policy, Session, SevError,
};

/// Where the save areas of a VM's vCPUs are, in the order of the vCPUs; a page each.
pub type SaveAreas = Box<dyn Fn() -> Vec<(Arc<Mapping>, u64)> + Send + Sync>;

/// One VM's context in the model.
pub struct ModelContext {
    platform: Arc<ModelPlatform>,
    itself: Weak<Self>,
    /// KVM's `migration_in_progress`: this VM takes part in a copy.
    copying: AtomicBool,
    vm: Mutex<VmState>,
    save_areas: Mutex<Option<SaveAreas>>,
}

/// What KVM keeps for a VM, under the VM's lock.
#[derive(Default)]
struct VmState {
    vcpus: u32,
    sev: Option<Sev>,
    /// Save areas that LAUNCH_UPDATE_VMSA encrypted, by modelled physical address.
    protected: Vec<u64>,
}

/// Of a VM with an encryption context.
struct Sev {
    asid: u32,
    es: bool,
    snp: bool,
    /// The firmware's handle; 0 before LAUNCH_START or RECEIVE_START. A mirror has the owner's of the time of the copy.
    handle: u32,
    /// Of a mirror: the VM that owns the context, kept alive.
    owner: Option<Arc<ModelContext>>,
    /// Of an owner: pinned memory.
    regions: Regions,
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

/// How KVM treats a command.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// The VM that owns the context.
    Owner,
    /// It, or a mirror.
    Anyone,
}

fn refused(command: &'static str, errno: i32) -> SevError {
    SevError::Kernel { command, source: io::Error::from_raw_os_error(errno) }
}

/// A span of guest memory as KVM finds it: not empty, all of it mapped.
fn span<'a>(command: &'static str, memory: &'a Mapping, offset: u64, len: u64) -> Result<Span<'a>, SevError> {
    let end = offset.checked_add(len).filter(|_| len != 0).ok_or_else(|| refused(command, libc::EINVAL))?;
    if end > memory.len() {
        return Err(refused(command, libc::EFAULT));
    }
    Ok(Span { memory, offset, len })
}

/// What SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA take in KVM: part of one page.
fn page_span<'a>(
    command: &'static str,
    memory: &'a Mapping,
    offset: u64,
    len: u64,
) -> Result<Span<'a>, SevError> {
    let span = span(command, memory, offset, len)?;
    if offset % PAGE_SIZE + len > PAGE_SIZE {
        return Err(refused(command, libc::EINVAL));
    }
    Ok(span)
}

impl ModelContext {
    pub(super) fn new(platform: &Arc<ModelPlatform>) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            platform: Arc::clone(platform),
            itself: Weak::clone(itself),
            copying: AtomicBool::new(false),
            vm: Mutex::default(),
            save_areas: Mutex::default(),
        })
    }

    /// The key that the memory controller uses for this VM's ASID; `None` while no guest is activated there. A mirror
    /// has its owner's. A guest received with its key shared has an equal key under an ASID of its own.
    pub fn memory_key(&self) -> Option<Arc<MemoryKey>> {
        self.platform.key(self.asid()?)
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

    /// Tells where the save areas of the vCPUs created so far are, for LAUNCH_UPDATE_VMSA. The hook must not hold the
    /// context (it would never be dropped) nor ask it anything (LAUNCH_UPDATE_VMSA holds its lock).
    pub fn set_save_areas(&self, areas: SaveAreas) {
        *self.save_areas.lock().unwrap_or_else(PoisonError::into_inner) = Some(areas);
    }

    /// Whether all of `len` bytes at `offset` are registered, and so pinned. Encrypted memory that is not may become
    /// garbage at any time on real hardware, as the kernel may move it. A mirror's memory is registered by its owner.
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

    fn vm(&self) -> MutexGuard<'_, VmState> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn begin(&self, command: &'static str, from: From) -> Result<Begun<'_>, SevError> {
        let vm = self.vm();
        let Some(sev) = vm.sev.as_ref() else { return Err(refused(command, libc::ENOTTY)) };
        if sev.owner.is_some() && from == From::Owner {
            return Err(refused(command, libc::EINVAL));
        }
        if sev.snp {
            return Err(refused(command, libc::EPERM));
        }
        Ok(Begun { handle: sev.handle, asid: sev.asid, vm })
    }

    /// The second half of KVM's LAUNCH_START and RECEIVE_START: the firmware's new guest gets the VM's ASID, or is
    /// forgotten again.
    fn bind(&self, command: &'static str, mut begun: Begun<'_>, handle: u32) -> Result<u32, SevError> {
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

    fn copy_from_model(&self, source: &Arc<Self>) -> Result<(), CopyRefusal> {
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
struct Begun<'a> {
    handle: u32,
    asid: u32,
    vm: MutexGuard<'a, VmState>,
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

impl Context for ModelContext {
    fn init(&self, es: bool) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_SEV_INIT2";
        let mut vm = self.vm();
        if vm.vcpus != 0 || vm.sev.is_some() {
            return Err(refused(COMMAND, libc::EINVAL));
        }
        let asid = self.platform.lock().asids.take(es).ok_or_else(|| refused(COMMAND, libc::EBUSY))?;
        vm.sev = Some(Sev { asid, es, snp: false, handle: 0, owner: None, regions: Regions::default() });
        Ok(())
    }

    fn register_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_REG_REGION";
        let mut begun = self.begin(COMMAND, From::Owner)?;
        span(COMMAND, memory, offset, len)?;
        if let Some(sev) = &mut begun.vm.sev {
            sev.regions.add(memory, offset, len);
        }
        Ok(())
    }

    fn unregister_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_UNREG_REGION";
        let mut begun = self.begin(COMMAND, From::Owner)?;
        let removed = begun.vm.sev.as_mut().is_some_and(|sev| sev.regions.remove(memory, offset, len));
        if removed { Ok(()) } else { Err(refused(COMMAND, libc::EINVAL)) }
    }

    fn launch_start(&self, policy: Policy, owner: Option<&OwnerSession>) -> Result<u32, SevError> {
        const COMMAND: &str = "LAUNCH_START";
        let begun = self.begin(COMMAND, From::Owner)?;
        let handle = self.platform.command(COMMAND, |f| f.launch_start(policy, owner))?;
        self.bind(COMMAND, begun, handle)
    }

    fn launch_update_data(&self, memory: &Mapping, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_UPDATE_DATA";
        let begun = self.begin(COMMAND, From::Owner)?;
        let span = span(COMMAND, memory, offset, len)?;
        self.platform.command(COMMAND, |f| f.launch_update_data(begun.handle, span))
    }

    fn launch_update_vmsa(&self) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_UPDATE_VMSA";
        let mut begun = self.begin(COMMAND, From::Anyone)?;
        if !begun.vm.sev.as_ref().is_some_and(|s| s.es) {
            return Err(refused(COMMAND, libc::ENOTTY));
        }
        let areas = match &*self.save_areas.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(areas) => areas(),
            None => Vec::new(),
        };
        for (memory, offset) in &areas {
            let at = memory.modelled_physical() + offset;
            if begun.vm.protected.contains(&at) {
                // KVM does not do this twice for a vCPU.
                return Err(refused(COMMAND, libc::EINVAL));
            }
            let span = span(COMMAND, memory, *offset, PAGE_SIZE)?;
            self.platform.command(COMMAND, |f| f.launch_update_vmsa(begun.handle, span))?;
            begun.vm.protected.push(at);
        }
        Ok(())
    }

    fn save_areas(&self) -> Vec<(Arc<Mapping>, u64)> {
        let areas = self.save_areas.lock().unwrap_or_else(PoisonError::into_inner);
        areas.as_ref().map(|list| list()).unwrap_or_default()
    }

    fn launch_measure(&self) -> Result<Measurement, SevError> {
        const COMMAND: &str = "LAUNCH_MEASURE";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.launch_measure(begun.handle))
    }

    fn launch_secret(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_SECRET";
        let begun = self.begin(COMMAND, From::Owner)?;
        let span = span(COMMAND, memory, offset, packet.len() as u64)?;
        self.platform.command(COMMAND, |f| f.launch_secret(begun.handle, header, packet, span))
    }

    fn launch_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_FINISH";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.launch_finish(begun.handle))
    }

    fn guest_status(&self) -> Result<GuestStatus, SevError> {
        const COMMAND: &str = "GUEST_STATUS";
        let begun = self.begin(COMMAND, From::Anyone)?;
        self.platform.command(COMMAND, |f| f.guest_status(begun.handle))
    }

    fn copy_from(&self, source: &CopySource) -> Result<(), SevError> {
        match source {
            CopySource::Model(source) => self.copy_from_model(source),
            CopySource::Kernel(_) => Err(CopyRefusal::NotAVm),
        }
        .map_err(SevError::Copy)
    }

    fn copy_source(&self) -> CopySource {
        // Only a context that is being dropped has no strong reference, and no one can ask that.
        CopySource::Model(self.itself.upgrade().expect("borrowed from its Arc"))
    }

    fn send_start(&self, target: &PlatformCerts) -> Result<Session, SevError> {
        const COMMAND: &str = "SEND_START";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.send_start(begun.handle, &target.pdh))
    }

    fn send_update_data(
        &self,
        memory: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<(PacketHeader, Vec<u8>), SevError> {
        const COMMAND: &str = "SEND_UPDATE_DATA";
        let begun = self.begin(COMMAND, From::Owner)?;
        let span = page_span(COMMAND, memory, offset, len)?;
        self.platform.command(COMMAND, |f| f.send_update_data(begun.handle, span))
    }

    fn send_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "SEND_FINISH";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.send_finish(begun.handle))
    }

    fn send_cancel(&self) -> Result<(), SevError> {
        const COMMAND: &str = "SEND_CANCEL";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.send_cancel(begun.handle))
    }

    fn receive_start(
        &self,
        policy: Policy,
        origin: &PdhCert,
        session: &Session,
        share: Option<u32>,
    ) -> Result<u32, SevError> {
        const COMMAND: &str = "RECEIVE_START";
        let begun = self.begin(COMMAND, From::Owner)?;
        let handle = self.platform.command(COMMAND, |f| f.receive_start(policy, origin, session, share))?;
        self.bind(COMMAND, begun, handle)
    }

    fn receive_update_data(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "RECEIVE_UPDATE_DATA";
        let begun = self.begin(COMMAND, From::Owner)?;
        let span = page_span(COMMAND, memory, offset, packet.len() as u64)?;
        self.platform.command(COMMAND, |f| f.receive_update_data(begun.handle, header, packet, span))
    }

    fn receive_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "RECEIVE_FINISH";
        let begun = self.begin(COMMAND, From::Owner)?;
        self.platform.command(COMMAND, |f| f.receive_finish(begun.handle))
    }

    fn debug_decrypt(&self, memory: &Mapping, offset: u64, to: &mut [u8]) -> Result<(), SevError> {
        const COMMAND: &str = "DBG_DECRYPT";
        let begun = self.begin(COMMAND, From::Anyone)?;
        let span = span(COMMAND, memory, offset, to.len() as u64)?;
        self.platform.command(COMMAND, |f| f.debug_decrypt(begun.handle, span, to))
    }
}
