//! Executing a plan: memory, VM, vCPUs, threads; and taking it all apart.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorvm_abi::header::Header;
use mirrorvm_abi::{config, layout as abi, mailbox};

use super::worker::{self, WorkerShared};
use super::{HelperImage, Lane, LaneError, MirrorError, Placement, PlacementError, WorkerEnd, psp};
use crate::address_space::{HelperPlacement, MirrorPlan, PspVia, SlotBacking};
use crate::guest::embedded::add_save_areas;
use crate::guest::{LaunchedHelper, helper_block};
use crate::hypervisor::{Hypervisor, Kicker, Slot, SlotId, UserEntry, Vcpu, Vm};
use crate::memory::{GuestRam, Mapping, View};
use crate::sev::{CopySource, NotSent, Policy};
use crate::sync::Locked;
use crate::threads::{self, Role};

/// Longest time to the helper's first idle doorbell, and for any one request.
const HELPER_DEADLINE: Duration = Duration::from_secs(20);

/// A mirror VM with its helper waiting for work.
pub struct Mirror {
    lanes: Vec<Lane>,
    workers: Vec<WorkerThread>,
    /// vCPUs that have not run yet.
    waiting: Vec<Box<dyn Vcpu>>,
    mailbox: Arc<Mapping>,
    name: String,
    plan: Arc<MirrorPlan>,
    // After the workers: they own the vCPUs. It holds the slots' memory.
    vm: Box<dyn Vm>,
    ram: GuestRam,
    launched_areas: Vec<Vec<u8>>,
    measurement: [u8; 32],
    header: Header,
    /// Whether the helper's memory is the mirror's alone, and not the guest's block for it.
    private: bool,
    /// Whether the host may empty the helper's block, and has filled it for this mirror.
    wipes: bool,
    begun: Instant,
    ready_after: Duration,
    placement: Arc<Mutex<Placement>>,
}

struct WorkerThread {
    shared: Arc<WorkerShared>,
    kicker: Kicker,
    handle: Option<JoinHandle<()>>,
}

/// What one worker has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorStats {
    /// Id of the worker's thread in the kernel.
    pub tid: u32,
    /// Exits of the mirror vCPU.
    pub exits: u64,
    /// CPU time of its thread, nanoseconds.
    pub cpu_ns: u64,
    /// Whether it still runs.
    pub ended: Option<WorkerEnd>,
}

/// Looks at a mirror's workers while somebody else owns it.
#[derive(Clone, Debug)]
pub struct MirrorWatch {
    workers: Vec<Arc<WorkerShared>>,
    /// As it was last set; the threads that carry a migration's streams go there, too.
    placement: Arc<Mutex<Placement>>,
}

impl MirrorWatch {
    /// What the workers have done.
    pub fn stats(&self) -> Vec<MirrorStats> {
        let stat = |w: &Arc<WorkerShared>| {
            let (tid, ended) = (w.tid.load(Ordering::Relaxed), w.ended());
            // A thread that has ended has left its time behind: its id may be somebody else's by now.
            let cpu_ns = match ended {
                None => cpu_ns(tid).unwrap_or(0),
                Some(_) => w.cpu_ns.load(Ordering::Relaxed),
            };
            MirrorStats { tid, exits: w.exits.load(Ordering::Relaxed), cpu_ns, ended }
        };
        self.workers.iter().map(stat).collect()
    }

    /// Sets where the workers' threads run; a migration's streams follow with their next round.
    ///
    /// # Errors
    /// [`PlacementError`]; some threads may be placed.
    pub fn place(&self, placement: &Placement) -> Result<(), PlacementError> {
        self.workers.iter().try_for_each(|w| placement.apply_to(w.tid.load(Ordering::Relaxed)))?;
        placement.clone_into(&mut self.placement.locked());
        Ok(())
    }
}

