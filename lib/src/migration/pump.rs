//! The source's side of a stream: batches go to the helper, sealed records go to the peer, both at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mirrorvm_abi::mailbox::BATCH_MAX;

use super::records::{Mask, Pass, pass};
use super::rounds::ends_at;
use super::stages::{Clock, Stage};
use super::wire::{SHARED_PAGE_BYTES, data_header, kind};
use super::{Control, MigrationFault, OnTimeout, Progress};
use crate::addr::{PAGE_SIZE, PageRange, RamPage};
use crate::address_space::MirrorPlan;
use crate::guest::{DirtyRanges, MachineError};
use crate::memory::GuestRam;
use crate::mirror::{Done, Lane, LaneError};
use crate::pages::PageSet;
use crate::sync::Locked;
use crate::transport::Link;

/// Pages that a stream takes at a time. More than a batch: taking them off the dirty log costs a call to the
/// kernel and a flush of the guest's translations.
const CLAIM: usize = 512;

/// What a round sends, and by what it goes.
pub(super) struct Load<'a> {
    pub epoch: u32,
    /// Pages for the helper.
    pub sealed: &'a PageSet,
    /// Pages that go as they are.
    pub shared: &'a PageSet,
    pub ram: &'a GuestRam,
    /// Tells what the helper calls a page.
    pub plan: &'a MirrorPlan,
    /// The guest's dirty log, where pages are taken off it right before they are read.
    pub dirty: Option<&'a DirtyRanges>,
    pub control: &'a Control,
    pub limiter: &'a Limiter,
    /// Streams that share the round.
    pub streams: usize,
    /// Since when pages move while the guest runs: at the deadline the round ends even if pages are left, and
    /// a switchover that was asked for ends it too. `None`: it is the last.
    pub since: Option<Instant>,
}

/// A round under way, shared by its streams.
pub(super) struct Work<'a> {
    load: Load<'a>,
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

/// Time that what is on its way at the deadline still has.
const GRACE: Duration = Duration::from_millis(100);
/// Time that one stream's claim may take under a bandwidth limit. A stream has several with the helper at
/// once.
const CLAIM_TIME: f64 = 0.01;

/// Pages that a stream of `streams` takes at a time under a limit of `rate` bytes per second.
fn claim_under(rate: u64, streams: usize) -> usize {
    let pages = rate as f64 * CLAIM_TIME / (PAGE_SIZE as f64 * streams.max(1) as f64);
    (pages as usize).clamp(1, CLAIM)
}

