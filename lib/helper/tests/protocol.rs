//! The helper's protocol between two helpers and a host that does what it likes.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a test says what it expects by unwrapping it"
)]

mod support;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use mirrorvm_abi::{
    PAGE_BYTES, config,
    mailbox::{
        BATCH_MAX, CQ_HEAD, Completion, Doorbell, Fatal, PAYLOAD_BYTES, RING_ENTRIES, SQ_TAIL, Submission,
        WANT_AT, WANT_COMPLETION, slot_at,
    },
    op::{BEGIN_BYTES, Begin, Op, START_BYTES, Status},
    record::{Direction, HEADER_BYTES, Header, Kind, TAG_BYTES, TOKEN_BYTES, Token},
};
use mirrorvm_helper::Step;
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use support::{Allowed, Page, Pair, Record, Rng, SECRET, SLOTS, STATE, Setup, Side, reader, split};

const WINDOW: usize = 16;

fn windows(bytes: &[u8]) -> impl Iterator<Item = [u8; WINDOW]> {
    bytes.windows(WINDOW).map(|w| w.try_into().unwrap())
}

fn header_of(record: &[u8]) -> Header {
    Header::decode(record.first_chunk().unwrap()).unwrap()
}

fn with_header(record: &[u8], change: impl FnOnce(&mut Header)) -> Record {
    let mut header = header_of(record);
    change(&mut header);
    [&header.encode()[..], &record[HEADER_BYTES..]].concat()
}

fn flipped(record: &[u8], bit: usize) -> Record {
    let mut bad = record.to_vec();
    bad[bit / 8] ^= 1 << (bit % 8);
    bad
}

// ------------------------------------------------------------------------------------------ what is legal

/// How a whole session goes.
#[derive(Clone, Debug)]
struct Course {
    setup: Setup,
    epochs: u32,
    seed: u64,
    largest_batch: usize,
}

fn courses() -> impl Strategy<Value = Course> {
    let spans = prop::collection::vec((0u64..40, 1u64..90), 1..4);
    (1u32..5, spans, any::<[bool; 2]>(), any::<[u8; 16]>(), any::<(u64, u64, u64)>(), 1u32..5, 1usize..40)
        .prop_map(|(workers, spans, [elide_zero, fresh], session, (a, b, seed), epochs, largest_batch)| {
            let mut next = 0;
            let mut list = Vec::new();
            for (gap, len) in spans {
                // Ranges with a hole between them, as `allowed_ranges` gives them.
                let first = next + gap + u64::from(next != 0);
                list.push(first..first + len);
                next = first + len;
            }
            let allowed = Allowed(list);
            let scanning = a % 2 == 0;
            let setup = Setup {
                workers,
                allowed,
                elide_zero,
                fresh,
                scanning,
                session,
                transcript: [4; 32],
                seeds: (a, b),
            };
            Course { setup, epochs, seed, largest_batch }
        })
}

/// Rewrites some of the source's pages, a third of them to zero.
fn scribble(pair: &Pair, pages: &[u64], rng: &mut Rng) {
    let mut ram = pair.source.machine.ram.borrow_mut();
    for p in pages {
        ram[*p as usize] = if rng.below(3) == 0 { [0; PAGE_BYTES] } else { rng.page() };
    }
}

