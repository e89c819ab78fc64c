//! The destination's RAM, made present ahead of what arrives.
//!
//! Owns: which pages are about to be written for the first time, asking the kernel for them in one call. Must
//! not know: the pages' content. What the lists say is a hint here: the helper decides what is written.
//!
//! A first touch through a mirror's slot costs an exit to KVM and a fault for every page of the backing;
//! asked for by range, the kernel hands out the same pages at the speed of clearing them. One thread does
//! that some way ahead of what arrives, as long as what arrives is content; what it has not come to, each
//! stream does for the batch that it has just received. Pages that come as zero are not asked for: memory
//! that a guest never wrote stays unallocated.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard};

use mirrorvm_abi::record::Listed;

use crate::addr::{PAGE_SIZE, RamAddr};
use crate::address_space::MirrorPlan;
use crate::memory::GuestRam;
use crate::sync::{Locked, WaitLocked};

/// Fewer pages in a row are left to fault: a system call costs more than they do.
const RUN_MIN: u64 = 16;
/// How far ahead of what arrived the thread works, bytes: what a fast link brings in some tens of
/// milliseconds.
const AHEAD: u64 = 128 << 20;
/// Bytes that it asks for at a time.
const STEP: u64 = 8 << 20;
/// Pages that have to be seen before they say how dense RAM is.
const TELLING: u64 = 1024;

/// What the streams of a first epoch share.
pub(super) struct Ground<'a> {
    ram: &'a GuestRam,
    plan: &'a MirrorPlan,
    /// Pages that came with content, and as zero.
    content: AtomicU64,
    zero: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// Bytes of RAM, counted from its start, that streams have come to.
    reached: u64,
    /// Bytes that the thread has made present, from and to; what it jumped over is not in there.
    present: (u64, u64),
    /// Whether everything has arrived.
    done: bool,
}

impl State {
    /// Where the next step begins, if there is one for the thread to make.
    fn next(&self, dense: bool, end: u64) -> Option<u64> {
        let at = self.present.1.max(self.reached / STEP * STEP);
        (dense && !self.done && at < end && at < self.reached.saturating_add(AHEAD)).then_some(at)
    }
}

impl<'a> Ground<'a> {
    /// Of RAM into which pages begin to arrive. `dense`: all of them come with content.
    pub fn new(ram: &'a GuestRam, plan: &'a MirrorPlan, dense: bool) -> Self {
        let content = AtomicU64::new(if dense { u64::MAX / 2 } else { 0 });
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { ram, plan, content, zero: AtomicU64::new(0), state, changed }
    }

    /// The thread's work; returns after [`Ground::finish`].
    pub fn prepare_ahead(&self) {
        let end = self.ram.layout().ram_end().get();
        loop {
            let mut state = self.lock();
            let at = loop {
                if state.done {
                    return;
                }
                match state.next(self.is_dense(), end) {
                    Some(at) => break at,
                    None => state = self.changed.wait_locked(state),
                }
            };
            drop(state);
            let to = (at + STEP).min(end);
            self.populate(at, to - at);
            let mut state = self.lock();
            state.present = if at == state.present.1 { (state.present.0, to) } else { (at, to) };
        }
    }

    /// Everything has arrived, or never will.
    pub fn finish(&self) {
        self.lock().done = true;
        self.changed.notify_all();
    }

    /// Content that does not come in runs of zero pages, by what was seen so far.
    fn is_dense(&self) -> bool {
        let (content, zero) = (self.content.load(Relaxed), self.zero.load(Relaxed));
        content >= TELLING && zero < content / 8
    }

    /// Notes how far streams are; whether the thread has been there.
    fn reach(&self, at: u64, end: u64) -> bool {
        let mut state = self.lock();
        state.reached = state.reached.max(end);
        self.changed.notify_all();
        state.present.0 <= at && end <= state.present.1
    }

    /// RAM may have gaps, and the helper's block or another is none of ours: block by block.
    fn populate(&self, at: u64, len: u64) {
        for block in self.ram.layout().ram() {
            let range = block.ram_range();
            let (from, to) = (at.max(range.start()), (at + len).min(range.end()));
            if let Some((mapping, offset)) =
                (from < to).then(|| self.ram.locate(RamAddr::new(from), to - from).ok()).flatten()
            {
                mapping.populate(offset, to - from);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}

/// Collects the runs of one batch.
pub(super) struct Landing<'a> {
    ground: &'a Ground<'a>,
    /// First page as the helper calls it, pages.
    run: (u64, u64),
    /// Pages of this batch with content, and zero.
    seen: (u64, u64),
}

impl<'a> Landing<'a> {
    pub const fn new(ground: &'a Ground<'a>) -> Self {
        Self { ground, run: (0, 0), seen: (0, 0) }
    }

    /// Notes a page that is about to be opened.
    pub fn expect(&mut self, listed: Listed) {
        if listed.zero {
            self.seen.1 += 1;
            return;
        }
        self.seen.0 += 1;
        let (first, pages) = self.run;
        if first.checked_add(pages) == Some(listed.page) && pages > 0 {
            self.run.1 += 1;
        } else {
            self.prepare_run();
            self.run = (listed.page, 1);
        }
    }

    /// The batch is over: makes its last run present.
    pub fn prepare(&mut self) {
        self.prepare_run();
        let (content, zero) = std::mem::take(&mut self.seen);
        self.ground.content.fetch_add(content, Relaxed);
        self.ground.zero.fetch_add(zero, Relaxed);
    }

    fn prepare_run(&mut self) {
        let (first, pages) = std::mem::take(&mut self.run);
        if pages == 0 {
            return;
        }
        let page = self.ground.plan.ram_page(first);
        let Some(at) = page.and_then(|p| p.get().checked_mul(PAGE_SIZE)) else { return };
        let len = pages * PAGE_SIZE;
        let Some(end) = at.checked_add(len) else { return };
        let there = self.ground.reach(at, end);
        if !there && pages >= RUN_MIN {
            self.ground.populate(at, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The thread never works behind what arrived, never further ahead than allowed, and never on what is
        /// sparse.
        #[test]
        fn the_thread_stays_in_front_and_near(
            reached in 0u64..8 << 30, from in 0u64..8 << 30, len in 0u64..1 << 30, end in 1u64..8 << 30,
            dense: bool, done: bool,
        ) {
            let state = State { reached, present: (from, from + len), done };
            match state.next(dense, end) {
                Some(at) => {
                    prop_assert!(dense && !done && at < end);
                    prop_assert!(at + STEP > reached && at < reached + AHEAD);
                    prop_assert!(at >= state.present.1);
                }
                None => prop_assert!(
                    !dense || done || state.present.1.max(reached / STEP * STEP) >= end.min(reached + AHEAD)
                ),
            }
        }
    }
}
