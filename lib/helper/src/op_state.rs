//! The op-states of a migration's two ends, after Intel TDX 1.5 (`op_state_lookup` of the TDX module).
//!
//! Pure: a state and an event give the next state or a refusal. The helper enforces them; the hosts journal
//! the same values. What makes two running copies impossible is in two lines: a source in `PostExport`
//! leaves it for `Running` on the destination's ABORT token alone, and a destination that has minted ABORT
//! is in `FailedImport` for ever, one that has minted COMMIT in `LiveImport`.
//!
//! ```text
//! source:       Running -> LiveExport -> PausedExport -> PostExport -> Done
//!                  ^---- Cancel ----'---------'              |
//!                  ^------------- ABORT token ---------------'
//! destination:  Idle -> MemoryImport -> StateImport -> PostImport -> LiveImport
//!                            '---------------'-------------'-> FailedImport (mints ABORT)
//! ```
//!
//! The destination's tokens are good from `LiveExport` on. In a helper whose memory only ever went forward
//! COMMIT comes in `PostExport` alone; in one that was put back to before START it is what leads it forward
//! again. That such a helper takes `Cancel` is why its host must not ask for it once it has noted START.
//!
//! A helper in `LiveImport` holds a guest that runs: for a next session it is a source in `Running`, and
//! never a destination again.

/// Where the exporting end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceOp {
    /// No session; the guest may run.
    Running,
    /// Pages leave while the guest runs.
    LiveExport,
    /// The guest is paused; the last pages leave.
    PausedExport,
    /// START is out; the guest may not run.
    PostExport,
    /// The destination has it.
    Done,
}

/// What happens to the exporting end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// A session begins.
    Begin,
    /// The guest was paused.
    Pause,
    /// START is minted.
    Start,
    /// The destination's ABORT token was checked.
    AbortToken,
    /// The destination's COMMIT token was checked.
    CommitToken,
    /// Called off before START.
    Cancel,
}

/// The event is not legal in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongState;

impl SourceOp {
    /// The next state.
    ///
    /// # Errors
    /// [`WrongState`]; the state stays.
    pub const fn step(self, event: SourceEvent) -> Result<Self, WrongState> {
        use SourceEvent as E;
        Ok(match (self, event) {
            (Self::Running, E::Begin) => Self::LiveExport,
            (Self::LiveExport, E::Pause) => Self::PausedExport,
            (Self::LiveExport | Self::PausedExport, E::Cancel)
            | (Self::LiveExport | Self::PausedExport | Self::PostExport, E::AbortToken) => Self::Running,
            (Self::PausedExport, E::Start) => Self::PostExport,
            // A genuine COMMIT says that START was minted, whatever this memory says: somebody has put it
            // back to what it was before.
            (Self::LiveExport | Self::PausedExport | Self::PostExport, E::CommitToken) => Self::Done,
            (
                Self::Running | Self::LiveExport | Self::PausedExport | Self::PostExport | Self::Done,
                E::Begin | E::Pause | E::Start | E::AbortToken | E::CommitToken | E::Cancel,
            ) => return Err(WrongState),
        })
    }

    /// Whether the guest may execute at this end.
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Running | Self::LiveExport)
    }

    /// Whether pages may leave.
    pub const fn may_export(self) -> bool {
        matches!(self, Self::LiveExport | Self::PausedExport)
    }
}

/// Where the importing end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationOp {
    /// No session.
    Idle,
    /// Pages arrive.
    MemoryImport,
    /// vCPU and device state have arrived.
    StateImport,
    /// START was checked; the guest is complete and may be committed or given up.
    PostImport,
    /// Committed: the guest may run here.
    LiveImport,
    /// Given up for good.
    FailedImport,
}

/// What happens to the importing end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// A session begins.
    Begin,
    /// vCPU and device state arrived.
    State,
    /// The START token was checked.
    StartToken,
    /// COMMIT is minted.
    Commit,
    /// The import failed or is given up; ABORT may be minted.
    Fail,
}

