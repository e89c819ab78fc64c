//! One worker: takes requests from its ring, does them, answers.

use mirrorvm_abi::{
    PAGE_BYTES,
    config::Config,
    mailbox::{
        BATCH_MAX, CQ_AT, CQ_HEAD, CQ_TAIL, Completion, Doorbell, ENTRY_BYTES, Fatal, RING_ENTRIES, SQ_AT,
        SQ_HEAD, SQ_TAIL, Submission, WANT_COMPLETION, entry_at,
    },
    op::{Op, Status},
    record::TAG_BYTES,
};

use crate::{Env, PageMaps, Region, Shared};

/// A worker's private memory for one batch.
pub struct Scratch {
    pub(crate) pages: [u64; BATCH_MAX],
    pub(crate) page: [u8; PAGE_BYTES + TAG_BYTES],
}

impl Scratch {
    /// Zeroed.
    pub const fn new() -> Self {
        Self { pages: [0; BATCH_MAX], page: [0; PAGE_BYTES + TAG_BYTES] }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// What one turn of the loop did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request was done and answered.
    Worked,
    /// There is none.
    Idle,
    /// The host broke the ring; the worker must not go on.
    Fatal(Fatal),
}

/// How a request ended: status, pages done (or index of the offending one), bytes of output.
pub(crate) struct Outcome {
    pub status: Status,
    pub count: u32,
    pub len: u32,
    pub zero: u32,
}

impl Outcome {
    pub const fn ok(count: u32, len: u32) -> Self {
        Self { status: Status::Ok, count, len, zero: 0 }
    }

    pub const fn refused(status: Status) -> Self {
        Self { status, count: 0, len: 0, zero: 0 }
    }

    pub const fn refused_at(status: Status, index: usize) -> Self {
        Self { status, count: index as u32, len: 0, zero: 0 }
    }
}

/// A worker of the mirror.
pub struct Worker<'a, E> {
    pub(crate) env: E,
    pub(crate) shared: &'a Shared,
    pub(crate) maps: PageMaps<'a>,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) config: Config,
    pub(crate) index: u32,
    // Private cursors: what the mailbox says of them is never read back.
    sq_head: u32,
    cq_tail: u32,
}

impl<'a, E: Env> Worker<'a, E> {
    /// Worker `index` of those in `config`.
    pub const fn new(
        env: E,
        shared: &'a Shared,
        maps: PageMaps<'a>,
        scratch: &'a mut Scratch,
        config: Config,
        index: u32,
    ) -> Self {
        Self { env, shared, maps, scratch, config, index, sq_head: 0, cq_tail: 0 }
    }

    /// The machine under it.
    pub const fn env(&mut self) -> &mut E {
        &mut self.env
    }

    /// Works for ever, ringing the doorbell when idle. Returns only when the host broke the ring.
    pub fn run(&mut self) -> Fatal {
        loop {
            match self.step() {
                Step::Worked => {}
                Step::Idle => self.env.doorbell(Doorbell::Idle),
                Step::Fatal(why) => return why,
            }
        }
    }

    /// Does one request, if there is one.
    pub fn step(&mut self) -> Step {
        let tail = self.env.load(Region(SQ_TAIL));
        let waiting = tail.wrapping_sub(self.sq_head);
        if waiting == 0 {
            return Step::Idle;
        }
        if waiting > RING_ENTRIES {
            return Step::Fatal(Fatal::BadCursor);
        }
        let mut entry = [0; ENTRY_BYTES];
        self.env.read_mailbox(Region(entry_at(SQ_AT, self.sq_head)), &mut entry);
        let request = Submission::decode(&entry);
        self.sq_head = self.sq_head.wrapping_add(1);
        self.env.store(Region(SQ_HEAD), self.sq_head);

        let outcome = self.perform(&request);
        let answer = Completion {
            id: request.id,
            status: outcome.status as u32,
            len: outcome.len,
            count: outcome.count,
            zero: outcome.zero,
        };
        let unread = self.cq_tail.wrapping_sub(self.env.load(Region(CQ_HEAD)));
        if unread >= RING_ENTRIES {
            return Step::Fatal(Fatal::BadCursor);
        }
        self.env.write_mailbox(Region(entry_at(CQ_AT, self.cq_tail)), &answer.encode());
        self.cq_tail = self.cq_tail.wrapping_add(1);
        self.env.store(Region(CQ_TAIL), self.cq_tail);
        // The host sets its wish, then looks at the cursor; we move the cursor, then look at the wish. Without
        // the fence both could look first, and the host would sleep for ever.
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        if self.env.load(Region(WANT_COMPLETION)) != 0 {
            self.env.doorbell(Doorbell::Completion);
        }
        Step::Worked
    }

    fn perform(&mut self, request: &Submission) -> Outcome {
        let Some(op) = Op::from_u32(request.op) else {
            return Outcome::refused(Status::UnknownOp);
        };
        if request.slot >= self.config.slots
            || request.count as usize > BATCH_MAX
            || request.len as usize > mirrorvm_abi::mailbox::PAYLOAD_BYTES
        {
            return Outcome::refused(Status::BadRequest);
        }
        match op {
            Op::Export => self.export(request),
            Op::Import => self.import(request),
            _ => self.control(op, request),
        }
    }
}
