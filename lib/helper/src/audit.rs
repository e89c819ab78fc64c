//! The audit: whether RAM at the destination is what the source has, by digests made after START.
//!
//! START vouches for what was sent. Whether that is what lies in the source's RAM depends on somebody having
//! noticed every write, and that is the host. So the destination keeps a keyed digest of every page as it
//! opened it, and when the guest stands still for good at the source, that helper digests its RAM and seals
//! the digests; the destination compares. A write that nobody noticed shows as a page that differs.
//!
//! Owns: what is compared, and that all of it is. Must not know: when it is asked for, what becomes of a
//! verdict.
//!
//! A page takes part when it crossed sealed in this session, which both helpers know by themselves, unless
//! both hosts want it left out: it was private when it crossed and is shared now, and what is shared went
//! past the helpers. Left out by one host alone it counts as one that differs. Chunks ascend and are looked
//! at once, and the verdict is refused unless every page that crossed was among them, so no host can leave
//! pages out by not asking.

use mirrorvm_abi::{
    PAGE_BYTES,
    mailbox::{PAYLOAD_AT, Submission, slot_at},
    op::{AUDIT_BITS_AT, CHUNK_BITS_BYTES, NAMED_MAX, Status, VERDICT_BYTES, Verdict},
    record::{
        CHUNK_PAGES, CHUNKS_MAX, DIGEST_BYTES, Front, HEADER_BYTES, Kind, LISTED_BYTES, Listed, TAG_BYTES,
        front_bytes,
    },
};
use zeroize::{Zeroizing, zeroize_stack};

use crate::digest::PageDigester;
use crate::op_state::{DestinationOp, SourceOp};
use crate::scan::PageDigest;
use crate::seal::Sealer;
use crate::shared::{Role, Session};
use crate::worker::{Outcome, Scratch};
use crate::{Env, Region, Worker};

/// Stack that is wiped behind a request: twice what a digester and a group's key take with all that works on
/// them.
const WORKED_BYTES: usize = 16 << 10;

/// What takes the place of the digest of a page that takes no part. That a page has it by chance is as likely
/// as that two pages have the same.
const LEFT_OUT: PageDigest = [0; 2];

/// An audit that was agreed on, from BEGIN to its verdict.
#[derive(Clone)]
pub(crate) struct Audit {
    key: Zeroizing<[u8; 32]>,
    sealer: Sealer,
    /// The first chunk that may come next.
    next: u64,
    found: Verdict,
}

impl Audit {
    pub const fn new(key: Zeroizing<[u8; 32]>, sealer: Sealer) -> Self {
        let found = Verdict { compared: 0, left_out: 0, differing: 0, first: [0; NAMED_MAX] };
        Self { key, sealer, next: 0, found }
    }
}

/// A chunk's bits: pages that a host wants left out.
type Bits = [u8; CHUNK_BITS_BYTES];

fn is_set(bits: &Bits, index: u64) -> bool {
    bits[(index / 8) as usize] >> (index % 8) & 1 != 0
}

