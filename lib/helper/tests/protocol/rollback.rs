//! A host that copies the helper's memory and puts it back: whatever it makes the helper seal again, no key
//! meets a nonce twice.

use super::*;
use support::Copied;

/// What a host does next.
#[derive(Clone, Debug)]
enum Act {
    /// The guest writes a page.
    Write {
        page: u64,
        content: u8,
    },
    Export {
        stream: usize,
        pages: Vec<u64>,
    },
    EndEpoch,
    Pause,
    Start,
    Cancel,
    /// What the next session needs.
    Hello,
    /// That session, which tells the helper that everything is as it was in the last one.
    Begin,
    Copy,
    /// Everything that the machine remembers goes back to an earlier copy.
    PutBack(usize),
}

/// Where the values come from that keep groups apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The processor: nothing that a host can copy.
    Processor,
    /// A counter in memory, which is broken on purpose.
    Counter,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let page = 0u64..8;
    let pages = prop::collection::hash_set(page.clone(), 1..4).prop_map(|set| set.into_iter().collect());
    let act = prop_oneof![
        3 => (page, any::<u8>()).prop_map(|(page, content)| Act::Write { page, content }),
        6 => (0usize..2, pages).prop_map(|(stream, pages)| Act::Export { stream, pages }),
        2 => Just(Act::EndEpoch),
        1 => Just(Act::Pause),
        1 => Just(Act::Start),
        1 => Just(Act::Cancel),
        1 => Just(Act::Hello),
        2 => Just(Act::Begin),
        2 => Just(Act::Copy),
        4 => any::<usize>().prop_map(Act::PutBack),
    ];
    prop::collection::vec(act, 1..60)
}

/// Everything that was sealed under any key.
#[derive(Default)]
struct Ledger {
    /// By key and nonce, of which the index is all: what was sealed there.
    seals: HashMap<([u8; 32], usize), Vec<u8>>,
    again: Vec<String>,
}

impl Ledger {
    fn note(&mut self, secret: &[u8; 32], record: &[u8]) {
        let (key, header) = (reader::group_key(secret, &head(record)), header_of(record));
        let pieces = match header.kind {
            Kind::Pages | Kind::Digests => {
                (0..listed(record).len()).map(|i| record[piece(record, i)].to_vec()).collect()
            }
            Kind::Epoch | Kind::Start | Kind::Commit | Kind::Abort => vec![record[HEADER_BYTES..].to_vec()],
        };
        for (index, sealed) in pieces.into_iter().enumerate() {
            if let Some(before) = self.seals.insert((key, index), sealed.clone()) {
                let content = if before == sealed { "the same content" } else { "another content" };
                self.again.push(format!("{content}: {header:?}, piece {index}"));
            }
        }
    }
}

/// A copy of the helper, and what the host noted with it.
struct Then {
    copied: Copied,
    begin: Begin,
    greetings: (Greeting, Greeting),
    greeted: Option<Greeting>,
    /// What the processor keeps to itself, where it does not.
    counter: Option<u64>,
    epoch: u32,
}

/// A source under a host that does all this, and what it sealed.
struct Attack {
    pair: Pair,
    ledger: Ledger,
    source: Source,
    copies: Vec<Then>,
    epoch: u32,
    /// By the source, and not begun with.
    greeted: Option<Greeting>,
}

impl Attack {
    fn new(source: Source) -> Self {
        let setup = Setup { workers: 2, scanning: true, ..Setup::default() };
        let (pair, ledger) = (Pair::new(&setup), Ledger::default());
        Self { pair, ledger, source, copies: Vec::new(), epoch: 1, greeted: None }
    }

    fn secret(&self, stream: u16) -> [u8; 32] {
        let id = reader::KeyId { direction: Direction::Forward as u8, stream };
        reader::secret(&self.pair, &SECRET, id)
    }

