//! The handle on a running migration: cancelling it, watching it.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::hand_over::Leave;
use super::{Audit, Evidence, MigrationFault, MigrationLimits, MigrationState, Progress, Round};
use crate::guest::{MachineEnd, MachineError};
use crate::sync::{Locked, WaitLocked};
use crate::transport::LinkCanceller;

/// Rounds that are kept; what a record may hold is bounded, and so is what its storing takes.
const ROUNDS_MAX: usize = 4096;

/// What can be seen of a migration while it runs; stays as it was after the end.
#[derive(Clone, Debug)]
pub struct Live {
    /// Where it is.
    pub state: MigrationState,
    /// How far.
    pub progress: Progress,
    /// Rounds so far, the first `ROUNDS_MAX` of them.
    pub rounds: Vec<Round>,
    /// Whether COMMIT is minted and the destination's store does not take it yet.
    pub committing: bool,
    /// What became of the audit so far; `None`: there is none, or it has not begun.
    pub audit: Option<Audit>,
    /// What the source's helper was shown of the destination; `None`: it has not come to that.
    pub evidence: Option<Evidence>,
    /// Goes up with every change.
    pub version: u64,
}

impl Live {
    /// Notes a round.
    pub fn push_round(&mut self, round: Round) {
        if self.rounds.len() < ROUNDS_MAX {
            self.rounds.push(round);
        }
    }
}

/// Cancelling came too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PastPointOfNoReturn;

/// Shared between a migration's thread and whoever watches or cancels it.
pub struct Control {
    live: Mutex<Live>,
    gate: Mutex<Gate>,
    called_off: Condvar,
    limits: Mutex<MigrationLimits>,
    changed: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Gate {
    leave: Leave,
    /// Whether it was called off by request.
    cancelled: bool,
    switchover: bool,
    /// How the guest ended, if it did while it could still be called off.
    guest_end: Option<MachineEnd>,
    links: Vec<LinkCanceller>,
    /// The link that the peer ends when it gives up.
    peer: Option<LinkCanceller>,
}

impl Gate {
    /// Whether this side has called it off.
    const fn is_over(&self) -> bool {
        matches!(self.leave, Leave::CalledOff)
    }

    const fn is_past(&self) -> bool {
        matches!(self.leave, Leave::Past)
    }
}

impl Control {
    /// A migration that starts in `state` under `limits`; `changed` is called after every change, without
    /// locks held.
    pub fn new(state: MigrationState, limits: MigrationLimits, changed: Box<dyn Fn() + Send + Sync>) -> Self {
        let progress = Progress::default();
        let live = Live {
            state,
            progress,
            rounds: Vec::new(),
            committing: false,
            audit: None,
            evidence: None,
            version: 1,
        };
        Self {
            live: Mutex::new(live),
            gate: Mutex::default(),
            called_off: Condvar::new(),
            limits: Mutex::new(limits),
            changed,
        }
    }

    /// A snapshot.
    pub fn live(&self) -> Live {
        self.lock().clone()
    }

    /// Where it is.
    pub fn state(&self) -> MigrationState {
        self.lock().state
    }

    /// Changes what can be seen.
    pub fn update(&self, change: impl FnOnce(&mut Live)) {
        {
            let mut live = self.lock();
            change(&mut live);
            live.version += 1;
        }
        (self.changed)();
    }

    /// The limits as they are now.
    pub fn limits(&self) -> MigrationLimits {
        *self.limits.locked()
    }

    /// Longest silence of the peer.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.limits().stall_timeout_ms)
    }

    /// Changes the limits: bandwidth from the next batch on, the rest from the next look at it.
    pub fn set_limits(&self, limits: MigrationLimits) {
        *self.limits.locked() = limits;
    }

    /// Asks for the switchover now, whatever pause it costs.
    ///
    /// # Errors
    /// When START may have gone out.
    pub fn switch_over(&self) -> Result<(), PastPointOfNoReturn> {
        let mut gate = self.gate();
        if gate.is_past() {
            return Err(PastPointOfNoReturn);
        }
        gate.switchover = true;
        Ok(())
    }

    /// Whether the switchover was asked for.
    pub fn wants_switchover(&self) -> bool {
        self.gate().switchover
    }

    /// Moves to another state.
    pub fn enter(&self, state: MigrationState) {
        self.update(|l| l.state = state);
    }

    /// Calls the migration off: blocked calls on its links return.
    ///
    /// # Errors
    /// When START may have gone out.
    pub fn cancel(&self) -> Result<(), PastPointOfNoReturn> {
        let mut gate = self.gate();
        gate.leave = gate.leave.call_off().map_err(|_| PastPointOfNoReturn)?;
        gate.cancelled = true;
        gate.links.iter().for_each(LinkCanceller::cancel);
        self.called_off.notify_all();
        Ok(())
    }

    /// Whether START may have gone out.
    pub fn is_past(&self) -> bool {
        self.gate().is_past()
    }

    /// The guest has ended by itself: what was to be moved is no more, and blocked calls on the links return.
    /// From the point of no return on this changes nothing: then only a token tells whose guest it was.
    pub fn guest_ended(&self, end: &MachineEnd) {
        let mut gate = self.gate();
        if gate.guest_end.is_none()
            && let Ok(called_off) = gate.leave.call_off()
        {
            gate.leave = called_off;
            gate.guest_end = Some(end.clone());
            self.called_off.notify_all();
            gate.links.iter().for_each(LinkCanceller::cancel);
        }
    }

    /// Whether work on the migration is of no more use: it was called off, the guest has ended, or the peer
    /// has gone.
    pub fn is_cancelled(&self) -> bool {
        let gate = self.gate();
        gate.is_over() || gate.peer.as_ref().is_some_and(LinkCanceller::ended)
    }

    /// Why it is called off from this side, if it is: by request, or because the guest has ended.
    pub fn called_off(&self) -> Option<MigrationFault> {
        let gate = self.gate();
        let ended = || gate.guest_end.clone().map(|end| MachineError::Ended(end).into());
        if gate.cancelled { Some(MigrationFault::Canceled) } else { ended() }
    }

    /// Has [`Control::is_cancelled`] look whether the peer has ended this link.
    pub fn watch_peer(&self, link: LinkCanceller) {
        self.gate().peer = Some(link);
    }

    /// Waits for `pause`, or until it is called off: true then.
    pub fn pause(&self, pause: Duration) -> bool {
        let by = Instant::now() + pause;
        let mut gate = self.gate();
        while !gate.is_over() {
            let Some(left) = by.checked_duration_since(Instant::now()) else { break };
            gate = self.called_off.wait_locked_for(gate, left);
        }
        gate.is_over()
    }

    /// Lets cancelling reach a link.
    pub fn register(&self, link: LinkCanceller) {
        let mut gate = self.gate();
        if gate.is_over() {
            link.cancel();
        }
        gate.links.push(link);
    }

    /// From here nothing can be called off; false when it was already.
    pub fn pass_point_of_no_return(&self) -> bool {
        let mut gate = self.gate();
        gate.leave = gate.leave.pass();
        gate.is_past()
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.locked()
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.locked()
    }
}
