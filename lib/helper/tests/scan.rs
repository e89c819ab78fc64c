//! Scans: what is found, what is not, what is refused. The model is the content that was sealed last.

#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a test says what it expects by unwrapping it"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::op::{Begin, Greeting, Op, SCAN_BYTES, SCAN_MAX, Scan, Status};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use support::{Allowed, Page, Pair, Rng, Setup, Side};

fn setup(allowed: &Allowed, workers: u32) -> Setup {
    Setup { allowed: allowed.clone(), workers, scanning: true, ..Setup::default() }
}

fn page(side: &Side, n: u64) -> Page {
    side.machine.ram.borrow()[n as usize]
}

fn write(side: &Side, n: u64, content: Page) {
    side.machine.ram.borrow_mut()[n as usize] = content;
}

/// Exports pages and opens them at the destination.
fn send(pair: &mut Pair, worker: usize, epoch: u32, pages: &[u64]) {
    for batch in pages.chunks(64) {
        let records = pair.source.export(worker, epoch, batch).unwrap();
        pair.destination.import(worker, epoch, &records).unwrap();
    }
}

fn scan_all(side: &mut Side, workers: u32, epoch: u32, allowed: &Allowed) -> Vec<u64> {
    let mut found = Vec::new();
    for (range, worker) in allowed.0.iter().zip((0..workers as usize).cycle()) {
        found.extend(side.scan(worker, epoch, range.clone()).unwrap());
    }
    found
}

#[derive(Clone, Copy, Debug)]
enum Write {
    /// Other content everywhere.
    New,
    /// One bit.
    Bit,
    /// Something else, and back again.
    Back,
    /// What it was at some earlier time.
    Older,
    /// Two blocks of 16 bytes change places.
    Swap,
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/scan.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn rounds_of_scans_carry_what_changed_and_only_that(
        seed: u64,
        workers in 1u32..3,
        rounds in prop::collection::vec(
            prop::collection::vec((0usize..300, prop_oneof![
                Just(Write::New), Just(Write::Bit), Just(Write::Back), Just(Write::Older), Just(Write::Swap),
            ]), 0..40),
            1..5,
        ),
    ) {
        let mut rng = Rng(seed);
        let allowed = Allowed(vec![0..70, 80..81, 128..256, 300..401]);
        let mut pair = Pair::new(&setup(&allowed, workers));
        let pages = allowed.pages();
        let mut sealed: BTreeMap<u64, Page> = BTreeMap::new();
        let mut older: Vec<(u64, Page)> = Vec::new();
        let mut left = pages.clone();
        let mut epoch = 1;
        for writes in rounds {
            // All are found before they went once.
            let unsent: BTreeSet<u64> = pages.iter().copied().filter(|p| !sealed.contains_key(p)).collect();
            if epoch == 1 {
                prop_assert_eq!(scan_all(&mut pair.source, workers, epoch, &allowed), pages.clone());
            }
            prop_assert_eq!(unsent.is_empty(), epoch > 1);
            rng.shuffle(&mut left);
            for (i, batch) in left.chunks(50).enumerate() {
                send(&mut pair, i % workers as usize, epoch, batch);
            }
            sealed.extend(left.iter().map(|p| (*p, page(&pair.source, *p))));
            pair.end_epoch();
            epoch += 1;
            for (at, what) in writes {
                let n = pages[at % pages.len()];
                let before = page(&pair.source, n);
                older.push((n, before));
                let mut after = before;
                match what {
                    Write::New => after = rng.page(),
                    Write::Bit => after[rng.below(PAGE_BYTES)] ^= 1 << rng.below(8),
                    Write::Back => {
                        write(&pair.source, n, rng.page());
                        if rng.below(2) == 0 {
                            // Seen by a scan in between, and not held against it.
                            scan_all(&mut pair.source, workers, epoch, &allowed);
                        }
                    }
                    Write::Older => {
                        let times: Vec<_> = older.iter().filter(|o| o.0 == n).collect();
                        after = times[rng.below(times.len())].1;
                    }
                    Write::Swap => {
                        let (a, b) = (rng.below(256) * 16, rng.below(256) * 16);
                        let (x, y): ([u8; 16], [u8; 16]) =
                            (before[a..a + 16].try_into().unwrap(), before[b..b + 16].try_into().unwrap());
                        after[a..a + 16].copy_from_slice(&y);
                        after[b..b + 16].copy_from_slice(&x);
                    }
                }
                write(&pair.source, n, after);
            }
            let changed: Vec<u64> =
                pages.iter().copied().filter(|p| sealed[p] != page(&pair.source, *p)).collect();
            left = scan_all(&mut pair.source, workers, epoch, &allowed);
            prop_assert_eq!(&left, &changed);
            // A scan changes nothing: it finds the same again.
            prop_assert_eq!(&scan_all(&mut pair.source, workers, epoch, &allowed), &changed);
        }
        send(&mut pair, 0, epoch, &left);
        pair.end_epoch();
        pair.assert_equal_ram(&allowed);
        pair.hand_over();
    }