/// Sends `pages` in batches over random streams; streams overtake each other, records of one do not.
fn send_epoch(pair: &mut Pair, pages: &[u64], epoch: u32, largest: usize, rng: &mut Rng) {
    let streams = pair.source.workers.len();
    let mut queues: Vec<Vec<Vec<Record>>> = vec![Vec::new(); streams];
    let mut left = pages;
    while !left.is_empty() || queues.iter().any(|q| !q.is_empty()) {
        let stream = rng.below(streams);
        if rng.below(2) == 0 && !left.is_empty() {
            let (batch, rest) = left.split_at(left.len().min(1 + rng.below(largest)));
            left = rest;
            let sealed = pair.source.export(stream, epoch, batch).unwrap();
            for (record, page) in sealed.iter().zip(batch) {
                let h = header_of(record);
                assert_eq!((h.page, h.epoch, h.stream), (*page, epoch, stream as u16));
            }
            queues[stream].push(sealed);
        } else if !queues[stream].is_empty() {
            let batch = queues[stream].remove(0);
            pair.destination.import(stream, epoch, &batch).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        // Seeds of failures, to be committed with the fix.
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/protocol.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_legal_session_carries_all_ram(course in courses()) {
        let mut rng = Rng(course.seed);
        let allowed = course.setup.allowed.clone();
        let mut pair = Pair::new(&course.setup);
        let mut pages = allowed.pages();
        scribble(&pair, &pages, &mut rng);
        if !course.setup.fresh {
            // A destination that is not fresh has anything in its RAM.
            let mut ram = pair.destination.machine.ram.borrow_mut();
            for p in &pages {
                ram[*p as usize] = rng.page();
            }
        }
        let outside = |side: &Side| -> Vec<(usize, Page)> {
            let ram = side.machine.ram.borrow();
            let inside: HashSet<_> = allowed.pages().into_iter().collect();
            ram.iter().copied().enumerate().filter(|(p, _)| !inside.contains(&(*p as u64))).collect()
        };
        let before = outside(&pair.destination);

        for epoch in 1..=course.epochs {
            let dirty: Vec<u64> = if epoch == 1 { pages.clone() } else {
                pages.iter().copied().filter(|_| rng.below(3) == 0).collect()
            };
            scribble(&pair, if epoch == 1 { &[] } else { &dirty }, &mut rng);
            let mut dirty = dirty;
            rng.shuffle(&mut dirty);
            send_epoch(&mut pair, &dirty, epoch, course.largest_batch, &mut rng);
            if epoch < course.epochs {
                pair.end_epoch();
            }
        }
        pair.hand_over();
        let commit = pair.destination.token(Op::Commit, &[]);
        pair.source.control(Op::CommitToken, &commit).unwrap();
        pair.assert_equal_ram(&allowed);
        prop_assert!(outside(&pair.destination) == before, "what is not guest RAM stays as it was");
        pages.sort_unstable();
        let read: HashSet<_> = pair.source.machine.pages_read.borrow().iter().copied().collect();
        prop_assert!(read.iter().all(|p| pages.binary_search(p).is_ok()));
    }

    /// A host that rewrites the mailbox between any two looks of the helper: what reaches RAM is what the
    /// source sealed, for that page, whole; what is read is guest RAM.
    #[test]
    fn a_host_that_rewrites_between_looks_gets_nothing_into_ram(course in courses(), vandal: u64) {
        rewritten_between_looks(&course, vandal);
    }
}

/// Exports and imports under a host that rewrites; gives how many pages reached RAM and how many imports were
/// refused.
fn rewritten_between_looks(course: &Course, vandal: u64) -> (usize, usize) {
    let mut rng = Rng(course.seed);
    let pages = course.setup.allowed.pages();
    let allowed: HashSet<u64> = pages.iter().copied().collect();
    let mut pair = Pair::new(&course.setup);
    let mut sealed: HashSet<(u64, Page)> = HashSet::new();
    let mut refused = 0;
    // First only the source's host, then only the destination's, then both.
    for (source, destination) in [(true, false), (false, true), (true, true)] {
        let set = |side: &Side, on: bool| {
            *side.machine.hostile.borrow_mut() = on.then_some(Rng(vandal ^ side.workers.len() as u64));
        };
        set(&pair.source, source);
        set(&pair.destination, destination);
        for _ in 0..8 {
            let batch: Vec<u64> = (0..1 + rng.below(4)).map(|_| pages[rng.below(pages.len())]).collect();
            pair.source.list(0, 0, &batch);
            let request = Submission {
                op: Op::Export as u32,
                count: batch.len() as u32,
                epoch: 1,
                ..Default::default()
            };
            let exported = pair.source.call(0, request, &[]);
            let ram = pair.source.machine.ram.borrow();
            for page in pair.source.machine.pages_read.borrow().iter() {
                assert!(allowed.contains(page), "page {page} was read");
                sealed.insert((*page, ram[*page as usize]));
            }
            drop(ram);
            if exported.status == Status::Ok as u32 {
                let payload = pair.source.payload(0, 0, exported.len as usize);
                let imported = pair.destination.import_raw(0, 1, exported.count, &payload);
                refused += usize::from(imported.status != Status::Ok as u32);
            }
        }
    }
    let written = pair.destination.machine.pages_written.borrow();
    for (page, content) in written.iter() {
        assert!(sealed.contains(&(*page, *content)), "page {page} holds what nobody sealed");
    }
    (written.len(), refused)
}

#[test]
fn a_rewriting_host_is_seen_to_do_both() {
    // The property above is not true of nothing: over these seeds pages do arrive, and imports are refused.
    let (mut written, mut refused) = (0, 0);
    for seed in 0..32 {
        let setup = Setup { allowed: Allowed(vec![3..90]), seeds: (seed, seed + 100), ..Setup::default() };
        let course = Course { setup, epochs: 1, seed, largest_batch: 1 };
        let (w, r) = rewritten_between_looks(&course, seed);
        written += w;
        refused += r;
    }
    println!("{written} pages written, {refused} imports refused");
    assert!(written > 100 && refused > 32, "{written} written, {refused} refused");
}

#[test]
fn the_mailbox_is_looked_at_once() {
    let mut pair = Pair::new(&Setup { elide_zero: true, ..Setup::default() });
    let once = |side: &Side, what: &str| {
        let mut spans: Vec<_> = side.machine.fetched.borrow_mut().drain(..).collect();
        assert!(!spans.is_empty(), "{what} looked at something");
        spans.sort_by_key(|(worker, span)| (*worker, span.start));
        for pair in spans.windows(2) {
            let [(a, first), (b, second)] = pair else { unreachable!() };
            assert!(a != b || first.end <= second.start, "{what} fetches {second:?} again");
        }
    };
    let forget = |side: &Side| side.machine.fetched.borrow_mut().clear();
    forget(&pair.source);
    forget(&pair.destination);
    let records = pair.source.export(0, 1, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    once(&pair.source, "export");
    pair.destination.import(0, 1, &records).unwrap();
    once(&pair.destination, "import");
    let token = pair.source.token(Op::EndEpoch, &[]);
    forget(&pair.source);
    pair.destination.control(Op::EpochToken, &token).unwrap();
    once(&pair.destination, "epoch token");
    pair.source.control(Op::Pause, &[]).unwrap();
    forget(&pair.source);
    let start = pair.source.start(0).unwrap();
    once(&pair.source, "start");
    pair.destination.control(Op::State, &STATE).unwrap();
    once(&pair.destination, "state");
    pair.destination.control(Op::StartToken, &start).unwrap();
    once(&pair.destination, "start token");
    let commit = pair.destination.token(Op::Commit, &[]);
    forget(&pair.source);
    pair.source.control(Op::CommitToken, &commit).unwrap();
    once(&pair.source, "commit token");
}

// ------------------------------------------------------------------------------------------ forged records

/// Imports into a twin of the destination, wants it refused with nothing written and the session dead.
fn refused_by_twin(
    pair: &Pair,
    setup: &Setup,
    before: &[Record],
    bad: &[Record],
    what: &str,
) -> (Status, u32) {
    let mut twin = pair.twin(setup);
    if !before.is_empty() {
        twin.import(0, 1, before).unwrap();
    }
    let written = twin.machine.pages_written.borrow().len();
    let payload = bad.concat();
    let c = twin.import_raw(0, 1, bad.len() as u32, &payload);
    let status = Status::from_u32(c.status).unwrap();
    assert_ne!(status, Status::Ok, "{what}");
    assert_eq!((c.len, c.zero), (0, 0), "{what}");
    let accepted = twin.machine.pages_written.borrow().len() - written;
    assert!(accepted <= c.count as usize, "{what}: {accepted} pages written, refused at {}", c.count);
    twin.assert_dead_destination();
    (status, c.count)
}

#[test]
fn every_flipped_bit_of_a_record_is_refused_the_same_way() {
    for elide_zero in [false, true] {
        let setup = Setup { elide_zero, ..Setup::default() };
        let mut pair = Pair::new(&setup);
        pair.source.machine.ram.borrow_mut()[3] = [0; PAGE_BYTES];
        let record = pair.source.export(0, 1, &[3]).unwrap().remove(0);
        assert_eq!(header_of(&record).kind, if elide_zero { Kind::ZeroPage } else { Kind::Page });
        pair.twin(&setup).import(0, 1, std::slice::from_ref(&record)).expect("the record itself is good");
        let body = HEADER_BYTES..record.len() - TAG_BYTES;
        // Every bit of header and tag, every byte of the body.
        let bits = (0..record.len() * 8).filter(|b| !body.contains(&(b / 8)) || b % 8 == b / 8 % 8);
        let mut tried = 0;
        for bit in bits {
            let bad = flipped(&record, bit);
            let answer = refused_by_twin(&pair, &setup, &[], &[bad], &format!("bit {bit}"));
            assert_eq!(answer, (Status::Unsealed, 0), "bit {bit} of byte {}", bit / 8);
            tried += 1;
        }
        assert_eq!(tried, (HEADER_BYTES + TAG_BYTES) * 8 + body.len());
    }
}

#[test]
fn every_flipped_bit_of_a_token_is_refused_the_same_way() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let records = pair.source.export(0, 1, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    let epoch = pair.source.token(Op::EndEpoch, &[]);
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    for bit in 0..TOKEN_BYTES * 8 {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &records).unwrap();
        assert_eq!(twin.control(Op::EpochToken, &flipped(&epoch, bit)), Err(Status::Unsealed), "bit {bit}");
        twin.assert_dead_destination();
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &records).unwrap();
        twin.control(Op::EpochToken, &epoch).unwrap();
        twin.control(Op::State, &STATE).unwrap();
        assert_eq!(twin.control(Op::StartToken, &flipped(&start, bit)), Err(Status::Unsealed), "bit {bit}");
        twin.assert_dead_destination();
    }
    // Answers to START: refused, and the source waits on for the genuine one.
    let mut twin = pair.twin(&setup);
    twin.import(0, 1, &records).unwrap();
    twin.control(Op::EpochToken, &epoch).unwrap();
    twin.control(Op::State, &STATE).unwrap();
    twin.control(Op::StartToken, &start).unwrap();
    let commit = twin.token(Op::Commit, &[]);
    let abort = pair.twin(&setup).token(Op::Abort, &[]);
    for bit in 0..TOKEN_BYTES * 8 {
        assert_eq!(
            pair.source.control(Op::AbortToken, &flipped(&abort, bit)),
            Err(Status::Unsealed),
            "bit {bit}"
        );
        assert_eq!(
            pair.source.control(Op::CommitToken, &flipped(&commit, bit)),
            Err(Status::Unsealed),
            "bit {bit}"
        );
    }
    assert_eq!(pair.source.control(Op::AbortToken, &commit), Err(Status::Unsealed), "COMMIT is no ABORT");
    assert_eq!(pair.source.control(Op::CommitToken, &abort), Err(Status::Unsealed), "ABORT is no COMMIT");
    assert_eq!(pair.source.control(Op::AbortToken, &start), Err(Status::Unsealed), "START comes not back");
    for len in [0, 1, TOKEN_BYTES - 1, TOKEN_BYTES + 1, PAYLOAD_BYTES] {
        let mut padded = commit.clone();
        padded.resize(len, 0);
        assert_eq!(pair.source.control(Op::CommitToken, &padded), Err(Status::Unsealed), "{len} bytes");
    }
    assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState), "still in doubt");
    pair.source.control(Op::CommitToken, &commit).unwrap();
    assert_eq!(pair.source.control(Op::AbortToken, &abort), Err(Status::WrongState), "done is done");
    assert_eq!(pair.source.control(Op::Hello, &[]), Err(Status::WrongState));
}

