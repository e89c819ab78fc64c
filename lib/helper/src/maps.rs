//! Which pages were seen in the session, and in its present epoch: one bit a page each.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mirrorvm_abi::config::{RANGE_BYTES, Range};

/// The helper's view of RAM: the allow-list, and two maps in memory that the caller gives (in the image: the
/// pages behind the worker areas). Workers share the maps, hence atomics; a page belongs to one
/// stream in an epoch, so relaxed ordering is enough.
#[derive(Clone, Copy)]
pub struct PageMaps<'a> {
    allowed: &'a [[u8; RANGE_BYTES]],
    session: &'a [AtomicU64],
    epoch: &'a [AtomicU64],
}

impl<'a> PageMaps<'a> {
    /// Maps over `words`, half for the session and half for the epoch; `allowed` ascends.
    pub fn new(allowed: &'a [[u8; RANGE_BYTES]], words: &'a [AtomicU64]) -> Self {
        let (session, epoch) = words.split_at(words.len() / 2);
        Self { allowed, session, epoch }
    }

    /// Whether `page` may be exported or imported.
    pub fn allows(&self, page: u64) -> bool {
        let after = self.allowed.partition_point(|r| Range::decode(r).first <= page);
        let inside = after > 0 && {
            let r = Range::decode(&self.allowed[after - 1]);
            page - r.first < r.count
        };
        inside && page / 64 < self.session.len() as u64
    }

    /// Pages on the allow-list.
    pub fn allowed_pages(&self) -> u64 {
        self.allowed.iter().fold(0, |sum, r| sum.saturating_add(Range::decode(r).count))
    }

    /// Marks `page` for this epoch; false when it was marked already. The page is an allowed one.
    pub(crate) fn claim(&self, page: u64) -> bool {
        set(self.epoch, page)
    }

    /// Takes a claim back.
    pub(crate) fn unclaim(&self, page: u64) {
        self.epoch[(page / 64) as usize].fetch_and(!(1 << (page % 64)), Relaxed);
    }

    /// Marks `page` for the session; true when it is new.
    pub(crate) fn see(&self, page: u64) -> bool {
        set(self.session, page)
    }

    /// Whether `page` was marked for the session. The page is an allowed one.
    pub(crate) fn seen(&self, page: u64) -> bool {
        self.session[(page / 64) as usize].load(Relaxed) >> (page % 64) & 1 != 0
    }

    pub(crate) fn clear_epoch(&self) {
        self.epoch.iter().for_each(|w| w.store(0, Relaxed));
    }

    pub(crate) fn clear(&self) {
        self.clear_epoch();
        self.session.iter().for_each(|w| w.store(0, Relaxed));
    }
}

/// Sets a bit; true when it was clear.
fn set(map: &[AtomicU64], page: u64) -> bool {
    let bit = 1 << (page % 64);
    map[(page / 64) as usize].fetch_or(bit, Relaxed) & bit == 0
}
