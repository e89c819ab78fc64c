//! Host memory behind guests and mirrors: backings, mappings, and the RAM of a guest by `RamAddr`.
//!
//! Owns: backings, mappings, access to them. Must not know: KVM, drivers, what the bytes mean. Guest memory
//! changes under our feet: it is reached through volatile copies only, never through a Rust reference.

mod digests;
mod heap;
mod mapping;
mod ram;
mod span;

pub use digests::page_digests;
pub use heap::give_back_heap;
pub use mapping::{Backing, Mapping, MemoryError, View, free_huge_bytes};
pub use ram::{GuestRam, OtherBlocks, OutsideRam};
pub use span::Span;
