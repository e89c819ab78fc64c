//! Batches that a host may not ask for, and cursors that cannot be.

use super::*;

#[test]
fn pages_outside_the_allow_list_do_not_leave() {
    let setup = Setup { allowed: Allowed(vec![2..8, 64..130]), ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let outside = [
        0,
        1,
        8,
        9,
        63,
        130,
        131,
        190,
        193,
        194,
        1 << 20,
        1 << 32,
        1 << 51,
        1 << 52,
        1 << 62,
        1 << 63,
        u64::MAX - 1,
        u64::MAX,
    ];
    for page in outside {
        for (batch, index) in
            [(vec![page], 0), (vec![2, 3, page], 2), (vec![page, 2], 0), (vec![7, page, 64], 1)]
        {
            assert_eq!(pair.source.export(0, 1, &batch), Err((Status::PageRefused, index)), "{batch:?}");
        }
    }
    // Spans that touch it at either end.
    assert_eq!(pair.source.export(0, 1, &(0..8).collect::<Vec<_>>()), Err((Status::PageRefused, 0)));
    assert_eq!(pair.source.export(0, 1, &(2..9).collect::<Vec<_>>()), Err((Status::PageRefused, 6)));
    assert_eq!(pair.source.export(0, 1, &(64..131).collect::<Vec<_>>()), Err((Status::PageRefused, 66)));
    assert!(pair.source.machine.pages_read.borrow().is_empty(), "not one byte was read");
    assert_eq!(pair.source.machine.published.borrow().len(), published_by_requests(&pair));
    // No refused batch left a claim behind: everything that is allowed leaves in this epoch still.
    let all = setup.allowed.pages();
    let records = pair.source.export(0, 1, &all).unwrap();
    pair.destination.import(0, 1, &records).unwrap();
    pair.assert_equal_ram(&setup.allowed);
}

/// Writes that are completions, not payload: all there may be when nothing was exported; before them is what
/// the helper greeted with.
fn published_by_requests(pair: &Pair) -> usize {
    let published = pair.source.machine.published.borrow();
    assert_eq!(published[0], pair.greetings.0.encode(), "the greeting");
    1 + published[1..].iter().filter(|w| w.len() == mirrorvm_abi::mailbox::ENTRY_BYTES).count()
}

#[test]
fn a_repeated_page_is_refused_and_leaves_no_claim() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    assert_eq!(pair.source.export(0, 1, &[0, 1, 0]), Err((Status::PageRepeated, 2)), "in a batch");
    assert_eq!(pair.source.export(0, 1, &[5, 5]), Err((Status::PageRepeated, 1)));
    let a = pair.source.export(0, 1, &[0, 1]).unwrap();
    assert_eq!(pair.source.export(0, 1, &[2, 1]), Err((Status::PageRepeated, 1)), "across batches");
    assert_eq!(pair.source.export(1, 1, &[3, 0]), Err((Status::PageRepeated, 1)), "across streams");
    // 2 and 3 were claimed by refused batches; 0 and 1 stay claimed.
    let b = pair.source.export(1, 1, &[2, 3]).unwrap();
    assert_eq!(pair.source.export(0, 1, &[0]), Err((Status::PageRepeated, 0)));
    pair.destination.import(1, 1, &b).unwrap();
    pair.destination.import(0, 1, &a).unwrap();
    pair.end_epoch();
    let c = pair.source.export(0, 2, &[0]).unwrap();
    pair.destination.import(0, 2, &c).unwrap();
}

#[test]
fn requests_out_of_range_are_refused() {
    let mut pair = Pair::new(&Setup::default());
    let export = Submission { op: Op::Export as u32, count: 1, epoch: 1, ..Default::default() };
    let mut refuse = |request: Submission, status: Status| {
        let c = pair.source.call(0, request, &[]);
        assert_eq!(Status::from_u32(c.status), Some(status), "{request:?}");
        assert_eq!((c.len, c.count, c.zero), (0, 0, 0), "{request:?}");
    };
    for op in [0, 20, 21, 255, 1 << 16, u32::MAX] {
        refuse(Submission { op, ..export }, Status::UnknownOp);
    }
    for slot in [SLOTS, SLOTS + 1, 16, 1 << 20, u32::MAX] {
        for op in Op::ALL {
            refuse(Submission { op: *op as u32, slot, ..export }, Status::BadRequest);
        }
    }
    for count in [BATCH_MAX as u32 + 1, 1 << 16, u32::MAX] {
        refuse(Submission { count, ..export }, Status::BadRequest);
    }
    for len in [PAYLOAD_BYTES as u32 + 1, 1 << 31, u32::MAX] {
        for op in [Op::Import, Op::StartToken, Op::Begin] {
            refuse(Submission { op: op as u32, len, ..export }, Status::BadRequest);
        }
    }
    refuse(Submission { count: 0, ..export }, Status::BadRequest);
    for epoch in [0, 2, u32::MAX] {
        refuse(Submission { epoch, ..export }, Status::WrongState);
    }
    refuse(Submission { op: Op::Import as u32, ..export }, Status::WrongState);
    // None of it ended the session.
    pair.source.export(0, 1, &[0]).unwrap();
    assert_eq!(
        pair.destination.export(0, 1, &[0]),
        Err((Status::WrongState, 0)),
        "a destination exports nothing"
    );
}

