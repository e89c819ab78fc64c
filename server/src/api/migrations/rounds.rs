//! Passes over guest memory.

use mirrorvm::host::Round;
use serde::Serialize;
use utoipa::ToSchema;

use crate::problem::MAX_SAFE_INTEGER;

/// One pass over guest memory.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRound {
    /// Number of the round, from 1.
    pub number: u32,
    /// Number of pages that were sent, counting zero pages, of which only a mark is sent.
    pub pages: u64,
    /// How many of them the helper sealed.
    pub pages_encrypted: u64,
    /// How many of them the guest shares with its host.
    pub pages_plain: u64,
    /// How many of them were zero: a sealed mark was sent and no content.
    pub zero_pages: u64,
    /// Bytes of page content that were sent.
    pub bytes: u64,
    /// Length of the round in microseconds.
    pub duration_us: u64,
    /// How many pages the guest wrote meanwhile. 0 for the last round.
    pub dirtied_pages: u64,
    /// How many pages the guest wrote per second.
    pub dirty_pages_per_second: u64,
    /// Whether the guest was paused during the round.
    pub paused: bool,
}

impl From<Round> for MigrationRound {
    fn from(r: Round) -> Self {
        let rate = u128::from(r.dirtied_pages) * 1_000_000 / u128::from(r.duration_us.max(1));
        Self {
            number: r.number,
            pages: r.pages_sealed + r.pages_shared,
            pages_encrypted: r.pages_sealed,
            pages_plain: r.pages_shared,
            zero_pages: r.pages_zero,
            bytes: r.bytes,
            duration_us: r.duration_us,
            dirtied_pages: r.dirtied_pages,
            dirty_pages_per_second: u64::try_from(rate).unwrap_or(u64::MAX).min(MAX_SAFE_INTEGER),
            paused: r.paused,
        }
    }
}

/// The rounds of a migration so far.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationRoundList {
    /// Rounds, the oldest first.
    pub items: Vec<MigrationRound>,
}