#[test]
fn replayed_reordered_cut_and_relabelled_records_are_refused() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let r = pair.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    let other_stream = pair.source.export(1, 1, &[4, 5]).unwrap();
    let refuse =
        |before: &[Record], bad: &[Record], what: &str| refused_by_twin(&pair, &setup, before, bad, what);
    let unsealed_at = |i| (Status::Unsealed, i);
    assert_eq!(refuse(&r[..2], &r[..1], "replay of a batch"), unsealed_at(0));
    assert_eq!(refuse(&r[..2], &r[1..2], "replay of the last"), unsealed_at(0));
    assert_eq!(refuse(&[], &[r[0].clone(), r[0].clone()], "duplicate"), unsealed_at(1));
    assert_eq!(refuse(&[], &[r[1].clone(), r[0].clone()], "reorder"), unsealed_at(0));
    assert_eq!(refuse(&[], &[r[0].clone(), r[2].clone(), r[1].clone()], "reorder"), unsealed_at(1));
    assert_eq!(refuse(&r[..1], &r[2..3], "a drop that is followed by a record"), unsealed_at(0));
    assert_eq!(refuse(&[], &other_stream, "another stream"), unsealed_at(0));
    for page in [1, 7, 8, u64::MAX] {
        assert_eq!(refuse(&[], &[with_header(&r[0], |h| h.page = page)], "relabelled page"), unsealed_at(0));
    }
    let relabelled = with_header(&other_stream[0], |h| h.stream = 0);
    assert_eq!(refuse(&[], &[relabelled], "relabelled stream"), unsealed_at(0));
    let renumbered = with_header(&r[1], |h| h.sequence = 0);
    assert_eq!(refuse(&[], &[renumbered], "renumbered"), unsealed_at(0));
    assert_eq!(refuse(&[], &[with_header(&r[0], |h| h.epoch = 2)], "another epoch"), unsealed_at(0));
    let as_zero = [&with_header(&r[0], |h| (h.kind, h.len) = (Kind::ZeroPage, 0))[..48]].concat();
    assert_eq!(refuse(&[], &[as_zero], "a page as a zero page"), unsealed_at(0));
    for kind in [Kind::Epoch, Kind::Start, Kind::Commit, Kind::Abort] {
        let as_token = with_header(&r[0], |h| (h.kind, h.len) = (kind, kind.body_bytes() as u32));
        assert_eq!(refuse(&[], &[as_token], "a page as a token"), unsealed_at(0));
    }

    // Truncated or padded anywhere: declared length and records must agree to the byte.
    for len in [
        0,
        1,
        HEADER_BYTES - 1,
        HEADER_BYTES,
        HEADER_BYTES + 1,
        r[0].len() - 1,
        r[0].len() + 1,
        r[0].len() * 2,
    ] {
        let mut twin = pair.twin(&setup);
        let mut payload = r[0].clone();
        payload.resize(len, 0);
        let c = twin.import_raw(0, 1, 1, &payload);
        assert_eq!(Status::from_u32(c.status), Some(Status::Unsealed), "{len} bytes");
        twin.assert_dead_destination();
    }
    // More or fewer records than declared.
    for (count, records) in [(0, 1), (1, 2), (2, 1), (BATCH_MAX as u32, 4)] {
        let mut twin = pair.twin(&setup);
        let c = twin.import_raw(0, 1, count, &r[..records].concat());
        assert_eq!(Status::from_u32(c.status), Some(Status::Unsealed), "{count} declared, {records} there");
        twin.assert_dead_destination();
    }
    // Bytes behind the declared length are not looked at.
    let mut twin = pair.twin(&setup);
    let whole = r[..2].concat();
    twin.machine.mailboxes[0].borrow_mut()[slot_at(0) + 4096..][..whole.len()].copy_from_slice(&whole);
    let request = Submission {
        op: Op::Import as u32,
        count: 2,
        len: r[0].len() as u32,
        epoch: 1,
        ..Default::default()
    };
    let c = twin.call(0, request, &[]);
    assert_eq!((Status::from_u32(c.status), c.count), (Some(Status::Unsealed), 1));
}

#[test]
fn a_dropped_record_is_found_at_the_epoch_token() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let a = pair.source.export(0, 1, &[0, 1, 2]).unwrap();
    let b = pair.source.export(1, 1, &[3, 4]).unwrap();
    let token = pair.source.token(Op::EndEpoch, &[]);
    type Sent<'a> = (&'a [Record], &'a [Record]);
    let cases: [Sent<'_>; 5] = [(&a[..2], &b), (&a, &b[..1]), (&a, &[]), (&[], &b), (&[], &[])];
    for (i, (first, second)) in cases.into_iter().enumerate() {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, first).unwrap();
        twin.import(1, 1, second).unwrap();
        assert_eq!(twin.control(Op::EpochToken, &token), Err(Status::Incomplete), "case {i}");
        twin.assert_dead_destination();
    }
    // And at START, when the last epoch has no token of its own.
    let mut twin = pair.twin(&setup);
    twin.import(0, 1, &a).unwrap();
    twin.import(1, 1, &b).unwrap();
    twin.control(Op::EpochToken, &token).unwrap();
    let last = pair.source.export(0, 2, &[5, 6, 7, 0]).unwrap();
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    twin.import(0, 2, &last[..3]).unwrap();
    twin.control(Op::State, &STATE).unwrap();
    assert_eq!(twin.control(Op::StartToken, &start), Err(Status::Incomplete));
    twin.assert_dead_destination();
}

