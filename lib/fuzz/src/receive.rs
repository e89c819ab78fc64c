//! A destination's helper, fed by a host that does what it likes with what the source really sent.
//!
//! Only the genuine sequence, byte for byte and in its order, is taken. A page is written only with what the
//! next genuine group has for it; all other RAM stays as it was. Anything else ends the session, of which
//! nothing comes but ABORT then; COMMIT comes after everything and once, and never beside ABORT.

use std::cell::RefCell;

use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::mailbox::PAYLOAD_BYTES;
use mirrorvm_abi::op::{Op, Status};
use mirrorvm_abi::record::{Front, TOKEN_BYTES};

use crate::support::{Allowed, Copied, Page, Pair, Rng, STATE, Setup, Side};
use crate::{Bytes, Seed};

/// What the source sent.
enum Sent {
    /// A group of an epoch, and its pages as they were.
    Group(u32, Vec<u8>, Vec<(u64, Page)>),
    /// An epoch's token.
    Epoch(Vec<u8>),
    /// The START token.
    Start(Vec<u8>),
}

impl Sent {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Group(_, bytes, _) | Self::Epoch(bytes) | Self::Start(bytes) => bytes,
        }
    }
}

struct Stage {
    destination: Side,
    then: Box<Copied>,
    sent: Vec<Sent>,
}

/// Memory of the machine that is not the guest's lies between these and behind.
fn allowed() -> Allowed {
    Allowed(vec![0..3, 6..8])
}

impl Stage {
    fn new() -> Self {
        let setup = Setup { allowed: allowed(), elide_zero: true, ..Setup::default() };
        let mut pair = Pair::new(&setup);
        pair.source.machine.ram.borrow_mut()[1] = [0; PAGE_BYTES];
        let mut sent = Vec::new();
        let group = |pair: &mut Pair, epoch, pages: &[u64]| {
            let bytes = pair.source.export(0, epoch, pages).unwrap();
            let ram = pair.source.machine.ram.borrow();
            Sent::Group(epoch, bytes, pages.iter().map(|p| (*p, ram[*p as usize])).collect())
        };
        sent.push(group(&mut pair, 1, &[0, 1]));
        sent.push(group(&mut pair, 1, &[7]));
        sent.push(Sent::Epoch(pair.source.token(Op::EndEpoch, &[])));
        pair.source.machine.ram.borrow_mut()[0] = Rng(99).page();
        sent.push(group(&mut pair, 2, &[0, 2, 6]));
        pair.source.control(Op::Pause, &[]).unwrap();
        sent.push(Sent::Start(pair.source.start(0).unwrap()));
        let mut destination = pair.destination;
        let then = Box::new(destination.copy());
        Self { destination, then, sent }
    }
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

/// Where a destination is, by what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// So many of what was sent have been taken.
    Receiving(usize),
    /// All but START, and the state.
    State(usize),
    /// START agreed.
    Agreed,
    Committed,
    Dead,
    Aborted,
}

/// Acts, each with what it needs.
pub fn run(data: &[u8]) {
    STAGE.with_borrow_mut(|stage| {
        let Stage { destination, then, sent } = stage;
        destination.put_back(then);
        destination.machine.ram.borrow_mut().iter_mut().for_each(|page| *page = [0x11; PAGE_BYTES]);
        let mut model = destination.machine.ram.borrow().clone();
        let (mut bytes, mut at) = (Bytes(data), At::Receiving(0));
        while !bytes.is_empty() {
            let machine = &destination.machine;
            machine.pages_written.borrow_mut().clear();
            machine.fetched.borrow_mut().clear();
            machine.published.borrow_mut().clear();
            at = act(destination, sent, at, &mut bytes);
            let written = destination.machine.pages_written.take();
            for (page, content) in written {
                model[page as usize] = content;
            }
            assert!(model == *destination.machine.ram.borrow(), "RAM changed without being written");
        }
    });
}

/// One of what was sent, changed or not.
fn forged(sent: &[Sent], bytes: &mut Bytes<'_>) -> (usize, Vec<u8>) {
    let which = usize::from(bytes.u8()) % sent.len();
    let mut record = sent[which].bytes().to_vec();
    for _ in 0..bytes.u8() % 4 {
        let (place, change) = (bytes.u16(), bytes.u8());
        // Most of a record is ciphertext: half of the changes go to what comes before.
        let place = if place & 1 == 0 { usize::from(place / 2) % 80 } else { usize::from(place) };
        let place = place % record.len();
        record[place] ^= change;
    }
    match bytes.u8() {
        0xff => record.push(0),
        cut @ 0xf0..0xff => record.truncate(record.len().saturating_sub(usize::from(cut - 0xef))),
        _ => {}
    }
    (which, record)
}

