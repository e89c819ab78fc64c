//! [`Lane`] against a helper that answers anything: no KVM, the test is the other side of the mailbox.

use std::sync::Arc;
use std::time::Duration;

use mirrorvm_abi::mailbox::{
    BATCH_MAX, CQ_AT, CQ_HEAD, CQ_TAIL, Completion, ENTRY_BYTES, Fatal, PAYLOAD_BYTES, RING_ENTRIES, SQ_AT,
    SQ_TAIL, Submission, entry_at, worker_stride,
};
use mirrorvm_abi::op::{Op, SCAN_BYTES, Scan, Status};
use proptest::prelude::*;

use super::worker::WorkerShared;
use super::{Done, Lane, LaneError, WorkerEnd};
use crate::addr::PAGE_2M;
use crate::memory::Mapping;

const SLOTS: u32 = 4;

/// The helper's side of one worker's rings, written by the test.
struct Fake {
    shared: Arc<WorkerShared>,
    taken: u32,
    answered: u32,
}

/// A lane whose deadline has always passed: what is not there already is a timeout, and no test sleeps.
fn lane() -> (Lane, Fake) {
    let mailbox = Mapping::anonymous((worker_stride(SLOTS) as u64 * 2).next_multiple_of(PAGE_2M)).unwrap();
    // The second worker's part, so that a wrong base is seen.
    let shared = WorkerShared::new(mailbox, worker_stride(SLOTS) as u64);
    let fake = Fake { shared: Arc::clone(&shared), taken: 0, answered: 0 };
    (Lane::new(shared, SLOTS, Duration::ZERO), fake)
}

impl Fake {
    fn request(&mut self) -> Submission {
        let mut entry = [0; ENTRY_BYTES];
        let at = self.shared.base + entry_at(SQ_AT, self.taken) as u64;
        self.shared.mailbox.read(at, &mut entry);
        self.taken += 1;
        assert_eq!(self.shared.cursor(SQ_TAIL), self.taken, "one request at a time here");
        Submission::decode(&entry)
    }

    fn answer(&mut self, completion: Completion) {
        let at = self.shared.base + entry_at(CQ_AT, self.answered) as u64;
        self.shared.mailbox.write(at, &completion.encode());
        self.answered = self.answered.wrapping_add(1);
        self.shared.set_cursor(CQ_TAIL, self.answered);
    }
}

/// A lane with an export of `count` pages under way, and the honest answer to it.
fn exporting(count: usize) -> (Lane, Fake, Completion) {
    let (mut lane, mut fake) = lane();
    let slot = lane.acquire().unwrap();
    let pages: Vec<_> = (0..count as u64).collect();
    lane.submit_export(slot, &pages, 1);
    let request = fake.request();
    let expected =
        Submission { id: request.id, op: Op::Export as u32, slot, count: count as u32, len: 0, epoch: 1 };
    assert_eq!(request, expected);
    let honest =
        Completion { id: request.id, status: 0, len: 4144 * count as u32, count: count as u32, zero: 0 };
    (lane, fake, honest)
}

#[test]
fn an_honest_answer_is_accepted_once() {
    let (mut lane, mut fake, honest) = exporting(3);
    assert_eq!(lane.in_flight(), 1);
    fake.answer(Completion { zero: 2, ..honest });
    let done = Done { slot: 0, pages: 3, zero: 2, len: 3 * 4144 };
    assert_eq!(lane.wait(), Ok(done));
    assert_eq!((lane.in_flight(), lane.acquire()), (0, Some(1)), "slot 0 is held until it is released");
    fake.answer(honest);
    assert_eq!(lane.wait(), Err(LaneError::Broken("it answers what was not asked")), "a second time");
    assert_eq!(lane.wait(), Err(LaneError::Timeout), "and nothing spins");
    lane.release(0);
    assert_eq!(lane.acquire(), Some(0));
}

#[test]
fn a_scan_s_answer_is_believed_only_in_its_bounds() {
    let scan = Scan { first: 7, count: 70 };
    let answered = |len: u32, words: [u64; 2]| {
        let (mut lane, mut fake) = lane();
        let slot = lane.acquire().unwrap();
        lane.submit_scan(slot, scan, 3);
        let request = fake.request();
        let expected = Submission {
            id: request.id,
            op: Op::Scan as u32,
            slot,
            count: 0,
            len: SCAN_BYTES as u32,
            epoch: 3,
        };
        assert_eq!(request, expected);
        let mut input = [0; SCAN_BYTES];
        lane.read_payload(slot, 0, &mut input);
        assert_eq!(Scan::decode(&input), Some(scan));
        lane.write_payload(slot, 0, &words.map(u64::to_le_bytes).concat());
        fake.answer(Completion { id: request.id, status: 0, len, count: 0, zero: 0 });
        let done = lane.wait().unwrap();
        let mut found = Vec::new();
        lane.read_scan(&done, scan, &mut found).map(|()| found)
    };
    let good = [1 << 63 | 1, 0b10_0001];
    assert_eq!(answered(16, good), Ok(good.to_vec()));
    for len in [0, 8, 15, 17, 24, PAYLOAD_BYTES as u32] {
        assert_eq!(answered(len, good), Err(LaneError::Broken("a scan's answer of another length")), "{len}");
    }
    for bit in [6, 7, 63] {
        let beyond = answered(16, [0, 1 << bit]);
        assert_eq!(beyond, Err(LaneError::Broken("a scan's answer about other pages")), "{bit}");
    }
}

