//! How a hand-over ends, on disk: the guest's record, the migration's, and at a destination its word on whose
//! the guest is.
//!
//! Owns: that they are stored together or not at all, also while the database takes nothing: then in the
//! space that was set aside when the migration began, from where they get into the database as soon as that
//! works, at the latest at the next start. Must not know: who decides what, or what the records say.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::host::events::EventBody;
use crate::host::inner::Inner;
use crate::host::migrations::hand_over::HandOver;
use crate::host::migrations::reserve::{self, Reserve};
use crate::host::{GuestRecord, MigrationRecord};
use crate::store::{Batch, Kind, StoreError, form};

/// Between two looks whether the database has what was put into the space.
const LOOK: Duration = Duration::from_millis(500);

/// Everything that one turn of a hand-over changes on disk.
#[derive(Clone, Debug)]
pub(in crate::host) struct Ending {
    pub guest: Uuid,
    /// `None`: it is not defined here any more.
    pub record: Option<GuestRecord>,
    pub migration: MigrationRecord,
    pub hand_over: Option<HandOver>,
    pub events: Vec<EventBody>,
}

impl Ending {
    fn batch(&self) -> Result<Batch, StoreError> {
        let mut batch = Batch::new();
        match &self.record {
            Some(record) => _ = batch.put(Kind::Guest, self.guest, Some(&record.spec.name), record)?,
            None => _ = batch.delete(Kind::Guest, self.guest),
        }
        batch.put(Kind::Migration, self.migration.id, None, &self.migration)?;
        if let Some(hand_over) = &self.hand_over {
            batch.put(Kind::HandOver, self.migration.id, None, hand_over)?;
        }
        for event in &self.events {
            event.write(&mut batch);
        }
        Ok(batch)
    }
}

/// Stores it; durable when this returns. `then` is called before anybody sees an event of it.
///
/// # Errors
/// Nothing has changed, and nothing will.
pub(in crate::host) fn store(
    inner: &Arc<Inner>,
    ending: &Ending,
    space: Option<&Arc<Reserve>>,
    then: impl FnOnce() + Clone + Send + 'static,
) -> Result<(), StoreError> {
    alone(inner, ending, |ending| store_alone(inner, ending, space, then))
}

/// Does something with an ending's records while nobody else writes the migration's, which has what was asked
/// for by then.
fn alone<T>(inner: &Inner, ending: &Ending, act: impl FnOnce(&Ending) -> T) -> T {
    let Some(entry) = inner.migration_entry(ending.migration.id) else { return act(ending) };
    entry.alone(|| act(&Ending { migration: entry.with_asked(ending.migration.clone()), ..ending.clone() }))
}

fn store_alone(
    inner: &Arc<Inner>,
    ending: &Ending,
    space: Option<&Arc<Reserve>>,
    then: impl FnOnce() + Clone + Send + 'static,
) -> Result<(), StoreError> {
    let batch = ending.batch()?;
    let refused = match inner.ledger.commit_blocking(batch.clone(), then.clone()) {
        Ok(()) => {
            if let Some(space) = space {
                space.release();
            }
            return Ok(());
        }
        Err(refused) if refused.trouble().is_none() => return Err(refused),
        Err(refused) => refused,
    };
    let Some(space) = space else { return Err(refused) };
    let kept = form::write(ending).map_err(io::Error::other).and_then(|text| space.keep(text.as_bytes()));
    if let Err(error) = kept {
        tracing::error!(%error, "the space set aside for a hand-over cannot be written either");
        return Err(refused);
    }
    tracing::warn!(migration = %ending.migration.id, error = %crate::chain::chain(&refused),
        "the database takes nothing; the end of a hand-over is kept in the space set aside for it");
    match inner.ledger.owe_blocking(batch, then) {
        Ok(()) => space.release(),
        Err(_) => _ = inner.runtime.spawn(release_when_written(Arc::clone(inner), Arc::clone(space))),
    }
    Ok(())
}

/// Writes what has happened; owed to the database while that takes nothing.
pub(in crate::host) fn owe(inner: &Arc<Inner>, ending: &Ending, then: impl FnOnce() + Send + 'static) {
    let stored = alone(inner, ending, |ending| Ok(inner.ledger.owe_blocking(ending.batch()?, then)));
    if let Ok(Err(error)) | Err(error) = stored {
        tracing::error!(migration = %ending.migration.id, error = %crate::chain::chain(&error),
            "what became of a migration is not stored yet");
    }
}

/// What is owed goes before everything else: as soon as anything is written, it is.
async fn release_when_written(inner: Arc<Inner>, space: Arc<Reserve>) {
    loop {
        tokio::time::sleep(LOOK).await;
        if inner.ledger.probe().await.is_ok() {
            return space.release();
        }
    }
}

/// Takes into the database what an earlier daemon could only put into the space.
///
/// # Errors
/// The database takes nothing: what is in the space stays there.
pub(in crate::host) async fn recover(inner: &Arc<Inner>) -> Result<(), StoreError> {
    for kept in reserve::left(&inner.state_dir) {
        match form::read::<Ending>(kept.record()) {
            Ok(ending) => {
                // The migration's end is of the same transaction: where it is in the database, everything is,
                // and what is in the space may be older than what is there.
                let id = ending.migration.id;
                let known = inner.store.get::<MigrationRecord>(Kind::Migration, id)?;
                if known.is_some_and(|m| !m.state.is_terminal()) {
                    tracing::warn!(migration = %id, "the end of a hand-over is taken from the space set aside for it");
                    inner.ledger.commit(ending.batch()?).await?;
                }
            }
            Err(error) => {
                let error = crate::chain::chain(&error);
                tracing::error!(%error, "what is in a hand-over's space cannot be read");
            }
        }
        kept.remove();
    }
    Ok(())
}
