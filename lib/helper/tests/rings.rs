//! The rings between host and helper, in every order in which threads and processors may run them.
//!
//! loom runs the helper's worker as it is, and the host's side by the same functions as `mirror::lane` and
//! `mirror::worker` (`mirrorvm_abi::ring`), with the lock and the condition variable that they sleep on. Here
//! a wait has no deadline: whoever would have slept until it is found as a deadlock. What lies in the rings
//! are words that may be seen late unless a cursor orders them.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::config::{Config, PROTECTION_NONE};
use mirrorvm_abi::evidence::RELEASE_BYTES;
use mirrorvm_abi::mailbox::{
    CQ_AT, CQ_HEAD, CQ_TAIL, Completion, Doorbell, ENTRY_BYTES, SQ_AT, SQ_HEAD, SQ_TAIL, Submission, WANT_AT,
    WANT_COMPLETION,
};
use mirrorvm_abi::op::Status;
use mirrorvm_abi::ring::{Cells, is_far, unwish, wish};
use mirrorvm_helper::{Env, PageMaps, Region, Scratch, Shared, Step, Worker};

/// Requests of a run.
const REQUESTS: u32 = 2;
/// Cursors of the control page.
const CURSORS: [usize; 6] = [SQ_TAIL, SQ_HEAD, CQ_TAIL, CQ_HEAD, WANT_COMPLETION, WANT_AT];

/// What is left out to show that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    /// The helper looks at the wish without a fence behind its cursor.
    HelperFence,
    /// The host looks at the cursor without a fence behind its wish.
    HostFence,
    /// A submission does not take the lock to wake the worker.
    Wake,
    /// A cursor is published before what it stands for.
    Release,
}

/// What host and helper share, and what the host has for itself.
struct Mailbox {
    fault: Fault,
    cursors: [AtomicU32; 6],
    /// Of each entry the number of its request: submissions, completions.
    entries: [[AtomicU64; REQUESTS as usize]; 2],
    sq_tail: AtomicU32,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Mailbox {
    fn new(fault: Fault) -> Self {
        let entries = || [0; REQUESTS as usize].map(|_| AtomicU64::new(0));
        Self {
            fault,
            cursors: [0; 6].map(|_| AtomicU32::new(0)),
            entries: [entries(), entries()],
            sq_tail: AtomicU32::new(0),
            lock: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    fn cursor(&self, at: usize) -> &AtomicU32 {
        &self.cursors[CURSORS.iter().position(|c| *c == at).unwrap()]
    }

    fn load(&self, at: usize) -> u32 {
        self.cursor(at).load(Ordering::Acquire)
    }

    fn store(&self, at: usize, value: u32) {
        let order = if self.fault == Fault::Release { Ordering::Relaxed } else { Ordering::Release };
        self.cursor(at).store(value, order);
    }

    fn entry(&self, ring: usize, at: usize) -> &AtomicU64 {
        let index = (at - ring) / ENTRY_BYTES;
        &self.entries[usize::from(ring == CQ_AT)][index]
    }

    /// As `WorkerShared::bell`, after an exit of the vCPU.
    fn bell(&self) {
        let _state = self.lock.lock().unwrap();
        self.changed.notify_all();
    }
}

/// The host's view.
struct Host<'m>(&'m Mailbox);

impl Cells for Host<'_> {
    fn load(&self, at: usize) -> u32 {
        self.0.load(at)
    }

    fn store(&mut self, at: usize, value: u32) {
        self.0.store(at, value);
    }

    fn fence(&self) {
        if self.0.fault != Fault::HostFence {
            fence(Ordering::SeqCst);
        }
    }
}

/// What is under the helper.
struct Machine(Arc<Mailbox>);

impl Env for Machine {
    fn load(&self, at: Region) -> u32 {
        self.0.load(at.0)
    }

    fn store(&mut self, at: Region, value: u32) {
        self.0.store(at.0, value);
    }

    fn fence(&self) {
        if self.0.fault != Fault::HelperFence {
            fence(Ordering::SeqCst);
        }
    }

    fn read_mailbox(&mut self, at: Region, to: &mut [u8]) {
        let id = self.0.entry(SQ_AT, at.0).load(Ordering::Relaxed);
        to.copy_from_slice(&Submission { id, op: u32::MAX, ..Submission::default() }.encode());
    }

    fn write_mailbox(&mut self, at: Region, from: &[u8]) {
        let answer = Completion::decode(from.try_into().unwrap());
        assert_eq!(answer.status, Status::UnknownOp as u32);
        self.0.entry(CQ_AT, at.0).store(answer.id, Ordering::Relaxed);
    }

    fn read_page(&mut self, _: u64, _: &mut [u8; PAGE_BYTES]) {
        unreachable!("nobody asks for a page");
    }

    fn write_page(&mut self, _: u64, _: &[u8; PAGE_BYTES]) {
        unreachable!("nobody sends a page");
    }

    fn random(&mut self, _: &mut [u64]) -> bool {
        false
    }

    fn secret(&self) -> Option<[u8; 32]> {
        None
    }

    fn release(&self) -> [u8; RELEASE_BYTES] {
        [0; RELEASE_BYTES]
    }

