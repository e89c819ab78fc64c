//! What a host, which the helper does not trust, puts into rings and slots.
//!
//! Whatever it is, the helper answers what it took in order and with a status that is on the list, touches no
//! page of RAM that it may not, reads none for a request that it refuses, writes none unless it opened a
//! genuine group (of which there is none here), and stops only over a cursor that cannot be.

use std::cell::RefCell;

use mirrorvm_abi::config::{Config, FIXED_BYTES, RANGE_BYTES, Range};
use mirrorvm_abi::mailbox::{
    BATCH_MAX, CQ_AT, CQ_HEAD, CQ_TAIL, Completion, ENTRY_BYTES, Fatal, PAYLOAD_AT, PAYLOAD_BYTES,
    RING_ENTRIES, SQ_AT, SQ_TAIL, Submission, entry_at, slot_at,
};
use mirrorvm_abi::op::{Begin, Op, SCAN_BYTES, SCAN_MAX, START_BYTES, Scan, Start, Status};
use mirrorvm_helper::Step;

use crate::support::{Allowed, Copied, Pair, SLOTS, Setup, Side};
use crate::{Bytes, Seed};

/// Pages that the helper here may touch.
fn allowed() -> Allowed {
    Allowed(vec![2..8, 64..70])
}

/// A helper in one of its states, and how to get back there.
struct Stage {
    side: Side,
    /// Tens of KiB: not to be moved about on a stack.
    then: Box<Copied>,
}

impl Stage {
    fn of(mut side: Side) -> Self {
        let then = Box::new(side.copy());
        Self { side, then }
    }
}

thread_local! {
    /// Without a session, and the two ends of one.
    static STAGES: RefCell<Vec<Stage>> = RefCell::new({
        let setup = Setup { allowed: allowed(), scanning: true, ..Setup::default() };
        let Pair { source, destination, .. } = Pair::new(&setup);
        let sides = [Side::new(1, &setup.allowed, 7), source, destination];
        sides.into_iter().map(Stage::of).collect()
    });
}

/// A state, then requests: flags, cursors where the flags say so, an entry, and what lies in its slot.
pub fn run(data: &[u8]) {
    descriptors(data);
    STAGES.with_borrow_mut(|stages| {
        let mut bytes = Bytes(data);
        let stage = &mut stages[usize::from(bytes.u8()) % 3];
        stage.side.put_back(&stage.then);
        forget(&stage.side);
        while !bytes.is_empty() {
            if !request(&mut stage.side, &mut bytes) {
                break;
            }
        }
    });
}

fn forget(side: &Side) {
    let machine = &side.machine;
    machine.fetched.borrow_mut().clear();
    machine.published.borrow_mut().clear();
    machine.drawn.borrow_mut().clear();
    machine.pages_read.borrow_mut().clear();
    machine.pages_written.borrow_mut().clear();
    machine.bells.borrow_mut().clear();
}

fn word(mailbox: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(mailbox[at..at + 4].try_into().unwrap())
}

