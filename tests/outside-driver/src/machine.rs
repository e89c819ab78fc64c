//! The outside driver's machine.

use std::sync::Arc;

use mirrorvm::addr::RamPage;
use mirrorvm::guest::{Console, EncryptionStatus, EndWatch, Machine, MachineError, MigrationControl};
use mirrorvm::memory::{GuestRam, Secret};
use mirrorvm::pages::PageSet;

use crate::writer::{Writer, pages};

/// A machine with one thread for a processor.
pub struct OutsideMachine {
    writer: Writer,
    ram: GuestRam,
    console: Arc<Console>,
    encryption: Arc<EncryptionStatus>,
    control: Arc<MigrationControl>,
    secret: Secret<32>,
    loses: Option<RamPage>,
}

impl OutsideMachine {
    pub fn new(ram: GuestRam, secret: Secret<32>, pages_per_second: u64) -> Result<Self, MachineError> {
        let console = Arc::new(Console::default());
        let writer = Writer::new(ram.clone(), Arc::clone(&console), pages_per_second);
        let (encryption, control) = (Arc::default(), Arc::new(MigrationControl::new(false)));
        let writer = writer.map_err(MachineError::Thread)?;
        Ok(Self { writer, ram, console, encryption, control, secret, loses: None })
    }

    /// Has a page change whenever the state is saved, and nobody notice.
    pub const fn loses(&mut self, page: Option<RamPage>) {
        self.loses = page;
    }

    /// Empties RAM of what was in its files.
    pub fn boot(&mut self, greeting: &str) -> Result<(), MachineError> {
        for page in pages(&self.ram) {
            let written = self.ram.write_page(page, &[0; 4096]);
            written.map_err(|_| MachineError::BadState { what: "RAM is not where the layout has it" })?;
        }
        self.console.append(greeting.as_bytes());
        self.console.append(b"\n");
        Ok(())
    }
}

impl Machine for OutsideMachine {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn console(&self) -> &Arc<Console> {
        &self.console
    }

    fn encryption(&self) -> &Arc<EncryptionStatus> {
        &self.encryption
    }

    fn migration_control(&self) -> &Arc<MigrationControl> {
        &self.control
    }

    fn migration_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.writer.run(true);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.writer.run(false);
        Ok(())
    }

    fn can_log_dirty(&self) -> bool {
        true
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), MachineError> {
        self.writer.log(on);
        Ok(())
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), MachineError> {
        let log = self.writer.take_log();
        dirty.union(&log.ok_or(MachineError::Unsupported { what: "tell what was not logged" })?);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        if let Some(page) = self.loses {
            let written = self.ram.write_page(page, &[0x5e; 4096]);
            written.map_err(|_| MachineError::BadState { what: "there is no such page" })?;
        }
        Ok(self.writer.written().to_le_bytes().to_vec())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let bytes =
            state.try_into().map_err(|_| MachineError::BadState { what: "it has not eight bytes" })?;
        self.writer.set_written(u64::from_le_bytes(bytes));
        Ok(())
    }

    fn end_watch(&self) -> EndWatch {
        EndWatch::new(|| None)
    }
}