/// CPU time of one of our threads, from the scheduler (Documentation/scheduler/sched-stats.rst).
fn cpu_ns(tid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Where a helper's memory comes from.
#[derive(Clone, Copy)]
pub enum HelperSource<'a> {
    /// The host writes it: the guest is not encrypted. A fresh copy for every mirror: nothing of an earlier
    /// session, keys included, is left.
    Loaded {
        /// The guest's migration secret.
        secret: &'a [u8; 32],
    },
    /// It was encrypted and measured with the guest's launch.
    Launched(&'a LaunchedHelper),
}

impl Mirror {
    /// Executes `plan` over a guest's `ram`, with `workers` vCPUs; returns when the helper waits for work.
    ///
    /// # Errors
    /// [`MirrorError`]; nothing stays behind.
    pub fn launch(
        hypervisor: &dyn Hypervisor,
        name: &str,
        plan: Arc<MirrorPlan>,
        workers: u32,
        ram: &GuestRam,
        image: &HelperImage,
        helper: HelperSource<'_>,
    ) -> Result<Self, MirrorError> {
        let mut mirror = Self::build(hypervisor, name, plan, workers, ram, image, helper)?;
        mirror.wake()?;
        Ok(mirror)
    }

    /// The same up to where its vCPUs would run: with SEV-ES they are measured before the guest's launch
    /// ends, and may run only after it.
    ///
    /// # Errors
    /// [`MirrorError`]; nothing stays behind.
    pub fn build(
        hypervisor: &dyn Hypervisor,
        name: &str,
        plan: Arc<MirrorPlan>,
        workers: u32,
        ram: &GuestRam,
        image: &HelperImage,
        helper: HelperSource<'_>,
    ) -> Result<Self, MirrorError> {
        let begun = Instant::now();
        if workers > plan.mailbox.workers {
            return Err(MirrorError::PlanMismatch);
        }
        let private = helper_memory(&plan, ram, image, helper)?;
        let vm = hypervisor.create_vm()?;
        let mut mirror = Self {
            lanes: Vec::new(),
            workers: Vec::new(),
            waiting: Vec::new(),
            mailbox: Mapping::anonymous_sparing(plan.mailbox.bytes(), plan.mailbox.used())?,
            name: name.to_owned(),
            plan,
            vm,
            ram: ram.clone(),
            launched_areas: Vec::new(),
            measurement: image.measurement(),
            header: *image.header(),
            private: private.is_some(),
            wipes: matches!(helper, HelperSource::Loaded { .. }) && private.is_none(),
            begun,
            ready_after: Duration::ZERO,
            placement: Arc::default(),
        };
        if let HelperSource::Launched(launched) = helper {
            mirror.share_context(launched, private.as_ref())?;
        }
        mirror.set_slots(private.as_ref())?;
        mirror.make_vcpus(workers, image)?;
        if let (HelperSource::Launched(l), Some(context)) = (helper, mirror.vm.sev())
            && l.es
        {
            mirror.launched_areas = add_save_areas(context.as_ref())?;
        }
        Ok(mirror)
    }

    /// Lets the vCPUs run; returns when the helper waits for work. No effect when they do.
    ///
    /// # Errors
    /// The helper does not come up; the mirror is of no use.
    pub fn wake(&mut self) -> Result<(), MirrorError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let slots = self.plan.mailbox.slots;
        for (index, vcpu) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            let base = index * mailbox::worker_stride(slots);
            let shared = WorkerShared::new(Arc::clone(&self.mailbox), base as u64);
            let kicker = vcpu.kicker();
            let theirs = Arc::clone(&shared);
            let handle = std::thread::Builder::new()
                .name(format!("mir{index}-{}", self.name))
                .spawn(move || {
                    threads::begin(Role::Vcpu);
                    worker::run(&theirs, vcpu)
                })
                .map_err(MirrorError::Thread)?;
            self.lanes.push(Lane::new(Arc::clone(&shared), slots, HELPER_DEADLINE));
            self.workers.push(WorkerThread { shared: Arc::clone(&shared), kicker, handle: Some(handle) });
            // The first clears the helper's data before anybody else uses it.
            if index == 0 {
                await_ready(&shared)?;
            }
        }
        self.workers.iter().try_for_each(|w| await_ready(&w.shared))?;
        self.ready_after = self.begun.elapsed();
        Ok(())
    }

    /// Gives the VM the guest's encryption context, or by send-receive its key.
    fn share_context(
        &mut self,
        helper: &LaunchedHelper,
        private: Option<&Arc<Mapping>>,
    ) -> Result<(), MirrorError> {
        let context = self.vm.sev().ok_or(MirrorError::NoSev)?;
        if let (true, Some(to)) = (self.plan.strategy.is_sent_by_firmware(), private) {
            let layout = self.ram.layout();
            let block = layout.helper().ok_or(MirrorError::PlanMismatch)?;
            let from = self.ram.mapping(block).ok_or(MirrorError::PlanMismatch)?;
            return Ok(psp::copy(helper, context.as_ref(), (from, 0, self.plan.placement.block_len()), to)?);
        }
        Ok(context.copy_from(&helper.context.copy_source())?)
    }

    fn set_slots(&mut self, private: Option<&Arc<Mapping>>) -> Result<(), MirrorError> {
        for (slot, id) in self.plan.slots.iter().zip(0..) {
            let (memory, offset) = match slot.backing {
                SlotBacking::Mailbox => (&self.mailbox, 0),
                SlotBacking::Private { offset } => (private.ok_or(MirrorError::PlanMismatch)?, offset),
                SlotBacking::Ram { ram_addr } => {
                    self.ram.locate(ram_addr, slot.len).map_err(|_| MirrorError::PlanMismatch)?
                }
            };
            let (memory, read_only) = (Arc::clone(memory), slot.read_only);
            let (gpa, len) = (slot.gpa.get(), slot.len);
            self.vm.set_slot(
                SlotId(id),
                Slot { gpa, len, memory, offset, view: View::Helper, dirty_log: false, read_only },
            )?;
        }
        Ok(())
    }

    fn make_vcpus(&mut self, workers: u32, image: &HelperImage) -> Result<(), MirrorError> {
        for index in 0..workers {
            let mut vcpu = self.vm.create_vcpu(index)?;
            let top = abi::WORKER_VA + u64::from(index) * abi::WORKER_STRIDE + abi::WORKER_BYTES;
            vcpu.enter_user_mode(&UserEntry {
                rip: image.header().entry,
                rsp: top - 8,
                rdi: u64::from(index),
                cr3: self.plan.tables.root().get() | self.plan.tables.c_bit(),
                tss: abi::TSS_VA,
            })?;
            self.waiting.push(vcpu);
        }
        Ok(())
    }

    /// SEV-ES: what was measured of its vCPUs.
    pub fn launched_areas(&self) -> &[Vec<u8>] {
        &self.launched_areas
    }

    /// The header of the helper image that it runs.
    pub const fn helper_header(&self) -> &Header {
        &self.header
    }

    /// SHA-256 of the helper image that it runs.
    pub const fn helper_measurement(&self) -> [u8; 32] {
        self.measurement
    }

    /// Whether its helper's memory is its own. Of mirrors whose helper lies in the guest's block there can be
    /// one at a time.
    pub const fn is_private(&self) -> bool {
        self.private
    }

    /// Sets where its vCPU threads run.
    ///
    /// # Errors
    /// [`PlacementError`]; some threads may be placed.
    pub fn place(&self, placement: &Placement) -> Result<(), PlacementError> {
        self.watch().place(placement)
    }

    /// How many vCPUs, and so workers, the mirror has.
    pub fn worker_count(&self) -> u32 {
        (self.workers.len() + self.waiting.len()) as u32
    }

    /// The plan that the mirror was made by.
    pub const fn plan(&self) -> &Arc<MirrorPlan> {
        &self.plan
    }

    /// What host and helper share: rings and buffers. The only memory of a mirror that is not encrypted.
    pub const fn mailbox(&self) -> &Arc<Mapping> {
        &self.mailbox
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
        MirrorWatch {
            workers: self.workers.iter().map(|w| Arc::clone(&w.shared)).collect(),
            placement: Arc::clone(&self.placement),
        }
    }

    /// Where its threads run, as it was last set.
    pub fn placement(&self) -> Placement {
        self.placement.locked().clone()
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
        // Keys lie in the helper's data and stacks: gone before the memory can be looked at again. Encrypted
        // ones stay: the host cannot read them, nor could it load the helper again.
        if self.wipes
            && let Err(error) = wipe(&self.ram)
        {
            tracing::error!(%error, "a helper's memory could not be wiped");
        }
    }
}

