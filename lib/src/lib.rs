//! Mirror VMs on KVM: guests, their mirrors under selectable address-space strategies, and live migration
//! through a helper that runs in the mirror.
//!
//! Floors, of which lower ones know nothing of higher ones (a test holds that): `addr < pages < address_space
//! < memory < sev < hypervisor < guest < mirror < migration < host`. `store` and `transport` are below
//! `migration`; `boot_files`, `qemu` and `waiting` at the bottom. `address_space` is pure: no file, no clock,
//! no kernel. `unsafe` is in `hypervisor::kvm`, `sev::kernel`, `memory` (what is said of an address range to
//! the kernel, and pages for secrets) and `qemu::start` (between fork and exec). The engine (`migration` and
//! what is below) is of use without the `host` and its database: `lib/tests/engines.rs` moves a guest so.

pub mod addr;
pub mod address_space;
pub mod boot_files;
pub mod chain;
pub mod codes;
pub mod guest;
pub mod host;
pub mod hypervisor;
pub mod memory;
pub mod migration;
pub mod mirror;
mod named;
pub mod pages;
mod private_files;
pub mod qemu;
pub mod reading;
pub mod sev;
pub mod store;
pub mod sync;
pub mod threads;
pub mod transport;
mod waiting;

pub use private_files::PrivateFileError;