    /// A guest that writes while it is being read: an export and a scan both see a mixture that never was in
    /// RAM.
    #[test]
    fn a_page_that_is_torn_while_it_is_read_is_found_in_the_end(seed: u64, cut in 1usize..PAGE_BYTES) {
        let mut rng = Rng(seed);
        let allowed = Allowed(vec![0..8]);
        let mut pair = Pair::new(&setup(&allowed, 1));
        let (old, new) = (page(&pair.source, 3), rng.page());
        let mut mixture = old;
        mixture[..cut].copy_from_slice(&new[..cut]);
        // Sealed is the mixture; what is in RAM afterwards is another content.
        *pair.source.machine.torn.borrow_mut() = Some((3, mixture));
        send(&mut pair, 0, 1, &allowed.pages());
        prop_assert!(page(&pair.destination, 3) == mixture);
        write(&pair.source, 3, new);
        pair.end_epoch();
        prop_assert_eq!(pair.source.scan(0, 2, 0..8).unwrap(), vec![3]);
        send(&mut pair, 0, 2, &[3]);
        pair.end_epoch();
        prop_assert_eq!(pair.source.scan(0, 3, 0..8).unwrap(), Vec::<u64>::new());
        // The scan reads what was sealed, and the write comes right behind it: this scan may miss it, the
        // next may not.
        write(&pair.source, 3, old);
        *pair.source.machine.torn.borrow_mut() = Some((3, new));
        prop_assert_eq!(pair.source.scan(0, 3, 0..8).unwrap(), Vec::<u64>::new());
        prop_assert_eq!(pair.source.scan(0, 3, 0..8).unwrap(), vec![3]);
        // A mixture that differs from what was sealed is found even where RAM is as it was: sent once too
        // often.
        write(&pair.source, 3, new);
        *pair.source.machine.torn.borrow_mut() = Some((3, mixture));
        prop_assert_eq!(pair.source.scan(0, 3, 0..8).unwrap(), if mixture == new { vec![] } else { vec![3] });
    }
}

#[test]
fn a_write_between_two_pages_of_a_scan_is_found_by_the_next() {
    let allowed = Allowed(vec![0..8]);
    let mut pair = Pair::new(&setup(&allowed, 1));
    send(&mut pair, 0, 1, &allowed.pages());
    pair.end_epoch();
    // When page 0 is read, page 5 changes: later in the same scan. When it is read again, page 0 has changed:
    // too late.
    for (touched, now, then) in [(5, vec![5], vec![5]), (0, vec![0, 5], vec![0, 5])] {
        let machine = Rc::clone(&pair.source.machine);
        *pair.source.machine.at_page_read.borrow_mut() =
            Some(Box::new(move || machine.ram.borrow_mut()[touched][77] ^= 1));
        assert_eq!(pair.source.scan(0, 2, 0..8).unwrap(), now);
        assert_eq!(pair.source.scan(0, 2, 0..8).unwrap(), then);
    }
}

#[test]
fn what_a_session_sent_counts_for_no_other() {
    let allowed = Allowed(vec![0..8]);
    let mut pair = Pair::new(&setup(&allowed, 1));
    send(&mut pair, 0, 1, &allowed.pages());
    pair.end_epoch();
    assert_eq!(pair.source.scan(0, 2, 0..8).unwrap(), []);
    let words = |side: &Side| side.digests.iter().map(|w| w.load(Relaxed)).collect::<Vec<_>>();
    let first = words(&pair.source);
    pair.source.control(Op::Cancel, &[]).unwrap();
    assert_eq!(pair.source.scan(0, 2, 0..8), Err(Status::WrongState), "no session");
    pair.source.hello();
    pair.source.control(Op::Begin, &pair.begin.encode()).unwrap();
    assert_eq!(pair.source.scan(0, 1, 0..8).unwrap(), allowed.pages(), "nothing went in this one");
    pair.source.export(0, 1, &[0, 1]).unwrap();
    assert_eq!(pair.source.scan(0, 1, 0..8).unwrap(), [2, 3, 4, 5, 6, 7]);
    let second = words(&pair.source);
    assert!((0..4).all(|i| first[i] != second[i]), "the same pages under another key");
    assert_eq!(first[4..], second[4..]);
    // No digest ever leaves: they are nowhere in what the host has been given.
    let published = pair.source.machine.published.borrow().concat();
    for word in first.iter().chain(&second) {
        assert!(!published.windows(8).any(|w| w == word.to_le_bytes()), "a digest in the mailbox");
    }
}

