//! Executing a plan: memory, VM, vCPUs, threads; and taking it all apart.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorvm_abi::{config, layout as abi, mailbox};

use super::worker::{self, WorkerShared};
use super::{HelperImage, Lane, LaneError, MirrorError, WorkerEnd};
use crate::addr::RamAddr;
use crate::address_space::{MirrorPlan, SlotBacking};
use crate::hypervisor::{Hypervisor, Kicker, Slot, SlotId, UserEntry, Vm};
use crate::memory::{GuestRam, Mapping};

/// Longest time to the helper's first idle doorbell, and for any one request.
const HELPER_DEADLINE: Duration = Duration::from_secs(20);

/// A mirror VM with its helper waiting for work.
pub struct Mirror {
    lanes: Vec<Lane>,
    workers: Vec<WorkerThread>,
    plan: Arc<MirrorPlan>,
    // After the workers: they own the vCPUs. Never touched again, but it holds the slots' memory.
    _vm: Box<dyn Vm>,
    ram: GuestRam,
    ready_after: Duration,
}

struct WorkerThread {
    shared: Arc<WorkerShared>,
    kicker: Kicker,
    handle: Option<JoinHandle<()>>,
}

/// What one worker has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorStats {
    /// Kernel thread id.
    pub tid: u32,
    /// Exits of the mirror vCPU.
    pub exits: u64,
    /// Whether it still runs.
    pub ended: Option<WorkerEnd>,
}

/// Looks at a mirror's workers while somebody else owns it.
#[derive(Clone, Debug)]
pub struct MirrorWatch(Vec<Arc<WorkerShared>>);

impl MirrorWatch {
    /// What the workers have done.
    pub fn stats(&self) -> Vec<MirrorStats> {
        let stat = |w: &Arc<WorkerShared>| MirrorStats {
            tid: w.tid.load(Ordering::Relaxed),
            exits: w.exits.load(Ordering::Relaxed),
            ended: w.ended(),
        };
        self.0.iter().map(stat).collect()
    }
}

impl Mirror {
    /// Executes `plan` over a guest's `ram`. The helper starts from a fresh copy of `image`: nothing of an
    /// earlier session, keys included, is left in its memory.
    ///
    /// # Errors
    /// [`MirrorError`]; nothing stays behind.
    pub fn launch(
        hypervisor: &dyn Hypervisor,
        name: &str,
        plan: Arc<MirrorPlan>,
        ram: &GuestRam,
        image: &HelperImage,
        secret: &[u8; 32],
    ) -> Result<Self, MirrorError> {
        let made = Self::make(hypervisor, name, plan, ram, image, secret);
        if made.is_err()
            && let Err(error) = wipe(ram)
        {
            tracing::error!(%error, "a helper's memory could not be wiped");
        }
        made
    }

    fn make(
        hypervisor: &dyn Hypervisor,
        name: &str,
        plan: Arc<MirrorPlan>,
        ram: &GuestRam,
        image: &HelperImage,
        secret: &[u8; 32],
    ) -> Result<Self, MirrorError> {
        let begun = Instant::now();
        load(&plan, ram, image, secret)?;
        let memory = Mapping::anonymous(plan.mailbox.bytes())?;
        let mut vm = hypervisor.create_vm()?;
        for (slot, id) in plan.slots.iter().zip(0..) {
            let (memory, offset) = match slot.backing {
                SlotBacking::Mailbox => (&memory, 0),
                SlotBacking::Ram { ram_addr } => {
                    ram.locate(ram_addr, slot.len).map_err(|_| MirrorError::PlanMismatch)?
                }
                // Memory of the mirror alone is the drivers' that execute `psp-copied`.
                SlotBacking::Private { .. } => return Err(MirrorError::PlanMismatch),
            };
            let memory = Arc::clone(memory);
            vm.set_slot(
                SlotId(id),
                Slot {
                    gpa: slot.gpa.get(),
                    len: slot.len,
                    memory,
                    offset,
                    dirty_log: false,
                    read_only: slot.read_only,
                },
            )?;
        }
        let mut mirror = Self {
            lanes: Vec::new(),
            workers: Vec::new(),
            plan,
            _vm: vm,
            ram: ram.clone(),
            ready_after: Duration::ZERO,
        };
        mirror.start_workers(name, image, &memory)?;
        for w in &mirror.workers {
            w.shared
                .wait_ready(Instant::now() + HELPER_DEADLINE)
                .map_err(|end| MirrorError::NotReady(end.map_or(LaneError::Timeout, LaneError::Ended)))?;
        }
        mirror.ready_after = begun.elapsed();
        Ok(mirror)
    }

