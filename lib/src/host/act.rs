//! What somebody asked for, on its way through the host: what is to be written together with the first record
//! of it.
//!
//! Owns: that it is written once, in the transaction of that record, wherever in the host that record is
//! made. Must not know: what it is that is written along (the daemon's audit log and kept answers).
//!
//! An act goes with the task that carries it out, and with commands to other tasks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::events::ResourceKind;
use super::images::types::ImageRecord;
use super::migrations::ticket::Ticket;
use super::{GuestRecord, HostSettings, MigrationRecord, PeerRecord};
use crate::store::Batch;
use crate::sync::Locked;
use uuid::Uuid;

/// What an act did, as the record says that is stored with it.
#[derive(Clone, Copy, Debug)]
pub enum Effect<'a> {
    /// A guest was defined or changed.
    Guest(&'a GuestRecord),
    /// A migration was begun or changed.
    Migration(&'a MigrationRecord),
    /// A peer was made known or changed.
    Peer(&'a PeerRecord),
    /// The host has other settings.
    Settings(&'a HostSettings),
    /// A helper image was made or filled.
    Image(&'a ImageRecord),
    /// Leave was given for an incoming migration.
    Ticket(&'a Ticket),
    /// A bearer token was made or withdrawn.
    Token(Uuid),
    /// Something is gone.
    Gone(ResourceKind, Uuid),
}

/// Adds to the batch of an effect what is to be written along.
pub type Along = Box<dyn FnOnce(&Effect<'_>, &mut Batch) + Send>;

/// An act; cheap to clone.
#[derive(Clone, Default)]
pub struct Act(Arc<State>);

#[derive(Default)]
struct State {
    along: Mutex<Vec<Along>>,
    recorded: AtomicBool,
    /// Whatever lives as long as any part of the act goes on.
    guard: Mutex<Option<Box<dyn Send>>>,
}

impl std::fmt::Debug for Act {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Act").field("recorded", &self.is_recorded()).finish_non_exhaustive()
    }
}

tokio::task_local! {
    static CURRENT: Option<Act>;
}

impl Act {
    /// An act that keeps `guard` until its last part is over.
    pub fn new(guard: impl Send + 'static) -> Self {
        let act = Self::default();
        *act.0.guard.locked() = Some(Box::new(guard));
        act
    }

    /// Has `along` called for the first record that the act makes.
    pub fn write_along(&self, along: impl FnOnce(&Effect<'_>, &mut Batch) + Send + 'static) {
        self.0.along.locked().push(Box::new(along));
    }

    /// Whether a record of the act is on disk, and with it what was to be written along.
    pub fn is_recorded(&self) -> bool {
        self.0.recorded.load(Ordering::SeqCst)
    }

    /// Adds to a batch what the current task's act wants to have written along with its first record.
    pub fn ride(effect: &Effect<'_>, batch: &mut Batch) -> Riding {
        along(effect, batch)
    }

    /// The act that the current task carries out.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok().flatten()
    }

    /// Carries out a future as part of `act`.
    pub async fn scope<F: Future>(act: Option<Self>, part: F) -> F::Output {
        CURRENT.scope(act, part).await
    }

    /// Carries out a function as part of `act`.
    pub fn sync_scope<R>(act: Option<Self>, part: impl FnOnce() -> R) -> R {
        CURRENT.sync_scope(act, part)
    }
}

/// What rides along in a batch; told when the batch is on disk.
#[must_use = "the act must hear that its record is on disk"]
#[derive(Debug)]
pub struct Riding(Option<Act>);

impl Riding {
    /// The batch is on disk.
    pub fn arrived(self) {
        if let Some(act) = self.0 {
            act.0.recorded.store(true, Ordering::SeqCst);
        }
    }
}

/// Adds what the current act wants to have written along with its first record. A record that is refused
/// takes it away with it: the act has failed then.
pub(super) fn along(effect: &Effect<'_>, batch: &mut Batch) -> Riding {
    let Some(act) = Act::current() else { return Riding(None) };
    let all = std::mem::take(&mut *act.0.along.locked());
    if all.is_empty() {
        return Riding(None);
    }
    for along in all {
        along(effect, batch);
    }
    Riding(Some(act))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rides_along_is_written_once_and_with_the_first_record() {
        let act = Act::new(());
        act.write_along(|_, batch| _ = batch.outcome(7, "{}".into()));
        let gone = Effect::Gone(ResourceKind::Guest, Uuid::nil());
        let mut outside = Batch::new();
        along(&gone, &mut outside).arrived();
        assert!(outside.is_empty() && !act.is_recorded());
        Act::sync_scope(Some(act.clone()), || {
            let (mut first, mut second) = (Batch::new(), Batch::new());
            let riding = along(&gone, &mut first);
            assert!(!first.is_empty() && !act.is_recorded());
            along(&gone, &mut second).arrived();
            assert!(second.is_empty() && !act.is_recorded());
            riding.arrived();
            assert!(act.is_recorded());
        });
    }

    #[test]
    fn a_guard_lives_as_long_as_any_part_of_the_act() {
        let guard = Arc::new(());
        let act = Act::new(Arc::clone(&guard));
        let part = act.clone();
        drop(act);
        assert_eq!(Arc::strong_count(&guard), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&guard), 1);
    }
}
