//! The helper on a machine of plain vectors, and the host's side of its rings.
//!
//! Everything is deterministic: "random" bytes come from a seed, so that a destination can be built twice
//! with the same nonce and keys and be fed the same recorded stream.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod evidence;
pub mod reader;

use std::cell::{Cell, RefCell};
use std::ops::Range as Span;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use mirrorvm_abi::{
    PAGE_BYTES,
    config::{Config, PROTECTION_NONE, RANGE_BYTES, Range},
    evidence::{RELEASE_BYTES, Release},
    mailbox::{
        CQ_AT, CQ_HEAD, Completion, Doorbell, ENTRY_BYTES, PAYLOAD_AT, SQ_AT, SQ_TAIL, Submission, entry_at,
        slot_at, worker_stride,
    },
    op::{AUDIT_BITS_AT, Begin, CHUNK_BITS_BYTES, Greeting, Op, START_BYTES, Scan, Start, Status, Verdict},
    record::{CHUNK_PAGES, Front, HEADER_BYTES, Suite, TAG_BYTES, TOKEN_BYTES},
};
use mirrorvm_helper::{Cursors, Digests, Env, MemoryCopy, PageMaps, Region, Scratch, Shared, Step, Worker};

pub type Page = [u8; PAGE_BYTES];
/// A sealed group, or a token.
pub type Record = Vec<u8>;
/// A refusal: its status and the index of the offending page or record.
pub type Refused = (Status, u32);

/// Slots of every worker here.
pub const SLOTS: u32 = 2;
/// The guest's migration secret here: recognizable, so that its windows cannot be met by chance.
pub const SECRET: [u8; 32] = *b"canary: the guest's own secret!!";

/// SplitMix64.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn page(&mut self) -> Page {
        let mut page = [0; PAGE_BYTES];
        page.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&self.next().to_le_bytes()));
        page
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// What is under the helper, and a record of what the helper did to it.
pub struct Machine {
    pub ram: RefCell<Vec<Page>>,
    pub mailboxes: Vec<RefCell<Vec<u8>>>,
    pub secret: Cell<Option<[u8; 32]>>,
    /// What the guest's owner demands.
    pub release: Cell<[u8; RELEASE_BYTES]>,
    pub entropy: Cell<bool>,
    /// The processor's source: none of the helper's memory.
    pub random: RefCell<Rng>,
    /// What the source gives for every word, and calls random.
    pub stuck: RefCell<Option<u64>>,
    /// Everything that was drawn.
    pub drawn: RefCell<Vec<u8>>,
    /// Mailbox spans that were copied out, by worker.
    pub fetched: RefCell<Vec<(usize, Span<usize>)>>,
    /// Everything that was written into mailboxes.
    pub published: RefCell<Vec<Vec<u8>>>,
    pub pages_read: RefCell<Vec<u64>>,
    pub pages_written: RefCell<Vec<(u64, Page)>>,
    pub bells: RefCell<Vec<Doorbell>>,
    /// Rewrites the mailbox after every look at it.
    pub hostile: RefCell<Option<Rng>>,
    /// Called when the helper reads a page, once.
    pub at_page_read: RefCell<Option<Box<dyn FnOnce()>>>,
    /// What the next read of a page finds instead of it, as when the guest writes while the helper reads.
    pub torn: RefCell<Option<(u64, Page)>>,
}

/// A worker's [`Env`].
pub struct Soft {
    machine: Rc<Machine>,
    worker: usize,
}

impl Env for Soft {
    fn load(&self, at: Region) -> u32 {
        let mailbox = self.machine.mailboxes[self.worker].borrow();
        u32::from_le_bytes(mailbox[at.0..at.0 + 4].try_into().unwrap())
    }

    fn store(&mut self, at: Region, value: u32) {
        self.machine.mailboxes[self.worker].borrow_mut()[at.0..at.0 + 4]
            .copy_from_slice(&value.to_le_bytes());
    }