    fn start_workers(
        &mut self,
        name: &str,
        image: &HelperImage,
        memory: &Arc<Mapping>,
    ) -> Result<(), MirrorError> {
        let size = self.plan.mailbox;
        for index in 0..size.workers {
            let mut vcpu = self._vm.create_vcpu(index)?;
            let top = abi::WORKER_VA + u64::from(index) * abi::WORKER_STRIDE + abi::WORKER_BYTES;
            vcpu.enter_user_mode(&UserEntry {
                rip: image.header().entry,
                rsp: top - 8,
                rdi: u64::from(index),
                cr3: self.plan.tables.root().get() | self.plan.tables.c_bit(),
                tss: abi::TSS_VA,
            })?;
            let base = index as usize * mailbox::worker_stride(size.slots);
            let shared = WorkerShared::new(Arc::clone(memory), base as u64);
            let kicker = vcpu.kicker();
            let theirs = Arc::clone(&shared);
            let handle = std::thread::Builder::new()
                .name(format!("mir{index}-{name}"))
                .spawn(move || worker::run(&theirs, vcpu))
                .map_err(MirrorError::Thread)?;
            self.lanes.push(Lane::new(Arc::clone(&shared), size.slots, HELPER_DEADLINE));
            self.workers.push(WorkerThread { shared, kicker, handle: Some(handle) });
        }
        Ok(())
    }

    /// The executed plan.
    pub const fn plan(&self) -> &Arc<MirrorPlan> {
        &self.plan
    }

    /// The lanes, one a worker.
    pub fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// From the request to the last worker's first idle doorbell.
    pub const fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// A view of the workers that needs no ownership.
    pub fn watch(&self) -> MirrorWatch {
        MirrorWatch(self.workers.iter().map(|w| Arc::clone(&w.shared)).collect())
    }

    pub(super) fn control_lane(&mut self) -> &mut Lane {
        &mut self.lanes[0]
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.workers.iter().for_each(|w| w.shared.quit(&w.kicker));
        for w in &mut self.workers {
            if let Some(handle) = w.handle.take() {
                let _ = handle.join();
            }
        }
        // Keys lie in the helper's data and stacks: gone before the memory can be looked at again.
        if let Err(error) = wipe(&self.ram) {
            tracing::error!(%error, "a helper's memory could not be wiped");
        }
    }
}

/// Puts image, configuration, secret and page tables into the helper's block; everything else there is zeroed.
fn load(
    plan: &MirrorPlan,
    ram: &GuestRam,
    image: &HelperImage,
    secret: &[u8; 32],
) -> Result<(), MirrorError> {
    wipe(ram)?;
    let block = ram.layout().helper().ok_or(MirrorError::PlanMismatch)?;
    let base = block.ram_addr.get();
    let put = |offset: u64, bytes: &[u8]| {
        ram.write(RamAddr::new(base + offset), bytes).map_err(|_| MirrorError::PlanMismatch)
    };
    let secret_at = plan.placement.secret_at;
    put(0, image.bytes())?;
    put(secret_at, &config::SECRET_MAGIC.to_le_bytes())?;
    put(secret_at + 8, secret)?;
    plan.set_contents(0, 0).iter().try_for_each(|(offset, bytes)| put(*offset, bytes))
}

/// Empties the helper's block: image, configuration, secret, stacks, maps, tables. The kernel takes the pages
/// back and zeroes them before anybody gets them.
fn wipe(ram: &GuestRam) -> Result<(), MirrorError> {
    let block = ram.layout().helper().ok_or(MirrorError::PlanMismatch)?;
    let memory = ram.mapping(block).ok_or(MirrorError::PlanMismatch)?;
    Ok(memory.discard(0, block.size)?)
}