#[test]
fn scans_are_refused_where_they_make_no_sense() {
    let allowed = Allowed(vec![0..8, 16..24]);
    let mut pair = Pair::new(&setup(&allowed, 2));
    send(&mut pair, 0, 1, &allowed.pages());
    let read = |pair: &Pair| pair.source.machine.pages_read.borrow().len();
    let before = read(&pair);
    for epoch in [0, 2, u32::MAX] {
        assert_eq!(pair.source.scan(0, epoch, 0..8), Err(Status::WrongState), "epoch {epoch}");
    }
    for range in [8..9, 7..9, 0..24, 15..17, 23..25, 24..25, 1 << 40..(1 << 40) + 1] {
        assert_eq!(pair.source.scan(0, 1, range.clone()), Err(Status::PageRefused), "{range:?}");
    }
    let good = Scan { first: 0, count: 8 }.encode();
    for (what, raw) in [
        ("no pages", Scan { first: 0, count: 0 }.encode().to_vec()),
        ("too many", Scan { first: 0, count: SCAN_MAX + 1 }.encode().to_vec()),
        ("wraps", Scan { first: u64::MAX - 3, count: 8 }.encode().to_vec()),
        ("short", good[..SCAN_BYTES - 1].to_vec()),
        ("long", [&good[..], &[0]].concat()),
        ("reserved", [&good[..12], &[1, 0, 0, 0]].concat()),
    ] {
        let c = pair.source.scan_raw(0, 1, &raw);
        assert_eq!(Status::from_u32(c.status), Some(Status::BadRequest), "{what}");
    }
    assert_eq!(read(&pair), before, "no page was read for any of them");
    // Nothing of it ended the session.
    assert_eq!(pair.source.scan(1, 1, 16..24).unwrap(), []);
    // A destination has sent nothing, whatever room it has.
    assert_eq!(pair.destination.scan(0, 1, 0..8), Err(Status::WrongState));
    pair.end_epoch();
    pair.source.control(Op::Pause, &[]).unwrap();
    assert_eq!(pair.source.scan(0, 2, 0..8).unwrap(), [], "paused is when it counts");
    pair.source.start(0).unwrap();
    assert_eq!(pair.source.scan(0, 2, 0..8), Err(Status::WrongState), "after START");

    // Without room for digests there is no scan, and everything else works.
    let mut plain = Pair::new(&Setup { allowed, ..Setup::default() });
    let pages = [0, 1, 2];
    send(&mut plain, 0, 1, &pages);
    assert_eq!(plain.source.scan(0, 1, 0..8), Err(Status::WrongState));
    assert!(plain.source.digests.is_empty());
}

#[test]
fn without_entropy_there_is_no_key_and_no_session() {
    let allowed = Allowed(vec![0..8]);
    let mut side = Side::scanning(1, &allowed, 5);
    side.hello();
    side.machine.entropy.set(false);
    let begin = Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: true,
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 1,
        session: [1; 16],
        peer: Greeting { nonce: [2; 32], public_key: [2; 32] },
        transcript: [3; 32],
    };
    assert_eq!(side.control(Op::Begin, &begin.encode()), Err(Status::NoEntropy));
    assert_eq!(side.scan(0, 1, 0..8), Err(Status::WrongState));
    side.machine.entropy.set(true);
    side.hello();
    side.control(Op::Begin, &begin.encode()).unwrap();
}

#[test]
fn the_largest_scan_fits_its_slot() {
    let all = u64::from(SCAN_MAX);
    let allowed = Allowed(vec![0..all]);
    let mut side = Side::scanning(1, &allowed, 6);
    side.hello();
    let begin = Begin {
        source: true,
        elide_zero: true,
        fresh: false,
        digests: true,
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 1,
        session: [1; 16],
        peer: Greeting { nonce: [2; 32], public_key: [2; 32] },
        transcript: [3; 32],
    };
    side.control(Op::Begin, &begin.encode()).unwrap();
    assert_eq!(side.scan(0, 1, 0..all).unwrap().len() as u64, all);
    side.export(0, 1, &[0, 63, 64, all - 1]).unwrap();
    let found = side.scan(0, 1, 0..all).unwrap();
    assert_eq!(found.len() as u64, all - 4);
    assert!([0, 63, 64, all - 1].iter().all(|p| !found.contains(p)));
    // Odd edges: ranges that begin and end within words.
    assert_eq!(side.scan(0, 1, 60..67).unwrap(), [60, 61, 62, 65, 66]);
}
