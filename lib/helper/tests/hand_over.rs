//! The hand-over, checked exhaustively: every interleaving of a source, several destinations and a network
//! that drops, duplicates, delays and replays tokens.
//!
//! The network is the strongest there is: it remembers every token that was ever minted, may deliver any of
//! them to anybody at any time and any number of times, makes up worthless ones, and may lose one for good.
//! It cannot make a genuine one: a token is a capability that exists only once a legal step has minted it.
//! `the_helpers_do_as_the_model_says` then holds the model against the real helper.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a test says what it expects by unwrapping it"
)]

mod support;

use std::collections::{HashMap, HashSet, VecDeque};

use mirrorvm_abi::op::{Begin, Greeting, Op, Status};
use mirrorvm_abi::record::TOKEN_BYTES;
use mirrorvm_helper::op_state::{DestinationEvent, DestinationOp, SourceEvent, SourceOp};
use support::{Allowed, STATE, Side};

/// Destinations, each good for one session; session `i` is between the source and destination `i`.
const N: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Tokens {
    start: bool,
    commit: bool,
    abort: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    source: SourceOp,
    /// Sessions that the source has begun; the present one is `begun - 1`.
    begun: usize,
    destinations: [DestinationOp; N],
    network: [Tokens; N],
}

const BEGINNING: World = World {
    source: SourceOp::Running,
    begun: 0,
    destinations: [DestinationOp::Idle; N],
    network: [Tokens { start: false, commit: false, abort: false }; N],
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Source(SourceEvent),
    /// A token of session `.0` reaches the source.
    DeliverAbort(usize),
    DeliverCommit(usize),
    DestinationBegin(usize),
    DestinationState(usize),
    /// START of session `.1` reaches destination `.0`.
    DeliverStart(usize, usize),
    /// Made-up bytes reach a destination as whatever token it waits for.
    Garbage(usize),
    Commit(usize),
    Abort(usize),
    DropStart(usize),
    DropCommit(usize),
    DropAbort(usize),
    /// The source's mirror is torn down and made anew; only in a broken variant.
    ForgetSource,
}

/// How the world works: as it does, or with one thing broken, so that the checker is seen to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Real,
    /// A destination that has committed still mints ABORT.
    AbortAfterCommit,
    /// A destination that has minted ABORT may still commit.
    CommitAfterAbort,
    /// A source may be called off after START.
    CancelAfterStart,
    /// Tokens are good in every session.
    TokensUnbound,
    /// A helper that is started anew believes that its guest may run.
    SourceForgets,
    /// ABORT is minted only by the step that gives up: one that got lost, or was not asked for, never comes.
    AbortOnce,
}

fn actions() -> Vec<Action> {
    use Action as A;
    let mut list = vec![A::ForgetSource];
    let events = [SourceEvent::Begin, SourceEvent::Pause, SourceEvent::Start, SourceEvent::Cancel];
    list.extend(events.map(A::Source));
    for i in 0..N {
        list.extend([
            A::DeliverAbort(i),
            A::DeliverCommit(i),
            A::DestinationBegin(i),
            A::DestinationState(i),
            A::Garbage(i),
            A::Commit(i),
            A::Abort(i),
            A::DropStart(i),
            A::DropCommit(i),
            A::DropAbort(i),
        ]);
        list.extend((0..N).map(|j| A::DeliverStart(i, j)));
    }
    list
}

/// What an action does: accepted and the world moves, or refused; a refusal may move the world too.
#[derive(Clone, Copy, Debug)]
enum Effect {
    Accepted(World),
    Refused(World),
    /// There is no such token to deliver, no such destination to begin with.
    Impossible,
}

