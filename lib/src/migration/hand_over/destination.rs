//! The destination's end, from the moment that START was opened on.
//!
//! Owns: that COMMIT is minted, stored, told and acted upon in this order, and that nothing gives the guest
//! up once it is minted. Must not know: how the store is asked again, what is told.
//!
//! ```text
//! Receiving --> Complete --> Minting --> Noting --> Telling --> Running --> Here
//!     |            |            |          '--> Left
//!     '------------'------------'--> GivingUp
//! ```

use super::guards::{Guard, Guards};

/// Where a destination is. Each state has one thing to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Pages, state and START arrive.
    Receiving,
    /// START was opened: the guest is complete. To be passed: the point of no return.
    Complete,
    /// To be minted: COMMIT.
    Minting,
    /// To be stored: COMMIT, with the records of guest and migration.
    Noting,
    /// To be told: COMMIT.
    Telling,
    /// To be run, unless it was paused: the guest.
    Running,
    /// The guest has arrived.
    Here,
    /// To be minted, stored and told: ABORT. The guest never was here.
    GivingUp,
    /// The host goes before COMMIT was stored. Nobody has seen it.
    Left,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// The helper has opened START.
    Started,
    /// It was called off, or cannot go on.
    Failed,
    /// The point of no return is passed.
    Passed,
    /// The helper has minted COMMIT.
    Minted,
    /// Or has not, or cannot be asked: nobody has seen COMMIT.
    NotMinted,
    /// COMMIT is stored.
    Noted,
    /// The store says that it is not.
    NotNoted,
    /// The host goes.
    Leaving,
    /// COMMIT was sent, whether or not it arrived.
    Told,
    /// The guest runs, or cannot be run; it is this host's either way.
    Ran,
}

/// What is done about a COMMIT that is minted, in this order.
const ORDER: [Destination; 3] = [Destination::Noting, Destination::Telling, Destination::Running];

const fn order(guards: Guards) -> [Destination; 3] {
    let [note, tell, run] = ORDER;
    if !guards.hold(Guard::CommitNotedBeforeTold) {
        [tell, note, run]
    } else if !guards.hold(Guard::CommitNotedBeforeRun) {
        [run, note, tell]
    } else {
        ORDER
    }
}

impl Destination {
    /// The next state; what does not belong into a state changes nothing.
    #[must_use]
    pub const fn step(self, event: DestinationEvent) -> Self {
        self.step_under(event, Guards::ALL)
    }

    pub const fn step_under(self, event: DestinationEvent, guards: Guards) -> Self {
        self.step_in(event, guards, order(guards))
    }

    /// The next state where a minted COMMIT is dealt with in an order.
    pub const fn step_in(self, event: DestinationEvent, guards: Guards, order: [Self; 3]) -> Self {
        use DestinationEvent as E;
        match (self, event) {
            (Self::Receiving, E::Started) => Self::Complete,
            (Self::Receiving | Self::Complete, E::Failed) | (Self::Minting, E::NotMinted) => Self::GivingUp,
            (Self::Complete, E::Passed) => Self::Minting,
            (Self::Minting, E::Minted) => order[0],
            (Self::Noting, E::Noted) | (Self::Telling, E::Told) | (Self::Running, E::Ran) => {
                self.next_in(order)
            }
            (Self::Noting, E::NotNoted) if !guards.hold(Guard::CommitIsKept) => Self::GivingUp,
            (Self::Noting, E::Leaving) => Self::Left,
            (
                Self::Receiving
                | Self::Complete
                | Self::Minting
                | Self::Noting
                | Self::Telling
                | Self::Running
                | Self::Here
                | Self::GivingUp
                | Self::Left,
                E::Started
                | E::Failed
                | E::Passed
                | E::Minted
                | E::NotMinted
                | E::Noted
                | E::NotNoted
                | E::Leaving
                | E::Told
                | E::Ran,
            ) => self,
        }
    }

    const fn next_in(self, [first, second, third]: [Self; 3]) -> Self {
        if self as u8 == first as u8 {
            second
        } else if self as u8 == second as u8 {
            third
        } else {
            Self::Here
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commit_is_minted_stored_told_and_acted_upon_in_this_order() {
        use DestinationEvent as E;
        let mut at = Destination::Receiving;
        for (event, next) in [
            (E::Started, Destination::Complete),
            (E::Passed, Destination::Minting),
            (E::Minted, Destination::Noting),
            (E::Noted, Destination::Telling),
            (E::Told, Destination::Running),
            (E::Ran, Destination::Here),
        ] {
            at = at.step(event);
            assert_eq!(at, next);
        }
    }

    #[test]
    fn nothing_gives_a_guest_up_whose_commit_is_minted() {
        use DestinationEvent as E;
        for at in [Destination::Noting, Destination::Telling, Destination::Running, Destination::Here] {
            for event in [E::Failed, E::NotMinted, E::NotNoted] {
                assert_eq!(at.step(event), at, "{event:?}");
            }
        }
        assert_eq!(Destination::Noting.step(E::Leaving), Destination::Left, "nobody has seen it");
        assert_eq!(Destination::Telling.step(E::Leaving), Destination::Telling);
    }

    #[test]
    fn what_fails_before_commit_is_given_up() {
        use DestinationEvent as E;
        assert_eq!(Destination::Receiving.step(E::Failed), Destination::GivingUp);
        assert_eq!(Destination::Complete.step(E::Failed), Destination::GivingUp);
        assert_eq!(Destination::Minting.step(E::NotMinted), Destination::GivingUp);
        assert_eq!(Destination::Receiving.step(E::Passed), Destination::Receiving, "START was not opened");
    }
}
