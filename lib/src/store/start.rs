//! Opening the database that a host runs on.
//!
//! Owns: the order: judged before anything is written, saved before it is brought forward, marked before
//! anybody is told. Must not know: how any of that is done.

use std::path::Path;

use rusqlite::Connection;

use super::StoreError;
use super::finding::{Finding, damaged_or, older_than, untrusted};
use super::forward::{self, Renew, Step};
use super::keeper::Keeper;
use super::mark::{self, Mark, Position, Verdict, Word};
use super::open::{Place, SCHEMA_VERSION, check_file, check_rows, create, has_position, look, to_write};
use super::position::position_of;
use crate::private_files::FileLock;

/// A database that was believed.
pub(super) struct Opened {
    pub connection: Connection,
    pub keeper: Keeper,
    pub lock: FileLock,
}

/// The database at `path`; a new one where there never was one.
pub(super) fn open(path: &Path, renew: Renew) -> Result<Opened, StoreError> {
    let place = Place::of(path, true)?;
    let lock = place.lock()?;
    let word = place.word()?;
    if !place.check_header()? {
        let acknowledged = match word {
            Word::At(at) => Some(at.seq),
            Word::Missing | Word::Damaged => None,
        };
        if word != Word::Missing || place.has("-wal")? {
            return Err(untrusted(path, Finding::Gone { acknowledged }));
        }
        create(&place)?;
    }
    let mut connection = look(&place)?;
    let version = check_file(path, &connection, "")?;
    let at = has_position(version).then(|| position_of(path, &connection)).transpose()?;
    let verdict = match &at {
        Some(position) => {
            let verdict = mark::judge(position, &word);
            if let Verdict::Refused(refusal) = verdict {
                return Err(untrusted(path, Finding::of(refusal, path, position.seq)));
            }
            check_rows(path, &connection, position)?;
            verdict
        }
        // A mark is made with version 4: the database is older than it.
        None if word != Word::Missing => return Err(older_than(path, &word)),
        None => Verdict::Begun,
    };
    let step = (version != SCHEMA_VERSION)
        .then(|| Step::prepare(&place, &connection, version, at.as_ref(), renew))
        .transpose()?;
    to_write(&connection)?;
    if let (Some(step), None) = (&step, at) {
        forward::upgrade(&connection, step).map_err(|error| damaged_or(path, error))?;
    }
    let position = position_of(path, &connection)?;
    let mut keeper = keep(&place, position, verdict == Verdict::Whole { mark: false })?;
    if let Some(step) = step {
        if at.is_some() {
            step.take(&mut connection, &mut keeper).map_err(|error| damaged_or(path, error))?;
        }
        step.tell(path);
    }
    Ok(Opened { connection, keeper, lock })
}

/// The keeper of a database at this position, whose mark says so from now on.
fn keep(place: &Place, position: Position, marked: bool) -> Result<Keeper, StoreError> {
    let there = place.dir.contains(&place.mark).map_err(StoreError::Files)?;
    if !there {
        mark::make(&place.dir, &place.mark, &position).map_err(StoreError::of_files)?;
    }
    let mark = Mark::open(&place.dir, &place.mark).map_err(StoreError::Files)?;
    if there && !marked {
        mark.write(&position).map_err(StoreError::of_files)?;
    }
    Ok(Keeper::new(position, mark))
}
