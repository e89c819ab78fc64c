//! Records that are found by a key of the caller's, some for a while only.
//!
//! Owns: the spaces of keys, finding, claiming and taking a record. Must not know: what records say, who
//! holds the keys.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{OptionalExtension as _, params};

use super::Ledger;
use crate::store::form::{self, Document};
use crate::store::hours::Count;
use crate::store::{Batch, DocumentRef, StoreError, writer};

/// Records that are found by a key of the caller's; each space has its own keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Answers to requests that may be repeated.
    Idempotency,
    /// Hashes of bearer tokens with what they allow.
    Token,
    /// One-time tickets for incoming migrations.
    Ticket,
}

impl Space {
    pub(in crate::store) const fn stored(self) -> &'static str {
        match self {
            Self::Idempotency => "idempotency",
            Self::Token => "token",
            Self::Ticket => "ticket",
        }
    }

    /// What is promised is kept for as long; what opens something opens it no longer.
    pub(in crate::store) const fn count(self) -> Count {
        match self {
            Self::Idempotency => Count::AtLeast,
            Self::Token | Self::Ticket => Count::AtMost,
        }
    }

    const ALL: [Self; 3] = [Self::Idempotency, Self::Token, Self::Ticket];
}

/// A record with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The record's text.
    pub body: String,
    /// How long it is there; `None`: it has no end.
    pub left: Option<Duration>,
}

impl Space {
    /// The record that is kept under `key`, as what it is. One that cannot be read is not as good as none:
    /// whoever is told that there is none would act on it.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`].
    pub fn read<T: Document>(self, key: &str, body: &str) -> Result<T, StoreError> {
        let document = || DocumentRef::Keyed(self, key.to_owned());
        form::read(body.as_bytes()).map_err(|source| StoreError::Unreadable { document: document(), source })
    }
}

impl Ledger {
    /// The record with this key, unless it has expired.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn find(&self, space: Space, key: &str) -> Result<Option<Kept>, StoreError> {
        self.reader()
            .prepare_cached(
                "SELECT body, expires FROM keyed
                 WHERE space = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)",
            )
            .and_then(|mut s| {
                let read = |row: &rusqlite::Row<'_>| Ok(self.kept(space, row.get(0)?, row.get(1)?));
                s.query_row(params![space.stored(), key, self.now(space)], read).optional()
            })
            .map_err(StoreError::from)
    }

    /// Every record of a space that has not expired, by key.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`].
    pub fn all(&self, space: Space) -> Result<Vec<(String, Kept)>, StoreError> {
        let reader = self.reader();
        let mut statement = reader
            .prepare_cached(
                "SELECT key, body, expires FROM keyed WHERE space = ?1 AND (expires IS NULL OR expires > ?2)
                 ORDER BY key",
            )
            .map_err(StoreError::from)?;
        let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, self.kept(space, row.get(1)?, row.get(2)?)));
        let rows = statement.query_map(params![space.stored(), self.now(space)], read);
        rows.and_then(Iterator::collect).map_err(StoreError::from)
    }

    fn kept(&self, space: Space, body: String, expires: Option<i64>) -> Kept {
        Kept { body, left: expires.map(|end| self.ground.hours.left(space.count(), end)) }
    }

    fn now(&self, space: Space) -> i64 {
        self.ground.hours.now(space.count())
    }

    /// Writes a record unless its key is there (an expired one does not count). Gives what is there
    /// otherwise.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], whatever keeps the database from taking it.
    pub async fn claim(
        &self,
        space: Space,
        key: String,
        life: Option<Duration>,
        body: String,
    ) -> Result<Option<String>, StoreError> {
        let mut batch = Batch::new();
        batch.keyed_put(space, key.clone(), life, body)?;
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            for space in Space::ALL {
                t.expire_keyed(space, ground.hours.now(space.count())).map_err(StoreError::from)?;
            }
            let there = t
                .prepare_cached("SELECT body FROM keyed WHERE space = ?1 AND key = ?2")
                .and_then(|mut s| {
                    s.query_row(params![space.stored(), key], |row| row.get::<_, String>(0)).optional()
                })
                .map_err(StoreError::from)?;
            if there.is_none() {
                writer::write_batch(t, &batch, &ground)?;
            }
            Ok(there)
        })
        .await
    }

    /// Writes a record, replacing the one with this key.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], whatever keeps the database from taking it.
    pub async fn put(
        &self,
        space: Space,
        key: String,
        life: Option<Duration>,
        body: String,
    ) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        batch.keyed_put(space, key, life, body)?;
        self.commit(batch).await
    }

    /// Removes a record; says whether it was there and had not expired. Of several callers one is told so.
    ///
    /// # Errors
    /// Whatever keeps the database from taking it.
    pub async fn take(&self, space: Space, key: String) -> Result<Option<String>, StoreError> {
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            t.take_keyed(space, &key, ground.hours.now(space.count())).map_err(StoreError::from)
        })
        .await
    }

    /// The same together with a batch: nothing of it is written when there was no record.
    ///
    /// # Errors
    /// As [`Ledger::take`].
    pub async fn take_with(
        &self,
        space: Space,
        key: String,
        batch: Batch,
    ) -> Result<Option<String>, StoreError> {
        let ground = Arc::clone(&self.ground);
        self.run(move |t| {
            let now = ground.hours.now(space.count());
            let there = t.take_keyed(space, &key, now).map_err(StoreError::from)?;
            if there.is_some() {
                writer::write_batch(t, &batch, &ground)?;
            }
            Ok(there)
        })
        .await
    }
}
