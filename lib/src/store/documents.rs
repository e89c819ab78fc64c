//! Reading and writing documents on one connection.
//!
//! Owns: the statements, and turning constraint violations into our errors. Must not know: files, locks.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, ffi, params};
use serde::Serialize;
use serde::de::{DeserializeOwned, Error as _};
use uuid::Uuid;

use super::{DocumentRef, Kind, MAX_DOCUMENT, StoreError};

/// Several reads and writes that belong together; see [`Store::transaction`](super::Store::transaction).
pub struct Transaction<'a> {
    connection: &'a Connection,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        Self { connection }
    }

    /// As [`Store::put`](super::Store::put).
    pub fn put<T: Serialize>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        put(self.connection, kind, id, name, &render(document, || DocumentRef::Document(kind, id))?)
    }

    /// As [`Store::insert`](super::Store::insert).
    pub fn insert<T: Serialize>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        let statement = "INSERT INTO document (kind, id, name, body) VALUES (?1, ?2, ?3, ?4)";
        let body = render(document, || DocumentRef::Document(kind, id))?;
        write(self.connection, statement, kind, id, name, &body)
    }

    /// As [`Store::get`](super::Store::get).
    pub fn get<T: DeserializeOwned>(&self, kind: Kind, id: Uuid) -> Result<Option<T>, StoreError> {
        self.connection
            .prepare_cached("SELECT body FROM document WHERE kind = ?1 AND id = ?2")
            .and_then(|mut statement| {
                let read = |row: &Row<'_>| Ok(parse(row.get_ref(0)?));
                statement.query_row(params![kind.stored(), id.as_bytes()], read).optional()
            })
            .map_err(StoreError::from)?
            .transpose()
            .map_err(|source| StoreError::Unreadable { document: DocumentRef::Document(kind, id), source })
    }

    /// As [`Store::get_by_name`](super::Store::get_by_name).
    pub fn get_by_name<T: DeserializeOwned>(
        &self,
        kind: Kind,
        name: &str,
    ) -> Result<Option<(Uuid, T)>, StoreError> {
        let id: Option<[u8; 16]> = self
            .connection
            .prepare_cached("SELECT id FROM document WHERE kind = ?1 AND name = ?2")
            .and_then(|mut statement| {
                statement.query_row(params![kind.stored(), name], |row| row.get(0)).optional()
            })
            .map_err(StoreError::from)?;
        match id.map(Uuid::from_bytes) {
            Some(id) => Ok(self.get(kind, id)?.map(|document| (id, document))),
            None => Ok(None),
        }
    }

    /// As [`Store::list`](super::Store::list).
    pub fn list<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<(Uuid, T)>, StoreError> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT id, body FROM document WHERE kind = ?1 ORDER BY id")
            .map_err(StoreError::from)?;
        let mut rows = statement.query(params![kind.stored()]).map_err(StoreError::from)?;
        let mut all = Vec::new();
        while let Some(row) = rows.next().map_err(StoreError::from)? {
            let id = Uuid::from_bytes(row.get(0).map_err(StoreError::from)?);
            let document = parse(row.get_ref(1).map_err(StoreError::from)?).map_err(|source| {
                StoreError::Unreadable { document: DocumentRef::Document(kind, id), source }
            })?;
            all.push((id, document));
        }
        Ok(all)
    }

    /// As [`Store::delete`](super::Store::delete).
    pub fn delete(&self, kind: Kind, id: Uuid) -> Result<bool, StoreError> {
        delete(self.connection, kind, id)
    }

    /// As [`Store::meta_put`](super::Store::meta_put).
    pub fn meta_put<T: Serialize>(&self, key: &str, document: &T) -> Result<(), StoreError> {
        let body = render(document, || DocumentRef::Meta(key.to_owned()))?;
        meta_put(self.connection, key, &body)
    }

    /// As [`Store::meta_get`](super::Store::meta_get).
    pub fn meta_get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        self.connection
            .prepare_cached("SELECT body FROM meta WHERE key = ?1")
            .and_then(|mut statement| statement.query_row([key], |row| Ok(parse(row.get_ref(0)?))).optional())
            .map_err(StoreError::from)?
            .transpose()
            .map_err(|source| StoreError::Unreadable { document: DocumentRef::Meta(key.to_owned()), source })
    }
}

/// Writes a document that is JSON already.
pub(super) fn put(
    connection: &Connection,
    kind: Kind,
    id: Uuid,
    name: Option<&str>,
    body: &str,
) -> Result<(), StoreError> {
    let statement = "INSERT INTO document (kind, id, name, body) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (kind, id) DO UPDATE SET name = excluded.name, body = excluded.body";
    write(connection, statement, kind, id, name, body)
}

pub(super) fn delete(connection: &Connection, kind: Kind, id: Uuid) -> Result<bool, StoreError> {
    connection
        .prepare_cached("DELETE FROM document WHERE kind = ?1 AND id = ?2")
        .and_then(|mut statement| statement.execute(params![kind.stored(), id.as_bytes()]))
        .map(|removed| removed > 0)
        .map_err(StoreError::from)
}

pub(super) fn meta_put(connection: &Connection, key: &str, body: &str) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO meta (key, body) VALUES (?1, ?2)
             ON CONFLICT (key) DO UPDATE SET body = excluded.body",
        )
        .and_then(|mut statement| statement.execute(params![key, body]))
        .map(|_| ())
        .map_err(StoreError::from)
}

fn write(
    connection: &Connection,
    statement: &str,
    kind: Kind,
    id: Uuid,
    name: Option<&str>,
    body: &str,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(statement)
        .and_then(|mut statement| statement.execute(params![kind.stored(), id.as_bytes(), name, body]))
        .map(|_| ())
        .map_err(|error| match error.sqlite_extended_error_code() {
            Some(ffi::SQLITE_CONSTRAINT_PRIMARYKEY) => StoreError::Exists { kind, id },
            Some(ffi::SQLITE_CONSTRAINT_UNIQUE) => StoreError::NameTaken { kind, id },
            _ => StoreError::from(error),
        })
}

pub(super) fn render<T: Serialize>(
    document: &T,
    which: impl Fn() -> DocumentRef,
) -> Result<String, StoreError> {
    let body = serde_json::to_string(document)
        .map_err(|source| StoreError::Unwritable { document: which(), source })?;
    if body.len() > MAX_DOCUMENT {
        return Err(StoreError::TooLong { document: which(), bytes: body.len() });
    }
    Ok(body)
}

fn parse<T: DeserializeOwned>(body: ValueRef<'_>) -> Result<T, serde_json::Error> {
    match body {
        ValueRef::Text(text) => serde_json::from_slice(text),
        _ => Err(serde_json::Error::custom("stored value is not text")),
    }
}