#[test]
fn an_older_version_that_comes_last_is_refused() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let old = pair.source.export(0, 1, &[0]).unwrap();
    let token = pair.source.token(Op::EndEpoch, &[]);
    pair.source.machine.ram.borrow_mut()[0] = [7; PAGE_BYTES];
    let new = pair.source.export(0, 2, &[0]).unwrap();
    // The new one first, in either epoch the host may name.
    for epoch in [1, 2] {
        let mut twin = pair.twin(&setup);
        assert_eq!(twin.import(0, epoch, &new), Err((Status::Unsealed, 0)));
        twin.assert_dead_destination();
    }
    // The old one again, after the new one.
    for epoch in [1, 2] {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &old).unwrap();
        twin.control(Op::EpochToken, &token).unwrap();
        twin.import(0, 2, &new).unwrap();
        assert_eq!(twin.import(0, epoch, &old), Err((Status::Unsealed, 0)));
        assert_eq!(twin.machine.ram.borrow()[0], [7; PAGE_BYTES], "the newer version stays");
        twin.assert_dead_destination();
    }
}

#[test]
fn the_next_epoch_does_not_begin_before_its_token() {
    // In sequence, genuine, but of an epoch that the destination has not entered; and a host that names
    // another one.
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let first = pair.source.export(0, 1, &[0]).unwrap();
    let token = pair.source.token(Op::EndEpoch, &[]);
    let second = pair.source.export(0, 2, &[1]).unwrap();
    for named in [1, 2] {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &first).unwrap();
        assert_eq!(twin.import(0, named, &second), Err((Status::Unsealed, 0)), "named {named}");
        twin.assert_dead_destination();
    }
    for named in [0, 1, 3, u32::MAX] {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &first).unwrap();
        twin.control(Op::EpochToken, &token).unwrap();
        assert_eq!(twin.import(0, named, &second), Err((Status::Unsealed, 0)), "named {named}");
        twin.assert_dead_destination();
    }
    let mut twin = pair.twin(&setup);
    twin.import(0, 1, &first).unwrap();
    twin.control(Op::EpochToken, &token).unwrap();
    twin.import(0, 2, &second).unwrap();
}

#[test]
fn a_peer_with_the_keys_is_held_to_the_rules_too() {
    // A source helper that went wrong: it has the keys and seals what a good one never would.
    let setup = Setup::default();
    let pair = Pair::new(&setup);
    let key = reader::key(&pair, &SECRET, reader::KeyId { direction: Direction::Forward as u8, stream: 0 });
    let seal = |sequence, page, content: u8| {
        let header = Header { kind: Kind::Page, stream: 0, epoch: 1, sequence, page, len: PAGE_BYTES as u32 };
        reader::seal(&pair, &key, Direction::Forward, &header, &[content; PAGE_BYTES])
    };
    let mut twin = pair.twin(&setup);
    twin.import(0, 1, &[seal(0, 3, 1), seal(1, 4, 2)]).expect("the forging itself is right");
    assert_eq!(twin.import(0, 1, &[seal(2, 5, 3), seal(3, 3, 9)]), Err((Status::PageRepeated, 1)));
    assert_eq!(twin.machine.ram.borrow()[3], [1; PAGE_BYTES], "the page of this epoch stays");
    twin.assert_dead_destination();
    for page in [8, 71, 72, 1 << 40, u64::MAX] {
        let mut twin = pair.twin(&setup);
        assert_eq!(twin.import(0, 1, &[seal(0, page, 1)]), Err((Status::PageRefused, 0)), "page {page}");
        assert!(twin.machine.pages_written.borrow().is_empty());
        twin.assert_dead_destination();
    }
}

#[test]
fn records_and_tokens_of_another_session_are_refused() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let record = pair.source.export(0, 1, &[0]).unwrap();
    let epoch = pair.source.token(Op::EndEpoch, &[]);
    // Everything the same but: session id, transcript, destination's nonce, source's nonce, the guest's
    // secret.
    let others: [(&str, Setup); 4] = [
        ("session", Setup { session: [8; 16], ..setup.clone() }),
        ("transcript", Setup { transcript: [4; 32], ..setup.clone() }),
        ("destination's nonce", Setup { seeds: (1, 3), ..setup.clone() }),
        ("source's nonce", Setup { seeds: (4, 2), ..setup.clone() }),
    ];
    for (what, other) in others {
        let mut fresh = Pair::new(&other).destination;
        assert_eq!(fresh.import(0, 1, &record), Err((Status::Unsealed, 0)), "{what}");
        assert!(fresh.machine.pages_written.borrow().is_empty(), "{what}: not one page of a recorded stream");
        fresh.assert_dead_destination();
        let mut fresh = Pair::new(&other).destination;
        assert_eq!(fresh.control(Op::EpochToken, &epoch), Err(Status::Unsealed), "{what}");
        fresh.assert_dead_destination();
    }
    let mut stranger = Side::new(1, &setup.allowed, setup.seeds.1);
    stranger.machine.secret.set(Some([1; 32]));
    assert_eq!(stranger.hello(), pair.nonces.1);
    let begin = Begin { source: false, peer_nonce: pair.nonces.0, ..pair.begin };
    stranger.control(Op::Begin, &begin.encode()).unwrap();
    assert_eq!(stranger.import(0, 1, &record), Err((Status::Unsealed, 0)), "another guest's helper");
    // A second destination that is offered the same session has another nonce, and opens nothing.
    let mut second = Side::new(1, &setup.allowed, 77);
    second.hello();
    second.control(Op::Begin, &begin.encode()).unwrap();
    assert_eq!(second.import(0, 1, &record), Err((Status::Unsealed, 0)));
    // Answers of other sessions leave the source where it is.
    pair.destination.import(0, 1, &record).unwrap();
    let rest = pair.source.export(0, 2, &[1, 2, 3, 4, 5, 6, 7]).unwrap();
    pair.destination.control(Op::EpochToken, &epoch).unwrap();
    pair.destination.import(0, 2, &rest).unwrap();
    pair.hand_over();
    for other in [stranger.token(Op::Abort, &[]), second.token(Op::Abort, &[])] {
        assert_eq!(pair.source.control(Op::AbortToken, &other), Err(Status::Unsealed));
    }
    assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState));
}

#[test]
fn a_page_that_is_not_guest_ram_is_refused_even_from_a_genuine_peer() {
    // The peer's helper is genuine but has more RAM: its record opens, and still goes nowhere.
    let large = Setup { allowed: Allowed(vec![0..8, 16..24]), ..Setup::default() };
    let small = Setup { allowed: Allowed(vec![0..8, 20..24]), ..Setup::default() };
    let mut pair = Pair::new(&large);
    let records = pair.source.export(0, 1, &[16]).unwrap();
    let mut twin = pair.twin(&small);
    assert_eq!(twin.import(0, 1, &records), Err((Status::PageRefused, 0)));
    assert!(twin.machine.pages_written.borrow().is_empty());
    twin.assert_dead_destination();
}

