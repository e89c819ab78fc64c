//! Reading and writing documents on one connection.
//!
//! Owns: what is read, and turning constraint violations into our errors. Must not know: files, locks.

use rusqlite::{Connection, OptionalExtension, Row, ffi, params};
use uuid::Uuid;

use super::form::{self, Document};
use super::mark::Digest;
use super::rows::{self, Rows};
use super::{DocumentRef, Kind, MAX_DOCUMENT, StoreError};

/// Several reads and writes that belong together; see [`Store::transaction`](super::Store::transaction).
pub struct Transaction<'a> {
    rows: Rows<'a>,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(rows: Rows<'a>) -> Self {
        Self { rows }
    }

    /// As [`Store::put`](super::Store::put).
    pub fn put<T: Document>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        put(&self.rows, kind, id, name, &render(document, || DocumentRef::Document(kind, id))?)
    }

    /// As [`Store::insert`](super::Store::insert).
    pub fn insert<T: Document>(
        &self,
        kind: Kind,
        id: Uuid,
        name: Option<&str>,
        document: &T,
    ) -> Result<(), StoreError> {
        let body = render(document, || DocumentRef::Document(kind, id))?;
        write(&self.rows, kind, id, name, &body, true)
    }

    /// As [`Store::get`](super::Store::get).
    pub fn get<T: Document>(&self, kind: Kind, id: Uuid) -> Result<Option<T>, StoreError> {
        get(&self.rows, kind, id)
    }

    /// As [`Store::get_by_name`](super::Store::get_by_name).
    pub fn get_by_name<T: Document>(&self, kind: Kind, name: &str) -> Result<Option<(Uuid, T)>, StoreError> {
        get_by_name(&self.rows, kind, name)
    }

    /// As [`Store::list`](super::Store::list).
    pub fn list<T: Document>(&self, kind: Kind) -> Result<Vec<(Uuid, T)>, StoreError> {
        list(&self.rows, kind)
    }

    /// As [`Store::delete`](super::Store::delete).
    pub fn delete(&self, kind: Kind, id: Uuid) -> Result<bool, StoreError> {
        self.rows.forget_document(kind, id).map_err(StoreError::from)
    }

    /// As [`Store::meta_put`](super::Store::meta_put).
    pub fn meta_put<T: Document>(&self, key: &str, document: &T) -> Result<(), StoreError> {
        let body = render(document, || DocumentRef::Meta(key.to_owned()))?;
        self.rows.meta(key, &body).map_err(StoreError::from)
    }

    /// As [`Store::meta_delete`](super::Store::meta_delete).
    pub fn meta_delete(&self, key: &str) -> Result<(), StoreError> {
        self.rows.forget_meta(key).map_err(StoreError::from)
    }

    /// As [`Store::meta_get`](super::Store::meta_get).
    pub fn meta_get<T: Document>(&self, key: &str) -> Result<Option<T>, StoreError> {
        meta_get(&self.rows, key)
    }
}

pub(super) fn get<T: Document>(
    connection: &Connection,
    kind: Kind,
    id: Uuid,
) -> Result<Option<T>, StoreError> {
    let which = || DocumentRef::Document(kind, id);
    connection
        .prepare_cached("SELECT id, name, body, digest FROM document WHERE kind = ?1 AND id = ?2")
        .and_then(|mut statement| {
            let read = |row: &Row<'_>| document_in(row, kind).map(|body| parse(body, which()));
            statement.query_row(params![kind.stored(), id.as_bytes()], read).optional()
        })
        .map_err(StoreError::from)?
        .transpose()
}

pub(super) fn get_by_name<T: Document>(
    connection: &Connection,
    kind: Kind,
    name: &str,
) -> Result<Option<(Uuid, T)>, StoreError> {
    let id: Option<[u8; 16]> = connection
        .prepare_cached("SELECT id FROM document WHERE kind = ?1 AND name = ?2")
        .and_then(|mut statement| {
            statement.query_row(params![kind.stored(), name], |row| row.get(0)).optional()
        })
        .map_err(StoreError::from)?;
    match id.map(Uuid::from_bytes) {
        Some(id) => Ok(get(connection, kind, id)?.map(|document| (id, document))),
        None => Ok(None),
    }
}

pub(super) fn list<T: Document>(connection: &Connection, kind: Kind) -> Result<Vec<(Uuid, T)>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT id, name, body, digest FROM document WHERE kind = ?1 ORDER BY id")
        .map_err(StoreError::from)?;
    let mut rows = statement.query(params![kind.stored()]).map_err(StoreError::from)?;
    let mut all = Vec::new();
    while let Some(row) = rows.next().map_err(StoreError::from)? {
        let id = Uuid::from_bytes(row.get(0).map_err(StoreError::from)?);
        let body = document_in(row, kind).map_err(StoreError::from)?;
        all.push((id, parse(body, DocumentRef::Document(kind, id))?));
    }
    Ok(all)
}

pub(super) fn meta_get<T: Document>(connection: &Connection, key: &str) -> Result<Option<T>, StoreError> {
    connection
        .prepare_cached("SELECT body, digest FROM meta WHERE key = ?1")
        .and_then(|mut statement| {
            let read = |row: &Row<'_>| {
                let body = row.get_ref(0)?.as_bytes()?;
                let good = row.get::<_, Digest>(1)? == rows::of_meta(key, body);
                Ok(parse(good.then(|| body.to_vec()), DocumentRef::Meta(key.to_owned())))
            };
            statement.query_row([key], read).optional()
        })
        .map_err(StoreError::from)?
        .transpose()
}

/// The body of a document, if the row is what was written.
fn document_in(row: &Row<'_>, kind: Kind) -> rusqlite::Result<Option<Vec<u8>>> {
    let (id, name) = (row.get_ref(0)?.as_bytes()?, row.get::<_, Option<String>>(1)?);
    let body = row.get_ref(2)?.as_bytes()?;
    let digest = rows::of_document(kind.stored(), id, name.as_deref(), body);
    Ok((row.get::<_, Digest>(3)? == digest).then(|| body.to_vec()))
}

/// Writes a document that is JSON already.
pub(super) fn put(
    rows: &Rows<'_>,
    kind: Kind,
    id: Uuid,
    name: Option<&str>,
    body: &str,
) -> Result<(), StoreError> {
    write(rows, kind, id, name, body, false)
}

fn write(
    rows: &Rows<'_>,
    kind: Kind,
    id: Uuid,
    name: Option<&str>,
    body: &str,
    insert: bool,
) -> Result<(), StoreError> {
    rows.document(kind, id, name, body, insert).map_err(|error| match error.sqlite_extended_error_code() {
        Some(ffi::SQLITE_CONSTRAINT_PRIMARYKEY) => StoreError::Exists { kind, id },
        Some(ffi::SQLITE_CONSTRAINT_UNIQUE) => StoreError::NameTaken { kind, id },
        _ => StoreError::from(error),
    })
}

pub(super) fn render<T: Document>(
    document: &T,
    which: impl Fn() -> DocumentRef,
) -> Result<String, StoreError> {
    let body =
        form::write(document).map_err(|source| StoreError::Unwritable { document: which(), source })?;
    if body.len() > MAX_DOCUMENT {
        return Err(StoreError::TooLong { document: which(), bytes: body.len() });
    }
    Ok(body)
}

fn parse<T: Document>(body: Option<Vec<u8>>, which: DocumentRef) -> Result<T, StoreError> {
    let Some(body) = body else {
        return Err(StoreError::Damaged { what: which.to_string(), source: None });
    };
    form::read(&body).map_err(|source| StoreError::Unreadable { document: which, source })
}