fn apply(w: World, action: Action, variant: Variant) -> Effect {
    use Action as A;
    use Effect::{Accepted, Impossible, Refused};
    let mut next = w;
    let source = |event| match w.source.step(event) {
        Ok(source) => Accepted(World { source, ..w }),
        Err(_) => Refused(w),
    };
    let destination = |i: usize, event| -> Option<World> {
        let mut moved = w;
        moved.destinations[i] = w.destinations[i].step(event).ok()?;
        Some(moved)
    };
    let mine = |session: usize| variant == Variant::TokensUnbound || session + 1 == w.begun;
    match action {
        A::Source(SourceEvent::Begin) if w.begun == N => Impossible,
        A::Source(SourceEvent::Begin) => match w.source.step(SourceEvent::Begin) {
            Ok(source) => Accepted(World { source, begun: w.begun + 1, ..w }),
            Err(_) => Refused(w),
        },
        A::Source(SourceEvent::Start) => match w.source.step(SourceEvent::Start) {
            Ok(source) => {
                next.source = source;
                next.network[w.begun - 1].start = true;
                Accepted(next)
            }
            Err(_) => Refused(w),
        },
        A::Source(SourceEvent::Cancel)
            if variant == Variant::CancelAfterStart && w.source == SourceOp::PostExport =>
        {
            Accepted(World { source: SourceOp::Running, ..w })
        }
        A::Source(event) => source(event),
        A::DeliverAbort(i) if !w.network[i].abort => Impossible,
        A::DeliverCommit(i) if !w.network[i].commit => Impossible,
        A::DeliverAbort(i) if mine(i) => source(SourceEvent::AbortToken),
        A::DeliverCommit(i) if mine(i) => source(SourceEvent::CommitToken),
        A::DeliverAbort(_) | A::DeliverCommit(_) => Refused(w),
        A::DestinationBegin(i) => destination(i, DestinationEvent::Begin).map_or(Refused(w), Accepted),
        A::DestinationState(i) => destination(i, DestinationEvent::State).map_or(Refused(w), Accepted),
        A::DeliverStart(_, j) if !w.network[j].start => Impossible,
        A::DeliverStart(i, j) => {
            let waits = w.destinations[i] == DestinationOp::StateImport;
            let genuine = i == j || variant == Variant::TokensUnbound;
            match (waits, genuine) {
                (false, _) => Refused(w),
                (true, true) => {
                    Accepted(destination(i, DestinationEvent::StartToken).expect("it waits for it"))
                }
                (true, false) => Refused(destination(i, DestinationEvent::Fail).expect("an import can fail")),
            }
        }
        A::Garbage(i) => {
            let waits = matches!(w.destinations[i], DestinationOp::MemoryImport | DestinationOp::StateImport);
            let failed = waits.then(|| destination(i, DestinationEvent::Fail)).flatten();
            Refused(failed.unwrap_or(w))
        }
        A::Commit(i) => {
            let broken =
                variant == Variant::CommitAfterAbort && w.destinations[i] == DestinationOp::FailedImport;
            if broken {
                next.destinations[i] = DestinationOp::LiveImport;
            } else if let Some(moved) = destination(i, DestinationEvent::Commit) {
                next = moved;
            } else {
                return Refused(w);
            }
            next.network[i].commit = true;
            Accepted(next)
        }
        A::Abort(i) => {
            let broken =
                variant == Variant::AbortAfterCommit && w.destinations[i] == DestinationOp::LiveImport;
            let again = variant == Variant::AbortOnce && w.destinations[i] == DestinationOp::FailedImport;
            match destination(i, DestinationEvent::Fail) {
                _ if again => return Refused(w),
                Some(moved) => next = moved,
                None if broken => {}
                None => return Refused(w),
            }
            next.network[i].abort = true;
            Accepted(next)
        }
        A::DropStart(i) if w.network[i].start => {
            next.network[i].start = false;
            Accepted(next)
        }
        A::DropCommit(i) if w.network[i].commit => {
            next.network[i].commit = false;
            Accepted(next)
        }
        A::DropAbort(i) if w.network[i].abort => {
            next.network[i].abort = false;
            Accepted(next)
        }
        A::DropStart(_) | A::DropCommit(_) | A::DropAbort(_) => Impossible,
        A::ForgetSource if variant == Variant::SourceForgets => {
            Accepted(World { source: SourceOp::Running, ..w })
        }
        A::ForgetSource => Impossible,
    }
}

fn running(w: &World) -> usize {
    usize::from(w.source.may_run()) + w.destinations.iter().filter(|d| d.may_run()).count()
}

/// Every reachable world with the edges between them and the action that first led there.
struct Space {
    worlds: Vec<World>,
    edges: Vec<Vec<usize>>,
    parent: Vec<Option<(usize, Action)>>,
}

fn explore(variant: Variant, allowed: impl Fn(&World, Action) -> bool) -> Space {
    let actions = actions();
    let mut index = HashMap::from([(BEGINNING, 0)]);
    let mut space = Space { worlds: vec![BEGINNING], edges: vec![Vec::new()], parent: vec![None] };
    let mut queue = VecDeque::from([0]);
    while let Some(at) = queue.pop_front() {
        let world = space.worlds[at];
        for action in actions.iter().copied().filter(|a| allowed(&world, *a)) {
            let (Effect::Accepted(next) | Effect::Refused(next)) = apply(world, action, variant) else {
                continue;
            };
            let to = *index.entry(next).or_insert_with(|| {
                space.worlds.push(next);
                space.edges.push(Vec::new());
                space.parent.push(Some((at, action)));
                queue.push_back(space.worlds.len() - 1);
                space.worlds.len() - 1
            });
            space.edges[at].push(to);
        }
    }
    space
}

