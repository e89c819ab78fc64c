//! What the numbers of a request may be, and the lengths of its texts.
//!
//! Owns: each bound, once. The library's checks, the reading of requests and the API's document all go by
//! these, so that nobody is sent from one bound to the next. Must not know: requests, messages.

use std::ops::RangeInclusive;

use crate::guest::REPORT_PAGES_MAX;
pub use crate::guest::driver::{VCPUS, WORKERS};
pub use crate::migration::terms::{
    AUDIT_TIMEOUT_MS, BANDWIDTH, DOWNTIME_MS, STALL_TIMEOUT_MS, STREAMS, TIMEOUT_MS,
};
use crate::mirror::{BATCH_PAGES_MAX, FIFO_PRIORITIES};

/// Migrations of a host that go on at the same time.
pub const MIGRATION_SLOTS: RangeInclusive<u64> = 1..=16;
/// Pages of one report of page status.
pub const REPORT_PAGES: RangeInclusive<u64> = 1..=REPORT_PAGES_MAX;
/// Pages of a sealed batch.
pub const BATCH_PAGES: RangeInclusive<u64> = 0..=BATCH_PAGES_MAX as u64;
/// Bytes of one of its ranges.
pub const BATCH_RANGE_BYTES: RangeInclusive<u64> = 4096..=4096 * BATCH_PAGES_MAX as u64;
/// Priority of threads under `SCHED_FIFO`.
pub const PRIORITY: RangeInclusive<u64> = *FIFO_PRIORITIES.start() as u64..=*FIFO_PRIORITIES.end() as u64;
/// Seconds for which a ticket is good: at most a day.
pub const TICKET_SECONDS: RangeInclusive<u64> = 1..=86_400;
/// Labels of one resource.
pub const LABELS: RangeInclusive<u64> = 0..=64;
/// Bytes of a label's key.
pub const LABEL_KEY_BYTES: RangeInclusive<u64> = 1..=63;
/// Bytes of a label's value.
pub const LABEL_VALUE_BYTES: RangeInclusive<u64> = 0..=255;
/// Processors that threads are bound to.
pub const CPUS: RangeInclusive<u64> = 0..=1024;
