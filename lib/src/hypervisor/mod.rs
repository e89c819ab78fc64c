//! What runs guests and mirrors: traits, and their implementation on KVM.
//!
//! Owns: VMs, memory slots, vCPUs, exits. Must not know: guests' meaning, mirrors, migration. The KVM module
//! is the one door to the kernel's virtualization; all its `unsafe` has SAFETY comments.

mod error;
pub mod kvm;

use std::sync::Arc;

pub use error::HypervisorError;

use crate::memory::Mapping;

/// A number of a memory slot, unique in its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// A memory slot to be set.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Where the VM sees it; the guest's or the mirror's own physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The memory behind it.
    pub memory: Arc<Mapping>,
    /// Where in that memory the slot starts.
    pub offset: u64,
    /// Whether writes are logged. Never for a mirror.
    pub dirty_log: bool,
}

/// A virtual machine. Dropping it ends it; memory that slots use is held until then.
pub trait Vm: Send {
    /// Adds a slot, or changes the dirty logging of one that is otherwise the same.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn set_slot(&mut self, id: SlotId, slot: Slot) -> Result<(), HypervisorError>;

    /// The pages of a logged slot that were written since the last call, one bit each, and starts over.
    ///
    /// # Errors
    /// When the slot is not logged, or the kernel fails.
    fn take_dirty_log(&mut self, id: SlotId) -> Result<Vec<u64>, HypervisorError>;

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn create_vcpu(&mut self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError>;
}

/// Why a vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It wrote `value` to a port.
    PortWrite {
        /// The port.
        port: u16,
        /// What was written, zero-extended.
        value: u32,
    },
    /// It read a port; the answer was given.
    PortRead {
        /// The port.
        port: u16,
    },
    /// It touched an address without memory.
    Mmio {
        /// The physical address.
        gpa: u64,
        /// Whether it wrote.
        write: bool,
    },
    /// It halted.
    Halt,
    /// A fault that it could not handle ended it (triple fault).
    Shutdown,
    /// It was kicked.
    Interrupted,
    /// An exit that nothing here asks for.
    Unexpected {
        /// The hypervisor's name for it.
        what: &'static str,
    },
}

/// Answers a vCPU's port reads, on its thread, before it goes on.
pub trait Ports {
    /// The value of `port`.
    fn read(&mut self, port: u16) -> u32;
}

/// Ports of a machine that has none to read.
pub struct NoPorts;

impl Ports for NoPorts {
    fn read(&mut self, _: u16) -> u32 {
        u32::MAX
    }
}

/// How a bare-metal program is entered: 64-bit mode, CPL 3, IOPL 3, interrupts enabled but none there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserEntry {
    /// First instruction.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// First argument.
    pub rdi: u64,
    /// Page tables.
    pub cr3: u64,
    /// Task state segment: a mapped span of 4 KiB of zeroes at most, see `mirrorvm_abi::layout::TSS_VA`.
    pub tss: u64,
}

/// A virtual CPU. Belongs to one thread at a time.
pub trait Vcpu: Send {
    /// Prepares a bare-metal program's first instruction.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn enter_user_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError>;

    /// Runs until an exit.
    ///
    /// # Errors
    /// When the kernel cannot run it at all.
    fn run(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError>;

    /// Finishes an exit that is half done (a port access completes on the next entry), so that registers can be
    /// saved.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn settle(&mut self) -> Result<(), HypervisorError>;

    /// Its registers as bytes, after [`Vcpu::settle`].
    ///
    /// # Errors
    /// What the kernel refuses.
    fn save(&mut self) -> Result<Vec<u8>, HypervisorError>;

    /// Sets its registers from what [`Vcpu::save`] gave, here or on another host.
    ///
    /// # Errors
    /// Bytes that are no saved state, or that the kernel refuses.
    fn restore(&mut self, state: &[u8]) -> Result<(), HypervisorError>;

    /// Gets it out of [`Vcpu::run`] from another thread.
    fn kicker(&self) -> Kicker;
}

pub use kvm::kick::Kicker;
