//! The workload, natively: `mirrorvm_workload`'s program over the software MMU.

use mirrorvm_workload::{BOOT_BYTES, BOOT_VA, Boot, Cpu, Memory, PAGE, PORT_POWER_OFF, Pattern};
use mirrorvm_workload::{RAM_VA, SHARED_VA, Step};

use super::mmu::{Fault, Mmu};
use crate::addr::HelperVa;
use crate::hypervisor::{Exit, Ports};

/// A vCPU's turn at the program.
pub(super) struct Turn<'a> {
    memory: Guest<'a>,
    boot: Option<Boot>,
}

impl<'a> Turn<'a> {
    /// Reads the boot page anew: a program on bare metal keeps it on its stack, which lies in the same
    /// memory.
    pub fn new(mmu: &'a Mmu<'a>) -> Result<Self, Fault> {
        let mut raw = [0; BOOT_BYTES];
        mmu.read(HelperVa::new(BOOT_VA), &mut raw)?;
        Ok(Self { memory: Guest { mmu, page: Box::new([0; PAGE]) }, boot: Boot::decode(&raw) })
    }

    /// Goes on until something leaves to the host; `None` while there is more to do.
    pub fn step(&mut self, cpu: &mut Cpu, ports: &mut dyn Ports) -> Result<Option<Exit>, Fault> {
        let Some(boot) = &self.boot else {
            return Ok(Some(Exit::PortWrite { port: PORT_POWER_OFF, value: 0 }));
        };
        Ok(match cpu.step(&mut self.memory, boot)? {
            Step::More => None,
            Step::In(port) => {
                cpu.answer(ports.read(port));
                Some(Exit::PortRead { port })
            }
            Step::Out(port, value) => Some(Exit::PortWrite { port, value }),
        })
    }
}

struct Guest<'a> {
    mmu: &'a Mmu<'a>,
    /// Where a page is put together before it is written.
    page: Box<[u8; PAGE]>,
}

impl Memory for Guest<'_> {
    type Fault = Fault;

    fn load(&mut self, at: usize) -> Result<u64, Fault> {
        let half = |i| self.mmu.load(shared(at + i)).map(u64::from);
        Ok(half(0)? | half(4)? << 32)
    }

    fn store(&mut self, at: usize, value: u64) -> Result<(), Fault> {
        self.mmu.store(shared(at), value as u32)?;
        self.mmu.store(shared(at + 4), (value >> 32) as u32)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.mmu.write(shared(at), bytes)
    }

    fn matches(&mut self, page: u64, content: Pattern) -> Result<bool, Fault> {
        self.mmu.read(ram(page)?, self.page.as_mut_slice())?;
        Ok(content.matches_bytes(&self.page))
    }

    fn fill(&mut self, page: u64, content: Pattern) -> Result<(), Fault> {
        content.fill_bytes(&mut self.page);
        self.mmu.write(ram(page)?, self.page.as_slice())
    }
}

fn shared(at: usize) -> HelperVa {
    HelperVa::new(SHARED_VA + at as u64)
}

fn ram(page: u64) -> Result<HelperVa, Fault> {
    let at = page.checked_mul(PAGE as u64).and_then(|bytes| RAM_VA.checked_add(bytes));
    at.map(HelperVa::new).ok_or(Fault::Exception)
}
