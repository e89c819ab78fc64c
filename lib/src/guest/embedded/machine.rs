//! An embedded guest's machine: on KVM, or on the software machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_workload as w;
use serde::{Deserialize, Serialize};

use super::launch::{WorkloadBoot, WorkloadPlan};
use super::ports::{CheckDeclaration, Devices, VcpuPorts};
use super::sev::{SevLaunch, SevSetup};
use super::throttle::{PERCENT_MAX, Throttle};
use super::vcpu::{Gate, VcpuThread};
use crate::addr::{Gpa, PAGE_SIZE, RamAddr};
use crate::address_space::{Declaration, GuestLayout, Plug};
use crate::guest::{
    Console, DirtyRanges, EncryptionStatus, EndWatch, LaunchedHelper, LoggedSlot, Machine, MachineError,
    MigrationControl, OnEnd, PlugError, helper_block,
};
use crate::hypervisor::{Hypervisor, Kicker, Slot, SlotId, Vm};
use crate::memory::{GuestRam, Secret, View};
use crate::pages::PageSet;
use crate::sync::Locked;

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
    /// After this time the firmware clears MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes offline.
    pub withdraw_after: Option<Duration>,
}

/// What a machine is given.
pub struct EmbeddedSetup<'a> {
    /// For thread names.
    pub name: &'a str,
    /// The layout that the guest was defined with: where its page tables see RAM.
    pub home: &'a GuestLayout,
    /// Its memory, with what is plugged now.
    pub ram: GuestRam,
    /// The helper that is loaded with the guest.
    pub helper_image: &'a [u8],
    /// The guest's migration secret.
    pub secret: Secret<32>,
    /// Whether the workload is loaded and every vCPU stands at its entry; otherwise memory and state are to
    /// arrive from elsewhere.
    pub boot: bool,
    /// What the firmware declares for the helper.
    pub declaration: Option<Declaration>,
    /// Says what is wrong with what it then really declares.
    pub check_declaration: CheckDeclaration,
    /// Called when the guest has written MSR_KVM_MIGRATION_CONTROL.
    pub on_readiness: Arc<dyn Fn() + Send + Sync>,
    /// Encrypts the guest.
    pub sev: Option<SevSetup>,
    /// Called when the guest ends by itself.
    pub on_end: OnEnd,
}

/// How long a running guest may take to let go of a block.
const UNPLUG_PATIENCE: Duration = Duration::from_secs(2);

/// A guest that this process runs.
pub struct Embedded {
    // It kicks vCPUs, so it goes before them.
    throttle: Option<Throttle>,
    // Threads first: no vCPU runs when the VM and the memory go.
    threads: Vec<VcpuThread>,
    vm: Box<dyn Vm>,
    name: String,
    logging: bool,
    plan: WorkloadPlan,
    devices: Devices,
    secret: Secret<32>,
    sev: Option<SevLaunch>,
}

/// vCPU registers by index, as bytes of the hypervisor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedVcpus {
    vcpus: Vec<serde_json::Value>,
}