#[test]
fn token_replay_forgery_wrong_kind_and_wrong_epoch() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let all = [0, 1, 2, 3, 4, 5, 6, 7];
    let first = pair.source.export(0, 1, &all).unwrap();
    let one = pair.source.token(Op::EndEpoch, &[]);
    let two = pair.source.token(Op::EndEpoch, &[]);
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    let ready = || {
        let mut twin = pair.twin(&setup);
        twin.import(0, 1, &first).unwrap();
        twin
    };
    let relabel = |token: &[u8], kind| with_header(token, |h| h.kind = kind);
    type Case<'a> = (&'a str, Vec<(Op, Vec<u8>)>);
    let cases: Vec<Case<'_>> = vec![
        ("replay", vec![(Op::EpochToken, one.clone()), (Op::EpochToken, one.clone())]),
        ("skipped", vec![(Op::EpochToken, two.clone())]),
        ("START as an epoch token", vec![(Op::EpochToken, start.clone())]),
        ("relabelled START", vec![(Op::EpochToken, relabel(&start, Kind::Epoch))]),
        ("epoch token as START", vec![(Op::State, STATE.to_vec()), (Op::StartToken, one.clone())]),
        ("relabelled epoch", vec![(Op::State, STATE.to_vec()), (Op::StartToken, relabel(&one, Kind::Start))]),
        ("START before its epochs", vec![(Op::State, STATE.to_vec()), (Op::StartToken, start.clone())]),
        ("epoch relabelled", vec![(Op::EpochToken, with_header(&two, |h| h.epoch = 1))]),
        ("renumbered", vec![(Op::EpochToken, with_header(&two, |h| h.sequence = 0))]),
        ("with a page", vec![(Op::EpochToken, with_header(&one, |h| h.page = 1))]),
        ("on a page stream", vec![(Op::EpochToken, with_header(&one, |h| h.stream = 0))]),
        ("forged", vec![(Op::EpochToken, vec![0x41; TOKEN_BYTES])]),
        ("empty", vec![(Op::EpochToken, vec![])]),
        ("a page record", vec![(Op::EpochToken, first[0][..TOKEN_BYTES].to_vec())]),
    ];
    for (what, steps) in cases {
        let mut twin = ready();
        let (last, before) = steps.split_last().unwrap();
        for (op, bytes) in before {
            twin.control(*op, bytes).unwrap();
        }
        assert_eq!(twin.control(last.0, &last.1), Err(Status::Unsealed), "{what}");
        twin.assert_dead_destination();
    }
    // Another state than the source's START names.
    let mut twin = ready();
    twin.control(Op::EpochToken, &one).unwrap();
    twin.control(Op::EpochToken, &two).unwrap();
    twin.control(Op::State, &[0; 32]).unwrap();
    assert_eq!(twin.control(Op::StartToken, &start), Err(Status::Incomplete));
    twin.assert_dead_destination();
    // An extra page in the last epoch that the source knows nothing of cannot be made: the stream is sealed.
    // But the genuine sequence passes.
    let mut twin = ready();
    for (op, bytes) in [(Op::EpochToken, one.clone()), (Op::EpochToken, two), (Op::State, STATE.to_vec())] {
        twin.control(op, &bytes).unwrap();
    }
    assert_eq!(twin.control(Op::Commit, &[]), Err(Status::WrongState), "no COMMIT before START");
    assert_eq!(twin.control(Op::EpochToken, &one), Err(Status::WrongState), "no epoch after the state");
    assert_eq!(twin.import(0, 3, &[]), Err((Status::WrongState, 0)), "no pages after the state");
    twin.control(Op::StartToken, &start).unwrap();
    assert_eq!(twin.control(Op::StartToken, &start), Err(Status::WrongState), "START once");
    twin.control(Op::Commit, &[]).unwrap();
}

// ------------------------------------------------------------------------------------------ requests

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
    assert_eq!(pair.source.machine.published.borrow().len(), published_by_requests(&pair.source));
    // No refused batch left a claim behind: everything that is allowed leaves in this epoch still.
    let all = setup.allowed.pages();
    let records = pair.source.export(0, 1, &all).unwrap();
    pair.destination.import(0, 1, &records).unwrap();
    pair.assert_equal_ram(&setup.allowed);
}

/// Writes that are completions, not payload: all there may be when nothing was exported; the two before are
/// the nonce and `Begin`'s answer.
fn published_by_requests(side: &Side) -> usize {
    let published = side.machine.published.borrow();
    assert_eq!(published[0].len(), 32, "the nonce");
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
    for op in [0, 17, 18, 255, 1 << 16, u32::MAX] {
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
    assert_eq!(records.concat().len(), PAYLOAD_BYTES);
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

// ------------------------------------------------------------------------------------------ sessions

#[test]
fn begin_is_refused_unless_everything_is_right() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let good = Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: false,
        streams: 2,
        session: [1; 16],
        peer_nonce: [2; 32],
        transcript: [3; 32],
    };
    let new = || Side::new(setup.workers, &setup.allowed, 5);
    let mut side = new();
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "without Hello");
    side.hello();
    for streams in [0, 3, 16, 17, 0x100, u16::MAX] {
        let bad = Begin { streams, ..good };
        assert_eq!(side.control(Op::Begin, &bad.encode()), Err(Status::BadRequest), "{streams} streams");
    }
    for (byte, bits) in [(2, 0x10), (2, 0x80), (3, 1), (4, 1), (5, 1), (6, 1), (7, 0x80)] {
        let mut raw = good.encode();
        raw[byte] |= bits;
        assert_eq!(side.control(Op::Begin, &raw), Err(Status::BadRequest), "reserved bits of byte {byte}");
    }
    for len in [0, 1, BEGIN_BYTES - 1, BEGIN_BYTES + 1, PAYLOAD_BYTES] {
        let mut raw = good.encode().to_vec();
        raw.resize(len, 0);
        assert_eq!(side.control(Op::Begin, &raw), Err(Status::BadRequest), "{len} bytes");
    }
    // None of the refusals spent the nonce or opened anything.
    assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)));
    side.control(Op::Begin, &good.encode()).unwrap();
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "twice");
    let other_role = Begin { source: false, ..good };
    assert_eq!(side.control(Op::Begin, &other_role.encode()), Err(Status::WrongState), "the other role");
    assert_eq!(side.control(Op::Hello, &[]), Err(Status::WrongState), "a nonce inside a session");

    // The nonce is spent with its session: the next one needs a new Hello, and gives another nonce.
    side.control(Op::Cancel, &[]).unwrap();
    assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)), "the keys are gone");
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "a stale nonce");
    let (first, second) = (side.hello(), side.hello());
    assert_ne!(first, second);
    side.control(Op::Begin, &good.encode()).unwrap();

    let mut side = new();
    side.machine.secret.set(None);
    side.hello();
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::NoSecret));
    assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)));
    side.machine.secret.set(Some(SECRET));
    side.control(Op::Begin, &good.encode()).expect("the nonce was not spent");

    let mut side = new();
    side.machine.entropy.set(false);
    assert!(side.control(Op::Hello, &[]).is_err());
    let nonce_sized = |w: &Vec<u8>| w.len() == 32;
    assert!(!side.machine.published.borrow().iter().any(nonce_sized), "no nonce without entropy");
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState));

    // One stream of two: the other worker has none.
    let mut side = new();
    side.hello();
    side.control(Op::Begin, &Begin { streams: 1, ..good }.encode()).unwrap();
    side.export(0, 1, &[0]).unwrap();
    assert_eq!(side.export(1, 1, &[1]), Err((Status::WrongState, 0)));
}

