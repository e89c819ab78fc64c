//! The hand-over between two hosts, checked exhaustively: hosts, disks, helpers and the network between them.
//!
//! Owns: what is explored and promised, and that each rule of [`Guard`] is needed for it. The hosts go by the
//! very functions that the program goes by, and the helpers by theirs (`mirrorvm_helper::op_state`).
//!
//! A daemon may be killed after any step, and is started again. The network gives out what was ever sent, at
//! any time, in any order and as often as it likes, or loses all of it. Stores and helpers refuse, and lie
//! about having refused. Migrations are called off, records written again, tokens made up, and administrators
//! who have looked give their word.

mod moves;
mod search;
mod world;

use std::time::Instant;

use moves::{HelperRule, Step, Terms};
use search::{Counts, Space, explore};
use world::{Fault, Promised, World};

use super::destination::Destination;
use super::guards::{Guard, Guards};

const ALL: Terms = Terms {
    guards: Guards::ALL,
    hosts_are_trusted: true,
    sessions: 1,
    crashes: 3,
    calling_off: true,
    repeats: true,
    refusals: true,
    put_back: None,
    hostile: false,
    broken_helper: None,
    order: None,
};
/// Two migrations: there and back, or once more after one that failed.
const TWO: Terms =
    Terms { sessions: 2, crashes: 1, calling_off: false, refusals: false, repeats: false, ..ALL };
/// The destination's host is somebody else's.
const HOSTILE: Terms = Terms { hosts_are_trusted: false, hostile: true, crashes: 0, ..ALL };

const fn put_back(host: usize) -> Terms {
    Terms { put_back: Some(host), calling_off: false, refusals: false, repeats: false, crashes: 2, ..ALL }
}

/// How far is gone: `MIRRORVM_MODEL`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// `quick`: of series that take long, one. For the loop while one works.
    Quick,
    /// Nothing said: what every landing explores.
    Landing,
    /// `full`: more that goes wrong at once.
    Full,
}

fn extent() -> Extent {
    match std::env::var("MIRRORVM_MODEL").as_deref() {
        Err(_) => Extent::Landing,
        Ok("quick") => Extent::Quick,
        Ok("full") => Extent::Full,
        Ok(other) => panic!("MIRRORVM_MODEL is {other:?}: take quick or full, or leave it out"),
    }
}

/// Whether hosts are trusted, one after the other.
fn both_trusts() -> &'static [bool] {
    if extent() == Extent::Quick { &[true] } else { &[true, false] }
}

/// What is explored of some terms.
fn explored(what: &str, terms: &Terms, keep_steps: bool) -> Space {
    let begun = Instant::now();
    let promised = match terms.put_back {
        _ if terms.hostile => Promised::Least,
        None => Promised::Everything,
        Some(1) => Promised::WithOldDestination,
        Some(_) => Promised::Least,
    };
    let space = explore(World::beginning(terms.crashes), terms, promised, keep_steps);
    println!(
        "{what}: {} worlds, {} steps, depth {}, {} ms",
        space.worlds().len(),
        space.steps,
        space.depth,
        begun.elapsed().as_millis()
    );
    space
}

fn told(space: &Space, to: u32) -> String {
    space.path(to).iter().fold(String::new(), |all, (step, who)| format!("{all}\n    {who} {step:?}"))
}

fn holds(what: &str, terms: &Terms) {
    let space = explored(what, terms, false);
    if let Some((fault, at)) = space.fault {
        panic!("{what}: {fault:?} by{}\n{:#?}", told(&space, at), space.worlds()[at as usize]);
    }
}

/// Explores until nothing is new, and that everything can still end well.
fn holds_and_ends(what: &str, terms: &Terms) {
    let space = explored(what, terms, true);
    if let Some((fault, at)) = space.fault {
        panic!("{what}: {fault:?} by{}\n{:#?}", told(&space, at), space.worlds()[at as usize]);
    }
    if let Some(at) = dead_end(&space, terms) {
        panic!(
            "{what}: nobody has the guest for good after{}\n{:#?}",
            told(&space, at),
            space.worlds()[at as usize]
        );
    }
}

/// The first world from which neither both hosts come to rest with one of them having the guest, nor a doubt
/// is left that is known to need an administrator's word; or that does not end with such a word either.
fn dead_end(space: &Space, terms: &Terms) -> Option<u32> {
    let itself = |c| c == Counts::Always;
    let alone = space.can_reach(World::is_settled, itself);
    let known = |w: &World| w.is_settled() || !terms.hosts_are_trusted && w.is_known_doubt();
    let known = space.can_reach(known, itself);
    let with_word = space.can_reach(World::is_settled, |c| c != Counts::Not);
    let stuck = alone.iter().filter(|can| !**can).count();
    println!("    {stuck} of them need an administrator's word");
    assert!(!terms.hosts_are_trusted || stuck == 0 || known.contains(&false), "{stuck}");
    (0..known.len()).find(|w| !known[*w] || !with_word[*w]).map(|w| w as u32)
}

#[test]
fn one_migration_never_makes_two_copies_and_never_none_where_hosts_are_trusted() {
    holds_and_ends("one migration, hosts trusted", &ALL);
}

#[test]
fn one_migration_never_makes_two_copies_and_never_none_where_only_tokens_are() {
    holds_and_ends("one migration, tokens only", &Terms { hosts_are_trusted: false, ..ALL });
}

