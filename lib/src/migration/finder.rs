//! Who finds the pages that a running guest has changed: the kernel's dirty log, or the helper's scan.
//!
//! The log knows of every write at once and costs the guest a fault a page. It belongs to the process that
//! runs the vCPUs, so for a guest in a QEMU there is none for us. The helper can look instead: it keeps a
//! keyed digest of every page that it sealed and compares ([`mirrorvm_abi::op::Op::Scan`]). That costs the
//! guest nothing while it runs, and the final pause one pass over RAM. Why no page is missed either way is in
//! docs/rounds.md.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mirrorvm_abi::op::{SCAN_MAX, Scan};

use super::threads::{all, side_by_side};
use super::{Control, MigrationFault};
use crate::addr::{PAGE_SIZE, RamPage};
use crate::address_space::MirrorPlan;
use crate::guest::{DirtyRanges, Machine, MachineError};
use crate::mirror::{Lane, LaneError, Mirror};
use crate::pages::PageSet;
use crate::sync::Locked;

/// Scans that are with a helper's worker at once: it never waits for the next one.
const PIPELINE: usize = 2;

/// Who finds changed pages.
pub(super) enum Finder {
    /// The machine logs its guest's writes. With ranges, once logging has begun: marks are taken off right
    /// before a page is read, not when they are looked at.
    Log(Option<DirtyRanges>),
    /// The helper scans.
    Scan(Pieces),
}

/// What a look has shown, beside the pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Pages that it added to those that were left over from the last round.
    pub written_pages: u64,
    /// How long it took.
    pub took: Duration,
}

impl Finder {
    /// The best one for this machine under this mirror, if there is any.
    pub fn choose(machine: &dyn Machine, mirror: &Mirror) -> Option<Self> {
        if machine.can_log_dirty() {
            Some(Self::Log(None))
        } else if mirror.plan().has_digests() {
            Some(Self::Scan(Pieces::of(mirror.plan())))
        } else {
            None
        }
    }

    /// Whether a look takes as long as reading all RAM does.
    pub const fn is_slow(&self) -> bool {
        match self {
            Self::Log(_) => false,
            Self::Scan(_) => true,
        }
    }

    /// Where marks are taken off page by page, if they are.
    pub const fn ranges(&self) -> Option<&DirtyRanges> {
        match self {
            Self::Log(ranges) => ranges.as_ref(),
            Self::Scan(_) => None,
        }
    }

    /// Before the first page moves.
    pub fn begin(&mut self, machine: &mut dyn Machine) -> Result<(), MigrationFault> {
        match self {
            Self::Log(ranges) => {
                machine.log_dirty(true)?;
                *ranges = machine.dirty_ranges();
                Ok(())
            }
            Self::Scan(_) => Ok(()),
        }
    }

    /// Brings `left`, the pages that are still to be sent, up to date. The log adds what was written since
    /// the last look; a scan finds all that differs from what was sent, and that alone. It uses the first
    /// `streams` lanes, which must be idle, in the session's present `epoch`.
    pub fn look(
        &self,
        machine: &mut dyn Machine,
        mirror: &mut Mirror,
        streams: usize,
        epoch: u32,
        control: &Control,
        left: &mut PageSet,
    ) -> Result<Look, MigrationFault> {
        let begun = Instant::now();
        let written_pages = match self {
            Self::Log(ranges) => {
                let before = left.len();
                match ranges {
                    Some(ranges) => ranges.look(left).map_err(MachineError::from)?,
                    None => machine.take_dirty(left)?,
                }
                left.len() - before
            }
            Self::Scan(pieces) => {
                let mut found = pieces.scan(mirror, streams, epoch, control)?;
                // The helper does not digest what goes unsealed: it goes again, every time.
                found.union(&machine.encryption().shared());
                let untaken = found.take(left);
                let written = found.len();
                found.union(&untaken);
                *left = found;
                written
            }
        };
        Ok(Look { written_pages, took: begun.elapsed() })
    }

    /// After the last look.
    pub fn end(&self, machine: &mut dyn Machine) -> Result<(), MigrationFault> {
        match self {
            Self::Log(_) => Ok(machine.log_dirty(false)?),
            Self::Scan(_) => Ok(()),
        }
    }
}

/// A part of RAM that one request scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    ram: RamPage,
    scan: Scan,
}

/// All RAM that the helper may touch, cut into requests.
pub(super) struct Pieces(Vec<Piece>);

impl Pieces {
    fn of(plan: &MirrorPlan) -> Self {
        let mut list = Vec::new();
        for run in plan.window() {
            let (ram, helper, pages) =
                (run.ram_addr.get() / PAGE_SIZE, run.helper_addr / PAGE_SIZE, run.len / PAGE_SIZE);
            for at in (0..pages).step_by(SCAN_MAX as usize) {
                let count = (pages - at).min(u64::from(SCAN_MAX)) as u32;
                list.push(Piece { ram: RamPage::new(ram + at), scan: Scan { first: helper + at, count } });
            }
        }
        Self(list)
    }

    /// Every lane takes the next piece that is left, each on a thread of its own.
    fn scan(
        &self,
        mirror: &mut Mirror,
        streams: usize,
        epoch: u32,
        control: &Control,
    ) -> Result<PageSet, MigrationFault> {
        let pass = Pass {
            pieces: &self.0,
            epoch,
            control,
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        };
        let found = Mutex::new(PageSet::new());
        let placement = mirror.placement();
        let lanes = mirror.lanes().iter_mut().take(streams);
        all(side_by_side("scan", &placement, lanes, |lane| pass.run(lane, &found)))?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One scan of all RAM, shared by its lanes.
struct Pass<'a> {
    pieces: &'a [Piece],
    epoch: u32,
    control: &'a Control,
    next: AtomicUsize,
    failed: AtomicBool,
}

impl Pass<'_> {
    fn run(&self, lane: &mut Lane, found: &Mutex<PageSet>) -> Result<(), MigrationFault> {
        let done = self.work(lane, found);
        if done.is_err() {
            self.failed.store(true, Relaxed);
            lane.drain();
        }
        done
    }

    fn work(&self, lane: &mut Lane, found: &Mutex<PageSet>) -> Result<(), MigrationFault> {
        let mut waiting: Vec<(u32, Piece)> = Vec::with_capacity(PIPELINE);
        let mut words = Vec::new();
        loop {
            while waiting.len() < PIPELINE && !self.stopped() {
                let Some(piece) = self.pieces.get(self.next.fetch_add(1, Relaxed)) else { break };
                let slot = lane.acquire().ok_or(LaneError::NoSlot)?;
                lane.submit_scan(slot, piece.scan, self.epoch);
                waiting.push((slot, *piece));
            }
            if waiting.is_empty() {
                return if self.control.is_cancelled() { Err(MigrationFault::Canceled) } else { Ok(()) };
            }
            let done = lane.wait()?;
            let at = waiting.iter().position(|(slot, _)| *slot == done.slot);
            let (_, piece) =
                waiting.swap_remove(at.ok_or(LaneError::Broken("it answers what was not asked"))?);
            let read = lane.read_scan(&done, piece.scan, &mut words);
            lane.release(done.slot);
            read?;
            found.locked().insert_log(piece.ram, &words);
        }
    }

    fn stopped(&self) -> bool {
        self.control.is_cancelled() || self.failed.load(Relaxed)
    }
}
