//! How a session begins and ends: policies, START, COMMIT and ABORT.

use super::*;

#[test]
fn begin_is_refused_unless_everything_is_right() {
    let setup = Setup { workers: 2, ..Setup::default() };
    let good = Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: false,
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 2,
        session: [1; 16],
        peer: Greeting { nonce: [2; 32], public_key: [2; 32] },
        transcript: [3; 32],
    };
    let new = || Side::new(setup.workers, &setup.allowed, 5);
    let mut side = new();
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "without Hello");
    // Each refusal spends what was drawn, and opens nothing.
    let refused = |side: &mut Side, raw: &[u8], why: Status, what: &str| {
        side.hello();
        assert_eq!(side.control(Op::Begin, raw), Err(why), "{what}");
        let again = side.control(Op::Begin, &good.encode());
        assert_eq!(again, Err(Status::WrongState), "the key of what was refused: {what}");
        assert_eq!(side.export(0, 1, &[0]), Err((Status::WrongState, 0)), "{what}");
    };
    for streams in [0, 3, 16, 17, 0x100, u16::MAX] {
        let bad = Begin { streams, ..good };
        refused(&mut side, &bad.encode(), Status::BadRequest, &format!("{streams} streams"));
    }
    for (byte, bits) in [(2, 0x20), (2, 0x80), (3, 2), (3, 0x80), (4, 1), (5, 1), (6, 1), (7, 0x80)] {
        let mut raw = good.encode();
        raw[byte] |= bits;
        refused(&mut side, &raw, Status::BadRequest, &format!("reserved bits of byte {byte}"));
    }
    for len in [0, 1, BEGIN_BYTES - 1, BEGIN_BYTES + 1, PAYLOAD_BYTES] {
        let mut raw = good.encode().to_vec();
        raw.resize(len, 0);
        refused(&mut side, &raw, Status::BadRequest, &format!("{len} bytes"));
    }
    side.hello();
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
    assert_eq!(side.control(Op::Begin, &good.encode()), Err(Status::WrongState), "the key is spent");
    side.hello();
    side.control(Op::Begin, &good.encode()).unwrap();

    let mut side = new();
    side.machine.entropy.set(false);
    assert_eq!(side.control(Op::Hello, &[]), Err(Status::NoEntropy));
    let drawn = side.machine.drawn.borrow()[..32].to_vec();
    let told = |w: &Vec<u8>| windows(&drawn).any(|d| windows(w).any(|w| w == d));
    assert!(!side.machine.published.borrow().iter().any(told), "no nonce without entropy");
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
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 1,
        session: [1; 16],
        peer: Greeting { nonce: [2; 32], public_key: [2; 32] },
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
    for source in [false, true] {
        let other = pair.destination.hello();
        let begin = Begin { source, fresh: false, session: [9; 16], peer: other, ..pair.begin };
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
    let import = pair.destination.import_raw(0, 1, 1, &[7; 100]);
    assert_eq!(Status::from_u32(import.status), Some(Status::WrongState));
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
        forgeries.push(reseal(&key, Kind::Abort));
    }
    for (i, forged) in forgeries.iter().enumerate() {
        assert_eq!(pair.source.control(Op::AbortToken, forged), Err(Status::Unsealed), "forgery {i}");
        assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState), "forgery {i}");
        assert_eq!(pair.source.control(Op::Pause, &[]), Err(Status::WrongState), "forgery {i}");
        assert_eq!(pair.source.export(0, 1, &[0]), Err((Status::WrongState, 0)), "forgery {i}");
    }
    // The forward key does not make backward tokens; the backward key does, so the forging itself is right.
    let id = |direction| reader::KeyId { direction: direction as u8, stream: 0xffff };
    let forward = reader::secret(&pair, &SECRET, id(Direction::Forward));
    assert_eq!(pair.source.control(Op::AbortToken, &reseal(&forward, Kind::Abort)), Err(Status::Unsealed));
    let backward = reader::secret(&pair, &SECRET, id(Direction::Backward));
    assert_eq!(pair.source.control(Op::AbortToken, &reseal(&backward, Kind::Commit)), Err(Status::Unsealed));
    pair.source.control(Op::AbortToken, &reseal(&backward, Kind::Abort)).unwrap();
}

/// A token of `kind` as whoever has this stream's secret would make it.
fn reseal(secret: &[u8; 32], kind: Kind) -> Vec<u8> {
    let (suite, random) = (Suite::Aes256Gcm, [7; 24]);
    let header = Header { kind, suite, stream: 0xffff, count: 1, epoch: 2, sequence: 0, random };
    reader::seal_token(secret, &header, &Token::default().encode())
}
