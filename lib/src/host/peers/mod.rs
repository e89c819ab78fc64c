//! Hosts that this one knows: what is said of one, and whether it may be.
//!
//! Owns: that a known host is another host, known once. Must not know: HTTP; how a link is made.

pub(super) mod probe;
pub(super) mod types;

use crate::host::ResourceKind;
use std::collections::HashMap;

use jiff::Timestamp;
use uuid::Uuid;

use super::events::Change;
use super::{Ask, FieldError, Host, HostError, PeerRecord, PeerSpec, validate};
use crate::transport::{Endpoint, PeerIdentity};

impl Host {
    /// The peer that would be added, if nothing is against it.
    async fn new_peer(&self, id: Option<Uuid>, spec: PeerSpec) -> Result<PeerRecord, HostError> {
        self.inner.check_running()?;
        let identity = validate::peer(&spec)?;
        self.check_not_self(&spec.address, &identity)?;
        self.check_leads_elsewhere(&spec.address).await?;
        // In one spelling, so that a pin can be compared as text.
        let spec = PeerSpec { identity: identity.to_string(), ..spec };
        if id.is_some_and(|id| self.inner.peers().contains_key(&id)) {
            return Err(HostError::IdTaken { kind: ResourceKind::PeerHost });
        }
        if self.inner.peers().values().any(|p| p.spec.name == spec.name) {
            return Err(HostError::NameTaken { kind: ResourceKind::PeerHost, name: spec.name });
        }
        check_only_one(&self.inner.peers(), None, &spec.identity)?;
        let id = id.unwrap_or_else(Uuid::now_v7);
        Ok(PeerRecord { id, spec, generation: 1, created_at: Timestamp::now() })
    }

    /// A host is no peer of its own: nothing could go there.
    fn check_not_self(&self, address: &Endpoint, identity: &PeerIdentity) -> Result<(), HostError> {
        let mut errors = Vec::new();
        if identity == self.inner.identity.pin() {
            let detail = format!(
                "{identity} is this host itself; give the identity that the other host's `/v1/host` shows"
            );
            errors.push(FieldError::new("/identity", "own_identity", detail));
        }
        if self.is_own_address(address) {
            let detail = format!("at {address} this host itself listens; give the other host's address");
            errors.push(FieldError::new("/address", "own_address", detail));
        }
        if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
    }

    /// Whether a peer's name leads to somebody else, as far as that can be known now: wherever it leads
    /// later, nobody is taken for a peer who has not the peer's key.
    ///
    /// # Errors
    /// It leads here.
    pub async fn check_leads_elsewhere(&self, address: &Endpoint) -> Result<(), HostError> {
        let own = self.own_addresses_of(address).await;
        let Some(at) = own.first() else { return Ok(()) };
        let detail =
            format!("{address} is {at}, where this host itself listens; give the other host's address");
        Err(HostError::Invalid(vec![FieldError::new("/address", "own_address", detail)]))
    }

    /// Adds a peer.
    ///
    /// # Errors
    /// Values that cannot be, a name or an id that is taken, an identity that is known or this host's own, an
    /// address that leads here, storage.
    pub async fn add_peer(&self, spec: PeerSpec, ask: &Ask) -> Result<PeerRecord, HostError> {
        let record = self.new_peer(ask.id, spec).await?;
        if ask.dry_run {
            return Ok(record);
        }
        self.inner.change_peers(|| -> Result<_, HostError> {
            if self.inner.peers().contains_key(&record.id) {
                return Err(HostError::IdTaken { kind: ResourceKind::PeerHost });
            }
            if self.inner.peers().values().any(|p| p.spec.name == record.spec.name) {
                return Err(HostError::NameTaken {
                    kind: ResourceKind::PeerHost,
                    name: record.spec.name.clone(),
                });
            }
            check_only_one(&self.inner.peers(), None, &record.spec.identity)?;
            self.inner.store_peer(&record, Change::Created)
        })?;
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(record)
    }

