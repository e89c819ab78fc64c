//! What a destination says of a session, and what a source in doubt believes.
//!
//! Owns: what each entry of a journal is answered with, and which answer ends a doubt. Must not know: how it
//! is asked, how tokens are opened.

use super::guards::{Guard, Guards};

/// What became of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandOverOutcome {
    /// The guest is the destination's.
    Committed,
    /// It never was, and never will be.
    NeverCommitted,
}

impl HandOverOutcome {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::NeverCommitted => "never_committed",
        }
    }
}

/// What a destination's journal says of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Settlement<T = Vec<u8>> {
    /// The import goes on, or went with the daemon: COMMIT was not minted, or nobody saw it.
    Open,
    /// COMMIT is out.
    Committed {
        /// It.
        token: T,
    },
    /// The import failed; ABORT was minted if there is a token.
    Aborted {
        /// It.
        token: Option<T>,
    },
}

/// What a destination answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reply<T = Vec<u8>> {
    /// It does not know yet, or cannot know.
    Pending,
    /// COMMIT was minted.
    Committed(T),
    /// ABORT was minted.
    Aborted(T),
    /// COMMIT never was minted, or nobody saw it, and nobody will: the host's word for it.
    Never,
}

/// What a destination's journal has of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Journaled<T = Vec<u8>> {
    /// How it ended, if it has.
    pub settled: Settlement<T>,
    /// Whether the journal is older than what others may know.
    pub old_state: bool,
}

/// The answer about a session, by two looks that are taken in this order: whether somebody works on the
/// import, then what the journal has. In the other order an import could be stored as committed and end in
/// between: the journal would still be open, and nobody work on it.
///
/// # Errors
/// The journal's.
pub fn answer<T, E>(
    under_way: impl FnOnce() -> bool,
    journal: impl FnOnce() -> Result<Option<Journaled<T>>, E>,
) -> Result<Option<Reply<T>>, E> {
    answer_under(under_way, journal, Guards::ALL)
}

fn answer_under<T, E>(
    under_way: impl FnOnce() -> bool,
    journal: impl FnOnce() -> Result<Option<Journaled<T>>, E>,
    guards: Guards,
) -> Result<Option<Reply<T>>, E> {
    let (under_way, known) = if guards.hold(Guard::UnderWayIsLookedAtFirst) {
        let under_way = under_way();
        (under_way, journal()?)
    } else {
        let known = journal()?;
        (under_way(), known)
    };
    Ok(known.map(|known| reply_under(known, under_way, guards)))
}

pub fn reply_under<T>(known: Journaled<T>, under_way: bool, guards: Guards) -> Reply<T> {
    match known.settled {
        Settlement::Committed { token } => Reply::Committed(token),
        Settlement::Aborted { token: Some(token) } => Reply::Aborted(token),
        Settlement::Aborted { token: None } => Reply::Never,
        Settlement::Open if under_way && guards.hold(Guard::UnderWayIsPending) => Reply::Pending,
        Settlement::Open if known.old_state && guards.hold(Guard::OldStateIsPending) => Reply::Pending,
        Settlement::Open => Reply::Never,
    }
}

/// What a source in doubt hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Heard {
    /// What is said to be the destination's token.
    Token {
        /// What it is said to say.
        outcome: HandOverOutcome,
        /// Whether somebody carried it, rather than the destination's host.
        by_hand: bool,
    },
    /// The destination's host: COMMIT never was.
    Never,
    /// Nothing that helps.
    Nothing,
    /// An administrator's word.
    Word(HandOverOutcome),
}

/// Who is left of those who could judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Witness {
    /// The helper that minted START, and with it the guest's memory.
    Helper {
        /// Whether hosts are trusted beside it: at protection level `none`.
        hosts_are_trusted: bool,
    },
    /// It went with the daemon. What is decided is what the records say.
    Records,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Belief {
    /// The doubt is ended.
    Ends(HandOverOutcome),
    /// It is when the helper opens the token.
    WhenOpened(HandOverOutcome),
    /// Nobody can open the token.
    CannotBeOpened,
    /// The doubt stays.
    Stays,
}

/// Whether what is heard ends a doubt.
pub const fn believe(heard: Heard, witness: Witness) -> Belief {
    believe_under(heard, witness, Guards::ALL)
}

