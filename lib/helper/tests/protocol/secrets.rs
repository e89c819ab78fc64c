//! What leaves a helper: no key, no nonce twice, no plaintext; and that an independent reader can read it.

use super::*;

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
            pair.greetings = (pair.source.hello(), pair.destination.hello());
            pair.begin.peer = pair.greetings.1;
            pair.source.control(Op::Begin, &pair.begin.encode()).unwrap();
            let theirs = Begin { source: false, peer: pair.greetings.0, ..pair.begin };
            pair.destination.control(Op::Begin, &theirs.encode()).unwrap();
        }
        run.published.append(&mut pair.source.machine.published.borrow_mut());
    }
    run
}

#[test]
fn no_nonce_meets_a_key_twice() {
    let run = long_run(true);
    // The nonce is the index of a piece, so a key of its own for each group is all there is to it.
    let (mut keys, mut seals) = (HashSet::new(), 0);
    for (secret, record) in &run.sealed {
        assert!(keys.insert(reader::group_key(secret, &head(record))), "{:?}", header_of(record));
        seals += usize::from(header_of(record).count);
    }
    // Nine sessions of three epochs of 48 pages in seven groups and a token; the sessions that were not
    // cancelled have START and two ABORTs.
    assert_eq!(keys.len(), 9 * 3 * (7 + 1) + 6 * 3);
    assert_eq!(seals, 9 * 3 * (48 + 1) + 6 * 3);
    println!("{seals} seals under {} keys", keys.len());
    // What the host sees without keys says the same: no stream of a session goes back.
    let mut last: HashMap<[u8; 32], u64> = HashMap::new();
    for (secret, record) in &run.sealed {
        let sequence = header_of(record).sequence;
        let expected = last.get(secret).map_or(0, |s| s + 1);
        assert_eq!(sequence, expected);
        last.insert(*secret, sequence);
    }
}

#[test]
fn an_independent_reader_opens_what_was_sealed() {
    for suite in Suite::ALL {
        let setup = Setup { workers: 2, elide_zero: true, suite, ..Setup::default() };
        let mut pair = Pair::new(&setup);
        pair.source.machine.ram.borrow_mut()[2] = [0; PAGE_BYTES];
        let pages = [3, 2, 0, 7];
        let group = pair.source.export(1, 1, &pages).unwrap();
        assert_eq!(header_of(&group).suite, suite);
        let id = reader::KeyId { direction: Direction::Forward as u8, stream: 1 };
        let secret = reader::secret(&pair, &SECRET, id);
        let bodies = reader::open(&secret, &group).expect("the documented format");
        for (body, page) in bodies.iter().zip(pages) {
            let expected = pair.source.machine.ram.borrow()[page as usize];
            assert!(*body == expected[..] || (page == 2 && body.is_empty()), "page {page}");
        }
        let backward = reader::KeyId { direction: Direction::Backward as u8, ..id };
        let backward = reader::secret(&pair, &SECRET, backward);
        assert_eq!(reader::open(&backward, &group), None, "the direction is bound");
        let control = reader::secret(&pair, &SECRET, reader::KeyId { stream: 0xffff, ..id });
        let token = pair.source.token(Op::EndEpoch, &[]);
        let body = reader::open_token(&control, &token).unwrap();
        let token = Token::decode(body.first_chunk().unwrap());
        assert_eq!((token.records, token.pages, token.state), (4, 4, [0; 32]));
        assert_ne!(token.exported, [0; 32]);
    }
}

#[test]
fn the_guests_secret_and_all_that_crossed_do_not_give_the_keys() {
    let mut pair = Pair::new(&Setup::default());
    let group = pair.source.export(0, 1, &[3]).unwrap();
    let page = pair.source.machine.ram.borrow()[3];
    let id = reader::KeyId { direction: Direction::Forward as u8, stream: 0 };
    let open = |input: &[u8]| reader::open(&reader::secret_from(&pair, input, id), &group);
    let shared = reader::shared(&pair);
    assert_eq!(open(&[SECRET, shared].concat()), Some(vec![page.to_vec()]), "both give the key");
    // Whoever learns the secret afterwards has it and the greetings; whoever took part in a session of other
    // ends has an agreement, and not the secret.
    let (ours, theirs) = (pair.greetings.0.public_key, pair.greetings.1.public_key);
    let product = |a, b| x25519_dalek::x25519(a, b);
    for input in [
        SECRET.to_vec(),
        [SECRET, [0; 32]].concat(),
        [SECRET, ours].concat(),
        [SECRET, theirs].concat(),
        [SECRET, product(SECRET, ours)].concat(),
        [SECRET, product(SECRET, theirs)].concat(),
        [SECRET, product(ours, theirs)].concat(),
        [SECRET, product(theirs, ours)].concat(),
        shared.to_vec(),
        [[0; 32], shared].concat(),
    ] {
        assert_eq!(open(&input), None, "{input:x?}");
    }
}

