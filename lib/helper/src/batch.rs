//! Batches of pages: sealed on the way out, opened on the way in.

use mirrorvm_abi::{
    PAGE_BYTES,
    mailbox::{PAYLOAD_AT, Submission, slot_at},
    op::Status,
    record::{HEADER_BYTES, Header, Kind, TAG_BYTES},
};

use crate::op_state::{DestinationEvent, DestinationOp};
use crate::shared::{OpenStream, Role};
use crate::worker::Outcome;
use crate::{Env, Region, Worker};

impl<E: Env> Worker<'_, E> {
    /// Seals the pages whose numbers are in the slot. All or nothing as far as refusals go: the list is
    /// checked and claimed before the first page is read.
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
        if let Err(refusal) = self.claim_listed(request.slot, count) {
            return refusal;
        }
        let start = slot_at(request.slot) + PAYLOAD_AT;
        let mut at = start;
        let (mut new_pages, mut zero) = (0, 0);
        for i in 0..count {
            let page = self.scratch.pages[i];
            let body: &mut [u8; PAGE_BYTES] =
                self.scratch.page.first_chunk_mut().expect("scratch holds a page and a tag");
            self.env.read_page(page, body);
            // Of the very bytes that are sealed: a write that comes later differs from them, or changes
            // nothing.
            if let Some(digester) = &stream.digester {
                self.digests.put(page, digester.digest(body));
            }
            let kind = if elide_zero && is_zero(body) { Kind::ZeroPage } else { Kind::Page };
            let len = kind.body_bytes();
            let header = Header {
                kind,
                stream: self.index as u16,
                epoch: request.epoch,
                sequence: 0,
                page,
                len: len as u32,
            };
            let Ok((header, tag)) = stream.sealer.seal(header, &mut body[..len]) else {
                return Outcome::refused(Status::Exhausted);
            };
            self.env.write_mailbox(Region(at), &header);
            self.env.write_mailbox(Region(at + HEADER_BYTES), &body[..len]);
            self.env.write_mailbox(Region(at + HEADER_BYTES + len), &tag);
            at += HEADER_BYTES + len + TAG_BYTES;
            zero += u32::from(kind == Kind::ZeroPage);
            stream.tags.update(&tag);
            stream.records += 1;
            new_pages += u64::from(self.maps.see(page));
        }
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

    /// Opens the records in the slot into RAM, one after the other. Anything that is not the next genuine
    /// record of this stream and epoch ends the session: the destination can then only mint ABORT.
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
        let mut cursor = Cursor { at: slot_at(request.slot) + PAYLOAD_AT, left: request.len as usize };
        let (mut new_pages, mut zero) = (0, 0);
        for i in 0..request.count as usize {
            match self.import_one(stream, &mut cursor, epoch, request.epoch, fresh) {
                Ok((new, is_zero)) => {
                    new_pages += u64::from(new);
                    zero += u32::from(is_zero);
                }
                Err(status) => return self.fail_import(status, i),
            }
        }
        if cursor.left != 0 {
            return self.fail_import(Status::Unsealed, request.count as usize);
        }
        shared.session.lock().pages += new_pages;
        Outcome { zero, ..Outcome::ok(request.count, 0) }
    }

    /// One record; tells whether its page is new in the session and whether it is a zero page.
    fn import_one(
        &mut self,
        stream: &mut OpenStream,
        cursor: &mut Cursor,
        epoch: u32,
        claimed: u32,
        fresh: bool,
    ) -> Result<(bool, bool), Status> {
        let mut raw = [0; HEADER_BYTES];
        self.env.read_mailbox(cursor.take(HEADER_BYTES)?, &mut raw);
        let header = Header::decode(&raw)
            .filter(|h| matches!(h.kind, Kind::Page | Kind::ZeroPage))
            .filter(|h| h.stream == self.index as u16 && h.epoch == epoch && claimed == epoch)
            .filter(|h| stream.sealer.expects(h))
            .ok_or(Status::Unsealed)?;
        let len = header.kind.body_bytes();
        let sealed = &mut self.scratch.page[..len + TAG_BYTES];
        self.env.read_mailbox(cursor.take(len + TAG_BYTES)?, sealed);
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&sealed[len..]);
        if !stream.sealer.open(&header, sealed) {
            return Err(Status::Unsealed);
        }
        // After the tag: a page number that was tampered with fails like any other bit of the record.
        if !self.maps.allows(header.page) {
            return Err(Status::PageRefused);
        }
        // Only a genuine record may claim its page, and only once in an epoch.
        if !self.maps.claim(header.page) {
            return Err(Status::PageRepeated);
        }
        let new = self.maps.see(header.page);
        let zero = header.kind == Kind::ZeroPage;
        if !zero {
            let body = self.scratch.page.first_chunk().expect("scratch holds a page and a tag");
            self.env.write_page(header.page, body);
        } else if !(fresh && new) {
            self.env.write_page(header.page, &[0; PAGE_BYTES]);
        }
        stream.tags.update(&tag);
        stream.records += 1;
        Ok((new, zero))
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

/// Where the next bytes of a payload are; never past what the request declared.
struct Cursor {
    at: usize,
    left: usize,
}

impl Cursor {
    fn take(&mut self, len: usize) -> Result<Region, Status> {
        self.left = self.left.checked_sub(len).ok_or(Status::Unsealed)?;
        let region = Region(self.at);
        self.at += len;
        Ok(region)
    }
}

/// Whether a page is all zero. Pages that are not mostly differ in their first bytes.
fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page[..64].iter().all(|b| *b == 0) && page.iter().fold(0, |all, b| all | b) == 0
}
