//! The one way of a transaction to the disk: committed, then marked, then told.
//!
//! Owns: the order of the two, and where the database is. Must not know: what is written.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rusqlite::Transaction;

use super::StoreError;
use super::mark::{Delta, Mark, Position};
use super::position::put_position;
use crate::chain::chain;
use crate::sync::Locked;

/// Tries to write the mark that follow each other before the commit is told without it.
const TRIES: u32 = 5;
/// Before the second of them; longer before each that follows.
const PAUSE: Duration = Duration::from_millis(20);

/// Commits transactions of all connections to a database, one at a time.
#[derive(Debug)]
pub(super) struct Keeper {
    position: Position,
    mark: Mark,
    /// Whether the mark says where the database is.
    marked: bool,
}

impl Keeper {
    /// Of a database at `position`, as its mark says, too.
    pub fn new(position: Position, mark: Mark) -> Self {
        Self { position, mark, marked: true }
    }

    /// Commits a transaction that does `delta`; when this returns it may be told.
    ///
    /// When the mark cannot be written after the commit, the commit holds all the same: it is on disk.
    /// Nothing more is committed then before the mark is written, so that the database is never more than the
    /// one step ahead of it that the next start allows for.
    ///
    /// # Errors
    /// Nothing was committed.
    pub fn commit(&mut self, t: Transaction<'_>, delta: &Delta) -> Result<(), StoreError> {
        if delta.writes == 0 {
            return t.commit().map_err(StoreError::from);
        }
        if !self.marked {
            self.mark.write(&self.position).map_err(StoreError::of_files)?;
            self.marked = true;
        }
        let next = self.position.next(delta);
        put_position(&t, &next)?;
        t.commit().map_err(StoreError::from)?;
        self.position = next;
        self.marked = false;
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(PAUSE * attempt);
            }
            match self.mark.write(&next) {
                Ok(()) => {
                    self.marked = true;
                    break;
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the database's mark could not be written")
                }
            }
        }
        Ok(())
    }

    /// Commits since the database's first.
    pub fn seq(&self) -> u64 {
        self.position.seq
    }

    /// Whether the mark says where the database is; while it does not, nothing is committed.
    pub fn is_marked(&self) -> bool {
        self.marked
    }
}

/// The keeper, while somebody writes.
pub(super) fn held(keeper: &Mutex<Keeper>) -> MutexGuard<'_, Keeper> {
    // A panic before the commit has rolled it back, and afterwards there is nothing that panics.
    keeper.locked()
}