#[test]
fn answers_to_what_was_not_asked_are_refused() {
    let (_, _, honest) = exporting(3);
    for id in [0, honest.id + 1, honest.id.wrapping_sub(2), u64::MAX, 1 << 63] {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.answer(Completion { id, ..honest });
        assert_eq!(lane.wait(), Err(LaneError::Broken("it answers what was not asked")), "id {id}");
        assert_eq!(lane.in_flight(), 1, "the request itself is still under way");
        fake.answer(honest);
        assert!(lane.wait().is_ok());
    }
    // Before anything was asked.
    let (mut lane, mut fake) = lane();
    fake.answer(Completion::default());
    assert_eq!(lane.wait(), Err(LaneError::Broken("it answers what was not asked")));
}

#[test]
fn answers_out_of_bounds_are_refused() {
    let bad: [fn(Completion) -> Completion; 9] = [
        |c| Completion { len: PAYLOAD_BYTES as u32 + 1, ..c },
        |c| Completion { len: u32::MAX, ..c },
        |c| Completion { count: BATCH_MAX as u32 + 1, ..c },
        |c| Completion { count: u32::MAX, ..c },
        |c| Completion { count: c.count + 1, ..c },
        |c| Completion { count: c.count - 1, ..c },
        |c| Completion { count: 0, ..c },
        |c| Completion { zero: c.count + 1, ..c },
        |c| Completion { zero: u32::MAX, ..c },
    ];
    for (i, change) in bad.into_iter().enumerate() {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.answer(change(honest));
        assert_eq!(lane.wait(), Err(LaneError::Broken("an answer out of bounds")), "case {i}");
    }
    for status in [Status::ALL.len() as u32, 255, 1 << 16, u32::MAX] {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.answer(Completion { status, ..honest });
        assert_eq!(lane.wait(), Err(LaneError::Broken("an unknown status")), "{status}");
    }
}

#[test]
fn refusals_keep_their_reason_and_free_their_slot() {
    for status in Status::ALL.iter().copied().filter(|s| *s != Status::Ok) {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.answer(Completion { status: status as u32, count: 2, len: u32::MAX, ..honest });
        assert_eq!(lane.wait(), Err(LaneError::Refused { status, index: 2 }));
        assert_eq!((lane.in_flight(), lane.acquire()), (0, Some(0)));
    }
    // An index that no list of three has: who looks it up must not be led astray.
    for index in [4, 512, u32::MAX] {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.answer(Completion { status: Status::PageRefused as u32, count: index, ..honest });
        assert_eq!(lane.wait(), Err(LaneError::Broken("an answer out of bounds")), "{index}");
    }
}

#[test]
fn impossible_cursors_are_refused_and_never_waited_on() {
    for tail in [RING_ENTRIES + 1, 1 << 31, u32::MAX] {
        let (mut lane, fake, _) = exporting(3);
        fake.shared.set_cursor(CQ_TAIL, tail);
        for _ in 0..3 {
            assert_eq!(lane.wait(), Err(LaneError::Broken("its completion cursor is impossible")), "{tail}");
        }
    }
    // A cursor that is ahead of its entries: what lies there was never an answer.
    let (mut lane, fake, _) = exporting(3);
    fake.shared.set_cursor(CQ_TAIL, RING_ENTRIES);
    for _ in 0..RING_ENTRIES {
        assert_eq!(lane.wait(), Err(LaneError::Broken("it answers what was not asked")));
    }
    assert_eq!(lane.wait(), Err(LaneError::Timeout), "a ring of nonsense ends");
    // A cursor that goes back after an answer was taken.
    let (mut lane, mut fake, honest) = exporting(3);
    fake.answer(honest);
    lane.wait().unwrap();
    fake.shared.set_cursor(CQ_TAIL, 0);
    assert_eq!(lane.wait(), Err(LaneError::Broken("its completion cursor is impossible")));
    // What the helper writes over the host's own cursors is not read back.
    let (mut lane, mut fake, honest) = exporting(3);
    fake.shared.set_cursor(SQ_TAIL, 77);
    fake.shared.set_cursor(CQ_HEAD, 99);
    fake.answer(honest);
    lane.wait().unwrap();
    let slot = lane.acquire().unwrap();
    lane.submit_import(slot, 1, 4144, 1);
    assert_eq!(fake.shared.cursor(SQ_TAIL), 2);
    assert_eq!(fake.request().op, Op::Import as u32);
}

