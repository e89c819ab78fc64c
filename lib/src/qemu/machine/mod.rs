//! A machine as it is defined, and as QEMU is told of it.
//!
//! Owns: the parts of a definition, what cannot be, which place a device has, and the command line. Pure: no
//! file is opened and nothing is started here. Must not know: guests, hosts, requests.

mod check;
mod line;
mod parts;
mod passed;
#[cfg(test)]
mod tests;

pub use check::{Family, default_cpu};
pub(super) use line::Line;
pub use parts::{
    Backing, Bus, Cache, CloudInit, Cpu, Discard, Disk, Firmware, Format, Forward, IoLimits, Mac, Machine,
    Media, Network, Nic, NicModel, OnError, OnReboot, Place, Protocol, Rtc, Smbios, Topology,
};
pub use passed::{DiskFiles, Passed};
