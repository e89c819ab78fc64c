//! A vCPU of the software machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mirrorvm_abi::mailbox::Fatal;
use mirrorvm_helper::Scratch;

use super::helper::{self, HelperMemory};
use super::mmu::Fault;
use super::registers::{self, Registers, State};
use super::save_area::SaveArea;
use super::vm::Machine;
use super::workload;
use crate::hypervisor::kick::Kick;
use crate::hypervisor::{Exit, HypervisorError, Kicker, Ports, UserEntry, Vcpu};

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Kick for Flag {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Where the registers are.
enum Place {
    /// In plain sight of the host.
    Open(Registers),
    /// In a save area; here only while the vCPU runs.
    Encrypted,
}

pub(super) struct EmulatedVcpu {
    machine: Arc<Machine>,
    kick: Arc<Flag>,
    place: Place,
    /// The page for the registers of an SEV-ES vCPU.
    area: Option<Arc<SaveArea>>,
    /// The bytes at the entry were looked at since it was set.
    fetched: bool,
    /// A worker's state besides its registers.
    worker: Option<(Arc<HelperMemory>, Box<Scratch>)>,
    /// It can do nothing but this any more.
    dead: Option<Exit>,
}

impl EmulatedVcpu {
    /// With a save area for an SEV-ES guest.
    pub fn new(machine: Arc<Machine>, area: Option<Arc<SaveArea>>) -> Self {
        let entry = UserEntry { rip: 0, rsp: 0, rdi: 0, cr3: 0, tss: 0 };
        Self {
            machine,
            kick: Arc::default(),
            place: Place::Open(Registers::entered(entry, false)),
            area,
            fetched: false,
            worker: None,
            dead: None,
        }
    }

    /// Sets registers from outside: what only an unencrypted vCPU lets happen.
    fn set(&mut self, registers: Registers) -> Result<(), HypervisorError> {
        if let Some(area) = &self.area {
            let launched = || self.machine.key().is_some_and(|key| area.load(&key).is_some());
            if matches!(self.place, Place::Encrypted) || launched() {
                // svm.c: registers of a vCPU with guest_state_protected cannot be set.
                let source = std::io::Error::from_raw_os_error(libc::EINVAL);
                return Err(HypervisorError::Kernel { call: "KVM_SET_REGS", source });
            }
            // Plain until LAUNCH_UPDATE_VMSA encrypts the page in place; plain for good, should that not
            // come.
            area.put_plain(&registers);
        }
        self.place = Place::Open(registers);
        self.start_over();
        Ok(())
    }

    fn start_over(&mut self) {
        (self.fetched, self.dead) = (false, None);
        self.wipe_worker();
    }

    fn wipe_worker(&mut self) {
        if let Some((_, scratch)) = &mut self.worker {
            **scratch = Scratch::new();
            std::hint::black_box(scratch);
        }
        self.worker = None;
    }

    /// The registers to run with; `None` when the save area holds none.
    fn load(&self) -> Option<Registers> {
        match (&self.area, &self.place) {
            (Some(area), _) => area.load(self.machine.key().as_deref()?),
            (None, Place::Open(registers)) => Some(*registers),
            (None, Place::Encrypted) => None,
        }
    }

    fn keep(&mut self, registers: Registers) {
        self.place = match (&self.area, self.machine.key()) {
            (Some(area), Some(key)) => {
                area.store(&key, &registers);
                Place::Encrypted
            }
            _ => Place::Open(registers),
        };
    }

    /// Runs the program natively until something leaves to the host.
    fn go(&mut self, registers: &mut Registers, ports: &mut dyn Ports) -> Result<Exit, Fault> {
        let machine = Arc::clone(&self.machine);
        let mmu = machine.mmu(registers.entry.cr3, registers.user);
        let program = registers.program().ok_or(Fault::Exception)?;
        if !self.fetched {
            if !program.verify(&mmu, &registers.entry)? {
                return Err(Fault::Exception);
            }
            self.fetched = true;
        }
        match &mut registers.state {
            State::Workload(cpu) => {
                let mut turn = workload::Turn::new(&mmu)?;
                until_exit(&self.kick, || turn.step(cpu, ports))
            }
            State::Firmware(cpu) => until_exit(&self.kick, || cpu.step(&mmu, ports)),
            State::Helper(cursors) => {
                let index = registers.entry.rdi;
                let (memory, scratch) = match &mut self.worker {
                    Some(worker) => worker,
                    None => match helper::start(&mmu, &machine.helper, index)? {
                        helper::Start::Ready(memory) => self.worker.insert((memory, Box::default())),
                        helper::Start::BadConfig => return Ok(helper::fatal(Fatal::BadConfig)),
                    },
                };
                let mut turn = helper::Turn::new(&mmu, memory, scratch, index, *cursors);
                until_exit(&self.kick, || turn.step(cursors))
            }
            State::Nothing => Err(Fault::Exception),
        }
    }
}

fn until_exit(kick: &Flag, mut step: impl FnMut() -> Result<Option<Exit>, Fault>) -> Result<Exit, Fault> {
    loop {
        if kick.0.swap(false, Ordering::SeqCst) {
            return Ok(Exit::Interrupted);
        }
        if let Some(exit) = step()? {
            return Ok(exit);
        }
    }
}

impl Drop for EmulatedVcpu {
    fn drop(&mut self) {
        // A page of the guest may be in there.
        self.wipe_worker();
    }
}

impl Vcpu for EmulatedVcpu {
    fn enter_user_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError> {
        self.set(Registers::entered(*entry, true))
    }

    fn enter_supervisor_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError> {
        self.set(Registers::entered(*entry, false))
    }

    fn run(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError> {
        if self.kick.0.swap(false, Ordering::SeqCst) {
            return Ok(Exit::Interrupted);
        }
        if let Some(exit) = self.dead {
            return Ok(exit);
        }
        let Some(mut registers) = self.load() else {
            // VMRUN refuses a save area that makes no sense (VMEXIT_INVALID).
            return Ok(Exit::Unexpected { what: "KVM_EXIT_FAIL_ENTRY" });
        };
        let exit = self.go(&mut registers, ports).unwrap_or_else(|fault| {
            let exit = fault.into();
            self.dead = Some(exit);
            exit
        });
        self.keep(registers);
        Ok(exit)
    }

    fn settle(&mut self, _: &mut dyn Ports) -> Result<Option<Exit>, HypervisorError> {
        // A port's answer is in the registers when `run` returns: nothing is ever half done here.
        Ok(None)
    }

    fn save(&mut self) -> Result<Vec<u8>, HypervisorError> {
        match (&self.area, &self.place) {
            (None, Place::Open(registers)) => registers::to_json(Some(registers)),
            _ => registers::to_json(None),
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        match (registers::from_json(state)?, &self.area) {
            (Some(registers), _) => self.set(registers),
            (None, Some(_)) => {
                self.place = Place::Encrypted;
                self.start_over();
                Ok(())
            }
            (None, None) => Err(HypervisorError::BadState {
                source: registers::invalid("a save area is named, but this vCPU has none"),
            }),
        }
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(Arc::clone(&self.kick) as Arc<dyn Kick>)
    }
}
