//! A lane: one worker's rings and slots from the host's side.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mirrorvm_abi::{
    mailbox::{
        BATCH_MAX, CQ_AT, CQ_HEAD, CQ_TAIL, Completion, ENTRY_BYTES, PAYLOAD_AT, PAYLOAD_BYTES, RING_ENTRIES,
        SQ_AT, SQ_TAIL, Submission, entry_at, slot_at,
    },
    op::{Op, Status},
    ring,
};

use super::LaneError;
use super::worker::WorkerShared;
use crate::memory::{Mapping, Span};

/// A request that was answered with success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The slot it used; free again once [`Lane::release`]d.
    pub slot: u32,
    /// Pages that were done.
    pub pages: u32,
    /// How many of them were zero.
    pub zero: u32,
    /// Bytes of output in the slot's payload.
    pub len: usize,
}

/// One worker's rings and slots. One owner at a time; several requests may be under way.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<WorkerShared>,
    slots: Vec<SlotState>,
    cq_head: u32,
    next_id: u64,
    deadline: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    /// Taken by the host, not submitted.
    Held,
    /// With the helper, under this id, with so many pages or records.
    Busy {
        id: u64,
        count: u32,
    },
}

/// Payload of a slot: memory that the helper can change at any time.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    mailbox: &'a Mapping,
    at: u64,
    len: usize,
}

impl Payload<'_> {
    /// Where `len` bytes at `at` lie in the mailbox.
    fn place(&self, at: usize, len: usize) -> u64 {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len} bytes at {at} leave a payload of {}", self.len);
        self.at + at as u64
    }
}

impl Span for Payload<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn write_to(&self, at: usize, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.mailbox.write_to(self.place(at, self.len - at), self.len - at, fd)
    }

    fn read_from(&self, at: usize, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.mailbox.read_from(self.place(at, self.len - at), self.len - at, fd)
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.mailbox.read(self.place(at, to.len()), to);
    }

    fn copy_in(&self, at: usize, from: &[u8]) {
        self.mailbox.write(self.place(at, from.len()), from);
    }
}

impl Lane {
    pub(super) fn new(shared: Arc<WorkerShared>, slots: u32, deadline: Duration) -> Self {
        Self { shared, slots: vec![SlotState::Free; slots as usize], cq_head: 0, next_id: 1, deadline }
    }

    /// Takes a free slot.
    pub fn acquire(&mut self) -> Option<u32> {
        let slot = self.slots.iter().position(|s| *s == SlotState::Free)?;
        self.slots[slot] = SlotState::Held;
        Some(slot as u32)
    }

    /// Gives a slot back.
    pub fn release(&mut self, slot: u32) {
        if let Some(s) = self.slots.get_mut(slot as usize) {
            *s = SlotState::Free;
        }
    }

    /// How many requests are with the helper.
    pub fn in_flight(&self) -> usize {
        self.slots.iter().filter(|s| matches!(s, SlotState::Busy { .. })).count()
    }

    /// Waits for all that is with the helper and gives it up, whatever came of it: a helper must be idle
    /// before anything else is asked of it. A lane that is broken is left as it is.
    pub fn drain(&mut self) {
        while self.in_flight() > 0 {
            match self.wait() {
                Ok(done) => self.release(done.slot),
                Err(LaneError::Refused { .. }) => {}
                Err(_) => break,
            }
        }
    }