#[test]
fn a_second_migration_while_the_first_is_still_in_doubt_does_no_harm() {
    for &hosts_are_trusted in both_trusts() {
        let terms = Terms { hosts_are_trusted, ..TWO };
        holds_and_ends("two migrations", &terms);
        if extent() == Extent::Full {
            holds("two migrations, more kills", &Terms { crashes: 2, ..terms });
            holds("two migrations, repeated", &Terms { repeats: true, ..terms });
            holds("two migrations, called off", &Terms { calling_off: true, ..terms });
            holds("two migrations, refusals", &Terms { refusals: true, ..terms });
        }
    }
}

#[test]
fn a_state_that_is_put_back_makes_no_second_copy() {
    for &hosts_are_trusted in both_trusts() {
        for host in 0..2 {
            let terms = Terms { hosts_are_trusted, ..put_back(host) };
            holds(&format!("the state of host {host} is put back"), &terms);
        }
    }
}

#[test]
fn a_hostile_destination_makes_no_second_copy_of_a_guest_whose_helper_it_cannot_fool() {
    holds("a hostile destination", &HOSTILE);
}

/// Where it is seen what a rule is for.
fn needed_in(guard: Guard) -> Terms {
    let terms = match guard {
        Guard::NoCallingOffPast
        | Guard::StartNotedFirst
        | Guard::StartOnlyWhenNoted
        | Guard::SilenceDecidesNothing
        | Guard::TokensAreOpened
        | Guard::UnopenedTokensEndNothing
        | Guard::CommitNotedBeforeTold
        | Guard::CommitNotedBeforeRun
        | Guard::CommitIsKept
        | Guard::UnderWayIsPending
        | Guard::UnderWayIsLookedAtFirst
        | Guard::DoubtOutlivesRestarts
        | Guard::DoubtHoldsItsGuest
        | Guard::CommittedHasArrived
        | Guard::UncommittedHasNot
        | Guard::LeftIsNotStarted
        | Guard::SessionsAreUsedOnce => ALL,
        Guard::OnlyWhatLeftMakesWay => TWO,
        Guard::HostsAreBelievedWhereTrusted => HOSTILE,
        Guard::OldStateIsPending
        | Guard::UnconfirmedIsNotStarted
        | Guard::OldStateIsUnconfirmed
        | Guard::DoubtIsToldAsDoubt => put_back(1),
    };
    Terms { guards: Guards::without(guard), ..terms }
}

#[test]
fn each_rule_is_needed() {
    for guard in Guard::EACH {
        let terms = needed_in(*guard);
        let what = format!("without {guard:?}");
        let space = explored(&what, &terms, false);
        let found = match space.fault {
            Some((fault, at)) => Some((format!("{fault:?}"), space, at)),
            // That everything ends is not promised where a state was put back.
            None if terms.put_back.is_some() => None,
            None => {
                let space = explored(&what, &terms, true);
                dead_end(&space, &terms).map(|at| ("nobody has the guest for good".to_owned(), space, at))
            }
        };
        let Some((fault, space, at)) = found else { panic!("{guard:?} is not needed") };
        println!("    {fault} after{}", told(&space, at));
    }
}

#[test]
fn each_rule_of_the_helpers_is_needed_against_a_hostile_host() {
    for rule in [HelperRule::CommitAfterStart, HelperRule::NoAbortAfterCommit, HelperRule::NoCommitAfterAbort]
    {
        let terms = Terms { broken_helper: Some(rule), ..HOSTILE };
        let space = explored(&format!("helpers without {rule:?}"), &terms, false);
        let Some((fault, at)) = space.fault else { panic!("{rule:?} is not needed") };
        assert_eq!(fault, Fault::Twice);
        println!("    {fault:?} after{}", told(&space, at));
    }
}

/// Of the six orders in which COMMIT can be stored, told and acted upon, those that keep every promise.
#[test]
fn commit_may_be_told_and_acted_upon_in_either_order_once_it_is_stored() {
    let [note, tell, run] = [Destination::Noting, Destination::Telling, Destination::Running];
    for (order, holds) in [
        ([note, tell, run], true),
        ([note, run, tell], true),
        ([tell, note, run], false),
        ([tell, run, note], false),
        ([run, note, tell], false),
        ([run, tell, note], false),
    ] {
        let terms = Terms { order: Some(order), ..ALL };
        let space = explored(&format!("{order:?}"), &terms, false);
        assert_eq!(space.fault.is_none(), holds, "{order:?}");
    }
}

/// A search that stopped early would find nothing wrong.
#[test]
fn the_search_reaches_what_it_should() {
    let space = explored("what is reached", &ALL, false);
    let reached = |what: &str, is: &dyn Fn(&World) -> bool| {
        assert!(space.worlds().iter().any(is), "{what}");
    };
    let one = |w: &World| w.sessions[0];
    reached("the guest moves", &|w| w.is_settled() && w.hosts[1].runs);
    reached("it comes back after START", &|w| {
        w.is_settled() && w.hosts[0].runs && one(w).is_some_and(|s| s.asked && s.start != 0)
    });
    reached("a second kill of both", &|w| w.hosts.iter().all(|h| h.crashes == 0 && !h.up));
    reached("an administrator's word", &|w| one(w).is_some_and(|s| s.word.is_some()));
    let steps: Vec<_> = (0..space.worlds().len() as u32).filter_map(|w| space.path_end(w)).collect();
    for step in [
        Step::SourceLosesMintedStart,
        Step::SourceStoresStartAndIsToldItDidNot,
        Step::DestinationStoresCommitAndIsToldItDidNot,
        Step::DestinationAbortsAndCannotStoreIt,
        Step::DaemonEnds,
    ] {
        assert!(steps.contains(&step), "{step:?}");
    }
}
