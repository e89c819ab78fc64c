//! The audit of a guest that arrived: its mirror is not the owner's before that has ended.
//!
//! Owns: whom the mirror belongs to meanwhile, what a verdict does to the guest's record. Must not know: what
//! is compared.

use std::sync::Arc;

use uuid::Uuid;

use crate::host::events::{Change, EventBody};
use crate::host::{Audit, AuditState, GuestAudit, GuestRecord, HostError, MirrorChoice, MirrorState, NotRun};
use crate::migration::Held;
use crate::mirror::Placement;

use super::Owner;

/// An audit that has the guest's mirror.
pub(super) struct Auditing {
    held: Arc<Held>,
    /// Of an SEV-ES guest: the mirror's id, which it keeps.
    mirror: Option<Uuid>,
}

impl Owner {
    /// The guest has arrived, and its mirror is the audit's.
    pub(super) fn hold_audit(&mut self, held: Arc<Held>) {
        let record = self.entry.record();
        let registered = held.look(|mirror| {
            self.has_launch_mirror()
                .then(|| self.inner.register_mirror(&record, mirror, true, None, Placement::default()))
        });
        let mirror = match registered.flatten() {
            Some(Ok(entry)) => Some(entry.id),
            Some(Err(error)) => {
                tracing::error!(%error, "a mirror could not be registered");
                None
            }
            None => None,
        };
        self.audit = Some(Auditing { held, mirror });
    }

    /// Takes the mirror back. An audit that has not come to its end ends as `why`.
    pub(super) fn end_audit(&mut self, why: NotRun) {
        let Some(Auditing { held, mirror }) = self.audit.take() else { return };
        let kept = held.give_up(why);
        if let (Some(kept), Some(id)) = (kept, mirror) {
            self.mirrors.insert(id, kept.mirror);
            self.inner.set_mirror_state(id, MirrorState::Ready, None);
        }
    }

    /// The mirror that a migration would get when the audit ends for it; `None`: there is none at stake.
    pub(super) fn audited_mirror(&self, choice: &MirrorChoice) -> Option<Result<(), HostError>> {
        let id = self.audit.as_ref()?.mirror?;
        let entry = self.inner.mirror_entry(id)?;
        Some(match choice {
            MirrorChoice::Existing(other) if *other == id => Ok(()),
            MirrorChoice::Template(strategy) if *strategy == entry.record().strategy => Ok(()),
            MirrorChoice::Existing(_) | MirrorChoice::Template(_) => Err(HostError::MirrorAtLaunch),
        })
    }

    /// An audit has ended, of a guest that arrived or of one that left.
    pub(super) fn audited(&mut self, migration: Uuid, audit: Audit) {
        let known = self.entry.record().audit.is_some_and(|a| a.migration == migration);
        if !known {
            return;
        }
        self.end_audit(NotRun::PeerLost);
        let found = match &audit.state {
            AuditState::Mismatch { pages, .. } => Some(*pages),
            AuditState::Pending | AuditState::Proven | AuditState::NotRun { .. } => None,
        };
        let change = |r: &mut GuestRecord| r.audit = Some(GuestAudit { migration, audit });
        let record = self.publish_also(change, |record, batch| {
            if let Some(pages) = found {
                let body = EventBody::guest(record, None, Change::AuditMismatch);
                body.of_pages(migration, pages).write(batch);
            }
        });
        if let Some(pages) = found {
            tracing::error!(guest = %record.id, %migration, pages, "pages of a guest are not what its source had");
        }
    }
}
