//! The handle on a running migration: cancelling it, watching it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::host::{MigrationLimits, MigrationState, Progress, Round};
use crate::transport::LinkCanceller;

/// What can be seen of a migration while it runs; stays as it was after the end.
#[derive(Clone, Debug)]
pub struct Live {
    /// Where it is.
    pub state: MigrationState,
    /// How far.
    pub progress: Progress,
    /// Rounds so far.
    pub rounds: Vec<Round>,
    /// Goes up with every change.
    pub version: u64,
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
    cancelled: bool,
    past: bool,
    switchover: bool,
    links: Vec<LinkCanceller>,
}

impl Control {
    /// A migration that starts in `state` under `limits`; `changed` is called after every change, without locks held.
    pub fn new(state: MigrationState, limits: MigrationLimits, changed: Box<dyn Fn() + Send + Sync>) -> Self {
        let live = Live { state, progress: Progress::default(), rounds: Vec::new(), version: 1 };
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
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Longest silence of the peer.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.limits().stall_timeout_ms)
    }

    /// Changes the limits: bandwidth from the next batch on, the rest from the next look at it.
    pub fn set_limits(&self, limits: MigrationLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Asks for the switchover now, whatever pause it costs.
    ///
    /// # Errors
    /// When START may have gone out.
    pub fn switch_over(&self) -> Result<(), PastPointOfNoReturn> {
        let mut gate = self.gate();
        if gate.past {
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
        if gate.past {
            return Err(PastPointOfNoReturn);
        }
        gate.cancelled = true;
        gate.links.iter().for_each(LinkCanceller::cancel);
        self.called_off.notify_all();
        Ok(())
    }

    /// Whether it was called off.
    pub fn is_cancelled(&self) -> bool {
        self.gate().cancelled
    }

    /// Waits for `pause`, or until it is called off: true then.
    pub fn pause(&self, pause: Duration) -> bool {
        let waited = self.called_off.wait_timeout_while(self.gate(), pause, |gate| !gate.cancelled);
        waited.unwrap_or_else(PoisonError::into_inner).0.cancelled
    }

    /// Lets cancelling reach a link.
    pub fn register(&self, link: LinkCanceller) {
        let mut gate = self.gate();
        if gate.cancelled {
            link.cancel();
        }
        gate.links.push(link);
    }

    /// From here nothing can be called off; false when it was already.
    pub fn pass_point_of_no_return(&self) -> bool {
        let mut gate = self.gate();
        gate.past = !gate.cancelled;
        gate.past
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
