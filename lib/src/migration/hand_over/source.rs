//! The source's end, from the point of no return on.
//!
//! Owns: that START is stored, minted and sent in this order, and that the guest goes on here only before
//! that, or when it is told so. Must not know: what tells (`doubt`), how the guest is resumed.
//!
//! ```text
//! Here --> Noting --> Minting --> Sending --> Waiting --> Gone
//!   |        |           |                       |
//!   '--------'-----------'------> Back <---------'
//! ```

use super::doubt::HandOverOutcome;
use super::guards::{Guard, Guards};

/// Where a source is. Each state has one thing to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The guest is this host's. Everything may be called off.
    Here,
    /// To be stored: that START goes out.
    Noting,
    /// To be minted: START.
    Minting,
    /// To be sent: START.
    Sending,
    /// START is out, or may be. The guest is held until somebody tells whose it is.
    Waiting,
    /// The guest stays, and goes on if it ran.
    Back,
    /// The guest is the destination's.
    Gone,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The point of no return is passed.
    Passed,
    /// It was called off, or cannot go on.
    Failed,
    /// It is stored that START goes out.
    Noted,
    /// The store says that it is not.
    NotNoted,
    /// The helper has minted START.
    Minted,
    /// Or has not, or cannot be asked: nobody has seen START.
    NotMinted,
    /// START was sent, and may have arrived whatever the link says.
    Sent,
    /// No answer came.
    Silence,
    /// It is known whose the guest is.
    Told(HandOverOutcome),
}

impl Source {
    /// The next state; what does not belong into a state changes nothing.
    #[must_use]
    pub const fn step(self, event: SourceEvent) -> Self {
        self.step_under(event, Guards::ALL)
    }

    pub const fn step_under(self, event: SourceEvent, guards: Guards) -> Self {
        use SourceEvent as E;
        match (self, event) {
            (Self::Here, E::Passed) if guards.hold(Guard::StartNotedFirst) => Self::Noting,
            (Self::Noting, E::NotNoted) if guards.hold(Guard::StartOnlyWhenNoted) => Self::Back,
            (Self::Here, E::Passed) | (Self::Noting, E::Noted | E::NotNoted) => Self::Minting,
            (Self::Here, E::Failed) | (Self::Minting, E::NotMinted) => Self::Back,
            (Self::Minting, E::Minted) => Self::Sending,
            (Self::Sending, E::Sent) => Self::Waiting,
            (Self::Waiting, E::Silence) if !guards.hold(Guard::SilenceDecidesNothing) => Self::Back,
            (Self::Waiting, E::Told(HandOverOutcome::NeverCommitted)) => Self::Back,
            (Self::Waiting, E::Told(HandOverOutcome::Committed)) => Self::Gone,
            (
                Self::Here
                | Self::Noting
                | Self::Minting
                | Self::Sending
                | Self::Waiting
                | Self::Back
                | Self::Gone,
                E::Passed
                | E::Failed
                | E::Noted
                | E::NotNoted
                | E::Minted
                | E::NotMinted
                | E::Sent
                | E::Silence
                | E::Told(_),
            ) => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_is_stored_then_minted_then_sent() {
        use SourceEvent as E;
        let mut at = Source::Here;
        for (event, next) in [
            (E::Passed, Source::Noting),
            (E::Noted, Source::Minting),
            (E::Minted, Source::Sending),
            (E::Sent, Source::Waiting),
        ] {
            at = at.step(event);
            assert_eq!(at, next);
        }
        assert_eq!(at.step(E::Told(HandOverOutcome::Committed)), Source::Gone);
        assert_eq!(at.step(E::Told(HandOverOutcome::NeverCommitted)), Source::Back);
    }

    #[test]
    fn the_guest_goes_on_before_start_or_when_told() {
        use SourceEvent as E;
        assert_eq!(Source::Here.step(E::Failed), Source::Back);
        assert_eq!(Source::Noting.step(E::NotNoted), Source::Back);
        assert_eq!(Source::Minting.step(E::NotMinted), Source::Back);
        for event in [E::Failed, E::Silence, E::NotNoted, E::NotMinted, E::Passed] {
            assert_eq!(Source::Waiting.step(event), Source::Waiting, "{event:?}");
            assert_eq!(Source::Gone.step(event), Source::Gone, "{event:?}");
        }
    }
}
