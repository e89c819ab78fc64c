//! One pass over what is left: sealed on the streams, shared pages on the control link.

use std::time::{Duration, Instant};

use super::{Course, Ends};
use crate::addr::PAGE_SIZE;
use crate::migration::pump::{Load, Stream, Work, send_shared};
use crate::migration::threads::{all, side_by_side};
use crate::migration::wire::{self, kind};
use crate::migration::{MigrationFault, Round};
use crate::mirror::Mirror;
use crate::pages::PageSet;
use crate::transport::Link;

impl Course<'_, '_> {
    /// One epoch over all streams: sends `left`, and leaves in it what there was no time for. With `since`,
    /// when pages began to move, the guest runs and limits may cut it; without it is the last, and takes the
    /// time that it takes. Also gives how long it was from the last page to the destination's word.
    pub(super) fn round(
        &mut self,
        ends: &mut Ends,
        left: &mut PageSet,
        since: Option<Instant>,
    ) -> Result<(Round, Duration), MigrationFault> {
        let Ends { link, streams, sent } = ends;
        let begun = Instant::now();
        let status = self.machine.encryption().shared();
        let (mut sealed, mut shared) = split(left, &status);
        let changed = sent.status.as_ref().map_or(0, |before| differing(before, &status));
        let shared_bytes = status.len() * PAGE_SIZE;
        sent.status = Some(status);
        let control = self.out.control;
        control.update(|l| {
            l.progress.shared_bytes = Some(shared_bytes);
            l.progress.status_changes += changed;
            l.progress.iteration = sent.epoch;
            l.progress.remaining_bytes = left.len() * PAGE_SIZE;
        });
        let plan = std::sync::Arc::clone(self.mirror.plan());
        let work = Work::new(Load {
            epoch: sent.epoch,
            sealed: &sealed,
            shared: &shared,
            ram: self.machine.ram(),
            plan: &plan,
            dirty: sent.dirty.as_ref(),
            control,
            limiter: &sent.limiter,
            streams: streams.len(),
            since,
        });
        link.set_patience(work.patience());
        let epoch = sent.epoch;
        let crossed = cross(link, self.mirror, streams, &work, epoch);
        let (unsent, settled) = match crossed {
            Ok(crossed) => crossed,
            // Whoever is not heard at the deadline is not waited for.
            Err(MigrationFault::PeerLost(_) | MigrationFault::PeerGone) if work.is_over() => {
                let pages = work.counts.bytes() / PAGE_SIZE;
                return Err(self.not_converging(per_second(pages, begun.elapsed())));
            }
            Err(fault) => return Err(fault),
        };
        let (duration, bytes) = (begun.elapsed(), work.counts.bytes());
        let count = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        let round = Round {
            number: sent.epoch,
            pages_sealed: count(&work.counts.sealed),
            pages_shared: count(&work.counts.shared),
            pages_zero: count(&work.counts.zero),
            bytes,
            duration_us: duration.as_micros() as u64,
            dirtied_pages: 0,
            paused: since.is_none(),
        };
        let before = *work.before();
        let untaken = work.untaken();
        left.clone_from(&untaken);
        left.union(&unsent);
        sealed.take(&untaken);
        shared.take(&unsent);
        sent.epoch += 1;
        sent.ever_sealed.union(&sealed);
        sent.ever_shared.union(&shared);
        control.update(|l| {
            let p = &mut l.progress;
            p.processed_bytes = before.processed_bytes + bytes;
            p.pages_sealed = before.pages_sealed + round.pages_sealed;
            p.pages_shared = before.pages_shared + round.pages_shared;
            p.pages_zero = before.pages_zero + round.pages_zero;
            p.remaining_bytes = 0;
            p.remaining_ms = None;
            if bytes >= 1 << 20 {
                p.throughput_bytes_per_second = per_second(bytes, duration);
            }
            let total = if since.is_none() { &mut p.downtime_bytes } else { &mut p.precopy_bytes };
            *total += bytes;
            p.elapsed_ms = self.begun.elapsed().as_millis() as u64;
        });
        Ok((round, settled))
    }
}

/// All of an epoch's messages. Gives the shared pages that there was no time for, and how long it was from
/// the last page to the destination's word.
fn cross(
    link: &mut Link,
    mirror: &mut Mirror,
    streams: &mut [Stream],
    work: &Work<'_>,
    epoch: u32,
) -> Result<(PageSet, Duration), MigrationFault> {
    link.send(kind::EPOCH_BEGIN, &epoch.to_le_bytes())?;
    pump_all(mirror, streams, work)?;
    let unsent = send_shared(link, work)?;
    let sent_all = Instant::now();
    let token = mirror.end_epoch()?;
    link.set_patience(work.patience());
    link.send(kind::EPOCH_TOKEN, &token)?;
    wire::expect(link, &[kind::EPOCH_ACK], 64)?;
    Ok((unsent, sent_all.elapsed()))
}

/// Every stream sends its part, each on its own thread; the first error counts.
fn pump_all(mirror: &mut Mirror, streams: &mut [Stream], work: &Work<'_>) -> Result<(), MigrationFault> {
    let placement = mirror.placement();
    let parts = streams.iter_mut().zip(mirror.lanes());
    all(side_by_side("out", &placement, parts, |(stream, lane)| stream.send(lane, work))).map(|_| ())
}

/// The pages of `left` that go sealed, and those that the guest shares.
fn split(left: &PageSet, shared: &PageSet) -> (PageSet, PageSet) {
    let mut sealed = left.clone();
    let plain = sealed.take(shared);
    (sealed, plain)
}

/// Pages that are in one of two sets alone.
fn differing(a: &PageSet, b: &PageSet) -> u64 {
    let both = a.clone().take(b).len();
    a.len() + b.len() - 2 * both
}

fn per_second(n: u64, duration: Duration) -> u64 {
    (n as f64 / duration.as_secs_f64().max(1e-6)) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::RamPage;

    proptest! {
        #[test]
        fn what_differs_is_what_is_in_one_alone(
            a in prop::collection::btree_set(0u64..300, 0..200), b in prop::collection::btree_set(0u64..900, 0..200),
        ) {
            let set = |pages: &std::collections::BTreeSet<u64>| {
                let mut set = PageSet::new();
                for page in pages {
                    set.insert(RamPage::new(*page));
                }
                set
            };
            prop_assert_eq!(differing(&set(&a), &set(&b)), a.symmetric_difference(&b).count() as u64);
        }
    }
}