    fn read_mailbox(&mut self, at: Region, to: &mut [u8]) {
        let mut mailbox = self.machine.mailboxes[self.worker].borrow_mut();
        to.copy_from_slice(&mailbox[at.0..at.0 + to.len()]);
        self.machine.fetched.borrow_mut().push((self.worker, at.0..at.0 + to.len()));
        if let Some(rng) = self.machine.hostile.borrow_mut().as_mut() {
            vandalize(rng, &mut mailbox, at.0, to.len());
        }
    }

    fn write_mailbox(&mut self, at: Region, from: &[u8]) {
        self.machine.mailboxes[self.worker].borrow_mut()[at.0..at.0 + from.len()].copy_from_slice(from);
        self.machine.published.borrow_mut().push(from.to_vec());
    }

    fn read_page(&mut self, page: u64, to: &mut Page) {
        let hook = self.machine.at_page_read.borrow_mut().take();
        if let Some(hook) = hook {
            hook();
        }
        self.machine.pages_read.borrow_mut().push(page);
        *to = self.machine.ram.borrow()[page as usize];
        if let Some((_, torn)) = self.machine.torn.borrow_mut().take_if(|(at, _)| *at == page) {
            *to = torn;
        }
    }

    fn write_page(&mut self, page: u64, from: &Page) {
        self.machine.pages_written.borrow_mut().push((page, *from));
        self.machine.ram.borrow_mut()[page as usize] = *from;
    }

    fn random(&mut self, words: &mut [u64]) -> bool {
        let mut rng = self.machine.random.borrow_mut();
        let stuck = *self.machine.stuck.borrow();
        words.iter_mut().for_each(|word| *word = stuck.unwrap_or_else(|| rng.next()));
        words.iter().for_each(|word| self.machine.drawn.borrow_mut().extend(word.to_le_bytes()));
        self.machine.entropy.get()
    }

    fn secret(&self) -> Option<[u8; 32]> {
        self.machine.secret.get()
    }

    fn release(&self) -> [u8; RELEASE_BYTES] {
        self.machine.release.get()
    }

    fn doorbell(&mut self, reason: Doorbell) {
        self.machine.bells.borrow_mut().push(reason);
    }
}

/// What a second thread of the host would do between two looks: what was just read is not what is there now.
fn vandalize(rng: &mut Rng, mailbox: &mut [u8], at: usize, len: usize) {
    for _ in 0..4 {
        let i = at + rng.below(len.max(1));
        mailbox[i] = mailbox[i].wrapping_add(rng.next() as u8 | 1);
    }
    // And now and then what comes next.
    if rng.below(8) == 0 {
        let i = at + len + rng.below(64);
        if let Some(b) = mailbox.get_mut(i) {
            *b ^= 1 << rng.below(8);
        }
    }
}

/// A helper with the host's side of its rings.
pub struct Side {
    pub machine: Rc<Machine>,
    pub workers: Vec<Option<Worker<'static, Soft>>>,
    pub shared: &'static Shared,
    /// The helper's own memory of digests.
    pub digests: &'static [AtomicU64],
    /// The helper's own memory of which pages it has seen.
    maps: &'static [AtomicU64],
    tails: Vec<u32>,
    heads: Vec<u32>,
    next_id: u64,
}

/// What [`Side::copy`] gives.
pub struct Copied {
    shared: MemoryCopy,
    maps: Vec<u64>,
    digests: Vec<u64>,
    workers: Vec<(Cursors, Scratch)>,
    mailboxes: Vec<Vec<u8>>,
    rings: (Vec<u32>, Vec<u32>),
}

/// The spans of pages that a helper may touch, and how much memory there is behind them.
#[derive(Clone, Debug)]
pub struct Allowed(pub Vec<Span<u64>>);

impl Allowed {
    pub fn pages(&self) -> Vec<u64> {
        self.0.iter().cloned().flatten().collect()
    }

    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |r| r.end)
    }
}

