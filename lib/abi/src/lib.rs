//! The contract between a host and the migration helper inside a mirror VM.
//!
//! Owns: addresses, sizes, byte layouts, numbers; encoding and decoding of them, without I/O. Must not
//! know: keys, KVM, allocation, which side it runs on. Both sides treat what they decode here as bytes
//! from a stranger: decoding never panics and never trusts a length.
#![no_std]
#![forbid(unsafe_code)]

pub mod config;
pub mod evidence;
pub mod header;
pub mod layout;
pub mod mailbox;
pub mod op;
pub mod record;
pub mod ring;

/// Version of everything in this crate. A helper and a host work together when the helper's range
/// ([`header::Header::abi_min`] to [`header::Header::abi_max`]) holds the host's version.
pub const ABI_VERSION: u32 = 5;

/// Bytes in a page of RAM.
pub const PAGE_BYTES: usize = 4096;

/// Reads a little-endian `u16` at `at`; the caller has checked the length.
pub(crate) const fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

/// Reads a little-endian `u32` at `at`; the caller has checked the length.
pub(crate) const fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Reads a little-endian `u64` at `at`; the caller has checked the length.
pub(crate) const fn u64_at(b: &[u8], at: usize) -> u64 {
    (u32_at(b, at) as u64) | ((u32_at(b, at + 4) as u64) << 32)
}
