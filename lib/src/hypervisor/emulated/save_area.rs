//! The page that holds the registers of an SEV-ES vCPU while it does not run.

use std::sync::Arc;

use super::registers::{AREA_BYTES, Registers, from_area, to_area};
use crate::memory::Mapping;
use crate::sev::model::MemoryKey;

/// One vCPU's save area (VMSA), a page.
#[derive(Debug)]
pub(super) struct SaveArea {
    memory: Arc<Mapping>,
    offset: u64,
}

impl SaveArea {
    /// The page at `offset`, a multiple of the page size inside the mapping.
    pub fn new(memory: Arc<Mapping>, offset: u64) -> Self {
        Self { memory, offset }
    }

    /// Where the save area's page lies in host memory.
    pub fn place(&self) -> (Arc<Mapping>, u64) {
        (Arc::clone(&self.memory), self.offset)
    }

    /// Writes registers as the kernel does before LAUNCH_UPDATE_VMSA.
    pub fn put_plain(&self, registers: &Registers) {
        self.memory.write(self.offset, &to_area(registers));
    }

    /// What VMRUN loads; `None` when the page makes no sense under `key`.
    pub fn load(&self, key: &MemoryKey) -> Option<Registers> {
        let mut bytes = [0; AREA_BYTES];
        key.read(&self.memory, self.offset, &mut bytes);
        from_area(&bytes)
    }

    /// What the processor stores at an exit.
    pub fn store(&self, key: &MemoryKey, registers: &Registers) {
        key.write(&self.memory, self.offset, &to_area(registers));
    }
}
