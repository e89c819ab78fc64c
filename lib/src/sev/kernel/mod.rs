//! SEV of the host's processor, through KVM and `/dev/sev`.
//!
//! Owns: whether SEV is there and what is missing for it (`probe`), commands with their structures and
//! buffers (`call`), the one raw request (`ioctls`), a list of what was asked (`trace`),
//! a VM's context and the platform. Must not know: guests' meaning, strategies.
//!
//! None of this ever ran on hardware with SEV: there was none. Sequence, structures and the mapping of errors
//! are tested against a recorder in the kernel's place. What today's kernel cannot do is refused with the
//! reason: anything but four commands on a mirror, so also receiving into one; sending and receiving SEV-ES
//! guests; copying the context of an SEV-SNP guest. SEV-SNP guests are not launched at all.
//!
//! VMs are made with the kernel's default type here, for which KVM_SEV_INIT and KVM_SEV_ES_INIT are the way
//! in; a VM of type KVM_X86_SEV_VM or KVM_X86_SEV_ES_VM takes KVM_SEV_INIT2, which is tried first.

mod call;
mod context;
mod ioctls;
mod platform;
mod probe;
mod source;
mod trace;

pub use context::{KernelContext, VmKind};
pub use platform::KernelPlatform;
pub use probe::{Missing, Support, probe};
pub use source::KernelSource;
pub use trace::{Issued, Trace};

#[cfg(test)]
mod tests;
