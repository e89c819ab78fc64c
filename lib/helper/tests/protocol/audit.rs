//! The audit after START: what differs is found and named, and what somebody made up is refused.

use mirrorvm_abi::op::{NAMED_MAX, Verdict};
use mirrorvm_abi::record::{AUDIT_STREAM, CHUNK_PAGES, CHUNKS_MAX, DIGEST_BYTES};

use super::*;

/// Pages of some chunks with a hole in their midst.
fn allowed() -> Allowed {
    Allowed(vec![0..CHUNK_PAGES + 3, 2 * CHUNK_PAGES + 5..3 * CHUNK_PAGES])
}

const CHUNKS: [u64; 3] = [0, 1, 2];

fn setup() -> Setup {
    Setup { allowed: allowed(), audit: true, workers: 2, ..Setup::default() }
}

/// All of RAM has crossed, some of it twice; START is checked.
fn handed_over(setup: &Setup) -> Pair {
    let mut pair = Pair::new(setup);
    let pages = setup.allowed.pages();
    pair.source.machine.ram.borrow_mut()[1] = [0; PAGE_BYTES];
    for (epoch, part) in [(1, &pages[..]), (2, &pages[3..40])] {
        for (i, batch) in part.chunks(64).enumerate() {
            let group = pair.source.export(i % 2, epoch, batch).unwrap();
            pair.destination.import(i % 2, epoch, &group).unwrap();
        }
        pair.end_epoch();
        pair.source.machine.ram.borrow_mut()[7] = [0x77; PAGE_BYTES];
    }
    // As it was when it crossed for the last time.
    let last = pair.destination.machine.ram.borrow()[7];
    pair.source.machine.ram.borrow_mut()[7] = last;
    pair.hand_over();
    pair
}

fn committed(setup: &Setup) -> Pair {
    let mut pair = handed_over(setup);
    let commit = pair.destination.token(Op::Commit, &[]);
    pair.source.control(Op::CommitToken, &commit).unwrap();
    pair
}

/// The audit as honest hosts do it; what each wants left out.
fn audit(pair: &mut Pair, source: &[u64], destination: &[u64]) -> Verdict {
    for chunks in CHUNKS.chunks(2) {
        let group = pair.source.digest(chunks, source).unwrap();
        pair.destination.compare(&group, destination).unwrap();
    }
    pair.destination.verdict().unwrap()
}

fn differing(pages: &[u64], of: u64, left_out: u64) -> Verdict {
    let mut first = [0; NAMED_MAX];
    first.iter_mut().zip(pages).for_each(|(to, page)| *to = *page);
    Verdict { compared: of - left_out, left_out, differing: pages.len() as u64, first }
}

#[test]
fn both_ends_have_the_same_digests_before_commit_and_after_it() {
    let of = allowed().pages().len() as u64;
    for elide_zero in [false, true] {
        for fresh in [false, true] {
            for suite in Suite::ALL {
                let setup = Setup { elide_zero, fresh, suite, ..setup() };
                assert_eq!(audit(&mut handed_over(&setup), &[], &[]), differing(&[], of, 0));
                let mut pair = committed(&setup);
                // The guest runs there; what it writes is no business of the audit's.
                pair.destination.machine.ram.borrow_mut().iter_mut().for_each(|page| page[9] ^= 1);
                assert_eq!(audit(&mut pair, &[], &[]), differing(&[], of, 0));
                assert_eq!(pair.destination.verdict(), Err(Status::WrongState), "it is over");
            }
        }
    }
}

#[test]
fn a_write_that_nobody_noticed_is_found_and_named() {
    let pages = allowed().pages();
    let of = pages.len() as u64;
    for page in [0, 1, 255, 256, 258, 2 * CHUNK_PAGES + 5, 3 * CHUNK_PAGES - 1] {
        for byte in [0, 2000, PAGE_BYTES - 1] {
            let mut pair = committed(&setup());
            pair.source.machine.ram.borrow_mut()[page as usize][byte] ^= 0x10;
            assert_eq!(audit(&mut pair, &[], &[]), differing(&[page], of, 0));
        }
    }
    // More than can be named are counted.
    let mut pair = committed(&setup());
    pair.source.machine.ram.borrow_mut().iter_mut().for_each(|page| page[0] ^= 1);
    let verdict = audit(&mut pair, &[], &[]);
    assert_eq!((verdict.differing, &verdict.first[..]), (of, &pages[..NAMED_MAX]));
}