impl DestinationOp {
    /// The next state.
    ///
    /// # Errors
    /// [`WrongState`]; the state stays.
    pub const fn step(self, event: DestinationEvent) -> Result<Self, WrongState> {
        use DestinationEvent as E;
        Ok(match (self, event) {
            (Self::Idle, E::Begin) => Self::MemoryImport,
            (Self::MemoryImport, E::State) => Self::StateImport,
            (Self::StateImport, E::StartToken) => Self::PostImport,
            (Self::PostImport, E::Commit) => Self::LiveImport,
            (Self::MemoryImport | Self::StateImport | Self::PostImport | Self::FailedImport, E::Fail) => {
                Self::FailedImport
            }
            (
                Self::Idle
                | Self::MemoryImport
                | Self::StateImport
                | Self::PostImport
                | Self::LiveImport
                | Self::FailedImport,
                E::Begin | E::State | E::StartToken | E::Commit | E::Fail,
            ) => return Err(WrongState),
        })
    }

    /// Whether the guest may execute at this end.
    pub const fn may_run(self) -> bool {
        matches!(self, Self::LiveImport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type S = SourceOp;
    type D = DestinationOp;

    const SOURCE: [S; 5] = [S::Running, S::LiveExport, S::PausedExport, S::PostExport, S::Done];
    const DESTINATION: [D; 6] =
        [D::Idle, D::MemoryImport, D::StateImport, D::PostImport, D::LiveImport, D::FailedImport];

    /// Every state after `event`, in the order above; where it is refused, none.
    fn source(event: SourceEvent) -> [Option<S>; 5] {
        SOURCE.map(|state| state.step(event).ok())
    }

    fn destination(event: DestinationEvent) -> [Option<D>; 6] {
        DESTINATION.map(|state| state.step(event).ok())
    }

    #[test]
    fn a_source_takes_a_step_only_from_where_it_may() {
        use SourceEvent as E;
        let (running, done) = (Some(S::Running), Some(S::Done));
        assert_eq!(source(E::Begin), [Some(S::LiveExport), None, None, None, None]);
        assert_eq!(source(E::Pause), [None, Some(S::PausedExport), None, None, None]);
        // START says that the guest is complete, which it is only while it is held.
        assert_eq!(source(E::Start), [None, None, Some(S::PostExport), None, None]);
        // After START nothing but the destination's word leads back.
        assert_eq!(source(E::Cancel), [None, running, running, None, None]);
        assert_eq!(source(E::AbortToken), [None, running, running, running, None]);
        assert_eq!(source(E::CommitToken), [None, done, done, done, None]);
    }

    #[test]
    fn a_destination_takes_a_step_only_from_where_it_may() {
        use DestinationEvent as E;
        let failed = Some(D::FailedImport);
        assert_eq!(destination(E::Begin), [Some(D::MemoryImport), None, None, None, None, None]);
        assert_eq!(destination(E::State), [None, Some(D::StateImport), None, None, None, None]);
        assert_eq!(destination(E::StartToken), [None, None, Some(D::PostImport), None, None, None]);
        // COMMIT only with a complete guest, and never beside ABORT.
        assert_eq!(destination(E::Commit), [None, None, None, Some(D::LiveImport), None, None]);
        assert_eq!(destination(E::Fail), [None, failed, failed, failed, None, failed]);
    }

    #[test]
    fn a_guest_executes_and_its_pages_leave_only_where_they_may() {
        assert_eq!(SOURCE.map(S::may_run), [true, true, false, false, false]);
        assert_eq!(SOURCE.map(S::may_export), [false, true, true, false, false]);
        // Complete is not committed: until COMMIT the source may get it back.
        assert_eq!(DESTINATION.map(D::may_run), [false, false, false, false, true, false]);
    }
}