    /// One peer by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn peer(&self, key: &str) -> Result<PeerRecord, HostError> {
        self.inner.find_peer(key)
    }

    /// All peers by creation.
    pub fn peers(&self) -> Vec<PeerRecord> {
        let mut list: Vec<_> = self.inner.peers().values().cloned().collect();
        list.sort_by_key(|p| p.id);
        list
    }

    /// Says other things of a peer: everything but its name.
    ///
    /// # Errors
    /// No such peer, values that cannot be, [`HostError::GenerationMismatch`].
    pub fn change_peer(
        &self,
        key: &str,
        change: impl FnOnce(PeerSpec) -> PeerSpec,
        ask: &Ask,
    ) -> Result<PeerRecord, HostError> {
        let id = self.inner.find_peer(key)?.id;
        let missing = || HostError::missing(ResourceKind::PeerHost, key);
        let record = self.inner.change_peers(|| -> Result<_, HostError> {
            let now = self.inner.peers().get(&id).cloned().ok_or_else(missing)?;
            let spec = change(now.spec.clone());
            // Conditions come last: a request that cannot work is told so, whatever it expects (RFC 9110,
            // section 13.2.1).
            let identity = validate::peer(&spec)?;
            self.check_not_self(&spec.address, &identity)?;
            // Of two that an earlier build took each may still be changed in all else.
            if now.spec.identity != identity.to_string() {
                check_only_one(&self.inner.peers(), Some(id), &identity.to_string())?;
            }
            ask.check(ResourceKind::PeerHost, now.generation)?;
            let spec = PeerSpec { identity: identity.to_string(), name: now.spec.name.clone(), ..spec };
            let record = PeerRecord { spec, generation: now.generation + 1, ..now };
            if !ask.dry_run {
                self.inner.store_peer(&record, Change::Updated)?;
            }
            Ok(record)
        })?;
        if ask.dry_run {
            return Ok(record);
        }
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(record)
    }

    /// Forgets a peer that no active migration uses; gives it as it was.
    ///
    /// # Errors
    /// No such peer, in use, [`HostError::GenerationMismatch`], storage.
    pub async fn delete_peer(&self, key: &str, ask: &Ask) -> Result<PeerRecord, HostError> {
        let peer = self.inner.find_peer(key)?;
        let missing = || HostError::missing(ResourceKind::PeerHost, key);
        let now = self.inner.change_peers(|| -> Result<_, HostError> {
            let now = self.inner.peers().get(&peer.id).cloned().ok_or_else(missing)?;
            // Also one that is being stored, and not listed yet.
            let all = self.inner.migration_entries().into_iter().map(|m| m.record());
            let user = { all }.find(|m| m.peer == now.spec.name && !m.state.is_terminal());
            if let Some(m) = user {
                return Err(HostError::InUse {
                    kind: ResourceKind::PeerHost,
                    user: format!("migration {}", m.id),
                });
            }
            ask.check(ResourceKind::PeerHost, now.generation)?;
            if !ask.dry_run {
                self.inner.store_peer(&now, Change::Deleted)?;
            }
            Ok(now)
        })?;
        if ask.dry_run {
            return Ok(now);
        }
        self.inner.peer_heard.notify_one();
        self.inner.changed();
        Ok(now)
    }
}

/// A host is known under one name: of two with one identity nobody could say whose migration came in, or
/// which address is the one that is out of date.
fn check_only_one(
    peers: &HashMap<Uuid, PeerRecord>,
    but: Option<Uuid>,
    identity: &str,
) -> Result<(), HostError> {
    let known = peers.values().find(|p| Some(p.id) != but && p.spec.identity == identity);
    let Some(known) = known else { return Ok(()) };
    let name = &known.spec.name;
    let detail = format!(
        "{identity} is the identity of the host {name}; change that one, or give the identity that the \
         other host's `/v1/host` shows"
    );
    Err(HostError::Invalid(vec![FieldError::new("/identity", "duplicate_identity", detail)]))
}
