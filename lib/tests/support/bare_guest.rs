//! A workload guest put together by hand, one mapping of RAM at GPA 0: every bit of it is the test's to set.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::VecDeque;
use std::sync::Arc;

use mirrorvm::addr::{HelperVa, MirrorGpa, PAGE_SIZE};
use mirrorvm::address_space::{Access, Mapping as Span, PageTables};
use mirrorvm::guest::embedded::WORKLOAD_IMAGE;
use mirrorvm::hypervisor::{Exit, Hypervisor, HypervisorError, Ports, Slot, SlotId, UserEntry, Vcpu, Vm};
use mirrorvm::memory::{Mapping, View};
use mirrorvm::sev::{Context, Policy};
use mirrorvm_workload as w;

pub const RAM_BYTES: u64 = 2 << 20;
pub const SHARED_AT: u64 = PAGE_SIZE;
pub const IMAGE_AT: u64 = SHARED_AT + w::SHARED_PAGES * PAGE_SIZE;
pub const STACK_AT: u64 = IMAGE_AT + (16 << 12);
pub const DECLARATION_PAGE: u64 = STACK_AT + w::STACK_BYTES;
pub const AREA_AT: u64 = DECLARATION_PAGE + PAGE_SIZE;
pub const TABLES_AT: u64 = AREA_AT + PAGE_SIZE;
/// RAM that the workload may use; the working set is its start.
pub const FREE_AT: u64 = TABLES_AT + (24 << 12);
/// Two further pieces, at the top.
pub const MORE: [(u64, u64); 2] = [(RAM_BYTES - (128 << 10), 64 << 10), (RAM_BYTES - (64 << 10), 64 << 10)];
pub const WORKING_SET: u64 = 16;

/// What is different from a good guest.
#[derive(Clone, Copy)]
pub struct Plan {
    pub sev: bool,
    pub es: bool,
    /// Whether the window on RAM has the C-bit.
    pub window_private: bool,
    /// Whether the image is encrypted at the launch.
    pub image_launched: bool,
    pub plugged: u64,
}

impl Plan {
    pub const PLAIN: Self =
        Self { sev: false, es: false, window_private: false, image_launched: false, plugged: 3 };
    pub const SEV: Self =
        Self { sev: true, es: false, window_private: true, image_launched: true, plugged: 3 };
    pub const ES: Self = Self { es: true, ..Self::SEV };
}

pub struct BareGuest {
    pub vcpu: Box<dyn Vcpu>,
    pub vm: Box<dyn Vm>,
    pub ram: Arc<Mapping>,
    pub cr3: u64,
}

pub const fn entry(cr3: u64) -> UserEntry {
    UserEntry { rip: w::IMAGE_VA, rsp: w::STACK_VA + w::STACK_BYTES - 8, rdi: 0, cr3, tss: w::TSS_VA }
}

pub const fn firmware_entry(cr3: u64) -> UserEntry {
    UserEntry { rip: w::IMAGE_VA + w::FIRMWARE_AT, ..entry(cr3) }
}

pub fn slot(memory: &Arc<Mapping>) -> Slot {
    Slot {
        gpa: 0,
        len: memory.len(),
        memory: Arc::clone(memory),
        offset: 0,
        view: View::Guest,
        dirty_log: false,
        read_only: false,
    }
}

/// Page tables of the guest.
pub fn tables(host: &dyn Hypervisor, plan: &Plan) -> PageTables {
    let span = |va, at, len, access, encrypted| Span {
        va: HelperVa::new(va),
        gpa: MirrorGpa::new(at),
        len,
        access,
        encrypted: encrypted && plan.sev,
    };
    let list = [
        span(w::BOOT_VA, 0, PAGE_SIZE, Access::Read, true),
        span(w::DECLARATION_VA, DECLARATION_PAGE, PAGE_SIZE, Access::Read, true),
        span(w::SHARED_VA, SHARED_AT, w::SHARED_PAGES * PAGE_SIZE, Access::ReadWrite, false),
        span(w::IMAGE_VA, IMAGE_AT, STACK_AT - IMAGE_AT, Access::ReadExecute, true),
        span(w::STACK_VA, STACK_AT, w::STACK_BYTES, Access::ReadWrite, true),
        span(w::RAM_VA, 0, RAM_BYTES, Access::ReadWrite, plan.window_private),
    ];
    let c_bit = if plan.sev { host.limits().c_bit_mask() } else { 0 };
    PageTables::build(&list, MirrorGpa::new(TABLES_AT), c_bit, false, 24).unwrap()
}

