//! The row with the database's position.
//!
//! Owns: writing and reading it. Must not know: what a position means, who commits.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::StoreError;
use super::finding::{Finding, damaged_or, untrusted};
use super::mark::{Digest, Position};

/// Writes the first position of a database, or of one that goes on without what came before.
pub(super) fn put_first_position(connection: &Connection, at: &Position) -> rusqlite::Result<()> {
    let statement =
        "INSERT INTO position (only, seq, rows, chain, before, sum) VALUES (1, ?1, ?2, ?3, ?4, ?5)";
    let values = params![at.seq as i64, at.rows as i64, at.chain, at.before, at.sum];
    connection.execute(statement, values).map(|_| ())
}

/// Writes where the database is after the transaction that this is part of.
pub(super) fn put_position(connection: &Connection, at: &Position) -> Result<(), StoreError> {
    let statement =
        "UPDATE position SET seq = ?1, rows = ?2, chain = ?3, before = ?4, sum = ?5 WHERE chain = ?4";
    let values = params![at.seq as i64, at.rows as i64, at.chain, at.before, at.sum];
    match connection.prepare_cached(statement)?.execute(values)? {
        1 => Ok(()),
        _ => Err(StoreError::Damaged { what: "the row with the database's position".into(), source: None }),
    }
}

/// Where the database is, as it says itself.
pub(super) fn position_of(path: &Path, connection: &Connection) -> Result<Position, StoreError> {
    let read = |row: &rusqlite::Row<'_>| {
        let (seq, rows): (i64, i64) = (row.get(0)?, row.get(1)?);
        let (chain, before, sum): (Digest, Digest, Digest) = (row.get(2)?, row.get(3)?, row.get(4)?);
        Ok(Position { seq: seq as u64, rows: rows as u64, chain, before, sum })
    };
    let statement = "SELECT seq, rows, chain, before, sum FROM position";
    let part = || untrusted(path, Finding::Part { what: "the row with its position" });
    match connection.query_row(statement, [], read).optional() {
        Ok(Some(position)) if position.is_sound() => Ok(position),
        Ok(_)
        | Err(rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..)) => {
            Err(part())
        }
        Err(error) => Err(damaged_or(path, error)),
    }
}
