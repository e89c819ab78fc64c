//! The configuration that the loader writes into the helper's own memory before its first instruction.
//!
//! Private to the helper (on SEV it is part of the launch measurement): unlike the mailbox it does not
//! change under the helper's feet. The list of ranges is the allow-list of what may be exported; the
//! helper's own block is never on it.

use crate::{u32_at, u64_at};

/// Marks a configuration: "mvmconf1".
pub const MAGIC: u64 = u64::from_le_bytes(*b"mvmconf1");
/// Bytes before the list of ranges.
pub const FIXED_BYTES: usize = 64;
/// Bytes of one range.
pub const RANGE_BYTES: usize = 16;
/// Marks a secret page that holds a secret: "mvmkey01".
pub const SECRET_MAGIC: u64 = u64::from_le_bytes(*b"mvmkey01");
/// Bytes of the guest's migration secret, right behind its magic.
pub const SECRET_BYTES: usize = 32;

/// The fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Mirror vCPUs, 1 to [`crate::layout::WORKERS_MAX`].
    pub workers: u32,
    /// Slots per worker, 1 to [`crate::mailbox::SLOTS_MAX`].
    pub slots: u32,
    /// One more than the highest page number in the ranges.
    pub pages: u64,
    /// Ranges that follow.
    pub ranges: u32,
}

/// Pages of RAM that the helper may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First page.
    pub first: u64,
    /// Pages, at least 1.
    pub count: u64,
}

impl Config {
    /// Writes the fixed part.
    pub fn encode(&self) -> [u8; FIXED_BYTES] {
        let mut b = [0; FIXED_BYTES];
        b[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        b[8..12].copy_from_slice(&crate::ABI_VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&self.workers.to_le_bytes());
        b[16..20].copy_from_slice(&self.slots.to_le_bytes());
        b[20..24].copy_from_slice(&self.ranges.to_le_bytes());
        b[24..32].copy_from_slice(&self.pages.to_le_bytes());
        b
    }

    /// Reads the fixed part; `None` when it is not one of this ABI or out of bounds.
    pub fn decode(b: &[u8; FIXED_BYTES]) -> Option<Self> {
        if u64_at(b, 0) != MAGIC || u32_at(b, 8) != crate::ABI_VERSION {
            return None;
        }
        let c = Self {
            workers: u32_at(b, 12),
            slots: u32_at(b, 16),
            ranges: u32_at(b, 20),
            pages: u64_at(b, 24),
        };
        let fits = (FIXED_BYTES as u64 + u64::from(c.ranges) * RANGE_BYTES as u64)
            <= crate::layout::CONFIG_PAGES_MAX * crate::PAGE_BYTES as u64;
        let sane = (1..=crate::layout::WORKERS_MAX).contains(&c.workers)
            && (1..=crate::mailbox::SLOTS_MAX).contains(&c.slots)
            && c.pages <= crate::layout::WINDOW_MAX / crate::PAGE_BYTES as u64;
        (fits && sane).then_some(c)
    }
}

impl Range {
    /// Writes a range.
    pub fn encode(&self) -> [u8; RANGE_BYTES] {
        let mut b = [0; RANGE_BYTES];
        b[..8].copy_from_slice(&self.first.to_le_bytes());
        b[8..].copy_from_slice(&self.count.to_le_bytes());
        b
    }

    /// Reads a range.
    pub fn decode(b: &[u8; RANGE_BYTES]) -> Self {
        Self { first: u64_at(b, 0), count: u64_at(b, 8) }
    }
}
