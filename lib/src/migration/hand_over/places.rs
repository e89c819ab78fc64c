//! Which guest of a host may be started, and what the host says of it to others.
//!
//! Owns: what keeps a guest that may be elsewhere from being run, from being replaced, and from being
//! claimed. Must not know: the rest of a guest's life, which is `guest::lifecycle`'s.

use super::guards::{Guard, Guards};
use crate::guest::lifecycle::{Event, GuestState};

/// Why a guest is not started or resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bar {
    /// It has left for another host.
    Left,
    /// Another host may have it by now.
    Unconfirmed,
}

/// What bars an event of a guest's life. `moved`: its record says that it has left.
pub const fn bar(event: Event, moved: bool, unconfirmed: bool) -> Option<Bar> {
    bar_under(event, moved, unconfirmed, Guards::ALL)
}

pub const fn bar_under(event: Event, moved: bool, unconfirmed: bool, guards: Guards) -> Option<Bar> {
    match event {
        Event::Start if moved && guards.hold(Guard::LeftIsNotStarted) => Some(Bar::Left),
        Event::Start | Event::Resume if unconfirmed && guards.hold(Guard::UnconfirmedIsNotStarted) => {
            Some(Bar::Unconfirmed)
        }
        Event::Start
        | Event::Started
        | Event::Pause
        | Event::Resume
        | Event::Stop
        | Event::Stopped
        | Event::Broke
        | Event::HoldForHandOver
        | Event::StartSent
        | Event::HandedBack
        | Event::HandedOver
        | Event::Arrived => None,
    }
}

/// Whether a guest's record makes way for the guest when it arrives.
pub const fn makes_way(state: GuestState, moved: bool) -> bool {
    makes_way_under(state, moved, Guards::ALL)
}

pub const fn makes_way_under(state: GuestState, moved: bool, guards: Guards) -> bool {
    matches!(state, GuestState::Stopped) && moved || !guards.hold(Guard::OnlyWhatLeftMakesWay)
}

/// Whether a session has not been here. `journaled`: the journal has it; `known`: there is a migration of it.
pub const fn is_new_session(journaled: bool, known: bool) -> bool {
    is_new_session_under(journaled, known, Guards::ALL)
}

pub const fn is_new_session_under(journaled: bool, known: bool, guards: Guards) -> bool {
    !(journaled || known) || !guards.hold(Guard::SessionsAreUsedOnce)
}

/// Whose a guest is by this host's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// This host's.
    Here,
    /// Nobody knows yet.
    Undecided,
    /// The host's where it went.
    Elsewhere,
}

/// Of a guest whose record is there. `leaving`: its migration has passed the point of no return.
pub const fn place(state: GuestState, unconfirmed: bool, moved: bool, leaving: bool) -> Place {
    place_under(state, unconfirmed, moved, leaving, Guards::ALL)
}

pub const fn place_under(
    state: GuestState,
    unconfirmed: bool,
    moved: bool,
    leaving: bool,
    guards: Guards,
) -> Place {
    let doubtful = leaving || matches!(state, GuestState::Incoming | GuestState::InDoubt);
    if unconfirmed || doubtful && guards.hold(Guard::DoubtIsToldAsDoubt) {
        Place::Undecided
    } else if moved {
        Place::Elsewhere
    } else {
        Place::Here
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_left_is_not_started_and_what_others_may_have_does_not_run() {
        assert_eq!(bar(Event::Start, true, true), Some(Bar::Left));
        assert_eq!(bar(Event::Start, false, true), Some(Bar::Unconfirmed));
        assert_eq!(bar(Event::Resume, false, true), Some(Bar::Unconfirmed));
        assert_eq!(bar(Event::Start, false, false), None);
        assert_eq!(bar(Event::Stop, true, true), None, "it may always be stopped");
    }

    #[test]
    fn only_the_record_of_a_guest_that_left_makes_way() {
        for state in GuestState::ALL {
            assert!(!makes_way(*state, false), "{state:?}");
            assert_eq!(makes_way(*state, true), *state == GuestState::Stopped, "{state:?}");
        }
        assert!(is_new_session(false, false));
        assert!(!is_new_session(true, false) && !is_new_session(false, true));
    }

    #[test]
    fn nobody_claims_a_guest_that_another_may_get() {
        for state in GuestState::ALL {
            let doubtful = matches!(state, GuestState::Incoming | GuestState::InDoubt);
            let plain = if doubtful { Place::Undecided } else { Place::Here };
            assert_eq!(place(*state, false, false, false), plain, "{state:?}");
            assert_eq!(place(*state, false, false, true), Place::Undecided, "{state:?}");
            assert_eq!(place(*state, true, false, false), Place::Undecided, "{state:?}");
        }
        assert_eq!(place(GuestState::Stopped, false, true, false), Place::Elsewhere);
    }
}
