//! A worker's thread: runs its mirror vCPU, sleeps when the helper is idle.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use mirrorvm_abi::mailbox::{DOORBELL_PORT, Doorbell, Fatal, SQ_HEAD};
use mirrorvm_abi::ring::Cells;

use super::WorkerEnd;
use crate::hypervisor::{Exit, Kicker, NoPorts, Vcpu};
use crate::memory::Mapping;
use crate::sync::{Locked, WaitLocked};

/// What a worker's thread and its lane share.
#[derive(Debug)]
pub(super) struct WorkerShared {
    pub mailbox: Arc<Mapping>,
    /// Where this worker's part of the mailbox starts.
    pub base: u64,
    /// The host's submission cursor, the truth behind what the mailbox says.
    pub sq_tail: AtomicU32,
    pub exits: AtomicU64,
    pub tid: AtomicU32,
    /// CPU time of the thread, nanoseconds: set at its end.
    pub cpu_ns: AtomicU64,
    quit: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ended: Option<WorkerEnd>,
    ready: bool,
}

impl WorkerShared {
    pub fn new(mailbox: Arc<Mapping>, base: u64) -> Arc<Self> {
        Arc::new(Self {
            mailbox,
            base,
            sq_tail: AtomicU32::new(0),
            exits: AtomicU64::new(0),
            tid: AtomicU32::new(0),
            cpu_ns: AtomicU64::new(0),
            quit: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub fn cursor(&self, at: usize) -> u32 {
        self.mailbox.load_u32(self.base + at as u64)
    }

    pub fn set_cursor(&self, at: usize, value: u32) {
        self.mailbox.store_u32(self.base + at as u64, value);
    }

    /// Wakes the thread after a submission.
    pub fn wake(&self) {
        // Under the lock: the thread is either before its look at the cursor or already asleep.
        let _state = self.lock();
        self.changed.notify_all();
    }

    pub fn ended(&self) -> Option<WorkerEnd> {
        self.lock().ended
    }

    /// Waits until `done`; it is asked again after every doorbell. `Err(None)`: not in time.
    pub fn wait(&self, deadline: Instant, mut done: impl FnMut() -> bool) -> Result<(), Option<WorkerEnd>> {
        self.wait_state(deadline, |_| done())
    }

    /// Waits until the helper has been idle once.
    pub fn wait_ready(&self, deadline: Instant) -> Result<(), Option<WorkerEnd>> {
        self.wait_state(deadline, |state| state.ready)
    }

    fn wait_state(
        &self,
        deadline: Instant,
        mut done: impl FnMut(&State) -> bool,
    ) -> Result<(), Option<WorkerEnd>> {
        let mut state = self.lock();
        while !done(&state) {
            if let Some(end) = state.ended {
                return Err(Some(end));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(None);
            }
            state = self.changed.wait_locked_for(state, left);
        }
        Ok(())
    }

    pub fn quit(&self, kicker: &Kicker) {
        self.quit.store(true, Ordering::SeqCst);
        self.wake();
        kicker.kick();
    }

    fn bell(&self, ready: bool) {
        let mut state = self.lock();
        state.ready |= ready;
        self.changed.notify_all();
    }

    pub fn end(&self, how: WorkerEnd) {
        let mut state = self.lock();
        state.ended.get_or_insert(how);
        self.changed.notify_all();
    }

    /// Sleeps until there is something in the ring; false when it is time to go.
    fn sleep_until_work(&self) -> bool {
        let mut state = self.lock();
        loop {
            if self.quit.load(Ordering::SeqCst) {
                return false;
            }
            // What the helper says it took is its own affair: a wrong value costs it a turn, not us.
            if self.sq_tail.load(Ordering::SeqCst) != self.cursor(SQ_HEAD) {
                return true;
            }
            state = self.changed.wait_locked(state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}

impl Cells for &WorkerShared {
    fn load(&self, at: usize) -> u32 {
        self.cursor(at)
    }

    fn store(&mut self, at: usize, value: u32) {
        self.set_cursor(at, value);
    }
}

/// The body of a worker's thread.
pub(super) fn run(shared: &WorkerShared, mut vcpu: Box<dyn Vcpu>) {
    let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    shared.tid.store(tid, Ordering::Relaxed);
    let how = turns(shared, vcpu.as_mut());
    // The vCPU goes before anybody learns of the end, so that the VM can go after it.
    drop(vcpu);
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let used = used.tv_sec.unsigned_abs() * 1_000_000_000 + used.tv_nsec.unsigned_abs();
    shared.cpu_ns.store(used, Ordering::Relaxed);
    shared.end(how);
}

/// The end of a vCPU that nobody asked to end: what there is to know of it goes to the log.
fn fell(vcpu: &dyn Vcpu, what: &'static str) -> WorkerEnd {
    tracing::warn!(what, last = ?vcpu.last_exit(), "a mirror's vCPU has stopped");
    WorkerEnd::Exit(what)
}

fn turns(shared: &WorkerShared, vcpu: &mut dyn Vcpu) -> WorkerEnd {
    loop {
        if shared.quit.load(Ordering::SeqCst) {
            return WorkerEnd::Gone;
        }
        let exit = vcpu.run(&mut NoPorts);
        shared.exits.fetch_add(1, Ordering::Relaxed);
        let value = match exit {
            Ok(Exit::PortWrite { port: DOORBELL_PORT, value }) => value,
            Ok(Exit::Interrupted) => continue,
            Ok(Exit::PortWrite { .. } | Exit::PortRead { .. }) => return WorkerEnd::Exit("a strange port"),
            Ok(Exit::Mmio { gpa, write }) => {
                tracing::warn!(gpa, write, "the helper touched an address without memory");
                return WorkerEnd::Exit("an address without memory");
            }
            Ok(Exit::MsrWrite { .. } | Exit::MsrRead { .. } | Exit::MsrRefused { .. }) => {
                return WorkerEnd::Exit("an access to an MSR");
            }
            Ok(Exit::Hypercall { .. }) => return WorkerEnd::Exit("a hypercall"),
            Ok(Exit::Halt) => return fell(vcpu, "halt"),
            Ok(Exit::Shutdown) => return fell(vcpu, "triple fault"),
            Ok(Exit::Unexpected { what }) => return fell(vcpu, what),
            Err(error) => {
                tracing::error!(%error, "a mirror vCPU cannot be run");
                return WorkerEnd::Exit("KVM_RUN failed");
            }
        };
        if value == Doorbell::Idle as u32 {
            shared.bell(true);
            if !shared.sleep_until_work() {
                return WorkerEnd::Gone;
            }
        } else if value == Doorbell::Completion as u32 {
            shared.bell(false);
        } else if value & 0xff == Doorbell::Fatal as u32 {
            return Fatal::from_u32(value >> 8)
                .map_or(WorkerEnd::Exit("an unknown last word"), WorkerEnd::Fatal);
        } else {
            return WorkerEnd::Exit("an unknown doorbell");
        }
    }
}
