//! The `embedded` driver: this process is the VMM, the guest is the built-in workload.
//!
//! Owns: loading the workload and the helper into RAM, vCPU threads, ports. Must not know: mirrors, migration.

mod launch;
mod machine;
mod ports;
mod vcpu;

pub use launch::{WorkloadPlan, load_helper};
pub use machine::{Embedded, EmbeddedSetup, EmbeddedSpec};

/// The workload image, built by the build script.
pub static WORKLOAD_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mirrorvm-workload.bin"));