impl<E: Env> Worker<'_, E> {
    /// Source: seals the digests of the chunks in the slot.
    #[inline(never)]
    pub(crate) fn digests(&mut self, request: &Submission) -> Outcome {
        let shared = self.shared;
        let mut session = shared.session.lock();
        let outcome = match self.seal_chunks(&mut session, request) {
            Ok(len) => Outcome::ok(request.count, len as u32),
            Err(status) => Outcome::refused(status),
        };
        zeroize_stack::<WORKED_BYTES>();
        outcome
    }

    #[inline(never)]
    fn seal_chunks(&mut self, session: &mut Session, request: &Submission) -> Result<usize, Status> {
        let legal = matches!(session.role, Role::Source(SourceOp::PostExport | SourceOp::Done));
        let audit = session.audit.as_mut().filter(|_| legal).ok_or(Status::WrongState)?;
        let count = request.count as usize;
        if !(1..=CHUNKS_MAX).contains(&count) || request.len != 0 {
            return Err(Status::BadRequest);
        }
        let mut next = audit.next;
        for i in 0..count {
            let mut raw = [0; 8];
            self.env.read_mailbox(Region(slot_at(request.slot) + i * 8), &mut raw);
            let chunk = u64::from_le_bytes(raw);
            if chunk < next || chunk >= self.chunks_end() {
                return Err(Status::PageRefused);
            }
            self.scratch.pages[i] = chunk;
            next = chunk + 1;
        }
        let random = self.random()?;
        let group = audit.sealer.next(Kind::Digests, session.epoch, count as u16, random);
        let group = group.map_err(|_| Status::Exhausted)?;
        audit.next = next;
        let digester = PageDigester::new(&audit.key);
        let start = slot_at(request.slot) + PAYLOAD_AT;
        let mut at = start + front_bytes(count);
        for i in 0..count {
            let chunk = self.scratch.pages[i];
            let bits = self.bits(request.slot, i);
            for (page, index) in (chunk * CHUNK_PAGES..).zip(0..CHUNK_PAGES) {
                let digest = if self.takes_part(page) && !is_set(&bits, index) {
                    let body: &mut [u8; PAGE_BYTES] =
                        self.scratch.page.first_chunk_mut().expect("scratch holds a page and a tag");
                    self.env.read_page(page, body);
                    self.env.prefetch_page(page + 1);
                    digester.digest(body)
                } else {
                    LEFT_OUT
                };
                let to = &mut self.scratch.chunk[index as usize * DIGEST_BYTES..][..DIGEST_BYTES];
                to[..8].copy_from_slice(&digest[0].to_le_bytes());
                to[8..].copy_from_slice(&digest[1].to_le_bytes());
            }
            let word = Listed { page: chunk, zero: false }.encode();
            let body = &mut self.scratch.chunk[..PAGE_BYTES];
            let tag = group.seal(i, word, body).map_err(|_| Status::Exhausted)?;
            self.env.write_mailbox(Region(at), body);
            self.env.write_mailbox(Region(at + PAGE_BYTES), &tag);
            self.scratch.front[front_bytes(i)..][..LISTED_BYTES].copy_from_slice(&word);
            at += PAGE_BYTES + TAG_BYTES;
        }
        self.scratch.front[..HEADER_BYTES].copy_from_slice(group.header());
        self.env.write_mailbox(Region(start), &self.scratch.front[..front_bytes(count)]);
        Ok(at - start)
    }

    /// Destination: compares the group in the slot with what was opened. Whatever is wrong with it ends the
    /// audit, without a verdict.
    #[inline(never)]
    pub(crate) fn compare(&mut self, request: &Submission) -> Outcome {
        let shared = self.shared;
        let mut session = shared.session.lock();
        let outcome = match self.compare_chunks(&mut session, request) {
            Ok(()) => Outcome::ok(request.count, 0),
            Err(status) => {
                if status == Status::Unsealed {
                    session.audit = None;
                }
                Outcome::refused(status)
            }
        };
        zeroize_stack::<WORKED_BYTES>();
        outcome
    }

    #[inline(never)]
    fn compare_chunks(&mut self, session: &mut Session, request: &Submission) -> Result<(), Status> {
        let epoch = session.epoch;
        let audit = ending(session)?;
        let count = request.count as usize;
        if !(1..=CHUNKS_MAX).contains(&count) {
            return Err(Status::BadRequest);
        }
        let end = self.chunks_end();
        let start = slot_at(request.slot) + PAYLOAD_AT;
        let Scratch { front, pages, .. } = &mut *self.scratch;
        let front = &mut front[..front_bytes(count)];
        if (request.len as usize) < front.len() {
            return Err(Status::Unsealed);
        }
        self.env.read_mailbox(Region(start), front);
        let front = Front::read_digests(front)
            .filter(|f| usize::from(f.header.count) == count)
            .filter(|f| f.group_bytes() == request.len as usize)
            .filter(|f| f.header.epoch == epoch && audit.sealer.expects(&f.header))
            .filter(|f| f.pages().all(|chunk| (audit.next..end).contains(&chunk.page)))
            .ok_or(Status::Unsealed)?;
        let group = audit.sealer.group(&front.header).ok_or(Status::Unsealed)?;
        for (to, chunk) in pages.iter_mut().zip(front.pages()) {
            *to = chunk.page;
        }
        for i in 0..count {
            let chunk = self.scratch.pages[i];
            let bits = self.bits(request.slot, i);
            let at = start + front_bytes(count) + i * (PAGE_BYTES + TAG_BYTES);
            self.env.read_mailbox(Region(at), &mut self.scratch.chunk);
            let word = Listed { page: chunk, zero: false }.encode();
            if !group.open(i, word, &mut self.scratch.chunk) {
                return Err(Status::Unsealed);
            }
            for (page, index) in (chunk * CHUNK_PAGES..).zip(0..CHUNK_PAGES) {
                let at = index as usize * DIGEST_BYTES;
                let theirs = &self.scratch.chunk[at..at + DIGEST_BYTES];
                let ours = if !self.takes_part(page) {
                    LEFT_OUT
                } else if is_set(&bits, index) {
                    audit.found.left_out += 1;
                    LEFT_OUT
                } else {
                    audit.found.compared += 1;
                    self.digests.get(page).unwrap_or(LEFT_OUT)
                };
                if theirs[..8] != ours[0].to_le_bytes() || theirs[8..] != ours[1].to_le_bytes() {
                    if let Some(place) = audit.found.first.get_mut(audit.found.differing as usize) {
                        *place = page;
                    }
                    audit.found.differing += 1;
                }
            }
            audit.next = chunk + 1;
        }
        audit.sealer.opened();
        Ok(())
    }

    /// Destination: ends the audit and says what it found.
    pub(crate) fn verdict(&mut self, request: &Submission) -> Outcome {
        let shared = self.shared;
        let mut session = shared.session.lock();
        let found = match ending(&mut session) {
            Ok(audit) => audit.found,
            Err(status) => return Outcome::refused(status),
        };
        session.audit = None;
        if found.compared + found.left_out != session.pages {
            return Outcome::refused(Status::Incomplete);
        }
        self.env.write_mailbox(Region(slot_at(request.slot) + PAYLOAD_AT), &found.encode());
        Outcome::ok(0, VERDICT_BYTES as u32)
    }

    /// Whether a page crossed sealed in this session.
    fn takes_part(&self, page: u64) -> bool {
        self.maps.allows(page) && self.maps.seen(page)
    }

    /// One more than the last chunk that has a page.
    const fn chunks_end(&self) -> u64 {
        self.config.pages.div_ceil(CHUNK_PAGES)
    }

    fn bits(&mut self, slot: u32, index: usize) -> Bits {
        let mut bits = [0; CHUNK_BITS_BYTES];
        let at = slot_at(slot) + AUDIT_BITS_AT + index * CHUNK_BITS_BYTES;
        self.env.read_mailbox(Region(at), &mut bits);
        bits
    }
}

/// The audit of a destination that has START.
fn ending(session: &mut Session) -> Result<&mut Audit, Status> {
    let legal =
        matches!(session.role, Role::Destination(DestinationOp::PostImport | DestinationOp::LiveImport));
    session.audit.as_mut().filter(|_| legal).ok_or(Status::WrongState)
}
