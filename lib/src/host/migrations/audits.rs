//! Audits that follow hand-overs: what the source keeps for them.
//!
//! Owns: which audits of guests that left go on, and giving them up. Must not know: how pages are compared,
//! who carries an audit out, what becomes of a verdict.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::host::{Audit, AuditMode, GuestAudit, MigrationRecord, NotRun};
use crate::migration::Held;
use crate::sync::Locked;

/// What is kept of guests that left: by migration the guest, and its RAM and mirror.
#[derive(Default)]
pub(in crate::host) struct Audits(Mutex<HashMap<Uuid, (Uuid, Arc<Held>)>>);

impl Audits {
    /// Keeps something until its audit ends.
    pub fn keep(&self, migration: Uuid, guest: Uuid, held: &Arc<Held>) {
        self.0.locked().insert(migration, (guest, Arc::clone(held)));
    }

    /// An audit has ended.
    pub fn forget(&self, migration: Uuid) {
        self.0.locked().remove(&migration);
    }

    /// Gives up those that are wanted; their memory is free when this returns. False when there are none.
    pub fn give_up(&self, why: NotRun, wanted: impl Fn(Uuid) -> bool) -> bool {
        let found: Vec<_> = {
            let held = self.0.locked();
            held.values().filter(|(guest, _)| wanted(*guest)).map(|(_, held)| Arc::clone(held)).collect()
        };
        // Not under the lock: machines end their threads first.
        found.iter().map(|held| held.give_up(why)).filter(Option::is_some).count() > 0
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