#[test]
fn a_policy_that_forbids_it_ends_the_matter_before_any_key() {
    let setup = Setup::default();
    let good = Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: false,
        streams: 1,
        session: [1; 16],
        peer_nonce: [2; 32],
        transcript: [3; 32],
    };
    let begin = |guard: (u32, u32), begin: Begin| {
        let mut side = Side::guarded(setup.workers, &setup.allowed, 5, guard);
        side.hello();
        let answer = side.control(Op::Begin, &begin.encode());
        if answer.is_err() {
            assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)), "no session");
        }
        answer.map(|_| ())
    };
    let levels = [config::PROTECTION_MODELLED, config::PROTECTION_SEV, config::PROTECTION_SEV_ES];
    for level in levels {
        for source in [true, false] {
            let asked = Begin { source, ..good };
            for (policy, allowed) in [
                (config::POLICY_NODBG, true),
                (config::POLICY_NODBG | 1 << 2 | 1 << 1, true),
                (0, false),
                (config::POLICY_NOSEND, false),
                (config::POLICY_NODBG | config::POLICY_NOSEND, false),
            ] {
                let expected = if allowed { Ok(()) } else { Err(Status::PolicyForbids) };
                assert_eq!(begin((level, policy), asked), expected, "level {level}, policy {policy:#x}");
            }
            for wish in [Begin { elide_zero: true, ..asked }, Begin { fresh: true, ..asked }] {
                assert_eq!(begin((level, config::POLICY_NODBG), wish), Err(Status::PolicyForbids));
            }
        }
    }
    // Without encryption there is no policy to obey.
    begin((config::PROTECTION_NONE, config::POLICY_NOSEND), good).unwrap();
}

#[test]
fn a_destination_that_was_used_stays_used() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    pair.destination.token(Op::Abort, &[]);
    assert_eq!(pair.destination.control(Op::Hello, &[]), Err(Status::WrongState));
    for source in [true, false] {
        let begin = Begin { source, ..pair.begin };
        assert_eq!(pair.destination.control(Op::Begin, &begin.encode()), Err(Status::WrongState));
    }
}

#[test]
fn a_guest_that_was_committed_may_leave_again_and_nobody_else_arrives() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let records = pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
    pair.destination.import(0, 1, &records).unwrap();
    pair.hand_over();
    pair.destination.token(Op::Commit, &[]);
    let other = pair.destination.hello();
    for source in [false, true] {
        let begin = Begin { source, fresh: false, session: [9; 16], peer_nonce: other, ..pair.begin };
        let expected = if source { Ok(()) } else { Err(Status::WrongState) };
        assert_eq!(pair.destination.control(Op::Begin, &begin.encode()).map(|_| ()), expected, "{source}");
    }
    // A source now: it exports, and the old session's tokens are not minted any more.
    pair.destination.export(0, 1, &[setup.allowed.pages()[0]]).unwrap();
    assert_eq!(pair.destination.control(Op::Commit, &[]), Err(Status::WrongState));
    assert_eq!(pair.destination.control(Op::Abort, &[]), Err(Status::WrongState));
}

#[test]
fn start_comes_once_complete_and_paused() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let records = pair.source.export(0, 1, &[0, 1, 2, 3, 4, 5, 6]).unwrap();
    pair.destination.import(0, 1, &records).unwrap();
    assert_eq!(pair.source.start(1), Err(Status::WrongState), "not paused");
    pair.source.control(Op::Pause, &[]).unwrap();
    assert_eq!(pair.source.control(Op::Pause, &[]), Err(Status::WrongState), "paused once");
    for shared in [0, 2, u64::MAX, u64::MAX - 6] {
        assert_eq!(pair.source.start(shared), Err(Status::Incomplete), "{shared} shared pages");
    }
    for len in [0, START_BYTES - 1, START_BYTES + 1] {
        assert_eq!(pair.source.control(Op::Start, &vec![0; len]), Err(Status::BadRequest));
    }
    // A refused START changed nothing: the missing page may still leave.
    let last = pair.source.export(0, 1, &[7]).unwrap();
    pair.destination.import(0, 1, &last).unwrap();
    let start = pair.source.start(0).unwrap();
    assert_eq!(pair.source.start(0), Err(Status::WrongState), "START once");
    assert_eq!(pair.source.export(0, 1, &[0]), Err((Status::WrongState, 0)), "no pages after START");
    assert_eq!(pair.source.control(Op::EndEpoch, &[]), Err(Status::WrongState));
    assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState), "too late");
    assert_eq!(pair.source.control(Op::Hello, &[]), Err(Status::WrongState));
    for len in [0, 31, 33] {
        assert_eq!(pair.destination.control(Op::State, &vec![0; len]), Err(Status::BadRequest));
    }
    pair.destination.control(Op::State, &STATE).unwrap();
    assert_eq!(pair.destination.control(Op::State, &STATE), Err(Status::WrongState), "one state");
    pair.destination.control(Op::StartToken, &start).unwrap();
    // A page counts once, however often it left.
    let mut pair = Pair::new(&setup);
    pair.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    pair.source.control(Op::EndEpoch, &[]).unwrap();
    pair.source.export(0, 2, &[0, 1, 2, 3]).unwrap();
    pair.source.control(Op::Pause, &[]).unwrap();
    assert_eq!(pair.source.start(0), Err(Status::Incomplete), "eight records of four pages");
}

#[test]
fn commit_and_abort_exclude_each_other() {
    let setup = Setup::default();
    let ready = || {
        let mut pair = Pair::new(&setup);
        let records = pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
        pair.destination.import(0, 1, &records).unwrap();
        pair.hand_over();
        pair
    };
    let mut pair = ready();
    let commit = pair.destination.token(Op::Commit, &[]);
    assert_eq!(pair.destination.control(Op::Abort, &[]), Err(Status::WrongState), "COMMIT, then ABORT");
    // Nothing else leads to FailedImport either.
    for op in [Op::EpochToken, Op::StartToken] {
        assert_eq!(pair.destination.control(op, &[7; TOKEN_BYTES]), Err(Status::WrongState));
    }
    assert_eq!(pair.destination.import(0, 1, &[vec![7; 100]]), Err((Status::WrongState, 0)));
    assert_eq!(pair.destination.control(Op::Abort, &[]), Err(Status::WrongState));
    pair.source.control(Op::CommitToken, &commit).unwrap();

    let mut pair = ready();
    let abort = pair.destination.token(Op::Abort, &[]);
    assert_eq!(pair.destination.control(Op::Commit, &[]), Err(Status::WrongState), "ABORT, then COMMIT");
    let again = pair.destination.token(Op::Abort, &[]);
    assert_ne!(abort, again, "another nonce");
    // Either serves; the source then may begin a new session, in which it no longer does.
    pair.source.control(Op::AbortToken, &again).unwrap();
    assert_eq!(pair.source.control(Op::AbortToken, &abort), Err(Status::WrongState));
    pair.source.hello();
    pair.source.control(Op::Begin, &pair.begin.encode()).unwrap();
    pair.source.control(Op::Pause, &[]).unwrap();
    pair.source.start(8).unwrap();
    for old in [&abort, &again] {
        assert_eq!(
            pair.source.control(Op::AbortToken, old),
            Err(Status::Unsealed),
            "an ABORT of the last session"
        );
    }
    assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState));
}