#[test]
fn pages_are_left_out_by_both_hosts_or_by_none() {
    let of = allowed().pages().len() as u64;
    let mut pair = committed(&setup());
    pair.source.machine.ram.borrow_mut()[5][0] ^= 1;
    assert_eq!(audit(&mut pair, &[5, 258], &[5, 258]), differing(&[], of, 2));
    for (source, destination) in [(&[5][..], &[][..]), (&[], &[5])] {
        let mut pair = committed(&setup());
        let left_out = destination.len() as u64;
        assert_eq!(audit(&mut pair, source, destination), differing(&[5], of, left_out));
    }
}

#[test]
fn pages_that_never_crossed_sealed_take_no_part() {
    let mut pair = Pair::new(&setup());
    let pages = allowed().pages();
    for batch in pages[1..].chunks(64) {
        let group = pair.source.export(0, 1, batch).unwrap();
        pair.destination.import(0, 1, &group).unwrap();
    }
    pair.end_epoch();
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(1).unwrap();
    pair.destination.control(Op::State, &STATE).unwrap();
    pair.destination.control(Op::StartToken, &start).unwrap();
    let read = pair.source.machine.pages_read.borrow().len();
    assert_eq!(audit(&mut pair, &[], &[]), differing(&[], pages.len() as u64 - 1, 0));
    let read = pair.source.machine.pages_read.borrow()[read..].to_vec();
    assert_eq!(read, pages[1..], "each once, and no other");
}

#[test]
fn no_verdict_without_every_page() {
    for missing in 0..CHUNKS.len() {
        let mut pair = committed(&setup());
        let chunks: Vec<u64> = CHUNKS.iter().copied().filter(|c| *c != missing as u64).collect();
        let group = pair.source.digest(&chunks, &[]).unwrap();
        pair.destination.compare(&group, &[]).unwrap();
        assert_eq!(pair.destination.verdict(), Err(Status::Incomplete));
        assert_eq!(pair.destination.verdict(), Err(Status::WrongState), "and none later");
    }
    // A chunk is digested once: the second look could be at other content.
    let mut pair = committed(&setup());
    for (chunks, legal) in
        [(&[1][..], true), (&[1], false), (&[0], false), (&[2, 2], false), (&[3], false), (&[2], true)]
    {
        assert_eq!(pair.source.digest(chunks, &[]).is_ok(), legal, "{chunks:?}");
    }
}

#[test]
fn digests_that_are_forged_replayed_cut_or_out_of_order_are_refused() {
    let make = || {
        let mut pair = committed(&setup());
        let groups = [&CHUNKS[..1], &CHUNKS[1..]].map(|chunks| pair.source.digest(chunks, &[]).unwrap());
        (pair, groups)
    };
    let (_, [first, second]) = make();
    let mut bad: Vec<(String, Record)> = vec![
        ("nothing".into(), Vec::new()),
        ("cut off".into(), first[..first.len() - 1].to_vec()),
        ("padded".into(), [&first[..], &[0]].concat()),
        ("the second before the first".into(), second.clone()),
        ("another chunk".into(), with_list(&first, &[Listed { page: 1, zero: false }])),
        ("of another kind".into(), with_header(&first, |h| h.kind = Kind::Pages)),
        ("of another stream".into(), with_header(&first, |h| h.stream = 0)),
        ("of another epoch".into(), with_header(&first, |h| h.epoch += 1)),
        ("of another place".into(), with_header(&first, |h| h.sequence += 1)),
    ];
    let mut rng = Rng(3);
    let bits = [0, 8, 60, 200, HEADER_BYTES * 8 + 1, front_bytes(1) * 8, first.len() * 8 - 1];
    for bit in bits.into_iter().chain((0..40).map(|_| rng.below(first.len() * 8))) {
        bad.push((format!("bit {bit}"), flipped(&first, bit)));
    }
    for (what, record) in bad {
        // The same in every bit: what the first one sealed opens there.
        let (mut pair, [good, _]) = make();
        assert!(good == first);
        let count = record.get(6..8).map_or(1, |b| u16::from_le_bytes(b.try_into().unwrap()));
        let status = pair.destination.compare_raw(count.into(), &record).unwrap_err();
        let sane = (1..=CHUNKS_MAX).contains(&usize::from(count));
        assert!(matches!(status, Status::Unsealed) || (!sane && status == Status::BadRequest), "{what}");
        if sane {
            assert_eq!(pair.destination.compare(&first, &[]), Err(Status::WrongState), "it is over: {what}");
            assert_eq!(pair.destination.verdict(), Err(Status::WrongState), "{what}");
        }
    }
    let (mut pair, _) = make();
    pair.destination.compare(&first, &[]).unwrap();
    assert_eq!(pair.destination.compare(&first, &[]), Err(Status::Unsealed), "twice");

    // Nor those of another session of the same helpers, transcript and secret.
    let mut other = committed(&Setup { seeds: (1, 99), ..setup() });
    assert_eq!(other.destination.compare(&first, &[]), Err(Status::Unsealed));
}

