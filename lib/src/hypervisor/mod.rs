//! What runs guests and mirrors: traits, and their implementations: KVM, and a software machine.
//!
//! Owns: VMs, memory slots, vCPUs, exits. Must not know: guests' meaning, mirrors, migration. The KVM module
//! is the one door to the kernel's virtualization; all its `unsafe` has SAFETY comments.

pub mod emulated;
mod error;
mod kick;
pub mod kvm;
mod kvm_access;

use std::sync::Arc;

pub use error::HypervisorError;
pub use kick::Kicker;
pub use kvm_access::kvm_denied_fix;

use crate::address_space::HostLimits;
use crate::memory::{Mapping, View};
use crate::sev;

/// Something that makes virtual machines: `/dev/kvm`, or the software machine.
pub trait Hypervisor: Send + Sync {
    /// Name of the implementation: `kvm` or `emulated`.
    fn name(&self) -> &'static str;

    /// A VM without slots and vCPUs, without an interrupt controller.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn create_vm(&self) -> Result<Box<dyn Vm>, HypervisorError>;

    /// Limits for address spaces, from CPUID and KVM.
    fn limits(&self) -> HostLimits;

    /// Its security processor; `None` without SEV.
    fn sev(&self) -> Option<Arc<dyn sev::Platform>>;
}

/// A number of a memory slot, unique in its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// A memory slot to be set.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Where the VM sees it; the guest's or the mirror's own physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The memory behind it.
    pub memory: Arc<Mapping>,
    /// Where in that memory the slot starts.
    pub offset: u64,
    /// Through which view of it: a guest's own, or the one that never waits, for mirrors.
    pub view: View,
    /// Whether writes are logged. Never for a mirror.
    pub dirty_log: bool,
    /// Whether the VM may only read it; a write leaves to the host.
    pub read_only: bool,
}

/// A virtual machine. Dropping it ends it; memory that slots use is held until then.
pub trait Vm: Send {
    /// Adds a slot, or changes the dirty logging of one that is otherwise the same.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn set_slot(&mut self, id: SlotId, slot: Slot) -> Result<(), HypervisorError>;

    /// Removes a slot; its memory stays as it is.
    ///
    /// # Errors
    /// No such slot, or what the kernel refuses.
    fn remove_slot(&mut self, id: SlotId) -> Result<(), HypervisorError>;

    /// The pages of a logged slot that were written since the last call, one bit each, and starts over.
    ///
    /// # Errors
    /// When the slot is not logged, or the kernel fails.
    fn take_dirty_log(&mut self, id: SlotId) -> Result<Vec<u64>, HypervisorError>;

    /// The dirty log as something that is looked at and cleared in pieces, from any thread; `None` where the
    /// hypervisor has only [`Vm::take_dirty_log`].
    fn dirty_log(&self) -> Option<Arc<dyn DirtyLog>> {
        None
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn create_vcpu(&mut self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError>;

    /// Its encryption context, to be initialized, launched or copied into before vCPUs exist; `None` on a
    /// host without SEV.
    fn sev(&self) -> Option<Arc<dyn sev::Context>>;

    /// SEV-ES, modelled: where the save area (VMSA) of vCPU `index` lies, one page, before that vCPU is made.
    /// On real hardware the kernel owns that page and no slot shows it.
    ///
    /// # Errors
    /// [`HypervisorError::Unsupported`] on every hypervisor but the software machine.
    fn place_save_area(
        &mut self,
        index: u32,
        memory: Arc<Mapping>,
        offset: u64,
    ) -> Result<(), HypervisorError> {
        let _ = (index, memory, offset);
        Err(HypervisorError::Unsupported { what: "place a save area" })
    }
}

/// The dirty log of a VM's logged slots (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): every page is marked when
/// logging begins.
pub trait DirtyLog: Send + Sync {
    /// The marked pages of a slot, one bit each.
    ///
    /// # Errors
    /// When the slot is not logged, or the kernel fails.
    fn look(&self, id: SlotId) -> Result<Vec<u64>, HypervisorError>;

    /// Takes marks off: those of `bits`, of 64 pages each, from page `first` of the slot on, a multiple of
    /// 64. A write that comes later marks its page again.
    ///
    /// # Errors
    /// When the slot is not logged, or the kernel fails.
    fn clear(&self, id: SlotId, first: u64, bits: &[u64]) -> Result<(), HypervisorError>;
}

/// Why a vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It wrote `value` to a port.
    PortWrite {
        /// Number of the port.
        port: u16,
        /// What was written, zero-extended.
        value: u32,
    },
    /// It read a port; the answer was given.
    PortRead {
        /// Number of the port.
        port: u16,
    },
    /// It touched an address without memory.
    Mmio {
        /// The physical address that was accessed.
        gpa: u64,
        /// Whether the access was a write.
        write: bool,
    },
    /// It wrote a model-specific register that leaves to the host.
    MsrWrite {
        /// Number of the register.
        msr: u32,
        /// The value that was written.
        value: u64,
    },
    /// It read a model-specific register that leaves to the host; the answer was given, see
    /// [`Ports::read_msr`].
    MsrRead {
        /// Number of the register.
        msr: u32,
    },
    /// It read or wrote such a register in a way that it does not allow: the guest gets #GP.
    MsrRefused {
        /// Number of the register.
        msr: u32,
    },
    /// It made a hypercall that leaves to the host (KVM_EXIT_HYPERCALL); it was carried out, see
    /// [`Ports::hypercall`].
    Hypercall {
        /// Number of the hypercall, `KVM_HC_*`.
        nr: u64,
    },
    /// The vCPU has halted.
    Halt,
    /// A fault that it could not handle ended it (triple fault).
    Shutdown,
    /// Another thread has kicked the vCPU out of guest mode.
    Interrupted,
    /// An exit that nothing here asks for.
    Unexpected {
        /// The hypervisor's name for it.
        what: &'static str,
    },
}

/// What is known of a vCPU that came back for the last time, for whoever has to find out why. Of its
/// registers only those that say where it stood: what a guest computes with is its own affair, and its memory
/// is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastExit {
    /// The hypervisor's name for the exit.
    pub reason: &'static str,
    /// What the hypervisor adds: the hardware's reason of a failed entry, the sub-error of an internal error;
    /// otherwise 0.
    pub code: u64,
    /// How many exits there were.
    pub exits: u64,
    /// The exits before it, the latest first.
    pub before: [Option<Exit>; LAST_EXITS],
    /// Where it stood. `None` when the registers cannot be read, as those of an SEV-ES guest. AMD's
    /// processors lose them with a triple fault: KVM then shows those of a reset vCPU.
    pub stood: Option<Stood>,
}