/// The pages of `set` from number `cursor` on.
fn after(set: &PageSet, cursor: u64) -> PageSet {
    let mut left = set.clone();
    if let Ok(taken) = PageRange::new(0, cursor.saturating_mul(PAGE_SIZE)) {
        left.remove_range(taken);
    }
    left
}

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
    pub fn new(load: Load<'a>) -> Self {
        let begun = Instant::now();
        Self {
            cursor: Mutex::new(0),
            failed: AtomicBool::new(false),
            counts: Counts::default(),
            begun,
            before: load.control.live().progress,
            shown: Mutex::new(begun),
            load,
        }
    }

    fn next(&self, batch: &mut Vec<RamPage>) {
        batch.clear();
        if self.is_cut() {
            return;
        }
        let mut cursor = self.cursor.locked();
        self.load.sealed.next_batch(&mut cursor, self.claim(), batch);
    }

    /// Pages to take at a time: under a low bandwidth limit so few that what was taken is gone before anybody
    /// notices that the round is over.
    fn claim(&self) -> usize {
        let Some(rate) = self.load.control.limits().bandwidth_bytes_per_second else { return CLAIM };
        claim_under(rate, self.load.streams)
    }

    /// Whether the round is over although pages may be left. Limits count as they are now.
    pub fn is_cut(&self) -> bool {
        self.load.since.is_some() && (self.load.control.wants_switchover() || self.is_late())
    }

    /// Whether the deadline has passed and ends the round.
    pub fn is_late(&self) -> bool {
        let ends = self.load.since.and_then(|since| ends_at(since, &self.load.control.limits()));
        ends.is_some_and(|at| Instant::now() >= at)
    }

    /// Whether the deadline has passed and ends the migration: nobody waits for a peer then.
    pub fn is_over(&self) -> bool {
        self.is_late() && self.load.control.limits().on_timeout == OnTimeout::Cancel
    }

    /// Longest silence of the peer. No longer than to the deadline, where that ends the migration, and a
    /// moment for what is on its way.
    pub fn patience(&self) -> Duration {
        let limits = self.load.control.limits();
        let stall = self.load.control.patience();
        let ends = self.load.since.and_then(|since| ends_at(since, &limits));
        match ends {
            Some(at) if limits.on_timeout == OnTimeout::Cancel => {
                stall.min(at.saturating_duration_since(Instant::now()) + GRACE)
            }
            Some(_) | None => stall,
        }
    }

    /// Pages that no stream took, because the round was cut.
    pub fn untaken(&self) -> PageSet {
        after(self.load.sealed, *self.cursor.locked())
    }

    /// Has writes to `batch` logged again. Before the pages are read: a write in between is then sent twice,
    /// and none is missed (docs/rounds.md).
    fn log_again(&self, batch: &[RamPage]) -> Result<(), MigrationFault> {
        Ok(self.load.dirty.map_or(Ok(()), |dirty| dirty.clear(batch)).map_err(MachineError::from)?)
    }

    /// Puts `batch` into `pages` by the names that the helper knows them by.
    fn name(&self, batch: &[RamPage], pages: &mut Vec<u64>) -> Result<(), MigrationFault> {
        pages.clear();
        for page in batch {
            let unreachable = || MigrationFault::Unreachable { page: page.get() };
            pages.push(self.load.plan.helper_page(*page).ok_or_else(unreachable)?);
        }
        Ok(())
    }

    /// Shows how far the round is, now and then; its end is shown by whoever runs it.
    fn show(&self) {
        {
            let mut shown = self.shown.locked();
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
        let left = (self.load.sealed.len() + self.load.shared.len()).saturating_sub(sealed + shared);
        self.load.control.update(|l| {
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
        if self.load.control.is_cancelled() {
            return Err(MigrationFault::Canceled);
        }
        if self.failed.load(Relaxed) {
            return Err(MigrationFault::PeerGone);
        }
        Ok(())
    }
}

/// One stream's link and buffers, kept over rounds.
pub(super) struct Stream {
    pub link: Link,
    /// Hides headers on a link without TLS.
    mask: Option<Mask>,
    /// Pages that are this stream's to send.
    claim: Vec<RamPage>,
    /// How many of them are with the helper or sent.
    begun: usize,
    pages: Vec<u64>,
}

impl Stream {
    pub fn new(link: Link, mask: Option<Mask>) -> Self {
        Self { link, mask, claim: Vec::new(), begun: 0, pages: Vec::new() }
    }

    /// Sends this stream's part of a round.
    pub fn send(&mut self, lane: &mut Lane, work: &Work<'_>) -> Result<(), MigrationFault> {
        let sent = self
            .send_sealed(lane, work)
            .and_then(|()| Ok(self.link.send(kind::EPOCH_END, &work.load.epoch.to_le_bytes())?));
        if sent.is_err() {
            work.failed.store(true, Relaxed);
            lane.drain();
        }
        sent
    }

    fn send_sealed(&mut self, lane: &mut Lane, work: &Work<'_>) -> Result<(), MigrationFault> {
        let mut clock = Clock::start();
        // A round that failed may have left some.
        self.claim.clear();
        self.begun = 0;
        loop {
            while self.has_pages(work)? {
                let Some(slot) = lane.acquire() else { break };
                let end = self.claim.len().min(self.begun + BATCH_MAX);
                if let Err(fault) = work.name(&self.claim[self.begun..end], &mut self.pages) {
                    lane.release(slot);
                    return Err(fault);
                }
                lane.submit_export(slot, &self.pages, work.load.epoch);
                self.begun = end;
            }
            if lane.in_flight() == 0 {
                return Ok(());
            }
            clock.lap(Stage::Submit);
            let done = lane.wait()?;
            clock.lap(Stage::Seal);
            let sent = self.send_batch(lane, work, &done, &mut clock);
            lane.release(done.slot);
            sent?;
            work.counts.sealed.fetch_add(u64::from(done.pages), Relaxed);
            work.counts.zero.fetch_add(u64::from(done.zero), Relaxed);
            work.show();
        }
    }

    /// Whether there are pages to be sealed; claims more where there are not.
    fn has_pages(&mut self, work: &Work<'_>) -> Result<bool, MigrationFault> {
        if self.begun == self.claim.len() {
            self.begun = 0;
            work.next(&mut self.claim);
            work.log_again(&self.claim)?;
        }
        Ok(!self.claim.is_empty())
    }

    fn send_batch(
        &mut self,
        lane: &Lane,
        work: &Work<'_>,
        done: &Done,
        clock: &mut Clock,
    ) -> Result<(), MigrationFault> {
        work.check()?;
        self.link.set_patience(work.patience());
        work.load.limiter.take(u64::from(done.pages - done.zero) * PAGE_SIZE, work.load.control)?;
        clock.skip();
        let records = lane.payload(done.slot, done.len);
        let mut header = data_header(work.load.epoch, done.pages);
        if let Some(mask) = &mut self.mask {
            mask.apply(&mut header);
            // Our own helper's group; one that writes others gets no further than here.
            pass(&records, done.pages, Pass::Hide(mask), |_| {})
                .map_err(|_| LaneError::Broken("its records are none"))?;
        }
        clock.lap(Stage::Hide);
        let sent = self.link.send_span(kind::RECORDS, &header, &records);
        clock.lap(Stage::Send);
        Ok(sent?)
    }
}

/// Sends the pages that the guest shares with its host, as they are: over a link with TLS. Gives those that
/// there was no time for.
pub(super) fn send_shared(link: &mut Link, work: &Work<'_>) -> Result<PageSet, MigrationFault> {
    let (mut cursor, mut batch, mut buffer) = (0, Vec::new(), Vec::new());
    loop {
        if work.is_cut() {
            return Ok(after(work.load.shared, cursor));
        }
        work.load.shared.next_batch(
            &mut cursor,
            (work.claim() * work.load.streams).min(BATCH_MAX - 8),
            &mut batch,
        );
        if batch.is_empty() {
            return Ok(PageSet::new());
        }
        link.set_patience(work.patience());
        work.check()?;
        work.log_again(&batch)?;
        buffer.clear();
        let mut page = [0; 4096];
        for p in &batch {
            work.load
                .ram
                .read_page(*p, &mut page)
                .map_err(|_| MigrationFault::Protocol("a shared page is no RAM"))?;
            buffer.extend_from_slice(&p.get().to_le_bytes());
            buffer.extend_from_slice(&page);
        }
        debug_assert_eq!(buffer.len(), batch.len() * SHARED_PAGE_BYTES);
        let count = batch.len() as u64;
        work.load.limiter.take(count * PAGE_SIZE, work.load.control)?;
        let header = data_header(work.load.epoch, count as u32);
        link.send_parts(kind::SHARED, &[&header, &buffer])?;
        work.counts.shared.fetch_add(count, Relaxed);
    }
}

/// Holds all streams together to the rate that the limits say at the moment.
pub(super) struct Limiter {
    /// When everything that was taken so far will have been paid for.
    paid_at: Mutex<Instant>,
}

/// Time that may be made up for: waits end late, and what is lost so must not lower the rate.
const CREDIT: Duration = Duration::from_millis(50);

impl Limiter {
    pub fn new() -> Self {
        Self { paid_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be sent. Cancelling ends the wait within a few milliseconds, and so does
    /// another limit.
    fn take(&self, bytes: u64, control: &Control) -> Result<(), MigrationFault> {
        let Some(rate) = control.limits().bandwidth_bytes_per_second else { return Ok(()) };
        let due = {
            let mut paid_at = self.paid_at.locked();
            let now = Instant::now();
            let start = (*paid_at).max(now.checked_sub(CREDIT).unwrap_or(now));
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
            if control.limits().bandwidth_bytes_per_second != Some(rate) {
                // What was promised under the old limit is forgotten with it.
                *self.paid_at.locked() = Instant::now();
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What all streams have taken at most when a round is cut, five claims each, is gone within a tenth
        /// of a second, or as soon as a page a claim is.
        #[test]
        fn what_is_on_its_way_under_a_limit_is_soon_gone(rate in 1u64 << 20..1 << 40, streams in 1usize..=16) {
            let taken = claim_under(rate, streams) * streams * 5;
            let seconds = taken as f64 * PAGE_SIZE as f64 / rate as f64;
            prop_assert!(seconds <= 0.1 || claim_under(rate, streams) == 1, "{} s", seconds);
            prop_assert!(seconds <= 0.4);
        }
    }
}
