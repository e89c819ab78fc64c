//! A VM of the software machine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, RwLock, RwLockWriteGuard, Weak};

use super::helper::HelperPlace;
use super::mmu::Mmu;
use super::save_area::SaveArea;
use super::slots::Slots;
use super::vcpu::EmulatedVcpu;
use crate::addr::PAGE_SIZE;
use crate::address_space::HostLimits;
use crate::hypervisor::{HypervisorError, Slot, SlotId, Vcpu, Vm};
use crate::memory::Mapping;
use crate::sev;
use crate::sev::model::{MemoryKey, ModelContext};
use crate::sync::{Locked, Shared};

/// What a VM and its vCPUs share.
pub(super) struct Machine {
    slots: RwLock<Slots>,
    limits: HostLimits,
    pub helper: HelperPlace,
    context: Option<Arc<ModelContext>>,
}

impl Machine {
    /// A vCPU's view of the memory.
    pub fn mmu(&self, cr3: u64, user: bool) -> Mmu<'_> {
        Mmu { slots: &self.slots, limits: &self.limits, key: self.key(), cr3, user }
    }

    /// The key that the VM's accesses go through.
    pub fn key(&self) -> Option<Arc<MemoryKey>> {
        self.context.as_ref()?.memory_key()
    }
}

/// Most vCPUs (KVM_CAP_MAX_VCPUS here and on the machines this was measured on).
const VCPUS_MAX: u32 = 1024;

/// A virtual machine whose vCPUs are this library's own programs behind a software MMU.
pub(super) struct EmulatedVm {
    machine: Arc<Machine>,
    vcpus: HashMap<u32, Vcpus>,
    /// Of the vCPUs made so far, in that order: what LAUNCH_UPDATE_VMSA encrypts.
    areas: Arc<Mutex<Vec<Arc<SaveArea>>>>,
}

/// What is known of a vCPU.
enum Vcpus {
    /// It is to come, and its save area is to lie here.
    Placed(Arc<SaveArea>),
    Made,
}

impl EmulatedVm {
    pub fn new(limits: HostLimits, context: Option<Arc<ModelContext>>) -> Self {
        let areas: Arc<Mutex<Vec<Arc<SaveArea>>>> = Arc::default();
        if let Some(context) = &context {
            let theirs = Arc::clone(&areas);
            context.set_save_areas(Box::new(move || {
                let areas = theirs.locked();
                areas.iter().map(|a| a.place()).collect()
            }));
        }
        let machine = Machine { slots: RwLock::default(), limits, helper: HelperPlace::default(), context };
        Self { machine: Arc::new(machine), vcpus: HashMap::new(), areas }
    }

    /// What outlives no vCPU and no VM.
    pub fn machine(&self) -> Weak<Machine> {
        Arc::downgrade(&self.machine)
    }

    fn slots(&self) -> RwLockWriteGuard<'_, Slots> {
        self.machine.slots.to_write()
    }

    fn is_es(&self) -> bool {
        self.machine.context.as_ref().is_some_and(|c| c.is_es())
    }
}

fn kernel(call: &'static str, errno: i32) -> HypervisorError {
    HypervisorError::Kernel { call, source: std::io::Error::from_raw_os_error(errno) }
}

impl Vm for EmulatedVm {
    fn set_slot(&mut self, id: SlotId, slot: Slot) -> Result<(), HypervisorError> {
        if slot.read_only && self.is_es() {
            // KVM has no read-only slots where it cannot emulate the guest's instructions.
            return Err(kernel("KVM_SET_USER_MEMORY_REGION", libc::EINVAL));
        }
        let budget = self.machine.limits.slot_budget;
        self.slots().set(id, slot, budget)
    }

    fn remove_slot(&mut self, id: SlotId) -> Result<(), HypervisorError> {
        self.slots().remove(id)
    }

    fn take_dirty_log(&mut self, id: SlotId) -> Result<Vec<u64>, HypervisorError> {
        self.slots().take_log(id)
    }

    fn create_vcpu(&mut self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        if index >= VCPUS_MAX {
            return Err(kernel("KVM_CREATE_VCPU", libc::EINVAL));
        }
        let placed = match self.vcpus.get(&index) {
            Some(Vcpus::Made) => return Err(kernel("KVM_CREATE_VCPU", libc::EEXIST)),
            Some(Vcpus::Placed(area)) => Some(Arc::clone(area)),
            None => None,
        };
        let area = match placed {
            _ if !self.is_es() => None,
            Some(area) => Some(area),
            None => {
                let page =
                    Mapping::anonymous(PAGE_SIZE).map_err(|_| kernel("KVM_CREATE_VCPU", libc::ENOMEM))?;
                Some(Arc::new(SaveArea::new(page, 0)))
            }
        };
        self.vcpus.insert(index, Vcpus::Made);
        self.areas.locked().extend(area.clone());
        if let Some(context) = &self.machine.context {
            context.note_vcpu();
        }
        Ok(Box::new(EmulatedVcpu::new(Arc::clone(&self.machine), area)))
    }

    fn sev(&self) -> Option<Arc<dyn sev::Context>> {
        self.machine.context.clone().map(|c| c as Arc<dyn sev::Context>)
    }

    fn place_save_area(
        &mut self,
        index: u32,
        memory: Arc<Mapping>,
        offset: u64,
    ) -> Result<(), HypervisorError> {
        let end = offset.checked_add(PAGE_SIZE);
        if !offset.is_multiple_of(PAGE_SIZE) || end.is_none_or(|e| e > memory.len()) || index >= VCPUS_MAX {
            return Err(kernel("place a save area", libc::EINVAL));
        }
        match self.vcpus.entry(index) {
            Entry::Occupied(_) => Err(kernel("place a save area", libc::EEXIST)),
            Entry::Vacant(entry) => {
                entry.insert(Vcpus::Placed(Arc::new(SaveArea::new(memory, offset))));
                Ok(())
            }
        }
    }
}