impl Embedded {
    /// A paused machine. With SEV its launch is not finished yet: see [`Machine::finish_launch`].
    ///
    /// # Errors
    /// [`MachineError`]; nothing stays behind.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        spec: &EmbeddedSpec,
        setup: EmbeddedSetup<'_>,
    ) -> Result<Self, MachineError> {
        let EmbeddedSetup { name, home, ram, helper_image, secret, boot, sev, on_end, .. } = setup;
        let plan = WorkloadPlan::new(home, spec.vcpus, spec.working_set)?;
        let c_bit = if sev.is_some() { hypervisor.limits().c_bit_mask() } else { 0 };
        let plain_secret = sev.is_none().then_some(&*secret);
        helper_block::load(&ram, helper_image, plain_secret)?;
        if boot {
            plan.load(
                &ram,
                &WorkloadBoot {
                    fill: spec.fill,
                    working_set: spec.working_set,
                    dirty_bytes_per_second: spec.dirty_bytes_per_second,
                    declaration: setup.declaration.as_ref(),
                    c_bit,
                },
            )?;
        }
        let vm = hypervisor.create_vm()?;
        let sev = sev.map(|s| SevLaunch::begin(vm.as_ref(), s, &ram)).transpose()?;
        let devices = Devices {
            shared: plan.shared(),
            console: Arc::default(),
            encryption: Arc::default(),
            gate: Gate::new(spec.vcpus + 1),
            on_end,
            ram,
            control: Arc::new(MigrationControl::new(sev.is_some())),
            check_declaration: setup.check_declaration,
            on_readiness: setup.on_readiness,
            withdraw_at: spec.withdraw_after.map(|after| Instant::now() + after),
        };
        let mut machine = Self {
            throttle: None,
            threads: Vec::new(),
            vm,
            name: name.to_owned(),
            logging: false,
            plan,
            devices,
            secret,
            sev,
        };
        machine.plug_all()?;
        if boot {
            // What it may use it does use, from its first instruction on.
            machine.tell_plugged(&[w::PLUGGED_AT, w::IN_USE_AT]);
        }
        if let Some(sev) = &mut machine.sev {
            let launched = if boot { machine.plan.launched().to_vec() } else { Vec::new() };
            sev.add(&machine.devices.ram, &launched)?;
        }
        machine.start_vcpus(name, spec.vcpus + 1, boot.then_some(c_bit))?;
        Ok(machine)
    }

    fn plug_all(&mut self) -> Result<(), MachineError> {
        for index in 0..self.devices.ram.layout().blocks().len() {
            self.show_block(index)?;
        }
        Ok(())
    }

    fn logged_slots(&self) -> Vec<LoggedSlot> {
        let layout = self.devices.ram.layout();
        let mut slots = Vec::new();
        for (block, id) in layout.blocks().iter().zip(0..) {
            if let ([plug], true) = (block.plugs.as_slice(), self.logging && Some(block) != layout.helper()) {
                let first = block.ram_addr.checked_add(plug.offset).expect("plugs lie in their blocks");
                let pages = plug.len / PAGE_SIZE;
                slots.push(LoggedSlot { id: SlotId(id), first: first.page(), pages });
            }
        }
        slots
    }

    /// Makes the slots of a block what its plugged parts are. A block has one slot number.
    fn show_block(&mut self, index: usize) -> Result<(), MachineError> {
        let layout = self.devices.ram.layout();
        let block = &layout.blocks()[index];
        let id = SlotId(u32::try_from(index).expect("layouts are bounded"));
        match block.plugs.as_slice() {
            [] => {}
            [plug] => {
                let memory = Arc::clone(self.devices.ram.mapping(block).ok_or(MachineError::NothingPlugged)?);
                let (gpa, len, offset) = (plug.gpa.get(), plug.len, plug.offset);
                let dirty_log = self.logging && Some(block.ram_addr) != layout.helper().map(|b| b.ram_addr);
                self.vm.set_slot(
                    id,
                    Slot { gpa, len, memory, offset, view: View::Guest, dirty_log, read_only: false },
                )?;
            }
            _ => return Err(MachineError::Unsupported { what: "plug a block in several parts" }),
        }
        Ok(())
    }

    fn start_vcpus(&mut self, name: &str, count: u32, boot: Option<u64>) -> Result<(), MachineError> {
        let layout = self.devices.ram.layout();
        let areas = layout.save_areas().and_then(|b| self.devices.ram.mapping(b)).cloned();
        for index in 0..count {
            if let Some(areas) = &areas {
                self.vm.place_save_area(index, Arc::clone(areas), u64::from(index) * PAGE_SIZE)?;
            }
            let mut vcpu = self.vm.create_vcpu(index)?;
            if let Some(c_bit) = boot {
                let entry = self.plan.entry(index, c_bit);
                if index + 1 == count {
                    vcpu.enter_supervisor_mode(&entry)?;
                } else {
                    vcpu.enter_user_mode(&entry)?;
                }
            }
            let ports = VcpuPorts::new(self.devices.clone());
            let thread = format!("cpu{index}-{name}");
            let gate = Arc::clone(&self.devices.gate);
            self.threads.push(VcpuThread::spawn(thread, vcpu, gate, ports)?);
        }
        self.sev.as_mut().map_or(Ok(()), SevLaunch::add_vcpus)
    }

    /// Tells the guest which of its pieces it may use: those that are plugged where its page tables expect
    /// them.
    fn tell_plugged(&self, words: &[usize]) {
        let layout = self.devices.ram.layout();
        let plugged = self.plan.pieces().iter().enumerate().fold(0u64, |bits, (i, (at, _, home))| {
            let there = layout.ram_to_gpa(*at) == Some(*home);
            bits | u64::from(there) << i
        });
        for word in words {
            let at = RamAddr::new(self.devices.shared.get() + *word as u64);
            self.devices.ram.write(at, &plugged.to_le_bytes()).expect("the shared pages are RAM");
        }
    }

    /// Whether the guest says that it uses its piece `index`.
    fn in_use(&self, index: usize) -> bool {
        let mut word = [0; 8];
        let at = RamAddr::new(self.devices.shared.get() + w::IN_USE_AT as u64);
        self.devices.ram.read(at, &mut word).is_ok() && u64::from_le_bytes(word) >> index & 1 != 0
    }

    fn replug(&self, name: &str, plugs: Vec<Plug>) -> Result<(usize, GuestLayout), MachineError> {
        let layout = self.devices.ram.layout();
        let index = layout.blocks().iter().position(|b| b.name == name).ok_or(PlugError::NoBlock)?;
        let next = layout.with_plugs(name, plugs).map_err(|mut e| PlugError::Layout(e.swap_remove(0)))?;
        Ok((index, next))
    }

    fn kickers(&self) -> Vec<Kicker> {
        self.threads.iter().map(|t| t.kicker.clone()).collect()
    }

    fn check_alive(&self) -> Result<(), MachineError> {
        self.devices.gate.ended().map_or(Ok(()), |end| Err(MachineError::Ended(end)))
    }
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

    fn migration_control(&self) -> &Arc<MigrationControl> {
        &self.devices.control
    }

    fn announces_itself(&self) -> bool {
        true
    }

    fn migration_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    fn finish_launch(&mut self, mirror_areas: &[Vec<u8>]) -> Result<(), MachineError> {
        let secret = &self.secret;
        self.sev.as_mut().map_or(Ok(()), |sev| sev.finish(secret, mirror_areas))
    }

    fn launched_helper(&self) -> Option<LaunchedHelper> {
        self.sev.as_ref().map(SevLaunch::helper)
    }

    fn page_digests(&self) -> Option<Vec<[u8; 16]>> {
        // A privilege of the software machine: with real SEV nobody but the guest can do this.
        let key = match &self.sev {
            None => None,
            Some(sev) => Some(sev.modelled_key()?),
        };
        let shared = self.devices.encryption.shared();
        Some(crate::memory::page_digests(&self.devices.ram, |page, memory, at, to| match &key {
            Some(key) if !shared.contains(page) => key.read(memory, at, to),
            _ => memory.read(at, to),
        }))
    }

    fn plug(&mut self, name: &str, gpa: Gpa) -> Result<(), MachineError> {
        self.check_alive()?;
        let layout = self.devices.ram.layout();
        let block = layout.block(name).ok_or(PlugError::NoBlock)?;
        match block.plugs.as_slice() {
            [] => {}
            [p] if p.gpa == gpa => return Ok(()),
            [p, ..] => return Err(PlugError::Elsewhere { gpa: p.gpa }.into()),
        }
        let (index, next) = self.replug(name, vec![Plug { offset: 0, gpa, len: block.size }])?;
        // No two blocks at one address; and nothing beyond what this machine can address.
        self.devices.ram.replug(Arc::new(next)).map_err(|_| PlugError::NoBlock)?;
        if let Err(e) = self.show_block(index) {
            self.devices.ram.replug(layout).map_err(|_| PlugError::NoBlock)?;
            return Err(e);
        }
        self.tell_plugged(&[w::PLUGGED_AT]);
        Ok(())
    }

    fn unplug(&mut self, name: &str) -> Result<(), MachineError> {
        self.check_alive()?;
        let layout = self.devices.ram.layout();
        let block = layout.block(name).ok_or(PlugError::NoBlock)?;
        if block.plugs.is_empty() {
            return Ok(());
        }
        if name == self.plan.block().name || layout.helper().is_some_and(|h| h.name == name) {
            return Err(PlugError::Needed.into());
        }
        let (index, next) = self.replug(name, Vec::new())?;
        let ram_addr = block.ram_addr;
        // Asked first, as virtio-mem does: the guest stops using it, then it goes.
        self.devices.ram.replug(Arc::new(next)).map_err(|_| PlugError::NoBlock)?;
        self.tell_plugged(&[w::PLUGGED_AT]);
        let piece = self.plan.pieces().iter().position(|(at, ..)| *at == ram_addr);
        let by = Instant::now() + UNPLUG_PATIENCE;
        while piece.is_some_and(|p| self.in_use(p)) {
            if !self.devices.gate.is_open() || Instant::now() >= by {
                self.devices.ram.replug(Arc::clone(&layout)).map_err(|_| PlugError::NoBlock)?;
                self.tell_plugged(&[w::PLUGGED_AT]);
                return Err(PlugError::InUse.into());
            }
            // The guest looks at every tick, a hundredth of a second.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(self.vm.remove_slot(SlotId(u32::try_from(index).expect("layouts are bounded")))?)
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
        if self.logging != on {
            self.logging = on;
            for index in 0..self.devices.ram.layout().blocks().len() {
                self.show_block(index)?;
            }
        }
        Ok(())
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), MachineError> {
        for slot in self.logged_slots() {
            dirty.insert_log(slot.first, &self.vm.take_dirty_log(slot.id)?);
        }
        Ok(())
    }

    fn dirty_ranges(&self) -> Option<DirtyRanges> {
        let log = self.vm.dirty_log().filter(|_| self.logging)?;
        Some(DirtyRanges::new(log, self.logged_slots()))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MachineError> {
        self.throttle = None;
        if percent > 0 {
            let (gate, kickers) = (Arc::clone(&self.devices.gate), self.kickers());
            self.throttle = Some(Throttle::start(&self.name, percent.min(PERCENT_MAX), gate, kickers)?);
        }
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        let mut vcpus = Vec::new();
        for t in &self.threads {
            let bytes = t.vcpu.locked().save()?;
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
            t.vcpu.locked().restore(&bytes)?;
        }
        Ok(())
    }

    fn end_watch(&self) -> EndWatch {
        let gate = Arc::clone(&self.devices.gate);
        EndWatch::new(move || gate.ended())
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