#[test]
fn the_largest_batch_fits_its_slot() {
    let allowed = Allowed(vec![0..BATCH_MAX as u64]);
    let mut pair = Pair::new(&Setup { allowed: allowed.clone(), ..Setup::default() });
    let records = pair.source.export(0, 1, &allowed.pages()).unwrap();
    assert_eq!(records.len(), PAYLOAD_BYTES);
    pair.destination.import(0, 1, &records).unwrap();
    pair.assert_equal_ram(&allowed);
}

#[test]
fn impossible_cursors_end_the_worker() {
    let cursor = |side: &Side, at: usize, value: u32| {
        side.machine.mailboxes[0].borrow_mut()[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    for tail in [RING_ENTRIES + 1, 1 << 31, u32::MAX] {
        let mut side = Side::new(1, &Allowed(vec![0..8]), 1);
        cursor(&side, SQ_TAIL, tail);
        let worker = side.workers[0].as_mut().unwrap();
        assert_eq!(worker.step(), Step::Fatal(Fatal::BadCursor));
        assert_eq!(worker.run(), Fatal::BadCursor);
        assert!(side.machine.published.borrow().is_empty(), "nothing was done");
    }
    for head in [1, 32, 1 << 31, u32::MAX - 40] {
        // A head that says more was taken than was ever given.
        let mut side = Side::new(1, &Allowed(vec![0..8]), 1);
        side.submit(0, Submission { op: Op::Hello as u32, ..Default::default() }, &[]);
        cursor(&side, CQ_HEAD, head);
        assert_eq!(side.workers[0].as_mut().unwrap().step(), Step::Fatal(Fatal::BadCursor), "{head}");
    }
    // A host that takes no answers stops its own helper, when the ring is full and not before.
    let mut side = Side::new(1, &Allowed(vec![0..8]), 1);
    for i in 0..=RING_ENTRIES {
        side.submit(0, Submission { op: u32::MAX, ..Default::default() }, &[]);
        let expected = if i < RING_ENTRIES { Step::Worked } else { Step::Fatal(Fatal::BadCursor) };
        assert_eq!(side.workers[0].as_mut().unwrap().step(), expected, "answer {i}");
    }
    // Cursors run free over 2^32 and rings around: more requests than entries, one by one.
    let mut side = Side::new(1, &Allowed(vec![0..8]), 1);
    for _ in 0..RING_ENTRIES * 3 {
        let c = side.call(0, Submission { op: u32::MAX, ..Default::default() }, &[]);
        assert_eq!(Status::from_u32(c.status), Some(Status::UnknownOp));
        assert_eq!(side.workers[0].as_mut().unwrap().step(), Step::Idle);
    }
    assert!(side.machine.bells.borrow().is_empty(), "nobody wished for bells");
    // The second answer from now on, and no other.
    cursor(&side, WANT_AT, RING_ENTRIES * 3 + 2);
    cursor(&side, WANT_COMPLETION, 1);
    for bells in [0, 1, 1] {
        side.call(0, Submission { op: u32::MAX, ..Default::default() }, &[]);
        assert_eq!(side.machine.bells.borrow().len(), bells);
    }
    assert_eq!(*side.machine.bells.borrow(), [Doorbell::Completion]);
}

#[test]
fn a_control_operation_waits_for_no_batch() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let mut other = pair.source.workers[1].take().unwrap();
    // A whole control request of worker 1 runs while worker 0 is inside a batch.
    let id = pair.source.submit(1, Submission { op: Op::EndEpoch as u32, ..Default::default() }, &[]);
    let step = Rc::new(RefCell::new(None));
    let seen = Rc::clone(&step);
    let back = Rc::new(RefCell::new(None));
    let home = Rc::clone(&back);
    *pair.source.machine.at_page_read.borrow_mut() = Some(Box::new(move || {
        *seen.borrow_mut() = Some(other.step());
        *home.borrow_mut() = Some(other);
    }));
    pair.source.export(0, 1, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    assert_eq!(*step.borrow(), Some(Step::Worked));
    pair.source.workers[1] = back.borrow_mut().take();
    let c = pair.source.answer(1, id);
    assert_eq!(Status::from_u32(c.status), Some(Status::Busy));
    pair.source.control(Op::EndEpoch, &[]).expect("and afterwards it works");
}
