//! One worker: takes requests from its ring, does them, answers.

use mirrorvm_abi::{
    PAGE_BYTES,
    config::Config,
    mailbox::{
        BATCH_MAX, CQ_AT, CQ_HEAD, Completion, Doorbell, ENTRY_BYTES, Fatal, RING_ENTRIES, SQ_AT, SQ_HEAD,
        SQ_TAIL, Submission, entry_at,
    },
    op::{Op, Status},
    record::{RANDOM_BYTES, TAG_BYTES, front_bytes},
    ring::{self, Cells},
};
use zeroize::zeroize_stack;

use crate::random::Drawn;
use crate::{Digests, Env, PageMaps, Region, Shared};

/// Stack that is wiped behind a group: twice what a key schedule takes with all that works on it.
const GROUP_BYTES: usize = 8 << 10;

/// A worker's private memory for one batch.
#[derive(Clone)]
pub struct Scratch {
    pub(crate) pages: [u64; BATCH_MAX],
    pub(crate) page: [u8; PAGE_BYTES + TAG_BYTES],
    /// A chunk of digests, beside the page that is digested.
    pub(crate) chunk: [u8; PAGE_BYTES + TAG_BYTES],
    /// Header and list of a group.
    pub(crate) front: [u8; front_bytes(BATCH_MAX)],
    pub(crate) drawn: Drawn,
}

impl Scratch {
    /// Zeroed.
    pub const fn new() -> Self {
        Self {
            pages: [0; BATCH_MAX],
            page: [0; PAGE_BYTES + TAG_BYTES],
            chunk: [0; PAGE_BYTES + TAG_BYTES],
            front: [0; front_bytes(BATCH_MAX)],
            drawn: Drawn::nothing(),
        }
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

/// The control page, by way of the machine.
struct Control<'e, E>(&'e mut E);

impl<E: Env> Cells for Control<'_, E> {
    fn load(&self, at: usize) -> u32 {
        self.0.load(Region(at))
    }

    fn store(&mut self, at: usize, value: u32) {
        self.0.store(Region(at), value);
    }

    fn fence(&self) {
        self.0.fence();
    }
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

/// A worker's place in its rings: all that it keeps between two requests, apart from what [`Shared`] holds.
/// What the mailbox says of it is never read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cursors {
    /// Submissions taken.
    pub taken: u32,
    /// Completions given.
    pub answered: u32,
}

/// A worker of the mirror.
pub struct Worker<'a, E> {
    pub(crate) env: E,
    pub(crate) shared: &'a Shared,
    pub(crate) maps: PageMaps<'a>,
    pub(crate) digests: Digests<'a>,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) config: Config,
    pub(crate) index: u32,
    cursors: Cursors,
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
        let (digests, cursors) = (Digests::none(), Cursors { taken: 0, answered: 0 });
        Self { env, shared, maps, digests, scratch, config, index, cursors }
    }

    /// The same worker with room for the digests of pages: its sessions as a source can be scanned.
    pub const fn with_digests(mut self, digests: Digests<'a>) -> Self {
        self.digests = digests;
        self
    }

    /// The same worker where an earlier one stopped: for a machine that does not keep it between two turns.
    pub const fn at(mut self, cursors: Cursors) -> Self {
        self.cursors = cursors;
        self
    }

    /// Where it stands.
    pub const fn cursors(&self) -> Cursors {
        self.cursors
    }

    /// Its private memory.
    pub const fn scratch(&mut self) -> &mut Scratch {
        self.scratch
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
        let waiting = tail.wrapping_sub(self.cursors.taken);
        if waiting == 0 {
            return Step::Idle;
        }
        if waiting > RING_ENTRIES {
            return Step::Fatal(Fatal::BadCursor);
        }
        let mut entry = [0; ENTRY_BYTES];
        self.env.read_mailbox(Region(entry_at(SQ_AT, self.cursors.taken)), &mut entry);
        let request = Submission::decode(&entry);
        self.cursors.taken = self.cursors.taken.wrapping_add(1);
        self.env.store(Region(SQ_HEAD), self.cursors.taken);

        let outcome = self.perform(&request);
        let answer = Completion {
            id: request.id,
            status: outcome.status as u32,
            len: outcome.len,
            count: outcome.count,
            zero: outcome.zero,
        };
        let unread = self.cursors.answered.wrapping_sub(self.env.load(Region(CQ_HEAD)));
        if unread >= RING_ENTRIES {
            return Step::Fatal(Fatal::BadCursor);
        }
        self.env.write_mailbox(Region(entry_at(CQ_AT, self.cursors.answered)), &answer.encode());
        self.cursors.answered = self.cursors.answered.wrapping_add(1);
        if ring::tell(&mut Control(&mut self.env), self.cursors.answered) {
            self.env.doorbell(Doorbell::Completion);
        }
        Step::Worked
    }

    /// What makes a group's key one that never was: fresh for each request.
    pub(crate) fn random(&mut self) -> Result<[u8; RANDOM_BYTES], Status> {
        self.scratch.drawn.draw(&mut self.env)
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
        let outcome = match op {
            Op::Export => self.export(request),
            Op::Import => self.import(request),
            Op::Scan => return self.scan(request),
            Op::Digests => return self.digests(request),
            Op::Compare => return self.compare(request),
            Op::Verdict => return self.verdict(request),
            _ => return self.control(op, request),
        };
        // The group's key has served. A cipher of that kind does not wipe itself; what it lay in does.
        zeroize_stack::<GROUP_BYTES>();
        outcome
    }
}
