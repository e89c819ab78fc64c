//! Batches of pages: sealed on the way out, opened on the way in.

use mirrorvm_abi::{
    PAGE_BYTES,
    mailbox::{PAYLOAD_AT, Submission, slot_at},
    op::Status,
    record::{Front, HEADER_BYTES, Kind, LISTED_BYTES, Listed, TAG_BYTES, front_bytes},
};

use crate::op_state::{DestinationEvent, DestinationOp};
use crate::shared::{OpenStream, Role};
use crate::worker::{Outcome, Scratch};
use crate::{Env, Region, Worker};

impl<E: Env> Worker<'_, E> {
    /// Seals the pages whose numbers are in the slot: one group. All or nothing as far as refusals go: random
    /// bytes are drawn, the list is checked and claimed before the first page is read.
    #[inline(never)]
    pub(crate) fn export(&mut self, request: &Submission) -> Outcome {
        let count = request.count as usize;
        if count == 0 {
            return Outcome::refused(Status::BadRequest);
        }
        let shared = self.shared;
        let mut stream = shared.streams[self.index as usize].lock();
        let elide_zero = {
            let session = shared.session.lock();
            let legal = matches!(session.role, Role::Source(op) if op.may_export());
            if !legal || session.epoch != request.epoch {
                return Outcome::refused(Status::WrongState);
            }
            session.control.as_ref().is_some_and(|c| c.elide_zero)
        };
        let Some(stream) = stream.open.as_mut() else {
            return Outcome::refused(Status::WrongState);
        };
        let random = match self.random() {
            Ok(random) => random,
            Err(status) => return Outcome::refused(status),
        };
        if let Err(refusal) = self.claim_listed(request.slot, count) {
            return refusal;
        }
        let Ok(group) = stream.sealer.next(Kind::Pages, request.epoch, request.count as u16, random) else {
            return Outcome::refused(Status::Exhausted);
        };
        let start = slot_at(request.slot) + PAYLOAD_AT;
        let mut at = start + front_bytes(count);
        let (mut new_pages, mut zero) = (0, 0);
        for i in 0..count {
            let page = self.scratch.pages[i];
            let body: &mut [u8; PAGE_BYTES] =
                self.scratch.page.first_chunk_mut().expect("scratch holds a page and a tag");
            self.env.read_page(page, body);
            if let Some(next) = self.scratch.pages[i + 1..count].first() {
                self.env.prefetch_page(*next);
            }
            // Of the very bytes that are sealed: a write that comes later differs from them, or changes
            // nothing.
            if let Some(digester) = &stream.digester {
                self.digests.put(page, digester.digest(body));
            }
            let listed = Listed { page, zero: elide_zero && is_zero(body) };
            let (word, len) = (listed.encode(), listed.body_bytes());
            let Ok(tag) = group.seal(i, word, &mut body[..len]) else {
                return Outcome::refused(Status::Exhausted);
            };
            self.scratch.front[front_bytes(i)..][..LISTED_BYTES].copy_from_slice(&word);
            self.env.write_mailbox(Region(at), &body[..len]);
            self.env.write_mailbox(Region(at + len), &tag);
            at += len + TAG_BYTES;
            zero += u32::from(listed.zero);
            stream.tags.update(&tag);
            stream.records += 1;
            new_pages += u64::from(self.maps.see(page));
        }
        self.scratch.front[..HEADER_BYTES].copy_from_slice(group.header());
        self.env.write_mailbox(Region(start), &self.scratch.front[..front_bytes(count)]);
        shared.session.lock().pages += new_pages;
        Outcome { zero, ..Outcome::ok(request.count, (at - start) as u32) }
    }

    /// Copies the page numbers of a batch, checks every one and claims it for the epoch; on a refusal no
    /// claim stays.
    fn claim_listed(&mut self, slot: u32, count: usize) -> Result<(), Outcome> {
        for i in 0..count {
            let mut raw = [0; 8];
            self.env.read_mailbox(Region(slot_at(slot) + i * 8), &mut raw);
            let page = u64::from_le_bytes(raw);
            self.scratch.pages[i] = page;
            let refusal = if !self.maps.allows(page) {
                Status::PageRefused
            } else if !self.maps.claim(page) {
                Status::PageRepeated
            } else {
                continue;
            };
            self.scratch.pages[..i].iter().for_each(|p| self.maps.unclaim(*p));
            return Err(Outcome::refused_at(refusal, i));
        }
        Ok(())
    }

    /// Opens the group in the slot into RAM, piece by piece. Anything that is not the next genuine group of
    /// this stream and epoch ends the session: the destination can then only mint ABORT.
    #[inline(never)]
    pub(crate) fn import(&mut self, request: &Submission) -> Outcome {
        let shared = self.shared;
        let mut stream = shared.streams[self.index as usize].lock();
        let (epoch, fresh) = {
            let session = shared.session.lock();
            if session.role != Role::Destination(DestinationOp::MemoryImport) {
                return Outcome::refused(Status::WrongState);
            }
            (session.epoch, session.control.as_ref().is_some_and(|c| c.fresh))
        };
        let Some(stream) = stream.open.as_mut() else {
            return Outcome::refused(Status::WrongState);
        };
        match self.import_group(stream, request, epoch, fresh) {
            Ok((new_pages, zero)) => {
                shared.session.lock().pages += new_pages;
                Outcome { zero, ..Outcome::ok(request.count, 0) }
            }
            Err((status, index)) => self.fail_import(status, index),
        }
    }

    /// A group; tells how many of its pages are new in the session and how many are zero pages, or what was
    /// wrong with which piece. Header, list and length are looked at before the first piece is.
    fn import_group(
        &mut self,
        stream: &mut OpenStream,
        request: &Submission,
        epoch: u32,
        fresh: bool,
    ) -> Result<(u64, u32), (Status, usize)> {
        let Self { env, scratch, maps, digests, .. } = self;
        let Scratch { front, page, .. } = &mut **scratch;
        let no_group = (Status::Unsealed, 0);
        let start = slot_at(request.slot) + PAYLOAD_AT;
        let front = &mut front[..front_bytes(request.count as usize)];
        if (request.len as usize) < front.len() {
            return Err(no_group);
        }
        env.read_mailbox(Region(start), front);
        let front = Front::read(front)
            .filter(|f| u32::from(f.header.count) == request.count)
            .filter(|f| f.group_bytes() == request.len as usize)
            .filter(|f| f.header.epoch == epoch && request.epoch == epoch)
            .filter(|f| stream.sealer.expects(&f.header))
            .ok_or(no_group)?;
        let group = stream.sealer.group(&front.header).ok_or(no_group)?;
        let mut at = start + front.bytes();
        let (mut new_pages, mut zero) = (0, 0);
        for (i, listed) in front.pages().enumerate() {
            let len = listed.body_bytes();
            let sealed = &mut page[..len + TAG_BYTES];
            env.read_mailbox(Region(at), sealed);
            at += sealed.len();
            let mut tag = [0; TAG_BYTES];
            tag.copy_from_slice(&sealed[len..]);
            if !group.open(i, listed.encode(), sealed) {
                return Err((Status::Unsealed, i));
            }
            // After the tag: a page number that was tampered with fails like any other bit of the group.
            if !maps.allows(listed.page) {
                return Err((Status::PageRefused, i));
            }
            // Only a genuine piece may claim its page, and only once in an epoch.
            if !maps.claim(listed.page) {
                return Err((Status::PageRepeated, i));
            }
            let new = maps.see(listed.page);
            let body = if listed.zero {
                &[0; PAGE_BYTES]
            } else {
                page.first_chunk().expect("scratch holds a page and a tag")
            };
            if !(listed.zero && fresh && new) {
                env.write_page(listed.page, body);
            }
            // Of what was opened, not of what lies in RAM by then: the audit is about what crossed.
            if let Some(digester) = &stream.digester {
                digests.put(listed.page, digester.digest(body));
            }
            stream.tags.update(&tag);
            stream.records += 1;
            new_pages += u64::from(new);
            zero += u32::from(listed.zero);
        }
        stream.sealer.opened();
        Ok((new_pages, zero))
    }

    fn fail_import(&self, status: Status, index: usize) -> Outcome {
        let mut session = self.shared.session.lock();
        if let Role::Destination(op) = session.role
            && let Ok(next) = op.step(DestinationEvent::Fail)
        {
            session.role = Role::Destination(next);
        }
        Outcome::refused_at(status, index)
    }
}

/// Whether a page is all zero. Pages that are not mostly differ in their first bytes.
fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page[..64].iter().all(|b| *b == 0) && page.iter().fold(0, |all, b| all | b) == 0
}
