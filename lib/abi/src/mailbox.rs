//! The mailbox: memory that host and helper share, in plain sight of both.
//!
//! Per worker: one control page (cursors), one page each for the submission and completion ring, and a
//! number of slots. A slot holds the page numbers of a batch and its payload: sealed records on export
//! and import, parameters and tokens for control operations. Cursors are free-running `u32`s; each has one
//! writer. Both sides copy an entry to private memory before they look at it, and keep their own cursor
//! private, so that a rewritten mailbox can stop the work but never misdirect it.
//!
//! ```text
//! worker w at w * worker_stride(slots):
//!   page 0   control   sq_tail (host) | sq_head (helper) | cq_tail (helper) | cq_head (host) | want_completion, want_at (host)
//!   page 1   submissions, RING_ENTRIES x ENTRY_BYTES
//!   page 2   completions, RING_ENTRIES x ENTRY_BYTES
//!   page 3   reserved
//!   slots    SLOT_BYTES each: page numbers (one page), payload
//! ```

use crate::{PAGE_BYTES, record, u32_at, u64_at};

/// Most pages in one request. Half a MiB: what was just sealed is still in a core's cache when it is sent,
/// and several requests under way cost little memory.
pub const BATCH_MAX: usize = 128;
/// Entries of a ring; a power of two.
pub const RING_ENTRIES: u32 = 32;
/// Bytes of a ring entry.
pub const ENTRY_BYTES: usize = 64;
/// Most slots of a worker; below [`RING_ENTRIES`], so that a ring never overflows.
pub const SLOTS_MAX: u32 = 16;
/// Bytes of a slot: page numbers, then room for a group of [`BATCH_MAX`] pages; a multiple of the page size.
pub const SLOT_BYTES: usize = PAGE_BYTES + PAYLOAD_BYTES.next_multiple_of(PAGE_BYTES);
/// Bytes of payload that a slot takes.
pub const PAYLOAD_BYTES: usize = record::group_bytes(BATCH_MAX);
const _: () = assert!(BATCH_MAX <= record::GROUP_MAX);
/// Where the payload starts in a slot.
pub const PAYLOAD_AT: usize = PAGE_BYTES;

/// Offset of the host's submission cursor in a worker's control page.
pub const SQ_TAIL: usize = 0;
/// Offset of the helper's submission cursor.
pub const SQ_HEAD: usize = 64;
/// Offset of the helper's completion cursor.
pub const CQ_TAIL: usize = 128;
/// Offset of the host's completion cursor.
pub const CQ_HEAD: usize = 192;
/// Offset of the host's wish to be told of the next completion by a doorbell (1) or not (0).
pub const WANT_COMPLETION: usize = 256;
/// Offset of the value of the helper's completion cursor at which the host wants to be told: one doorbell for
/// several completions.
pub const WANT_AT: usize = 320;
/// Offset of the submission ring.
pub const SQ_AT: usize = PAGE_BYTES;
/// Offset of the completion ring.
pub const CQ_AT: usize = 2 * PAGE_BYTES;
/// Offset of slot 0.
pub const SLOTS_AT: usize = 4 * PAGE_BYTES;

/// Bytes that a worker with `slots` slots has.
pub const fn worker_stride(slots: u32) -> usize {
    SLOTS_AT + slots as usize * SLOT_BYTES
}

/// Bytes of the whole mailbox.
pub const fn mailbox_bytes(workers: u32, slots: u32) -> usize {
    workers as usize * worker_stride(slots)
}

/// Offset of a slot in its worker's part.
pub const fn slot_at(slot: u32) -> usize {
    SLOTS_AT + slot as usize * SLOT_BYTES
}

/// Offset of an entry of the ring at `ring` for the free-running `cursor`.
pub const fn entry_at(ring: usize, cursor: u32) -> usize {
    ring + (cursor % RING_ENTRIES) as usize * ENTRY_BYTES
}

/// The I/O port that the helper writes a [`Doorbell`] to.
pub const DOORBELL_PORT: u16 = 0x4d56;

/// Why the helper left the mirror vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Doorbell {
    /// The submission ring is empty; run me again when it is not.
    Idle = 1,
    /// A completion that the host asked to be told of.
    Completion = 2,
    /// The helper has stopped for good; its last words are a [`Fatal`] in the upper bits.
    Fatal = 3,
}

/// Why a helper stopped for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Fatal {
    /// The helper's own code panicked.
    Panic = 1,
    /// The configuration page is not one of this ABI.
    BadConfig = 2,
    /// The host's submission cursor is impossible.
    BadCursor = 3,
    /// The processor gives no random numbers.
    NoEntropy = 4,
}

impl Fatal {
    /// The reason with number `n`, if there is one.
    pub const fn from_u32(n: u32) -> Option<Self> {
        match n {
            1 => Some(Self::Panic),
            2 => Some(Self::BadConfig),
            3 => Some(Self::BadCursor),
            4 => Some(Self::NoEntropy),
            _ => None,
        }
    }
}

/// A request to the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Submission {
    /// The host's number for it; comes back in the completion.
    pub id: u64,
    /// An [`crate::op::Op`] as a number; unknown values are refused, not undefined.
    pub op: u32,
    /// The slot with its input, and the place for its output.
    pub slot: u32,
    /// Pages (export, import); 0 otherwise.
    pub count: u32,
    /// Bytes of input in the slot's payload.
    pub len: u32,
    /// The epoch it belongs to, for exports and imports.
    pub epoch: u32,
}

impl Submission {
    /// Writes an entry.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut b = [0; ENTRY_BYTES];
        b[0..8].copy_from_slice(&self.id.to_le_bytes());
        b[8..12].copy_from_slice(&self.op.to_le_bytes());
        b[12..16].copy_from_slice(&self.slot.to_le_bytes());
        b[16..20].copy_from_slice(&self.count.to_le_bytes());
        b[20..24].copy_from_slice(&self.len.to_le_bytes());
        b[24..28].copy_from_slice(&self.epoch.to_le_bytes());
        b
    }

    /// Reads an entry. Every byte pattern is an entry; whether it makes sense is checked by who acts on it.
    pub const fn decode(b: &[u8; ENTRY_BYTES]) -> Self {
        Self {
            id: u64_at(b, 0),
            op: u32_at(b, 8),
            slot: u32_at(b, 12),
            count: u32_at(b, 16),
            len: u32_at(b, 20),
            epoch: u32_at(b, 24),
        }
    }
}

/// The helper's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Completion {
    /// The request's number.
    pub id: u64,
    /// A [`crate::op::Status`] as a number.
    pub status: u32,
    /// Bytes of output in the slot's payload.
    pub len: u32,
    /// Pages that were done; on a refusal, the index of the offending one.
    pub count: u32,
    /// How many of them were all zero.
    pub zero: u32,
}

impl Completion {
    /// Writes an entry.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut b = [0; ENTRY_BYTES];
        b[0..8].copy_from_slice(&self.id.to_le_bytes());
        b[8..12].copy_from_slice(&self.status.to_le_bytes());
        b[12..16].copy_from_slice(&self.len.to_le_bytes());
        b[16..20].copy_from_slice(&self.count.to_le_bytes());
        b[20..24].copy_from_slice(&self.zero.to_le_bytes());
        b
    }

    /// Reads an entry.
    pub const fn decode(b: &[u8; ENTRY_BYTES]) -> Self {
        Self {
            id: u64_at(b, 0),
            status: u32_at(b, 8),
            len: u32_at(b, 12),
            count: u32_at(b, 16),
            zero: u32_at(b, 20),
        }
    }
}