/// How many exits are remembered.
pub const LAST_EXITS: usize = 4;

/// Where a vCPU stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the registers' own names")]
pub struct Stood {
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cs: u16,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// Answers a vCPU's port reads, on its thread, before it goes on.
pub trait Ports {
    /// The value of `port`.
    fn read(&mut self, port: u16) -> u32;

    /// The value of a model-specific register that leaves to the host; `None` gives the guest #GP.
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        let _ = msr;
        None
    }

    /// Whether such a register takes `value`. A value that it does not take gives the guest #GP, and is not
    /// reported as [`Exit::MsrWrite`].
    fn takes_msr(&self, msr: u32, value: u64) -> bool {
        let _ = (msr, value);
        true
    }

    /// Carries out a hypercall that leaves to the host; gives what the guest finds in RAX.
    fn hypercall(&mut self, nr: u64, args: &[u64; 6]) -> u64 {
        let _ = (nr, args);
        KVM_ENOSYS.wrapping_neg()
    }
}

/// A hypercall that is not known (include/uapi/linux/kvm_para.h); negated in RAX.
pub const KVM_ENOSYS: u64 = 1000;

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
    /// Address of the first instruction.
    pub rip: u64,
    /// Initial stack pointer.
    pub rsp: u64,
    /// First argument of the entry point.
    pub rdi: u64,
    /// Physical address of the root page table.
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

    /// The same at CPL 0, for a few instructions that need it (WRMSR). Where KVM has no hardware
    /// virtualization they are interpreted: slow, integer instructions only, no way down to CPL 3.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn enter_supervisor_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError>;

    /// Runs until an exit.
    ///
    /// # Errors
    /// When the kernel cannot run it at all.
    fn run(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError>;

    /// Finishes an exit that is half done (a port access completes on the next entry), so that registers can
    /// be saved. An instruction that leaves several times (`rep outs`) may come back with its next exit,
    /// which is then to be acted upon like any other, and to be settled as well.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn settle(&mut self, ports: &mut dyn Ports) -> Result<Option<Exit>, HypervisorError>;

    /// Its registers as bytes. An exit that is half done is finished first: whether the instruction pointer
    /// stands at a port access or behind it at its exit differs between kinds of KVM, and the saved state
    /// must never repeat one.
    ///
    /// # Errors
    /// What the kernel refuses, and [`HypervisorError::Unsettled`].
    fn save(&mut self) -> Result<Vec<u8>, HypervisorError>;

    /// Sets its registers from what [`Vcpu::save`] gave, here or on another host.
    ///
    /// # Errors
    /// Bytes that are no saved state, or that the kernel refuses.
    fn restore(&mut self, state: &[u8]) -> Result<(), HypervisorError>;

    /// What is known of its last exit; `None` before the first, and from machines that keep no such thing.
    fn last_exit(&self) -> Option<LastExit> {
        None
    }

    /// Gets it out of [`Vcpu::run`] from another thread.
    fn kicker(&self) -> Kicker;
}