pub const fn believe_under(heard: Heard, witness: Witness, guards: Guards) -> Belief {
    const NEVER: HandOverOutcome = HandOverOutcome::NeverCommitted;
    match (heard, witness) {
        (Heard::Word(outcome), Witness::Helper { .. } | Witness::Records) => Belief::Ends(outcome),
        (Heard::Nothing, Witness::Helper { .. } | Witness::Records) => Belief::Stays,
        (Heard::Token { outcome, by_hand: _ }, Witness::Helper { .. }) => {
            if guards.hold(Guard::TokensAreOpened) {
                Belief::WhenOpened(outcome)
            } else {
                Belief::Ends(outcome)
            }
        }
        (Heard::Never, Witness::Helper { hosts_are_trusted }) => {
            if hosts_are_trusted || !guards.hold(Guard::HostsAreBelievedWhereTrusted) {
                Belief::Ends(NEVER)
            } else {
                Belief::Stays
            }
        }
        (Heard::Token { by_hand: true, .. }, Witness::Records)
            if guards.hold(Guard::UnopenedTokensEndNothing) =>
        {
            Belief::CannotBeOpened
        }
        // The guest's memory is lost, so that nothing is run by it.
        (Heard::Token { outcome, by_hand: _ }, Witness::Records) => Belief::Ends(outcome),
        (Heard::Never, Witness::Records) => Belief::Ends(NEVER),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const OUTCOMES: [HandOverOutcome; 2] = [HandOverOutcome::Committed, HandOverOutcome::NeverCommitted];

    fn reply(settled: Settlement<u8>, under_way: bool, old_state: bool) -> Reply<u8> {
        let known = Ok::<_, ()>(Some(Journaled { settled, old_state }));
        answer(|| under_way, || known).unwrap().unwrap()
    }

    #[test]
    fn an_open_import_is_answered_with_never_only_by_who_knows_that_nobody_works_on_it() {
        assert_eq!(reply(Settlement::Open, false, false), Reply::Never);
        for (under_way, old_state) in [(true, false), (false, true), (true, true)] {
            assert_eq!(reply(Settlement::Open, under_way, old_state), Reply::Pending);
        }
        for (under_way, old_state) in [(false, false), (true, false), (false, true), (true, true)] {
            let committed = Settlement::Committed { token: 1 };
            assert_eq!(reply(committed, under_way, old_state), Reply::Committed(1));
            let aborted = Settlement::Aborted { token: Some(2) };
            assert_eq!(reply(aborted, under_way, old_state), Reply::Aborted(2));
            assert_eq!(reply(Settlement::Aborted { token: None }, under_way, old_state), Reply::Never);
        }
    }

    #[test]
    fn an_import_that_commits_and_ends_between_the_two_looks_is_not_answered_with_never() {
        let (under_way, settled) = (Cell::new(true), Cell::new(Settlement::Open));
        let ends = || {
            settled.set(Settlement::Committed { token: 1 });
            under_way.set(false);
        };
        let known = || Ok::<_, ()>(Some(Journaled { settled: settled.get(), old_state: false }));
        let reply = |guards| {
            under_way.set(true);
            settled.set(Settlement::Open);
            // The looks, each followed by everything that can happen meanwhile.
            let first = || {
                let seen = under_way.get();
                ends();
                seen
            };
            let second = || {
                let seen = known();
                ends();
                seen
            };
            answer_under(first, second, guards)
        };
        assert_eq!(reply(Guards::ALL), Ok(Some(Reply::Committed(1))));
        let other_order = Guards::without(Guard::UnderWayIsLookedAtFirst);
        assert_eq!(reply(other_order), Ok(Some(Reply::Never)), "and both hosts would run it");
    }

    #[test]
    fn a_token_ends_a_doubt_when_the_helper_has_opened_it_and_a_hosts_word_where_hosts_are_trusted() {
        for hosts_are_trusted in [false, true] {
            let helper = Witness::Helper { hosts_are_trusted };
            for outcome in OUTCOMES {
                for by_hand in [false, true] {
                    let heard = Heard::Token { outcome, by_hand };
                    assert_eq!(believe(heard, helper), Belief::WhenOpened(outcome));
                }
                assert_eq!(believe(Heard::Word(outcome), helper), Belief::Ends(outcome));
            }
            let never =
                if hosts_are_trusted { Belief::Ends(HandOverOutcome::NeverCommitted) } else { Belief::Stays };
            assert_eq!(believe(Heard::Never, helper), never);
            assert_eq!(believe(Heard::Nothing, helper), Belief::Stays);
        }
    }

    #[test]
    fn with_the_helper_gone_the_destinations_host_is_believed_and_what_was_carried_by_hand_is_not() {
        for outcome in OUTCOMES {
            let heard = |by_hand| Heard::Token { outcome, by_hand };
            assert_eq!(believe(heard(false), Witness::Records), Belief::Ends(outcome));
            assert_eq!(believe(heard(true), Witness::Records), Belief::CannotBeOpened);
            assert_eq!(believe(Heard::Word(outcome), Witness::Records), Belief::Ends(outcome));
        }
        assert_eq!(believe(Heard::Never, Witness::Records), Belief::Ends(HandOverOutcome::NeverCommitted));
        assert_eq!(believe(Heard::Nothing, Witness::Records), Belief::Stays);
    }
}