fn await_ready(worker: &WorkerShared) -> Result<(), MirrorError> {
    let ready = worker.wait_ready(Instant::now() + HELPER_DEADLINE);
    ready.map_err(|end| MirrorError::NotReady(end.map_or(LaneError::Timeout, LaneError::Ended)))
}

/// Fills the helper's memory, or checks that it was filled at the guest's launch; gives the memory that is
/// the mirror's alone.
fn helper_memory(
    plan: &MirrorPlan,
    ram: &GuestRam,
    image: &HelperImage,
    helper: HelperSource<'_>,
) -> Result<Option<Arc<Mapping>>, MirrorError> {
    let layout = ram.layout();
    let block = layout.helper().ok_or(MirrorError::PlanMismatch)?;
    let private = plan.slots.iter().any(|s| matches!(s.backing, SlotBacking::Private { .. }));
    match helper {
        HelperSource::Loaded { secret } => {
            let contents = plan.set_contents(config::PROTECTION_NONE, 0);
            if plan.strategy.is_sent_by_firmware() {
                return Err(MirrorError::Via(NotSent::NoContext));
            }
            let memory = if private {
                let of_use = block.size.saturating_sub(HelperPlacement::unused(&layout));
                Mapping::memfd_sparing("mirrorvm.private", block.size, of_use)?
            } else {
                wipe(ram)?;
                Arc::clone(ram.mapping(block).ok_or(MirrorError::PlanMismatch)?)
            };
            helper_block::fill(&memory, image.bytes(), &plan.placement, Some(secret), &contents);
            Ok(private.then_some(memory))
        }
        HelperSource::Launched(launched) => {
            if !launched.policy.has(Policy::NODBG) {
                return Err(MirrorError::Debuggable);
            }
            if launched.es && launched.finished {
                return Err(MirrorError::AfterLaunch);
            }
            let level = launched.level();
            for (offset, bytes) in plan.set_contents(level, launched.policy.0) {
                if !launched.sets.contains(&(offset, helper_block::digest(&bytes))) {
                    return Err(MirrorError::NotLaunched { offset });
                }
            }
            match plan.strategy.via() {
                Some(via) => {
                    launched.check_via(via).map_err(MirrorError::Via)?;
                    match via {
                        PspVia::LaunchUpdate => {
                            check_pinned(launched)?;
                            Ok(Some(Arc::clone(&launched.private)))
                        }
                        PspVia::SendReceive => Ok(Some(Mapping::memfd("mirrorvm.private", block.size)?)),
                    }
                }
                None => Ok(None),
            }
        }
    }
}

/// A mirror cannot register memory itself (KVM answers EINVAL): what only it maps is pinned through the guest
/// or not at all, and encrypted pages that the kernel moves are garbage.
fn check_pinned(launched: &LaunchedHelper) -> Result<(), MirrorError> {
    match launched.context.copy_source() {
        CopySource::Model(context)
            if !context.is_registered(&launched.private, 0, launched.private.len()) =>
        {
            Err(MirrorError::Unpinned)
        }
        // The kernel does not tell; the launch has registered it.
        CopySource::Model(_) | CopySource::Kernel(_) => Ok(()),
    }
}

/// Empties the helper's block: image, configuration, secret, stacks, maps, tables. The kernel takes the pages
/// back and zeroes them before anybody gets them.
fn wipe(ram: &GuestRam) -> Result<(), MirrorError> {
    let layout = ram.layout();
    let block = layout.helper().ok_or(MirrorError::PlanMismatch)?;
    let memory = ram.mapping(block).ok_or(MirrorError::PlanMismatch)?;
    Ok(memory.discard(0, block.size)?)
}
