//! What a destination has noted of hand-overs, read back.
//!
//! Owns: what the journal says of a session. Must not know: who asks, how a hand-over goes.

use uuid::Uuid;

use crate::host::inner::Inner;
use crate::host::migrations::hand_over::{HandOver, Settlement};
use crate::host::{GuestRecord, HandOverOutcome, HandOverToken, HostError, Subject};
use crate::store::{Kind, StoreError};

/// What is known of a session: stored, or of an end that could not be.
pub(in crate::host) fn hand_over(inner: &Inner, session: Uuid) -> Result<Option<HandOver>, StoreError> {
    let unstored = inner.unstored().get(&session).cloned();
    unstored.map_or_else(|| inner.store.get(Kind::HandOver, session), |known| Ok(Some(known)))
}

/// Of hand-overs that were open when a state was that is put back now, nobody here knows what came: they are
/// not answered with a never.
pub(in crate::host) fn doubt_open(inner: &Inner) -> Result<(), StoreError> {
    for (session, mut hand_over) in inner.store.list::<HandOver>(Kind::HandOver)? {
        if matches!(hand_over.settled, Settlement::Open) && !hand_over.unconfirmed {
            hand_over.unconfirmed = true;
            inner.store.put(Kind::HandOver, session, None, &hand_over)?;
        }
    }
    Ok(())
}

/// Whether a session's COMMIT was noted: its guest was this host's from then on. That it cannot be read is no
/// answer: a guest that is believed not to have arrived is deleted.
///
/// # Errors
/// The journal cannot be read.
pub(in crate::host) fn was_committed(inner: &Inner, session: Uuid) -> Result<bool, StoreError> {
    let known = inner.store.get::<HandOver>(Kind::HandOver, session)?;
    Ok(known.is_some_and(|h| matches!(h.settled, Settlement::Committed { .. })))
}

/// What was here before the guest of a session that never came to its end.
///
/// # Errors
/// The journal cannot be read.
pub(in crate::host) fn replaced_by(inner: &Inner, session: Uuid) -> Result<Option<GuestRecord>, StoreError> {
    let known = inner.store.get::<HandOver>(Kind::HandOver, session)?;
    Ok(known.and_then(|h| h.replaced).map(|record| *record))
}

/// The token that this host's helper minted for a session, to be carried to the source by hand.
pub(in crate::host) fn token_of(inner: &Inner, session: Uuid) -> Result<HandOverToken, HostError> {
    let known = hand_over(inner, session).map_err(|e| HostError::internal("reading a hand-over", e))?;
    let (outcome, token) = match known.map(|h| h.settled) {
        Some(Settlement::Committed { token }) => (HandOverOutcome::Committed, token),
        Some(Settlement::Aborted { token: Some(token) }) => (HandOverOutcome::NeverCommitted, token),
        Some(Settlement::Aborted { token: None } | Settlement::Open) | None => {
            return Err(HostError::missing(Subject::HandOverToken, session.to_string()));
        }
    };
    Ok(HandOverToken { session, outcome, token })
}

pub(in crate::host) fn storing(error: StoreError) -> HostError {
    HostError::storage("storing an import", error)
}
