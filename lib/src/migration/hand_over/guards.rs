//! The rules that keep a guest from running twice and from being lost, by name.
//!
//! Owns: the closed list, and that the program always keeps all of them. Must not know: what each is for; the
//! functions that keep them say so.

/// Makes the list, and one to go through for tests.
macro_rules! guards {
    ($($(#[$about:meta])+ $guard:ident,)+) => {
        /// One rule.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Guard {
            $($(#[$about])+ $guard,)+
        }

        impl Guard {
            /// The whole list.
            #[cfg(test)]
            pub const EACH: &'static [Self] = &[$(Self::$guard),+];
        }
    };
}

guards! {
    /// A migration is not called off once START may have gone out, or COMMIT may be minted.
    NoCallingOffPast,
    /// That START goes out is stored before it is minted.
    StartNotedFirst,
    /// START that could not be stored is not minted.
    StartOnlyWhenNoted,
    /// After START, silence and broken links decide nothing.
    SilenceDecidesNothing,
    /// A token is believed when the helper has opened it.
    TokensAreOpened,
    /// Above protection level `none`, a host's statement does not end a doubt whose helper lives.
    HostsAreBelievedWhereTrusted,
    /// A token that was carried by hand, and that nobody can open, ends nothing.
    UnopenedTokensEndNothing,
    /// COMMIT is stored before the source is told.
    CommitNotedBeforeTold,
    /// COMMIT is stored before the guest runs.
    CommitNotedBeforeRun,
    /// A guest whose COMMIT is minted is not given up because the store refuses.
    CommitIsKept,
    /// An import that is under way is not answered with a "never".
    UnderWayIsPending,
    /// Whether it is under way is looked at before the journal: after it, an import may have ended meanwhile.
    UnderWayIsLookedAtFirst,
    /// An open import of a host whose state is older than what others know is not answered with a "never".
    OldStateIsPending,
    /// A migration whose START was stored is in doubt after a restart.
    DoubtOutlivesRestarts,
    /// And holds its guest, whatever the guest's own record says.
    DoubtHoldsItsGuest,
    /// An import whose COMMIT was stored has arrived, whatever the guest's own record says.
    CommittedHasArrived,
    /// One whose COMMIT was not has not.
    UncommittedHasNot,
    /// A guest that has left is not started.
    LeftIsNotStarted,
    /// A guest that others may have by now is not started.
    UnconfirmedIsNotStarted,
    /// Guests of a state that was put back are unconfirmed.
    OldStateIsUnconfirmed,
    /// Only the record of a guest that has left makes way for one that arrives.
    OnlyWhatLeftMakesWay,
    /// A session is good for one import.
    SessionsAreUsedOnce,
    /// Nobody says that he has a guest whose START went out.
    DoubtIsToldAsDoubt,
}

/// The rules that hold: all of them. Only a test can make a set that lacks one.
#[derive(Clone, Copy, Debug)]
pub struct Guards {
    #[cfg(test)]
    without: Option<Guard>,
}

impl Guards {
    pub const ALL: Self = Self {
        #[cfg(test)]
        without: None,
    };

    /// All but one.
    #[cfg(test)]
    pub const fn without(guard: Guard) -> Self {
        Self { without: Some(guard) }
    }

    /// Whether a rule holds.
    #[cfg(test)]
    pub const fn hold(self, guard: Guard) -> bool {
        match self.without {
            Some(missing) => missing as u8 != guard as u8,
            None => true,
        }
    }

    /// Whether a rule holds.
    #[cfg(not(test))]
    pub const fn hold(self, _: Guard) -> bool {
        true
    }
}
