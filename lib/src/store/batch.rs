//! Writes that belong together, as values: they can wait in a queue, and be tried again.
//!
//! Owns: what a write is, and how it is carried out within a transaction. Must not know: when that is
//! committed.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::documents::{self, render};
use super::form::Document;
use super::hours::Hours;
use super::ledger::{Log, Space};
use super::rows::Rows;
use super::{DocumentRef, Kind, MAX_DOCUMENT, StoreError};

/// One write of a batch.
#[derive(Clone, Debug)]
pub(super) enum Write {
    Put { kind: Kind, id: Uuid, name: Option<String>, body: String },
    Delete { kind: Kind, id: Uuid },
    MetaPut { key: String, body: String },
    MetaDelete { key: String },
    Append { log: Log, at: Timestamp, body: String },
    Outcome { intent: u64, at: Timestamp, body: String },
    KeyedPut { space: Space, key: String, life: Option<Duration>, body: String },
    KeyedDelete { space: Space, key: String },
}

/// Writes that take effect together or not at all, in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    writes: Vec<Write>,
}

impl Batch {
    /// Makes an empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Writes a document, replacing the one with this id if there is one.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], [`StoreError::Unwritable`].
    pub fn put<T: Document>(
        &mut self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<&mut Self, StoreError> {
        let body = render(document, || DocumentRef::Document(kind, id))?;
        self.writes.push(Write::Put { kind, id, name: name.map(str::to_owned), body });
        Ok(self)
    }

    /// Removes a document; none is fine, too.
    pub fn delete(&mut self, kind: Kind, id: Uuid) -> &mut Self {
        self.writes.push(Write::Delete { kind, id });
        self
    }

    /// Writes the singleton `key`.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], [`StoreError::Unwritable`].
    pub fn meta_put<T: Document>(&mut self, key: &str, document: &T) -> Result<&mut Self, StoreError> {
        let body = render(document, || DocumentRef::Meta(key.to_owned()))?;
        self.writes.push(Write::MetaPut { key: key.to_owned(), body });
        Ok(self)
    }

    /// Removes the singleton `key`; none is fine, too.
    pub fn meta_delete(&mut self, key: &str) -> &mut Self {
        self.writes.push(Write::MetaDelete { key: key.to_owned() });
        self
    }

    /// Appends to a log, dated now.
    pub fn append(&mut self, log: Log, body: String) -> &mut Self {
        self.writes.push(Write::Append { log, at: Timestamp::now(), body });
        self
    }

    /// Says what came of the audit log's entry `intent`; said again, the later word stays.
    pub fn outcome(&mut self, intent: u64, body: String) -> &mut Self {
        self.writes.push(Write::Outcome { intent, at: Timestamp::now(), body });
        self
    }

    /// Writes a keyed record, replacing the one with this key. It is there for `life` after it is written, or
    /// without an end.
    ///
    /// # Errors
    /// [`StoreError::TooLong`].
    pub fn keyed_put(
        &mut self,
        space: Space,
        key: String,
        life: Option<Duration>,
        body: String,
    ) -> Result<&mut Self, StoreError> {
        if body.len() > MAX_DOCUMENT {
            return Err(StoreError::TooLong { document: DocumentRef::Keyed(space, key), bytes: body.len() });
        }
        self.writes.push(Write::KeyedPut { space, key, life, body });
        Ok(self)
    }

    /// Removes a keyed record; none is fine, too.
    pub fn keyed_delete(&mut self, space: Space, key: String) -> &mut Self {
        self.writes.push(Write::KeyedDelete { space, key });
        self
    }

    /// Adds everything of another batch behind what is here.
    pub fn join(&mut self, other: Self) -> &mut Self {
        self.writes.extend(other.writes);
        self
    }

    pub(super) fn writes(&self) -> &[Write] {
        &self.writes
    }

    pub(super) fn keep(&mut self, wanted: impl FnMut(&Write) -> bool) {
        self.writes.retain(wanted);
    }
}

/// Carries out one write, at the time that `hours` says; `append` gives entries of the logs their numbers.
pub(super) fn carry_out(
    t: &Rows<'_>,
    write: &Write,
    hours: &Hours,
    append: &mut impl FnMut(&Rows<'_>, Log, Timestamp, &str) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    match write {
        Write::Put { kind, id, name, body } => documents::put(t, *kind, *id, name.as_deref(), body),
        Write::Delete { kind, id } => t.forget_document(*kind, *id).map(|_| ()).map_err(StoreError::from),
        Write::MetaPut { key, body } => t.meta(key, body).map_err(StoreError::from),
        Write::MetaDelete { key } => t.forget_meta(key).map_err(StoreError::from),
        Write::Append { log, at, body } => append(t, *log, *at, body),
        Write::Outcome { intent, at, body } => t.outcome(*intent, *at, body).map_err(StoreError::from),
        Write::KeyedPut { space, key, life, body } => {
            let expires = life.map(|life| hours.end_of(space.count(), life));
            t.keyed(*space, key, expires, body).map_err(StoreError::from)
        }
        Write::KeyedDelete { space, key } => t.forget_keyed(*space, key).map_err(StoreError::from),
    }
}