impl Side {
    /// A helper with `workers` workers over zeroed RAM. 64 pages of the machine's memory lie behind the last
    /// allowed one: the helper's own block, as a plan would place it.
    pub fn new(workers: u32, allowed: &Allowed, seed: u64) -> Self {
        Self::guarded(workers, allowed, seed, (PROTECTION_NONE, 0))
    }

    /// The same with room for page digests.
    pub fn scanning(workers: u32, allowed: &Allowed, seed: u64) -> Self {
        Self::build(workers, allowed, seed, (PROTECTION_NONE, 0), true)
    }

    /// The same for a guest with this protection and policy.
    pub fn guarded(workers: u32, allowed: &Allowed, seed: u64, guard: (u32, u32)) -> Self {
        Self::build(workers, allowed, seed, guard, false)
    }

    fn build(
        workers: u32,
        allowed: &Allowed,
        seed: u64,
        (protection, policy): (u32, u32),
        digests: bool,
    ) -> Self {
        let encode = |r: &Span<u64>| Range { first: r.start, count: r.end - r.start }.encode();
        let ranges: Vec<[u8; RANGE_BYTES]> = allowed.0.iter().map(encode).collect();
        let config = Config {
            workers,
            slots: SLOTS,
            pages: allowed.end(),
            ranges: ranges.len() as u32,
            protection,
            policy,
            digests: if digests { allowed.end() } else { 0 },
        };
        assert_eq!(Config::decode(&config.encode()), Some(config), "what the image would accept");
        let machine = Rc::new(Machine {
            ram: RefCell::new(vec![[0; PAGE_BYTES]; allowed.end() as usize + 64]),
            mailboxes: (0..workers).map(|_| RefCell::new(vec![0; worker_stride(SLOTS)])).collect(),
            secret: Cell::new(Some(SECRET)),
            release: Cell::new(Release::NOT_DEMANDED.encode()),
            entropy: Cell::new(true),
            random: RefCell::new(Rng(seed)),
            stuck: RefCell::default(),
            drawn: RefCell::default(),
            fetched: RefCell::default(),
            published: RefCell::default(),
            pages_read: RefCell::default(),
            pages_written: RefCell::default(),
            bells: RefCell::default(),
            hostile: RefCell::default(),
            at_page_read: RefCell::default(),
            torn: RefCell::default(),
        });
        // Leaked, as in the image: statics and fixed addresses.
        let words: &[_] =
            (0..allowed.end().div_ceil(64) * 2).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak();
        let maps = PageMaps::new(ranges.leak(), words);
        // Garbage: what an earlier session or nobody has left there.
        let mut garbage = Rng(!seed);
        let digests = (0..config.digests as usize * Digests::WORDS)
            .map(|_| AtomicU64::new(garbage.next()))
            .collect::<Vec<_>>()
            .leak();
        let shared: &'static Shared = Box::leak(Box::new(Shared::new()));
        let worker = |i: u32| {
            let env = Soft { machine: Rc::clone(&machine), worker: i as usize };
            let scratch = Box::leak(Box::new(Scratch::new()));
            Some(Worker::new(env, shared, maps, scratch, config, i).with_digests(Digests::new(digests)))
        };
        let workers: Vec<_> = (0..workers).map(worker).collect();
        let n = workers.len();
        let (tails, heads) = (vec![0; n], vec![0; n]);
        Self { machine, workers, shared, digests, maps: words, tails, heads, next_id: 1 }
    }

