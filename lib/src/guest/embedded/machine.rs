//! An embedded guest's machine.

use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::launch::{WorkloadPlan, load_helper};
use super::ports::{Devices, VcpuPorts};
use super::vcpu::{Gate, VcpuThread};
use crate::addr::RamAddr;
use crate::guest::{Console, EncryptionStatus, Machine, MachineEnd, MachineError, OnEnd};
use crate::hypervisor::{Hypervisor, Kicker, Slot, SlotId, Vm};
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// What an embedded guest is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddedSpec {
    /// 1 to [`mirrorvm_workload::VCPUS_MAX`].
    pub vcpus: u32,
    /// Whether free RAM is filled with incompressible data.
    pub fill: bool,
    /// Bytes that are rewritten over and over.
    pub working_set: u64,
    /// How fast.
    pub dirty_bytes_per_second: u64,
}

/// What a machine is given.
pub struct EmbeddedSetup<'a> {
    /// For thread names.
    pub name: &'a str,
    /// Its memory.
    pub ram: GuestRam,
    /// The helper that is loaded with the guest.
    pub helper_image: &'a [u8],
    /// The guest's migration secret.
    pub secret: Zeroizing<[u8; 32]>,
    /// Whether the workload is loaded and every vCPU stands at its entry; otherwise memory and state are to arrive
    /// from elsewhere.
    pub boot: bool,
    /// Called when the guest ends by itself.
    pub on_end: OnEnd,
}

/// Where a slot's pages start in RAM.
struct GuestSlot {
    id: SlotId,
    slot: Slot,
    ram_addr: RamAddr,
}

/// A guest that this process runs on KVM.
pub struct Embedded {
    // Threads first: no vCPU runs when the VM and the memory go.
    threads: Vec<VcpuThread>,
    vm: Box<dyn Vm>,
    slots: Vec<GuestSlot>,
    devices: Devices,
    secret: Zeroizing<[u8; 32]>,
}

/// vCPU registers by index, as bytes of the hypervisor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedVcpus {
    vcpus: Vec<serde_json::Value>,
}

impl Embedded {
    /// A paused machine.
    ///
    /// # Errors
    /// [`MachineError`]; nothing stays behind.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        spec: &EmbeddedSpec,
        setup: EmbeddedSetup<'_>,
    ) -> Result<Self, MachineError> {
        let EmbeddedSetup { name, ram, helper_image, secret, boot, on_end } = setup;
        let plan = WorkloadPlan::new(ram.layout(), spec.vcpus, spec.working_set)?;
        load_helper(&ram, helper_image, &secret)?;
        if boot {
            plan.load(&ram, spec.fill, spec.working_set, spec.dirty_bytes_per_second)?;
        }
        let mut vm = hypervisor.create_vm()?;
        let slots = guest_slots(&ram);
        for s in &slots {
            vm.set_slot(s.id, s.slot.clone())?;
        }
        let devices = Devices {
            shared: plan.shared(),
            console: Arc::default(),
            encryption: Arc::default(),
            gate: Gate::new(spec.vcpus),
            on_end,
            ram,
        };
        let mut machine = Self { threads: Vec::new(), vm, slots, devices, secret };
        for index in 0..spec.vcpus {
            let mut vcpu = machine.vm.create_vcpu(index)?;
            if boot {
                vcpu.enter_user_mode(&plan.entry(index))?;
            }
            let ports = VcpuPorts::new(machine.devices.clone());
            let thread = format!("cpu{index}-{name}");
            let gate = Arc::clone(&machine.devices.gate);
            machine.threads.push(VcpuThread::spawn(thread, vcpu, gate, ports)?);
        }
        Ok(machine)
    }

    fn kickers(&self) -> Vec<Kicker> {
        self.threads.iter().map(|t| t.kicker.clone()).collect()
    }

    fn check_alive(&self) -> Result<(), MachineError> {
        self.devices.gate.ended().map_or(Ok(()), |end| Err(MachineError::Ended(end)))
    }
}

/// A slot for every plugged part.
fn guest_slots(ram: &GuestRam) -> Vec<GuestSlot> {
    let parts = ram.layout().plugged();
    parts
        .into_iter()
        .zip(0..)
        .filter_map(|((block, plug), id)| {
            let memory = Arc::clone(ram.mapping(block)?);
            let slot = Slot {
                gpa: plug.gpa.get(),
                len: plug.len,
                memory,
                offset: plug.offset,
                dirty_log: false,
                read_only: false,
            };
            let ram_addr = block.ram_addr.checked_add(plug.offset)?;
            Some(GuestSlot { id: SlotId(id), slot, ram_addr })
        })
        .collect()
}

impl Machine for Embedded {
    fn ram(&self) -> &GuestRam {
        &self.devices.ram
    }

    fn console(&self) -> &Arc<Console> {
        &self.devices.console
    }

    fn encryption(&self) -> &Arc<EncryptionStatus> {
        &self.devices.encryption
    }

    fn migration_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.check_alive()?;
        self.devices.gate.open();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.devices.gate.close(&self.kickers());
        self.check_alive()
    }

    fn can_log_dirty(&self) -> bool {
        true
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), MachineError> {
        let helper = self.devices.ram.layout().helper().map(|b| b.ram_addr);
        for s in self.slots.iter_mut().filter(|s| Some(s.ram_addr) != helper && s.slot.dirty_log != on) {
            s.slot.dirty_log = on;
            self.vm.set_slot(s.id, s.slot.clone())?;
        }
        Ok(())
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), MachineError> {
        for s in self.slots.iter().filter(|s| s.slot.dirty_log) {
            let log = self.vm.take_dirty_log(s.id)?;
            dirty.insert_log(s.ram_addr.page(), &log);
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        let mut vcpus = Vec::new();
        for t in &self.threads {
            let bytes = t.vcpu.lock().unwrap_or_else(PoisonError::into_inner).save()?;
            let value = serde_json::from_slice(&bytes)
                .map_err(|_| MachineError::BadState { what: "a vCPU's registers are no JSON" })?;
            vcpus.push(value);
        }
        serde_json::to_vec(&SavedVcpus { vcpus })
            .map_err(|_| MachineError::BadState { what: "registers do not serialize" })
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let saved: SavedVcpus = serde_json::from_slice(state)
            .map_err(|_| MachineError::BadState { what: "no vCPU registers" })?;
        if saved.vcpus.len() != self.threads.len() {
            return Err(MachineError::BadState { what: "another number of vCPUs" });
        }
        for (t, v) in self.threads.iter().zip(&saved.vcpus) {
            let bytes =
                serde_json::to_vec(v).map_err(|_| MachineError::BadState { what: "no vCPU registers" })?;
            t.vcpu.lock().unwrap_or_else(PoisonError::into_inner).restore(&bytes)?;
        }
        Ok(())
    }

    fn ended(&self) -> Option<MachineEnd> {
        self.devices.gate.ended()
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.devices.gate.quit(&self.kickers());
        for t in &mut self.threads {
            if let Some(handle) = t.handle.take() {
                // A vCPU that stands in KVM_RUN right now may have missed a kick that came before it entered:
                // immediate_exit stays set until seen, so one kick is enough.
                let _ = handle.join();
            }
        }
    }
}
