//! Audits that follow hand-overs: what the source keeps for them.
//!
//! Owns: which audits of guests that left go on, and giving them up. Must not know: how pages are compared,
//! who carries an audit out, what becomes of a verdict.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::host::{Audit, AuditMode, GuestAudit, HostError, MigrationRecord, NotRun};
use crate::migration::Held;
use crate::sync::Locked;
use crate::waiting::with_thread;

/// What is kept of guests that left: by migration the guest, and its RAM and mirror.
#[derive(Default)]
pub(in crate::host) struct Audits {
    kept: Mutex<HashMap<Uuid, (Uuid, Arc<Held>)>>,
    /// How many have ended.
    ended: AtomicU64,
}

impl Audits {
    /// Keeps something until its audit ends.
    pub fn keep(&self, migration: Uuid, guest: Uuid, held: &Arc<Held>) {
        self.kept.locked().insert(migration, (guest, Arc::clone(held)));
    }

    /// An audit has ended, and its memory is free.
    pub fn forget(&self, migration: Uuid) {
        // Before it is off the list: whoever does not find it there any more sees that there was one.
        self.ended.fetch_add(1, Ordering::Release);
        self.kept.locked().remove(&migration);
    }

    /// Gives up those that are wanted; their memory is free when this returns. False when there are none.
    pub fn give_up(&self, why: NotRun, wanted: impl Fn(Uuid) -> bool) -> bool {
        let found: Vec<_> = {
            let kept = self.kept.locked();
            kept.values().filter(|(guest, _)| wanted(*guest)).map(|(_, held)| Arc::clone(held)).collect()
        };
        // Memory that is given back is waited for, and machines end.
        with_thread(|| found.iter().for_each(|held| held.free(why)));
        !found.is_empty()
    }

    /// Bytes of memory that are free once all is given up.
    pub fn bytes(&self) -> u64 {
        let kept: Vec<_> = self.kept.locked().values().map(|(_, held)| Arc::clone(held)).collect();
        kept.iter().map(|held| held.bytes()).sum()
    }

    /// Does something that takes memory; where there is too little of it, once more without what is kept
    /// here. What would be too little even so costs no audit.
    pub fn making_room<T>(&self, act: impl Fn() -> Result<T, HostError>) -> Result<T, HostError> {
        let before = self.ended.load(Ordering::Acquire);
        // Asked before and after: what is free a moment later counts, and so does what is kept since then.
        let kept = self.bytes();
        match act() {
            // Also after one that ended by itself meanwhile: it may have been why.
            Err(HostError::NoMemory(short))
                if (short.available.saturating_add(kept.max(self.bytes())) >= short.bytes
                    && self.give_up(NotRun::MemoryNeeded, |_| true))
                    || self.ended.load(Ordering::Acquire) != before =>
            {
                act()
            }
            done => done,
        }
    }
}

/// What the record of a guest says of the audit of a migration.
pub(in crate::host) fn of_guest(migration: &MigrationRecord) -> Option<GuestAudit> {
    migration.audit.clone().map(|audit| GuestAudit { migration: migration.id, audit })
}

/// Of a migration whose link was gone before its audit could begin.
pub(in crate::host) fn lost(mode: AuditMode) -> Option<Audit> {
    match mode {
        AuditMode::After | AuditMode::BeforeCommit => Some(Audit::not_run(NotRun::PeerLost)),
        AuditMode::Never => None,
    }
}