    /// A copy of everything that there is of this helper between two requests but what the processor keeps to
    /// itself: its memory, its registers, its mailbox, and what the host knows of the rings.
    pub fn copy(&mut self) -> Copied {
        let words = |words: &[AtomicU64]| words.iter().map(|w| w.load(Ordering::Relaxed)).collect();
        let worker = |w: &mut Option<Worker<'static, Soft>>| {
            let w = w.as_mut().expect("nobody is inside of a request");
            (w.cursors(), w.scratch().clone())
        };
        Copied {
            shared: self.shared.copy(),
            maps: words(self.maps),
            digests: words(self.digests),
            workers: self.workers.iter_mut().map(worker).collect(),
            mailboxes: self.machine.mailboxes.iter().map(|m| m.borrow().clone()).collect(),
            rings: (self.tails.clone(), self.heads.clone()),
        }
    }

    /// Puts a copy, of this helper or of another of the same image, into its place.
    pub fn put_back(&mut self, copied: &Copied) {
        self.shared.put_back(&copied.shared);
        for (words, then) in [(self.maps, &copied.maps), (self.digests, &copied.digests)] {
            words.iter().zip(then).for_each(|(word, then)| word.store(*then, Ordering::Relaxed));
        }
        for (worker, (cursors, scratch)) in self.workers.iter_mut().zip(&copied.workers) {
            *worker = worker.take().map(|w| w.at(*cursors));
            *worker.as_mut().expect("nobody is inside of a request").scratch() = scratch.clone();
        }
        for (mailbox, then) in self.machine.mailboxes.iter().zip(&copied.mailboxes) {
            mailbox.borrow_mut().clone_from(then);
        }
        (self.tails, self.heads) = copied.rings.clone();
    }

    /// Puts an entry into a worker's ring, payload into its slot.
    pub fn submit(&mut self, worker: usize, request: Submission, payload: &[u8]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let mut mailbox = self.machine.mailboxes[worker].borrow_mut();
        if request.slot < SLOTS {
            let at = slot_at(request.slot) + PAYLOAD_AT;
            mailbox[at..at + payload.len()].copy_from_slice(payload);
        }
        let at = entry_at(SQ_AT, self.tails[worker]);
        mailbox[at..at + ENTRY_BYTES].copy_from_slice(&Submission { id, ..request }.encode());
        self.tails[worker] = self.tails[worker].wrapping_add(1);
        mailbox[SQ_TAIL..SQ_TAIL + 4].copy_from_slice(&self.tails[worker].to_le_bytes());
        id
    }

    /// Takes the answer to `id`.
    pub fn answer(&mut self, worker: usize, id: u64) -> Completion {
        let mut mailbox = self.machine.mailboxes[worker].borrow_mut();
        let at = entry_at(CQ_AT, self.heads[worker]);
        let c = Completion::decode(mailbox[at..at + ENTRY_BYTES].try_into().unwrap());
        self.heads[worker] = self.heads[worker].wrapping_add(1);
        mailbox[CQ_HEAD..CQ_HEAD + 4].copy_from_slice(&self.heads[worker].to_le_bytes());
        if self.machine.hostile.borrow().is_none() {
            assert_eq!(c.id, id, "answers come in order and once");
        }
        c
    }

    /// A request from submission to answer.
    pub fn call(&mut self, worker: usize, request: Submission, payload: &[u8]) -> Completion {
        let id = self.submit(worker, request, payload);
        assert_eq!(self.workers[worker].as_mut().unwrap().step(), Step::Worked);
        self.answer(worker, id)
    }

    /// The first `len` bytes of a slot's payload.
    pub fn payload(&self, worker: usize, slot: u32, len: usize) -> Vec<u8> {
        let at = slot_at(slot) + PAYLOAD_AT;
        self.machine.mailboxes[worker].borrow()[at..at + len].to_vec()
    }

    pub fn control(&mut self, op: Op, input: &[u8]) -> Result<Vec<u8>, Status> {
        let request = Submission { op: op as u32, slot: 1, len: input.len() as u32, ..Default::default() };
        let c = self.call(0, request, input);
        let status = Status::from_u32(c.status).expect("a helper answers known statuses");
        if status == Status::Ok { Ok(self.payload(0, 1, c.len as usize)) } else { Err(status) }
    }

    /// Puts the numbers of `pages` where an export looks for them.
    pub fn list(&self, worker: usize, slot: u32, pages: &[u64]) {
        let raw: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        let at = slot_at(slot);
        self.machine.mailboxes[worker].borrow_mut()[at..at + raw.len()].copy_from_slice(&raw);
    }

    pub fn export(&mut self, worker: usize, epoch: u32, pages: &[u64]) -> Result<Record, Refused> {
        self.list(worker, 0, pages);
        let count = pages.len() as u32;
        let c =
            self.call(worker, Submission { op: Op::Export as u32, count, epoch, ..Default::default() }, &[]);
        match Status::from_u32(c.status).expect("a helper answers known statuses") {
            Status::Ok => {
                assert_eq!(c.count, count);
                let group = self.payload(worker, 0, c.len as usize);
                let front = Front::read(&group).expect("a helper writes good fronts");
                assert_eq!((front.pages().len(), front.group_bytes()), (pages.len(), group.len()));
                assert!(front.pages().map(|p| p.page).eq(pages.iter().copied()));
                assert_eq!(c.zero as usize, front.pages().filter(|p| p.zero).count());
                Ok(group)
            }
            refused => Err((refused, c.count)),
        }
    }

    /// Scans `pages`, and gives those that are found.
    pub fn scan(&mut self, worker: usize, epoch: u32, pages: Span<u64>) -> Result<Vec<u64>, Status> {
        let scan = Scan { first: pages.start, count: (pages.end - pages.start) as u32 };
        let c = self.scan_raw(worker, epoch, &scan.encode());
        match Status::from_u32(c.status).expect("a helper answers known statuses") {
            Status::Ok => {
                assert_eq!((c.count, c.zero, c.len as usize), (0, 0, scan.bitmap_bytes()));
                let map = self.payload(worker, 0, c.len as usize);
                let bit = |i: u64| map[(i / 8) as usize] >> (i % 8) & 1 != 0;
                assert!(
                    (u64::from(scan.count)..map.len() as u64 * 8).all(|i| !bit(i)),
                    "bits behind the last"
                );
                Ok(pages.clone().filter(|p| bit(p - pages.start)).collect())
            }
            refused => {
                assert_eq!((c.count, c.zero, c.len), (0, 0, 0));
                Err(refused)
            }
        }
    }

    pub fn scan_raw(&mut self, worker: usize, epoch: u32, payload: &[u8]) -> Completion {
        let len = payload.len() as u32;
        self.call(worker, Submission { op: Op::Scan as u32, len, epoch, ..Default::default() }, payload)
    }

    /// Puts the bits of pages that are left out where an audit looks for them, and `chunks` before them.
    fn lay_out(&self, chunks: &[u64], left_out: &[u64]) {
        self.list(0, 0, chunks);
        let mut bits = vec![0; CHUNK_BITS_BYTES * chunks.len()];
        for page in left_out {
            if let Some(i) = chunks.iter().position(|chunk| *chunk == page / CHUNK_PAGES) {
                let bit = (page % CHUNK_PAGES) as usize;
                bits[i * CHUNK_BITS_BYTES + bit / 8] |= 1 << (bit % 8);
            }
        }
        let at = slot_at(0) + AUDIT_BITS_AT;
        self.machine.mailboxes[0].borrow_mut()[at..at + bits.len()].copy_from_slice(&bits);
    }

    /// Digests of these chunks, sealed.
    pub fn digest(&mut self, chunks: &[u64], left_out: &[u64]) -> Result<Record, Status> {
        self.lay_out(chunks, left_out);
        let count = chunks.len() as u32;
        let c = self.call(0, Submission { op: Op::Digests as u32, count, ..Default::default() }, &[]);
        match Status::from_u32(c.status).expect("a helper answers known statuses") {
            Status::Ok => {
                assert_eq!((c.count, c.zero), (count, 0));
                Ok(self.payload(0, 0, c.len as usize))
            }
            refused => Err(refused),
        }
    }

    /// Compares a group of digests, of as many chunks as it says that it has.
    pub fn compare(&mut self, group: &[u8], left_out: &[u64]) -> Result<(), Status> {
        let count = group.get(6..8).map_or(0, |b| u16::from_le_bytes(b.try_into().unwrap()));
        let chunks: Vec<u64> =
            Front::read_digests(group).map_or(Vec::new(), |front| front.pages().map(|c| c.page).collect());
        self.lay_out(&chunks, left_out);
        self.compare_raw(count.into(), group)
    }

    pub fn compare_raw(&mut self, count: u32, payload: &[u8]) -> Result<(), Status> {
        let len = payload.len() as u32;
        let request = Submission { op: Op::Compare as u32, count, len, ..Default::default() };
        let c = self.call(0, request, payload);
        match Status::from_u32(c.status).expect("a helper answers known statuses") {
            Status::Ok => Ok(()),
            refused => Err(refused),
        }
    }

    pub fn verdict(&mut self) -> Result<Verdict, Status> {
        let raw = self.control(Op::Verdict, &[])?;
        Ok(Verdict::decode(raw.as_slice().try_into().unwrap()))
    }

    /// Opens a group, as many pages as it says that it has.
    pub fn import(&mut self, worker: usize, epoch: u32, group: &[u8]) -> Result<(), Refused> {
        let count = group.get(6..8).map_or(0, |b| u16::from_le_bytes(b.try_into().unwrap()));
        let c = self.import_raw(worker, epoch, count.into(), group);
        match Status::from_u32(c.status).expect("a helper answers known statuses") {
            Status::Ok => Ok(()),
            refused => Err((refused, c.count)),
        }
    }

    pub fn import_raw(&mut self, worker: usize, epoch: u32, count: u32, payload: &[u8]) -> Completion {
        let len = payload.len() as u32;
        self.call(worker, Submission { op: Op::Import as u32, count, len, epoch, slot: 0, id: 0 }, payload)
    }

    pub fn hello(&mut self) -> Greeting {
        Greeting::decode(self.control(Op::Hello, &[]).unwrap().as_slice().try_into().unwrap())
    }

    pub fn token(&mut self, op: Op, input: &[u8]) -> Vec<u8> {
        let token = self.control(op, input).unwrap();
        assert_eq!(token.len(), TOKEN_BYTES);
        token
    }

    pub fn start(&mut self, shared_pages: u64) -> Result<Vec<u8>, Status> {
        let raw: [u8; START_BYTES] = Start { state: STATE, shared_pages }.encode();
        self.control(Op::Start, &raw)
    }

    /// Nothing is legal any more but to give up: every other operation is refused, no page is touched.
    pub fn assert_dead_destination(&mut self) {
        let written = self.machine.pages_written.borrow().len();
        for op in Op::ALL.iter().filter(|op| **op != Op::Abort) {
            let len = match op {
                Op::Begin => mirrorvm_abi::op::BEGIN_BYTES,
                Op::Start => START_BYTES,
                Op::State => 32,
                Op::EpochToken | Op::StartToken | Op::AbortToken | Op::CommitToken => TOKEN_BYTES,
                _ => 0,
            };
            let mut payload = vec![0; len];
            if *op == Op::Begin {
                (payload[0], payload[3]) = (1, Suite::Aes256Gcm as u8);
            }
            let request = Submission {
                op: *op as u32,
                len: len as u32,
                epoch: 1,
                count: u32::from(*op == Op::Export),
                ..Default::default()
            };
            let c = self.call(0, request, &payload);
            assert_eq!(Status::from_u32(c.status), Some(Status::WrongState), "{op:?} in a dead session");
        }
        assert_eq!(self.machine.pages_written.borrow().len(), written);
        self.token(Op::Abort, &[]);
    }
}

