//! Tickets: leave for one migration into this host, for a source that is no known peer.
//!
//! A ticket's secret is the session's id: 122 random bits that only this host and the ticket's bearer know,
//! good for one session, from one source identity, until it expires. The identity is checked in the TLS
//! handshake, so a stolen ticket is of no use without the source's private key.
//!
//! Owns: the ticket's record. Must not know: how a migration goes.

use crate::codes::Capability;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::act::{self, Effect};
use crate::host::inner::Inner;
use crate::host::migrations::ticket::{Ticket, TicketSpec};
use crate::host::{Ask, Host, HostError, PeerSpec, bounds, validate};
use crate::migration::wire::PROTOCOL_VERSIONS;
use crate::store::form;
use crate::store::ledger::Space;
use crate::store::{Batch, StoreError};
use crate::transport::PeerIdentity;

/// How long a used ticket's source may still ask what became of its session.
const AFTERMATH: Duration = Duration::from_secs(30 * 24 * 3600);
/// What the destination keeps: until the ticket has been good for long enough, and of one that is used for
/// the aftermath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::host) struct Kept {
    pub source_name: String,
    pub source_identity: String,
    /// Whether its session has begun.
    pub used: bool,
    /// Of an earlier build, which kept it for longer than it is good. Unused, it is good no more.
    pub good_until: Option<Timestamp>,
}

impl Kept {
    fn is_unused(&self) -> bool {
        !self.used && self.good_until.is_none()
    }
}

impl Host {
    /// Gives leave for one migration into this host; a dry run gives a ticket that is of no use.
    ///
    /// # Errors
    /// Values that cannot be, a host without a peer listener, maintenance, storage.
    pub async fn create_ticket(&self, spec: TicketSpec, ask: &Ask) -> Result<Ticket, HostError> {
        self.inner.check_running()?;
        self.check_not_in_maintenance()?;
        let info = self.info();
        let address = info.peer_address.ok_or_else(|| {
            let why = if self.lacks_address() {
                "the peer listener is on all addresses and the daemon was started without --advertise"
            } else {
                "the daemon was started without --peer-listen"
            };
            HostError::lacks(Capability::PeerListener, why)
        })?;
        let peer = PeerSpec {
            name: spec.source_name,
            // A source's own address plays no part.
            address: address.clone(),
            identity: spec.source_identity,
            labels: crate::host::Labels::new(),
        };
        let identity = validate::peer(&peer).map_err(of_source)?;
        let (low, high) = (*bounds::TICKET_SECONDS.start(), *bounds::TICKET_SECONDS.end());
        let life = Duration::from_secs(spec.expires_in_seconds.clamp(low, high));
        let expires_at = Timestamp::now().saturating_add(life).unwrap_or(Timestamp::MAX);
        let ticket = Ticket {
            host: info.name,
            address,
            identity: info.identity,
            session: Uuid::new_v4(),
            expires_at,
            protocol_versions: PROTOCOL_VERSIONS.to_vec(),
        };
        if ask.dry_run {
            return Ok(ticket);
        }
        let kept = Kept {
            source_name: peer.name,
            source_identity: identity.to_string(),
            used: false,
            good_until: None,
        };
        let body = form::write(&kept).map_err(|e| HostError::internal("writing a ticket", e))?;
        let failed = |e| HostError::storage("storing a ticket", e);
        let mut batch = Batch::new();
        batch.keyed_put(Space::Ticket, ticket.session.to_string(), Some(life), body).map_err(failed)?;
        let riding = act::along(&Effect::Ticket(&ticket), &mut batch);
        self.inner.ledger.commit_and(batch, move || riding.arrived()).await.map_err(failed)?;
        Ok(ticket)
    }
}

impl Inner {
    /// The name of a source that has a ticket, used or not: it may connect.
    pub(in crate::host) fn ticket_holder(&self, identity: &PeerIdentity) -> Option<String> {
        let text = identity.to_string();
        // Whoever has no ticket that can be read has none; that it is the database's fault must not stay
        // unsaid.
        let unread = |error: StoreError| tracing::error!(%error, "tickets cannot be read");
        let all = self.ledger.all(Space::Ticket).map_err(unread).unwrap_or_default();
        all.into_iter().find_map(|(key, there)| {
            let kept: Kept = Space::Ticket.read(&key, &there.body).map_err(unread).ok()?;
            (kept.source_identity == text && (kept.used || kept.is_unused())).then_some(kept.source_name)
        })
    }

    /// Whether there is a ticket of `session` that this source may still use; leaves it as it is.
    ///
    /// # Errors
    /// Nobody can say.
    pub(in crate::host) fn has_ticket(
        &self,
        session: Uuid,
        identity: &PeerIdentity,
    ) -> Result<bool, HostError> {
        Ok(self.good_ticket(session, identity)?.is_some())
    }

    /// What a good ticket says.
    fn good_ticket(&self, session: Uuid, identity: &PeerIdentity) -> Result<Option<Kept>, HostError> {
        let failed = |e| HostError::storage("looking for a ticket", e);
        let key = session.to_string();
        let Some(there) = self.ledger.find(Space::Ticket, &key).map_err(failed)? else { return Ok(None) };
        let kept: Kept = Space::Ticket.read(&key, &there.body).map_err(failed)?;
        let good = kept.is_unused() && kept.source_identity == identity.to_string();
        Ok(good.then_some(kept))
    }

    /// What uses up the ticket of `session`, if there is one for this source, to be written with the
    /// migration that it is used for; `None` when there is none that is good. Of several at once only one
    /// gets it: a session is one migration's id.
    ///
    /// # Errors
    /// Nobody can say whether there is one: nobody gets it then.
    pub(in crate::host) fn using_ticket(
        &self,
        session: Uuid,
        identity: &PeerIdentity,
    ) -> Result<Option<Batch>, HostError> {
        let failed = |e| HostError::storage("using up a ticket", e);
        // Looked at before it is taken: a stranger's guess must not cost its owner the ticket.
        let Some(kept) = self.good_ticket(session, identity)? else { return Ok(None) };
        let used = Kept { used: true, ..kept };
        let body = form::write(&used).map_err(|e| HostError::internal("writing a ticket", e))?;
        let mut batch = Batch::new();
        batch.keyed_put(Space::Ticket, session.to_string(), Some(AFTERMATH), body).map_err(failed)?;
        Ok(Some(batch))
    }
}

/// The same errors where the request has the fields: in its `source`.
fn of_source(error: HostError) -> HostError {
    match error {
        HostError::Invalid(mut errors) => {
            errors.iter_mut().for_each(|e| e.pointer.insert_str(0, "/source"));
            HostError::Invalid(errors)
        }
        other => other,
    }
}
