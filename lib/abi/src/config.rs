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
    /// What guards the guest: [`PROTECTION_NONE`] and up.
    pub protection: u32,
    /// The guest's SEV policy; 0 at [`PROTECTION_NONE`].
    pub policy: u32,
    /// Page numbers below this have room for a digest at [`crate::layout::DIGESTS_VA`]: 0, or all of `pages`.
    pub digests: u64,
}

/// Nothing: the host can read all memory.
pub const PROTECTION_NONE: u32 = 0;
/// The model of SEV.
pub const PROTECTION_MODELLED: u32 = 1;
/// SEV.
pub const PROTECTION_SEV: u32 = 2;
/// SEV-ES.
pub const PROTECTION_SEV_ES: u32 = 3;
/// Policy bit: the guest cannot be debugged (SEV API, table 2). Without it a host reads the guest through its
/// mirror.
pub const POLICY_NODBG: u32 = 1 << 0;
/// Policy bit: the guest must not leave its platform.
pub const POLICY_NOSEND: u32 = 1 << 3;

/// Pages of RAM that the helper may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First page.
    pub first: u64,
    /// Pages, at least 1.
    pub count: u64,
}

impl Config {
    /// Whether the guest's policy lets its pages leave, and keeps its host from reading them another way.
    pub const fn may_leave(&self) -> bool {
        self.protection == PROTECTION_NONE || self.policy & (POLICY_NODBG | POLICY_NOSEND) == POLICY_NODBG
    }

    /// Writes the fixed part.
    pub fn encode(&self) -> [u8; FIXED_BYTES] {
        let mut b = [0; FIXED_BYTES];
        b[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        b[8..12].copy_from_slice(&crate::ABI_VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&self.workers.to_le_bytes());
        b[16..20].copy_from_slice(&self.slots.to_le_bytes());
        b[20..24].copy_from_slice(&self.ranges.to_le_bytes());
        b[24..32].copy_from_slice(&self.pages.to_le_bytes());
        b[32..36].copy_from_slice(&self.protection.to_le_bytes());
        b[36..40].copy_from_slice(&self.policy.to_le_bytes());
        b[40..48].copy_from_slice(&self.digests.to_le_bytes());
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
            protection: u32_at(b, 32),
            policy: u32_at(b, 36),
            digests: u64_at(b, 40),
        };
        let fits = (FIXED_BYTES as u64 + u64::from(c.ranges) * RANGE_BYTES as u64)
            <= crate::layout::CONFIG_PAGES_MAX * crate::PAGE_BYTES as u64;
        let sane = (1..=crate::layout::WORKERS_MAX).contains(&c.workers)
            && (1..=crate::mailbox::SLOTS_MAX).contains(&c.slots)
            && c.protection <= PROTECTION_SEV_ES
            && c.pages <= crate::layout::WINDOW_MAX / crate::PAGE_BYTES as u64
            && (c.digests == 0 || c.digests == c.pages);
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