#[test]
fn a_forged_abort_leaves_the_source_stopped() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    let records = pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
    pair.destination.import(0, 1, &records).unwrap();
    let epoch = pair.source.token(Op::EndEpoch, &[]);
    pair.destination.control(Op::EpochToken, &epoch).unwrap();
    pair.hand_over();
    // The source's own host knows every header, every ciphertext, but no key.
    let mut forgeries = vec![vec![0; TOKEN_BYTES], vec![0xff; TOKEN_BYTES], epoch.clone()];
    forgeries.push(with_header(&epoch, |h| h.kind = Kind::Abort));
    forgeries.push(with_header(&epoch, |h| (h.kind, h.sequence) = (Kind::Abort, 0)));
    for key in [[0; 32], SECRET] {
        // Sealed like one, under a key that is not the session's.
        forgeries.push(reseal(&pair, &key, Kind::Abort));
    }
    for (i, forged) in forgeries.iter().enumerate() {
        assert_eq!(pair.source.control(Op::AbortToken, forged), Err(Status::Unsealed), "forgery {i}");
        assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState), "forgery {i}");
        assert_eq!(pair.source.control(Op::Pause, &[]), Err(Status::WrongState), "forgery {i}");
        assert_eq!(pair.source.export(0, 1, &[0]), Err((Status::WrongState, 0)), "forgery {i}");
    }
    // The forward key does not make backward tokens; the backward key does, so the forging itself is right.
    let id = |direction| reader::KeyId { direction: direction as u8, stream: 0xffff };
    let forward = reader::key(&pair, &SECRET, id(Direction::Forward));
    assert_eq!(
        pair.source.control(Op::AbortToken, &reseal(&pair, &forward, Kind::Abort)),
        Err(Status::Unsealed)
    );
    let backward = reader::key(&pair, &SECRET, id(Direction::Backward));
    assert_eq!(
        pair.source.control(Op::AbortToken, &reseal(&pair, &backward, Kind::Commit)),
        Err(Status::Unsealed)
    );
    pair.source.control(Op::AbortToken, &reseal(&pair, &backward, Kind::Abort)).unwrap();
}

/// A token of `kind` as the destination would make it, under `key`.
fn reseal(pair: &Pair, key: &[u8; 32], kind: Kind) -> Vec<u8> {
    let header = Header { kind, stream: 0xffff, epoch: 2, sequence: 0, page: 0, len: 96 };
    reader::seal(pair, key, Direction::Backward, &header, &Token::default().encode())
}

// ------------------------------------------------------------------------------------------ secrets

/// A run with everything in it: streams, epochs, sessions by one helper and by several, refusals, and all of
/// it with the same session id, transcript and secret, so that only the nonces keep sessions apart.
struct Run {
    /// Everything that was sealed, with the key and the direction.
    sealed: Vec<([u8; 32], Direction, Record)>,
    /// Everything that any helper wrote into a mailbox.
    published: Vec<Vec<u8>>,
    /// Every key, and the secret.
    keys: Vec<[u8; 32]>,
    /// Every page that was private and left.
    pages: HashSet<Page>,
}

fn long_run(elide_zero: bool) -> Run {
    let allowed = Allowed(vec![0..24, 40..64]);
    let mut run = Run { sealed: vec![], published: vec![], keys: vec![SECRET], pages: HashSet::new() };
    for round in 0..3u64 {
        let seeds = (10 + round, 20 + round);
        let setup = Setup { workers: 3, allowed: allowed.clone(), elide_zero, seeds, ..Setup::default() };
        let mut pair = Pair::new(&setup);
        for part in 0..3u64 {
            session(&mut pair, &allowed, part, &mut run);
            // The source's helper goes on with a new destination.
            let fresh = Side::new(3, &allowed, 1000 + round * 10 + part);
            let used = std::mem::replace(&mut pair.destination, fresh);
            run.published.append(&mut used.machine.published.borrow_mut());
            pair.nonces = (pair.source.hello(), pair.destination.hello());
            pair.begin.peer_nonce = pair.nonces.1;
            pair.source.control(Op::Begin, &pair.begin.encode()).unwrap();
            let theirs = Begin { source: false, peer_nonce: pair.nonces.0, ..pair.begin };
            pair.destination.control(Op::Begin, &theirs.encode()).unwrap();
        }
        run.published.append(&mut pair.source.machine.published.borrow_mut());
    }
    run
}

/// Three epochs; then the session is cancelled, or handed over and given up.
fn session(pair: &mut Pair, allowed: &Allowed, part: u64, run: &mut Run) {
    run.keys.extend(reader::keys(pair, &SECRET));
    let key = |pair: &Pair, direction: Direction, stream| {
        reader::key(pair, &SECRET, reader::KeyId { direction: direction as u8, stream })
    };
    let mut rng = Rng(part);
    for epoch in 1..=3 {
        let mut pages = allowed.pages();
        rng.shuffle(&mut pages);
        pair.source.machine.ram.borrow_mut()[pages[0] as usize] = [0; PAGE_BYTES];
        pair.source.machine.ram.borrow_mut()[pages[1] as usize] = rng.page();
        for (i, batch) in pages.chunks(7).enumerate() {
            let stream = i % 3;
            assert!(pair.source.export(stream, epoch, &[batch[0], u64::MAX]).is_err());
            let records = pair.source.export(stream, epoch, batch).unwrap();
            let ram = pair.source.machine.ram.borrow();
            run.pages.extend(batch.iter().map(|p| ram[*p as usize]));
            drop(ram);
            pair.destination.import(stream, epoch, &records).unwrap();
            let k = key(pair, Direction::Forward, stream as u16);
            run.sealed.extend(records.into_iter().map(|r| (k, Direction::Forward, r)));
        }
        let token = pair.source.token(Op::EndEpoch, &[]);
        pair.destination.control(Op::EpochToken, &token).unwrap();
        run.sealed.push((key(pair, Direction::Forward, 0xffff), Direction::Forward, token));
    }
    if part == 0 {
        pair.source.control(Op::Cancel, &[]).unwrap();
        return;
    }
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    run.sealed.push((key(pair, Direction::Forward, 0xffff), Direction::Forward, start));
    for _ in 0..2 {
        let abort = pair.destination.token(Op::Abort, &[]);
        run.sealed.push((key(pair, Direction::Backward, 0xffff), Direction::Backward, abort));
    }
    let abort = run.sealed.last().unwrap().2.clone();
    pair.source.control(Op::AbortToken, &abort).unwrap();
}

