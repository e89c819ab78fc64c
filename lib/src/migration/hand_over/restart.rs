//! What the next daemon makes of what an earlier one stored.
//!
//! Owns: what a migration's and a guest's record mean when nobody works on them any more. Must not know: how
//! they are read and written.

use super::guards::{Guard, Guards};
use crate::guest::lifecycle::GuestState;
use crate::migration::terms::MigrationState;

/// What a migration comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FoundMigration {
    /// It had ended.
    Ended,
    /// START may have gone out: the destination is asked, and the guest held meanwhile.
    InDoubt,
    /// COMMIT was stored, and the record's own end was not.
    Moved,
    /// It had not come so far.
    Failed,
}

/// Of a record that says `state`. `committed`: at a destination, whether the journal has COMMIT.
pub const fn found_migration(state: MigrationState, committed: bool) -> FoundMigration {
    found_migration_under(state, committed, Guards::ALL)
}

pub const fn found_migration_under(state: MigrationState, committed: bool, guards: Guards) -> FoundMigration {
    if state.is_terminal() {
        FoundMigration::Ended
    } else if committed {
        FoundMigration::Moved
    } else if matches!(state, MigrationState::InDoubt) && guards.hold(Guard::DoubtOutlivesRestarts) {
        FoundMigration::InDoubt
    } else {
        FoundMigration::Failed
    }
}

/// What a guest comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FoundGuest {
    /// It never was here; what was here before it is.
    NeverArrived,
    /// Nobody knows yet whose it is.
    Held,
    /// It is defined, and its memory is lost if it had one.
    Stopped,
}

/// Of a record that says `state`. `committed`: whether the journal has COMMIT of the migration that brought
/// it. `old_state`: the records are older than what others may know. `doubted`: one of this host's migrations
/// is [in doubt](FoundMigration::InDoubt) over it.
pub const fn found_guest(state: GuestState, committed: bool, old_state: bool, doubted: bool) -> FoundGuest {
    found_guest_under(state, committed, old_state, doubted, Guards::ALL)
}

pub const fn found_guest_under(
    state: GuestState,
    committed: bool,
    old_state: bool,
    doubted: bool,
    guards: Guards,
) -> FoundGuest {
    // A record that was written after START says that the guest is held, as it was shown then.
    if doubted && guards.hold(Guard::DoubtHoldsItsGuest) {
        return FoundGuest::Held;
    }
    match state {
        GuestState::InDoubt => FoundGuest::Held,
        GuestState::Incoming if committed && guards.hold(Guard::CommittedHasArrived) => FoundGuest::Stopped,
        // Who can be sure of that where the state is old?
        GuestState::Incoming if old_state || !guards.hold(Guard::UncommittedHasNot) => FoundGuest::Stopped,
        GuestState::Incoming => FoundGuest::NeverArrived,
        GuestState::Stopped
        | GuestState::Starting
        | GuestState::Running
        | GuestState::Paused
        | GuestState::Stopping
        | GuestState::Failed => FoundGuest::Stopped,
    }
}

/// Whether others may have the guest by now. `was`: what its record says; `moved`: that record says that it
/// has left.
pub const fn is_unconfirmed(was: bool, old_state: bool, moved: bool) -> bool {
    is_unconfirmed_under(was, old_state, moved, Guards::ALL)
}

pub const fn is_unconfirmed_under(was: bool, old_state: bool, moved: bool, guards: Guards) -> bool {
    was || old_state && !moved && guards.hold(Guard::OldStateIsUnconfirmed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_is_in_doubt_after_a_restart_from_start_on_and_failed_before() {
        for state in MigrationState::ALL {
            let found = found_migration(*state, false);
            let expected = match state {
                MigrationState::InDoubt => FoundMigration::InDoubt,
                MigrationState::Succeeded | MigrationState::Failed | MigrationState::Canceled => {
                    FoundMigration::Ended
                }
                MigrationState::Queued
                | MigrationState::Preparing
                | MigrationState::Precopy
                | MigrationState::Switchover
                | MigrationState::Finishing => FoundMigration::Failed,
            };
            assert_eq!(found, expected, "{state:?}");
            let committed = found_migration(*state, true);
            assert_eq!(committed == FoundMigration::Ended, state.is_terminal(), "{state:?}");
            assert!(matches!(committed, FoundMigration::Ended | FoundMigration::Moved));
        }
    }

    #[test]
    fn a_guest_that_was_arriving_is_here_if_commit_was_stored_and_never_was_if_not() {
        assert_eq!(found_guest(GuestState::Incoming, false, false, false), FoundGuest::NeverArrived);
        assert_eq!(found_guest(GuestState::Incoming, true, false, false), FoundGuest::Stopped);
        let of_old_state = found_guest(GuestState::Incoming, false, true, false);
        assert_eq!(of_old_state, FoundGuest::Stopped, "kept, and unconfirmed");
        assert!(is_unconfirmed(false, true, false));
        assert!(!is_unconfirmed(false, true, true), "what has left is not asked for");
        assert!(is_unconfirmed(true, false, false), "until somebody confirms it");
    }

    #[test]
    fn a_guest_in_doubt_is_held_whatever_its_record_says() {
        for state in GuestState::ALL {
            assert_eq!(found_guest(*state, false, false, true), FoundGuest::Held, "{state:?}");
            let held = found_guest(*state, true, false, false) == FoundGuest::Held;
            assert_eq!(held, *state == GuestState::InDoubt, "{state:?}");
        }
    }
}
