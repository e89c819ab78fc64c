//! The helper's protocol between two helpers and a host that does what it likes.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a test says what it expects by unwrapping it"
)]

mod forged;
mod legal;
mod requests;
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
