//! The source's side of a stream: batches go to the helper, sealed records go to the peer, both at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mirrorvm_abi::mailbox::{BATCH_MAX, PAYLOAD_BYTES};

use super::wire::{SHARED_PAGE_BYTES, data_header, kind};
use super::{Control, MigrationFault};
use crate::addr::{PAGE_SIZE, RamPage};
use crate::address_space::MirrorPlan;
use crate::host::Progress;
use crate::memory::GuestRam;
use crate::mirror::Lane;
use crate::pages::PageSet;
use crate::transport::Link;

/// Requests that are with the helper at once: it seals the next batch while the last one is being sent.
const PIPELINE: usize = 3;

/// What a round sends, shared by its streams.
pub(super) struct Work<'a> {
    pub epoch: u32,
    /// Pages for the helper.
    pub sealed: &'a PageSet,
    /// Pages that go as they are.
    pub shared: &'a PageSet,
    pub ram: &'a GuestRam,
    /// Tells what the helper calls a page.
    plan: &'a MirrorPlan,
    pub control: &'a Control,
    pub limiter: &'a Limiter,
    cursor: Mutex<u64>,
    failed: AtomicBool,
    pub counts: Counts,
    begun: Instant,
    /// Progress as it was before the round.
    before: Progress,
    /// When progress was last shown.
    shown: Mutex<Instant>,
}

/// How often a round shows its progress.
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// What a round has sent.
#[derive(Default)]
pub(super) struct Counts {
    pub sealed: AtomicU64,
    pub zero: AtomicU64,
    pub shared: AtomicU64,
}

impl Counts {
    /// Bytes of page content that crossed: zero pages did not.
    pub fn bytes(&self) -> u64 {
        let pages = self.sealed.load(Relaxed) + self.shared.load(Relaxed);
        pages.saturating_sub(self.zero.load(Relaxed)) * PAGE_SIZE
    }
}

impl<'a> Work<'a> {
    pub fn new(
        epoch: u32,
        sealed: &'a PageSet,
        shared: &'a PageSet,
        (ram, plan): (&'a GuestRam, &'a MirrorPlan),
        control: &'a Control,
        limiter: &'a Limiter,
    ) -> Self {
        let (cursor, failed, counts) = (Mutex::new(0), AtomicBool::new(false), Counts::default());
        let begun = Instant::now();
        let (before, shown) = (control.live().progress, Mutex::new(begun));
        Self {
            epoch,
            sealed,
            shared,
            ram,
            plan,
            control,
            limiter,
            cursor,
            failed,
            counts,
            begun,
            before,
            shown,
        }
    }

    fn next(&self, batch: &mut Vec<RamPage>) {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        self.sealed.next_batch(&mut cursor, BATCH_MAX, batch);
    }

    /// Puts `batch` into `pages` by the names that the helper knows them by.
    fn name(&self, batch: &[RamPage], pages: &mut Vec<u64>) -> Result<(), MigrationFault> {
        pages.clear();
        for page in batch {
            let unreachable = || MigrationFault::Unreachable { page: page.get() };
            pages.push(self.plan.helper_page(*page).ok_or_else(unreachable)?);
        }
        Ok(())
    }

    /// Shows how far the round is, now and then; its end is shown by whoever runs it.
    fn show(&self) {
        {
            let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            if shown.elapsed() < SHOW_EVERY {
                return;
            }
            *shown = Instant::now();
        }
        let bytes = self.counts.bytes();
        let count = |n: &AtomicU64| n.load(Relaxed);
        let (sealed, shared, zero) =
            (count(&self.counts.sealed), count(&self.counts.shared), count(&self.counts.zero));
        let seconds = self.begun.elapsed().as_secs_f64();
        let left = (self.sealed.len() + self.shared.len()).saturating_sub(sealed + shared);
        self.control.update(|l| {
            let p = &mut l.progress;
            p.processed_bytes = self.before.processed_bytes + bytes;
            p.pages_sealed = self.before.pages_sealed + sealed;
            p.pages_shared = self.before.pages_shared + shared;
            p.pages_zero = self.before.pages_zero + zero;
            p.remaining_bytes = left * PAGE_SIZE;
            p.throughput_bytes_per_second = (bytes as f64 / seconds) as u64;
            p.remaining_ms =
                (bytes > 0).then(|| ((left * PAGE_SIZE) as f64 / (bytes as f64 / seconds) * 1e3) as u64);
        });
    }

    /// Progress before the round, to be added to.
    pub const fn before(&self) -> &Progress {
        &self.before
    }

