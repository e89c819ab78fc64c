//! The helper, natively: `mirrorvm_helper`'s worker over the software MMU.
//!
//! What the bare-metal helper keeps in its own data and page maps (session, keys, which pages it has seen) is
//! kept natively here, once a VM. It stands for memory that only the helper can reach; nothing of it is in
//! any slot.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::config::{Config, FIXED_BYTES, RANGE_BYTES, SECRET_BYTES, SECRET_MAGIC};
use mirrorvm_abi::evidence::{RELEASE_AT, RELEASE_BYTES};
use mirrorvm_abi::layout as abi;
use mirrorvm_abi::mailbox::{DOORBELL_PORT, Doorbell, Fatal, worker_stride};
use mirrorvm_helper::{Cursors, Digests, Env, MemoryCopy, PageMaps, Region, Scratch, Shared, Step, Worker};
use ring::rand::{SecureRandom, SystemRandom};

use super::mmu::{Access, Fault, Mmu};
use super::programs::clear_helper_data;
use crate::addr::HelperVa;
use crate::hypervisor::Exit;
use crate::sync::Locked;

/// What the workers of one mirror share.
pub(super) struct HelperMemory {
    config: Config,
    allowed: Vec<[u8; RANGE_BYTES]>,
    maps: Box<[AtomicU64]>,
    digests: Box<[AtomicU64]>,
    shared: Shared,
}

/// Where a VM keeps it once a helper has started.
pub(super) type HelperPlace = Mutex<Option<Arc<HelperMemory>>>;

/// How a helper's start ended.
pub(super) enum Start {
    Ready(Arc<HelperMemory>),
    /// The configuration is none.
    BadConfig,
}

/// What a worker does before its first request: the first one clears the helper's data, each reads its
/// configuration.
pub(super) fn start(mmu: &Mmu<'_>, place: &HelperPlace, index: u64) -> Result<Start, Fault> {
    if index == 0 {
        clear_helper_data(mmu)?;
    }
    let mut raw = [0; FIXED_BYTES];
    mmu.read(HelperVa::new(abi::CONFIG_VA), &mut raw)?;
    let Some(config) = Config::decode(&raw).filter(|c| index < u64::from(c.workers)) else {
        return Ok(Start::BadConfig);
    };
    let mut place = place.locked();
    let memory = match &*place {
        Some(memory) if memory.config == config => Arc::clone(memory),
        Some(_) => return Ok(Start::BadConfig),
        None => Arc::new(HelperMemory::new(mmu, config)?),
    };
    *place = Some(Arc::clone(&memory));
    Ok(Start::Ready(memory))
}

impl HelperMemory {
    fn new(mmu: &Mmu<'_>, config: Config) -> Result<Self, Fault> {
        // Bounded by what fits the configuration pages: `Config::decode`.
        let mut allowed = vec![0; config.ranges as usize * RANGE_BYTES];
        mmu.read(HelperVa::new(abi::CONFIG_VA + FIXED_BYTES as u64), &mut allowed)?;
        let words = config.pages.div_ceil(64) as usize * 2;
        // The maps would lie in the helper's memory: no more of them than the plan gives and than there is
        // memory.
        if words as u64 * 8 > mmu.slot_bytes() {
            return Err(Fault::Exception);
        }
        mmu.probe(HelperVa::new(abi::MAPS_VA), words * 8, Access::Write)?;
        let digests = config.digests as usize * Digests::WORDS;
        if digests as u64 * 8 > mmu.slot_bytes() {
            return Err(Fault::Exception);
        }
        if digests > 0 {
            mmu.probe(HelperVa::new(abi::DIGESTS_VA), digests * 8, Access::Write)?;
        }
        Ok(Self {
            config,
            allowed: allowed.as_chunks().0.to_vec(),
            maps: (0..words).map(|_| AtomicU64::new(0)).collect(),
            digests: (0..digests).map(|_| AtomicU64::new(0)).collect(),
            shared: Shared::new(),
        })
    }
}

/// What a host has that copied a helper's memory.
pub(super) struct Copied {
    maps: Vec<u64>,
    digests: Vec<u64>,
    shared: MemoryCopy,
}

impl HelperMemory {
    /// Copies it, between two requests.
    pub fn copy(&self) -> Copied {
        let words = |words: &[AtomicU64]| words.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        Copied { shared: self.shared.copy(), maps: words(&self.maps), digests: words(&self.digests) }
    }

    /// Puts a copy into its place.
    pub fn put_back(&self, copied: &Copied) {
        self.shared.put_back(&copied.shared);
        for (words, then) in [(&self.maps, &copied.maps), (&self.digests, &copied.digests)] {
            words.iter().zip(then).for_each(|(word, then)| word.store(*then, Ordering::Relaxed));
        }
    }
}

/// What a worker needs for one turn on its vCPU.
pub(super) struct Turn<'a> {
    worker: Worker<'a, Window<'a>>,
}