    /// Copies into a slot's payload.
    ///
    /// # Panics
    /// When the span leaves the payload.
    pub fn write_payload(&self, slot: u32, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAYLOAD_BYTES, "a payload has {PAYLOAD_BYTES} bytes");
        self.shared.mailbox.write(self.payload_at(slot) + at as u64, bytes);
    }

    /// Copies into what a slot has before its payload.
    pub(super) fn write_list(&self, slot: u32, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAYLOAD_AT, "a list has {PAYLOAD_AT} bytes");
        self.shared.mailbox.write(self.shared.base + (slot_at(slot) + at) as u64, bytes);
    }

    /// Copies out of a slot's payload.
    ///
    /// # Panics
    /// When the span leaves the payload.
    pub fn read_payload(&self, slot: u32, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= PAYLOAD_BYTES, "a payload has {PAYLOAD_BYTES} bytes");
        self.shared.mailbox.read(self.payload_at(slot) + at as u64, bytes);
    }

    /// A slot's payload up to `len` bytes, as memory that a socket reads and writes.
    ///
    /// # Panics
    /// When `len` is more than a payload has.
    pub fn payload(&self, slot: u32, len: usize) -> Payload<'_> {
        assert!(len <= PAYLOAD_BYTES, "a payload has {PAYLOAD_BYTES} bytes");
        Payload { mailbox: &self.shared.mailbox, at: self.payload_at(slot), len }
    }

    /// Asks for an export of `pages` (at most [`BATCH_MAX`]) in a slot that was acquired.
    /// They are what the plan calls helper pages ([`crate::address_space::MirrorPlan::helper_page`]).
    pub fn submit_export(&mut self, slot: u32, pages: &[u64], epoch: u32) {
        debug_assert!(pages.len() <= BATCH_MAX);
        let mut raw = [0u8; BATCH_MAX * 8];
        for (chunk, page) in raw.chunks_exact_mut(8).zip(pages) {
            chunk.copy_from_slice(&page.to_le_bytes());
        }
        let at = self.shared.base + slot_at(slot) as u64;
        self.shared.mailbox.write(at, &raw[..pages.len() * 8]);
        self.submit(slot, Op::Export, pages.len() as u32, 0, epoch);
    }

    /// Asks for an import of `count` records of together `len` bytes that lie in the slot's payload.
    pub fn submit_import(&mut self, slot: u32, count: u32, len: u32, epoch: u32) {
        self.submit(slot, Op::Import, count, len, epoch);
    }

    /// A control operation with `input`: submitted and awaited. Gives up to `output.len()` bytes of answer.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn control(&mut self, op: Op, input: &[u8], output: &mut [u8]) -> Result<(), LaneError> {
        let slot = self.acquire().ok_or(LaneError::NoSlot)?;
        self.write_payload(slot, 0, input);
        self.submit(slot, op, 0, input.len() as u32, 0);
        let done = self.wait();
        if let Ok(done) = &done {
            if done.len != output.len() {
                self.release(slot);
                return Err(LaneError::Broken("an answer of another length"));
            }
            self.read_payload(slot, 0, output);
        }
        self.release(slot);
        done.map(|_| ())
    }

    /// The next answer; sleeps until there is one.
    ///
    /// # Errors
    /// [`LaneError`]; a refusal frees its slot.
    pub fn wait(&mut self) -> Result<Done, LaneError> {
        if let Some(completion) = self.next_completion() {
            return self.accept(completion);
        }
        // One doorbell for half of what is under way: the helper works on the rest meanwhile.
        let enough = (self.in_flight() as u32 / 2).max(1);
        let shared = Arc::clone(&self.shared);
        let (mut cells, head) = (&*shared, self.cq_head);
        ring::wish(&mut cells, head.wrapping_add(enough));
        let waited = shared.wait(Instant::now() + self.deadline, || ring::is_far(&&*shared, head, enough));
        ring::unwish(&mut cells);
        match waited {
            Ok(()) => {
                let completion = self.next_completion().ok_or(LaneError::Broken("its cursor went back"))?;
                self.accept(completion)
            }
            Err(Some(end)) => Err(LaneError::Ended(end)),
            Err(None) => Err(LaneError::Timeout),
        }
    }

    pub(super) fn submit(&mut self, slot: u32, op: Op, count: u32, len: u32, epoch: u32) {
        let id = self.next_id;
        self.next_id += 1;
        self.slots[slot as usize] = SlotState::Busy { id, count };
        let entry = Submission { id, op: op as u32, slot, count, len, epoch };
        let tail = self.shared.sq_tail.load(Ordering::SeqCst);
        self.shared.mailbox.write(self.shared.base + entry_at(SQ_AT, tail) as u64, &entry.encode());
        let tail = tail.wrapping_add(1);
        self.shared.sq_tail.store(tail, Ordering::SeqCst);
        self.shared.set_cursor(SQ_TAIL, tail);
        self.shared.wake();
    }

    /// Takes a completion out of the ring: copied first, looked at then.
    fn next_completion(&mut self) -> Option<Result<Completion, LaneError>> {
        let waiting = self.shared.cursor(CQ_TAIL).wrapping_sub(self.cq_head);
        if waiting == 0 {
            return None;
        }
        if waiting > RING_ENTRIES {
            return Some(Err(LaneError::Broken("its completion cursor is impossible")));
        }
        let mut entry = [0; ENTRY_BYTES];
        self.shared.mailbox.read(self.shared.base + entry_at(CQ_AT, self.cq_head) as u64, &mut entry);
        self.cq_head = self.cq_head.wrapping_add(1);
        self.shared.set_cursor(CQ_HEAD, self.cq_head);
        Some(Ok(Completion::decode(&entry)))
    }

    /// Checks a completion against what was asked: one-shot ids, as many pages, bounded lengths, known
    /// status.
    fn accept(&mut self, completion: Result<Completion, LaneError>) -> Result<Done, LaneError> {
        let c = completion?;
        let asked = |s: &SlotState| match s {
            SlotState::Busy { id, count } => (*id == c.id).then_some(*count),
            SlotState::Free | SlotState::Held => None,
        };
        let (slot, asked) = self
            .slots
            .iter()
            .enumerate()
            .find_map(|(i, s)| asked(s).map(|count| (i, count)))
            .ok_or(LaneError::Broken("it answers what was not asked"))?;
        let status = Status::from_u32(c.status).ok_or(LaneError::Broken("an unknown status"))?;
        // All or nothing: a success is of every page, a refusal names one of them or what comes behind the
        // last.
        let possible = if status == Status::Ok {
            c.count == asked && c.zero <= c.count && c.len as usize <= PAYLOAD_BYTES
        } else {
            c.count <= asked
        };
        if !possible {
            return Err(LaneError::Broken("an answer out of bounds"));
        }
        if status != Status::Ok {
            self.slots[slot] = SlotState::Free;
            return Err(LaneError::Refused { status, index: c.count });
        }
        self.slots[slot] = SlotState::Held;
        Ok(Done { slot: slot as u32, pages: c.count, zero: c.zero, len: c.len as usize })
    }

    fn payload_at(&self, slot: u32) -> u64 {
        self.shared.base + (slot_at(slot) + PAYLOAD_AT) as u64
    }
}