    fn check(&self) -> Result<(), MigrationFault> {
        if self.control.is_cancelled() {
            return Err(MigrationFault::Canceled);
        }
        if self.failed.load(Relaxed) {
            return Err(MigrationFault::PeerGone);
        }
        Ok(())
    }
}

/// One stream's buffers, kept over rounds.
pub(super) struct Stream {
    pub link: Link,
    buffer: Vec<u8>,
    batch: Vec<RamPage>,
    pages: Vec<u64>,
}

impl Stream {
    pub fn new(link: Link) -> Self {
        Self { link, buffer: Vec::new(), batch: Vec::new(), pages: Vec::new() }
    }

    /// Sends this stream's part of a round. `first`: it also takes the shared pages.
    pub fn send(&mut self, lane: &mut Lane, work: &Work<'_>, first: bool) -> Result<(), MigrationFault> {
        let sent = self.send_sealed(lane, work).and_then(|()| {
            if first {
                self.send_shared(work)?;
            }
            Ok(self.link.send(kind::EPOCH_END, &work.epoch.to_le_bytes())?)
        });
        if sent.is_err() {
            work.failed.store(true, Relaxed);
            // The helper still works on what it has; it must be idle before anything else is asked of it.
            while lane.in_flight() > 0 {
                match lane.wait() {
                    Ok(done) => lane.release(done.slot),
                    Err(crate::mirror::LaneError::Refused { .. }) => {}
                    Err(_) => break,
                }
            }
        }
        sent
    }

    fn send_sealed(&mut self, lane: &mut Lane, work: &Work<'_>) -> Result<(), MigrationFault> {
        self.buffer.resize(PAYLOAD_BYTES, 0);
        loop {
            while lane.in_flight() < PIPELINE {
                work.next(&mut self.batch);
                if self.batch.is_empty() {
                    break;
                }
                let slot = lane.acquire().ok_or(crate::mirror::LaneError::NoSlot)?;
                if let Err(fault) = work.name(&self.batch, &mut self.pages) {
                    lane.release(slot);
                    return Err(fault);
                }
                lane.submit_export(slot, &self.pages, work.epoch);
            }
            if lane.in_flight() == 0 {
                return Ok(());
            }
            let done = lane.wait()?;
            // Out of the mailbox first: the helper may rewrite it, and TLS must seal what was counted.
            lane.read_payload(done.slot, 0, &mut self.buffer[..done.len]);
            lane.release(done.slot);
            work.check()?;
            let content = u64::from(done.pages - done.zero) * PAGE_SIZE;
            work.limiter.take(content, work.control)?;
            let header = data_header(work.epoch, done.pages);
            self.link.send_parts(kind::RECORDS, &[&header, &self.buffer[..done.len]])?;
            work.counts.sealed.fetch_add(u64::from(done.pages), Relaxed);
            work.counts.zero.fetch_add(u64::from(done.zero), Relaxed);
            work.show();
        }
    }

    fn send_shared(&mut self, work: &Work<'_>) -> Result<(), MigrationFault> {
        let mut cursor = 0;
        loop {
            work.shared.next_batch(&mut cursor, BATCH_MAX - 8, &mut self.batch);
            if self.batch.is_empty() {
                return Ok(());
            }
            work.check()?;
            self.buffer.clear();
            let mut page = [0; 4096];
            for p in &self.batch {
                work.ram
                    .read_page(*p, &mut page)
                    .map_err(|_| MigrationFault::Protocol("a shared page is no RAM"))?;
                self.buffer.extend_from_slice(&p.get().to_le_bytes());
                self.buffer.extend_from_slice(&page);
            }
            debug_assert_eq!(self.buffer.len(), self.batch.len() * SHARED_PAGE_BYTES);
            let count = self.batch.len() as u64;
            work.limiter.take(count * PAGE_SIZE, work.control)?;
            let header = data_header(work.epoch, count as u32);
            self.link.send_parts(kind::SHARED, &[&header, &self.buffer])?;
            work.counts.shared.fetch_add(count, Relaxed);
        }
    }
}

/// Holds all streams together to a rate.
pub(super) struct Limiter {
    rate: Option<u64>,
    /// When everything that was taken so far will have been paid for.
    paid_at: Mutex<Instant>,
}

impl Limiter {
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, paid_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be sent. Cancelling ends the wait within a few milliseconds.
    fn take(&self, bytes: u64, control: &Control) -> Result<(), MigrationFault> {
        let Some(rate) = self.rate else { return Ok(()) };
        let due = {
            let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
            // Unused time is not saved up for a burst, but for the length of one frame.
            let start = (*paid_at).max(Instant::now());
            *paid_at = start + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            start
        };
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if control.is_cancelled() {
                return Err(MigrationFault::Canceled);
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }
}