#[test]
fn a_helper_that_has_begun_does_not_begin_again_with_the_same_key() {
    let setup = Setup::default();
    let mut pair = Pair::new(&setup);
    pair.source.control(Op::Cancel, &[]).unwrap();
    assert_eq!(pair.source.control(Op::Begin, &pair.begin.encode()), Err(Status::WrongState));
    let next = pair.source.hello();
    assert_ne!(next.public_key, pair.greetings.0.public_key);
    assert_ne!(next.nonce, pair.greetings.0.nonce);
}

#[test]
fn a_peers_key_that_anybody_can_agree_with_is_refused_and_spends_the_greeting() {
    let begin = Pair::new(&Setup::default()).begin;
    for source in [true, false] {
        for first in [0, 1] {
            let mut side = Side::new(1, &Setup::default().allowed, 5);
            side.hello();
            let mut public_key = [0; 32];
            public_key[0] = first;
            let peer = Greeting { public_key, ..begin.peer };
            let bad = Begin { source, peer, ..begin };
            assert_eq!(side.control(Op::Begin, &bad.encode()), Err(Status::KeyRefused));
            assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)), "no session");
            let good = Begin { source, ..begin };
            assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "the key is spent");
            side.hello();
            side.control(Op::Begin, &good.encode()).unwrap();
        }
    }
}

#[test]
fn ends_that_greeted_or_agreed_otherwise_open_nothing() {
    let setup = Setup::default();
    type Change = fn(&mut Begin);
    let changes: [(&str, Change); 6] = [
        ("session", |b| b.session[15] ^= 1),
        ("transcript", |b| b.transcript[0] ^= 1),
        ("nonce", |b| b.peer.nonce[31] ^= 1),
        ("public key", |b| b.peer.public_key[0] ^= 1),
        ("the bit of it that X25519 does not look at", |b| b.peer.public_key[31] ^= 0x80),
        ("role", |b| b.source = true),
    ];
    for (what, change) in changes {
        let mut pair = Pair::new(&setup);
        let record = pair.source.export(0, 1, &[0]).unwrap();
        let token = pair.source.token(Op::EndEpoch, &[]);
        let mut other = Side::new(1, &setup.allowed, setup.seeds.1);
        assert_eq!(other.hello(), pair.greetings.1, "the same helper in every bit");
        let mut begin = Begin { source: false, peer: pair.greetings.0, ..pair.begin };
        change(&mut begin);
        other.control(Op::Begin, &begin.encode()).unwrap();
        if begin.source {
            // Two sources do not open each other's, and their records differ.
            *other.machine.ram.borrow_mut() = pair.source.machine.ram.borrow().clone();
            assert_ne!(other.export(0, 1, &[0]).unwrap(), record, "{what}");
            continue;
        }
        assert_eq!(other.import(0, 1, &record), Err((Status::Unsealed, 0)), "{what}");
        assert!(other.machine.pages_written.borrow().is_empty(), "{what}");
        assert!(other.control(Op::EpochToken, &token).is_err(), "{what}");
    }
}

#[test]
fn neither_keys_nor_plaintext_reach_the_mailbox() {
    for elide_zero in [false, true] {
        let run = long_run(elide_zero);
        let mut canaries: HashSet<[u8; WINDOW]> = run.keys.iter().flat_map(|k| windows(k)).collect();
        // A zero page's window is met in lists by right; every other page is random.
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
    assert_eq!(records.len(), group_bytes(4));
    // And with it, only what is zero to the last byte is a zero page.
    let setup = Setup { elide_zero: true, ..Setup::default() };
    let mut eliding = Pair::new(&setup);
    *eliding.source.machine.ram.borrow_mut() = pair.source.machine.ram.borrow().clone();
    let records = eliding.source.export(0, 1, &[0, 1, 2, 3]).unwrap();
    let zero: Vec<_> = listed(&records).iter().map(|p| p.zero).collect();
    assert_eq!(zero, [true, false, false, false]);
    // A zero page over a page that was not: written, fresh or not.
    for fresh in [false, true] {
        let mut pair = Pair::new(&Setup { fresh, ..setup.clone() });
        let first = pair.source.export(0, 1, &[0]).unwrap();
        pair.destination.import(0, 1, &first).unwrap();
        assert_ne!(pair.destination.machine.ram.borrow()[0], [0; PAGE_BYTES]);
        pair.end_epoch();
        pair.source.machine.ram.borrow_mut()[0] = [0; PAGE_BYTES];
        let zero = pair.source.export(0, 2, &[0]).unwrap();
        assert!(listed(&zero)[0].zero);
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
            len: [0, 32, 72, 120, 160, 4168][rng.below(6)],
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
}