/// Digest of the vCPU state in these tests.
pub const STATE: [u8; 32] = [0x5a; 32];

/// Where piece `index` of a group of pages lies: ciphertext and tag.
pub fn piece(group: &[u8], index: usize) -> Span<usize> {
    let front = Front::read(group).or_else(|| Front::read_digests(group)).unwrap();
    let len = |i: usize| front.pages().nth(i).unwrap().body_bytes() + TAG_BYTES;
    let start = front.bytes() + (0..index).map(len).sum::<usize>();
    start..start + len(index)
}

/// The header of a group or token.
pub fn head(record: &[u8]) -> [u8; HEADER_BYTES] {
    *record.first_chunk().unwrap()
}

/// A source and a destination with a session between them.
pub struct Pair {
    pub source: Side,
    pub destination: Side,
    pub begin: Begin,
    /// What the helpers greeted each other with, the source's first.
    pub greetings: (Greeting, Greeting),
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub workers: u32,
    pub allowed: Allowed,
    pub elide_zero: bool,
    pub fresh: bool,
    /// The source has room for page digests.
    pub scanning: bool,
    /// An audit follows START; the destination has room for digests.
    pub audit: bool,
    pub suite: Suite,
    pub session: [u8; 16],
    pub transcript: [u8; 32],
    pub seeds: (u64, u64),
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            workers: 1,
            allowed: Allowed(vec![0..8]),
            elide_zero: false,
            fresh: false,
            scanning: false,
            audit: false,
            suite: Suite::Aes256Gcm,
            session: [9; 16],
            transcript: [3; 32],
            seeds: (1, 2),
        }
    }
}