impl<'a> Turn<'a> {
    /// Worker `index` goes on at `cursors`.
    pub fn new(
        mmu: &'a Mmu<'a>,
        memory: &'a HelperMemory,
        scratch: &'a mut Scratch,
        index: u64,
        cursors: Cursors,
    ) -> Self {
        let config = memory.config;
        let mailbox = abi::MAILBOX_VA + index * worker_stride(config.slots) as u64;
        let env = Window { mmu, mailbox, fault: Cell::new(None), bell: None };
        let maps = PageMaps::new(&memory.allowed, &memory.maps);
        let worker = Worker::new(env, &memory.shared, maps, scratch, config, index as u32);
        Self { worker: worker.with_digests(Digests::new(&memory.digests)).at(cursors) }
    }

    /// Does one request at most; `None` while there is more to do.
    pub fn step(&mut self, cursors: &mut Cursors) -> Result<Option<Exit>, Fault> {
        // As the image does: a panic is the helper's last word, not the host's.
        let step = catch_unwind(AssertUnwindSafe(|| self.worker.step()));
        let env = self.worker.env();
        if let Some(fault) = env.fault.get() {
            return Err(fault);
        }
        // A doorbell is the last thing that a request does, so leaving after it is leaving at it.
        let bell = env.bell.take();
        *cursors = self.worker.cursors();
        Ok(match step {
            Ok(Step::Worked) => bell.map(|reason| ring(reason as u32)),
            Ok(Step::Idle) => Some(ring(Doorbell::Idle as u32)),
            Ok(Step::Fatal(why)) => Some(fatal(why)),
            Err(_) => Some(fatal(Fatal::Panic)),
        })
    }
}

/// The helper's last words; it says them for ever.
pub(super) fn fatal(why: Fatal) -> Exit {
    ring(Doorbell::Fatal as u32 | (why as u32) << 8)
}

const fn ring(value: u32) -> Exit {
    Exit::PortWrite { port: DOORBELL_PORT, value }
}

/// The machine under a worker. After a fault nothing has an effect any more: a processor would not go on.
struct Window<'a> {
    mmu: &'a Mmu<'a>,
    mailbox: u64,
    fault: Cell<Option<Fault>>,
    bell: Option<Doorbell>,
}

impl Window<'_> {
    fn attempt<T>(&self, act: impl FnOnce(&Mmu<'_>) -> Result<T, Fault>) -> Option<T> {
        if self.fault.get().is_some() {
            return None;
        }
        act(self.mmu).map_err(|fault| self.fault.set(Some(fault))).ok()
    }

    /// Callers keep regions inside the worker's part.
    const fn at(&self, region: Region) -> HelperVa {
        HelperVa::new(self.mailbox + region.0 as u64)
    }
}

/// Page numbers are on the allow-list, whose sum with the window `Config::decode` has bounded.
const fn window(page: u64) -> HelperVa {
    HelperVa::new(abi::WINDOW_VA + page * PAGE_BYTES as u64)
}

impl Env for Window<'_> {
    fn load(&self, at: Region) -> u32 {
        self.attempt(|mmu| mmu.load(self.at(at))).unwrap_or(0)
    }

    fn store(&mut self, at: Region, value: u32) {
        self.attempt(|mmu| mmu.store(self.at(at), value));
    }

    fn read_mailbox(&mut self, at: Region, to: &mut [u8]) {
        if self.attempt(|mmu| mmu.read(self.at(at), to)).is_none() {
            to.fill(0);
        }
    }

    fn write_mailbox(&mut self, at: Region, from: &[u8]) {
        self.attempt(|mmu| mmu.write(self.at(at), from));
    }

    fn read_page(&mut self, page: u64, to: &mut [u8; PAGE_BYTES]) {
        if self.attempt(|mmu| mmu.read(window(page), to)).is_none() {
            to.fill(0);
        }
    }

    fn write_page(&mut self, page: u64, from: &[u8; PAGE_BYTES]) {
        self.attempt(|mmu| mmu.write(window(page), from));
    }

    fn random(&mut self, words: &mut [u64]) -> bool {
        let source = SystemRandom::new();
        words.iter_mut().all(|word| {
            let mut bytes = [0; 8];
            let filled = source.fill(&mut bytes).is_ok();
            *word = u64::from_le_bytes(bytes);
            filled
        })
    }

    fn secret(&self) -> Option<[u8; SECRET_BYTES]> {
        let mut page = [0; 8 + SECRET_BYTES];
        self.attempt(|mmu| mmu.read(HelperVa::new(abi::SECRET_VA), &mut page))?;
        let (magic, secret) = page.split_first_chunk::<8>()?;
        let found = (u64::from_le_bytes(*magic) == SECRET_MAGIC).then_some(*secret.first_chunk()?);
        zeroize::Zeroize::zeroize(&mut page);
        found
    }

    fn release(&self) -> [u8; RELEASE_BYTES] {
        let mut release = [0; RELEASE_BYTES];
        let at = HelperVa::new(abi::SECRET_VA + RELEASE_AT as u64);
        if self.attempt(|mmu| mmu.read(at, &mut release)).is_none() {
            release.fill(0xff);
        }
        release
    }

    fn doorbell(&mut self, reason: Doorbell) {
        self.bell = Some(reason);
    }
}