#[test]
fn no_nonce_meets_a_key_twice() {
    let run = long_run(true);
    let mut ledger: HashMap<([u8; 32], [u8; 12]), Record> = HashMap::new();
    for (key, _, record) in &run.sealed {
        let twin = ledger.insert((*key, reader::nonce(record)), record.clone());
        assert!(twin.is_none(), "{:?}", header_of(record));
    }
    // Nine sessions of 3 page streams and 2 control keys, of which the cancelled sessions used no backward
    // one.
    let keys: HashSet<_> = ledger.keys().map(|(key, _)| *key).collect();
    assert_eq!(keys.len(), 9 * 4 + 6);
    assert_eq!(ledger.len(), 9 * (3 * 48 + 3) + 6 * 3);
    println!("{} seals under {} keys", ledger.len(), keys.len());
    // What the host sees without keys says the same: no stream of a session goes back.
    let mut last: HashMap<[u8; 32], u64> = HashMap::new();
    for (key, _, record) in &run.sealed {
        let sequence = header_of(record).sequence;
        let expected = last.get(key).map_or(0, |s| s + 1);
        assert_eq!(sequence, expected);
        last.insert(*key, sequence);
    }
}

#[test]
fn an_independent_reader_opens_what_was_sealed() {
    let setup = Setup { workers: 2, elide_zero: true, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    pair.source.machine.ram.borrow_mut()[2] = [0; PAGE_BYTES];
    let pages = [3, 2, 0, 7];
    let records = pair.source.export(1, 1, &pages).unwrap();
    let id = reader::KeyId { direction: Direction::Forward as u8, stream: 1 };
    let key = reader::key(&pair, &SECRET, id);
    for (record, page) in records.iter().zip(pages) {
        let body = reader::open(&pair, &key, Direction::Forward, record).expect("the documented format");
        let expected = pair.source.machine.ram.borrow()[page as usize];
        assert!(body == expected[..] || (page == 2 && body.is_empty()), "page {page}");
        assert_eq!(reader::open(&pair, &key, Direction::Backward, record), None, "the direction is bound");
    }
    let control = reader::key(&pair, &SECRET, reader::KeyId { stream: 0xffff, ..id });
    let token = pair.source.token(Op::EndEpoch, &[]);
    let body = reader::open(&pair, &control, Direction::Forward, &token).unwrap();
    let token = Token::decode(body.first_chunk().unwrap());
    assert_eq!((token.records, token.pages, token.state), (4, 4, [0; 32]));
    assert_ne!(token.exported, [0; 32]);
}

#[test]
fn neither_keys_nor_plaintext_reach_the_mailbox() {
    for elide_zero in [false, true] {
        let run = long_run(elide_zero);
        let mut canaries: HashSet<[u8; WINDOW]> = run.keys.iter().flat_map(|k| windows(k)).collect();
        // A zero page's window is met in headers by right; every other page is random.
        canaries.extend(run.pages.iter().flat_map(|p| windows(p)).filter(|w| *w != [0; WINDOW]));
        let found = |bytes: &[u8]| windows(bytes).any(|w| canaries.contains(&w));
        let bytes: usize = run.published.iter().map(Vec::len).sum();
        assert!(bytes > 4 << 20, "there is something to look through: {bytes}");
        for written in &run.published {
            assert!(!found(written), "{} bytes that hold a canary", written.len());
        }
        // The search does find what is there.
        let mut planted = run.published.iter().max_by_key(|w| w.len()).unwrap().clone();
        let page = run.pages.iter().find(|p| **p != [0; PAGE_BYTES]).unwrap();
        for secret in [&SECRET[3..3 + WINDOW], &run.keys[1][16..], &page[1000..1000 + WINDOW]] {
            assert!(!found(&planted));
            planted[77..77 + WINDOW].copy_from_slice(secret);
            assert!(found(&planted));
            planted[77..77 + WINDOW].fill(0);
        }
        println!("{bytes} bytes written, {} canaries", canaries.len());
    }
}

#[test]
fn without_elision_records_of_any_content_have_one_size() {
    let mut pair = Pair::new(&Setup::default());
    {
        let mut ram = pair.source.machine.ram.borrow_mut();
        (ram[0], ram[1], ram[2]) = ([0; PAGE_BYTES], [0xff; PAGE_BYTES], [0; PAGE_BYTES]);
        ram[2][PAGE_BYTES - 1] = 1;
    }
    let records = pair.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    assert!(records.iter().all(|r| r.len() == mirrorvm_abi::record::SEALED_PAGE_BYTES));
    // And with it, only what is zero to the last byte is a zero page.
    let setup = Setup { elide_zero: true, ..Setup::default() };
    let mut eliding = Pair::new(&setup);
    *eliding.source.machine.ram.borrow_mut() = pair.source.machine.ram.borrow().clone();
    let records = eliding.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    let kinds: Vec<_> = records.iter().map(|r| header_of(r).kind).collect();
    assert_eq!(kinds, [Kind::ZeroPage, Kind::Page, Kind::Page, Kind::Page]);
    // A zero page over a page that was not: written, fresh or not.
    for fresh in [false, true] {
        let mut pair = Pair::new(&Setup { fresh, ..setup.clone() });
        let first = pair.source.export(0, 1, &[0]).unwrap();
        pair.destination.import(0, 1, &first).unwrap();
        assert_ne!(pair.destination.machine.ram.borrow()[0], [0; PAGE_BYTES]);
        pair.end_epoch();
        pair.source.machine.ram.borrow_mut()[0] = [0; PAGE_BYTES];
        let zero = pair.source.export(0, 2, &[0]).unwrap();
        assert_eq!(header_of(&zero[0]).kind, Kind::ZeroPage);
        pair.destination.import(0, 2, &zero).unwrap();
        assert_eq!(pair.destination.machine.ram.borrow()[0], [0; PAGE_BYTES], "fresh: {fresh}");
    }
}

#[test]
fn random_bytes_as_requests_never_panic_and_never_write_ram() {
    // The whole mailbox is noise; every answer must be a refusal or harmless, and RAM stays.
    let mut pair = Pair::new(&Setup::default());
    let mut rng = Rng(99);
    let mut statuses = HashSet::new();
    for _ in 0..2_000 {
        let page = rng.page();
        let request = Submission {
            op: 1 + (rng.next() % 15) as u32,
            slot: (rng.next() % 2) as u32,
            count: (rng.next() % 3) as u32,
            len: [0, 32, 48, 88, 144, 4144][rng.below(6)],
            epoch: (rng.next() % 3) as u32,
            id: 0,
        };
        for side in [&mut pair.source, &mut pair.destination] {
            side.list(0, request.slot, &[rng.next() % 10, rng.next()]);
            let c: Completion = side.call(0, request, &page);
            statuses.insert(c.status);
        }
    }
    assert!(pair.destination.machine.pages_written.borrow().is_empty());
    assert!(pair.source.machine.pages_written.borrow().is_empty());
    assert!(statuses.len() >= 4, "{statuses:?}");
    let _ = split(&[]);
}
