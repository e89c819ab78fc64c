//! The helper's protocol between two helpers and a host that does what it likes.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a test says what it expects by unwrapping it"
)]

mod audit;
mod evidence;
mod forged;
mod legal;
mod requests;
mod rollback;
mod secrets;
mod sessions;

#[path = "../support/mod.rs"]
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
    op::{BEGIN_BYTES, Begin, Greeting, Op, START_BYTES, Status},
    record::{
        Direction, Front, HEADER_BYTES, Header, Kind, LISTED_BYTES, Listed, Suite, TAG_BYTES, TOKEN_BYTES,
        Token, front_bytes, group_bytes,
    },
};
use mirrorvm_helper::Step;
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use support::{Allowed, Page, Pair, Record, Rng, SECRET, SLOTS, STATE, Setup, Side, head, piece, reader};

const WINDOW: usize = 16;

fn windows(bytes: &[u8]) -> impl Iterator<Item = [u8; WINDOW]> {
    bytes.windows(WINDOW).map(|w| w.try_into().unwrap())
}

fn header_of(record: &[u8]) -> Header {
    Header::decode(&head(record)).unwrap()
}

fn with_header(record: &[u8], change: impl FnOnce(&mut Header)) -> Record {
    let mut header = header_of(record);
    change(&mut header);
    [&header.encode()[..], &record[HEADER_BYTES..]].concat()
}

/// The pages that a group lists.
fn listed(group: &[u8]) -> Vec<Listed> {
    Front::read(group).or_else(|| Front::read_digests(group)).unwrap().pages().collect()
}

/// A group with another list.
fn with_list(group: &[u8], list: &[Listed]) -> Record {
    let front = front_bytes(list.len());
    let words = list.iter().flat_map(|l| l.encode()).collect::<Vec<_>>();
    [&group[..HEADER_BYTES], &words, &group[front..]].concat()
}

fn flipped(record: &[u8], bit: usize) -> Record {
    let mut bad = record.to_vec();
    bad[bit / 8] ^= 1 << (bit % 8);
    bad
}

/// A run with everything in it: streams, epochs, sessions by one helper and by several, refusals, and all of
/// it with the same session id, transcript and secret, so that only the greetings keep sessions apart.
struct Run {
    /// Everything that was sealed, with the secret of its stream.
    sealed: Vec<([u8; 32], Record)>,
    /// Everything that any helper wrote into a mailbox.
    published: Vec<Vec<u8>>,
    /// Every key, every stream's secret, and the guest's.
    keys: Vec<[u8; 32]>,
    /// Every page that was private and left.
    pages: HashSet<Page>,
}

impl Run {
    fn seal(&mut self, secret: [u8; 32], record: Record) {
        self.keys.push(reader::group_key(&secret, &head(&record)));
        self.sealed.push((secret, record));
    }
}

/// Three epochs; then the session is cancelled, or handed over and given up.
fn session(pair: &mut Pair, allowed: &Allowed, part: u64, run: &mut Run) {
    run.keys.extend(reader::secrets(pair, &SECRET));
    let key = |pair: &Pair, direction: Direction, stream| {
        reader::secret(pair, &SECRET, reader::KeyId { direction: direction as u8, stream })
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
            let group = pair.source.export(stream, epoch, batch).unwrap();
            let ram = pair.source.machine.ram.borrow();
            run.pages.extend(batch.iter().map(|p| ram[*p as usize]));
            drop(ram);
            pair.destination.import(stream, epoch, &group).unwrap();
            run.seal(key(pair, Direction::Forward, stream as u16), group);
        }
        let token = pair.source.token(Op::EndEpoch, &[]);
        pair.destination.control(Op::EpochToken, &token).unwrap();
        run.seal(key(pair, Direction::Forward, 0xffff), token);
    }
    if part == 0 {
        pair.source.control(Op::Cancel, &[]).unwrap();
        return;
    }
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    run.seal(key(pair, Direction::Forward, 0xffff), start);
    for _ in 0..2 {
        let abort = pair.destination.token(Op::Abort, &[]);
        run.seal(key(pair, Direction::Backward, 0xffff), abort);
    }
    let abort = run.sealed.last().unwrap().1.clone();
    pair.source.control(Op::AbortToken, &abort).unwrap();
}
