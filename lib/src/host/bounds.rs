//! What the numbers of a request may be.
//!
//! Owns: each bound, once. The library's checks, the reading of requests and the API's document all go by these, so that
//! nobody is sent from one bound to the next. Must not know: requests, messages.

use std::ops::RangeInclusive;

/// vCPUs of a guest.
pub const VCPUS: RangeInclusive<u64> = 1..=16;
/// Threads of a mirror's helper.
pub const WORKERS: RangeInclusive<u64> = 1..=16;
/// Streams of a migration.
pub const STREAMS: RangeInclusive<u64> = 1..=16;
/// Migrations of a host that go on at the same time.
pub const MIGRATION_SLOTS: RangeInclusive<u64> = 1..=16;
/// Pause that a migration may take, milliseconds.
pub const DOWNTIME_MS: RangeInclusive<u64> = 0..=3_600_000;
/// Time that a migration may take, milliseconds: at most a week.
pub const TIMEOUT_MS: RangeInclusive<u64> = 1..=604_800_000;
/// Time for which a link may be silent, milliseconds.
pub const STALL_TIMEOUT_MS: RangeInclusive<u64> = 1_000..=600_000;
/// Bandwidth limit, bytes per second. A full frame of 2 MiB must fit the peer's frame deadline.
pub const BANDWIDTH: RangeInclusive<u64> = 1 << 20..=1 << 50;
/// Bytes per second that a workload of ours dirties.
pub const DIRTY_RATE: RangeInclusive<u64> = 0..=1 << 40;
