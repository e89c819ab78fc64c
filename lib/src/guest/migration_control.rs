//! Whether a guest says that it can be migrated: MSR_KVM_MIGRATION_CONTROL, and what the helper declared with
//! it.
//!
//! KVM's msr.rst: at start the bit is 0 for a guest with encrypted memory and 1 otherwise; a guest that
//! reports page status sets it. It may clear it again: Linux does when a CPU goes offline, and (2026) does
//! not set it again when the CPU returns. So readiness is read again at every use, and a loss of it is
//! explained.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address_space::{Declaration, Refusal};
use crate::sync::Locked;

/// Why a guest is or is not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadinessReason {
    /// Its memory is not encrypted and it never wrote the MSR: ready from the start.
    NotEncrypted,
    /// Its memory is encrypted and it never wrote the MSR.
    NotYet,
    /// It wrote 1.
    Announced,
    /// It wrote 0 after 1, as a guest does whose CPU went offline.
    Withdrawn,
}

impl ReadinessReason {
    /// For people.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::NotEncrypted => "the guest's memory is not encrypted",
            Self::NotYet => "the guest has not written MSR_KVM_MIGRATION_CONTROL yet",
            Self::Announced => "the guest wrote 1 to MSR_KVM_MIGRATION_CONTROL",
            Self::Withdrawn => {
                "the guest cleared MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes offline or it is suspended; \
                 it must write 1 again"
            }
        }
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Whether the guest can be migrated as far as it says itself.
    pub ready: bool,
    /// Why.
    pub reason: ReadinessReason,
    /// What its helper declared: frozen by the first write of 1 that carried one.
    pub declaration: Option<Arc<Declaration>>,
    /// Why a declaration was not taken; the guest may declare again.
    pub refusals: Vec<Refusal>,
}

/// What travels with a migrating guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedReadiness {
    /// As [`Readiness::reason`].
    pub reason: ReadinessReason,
    /// As [`Readiness::declaration`].
    pub declaration: Option<Declaration>,
}

/// The MSR's state of one guest.
#[derive(Debug)]
pub struct MigrationControl {
    state: Mutex<Readiness>,
    changed: Condvar,
}

impl MigrationControl {
    /// At the guest's start.
    pub fn new(encrypted: bool) -> Self {
        let reason = if encrypted { ReadinessReason::NotYet } else { ReadinessReason::NotEncrypted };
        let state = Readiness { ready: !encrypted, reason, declaration: None, refusals: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A snapshot.
    pub fn readiness(&self) -> Readiness {
        self.lock().clone()
    }

    /// Waits until the guest has written the MSR, but not for long: whether it does is its own affair.
    pub fn await_word(&self, patience: Duration) {
        let silent =
            |r: &mut Readiness| matches!(r.reason, ReadinessReason::NotEncrypted | ReadinessReason::NotYet);
        drop(self.changed.wait_timeout_while(self.lock(), patience, silent));
    }

    /// The guest wrote 1. `declare` gives what its helper declared; it is asked only while nothing is frozen,
    /// so that a second declaration changes nothing.
    pub fn announce(&self, declare: impl FnOnce() -> Result<Option<Declaration>, Vec<Refusal>>) {
        let mut state = self.lock();
        if state.declaration.is_none() {
            match declare() {
                Ok(declaration) => {
                    state.declaration = declaration.map(Arc::new);
                    state.refusals.clear();
                }
                Err(refusals) => state.refusals = refusals,
            }
        }
        (state.ready, state.reason) = (true, ReadinessReason::Announced);
        self.changed.notify_all();
    }

    /// The guest wrote 0.
    pub fn withdraw(&self) {
        let mut state = self.lock();
        (state.ready, state.reason) = (false, ReadinessReason::Withdrawn);
    }

    /// What goes with the guest.
    pub fn carry(&self) -> CarriedReadiness {
        let state = self.lock();
        CarriedReadiness { reason: state.reason, declaration: state.declaration.as_deref().cloned() }
    }

    /// What came with a guest.
    pub fn adopt(&self, carried: CarriedReadiness) {
        let mut state = self.lock();
        state.reason = carried.reason;
        state.ready = matches!(carried.reason, ReadinessReason::Announced | ReadinessReason::NotEncrypted);
        state.declaration = carried.declaration.map(Arc::new);
    }

    fn lock(&self) -> MutexGuard<'_, Readiness> {
        self.state.locked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_space::RefusalCode;

    fn declaration(pages: u64) -> Declaration {
        Declaration::from_words(1, &[0x10_0000, pages * 4096, 0x20_0000]).unwrap()
    }

    #[test]
    fn the_first_declaration_is_frozen_and_readiness_can_be_lost() {
        let control = MigrationControl::new(true);
        assert_eq!(control.readiness().reason, ReadinessReason::NotYet);
        assert!(!control.readiness().ready);
        control.announce(|| Err(vec![Refusal::new(RefusalCode::Wraps, "tuple", 1)]));
        assert_eq!(control.readiness().refusals.len(), 1, "not taken, and said so");
        assert!(control.readiness().declaration.is_none());
        control.announce(|| Ok(Some(declaration(1))));
        control.withdraw();
        let lost = control.readiness();
        assert!(!lost.ready && lost.reason == ReadinessReason::Withdrawn, "{lost:?}");
        control.announce(|| Ok(Some(declaration(2))));
        assert_eq!(control.readiness().declaration.as_deref(), Some(&declaration(1)), "the first stays");

        let arrived = MigrationControl::new(true);
        arrived.adopt(control.carry());
        assert_eq!(arrived.readiness(), control.readiness());
    }

    #[test]
    fn a_guest_without_encryption_is_ready_from_the_start() {
        let control = MigrationControl::new(false);
        assert!(control.readiness().ready);
        control.withdraw();
        assert!(!control.readiness().ready);
    }
}
