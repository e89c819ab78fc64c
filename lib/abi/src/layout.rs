//! Where things lie in the helper's virtual address space, and the fingerprint of it all.
//!
//! The lower canonical half only: the helper runs at CPL 3.

/// Where the helper image is linked.
pub const IMAGE_VA: u64 = 0x0040_0000;
/// Most bytes an image may take, bss included.
pub const IMAGE_MAX: u64 = 16 << 20;
/// The configuration page(s), then the secret page; see [`crate::config`].
pub const CONFIG_VA: u64 = 0x1_0000_0000;
/// Most configuration pages.
pub const CONFIG_PAGES_MAX: u64 = 256;
/// The page that holds the guest's migration secret.
pub const SECRET_VA: u64 = 0x1_1000_0000;
/// A zero page for the task state segment. Hardware lets CPL 3 reach I/O ports by IOPL alone; KVM's emulator
/// on hosts without hardware virtualization (PVM) loses the IOPL and looks into the TSS's permission bitmap,
/// where zero means allowed. Without this page the doorbell is a triple fault there.
pub const TSS_VA: u64 = 0x1_1800_0000;
/// Stack and scratch of worker 0; each worker has its own [`WORKER_STRIDE`] further up.
pub const WORKER_VA: u64 = 0x1_2000_0000;
/// Bytes between worker areas; what lies above [`WORKER_BYTES`] stays unmapped as a guard.
pub const WORKER_STRIDE: u64 = 1 << 20;
/// Bytes of a worker's area; the stack grows down from its end.
pub const WORKER_BYTES: u64 = 128 << 10;
/// The page maps: two bits per page of RAM.
pub const MAPS_VA: u64 = 0x2_0000_0000;
/// The page digests, [`DIGEST_BYTES`] a page of RAM; only where the configuration says that there is room for
/// them ([`crate::config::Config::digests`]).
pub const DIGESTS_VA: u64 = 0x40_0000_0000;
/// Bytes of a page's digest.
pub const DIGEST_BYTES: u64 = 16;
/// The mailbox that host and helper share, not encrypted.
pub const MAILBOX_VA: u64 = 0x100_0000_0000;
/// The window on RAM: `RamAddr` 0 appears here.
pub const WINDOW_VA: u64 = 0x1000_0000_0000;
/// Bytes of the window: 64 TiB.
pub const WINDOW_MAX: u64 = 64 << 40;
/// Most workers (mirror vCPUs) of one mirror.
pub const WORKERS_MAX: u32 = 16;

/// FNV-1a over every number that both sides must agree on. A helper carries it in its header; a host
/// refuses another value before any page moves.
pub const LAYOUT_HASH: u64 = {
    let facts = [
        crate::ABI_VERSION as u64,
        IMAGE_VA,
        CONFIG_VA,
        SECRET_VA,
        TSS_VA,
        WORKER_VA,
        WORKER_STRIDE,
        WORKER_BYTES,
        MAPS_VA,
        DIGESTS_VA,
        DIGEST_BYTES,
        MAILBOX_VA,
        WINDOW_VA,
        WORKERS_MAX as u64,
        crate::mailbox::RING_ENTRIES as u64,
        crate::mailbox::ENTRY_BYTES as u64,
        crate::mailbox::SLOT_BYTES as u64,
        crate::mailbox::BATCH_MAX as u64,
        crate::record::RECORD_VERSION as u64,
        crate::record::HEADER_BYTES as u64,
        crate::record::LISTED_BYTES as u64,
        crate::record::TAG_BYTES as u64,
        crate::evidence::EVIDENCE_BYTES as u64,
        crate::evidence::RELEASE_AT as u64,
        crate::evidence::RELEASE_BYTES as u64,
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut i = 0;
    while i < facts.len() {
        let bytes = facts[i].to_le_bytes();
        let mut j = 0;
        while j < bytes.len() {
            hash = (hash ^ bytes[j] as u64).wrapping_mul(0x0000_0100_0000_01b3);
            j += 1;
        }
        i += 1;
    }
    hash
};
