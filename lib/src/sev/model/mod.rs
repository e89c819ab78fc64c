//! A model of SEV: memory that really is ciphertext, a firmware with the published state machine, and KVM's
//! rules above it. It protects nothing; it makes wrong bits visible.
//!
//! Layers: `engine` (the memory controller's cipher) and `state` (a guest's life) are pure; `asids` and
//! `firmware` are the security processor, one command at a time; `context` and `commands` are what KVM makes
//! of it for a VM; `platform` ties them.
//!
//! What differs from hardware on purpose: certificates carry no chain (see [`crate::sev::PlatformCerts`]);
//! secrets are in this process; guest memory is named by a [`crate::memory::Mapping`] and its modelled
//! physical address. RECEIVE_START into a fresh context that shares the key of another guest works as the SEV
//! API says, and so the strategy that sends a helper through the firmware can be tried. Today's kernel lets
//! no mirror receive, and a fresh VM that does is no mirror: it has an ASID of its own.

mod asids;
mod commands;
mod context;
mod engine;
mod firmware;
mod platform;
mod regions;
mod state;

pub use asids::AsidLimits;
pub use context::{ModelContext, SaveAreas};
pub use engine::MemoryKey;
pub use platform::ModelPlatform;
pub use state::{Command, State, step};

#[cfg(test)]
mod tests;
