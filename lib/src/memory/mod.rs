//! Host memory behind guests and mirrors: backings, mappings, and the RAM of a guest by `RamAddr`.
//!
//! Owns: backings, mappings, access to them, the book of what was promised. Must not know: KVM, drivers, what
//! the bytes mean. Guest memory changes under our feet: it is reached through volatile copies only, never
//! through a Rust reference.

mod budget;
mod digests;
mod foreign;
mod heap;
mod limits;
mod mapping;
#[cfg(test)]
pub(crate) mod plain;
mod ram;
mod secret;
mod span;

pub use budget::{Budget, Claim, Purpose, Shortage};
pub use digests::page_digests;
pub use foreign::{BadFile, ForeignRamError};
pub use heap::{give_back_heap, share_heap};
pub use limits::Bound;
pub use mapping::{Backing, Mapping, MemoryError, View};
pub use ram::{GuestRam, OtherBlocks, OutsideRam};
pub use secret::{Secret, SecretMemory, secret_memory};
pub use span::Span;
