//! Scans: which pages of RAM differ from what was last exported.
//!
//! For guests whose writes nobody logs. An export digests exactly the bytes that it seals and keeps the
//! digest; a scan reads pages again, compares, and tells, without keeping anything. So whatever the guest
//! does meanwhile, a page whose content is not what was sealed last is found by a scan that begins after the
//! write: bytes that were written after the scan read them are found by the next one, and the last scan runs
//! while the guest is paused. A page that changed and changed back is what the destination has, and is not
//! found.
//!
//! What a host learns is one bit a page, as from a dirty log. It alone decides what to do with it, as there.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mirrorvm_abi::{
    PAGE_BYTES,
    mailbox::{PAYLOAD_AT, Submission, slot_at},
    op::{SCAN_BYTES, Scan, Status},
};

use crate::shared::Role;
use crate::worker::Outcome;
use crate::{Env, Region, Worker};

/// A page's digest, as two words.
pub(crate) type PageDigest = [u64; Digests::WORDS];

/// The digests of pages, by page number, in memory that the caller gives. Workers share them: in an epoch a
/// page belongs to one stream, and a host that scans a page while another worker exports it gets either
/// answer.
#[derive(Clone, Copy)]
pub struct Digests<'a>(&'a [AtomicU64]);

impl<'a> Digests<'a> {
    /// Words of a digest.
    pub const WORDS: usize = 2;

    /// Room for nothing: nothing can be scanned.
    pub const fn none() -> Self {
        Self(&[])
    }

    /// Room for the pages from 0 on, [`Digests::WORDS`] words each; what is there now does not matter.
    pub const fn new(words: &'a [AtomicU64]) -> Self {
        Self(words)
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn put(&self, page: u64, digest: PageDigest) {
        for (word, value) in self.of(page).iter().zip(digest) {
            word.store(value, Relaxed);
        }
    }

    pub(crate) fn get(&self, page: u64) -> Option<PageDigest> {
        match self.of(page) {
            [a, b] => Some([a.load(Relaxed), b.load(Relaxed)]),
            _ => None,
        }
    }

    /// Empty for a page without room, which the configuration rules out.
    fn of(&self, page: u64) -> &'a [AtomicU64] {
        let at = page as usize * Self::WORDS;
        self.0.get(at..at + Self::WORDS).unwrap_or(&[])
    }
}

impl<E: Env> Worker<'_, E> {
    /// Looks at the range in the slot's payload and answers with its bitmap. All or nothing.
    pub(crate) fn scan(&mut self, request: &Submission) -> Outcome {
        let shared = self.shared;
        let stream = shared.streams[self.index as usize].lock();
        {
            let session = shared.session.lock();
            let legal = matches!(session.role, Role::Source(op) if op.may_export());
            if !legal || session.epoch != request.epoch {
                return Outcome::refused(Status::WrongState);
            }
        }
        let Some(digester) = stream.open.as_ref().and_then(|s| s.digester.as_ref()) else {
            return Outcome::refused(Status::WrongState);
        };
        let at = slot_at(request.slot) + PAYLOAD_AT;
        if request.len as usize != SCAN_BYTES || request.count != 0 {
            return Outcome::refused(Status::BadRequest);
        }
        let mut raw = [0; SCAN_BYTES];
        self.env.read_mailbox(Region(at), &mut raw);
        let Some(scan) = Scan::decode(&raw) else {
            return Outcome::refused(Status::BadRequest);
        };
        let pages = scan.first..scan.first + u64::from(scan.count);
        if !pages.clone().all(|page| self.maps.allows(page)) {
            return Outcome::refused(Status::PageRefused);
        }
        let mut out = at;
        let mut word = 0u64;
        for (i, page) in pages.enumerate() {
            // A page that never went needs no look: its digest, if there is one, is of another session.
            let same = self.maps.seen(page) && {
                let body: &mut [u8; PAGE_BYTES] =
                    self.scratch.page.first_chunk_mut().expect("scratch holds a page and a tag");
                self.env.read_page(page, body);
                self.env.prefetch_page(page + 1);
                self.digests.get(page) == Some(digester.digest(body))
            };
            word |= u64::from(!same) << (i % 64);
            if i % 64 == 63 || i + 1 == scan.count as usize {
                self.env.write_mailbox(Region(out), &word.to_le_bytes());
                out += 8;
                word = 0;
            }
        }
        Outcome::ok(0, scan.bitmap_bytes() as u32)
    }
}