/// One turn of the worker; false when it has stopped.
fn request(side: &mut Side, bytes: &mut Bytes<'_>) -> bool {
    let flags = bytes.u8();
    let (taken, answered) = {
        let cursors = side.workers[0].as_ref().unwrap().cursors();
        (cursors.taken, cursors.answered)
    };
    let tail = if flags & 1 != 0 { bytes.u32() } else { taken.wrapping_add(1) };
    let head = if flags & 2 != 0 { bytes.u32() } else { answered };
    let id = bytes.u64();
    let (op, slot) = (u32::from(bytes.u8()), u32::from(bytes.u8()));
    let (count, len) = (u32::from(bytes.u16()), bytes.u32());
    let epoch = u32::from(bytes.u8());
    let mut entry = Submission { id, op, slot, count, len, epoch }.encode();
    if flags & 4 != 0 {
        entry = bytes.take();
    }
    let request = Submission::decode(&entry);
    let payload = usize::from(bytes.u16()) % 2048;
    let payload = bytes.up_to(payload);
    {
        let mut mailbox = side.machine.mailboxes[0].borrow_mut();
        mailbox[SQ_TAIL..SQ_TAIL + 4].copy_from_slice(&tail.to_le_bytes());
        mailbox[CQ_HEAD..CQ_HEAD + 4].copy_from_slice(&head.to_le_bytes());
        let at = entry_at(SQ_AT, taken);
        mailbox[at..at + ENTRY_BYTES].copy_from_slice(&entry);
        if request.slot < SLOTS {
            // Numbers of pages lie before the payload.
            let at = slot_at(request.slot) + if flags & 8 != 0 { PAYLOAD_AT } else { 0 };
            mailbox[at..at + payload.len()].copy_from_slice(payload);
        }
    }
    forget(side);
    let step = side.workers[0].as_mut().unwrap().step();
    let machine = &side.machine;
    assert!(machine.pages_written.borrow().is_empty(), "{request:?} wrote RAM");
    let mine = allowed();
    let stranger =
        machine.pages_read.borrow().iter().copied().find(|p| !mine.0.iter().any(|r| r.contains(p)));
    assert_eq!(stranger, None, "{request:?} read a page that is not on the list");
    let waiting = tail.wrapping_sub(taken);
    match step {
        Step::Idle => assert_eq!(waiting, 0),
        Step::Fatal(why) => {
            let impossible = waiting > RING_ENTRIES || answered.wrapping_sub(head) >= RING_ENTRIES;
            assert!(why == Fatal::BadCursor && impossible, "{why:?} {request:?}");
            return false;
        }
        Step::Worked => {
            assert!((1..=RING_ENTRIES).contains(&waiting));
            let mailbox = machine.mailboxes[0].borrow();
            let at = entry_at(CQ_AT, answered);
            let answer = Completion::decode(mailbox[at..at + ENTRY_BYTES].try_into().unwrap());
            assert_eq!(word(&mailbox, CQ_TAIL), answered.wrapping_add(1));
            judge(&request, &answer, machine.pages_read.borrow().len());
        }
    }
    true
}

fn judge(request: &Submission, answer: &Completion, read: usize) {
    let status = Status::from_u32(answer.status).expect("a status that is on the list");
    assert_eq!(answer.id, request.id);
    assert!(answer.len as usize <= PAYLOAD_BYTES && answer.zero <= answer.count);
    let known = Op::from_u32(request.op);
    let inside =
        request.slot < SLOTS && request.count as usize <= BATCH_MAX && request.len as usize <= PAYLOAD_BYTES;
    match (status, known) {
        (Status::Ok, Some(op)) => {
            assert!(inside, "{request:?}");
            assert_ne!(op, Op::Import, "nothing genuine was there to be opened");
            assert!(
                answer.count == if op == Op::Export { request.count } else { 0 },
                "{request:?} {answer:?}"
            );
        }
        (Status::Ok, None) => panic!("{request:?} is no request, and was done"),
        (_, known) => {
            assert!(answer.len == 0 && answer.count <= request.count, "{request:?} {answer:?}");
            assert_eq!(read, 0, "refused, and pages were read: {request:?} {answer:?}");
            assert_eq!(status == Status::UnknownOp, known.is_none(), "{request:?} {answer:?}");
            assert!(
                inside || [Status::BadRequest, Status::UnknownOp].contains(&status),
                "{request:?} {answer:?}"
            );
        }
    }
}