#[test]
fn digests_have_a_key_and_a_stream_of_their_own() {
    let mut pair = committed(&setup());
    let group = pair.source.digest(&CHUNKS, &[]).unwrap();
    assert_eq!(header_of(&group).stream, AUDIT_STREAM);
    let id = |stream| reader::KeyId { direction: Direction::Forward as u8, stream };
    let secret = |stream| reader::secret(&pair, &SECRET, id(stream));
    let bodies = reader::open(&secret(AUDIT_STREAM), &group).expect("the documented schedule opens it");
    for stream in [0, 1, mirrorvm_abi::record::CONTROL_STREAM] {
        assert!(reader::open(&secret(stream), &group).is_none(), "stream {stream}");
    }
    let digest = reader::audit_digester(&pair, &SECRET);
    let ram = pair.source.machine.ram.borrow();
    for (chunk, body) in CHUNKS.iter().zip(&bodies) {
        for (page, found) in (chunk * CHUNK_PAGES..).zip(body.chunks(DIGEST_BYTES)) {
            let there = allowed().pages().contains(&page);
            let words = if there { digest.digest(&ram[page as usize]) } else { [0; 2] };
            assert_eq!(found, words.map(u64::to_le_bytes).concat(), "page {page}");
        }
    }
    // Neither key nor digest is in the clear anywhere in the mailbox.
    let key = reader::audit_key(&pair, &SECRET);
    let secrets: HashSet<[u8; WINDOW]> = windows(&key)
        .chain(bodies.iter().flat_map(|b| b.as_chunks().0.iter().copied().filter(|d| *d != [0; WINDOW])))
        .collect();
    for side in [&pair.source, &pair.destination] {
        for written in side.machine.published.borrow().iter() {
            assert!(written.windows(WINDOW).all(|w| !secrets.contains(w)), "shown to the host");
        }
    }
}

#[test]
fn an_audit_has_its_time_and_what_was_not_agreed_on_is_not_done() {
    let all = |side: &mut Side| {
        [
            side.digest(&[0], &[]).unwrap_err(),
            side.compare_raw(1, &[0; 5000]).unwrap_err(),
            side.verdict().unwrap_err(),
        ]
    };
    const WRONG: [Status; 3] = [Status::WrongState; 3];
    let mut pair = Pair::new(&setup());
    assert_eq!((all(&mut pair.source), all(&mut pair.destination)), (WRONG, WRONG), "before START");
    let mut pair = committed(&Setup { audit: false, ..setup() });
    assert_eq!((all(&mut pair.source), all(&mut pair.destination)), (WRONG, WRONG), "not agreed on");

    // A guest that stays has no audit any more.
    let mut pair = handed_over(&setup());
    let abort = pair.destination.token(Op::Abort, &[]);
    pair.source.control(Op::AbortToken, &abort).unwrap();
    assert_eq!((all(&mut pair.source), all(&mut pair.destination)), (WRONG, WRONG), "given up");

    // A destination without room refuses it, before there is a session.
    let mut pair = Pair::new(&setup());
    let mut bare = Side::new(2, &allowed(), 2);
    bare.hello();
    let begin = Begin { source: false, peer: pair.greetings.0, ..pair.begin };
    assert_eq!(bare.control(Op::Begin, &begin.encode()), Err(Status::BadRequest));

    // What one end has agreed on and the other not is found at the first record of it.
    pair.source.control(Op::Cancel, &[]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/protocol.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_bytes_are_compared_without_a_panic(
        count in 0u32..40,
        bytes in prop::collection::vec(any::<u8>(), 0..9000),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        hostile: u64,
    ) {
        let mut pair = committed(&setup());
        let mut group = pair.source.digest(&CHUNKS, &[]).unwrap();
        for (at, byte) in edits {
            let at = at.index(group.len());
            group[at] ^= byte;
        }
        *pair.destination.machine.hostile.borrow_mut() = Some(Rng(hostile));
        let (tampered, anything) = (
            pair.destination.compare_raw(3, &group),
            pair.destination.compare_raw(count, &bytes),
        );
        prop_assert!(anything.is_err());
        *pair.destination.machine.hostile.borrow_mut() = None;
        // However it went, nobody is told that all is well who did not have it compared.
        if tampered.is_err() {
            prop_assert!(pair.destination.verdict().is_err());
        }
    }
}