    fn note(&mut self, stream: u16, record: &[u8]) {
        let secret = self.secret(stream);
        self.ledger.note(&secret, record);
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Write { page, content } => {
                self.pair.source.machine.ram.borrow_mut()[*page as usize] = [*content; PAGE_BYTES];
            }
            Act::Export { stream, pages } => {
                if let Ok(group) = self.pair.source.export(*stream, self.epoch, pages) {
                    self.note(*stream as u16, &group);
                }
            }
            Act::EndEpoch => {
                if let Ok(token) = self.pair.source.control(Op::EndEpoch, &[]) {
                    self.note(0xffff, &token);
                    self.epoch += 1;
                }
            }
            Act::Pause => _ = self.pair.source.control(Op::Pause, &[]),
            Act::Start => {
                if let Ok(token) = self.pair.source.start(0) {
                    self.note(0xffff, &token);
                }
            }
            Act::Cancel => _ = self.pair.source.control(Op::Cancel, &[]),
            Act::Hello => {
                if let Ok(greeting) = self.pair.source.control(Op::Hello, &[]) {
                    self.greeted = Some(Greeting::decode(greeting.as_slice().try_into().unwrap()));
                }
            }
            Act::Begin => {
                let begun = self.pair.source.control(Op::Begin, &self.pair.begin.encode());
                // Without a greeting, or in a session, it is refused; and none is good for two.
                assert_eq!(begun.is_ok(), self.greeted.is_some(), "{begun:?}");
                if let Some(greeting) = self.greeted.take() {
                    (self.pair.greetings.0, self.epoch) = (greeting, 1);
                }
            }
            Act::Copy => {
                let counter = self.pair.source.machine.random.borrow().0;
                let counter = (self.source == Source::Counter).then_some(counter);
                let copied = self.pair.source.copy();
                let (begin, greetings, epoch) = (self.pair.begin, self.pair.greetings, self.epoch);
                let greeted = self.greeted;
                self.copies.push(Then { copied, begin, greetings, greeted, counter, epoch });
            }
            Act::PutBack(which) => {
                if self.copies.is_empty() {
                    return;
                }
                let Then { copied, begin, greetings, greeted, counter, epoch } =
                    &self.copies[which % self.copies.len()];
                self.pair.source.put_back(copied);
                (self.pair.begin, self.pair.greetings, self.epoch) = (*begin, *greetings, *epoch);
                self.greeted = *greeted;
                if let Some(counter) = counter {
                    *self.pair.source.machine.random.borrow_mut() = Rng(*counter);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/protocol.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_key_meets_a_nonce_twice_however_often_memory_is_put_back(acts in acts()) {
        let mut attack = Attack::new(Source::Processor);
        acts.iter().for_each(|act| attack.act(act));
        prop_assert_eq!(&attack.ledger.again, &Vec::<String>::new());
    }
}

/// What the property above is about, in its shortest form: the same place of the same stream of the same
/// epoch is sealed twice, with another content.
fn sealed_twice(source: Source) -> Attack {
    let mut attack = Attack::new(source);
    let export = Act::Export { stream: 0, pages: vec![3, 4] };
    let back = Act::PutBack(0);
    for act in [Act::Copy, export.clone(), back.clone(), Act::Write { page: 4, content: 9 }, export] {
        attack.act(&act);
    }
    for act in [back.clone(), Act::EndEpoch, back, Act::EndEpoch] {
        attack.act(&act);
    }
    attack
}

#[test]
fn the_same_place_is_sealed_under_another_key_when_memory_was_put_back() {
    let attack = sealed_twice(Source::Processor);
    // Two groups of two pages, two tokens.
    assert_eq!((attack.ledger.seals.len(), attack.ledger.again.len()), (6, 0));
}

#[test]
fn the_ledger_finds_a_counter_in_the_place_of_randomness() {
    let attack = sealed_twice(Source::Counter);
    println!("{:#?}", attack.ledger.again);
    assert_eq!(attack.ledger.again.len(), 3, "two pages and a token under keys that were there before");
    let other = attack.ledger.again.iter().filter(|what| what.starts_with("another content"));
    assert_eq!(other.count(), 1, "the page that was written in between");
}

/// A host that puts back what was there between Hello and Begin has the helper begin twice with one ephemeral
/// key.
#[test]
fn a_greeting_that_was_put_back_gives_no_key_twice() {
    let mut attack = Attack::new(Source::Processor);
    let mut secrets = Vec::new();
    for act in [Act::Cancel, Act::Hello, Act::Copy] {
        attack.act(&act);
    }
    // With the same peer it is the same session, of which no group has the key of another's.
    for content in [1, 2] {
        attack.act(&Act::PutBack(0));
        attack.act(&Act::Begin);
        attack.act(&Act::Write { page: 3, content });
        attack.act(&Act::Export { stream: 0, pages: vec![3] });
        attack.act(&Act::EndEpoch);
        secrets.push(attack.secret(0));
    }
    assert_eq!(secrets[0], secrets[1], "the key was the same");
    assert_eq!((attack.ledger.seals.len(), &attack.ledger.again), (4, &Vec::new()));
    // Another peer is another session.
    attack.act(&Act::PutBack(0));
    let group = attack.pair.source.export(0, 1, &[3]);
    assert_eq!(group, Err((Status::WrongState, 0)), "none has begun");
    let other = Side::new(2, &Setup::default().allowed, 99).hello();
    (attack.pair.begin.peer, attack.pair.greetings.1) = (other, other);
    attack.act(&Act::Begin);
    assert!(!secrets.contains(&attack.secret(0)));
    attack.act(&Act::Export { stream: 0, pages: vec![3] });
    assert_eq!((attack.ledger.seals.len(), attack.ledger.again), (5, Vec::new()));
}

#[test]
fn two_helpers_of_one_image_share_no_key() {
    let setup = Setup::default();
    let mut ledger = Ledger::default();
    let id = reader::KeyId { direction: Direction::Forward as u8, stream: 0 };
    // From the start, with all that a host can make the same.
    let mut first = Pair::new(&setup);
    let mut second = Pair::new(&Setup { seeds: (3, 2), ..setup.clone() });
    assert_eq!((first.begin, first.greetings.1), (second.begin, second.greetings.1));
    assert_ne!(first.greetings.0, second.greetings.0, "their nonces are their processors'");
    for pair in [&mut first, &mut second] {
        let group = pair.source.export(0, 1, &[0, 1]).unwrap();
        ledger.note(&reader::secret(pair, &SECRET, id), &group);
    }
    // From one copy of a helper in the middle of a session.
    let secret = reader::secret(&first, &SECRET, id);
    let copied = first.source.copy();
    let mut twins: Vec<_> = (10..13).map(|seed| Side::new(1, &setup.allowed, seed)).collect();
    for twin in &mut twins {
        twin.put_back(&copied);
    }
    for (content, twin) in (1..).zip(twins.iter_mut().chain([&mut first.source])) {
        twin.machine.ram.borrow_mut()[2] = [content; PAGE_BYTES];
        let group = twin.export(0, 1, &[2, 3]).unwrap();
        assert_eq!(reader::open(&secret, &group).unwrap()[0], [content; PAGE_BYTES], "it is one session");
        ledger.note(&secret, &group);
    }
    assert_eq!((ledger.seals.len(), ledger.again), (12, Vec::new()));
}

/// A processor whose source is stuck or silent: nothing is sealed, nothing has changed, and when it works
/// again the session goes on.
#[test]
fn without_randomness_nothing_is_sealed_and_nothing_is_lost() {
    let setup = Setup { suite: Suite::Aes256GcmSiv, ..Setup::default() };
    let mut pair = Pair::new(&setup);
    let silent = |side: &Side, silent: bool| side.machine.entropy.set(!silent);
    silent(&pair.source, true);
    assert_eq!(pair.source.export(0, 1, &[0, 1]), Err((Status::NoEntropy, 0)));
    assert_eq!(pair.source.control(Op::EndEpoch, &[]), Err(Status::NoEntropy));
    assert!(pair.source.machine.pages_read.borrow().is_empty(), "not one page was read");
    silent(&pair.source, false);
    // One that gives the same again and again, and says that it works.
    *pair.source.machine.stuck.borrow_mut() = Some(0x1234_5678_9abc_def0);
    assert_eq!(pair.source.export(0, 1, &[0, 1]), Err((Status::NoEntropy, 0)));
    *pair.source.machine.stuck.borrow_mut() = None;
    // No claim has stayed, no place was spent.
    let group = pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
    pair.destination.import(0, 1, &group).unwrap();
    pair.end_epoch();
    pair.source.control(Op::Pause, &[]).unwrap();
    silent(&pair.source, true);
    assert_eq!(pair.source.start(0), Err(Status::NoEntropy));
    silent(&pair.source, false);
    let start = pair.source.start(0).expect("START was not minted before");
    pair.destination.control(Op::State, &STATE).unwrap();
    pair.destination.control(Op::StartToken, &start).unwrap();
    silent(&pair.destination, true);
    assert_eq!(pair.destination.control(Op::Commit, &[]), Err(Status::NoEntropy));
    assert_eq!(pair.destination.control(Op::Abort, &[]), Err(Status::NoEntropy));
    silent(&pair.destination, false);
    let commit = pair.destination.token(Op::Commit, &[]);
    pair.source.control(Op::CommitToken, &commit).unwrap();
}

/// A source that was put back to before START can be told anything by its host; the destination's genuine
/// token leads it to where it was, and nothing that the host makes up does.
#[test]
fn a_source_that_was_put_back_to_before_start_takes_the_destinations_token() {
    let setup = Setup::default();
    for (op, mint, running) in [(Op::CommitToken, Op::Commit, false), (Op::AbortToken, Op::Abort, true)] {
        for paused in [false, true] {
            let mut pair = Pair::new(&setup);
            let group = pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
            pair.destination.import(0, 1, &group).unwrap();
            let live = pair.source.copy();
            pair.source.control(Op::Pause, &[]).unwrap();
            let copied = if paused { pair.source.copy() } else { live };
            let start = pair.source.start(0).unwrap();
            pair.destination.control(Op::State, &STATE).unwrap();
            pair.destination.control(Op::StartToken, &start).unwrap();
            let token = pair.destination.token(mint, &[]);
            pair.source.put_back(&copied);
            for forged in [flipped(&token, 400), start, vec![0; TOKEN_BYTES]] {
                assert_eq!(pair.source.control(op, &forged), Err(Status::Unsealed));
            }
            pair.source.control(op, &token).unwrap();
            assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState), "it is decided");
            let anew = pair.source.control(Op::Hello, &[]);
            assert_eq!(anew.is_ok(), running, "a new session after ABORT alone");
        }
    }
    // What no helper can see: that it was put back. Its host's note of START is all that keeps a host that
    // means well from this.
    let mut pair = Pair::new(&setup);
    pair.source.export(0, 1, &setup.allowed.pages()).unwrap();
    pair.source.control(Op::Pause, &[]).unwrap();
    let copied = pair.source.copy();
    pair.source.start(0).unwrap();
    assert_eq!(pair.source.control(Op::Cancel, &[]), Err(Status::WrongState));
    pair.source.put_back(&copied);
    pair.source.control(Op::Cancel, &[]).unwrap();
}
