//! The workload's firmware, natively: what `mirrorvm_workload`'s image does at CPL 0 in a few instructions.

use mirrorvm_workload::{
    DECLARATION_AT, DECLARATION_MAX, DECLARATION_VA, FIRMWARE_AGAIN, MSR_KVM_MIGRATION_CONTROL,
    PORT_FIRMWARE, SHARED_VA,
};

use super::mmu::{Fault, Mmu};
use crate::addr::HelperVa;
use crate::hypervisor::{Exit, Ports};

/// Where the firmware stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Cpu {
    /// The declaration is to be copied.
    #[default]
    Declare,
    /// It is time to ask what to write.
    Ask,
    /// The host has answered.
    Answered(u32),
}

impl Cpu {
    pub fn encode(self) -> u64 {
        match self {
            Self::Declare => 0,
            Self::Ask => 1,
            Self::Answered(value) => 2 | u64::from(value) << 32,
        }
    }

    pub fn decode(word: u64) -> Option<Self> {
        match (word as u32, (word >> 32) as u32) {
            (0, 0) => Some(Self::Declare),
            (1, 0) => Some(Self::Ask),
            (2, value) => Some(Self::Answered(value)),
            _ => None,
        }
    }

    /// Goes on until something leaves to the host; `None` while there is more to do.
    pub fn step(&mut self, mmu: &Mmu<'_>, ports: &mut dyn Ports) -> Result<Option<Exit>, Fault> {
        match *self {
            Self::Declare => {
                declare(mmu)?;
                *self = Self::Ask;
                Ok(None)
            }
            Self::Ask => {
                *self = Self::Answered(ports.read(PORT_FIRMWARE));
                Ok(Some(Exit::PortRead { port: PORT_FIRMWARE }))
            }
            Self::Answered(value) => {
                *self = Self::Ask;
                let write = Exit::MsrWrite { msr: MSR_KVM_MIGRATION_CONTROL, value: u64::from(value) };
                Ok((value != FIRMWARE_AGAIN).then_some(write))
            }
        }
    }
}

/// The count as it stands, and of the tuples as many as there is room for.
fn declare(mmu: &Mmu<'_>) -> Result<(), Fault> {
    let (from, to) = (HelperVa::new(DECLARATION_VA), HelperVa::new(SHARED_VA + DECLARATION_AT as u64));
    let mut count = [0; 8];
    mmu.read(from, &mut count)?;
    let tuples = u64::from_le_bytes(count).min(DECLARATION_MAX as u64) as usize;
    let mut all = vec![0; 8 + tuples * 24];
    mmu.read(from, &mut all)?;
    mmu.write(to, &all)
}
