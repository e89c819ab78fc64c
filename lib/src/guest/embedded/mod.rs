//! The `embedded` and `emulated` drivers: this process is the VMM, on KVM or as a software machine; the guest
//! is the built-in workload.
//!
//! Owns: loading the workload and the helper into RAM, vCPU threads, ports. Must not know: mirrors,
//! migration.

mod launch;
mod machine;
mod ports;
mod sev;
mod throttle;
mod vcpu;

pub use launch::{WorkloadBoot, WorkloadPlan};
pub use machine::{Embedded, EmbeddedSetup, EmbeddedSpec};
pub use ports::CheckDeclaration;
pub use sev::{SevSetup, add_save_areas, level};

/// The workload image, built by the build script.
pub static WORKLOAD_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mirrorvm-workload.bin"));