#[test]
fn the_ring_goes_round() {
    let (mut lane, mut fake) = lane();
    for turn in 0..RING_ENTRIES * 3 {
        let slot = lane.acquire().unwrap();
        lane.submit_export(slot, &[u64::from(turn)], 1);
        let request = fake.request();
        fake.answer(Completion { id: request.id, count: 1, len: 48, ..Completion::default() });
        assert_eq!(lane.wait().unwrap().slot, slot);
        lane.release(slot);
    }
}

#[test]
fn control_operations_take_no_answer_of_another_length() {
    // Control awaits its answer in one call: the answer is laid out before, its id is the first.
    let ask = |len: u32, count: u32| {
        let (mut lane, mut fake) = lane();
        fake.answer(Completion { id: 1, status: 0, len, count, zero: 0 });
        let mut greeting = [0; 64];
        let outcome = lane.control(Op::Hello, &[], &mut greeting);
        assert_eq!((lane.in_flight(), lane.acquire()), (0, Some(0)), "the slot is free again");
        outcome
    };
    assert_eq!(ask(64, 0), Ok(()));
    for len in [0, 63, 65, PAYLOAD_BYTES as u32] {
        assert_eq!(ask(len, 0), Err(LaneError::Broken("an answer of another length")), "{len}");
    }
    assert_eq!(ask(PAYLOAD_BYTES as u32 + 1, 0), Err(LaneError::Broken("an answer out of bounds")));
    assert_eq!(ask(64, 1), Err(LaneError::Broken("an answer out of bounds")));

    let (mut lane, _fake) = lane();
    while lane.acquire().is_some() {}
    assert_eq!(lane.control(Op::Hello, &[], &mut [0; 64]), Err(LaneError::NoSlot));
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let (mut lane, mut fake) = lane();
    let mut greeting = [0; 64];
    assert_eq!(lane.control(Op::Hello, &[], &mut greeting), Err(LaneError::Timeout));
    fake.answer(Completion { id: 1, len: 64, ..Completion::default() });
    let late = lane.control(Op::Hello, &[], &mut greeting);
    assert_eq!(late, Err(LaneError::Broken("it answers what was not asked")));
}

#[test]
fn an_ended_worker_is_said_so() {
    for end in [WorkerEnd::Fatal(Fatal::BadCursor), WorkerEnd::Exit("triple fault"), WorkerEnd::Gone] {
        let (mut lane, mut fake, honest) = exporting(3);
        fake.shared.end(end);
        assert_eq!(lane.wait(), Err(LaneError::Ended(end)));
        // What it had answered before is still good.
        fake.answer(honest);
        assert!(lane.wait().is_ok());
        assert_eq!(lane.wait(), Err(LaneError::Ended(end)));
    }
}

#[test]
#[should_panic(expected = "a payload has")]
fn a_payload_span_beyond_the_slot_is_a_bug_of_the_host() {
    let (lane, _fake) = lane();
    lane.read_payload(0, PAYLOAD_BYTES - 3, &mut [0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any completion and any cursor: no panic, and what is accepted is within what was asked.
    #[test]
    fn any_answer_is_an_error_or_in_bounds(
        entries in prop::collection::vec((0u64..5, 0u32..14, any::<u32>(), 0u32..6, 0u32..6, any::<bool>()), 1..20),
        tail in prop_oneof![Just(None), any::<u32>().prop_map(Some)],
    ) {
        let (mut lane, mut fake) = lane();
        for _ in 0..3 {
            let slot = lane.acquire().unwrap();
            lane.submit_export(slot, &[1, 2, 3], 1);
        }
        let mut accepted = 0;
        for (id, status, len, count, zero, sane) in entries {
            let len = if sane { len % (PAYLOAD_BYTES as u32 + 1) } else { len };
            fake.answer(Completion { id, status, len, count, zero });
            if let Ok(done) = lane.wait() {
                prop_assert!(done.len <= PAYLOAD_BYTES && done.pages == 3 && done.zero <= 3 && done.slot < 3);
                accepted += 1;
            }
        }
        prop_assert!(accepted <= 3, "each request is answered at most once");
        if let Some(tail) = tail {
            fake.shared.set_cursor(CQ_TAIL, tail);
            prop_assert!(lane.wait().is_err() || accepted < 3);
        }
    }
}