impl Pair {
    /// Both ends have begun. The source's RAM is random, the destination's zero.
    pub fn new(setup: &Setup) -> Self {
        let side = if setup.scanning { Side::scanning } else { Side::new };
        let mut source = side(setup.workers, &setup.allowed, setup.seeds.0);
        let mut rng = Rng(setup.seeds.0 ^ 0xffff);
        source.machine.ram.borrow_mut().iter_mut().for_each(|p| *p = rng.page());
        let side = if setup.audit { Side::scanning } else { Side::new };
        let mut destination = side(setup.workers, &setup.allowed, setup.seeds.1);
        let greetings = (source.hello(), destination.hello());
        let begin = Begin {
            source: true,
            elide_zero: setup.elide_zero,
            fresh: false,
            digests: setup.scanning,
            audit: setup.audit,
            suite: setup.suite,
            streams: setup.workers as u16,
            session: setup.session,
            peer: greetings.1,
            transcript: setup.transcript,
        };
        source.control(Op::Begin, &begin.encode()).unwrap();
        let mut pair = Self { source, destination, begin, greetings };
        let theirs = pair.destination_begin(setup.fresh);
        pair.destination.control(Op::Begin, &theirs.encode()).unwrap();
        pair
    }

    fn destination_begin(&self, fresh: bool) -> Begin {
        Begin { source: false, peer: self.greetings.0, fresh, ..self.begin }
    }

