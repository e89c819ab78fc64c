//! A guest's life cycle as a pure function: which request is legal when, and what it leads to.

use crate::named::named;

named! {
    /// Where a guest is in its life. The names are the API's.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum GuestState {
        /// Defined: no memory, no vCPUs.
        Stopped = "stopped",
        /// A machine is being made.
        Starting = "starting",
        /// The machine runs.
        Running = "running",
        /// The machine is held.
        Paused = "paused",
        /// The machine is being taken apart.
        Stopping = "stopping",
        /// A machine waits for its memory from another host.
        Incoming = "incoming",
        /// Held after START went out, until a token says who runs the guest.
        InDoubt = "in_doubt",
        /// The machine broke down; the record says how. Can be stopped, then started.
        Failed = "failed",
    }
}

/// What happens to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Asked to start.
    Start,
    /// The machine is there and runs.
    Started,
    /// Asked to pause.
    Pause,
    /// Asked to resume.
    Resume,
    /// Asked to stop.
    Stop,
    /// The machine is gone.
    Stopped,
    /// The machine ended or could not be made.
    Broke,
    /// A migration holds the guest for its last round.
    HoldForHandOver,
    /// START went out.
    StartSent,
    /// The destination's ABORT came back, or hand-over was called off before START.
    HandedBack,
    /// The destination's COMMIT came back.
    HandedOver,
    /// The guest arrived here and may run.
    Arrived,
}

/// The event is not legal in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLegal;

impl GuestState {
    /// The next state.
    ///
    /// # Errors
    /// [`NotLegal`]; the state stays.
    pub const fn step(self, event: Event) -> Result<Self, NotLegal> {
        use Event as E;
        Ok(match (self, event) {
            (Self::Stopped, E::Start) => Self::Starting,
            (Self::Starting, E::Started) | (Self::Paused | Self::Running, E::Resume) => Self::Running,
            (Self::Running | Self::Paused, E::Pause | E::HoldForHandOver) => Self::Paused,
            (Self::Running | Self::Paused | Self::Failed, E::Stop) => Self::Stopping,
            (Self::Stopping, E::Stopped) | (Self::InDoubt, E::HandedOver) => Self::Stopped,
            (Self::Paused, E::StartSent) => Self::InDoubt,
            (Self::InDoubt, E::HandedBack) => Self::Paused,
            (Self::Incoming, E::Arrived) => Self::Running,
            (Self::Starting | Self::Running | Self::Paused | Self::Incoming, E::Broke) => Self::Failed,
            _ => return Err(NotLegal),
        })
    }

    /// Whether vCPUs may execute.
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Running)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: [Event; 12] = [
        Event::Start,
        Event::Started,
        Event::Pause,
        Event::Resume,
        Event::Stop,
        Event::Stopped,
        Event::Broke,
        Event::HoldForHandOver,
        Event::StartSent,
        Event::HandedBack,
        Event::HandedOver,
        Event::Arrived,
    ];

    #[test]
    fn every_request_is_legal_where_it_is_said_to_be_and_nowhere_else() {
        use Event as E;
        use GuestState as S;
        // By event: from which states, to which.
        let legal: [(E, &[S], S); 12] = [
            (E::Start, &[S::Stopped], S::Starting),
            (E::Started, &[S::Starting], S::Running),
            // What is so already may be asked for.
            (E::Pause, &[S::Running, S::Paused], S::Paused),
            (E::Resume, &[S::Running, S::Paused], S::Running),
            (E::Stop, &[S::Running, S::Paused, S::Failed], S::Stopping),
            (E::Stopped, &[S::Stopping], S::Stopped),
            // In doubt a machine that breaks stays in doubt: the other host may have the guest.
            (E::Broke, &[S::Starting, S::Running, S::Paused, S::Incoming], S::Failed),
            (E::HoldForHandOver, &[S::Running, S::Paused], S::Paused),
            (E::StartSent, &[S::Paused], S::InDoubt),
            (E::HandedBack, &[S::InDoubt], S::Paused),
            (E::HandedOver, &[S::InDoubt], S::Stopped),
            (E::Arrived, &[S::Incoming], S::Running),
        ];
        for state in S::ALL {
            for event in EVENTS {
                let to = legal.iter().find(|(e, from, _)| *e == event && from.contains(state));
                assert_eq!(state.step(event).ok(), to.map(|(.., to)| *to), "{state:?} and {event:?}");
            }
            assert_eq!(state.may_run(), *state == S::Running);
        }
    }

    proptest! {
        /// After START a guest runs here again only through HandedBack, whatever else is tried.
        #[test]
        fn in_doubt_is_left_by_a_token_only(events in prop::collection::vec(0usize..EVENTS.len(), 0..60)) {
            let mut state = GuestState::Stopped;
            for e in events.into_iter().map(|i| EVENTS[i]) {
                let before = state;
                if let Ok(next) = state.step(e) {
                    state = next;
                }
                if before == GuestState::InDoubt && state != GuestState::InDoubt {
                    prop_assert!(matches!(e, Event::HandedBack | Event::HandedOver));
                }
                if state == GuestState::InDoubt && before != GuestState::InDoubt {
                    prop_assert_eq!(before, GuestState::Paused, "held before START");
                }
                prop_assert!(!(before == GuestState::Stopped && state.may_run()));
            }
        }
    }
}
