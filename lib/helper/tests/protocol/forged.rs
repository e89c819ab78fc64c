//! Records and tokens that were changed, left out, repeated or made by somebody else.

use super::*;

/// Imports into a twin of the destination, wants it refused with nothing written that is not genuine and the
/// session dead.
fn refused_by_twin(pair: &Pair, setup: &Setup, before: &[Record], bad: &[u8], what: &str) -> (Status, u32) {
    let count = bad.get(6..8).map_or(1, |b| u16::from_le_bytes(b.try_into().unwrap()));
    refused_count(pair, setup, before, (bad, count.into()), what)
}

/// The same with the number of pages that the host declares.
fn refused_count(
    pair: &Pair,
    setup: &Setup,
    before: &[Record],
    (bad, count): (&[u8], u32),
    what: &str,
) -> (Status, u32) {
    let mut twin = pair.twin(setup);
    before.iter().for_each(|group| twin.import(0, 1, group).unwrap());
    let written = twin.machine.pages_written.borrow().len();
    let c = twin.import_raw(0, 1, count, bad);
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
    for suite in Suite::ALL {
        for elide_zero in [false, true] {
            let setup = Setup { elide_zero, suite, ..Setup::default() };
            let mut pair = Pair::new(&setup);
            pair.source.machine.ram.borrow_mut()[3] = [0; PAGE_BYTES];
            let group = pair.source.export(0, 1, &[3]).unwrap();
            assert_eq!(listed(&group)[0].zero, elide_zero);
            pair.twin(&setup).import(0, 1, &group).expect("the group itself is good");
            let body = front_bytes(1)..group.len() - TAG_BYTES;
            // Every bit of header, list and tag, every byte of the body.
            let bits = (0..group.len() * 8).filter(|b| !body.contains(&(b / 8)) || b % 8 == b / 8 % 8);
            let mut tried = 0;
            for bit in bits {
                let bad = flipped(&group, bit);
                let answer = refused_count(&pair, &setup, &[], (&bad, 1), &format!("bit {bit}"));
                assert_eq!(answer, (Status::Unsealed, 0), "bit {bit} of byte {}", bit / 8);
                tried += 1;
            }
            assert_eq!(tried, (front_bytes(1) + TAG_BYTES) * 8 + body.len());
        }
    }
}