fn act(side: &mut Side, sent: &[Sent], at: At, bytes: &mut Bytes<'_>) -> At {
    let next = match at {
        At::Receiving(n) | At::State(n) => sent.get(n),
        At::Agreed | At::Committed | At::Dead | At::Aborted => None,
    };
    let genuine = |record: &[u8]| next.is_some_and(|sent| sent.bytes() == record);
    match bytes.u8() % 7 {
        0 | 1 => {
            let (_, record) = forged(sent, bytes);
            let epoch = u32::from(bytes.u8());
            let receiving = matches!(at, At::Receiving(_));
            if record.len() > PAYLOAD_BYTES {
                return at;
            }
            let count = record.get(6..8).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
            let imported = side.import_raw(0, epoch, count.into(), &record);
            let pages = match next {
                Some(Sent::Group(of, _, pages)) if receiving && *of == epoch => &pages[..],
                _ => &[],
            };
            let ours = genuine(&record) && !pages.is_empty();
            only(side, pages);
            let status = Status::from_u32(imported.status).unwrap();
            assert_eq!(status == Status::Ok, ours, "{status:?} of a record that is genuine: {ours}");
            match (at, ours) {
                (At::Receiving(n), true) => At::Receiving(n + 1),
                // Refused before it is looked at: nothing was to be had of it.
                (At::Receiving(_), false) if status == Status::BadRequest => at,
                (At::Receiving(_), false) => At::Dead,
                (at, _) => {
                    assert!(
                        [Status::WrongState, Status::BadRequest].contains(&status),
                        "{status:?} at {at:?}"
                    );
                    at
                }
            }
        }
        2 => {
            let (_, record) = forged(sent, bytes);
            let ours =
                matches!(at, At::Receiving(_)) && matches!(next, Some(Sent::Epoch(_))) && genuine(&record);
            let ended = side.control(Op::EpochToken, &cut(record));
            only(side, &[]);
            assert_eq!(ended.is_ok(), ours, "{ended:?}");
            match at {
                At::Receiving(n) if ours => At::Receiving(n + 1),
                At::Receiving(_) => At::Dead,
                at => at,
            }
        }
        3 => {
            let digest = if bytes.u8() < 200 { STATE } else { bytes.take() };
            let taken = side.control(Op::State, &digest);
            match at {
                At::Receiving(n) => {
                    taken.unwrap();
                    if digest == STATE && matches!(next, Some(Sent::Start(_))) {
                        At::State(n)
                    } else {
                        At::State(usize::MAX)
                    }
                }
                at => {
                    assert_eq!(taken, Err(Status::WrongState));
                    at
                }
            }
        }
        4 => {
            let (_, record) = forged(sent, bytes);
            let ours = matches!(at, At::State(_)) && genuine(&record);
            let agreed = side.control(Op::StartToken, &cut(record));
            only(side, &[]);
            assert_eq!(agreed.is_ok(), ours, "{agreed:?} at {at:?}");
            match at {
                At::State(_) if ours => At::Agreed,
                At::State(_) => At::Dead,
                at => at,
            }
        }
        5 => {
            let committed = side.control(Op::Commit, &[]);
            assert_eq!(committed.is_ok(), at == At::Agreed, "{committed:?} at {at:?}");
            if at == At::Agreed { At::Committed } else { at }
        }
        _ => {
            let aborted = side.control(Op::Abort, &[]);
            // Again and again, but never after COMMIT.
            assert_eq!(aborted.is_ok(), at != At::Committed, "{aborted:?} at {at:?}");
            if at == At::Committed { at } else { At::Aborted }
        }
    }
}

fn cut(mut record: Vec<u8>) -> Vec<u8> {
    // Tokens have one length; what is longer would not be let in by the host.
    record.truncate(TOKEN_BYTES + 1);
    record
}

/// Nothing was written but some of these.
fn only(side: &Side, pages: &[(u64, Page)]) {
    let written = side.machine.pages_written.borrow();
    let stranger = written.iter().find(|page| !pages.contains(page)).map(|(page, _)| *page);
    assert_eq!(stranger, None, "a page was written that nobody sent");
}

/// The course as it should be, and with one thing wrong at each step of it.
pub fn seeds() -> Vec<Seed> {
    let stage = Stage::new();
    let step = |n: usize, edits: &[u8], cut: u8| {
        let act = match stage.sent[n] {
            Sent::Group(..) => 0,
            Sent::Epoch(_) => 2,
            Sent::Start(_) => 4,
        };
        let mut bytes = vec![act, n as u8, (edits.len() / 3) as u8];
        bytes.extend_from_slice(edits);
        bytes.push(cut);
        if let Sent::Group(epoch, ..) = stage.sent[n] {
            bytes.push(epoch as u8);
        }
        bytes
    };
    let course = |upto: usize| {
        (0..upto)
            .flat_map(|n| {
                let state = if matches!(stage.sent[n], Sent::Start(_)) { vec![3, 0] } else { vec![] };
                [state, step(n, &[], 0)].concat()
            })
            .collect::<Vec<u8>>()
    };
    let all = stage.sent.len();
    assert!(stage.sent.iter().all(|s| matches!(s, Sent::Group(..)) == Front::read(s.bytes()).is_some()));
    let mut seeds: Vec<Seed> = vec![
        ("committed".into(), [course(all), vec![5, 5, 6]].concat()),
        ("aborted-at-the-end".into(), [course(all), vec![6, 5, 6]].concat()),
        ("aborted-at-once".into(), vec![6, 6, 5]),
        ("state-too-early".into(), vec![3, 0, 5, 6]),
        (
            "another-state".into(),
            [course(all - 1), vec![3, 255], vec![9; 32], step(all - 1, &[], 0)].concat(),
        ),
    ];
    for n in 0..all {
        let before = course(n);
        let with =
            |name: &str, then: Vec<u8>| (format!("{name}-{n}"), [before.clone(), then, vec![5, 6]].concat());
        seeds.push(with("flipped", step(n, &[4, 0, 1], 0)));
        // Behind the list: of ciphertext, or of what a token says.
        seeds.push(with("flipped-inside", step(n, &[121, 0, 1], 0)));
        seeds.push(with("two-flipped", step(n, &[100, 0, 128, 201, 1, 7], 0)));
        seeds.push(with("cut", step(n, &[], 0xf0)));
        seeds.push(with("padded", step(n, &[], 0xff)));
        seeds.push(with("skipped", step((n + 1) % all, &[], 0)));
        seeds.push(with("repeated", [step(n, &[], 0), step(n, &[], 0)].concat()));
    }
    seeds
}