impl Space {
    fn path(&self, mut at: usize) -> Vec<Action> {
        let mut path = Vec::new();
        while let Some((before, action)) = self.parent[at] {
            path.push(action);
            at = before;
        }
        path.reverse();
        path
    }

    /// The shortest way to a world that `bad` holds of.
    fn find(&self, bad: impl Fn(&World) -> bool) -> Option<Vec<Action>> {
        self.worlds.iter().position(bad).map(|at| self.path(at))
    }

    /// The worlds from which no world that `good` holds of can be reached.
    fn stuck(&self, good: impl Fn(&World) -> bool) -> Vec<usize> {
        let mut back = vec![Vec::new(); self.worlds.len()];
        for (from, edges) in self.edges.iter().enumerate() {
            edges.iter().for_each(|to| back[*to].push(from));
        }
        let mut can: Vec<bool> = self.worlds.iter().map(&good).collect();
        let mut queue: Vec<usize> = (0..can.len()).filter(|i| can[*i]).collect();
        while let Some(at) = queue.pop() {
            for from in &back[at] {
                if !std::mem::replace(&mut can[*from], true) {
                    queue.push(*from);
                }
            }
        }
        (0..can.len()).filter(|i| !can[*i]).collect()
    }
}

const fn everything(_: &World, _: Action) -> bool {
    true
}

#[test]
fn never_do_two_copies_run() {
    let space = explore(Variant::Real, everything);
    let edges: usize = space.edges.iter().map(Vec::len).sum();
    println!("{} worlds, {edges} steps", space.worlds.len());
    assert!(space.worlds.len() > 4_000, "the adversary must have room: {}", space.worlds.len());
    let two = space.find(|w| running(w) > 1);
    assert_eq!(two, None, "two copies may run");
    let lost = space.find(|w| w.source == SourceOp::Done && running(w) == 0);
    assert_eq!(lost, None, "the source is done and nobody runs the guest");
    // The interesting ends are really there, so that the invariants are not true of nothing.
    for destination in 0..N {
        let taken = |w: &World| w.source == SourceOp::Done && w.destinations[destination].may_run();
        assert!(space.find(taken).is_some(), "destination {destination} can take over");
    }
    let back = |w: &World| w.begun == N && w.source.may_run() && w.network[0].start && w.network[1].start;
    assert!(space.find(back).is_some(), "the source can come back after two STARTs");
}

#[test]
fn every_world_can_still_end_well() {
    let space = explore(Variant::Real, everything);
    let dead: Vec<_> = space.stuck(|w| running(w) == 1).into_iter().map(|i| space.path(i)).collect();
    assert_eq!(dead, Vec::<Vec<Action>>::new(), "no copy can ever run again");
    // In doubt for ever is a source only when its destination runs the guest and COMMIT was lost for good.
    let settled = |w: &World| matches!(w.source, SourceOp::Running | SourceOp::Done);
    let in_doubt = space.stuck(settled);
    for i in &in_doubt {
        let w = &space.worlds[*i];
        let session = w.begun - 1;
        assert_eq!(w.source, SourceOp::PostExport, "{w:?}");
        assert_eq!(w.destinations[session], DestinationOp::LiveImport, "{w:?}");
        assert!(!w.network[session].commit, "{w:?}");
    }
    println!("{} of {} worlds are in doubt for ever, COMMIT lost", in_doubt.len(), space.worlds.len());
}

#[test]
fn the_checker_finds_what_is_broken_on_purpose() {
    let two = |variant| explore(variant, everything).find(|w| running(w) > 1);
    for variant in [
        Variant::AbortAfterCommit,
        Variant::CommitAfterAbort,
        Variant::CancelAfterStart,
        Variant::TokensUnbound,
        Variant::SourceForgets,
    ] {
        let path = two(variant).unwrap_or_else(|| panic!("{variant:?} lets nobody run twice"));
        println!("{variant:?}: {path:?}");
    }
    let once = explore(Variant::AbortOnce, everything);
    assert_eq!(once.find(|w| running(w) > 1), None);
    let stuck = once.stuck(|w| running(w) == 1);
    assert!(!stuck.is_empty(), "without a second ABORT a lost one leaves nobody");
    println!("AbortOnce: {:?}", once.path(stuck[0]));
}

/// The real helpers behind a world: one source, [`N`] destinations, the bytes of every token.
struct Real {
    source: Side,
    destinations: Vec<Side>,
    /// What the destination of a session needs to begin, once the source has begun.
    begins: Vec<Begin>,
    greetings: Vec<Greeting>,
    tokens: [[Option<Vec<u8>>; 3]; N],
}

impl Real {
    fn new() -> Self {
        let allowed = Allowed(vec![0..1]);
        let mut destinations: Vec<_> = (0..N).map(|i| Side::new(1, &allowed, 100 + i as u64)).collect();
        let greetings = destinations.iter_mut().map(Side::hello).collect();
        let source = Side::new(1, &allowed, 7);
        Self { source, destinations, begins: Vec::new(), greetings, tokens: Default::default() }
    }

