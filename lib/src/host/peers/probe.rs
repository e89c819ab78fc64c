//! Asking a known host whether it is there, and what it can do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::chain::chain;
use crate::codes::{AnyCode, Code};
use crate::host::{Host, HostError, PeerRecord};
use crate::migration::wire::Abilities;
use crate::migration::{MigrationFault, ask};
use crate::transport::{LinkError, PeerIdentity};

/// Longest time that a peer has to answer a look.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a peer answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAnswer {
    /// Time from the first packet to the end of the handshake and the agreement on a version.
    pub round_trip: Duration,
    /// What it says that it can do.
    pub abilities: Abilities,
}

/// Why a peer does not answer as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSilence {
    /// Stable code, as migrations have it.
    pub code: AnyCode,
    /// What happened.
    pub detail: String,
    /// Whether it was a matter of time.
    pub timed_out: bool,
}

impl Host {
    /// Asks a known peer what it can do.
    ///
    /// # Errors
    /// [`HostError::NotFound`]; within, why the peer does not answer as it should.
    pub async fn probe_peer(&self, key: &str) -> Result<Result<PeerAnswer, PeerSilence>, HostError> {
        let peer = self.inner.find_peer(key)?;
        Ok(self.probe(peer).await)
    }

    pub(in crate::host) async fn probe(&self, peer: PeerRecord) -> Result<PeerAnswer, PeerSilence> {
        let inner = Arc::clone(&self.inner);
        let asked = tokio::task::spawn_blocking(move || {
            let identity: PeerIdentity = peer.spec.identity.parse().map_err(|_| unreadable_identity())?;
            let begun = Instant::now();
            let address = (peer.spec.address.clone(), identity);
            match ask(&address, &inner.identity, &inner.name, PATIENCE) {
                Ok((abilities, round_trip)) => Ok(PeerAnswer { round_trip, abilities }),
                Err(fault) => Err(silence(&fault, begun.elapsed(), PATIENCE)),
            }
        });
        let answer = asked.await.map_err(|_| PeerSilence::failed())?;
        if answer.is_ok() {
            self.inner.peer_heard.notify_one();
        }
        answer
    }
}

impl PeerSilence {
    /// The look itself came to nothing.
    pub(in crate::host) fn failed() -> Self {
        Self { code: Code::Internal.into(), detail: "the look failed".into(), timed_out: false }
    }
}

pub(in crate::host) fn silence(fault: &MigrationFault, took: Duration, patience: Duration) -> PeerSilence {
    let timed_out = took >= patience || matches!(fault, MigrationFault::Connect(LinkError::Deadline(_)));
    PeerSilence { code: fault.code(), detail: chain(fault), timed_out }
}

pub(in crate::host) fn unreadable_identity() -> PeerSilence {
    let detail = "the peer's stored identity cannot be read".into();
    PeerSilence { code: Code::PeerIdentity.into(), detail, timed_out: false }
}