/// The fixed forms: what is accepted is encoded back to what it was read from.
fn descriptors(data: &[u8]) {
    if let Some(begin) = Begin::decode(data) {
        assert_eq!(begin.encode()[..], *data);
    }
    if let Some(raw) = data.first_chunk::<START_BYTES>() {
        assert_eq!(Start::decode(raw).encode(), *raw);
    }
    if let Some(raw) = data.first_chunk::<SCAN_BYTES>()
        && let Some(scan) = Scan::decode(raw)
    {
        assert_eq!(scan.encode(), *raw);
        assert!((1..=SCAN_MAX).contains(&scan.count) && scan.bitmap_bytes() as u64 * 8 >= scan.count.into());
    }
    if let Some(raw) = data.first_chunk::<FIXED_BYTES>()
        && let Some(config) = Config::decode(raw)
    {
        assert_eq!(Config::decode(&config.encode()), Some(config));
        assert!(config.workers >= 1 && config.slots >= 1 && [0, config.pages].contains(&config.digests));
    }
    if let Some(raw) = data.first_chunk::<RANGE_BYTES>() {
        assert_eq!(Range::decode(raw).encode(), *raw);
    }
}

/// Requests of every kind to a helper in every state, and descriptors by themselves.
pub fn seeds() -> Vec<Seed> {
    let plain = |op: Op, slot: u8, count: u16, len: u32, flags: u8, payload: &[u8]| {
        let mut bytes = vec![flags];
        bytes.extend(7u64.to_le_bytes());
        bytes.extend([op as u8, slot]);
        bytes.extend(count.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.push(1);
        bytes.extend((payload.len() as u16).to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    };
    let export = |pages: &[u64]| {
        let raw: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        plain(Op::Export, 0, pages.len() as u16, 0, 0, &raw)
    };
    let stage = |n: u8, requests: &[Vec<u8>]| [vec![n], requests.concat()].concat();
    let scan = Scan { first: 2, count: 6 }.encode();
    let start = Start { state: [5; 32], shared_pages: 12 }.encode();
    let mut all: Vec<Seed> = vec![
        ("exports".into(), stage(1, &[export(&[2, 3]), export(&[64, 69, 7])])),
        ("export-of-a-stranger".into(), stage(1, &[export(&[2, 8]), export(&[u64::MAX])])),
        ("export-twice".into(), stage(1, &[export(&[2, 2]), export(&[3]), export(&[3])])),
        ("scan".into(), stage(1, &[export(&[2, 3]), plain(Op::Scan, 1, 0, 16, 8, &scan)])),
        (
            "start".into(),
            stage(1, &[plain(Op::Pause, 0, 0, 0, 0, &[]), plain(Op::Start, 1, 0, 40, 8, &start)]),
        ),
        ("import".into(), stage(2, &[plain(Op::Import, 0, 1, 64, 8, &[1; 64])])),
        ("hello".into(), stage(0, &[plain(Op::Hello, 0, 0, 0, 0, &[]), plain(Op::Hello, 1, 0, 0, 0, &[])])),
        ("tail-that-cannot-be".into(), [vec![0, 1], 99u32.to_le_bytes().to_vec()].concat()),
        ("head-that-cannot-be".into(), [vec![0, 2], 1u32.to_le_bytes().to_vec()].concat()),
        ("scan-descriptor".into(), scan.to_vec()),
        ("start-descriptor".into(), start.to_vec()),
    ];
    for op in Op::ALL {
        let requests = [0, 1, 2].map(|n| stage(n, &[plain(*op, 1, 0, 32, 8, &[9; 32])]));
        for (n, bytes) in requests.into_iter().enumerate() {
            all.push((format!("{op:?}-in-state-{n}").to_lowercase(), bytes));
        }
    }
    let begin = Pair::new(&Setup::default()).begin.encode();
    all.push(("begin-descriptor".into(), begin.to_vec()));
    let began = [plain(Op::Hello, 0, 0, 0, 0, &[]), plain(Op::Begin, 0, 0, begin.len() as u32, 8, &begin)];
    all.push(("begin".into(), stage(0, &began)));
    let (protection, policy) = (0, 0);
    let config = Config { workers: 2, slots: 4, pages: 70, ranges: 2, protection, policy, digests: 70 };
    all.push(("config".into(), config.encode().to_vec()));
    all
}
