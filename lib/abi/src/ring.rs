//! Cursors and wishes: in which order each end of a worker's rings writes and looks, so that neither sleeps
//! for ever.
//!
//! Owns: that order, for both ends. Must not know: entries, who sleeps how. Why it suffices is in
//! docs/mailbox.md; `lib/helper/tests/rings.rs` runs these functions in every order that processors allow.

use core::sync::atomic::{Ordering, fence};

use crate::mailbox::{CQ_TAIL, WANT_AT, WANT_COMPLETION};

/// A worker's control page, from either end.
pub trait Cells {
    /// Reads a cursor, with acquire ordering.
    fn load(&self, at: usize) -> u32;
    /// Writes a cursor, with release ordering.
    fn store(&mut self, at: usize, value: u32);
    /// What was stored before is to be seen by whoever does not see what is loaded behind: a fence that is
    /// sequentially consistent.
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// Host: wants to be told when the helper's completion cursor is at `answered`. It has to look at the cursor
/// once more ([`is_far`]) before it sleeps.
pub fn wish(cells: &mut impl Cells, answered: u32) {
    cells.store(WANT_AT, answered);
    cells.store(WANT_COMPLETION, 1);
    // Pairs with the one in `tell`.
    cells.fence();
}

/// Host: is awake.
pub fn unwish(cells: &mut impl Cells) {
    cells.store(WANT_COMPLETION, 0);
}

/// Host: whether `enough` completions lie behind `head`.
pub fn is_far(cells: &impl Cells, head: u32, enough: u32) -> bool {
    cells.load(CQ_TAIL).wrapping_sub(head) >= enough
}

/// Helper: has written completions up to `answered`. True when the host wants to be told of just this one:
/// until it has woken up its wish stands, and every doorbell is an exit.
pub fn tell(cells: &mut impl Cells, answered: u32) -> bool {
    cells.store(CQ_TAIL, answered);
    // The host sets its wish, then looks at the cursor; we move the cursor, then look at the wish. Without
    // the fence both could look first, and the host would sleep for ever.
    cells.fence();
    cells.load(WANT_COMPLETION) != 0 && cells.load(WANT_AT) == answered
}