/// Puts everything into RAM as a loader does, in plain.
pub fn load(host: &dyn Hypervisor, plan: &Plan) -> (Arc<Mapping>, u64) {
    let ram = Mapping::memfd("guest", RAM_BYTES).unwrap();
    let mut more = [(0, 0); w::MORE_MAX];
    more[..2].copy_from_slice(&MORE);
    let boot = w::Boot {
        vcpus: 1,
        free_from: FREE_AT,
        free_to: MORE[0].0,
        fill: 1,
        working_set: WORKING_SET,
        // Four pages a tick.
        pages_per_tick_q16: 4 << 16,
        shared_gpa: SHARED_AT,
        more,
    };
    let tables = tables(host, plan);
    ram.write(0, &boot.encode());
    ram.write(IMAGE_AT, WORKLOAD_IMAGE);
    ram.write(TABLES_AT, &tables.bytes());
    for at in [w::PLUGGED_AT, w::IN_USE_AT] {
        ram.write(SHARED_AT + at as u64, &plan.plugged.to_le_bytes());
    }
    (ram, tables.root().get() | tables.c_bit())
}

impl BareGuest {
    /// A guest before its first instruction.
    pub fn new(host: &dyn Hypervisor, plan: &Plan) -> Self {
        Self::with(host, plan, |_| {}).unwrap()
    }

    /// The same; `touch` changes its memory after the loader and before the launch.
    pub fn with(
        host: &dyn Hypervisor,
        plan: &Plan,
        touch: impl FnOnce(&Mapping),
    ) -> Result<Self, HypervisorError> {
        let (ram, cr3) = load(host, plan);
        touch(&ram);
        let mut vm = host.create_vm()?;
        vm.set_slot(SlotId(0), slot(&ram))?;
        let context = vm.sev().filter(|_| plan.sev);
        if let Some(sev) = &context {
            sev.init(plan.es).unwrap();
            sev.register_region(&ram, 0, RAM_BYTES).unwrap();
            let es = if plan.es { Policy::ES } else { 0 };
            sev.launch_start(Policy(Policy::NODBG | es), None).unwrap();
        }
        if plan.es {
            vm.place_save_area(0, Arc::clone(&ram), AREA_AT)?;
        }
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.enter_user_mode(&entry(cr3))?;
        if let Some(sev) = &context {
            launch(sev.as_ref(), plan, &ram);
        }
        Ok(Self { vcpu, vm, ram, cr3 })
    }

    /// Runs until `ticks` more have been counted; every port is answered at once.
    pub fn run(&mut self, ticks: u64) -> Result<(), Exit> {
        run(self.vcpu.as_mut(), &self.ram, ticks)
    }

    pub fn stats(&self) -> w::Stats {
        stats(&self.ram)
    }

    pub fn shared_word(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        self.ram.read(SHARED_AT + at as u64, &mut word);
        u64::from_le_bytes(word)
    }

    pub fn set_shared_word(&self, at: usize, value: u64) {
        self.ram.write(SHARED_AT + at as u64, &value.to_le_bytes());
    }
}

/// What is private is encrypted; the shared pages and the free RAM are not.
fn launch(sev: &dyn Context, plan: &Plan, ram: &Mapping) {
    sev.launch_update_data(ram, 0, PAGE_SIZE).unwrap();
    if plan.image_launched {
        sev.launch_update_data(ram, IMAGE_AT, STACK_AT - IMAGE_AT).unwrap();
    }
    sev.launch_update_data(ram, STACK_AT, AREA_AT - STACK_AT).unwrap();
    sev.launch_update_data(ram, TABLES_AT, FREE_AT - TABLES_AT).unwrap();
    if plan.es {
        sev.launch_update_vmsa().unwrap();
    }
    sev.launch_measure().unwrap();
    sev.launch_finish().unwrap();
}

pub fn stats(ram: &Mapping) -> w::Stats {
    let mut raw = [0; w::STATS_BYTES];
    ram.read(SHARED_AT, &mut raw);
    w::Stats::decode(&raw)
}

/// Runs until `ticks` more have been counted.
pub fn run(vcpu: &mut dyn Vcpu, ram: &Mapping, ticks: u64) -> Result<(), Exit> {
    let until = stats(ram).ticks + ticks;
    // An exit a tick, and a few; a guest that does nothing is one that fails.
    for _ in 0..ticks * 4 + 100 {
        match vcpu.run(&mut Answers::always(1)).unwrap() {
            Exit::PortRead { .. } | Exit::PortWrite { port: w::PORT_CONSOLE, .. } => {}
            other => return Err(other),
        }
        if stats(ram).ticks >= until {
            return Ok(());
        }
    }
    panic!("{ticks} ticks did not pass: {:?}", stats(ram));
}

/// Answers of the firmware port and a tick whenever one is asked for.
pub struct Answers {
    pub tick: u32,
    pub firmware: VecDeque<u32>,
}

impl Answers {
    pub fn always(tick: u32) -> Self {
        Self { tick, firmware: VecDeque::new() }
    }
}

impl Ports for Answers {
    fn read(&mut self, port: u16) -> u32 {
        match port {
            w::PORT_TICK => self.tick,
            w::PORT_MAP_RANGE => 0,
            w::PORT_FIRMWARE => self.firmware.pop_front().unwrap_or(w::FIRMWARE_AGAIN),
            _ => u32::MAX,
        }
    }
}