    fn perform(&mut self, action: Action) -> Result<(), Status> {
        use Action as A;
        match action {
            A::Source(SourceEvent::Begin) => {
                let session = self.begins.len();
                let own = self.source.control(Op::Hello, &[])?;
                let own = Greeting::decode(own.as_slice().try_into().unwrap());
                let begin = Begin {
                    source: true,
                    elide_zero: false,
                    fresh: false,
                    digests: false,
                    audit: false,
                    suite: mirrorvm_abi::record::Suite::Aes256Gcm,
                    streams: 1,
                    session: [7; 16],
                    peer: self.greetings[session],
                    transcript: [1; 32],
                };
                self.source.control(Op::Begin, &begin.encode())?;
                self.begins.push(Begin { source: false, peer: own, ..begin });
                Ok(())
            }
            A::Source(SourceEvent::Pause) => self.source.control(Op::Pause, &[]).map(drop),
            A::Source(SourceEvent::Cancel) => self.source.control(Op::Cancel, &[]).map(drop),
            A::Source(SourceEvent::Start) => {
                let token = self.source.start(1)?;
                self.tokens[self.begins.len() - 1][0] = Some(token);
                Ok(())
            }
            A::DeliverAbort(i) => self.deliver(Op::AbortToken, None, i, 2),
            A::DeliverCommit(i) => self.deliver(Op::CommitToken, None, i, 1),
            A::DeliverStart(i, j) => self.deliver(Op::StartToken, Some(i), j, 0),
            A::DestinationBegin(i) => {
                let begin = self.begins[i].encode();
                self.destinations[i].control(Op::Begin, &begin).map(drop)
            }
            A::DestinationState(i) => self.destinations[i].control(Op::State, &STATE).map(drop),
            A::Garbage(i) => {
                // One of the two is what it waits for, if it waits for one; the other is refused by state.
                let first = self.destinations[i].control(Op::EpochToken, &[7; TOKEN_BYTES]);
                let second = self.destinations[i].control(Op::StartToken, &[7; TOKEN_BYTES]);
                first.and(second).map(drop)
            }
            A::Commit(i) => {
                let token = self.destinations[i].control(Op::Commit, &[])?;
                self.tokens[i][1] = Some(token);
                Ok(())
            }
            A::Abort(i) => {
                let token = self.destinations[i].control(Op::Abort, &[])?;
                self.tokens[i][2] = Some(token);
                Ok(())
            }
            A::Source(SourceEvent::AbortToken | SourceEvent::CommitToken)
            | A::DropStart(_)
            | A::DropCommit(_)
            | A::DropAbort(_)
            | A::ForgetSource => unreachable!("not explored here"),
        }
    }

    fn deliver(&mut self, op: Op, to: Option<usize>, session: usize, kind: usize) -> Result<(), Status> {
        let token = self.tokens[session][kind].clone().expect("the model says that it was minted");
        to.map_or(&mut self.source, |i| &mut self.destinations[i]).control(op, &token).map(drop)
    }
}

#[test]
fn the_helpers_do_as_the_model_says() {
    // Two sessions are enough for every replay across sessions; a destination begins when its session's
    // source nonce is there; losing a token is no act of a helper.
    let explored = |w: &World, a: Action| match a {
        Action::DropStart(_) | Action::DropCommit(_) | Action::DropAbort(_) | Action::ForgetSource => false,
        Action::DestinationBegin(i) => i < w.begun,
        Action::Source(SourceEvent::Begin) => w.begun < 2,
        _ => true,
    };
    let space = explore(Variant::Real, explored);
    let mut checked = 0;
    let mut refused = HashSet::new();
    for (at, world) in space.worlds.iter().enumerate() {
        let path = space.path(at);
        for action in actions().into_iter().filter(|a| explored(world, *a)) {
            let expected = match apply(*world, action, Variant::Real) {
                Effect::Accepted(_) => true,
                Effect::Refused(_) => false,
                Effect::Impossible => continue,
            };
            let mut real = Real::new();
            for step in &path {
                let _ = real.perform(*step);
            }
            let outcome = real.perform(action);
            assert_eq!(outcome.is_ok(), expected, "{action:?} after {path:?}: {outcome:?}");
            refused.extend(outcome.err().map(|s| s as u32));
            checked += 1;
        }
    }
    println!("{} worlds, {checked} steps of real helpers as the model says", space.worlds.len());
    assert!(checked > 1_000, "{checked}");
    assert_eq!(refused, HashSet::from([Status::WrongState as u32, Status::Unsealed as u32]));
}