    fn doorbell(&mut self, _: Doorbell) {
        self.0.bell();
    }
}

/// The worker's thread: as `mirror::worker::turns`, until everything is answered.
fn worker(mailbox: &Arc<Mailbox>) {
    let config = Config {
        workers: 1,
        slots: 1,
        pages: 0,
        ranges: 0,
        protection: PROTECTION_NONE,
        policy: 0,
        digests: 0,
    };
    let (shared, mut scratch) = (Box::new(Shared::new()), Box::new(Scratch::new()));
    let maps = PageMaps::new(&[], &[]);
    let mut worker = Worker::new(Machine(Arc::clone(mailbox)), &shared, maps, &mut scratch, config, 0);
    while worker.cursors().answered < REQUESTS {
        match worker.step() {
            Step::Worked => {}
            Step::Idle => {
                mailbox.bell();
                sleep_until_work(mailbox);
                // The cursor in the mailbox may be seen later than the host's own: another turn, and no
                // sleep.
                thread::yield_now();
            }
            Step::Fatal(why) => panic!("{why:?}"),
        }
    }
}

/// As `WorkerShared::sleep_until_work`.
fn sleep_until_work(mailbox: &Mailbox) {
    let mut state = mailbox.lock.lock().unwrap();
    while mailbox.sq_tail.load(Ordering::SeqCst) == mailbox.load(SQ_HEAD) {
        state = mailbox.changed.wait(state).unwrap();
    }
}

/// As `Lane::submit`.
fn submit(mailbox: &Mailbox, id: u64) {
    let tail = mailbox.sq_tail.load(Ordering::SeqCst);
    mailbox.entries[0][tail as usize].store(id, Ordering::Relaxed);
    mailbox.sq_tail.store(tail + 1, Ordering::SeqCst);
    mailbox.store(SQ_TAIL, tail + 1);
    if mailbox.fault != Fault::Wake {
        let _state = mailbox.lock.lock().unwrap();
    }
    mailbox.changed.notify_all();
}

/// As `Lane::wait`: takes an answer, and sleeps until `enough` are there when there is none.
fn wait(mailbox: &Mailbox, head: &mut u32, enough: u32) -> u64 {
    let mut cells = Host(mailbox);
    if !is_far(&cells, *head, 1) {
        wish(&mut cells, *head + enough);
        let mut state = mailbox.lock.lock().unwrap();
        while !is_far(&cells, *head, enough) {
            state = mailbox.changed.wait(state).unwrap();
        }
        drop(state);
        unwish(&mut cells);
    }
    let id = mailbox.entries[1][*head as usize].load(Ordering::Relaxed);
    *head += 1;
    mailbox.store(CQ_HEAD, *head);
    id
}

/// Two requests, one after the other or together, and their answers.
fn run(fault: Fault, together: bool) {
    let mut builder = loom::model::Builder::new();
    // More preemptions than this find nothing that fewer do not, and take hours: see the faults below.
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let mailbox = Arc::new(Mailbox::new(fault));
        let helper = {
            let mailbox = Arc::clone(&mailbox);
            // In words: a helper has more on its stack than loom's threads are made for.
            thread::Builder::new().stack_size(1 << 16).spawn(move || worker(&mailbox)).unwrap()
        };
        let mut head = 0;
        if together {
            submit(&mailbox, 7);
            submit(&mailbox, 8);
            assert_eq!(wait(&mailbox, &mut head, 1), 7);
            assert_eq!(wait(&mailbox, &mut head, 1), 8);
        } else {
            for id in [7, 8] {
                submit(&mailbox, id);
                assert_eq!(wait(&mailbox, &mut head, 1), id);
            }
        }
        helper.join().unwrap();
    });
}

#[test]
fn nobody_sleeps_for_ever_and_every_answer_is_read_whole() {
    run(Fault::Nothing, false);
    run(Fault::Nothing, true);
}

/// Names the fault for a process of its own: loom does not outlive what it finds.
const CHILD: &str = "MIRRORVM_RINGS_FAULT";
const FAULTS: [Fault; 4] = [Fault::HelperFence, Fault::HostFence, Fault::Wake, Fault::Release];

/// Not a test of its own: the body of the processes that the next test starts.
#[test]
fn child_with_a_fault() {
    let Ok(named) = std::env::var(CHILD) else { return };
    let fault = *FAULTS.iter().find(|fault| format!("{fault:?}") == named).unwrap();
    run(fault, false);
    run(fault, true);
}

#[test]
fn each_order_between_the_ends_is_needed() {
    for fault in FAULTS {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "child_with_a_fault", "--nocapture"]).env(CHILD, format!("{fault:?}"));
        let told = child.env("RUST_BACKTRACE", "0").output().unwrap();
        let text = String::from_utf8_lossy(&told.stderr);
        // Somebody sleeps for ever, or reads an entry that is not there yet.
        let early = fault == Fault::Release && text.contains("`left == right` failed");
        assert!(!told.status.success(), "{fault:?} is not missed");
        assert!(text.to_lowercase().contains("deadlock") || early, "{fault:?}: {text}");
    }
}