#[test]
fn a_flipped_bit_stops_a_group_at_its_piece() {
    let setup = Setup { elide_zero: true, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    pair.source.machine.ram.borrow_mut()[2] = [0; PAGE_BYTES];
    let group = pair.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    for index in 0..4 {
        let place = piece(&group, index);
        let word = HEADER_BYTES + index * LISTED_BYTES;
        for byte in [place.start, place.end - TAG_BYTES, place.end - 1, word, word + 4] {
            let answer = refused_by_twin(&pair, &setup, &[], &flipped(&group, byte * 8), "one bit");
            assert_eq!(answer, (Status::Unsealed, index as u32), "byte {byte}, piece {index}");
        }
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
    let one = pair.source.export(0, 1, &[0, 1, 2]).unwrap();
    let two = pair.source.export(0, 1, &[3, 4]).unwrap();
    let other_stream = pair.source.export(1, 1, &[5, 6]).unwrap();
    let before = std::slice::from_ref(&one);
    let refuse = |before: &[Record], bad: &[u8], what: &str| {
        let answer = refused_by_twin(&pair, &setup, before, bad, what);
        assert_eq!(answer.0, Status::Unsealed, "{what}");
        answer.1
    };
    assert_eq!(refuse(before, &one, "replay"), 0);
    assert_eq!(refuse(&[], &two, "the second one first"), 0);
    assert_eq!(refuse(&[one.clone(), two.clone()], &one, "an old one"), 0);
    assert_eq!(refuse(&[], &other_stream, "another stream"), 0);
    assert_eq!(refuse(before, &one[..front_bytes(3)], "an end before the first piece"), 0);
    pair.twin(&setup).import(0, 1, &one).expect("the group itself is good");

    // The header: whatever is another in it, it is another group.
    let change = |f: &dyn Fn(&mut Header)| with_header(&two, |h| f(h));
    let relabelled = [
        ("stream", with_header(&other_stream, |h| h.stream = 0)),
        ("sequence", change(&|h| h.sequence = 0)),
        ("epoch", change(&|h| h.epoch = 2)),
        ("suite", change(&|h| h.suite = Suite::Aes256GcmSiv)),
        ("random bytes", change(&|h| h.random = header_of(&one).random)),
        ("random bytes of none", change(&|h| h.random = [0; 24])),
    ];
    for (what, bad) in &relabelled {
        assert_eq!(refuse(&[], bad, what), 0);
        assert_eq!(refuse(before, bad, what), 0);
    }
    for kind in [Kind::Epoch, Kind::Start, Kind::Commit, Kind::Abort] {
        assert_eq!(refuse(&[], &with_header(&one, |h| h.kind = kind), "pages as a token"), 0);
    }

    // The list: a page under another number, as a zero page, in another place.
    for page in [1, 7, 8, (1 << 56) - 1] {
        let mut list = listed(&one);
        list[0].page = page;
        assert_eq!(refuse(&[], &with_list(&one, &list), "relabelled page"), 0);
        let mut list = listed(&one);
        list[2].page = page;
        assert_eq!(refuse(&[], &with_list(&one, &list), "relabelled last page"), 2);
    }
    let mut list = listed(&one);
    list[1].zero = true;
    assert_eq!(refuse(&[], &with_list(&one, &list), "a zero page with a body"), 0);
    let cut = piece(&one, 1);
    let without = [&one[..cut.start], &one[cut.end - TAG_BYTES..]].concat();
    assert_eq!(refuse(&[], &with_list(&without, &list), "a page as a zero page"), 1);
    let mut swapped = listed(&one);
    swapped.swap(0, 1);
    assert_eq!(refuse(&[], &with_list(&one, &swapped), "two words changed places"), 0);

    // The pieces: moved with and without their words, dropped, repeated, of another group.
    let bytes = |i| one[piece(&one, i)].to_vec();
    let of = |list: &[Listed], pieces: &[Record]| {
        let front = with_list(&one, list);
        [&front[..front_bytes(list.len())], &pieces.concat()].concat()
    };
    let whole = listed(&one);
    assert_eq!(of(&whole, &[bytes(0), bytes(1), bytes(2)]), one);
    assert_eq!(refuse(&[], &of(&whole, &[bytes(0), bytes(2), bytes(1)]), "pieces changed places"), 1);
    assert_eq!(refuse(&[], &of(&swapped, &[bytes(1), bytes(0), bytes(2)]), "moved with their words"), 0);
    assert_eq!(refuse(&[], &of(&whole, &[bytes(0), bytes(0), bytes(2)]), "a piece twice"), 1);
    let mut twice = whole.clone();
    twice[1] = whole[0];
    assert_eq!(refuse(&[], &of(&twice, &[bytes(0), bytes(0), bytes(2)]), "twice with its word"), 1);
    let foreign = two[piece(&two, 1)].to_vec();
    assert_eq!(refuse(&[], &of(&whole, &[bytes(0), foreign.clone(), bytes(2)]), "of another group"), 1);
    let mut theirs = whole.clone();
    theirs[1] = listed(&two)[1];
    assert_eq!(refuse(&[], &of(&theirs, &[bytes(0), foreign, bytes(2)]), "with its word"), 1);
    for pieces in 1..3 {
        let cut = of(&whole[..pieces], &(0..pieces).map(bytes).collect::<Vec<_>>());
        let counted = with_header(&cut, |h| h.count = pieces as u16);
        assert_eq!(refuse(&[], &counted, "a group that was cut off, and says so"), 0);
        assert_eq!(refuse(&[], &cut, "a group that was cut off"), 0);
    }
    let more = of(
        &[&whole[..], &[Listed { page: 7, zero: false }]].concat(),
        &[one[front_bytes(3)..].into(), bytes(0)],
    );
    assert_eq!(refuse(&[], &with_header(&more, |h| h.count = 4), "a piece more"), 0);

    // Truncated or padded anywhere: the declared length, the list and the header agree to the byte.
    for len in
        [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 9, one.len() - 1, one.len() + 1, one.len() * 2]
    {
        let mut payload = one.clone();
        payload.resize(len, 0);
        assert_eq!(
            refused_count(&pair, &setup, &[], (&payload, 3), "length"),
            (Status::Unsealed, 0),
            "{len}"
        );
    }
    for count in [0, 1, 2, 4, BATCH_MAX as u32] {
        assert_eq!(
            refused_count(&pair, &setup, &[], (&one, count), "count"),
            (Status::Unsealed, 0),
            "{count}"
        );
    }
    // Bytes behind the declared length are not looked at.
    let mut twin = pair.twin(&setup);
    twin.machine.mailboxes[0].borrow_mut()[slot_at(0) + 4096..][..one.len()].copy_from_slice(&one);
    let len = one.len() as u32 - 1;
    let request = Submission { op: Op::Import as u32, count: 3, len, epoch: 1, ..Default::default() };
    let c = twin.call(0, request, &[]);
    assert_eq!((Status::from_u32(c.status), c.count), (Some(Status::Unsealed), 0));
    assert!(twin.machine.pages_written.borrow().is_empty());
}

#[test]
fn a_dropped_record_is_found_at_the_epoch_token() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let a = [pair.source.export(0, 1, &[0, 1]).unwrap(), pair.source.export(0, 1, &[2]).unwrap()];
    let b = [pair.source.export(1, 1, &[3]).unwrap(), pair.source.export(1, 1, &[4]).unwrap()];
    let token = pair.source.token(Op::EndEpoch, &[]);
    type Sent<'a> = (&'a [Record], &'a [Record]);
    let cases: [Sent<'_>; 5] = [(&a[..1], &b), (&a, &b[..1]), (&a, &[]), (&[], &b), (&[], &[])];
    let arrive = |twin: &mut Side, (first, second): Sent<'_>| {
        first.iter().for_each(|group| twin.import(0, 1, group).unwrap());
        second.iter().for_each(|group| twin.import(1, 1, group).unwrap());
    };
    for (i, sent) in cases.into_iter().enumerate() {
        let mut twin = pair.twin(&setup);
        arrive(&mut twin, sent);
        assert_eq!(twin.control(Op::EpochToken, &token), Err(Status::Incomplete), "case {i}");
        twin.assert_dead_destination();
    }
    // And at START, when the last epoch has no token of its own.
    let mut twin = pair.twin(&setup);
    arrive(&mut twin, (&a, &b));
    twin.control(Op::EpochToken, &token).unwrap();
    let last = pair.source.export(0, 2, &[5, 6, 7]).unwrap();
    pair.source.export(0, 2, &[0]).unwrap();
    pair.source.control(Op::Pause, &[]).unwrap();
    let start = pair.source.start(0).unwrap();
    twin.import(0, 2, &last).unwrap();
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
    let id = reader::KeyId { direction: Direction::Forward as u8, stream: 0 };
    let secret = reader::secret(&pair, &SECRET, id);
    let seal = |sequence, pages: &[(u64, u8)]| {
        let (kind, suite, count) = (Kind::Pages, Suite::Aes256Gcm, pages.len() as u16);
        let header =
            Header { kind, suite, stream: 0, count, epoch: 1, sequence, random: [sequence as u8; 24] };
        let bodies: Vec<_> = pages.iter().map(|(_, content)| [*content; PAGE_BYTES]).collect();
        let pages = pages.iter().zip(&bodies);
        let pages = pages.map(|((page, _), body)| (Listed { page: *page, zero: false }, &body[..]));
        reader::seal(&secret, &header, &pages.collect::<Vec<_>>())
    };
    let mut twin = pair.twin(&setup);
    twin.import(0, 1, &seal(0, &[(3, 1), (4, 2)])).expect("the forging itself is right");
    assert_eq!(twin.import(0, 1, &seal(1, &[(5, 3), (3, 9)])), Err((Status::PageRepeated, 1)));
    assert_eq!(twin.machine.ram.borrow()[3], [1; PAGE_BYTES], "the page of this epoch stays");
    twin.assert_dead_destination();
    for page in [8, 71, 72, 1 << 40, (1 << 56) - 1] {
        let mut twin = pair.twin(&setup);
        assert_eq!(twin.import(0, 1, &seal(0, &[(page, 1)])), Err((Status::PageRefused, 0)), "page {page}");
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
    assert_eq!(stranger.hello(), pair.greetings.1);
    let begin = Begin { source: false, peer: pair.greetings.0, ..pair.begin };
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
        ("of two pieces", vec![(Op::EpochToken, with_header(&one, |h| h.count = 2))]),
        ("with other random bytes", vec![(Op::EpochToken, with_header(&one, |h| h.random[0] ^= 1))]),
        ("on a page stream", vec![(Op::EpochToken, with_header(&one, |h| h.stream = 0))]),
        ("forged", vec![(Op::EpochToken, vec![0x41; TOKEN_BYTES])]),
        ("empty", vec![(Op::EpochToken, vec![])]),
        ("a group of pages", vec![(Op::EpochToken, first[..TOKEN_BYTES].to_vec())]),
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