    /// A new destination that is the same in every bit: same nonce, same session. What was recorded for the
    /// first opens there.
    pub fn twin(&self, setup: &Setup) -> Side {
        let side = if setup.audit { Side::scanning } else { Side::new };
        let mut twin = side(setup.workers, &setup.allowed, setup.seeds.1);
        assert_eq!(twin.hello(), self.greetings.1);
        twin.control(Op::Begin, &self.destination_begin(setup.fresh).encode()).unwrap();
        twin
    }

    /// Ends the epoch at both ends.
    pub fn end_epoch(&mut self) {
        let token = self.source.token(Op::EndEpoch, &[]);
        self.destination.control(Op::EpochToken, &token).unwrap();
    }

    /// Pause, START, state, up to where the destination may commit.
    pub fn hand_over(&mut self) {
        self.source.control(Op::Pause, &[]).unwrap();
        let start = self.source.start(0).unwrap();
        self.destination.control(Op::State, &STATE).unwrap();
        self.destination.control(Op::StartToken, &start).unwrap();
    }

    pub fn assert_equal_ram(&self, allowed: &Allowed) {
        let (a, b) = (self.source.machine.ram.borrow(), self.destination.machine.ram.borrow());
        for p in allowed.pages() {
            assert!(a[p as usize] == b[p as usize], "page {p} differs");
        }
    }
}
