//! Places for those that hold a connection for long: a bounded number, and no principal has more than half of
//! them.
//!
//! Owns: who holds how many. Must not know: what they wait for.
//!
//! Whoever waits does nothing wrong, so nobody is turned out. But one client that goes round in circles must
//! not keep every other from waiting.

use mirrorvm::sync::Locked;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Why there is no free place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// Every place is taken.
    All,
    /// The principal has as many places as one principal may have.
    Theirs {
        /// How many places a principal may have.
        each: usize,
    },
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of: HashMap<String, usize>,
}

/// Places of one kind.
#[derive(Debug)]
pub struct Places {
    all: usize,
    each: usize,
    taken: Mutex<Taken>,
}

impl Places {
    /// Makes a set of `all` places.
    pub fn new(all: usize) -> Arc<Self> {
        Arc::new(Self { all, each: all.div_ceil(2), taken: Mutex::default() })
    }

    /// Takes a place for `principal`.
    ///
    /// # Errors
    /// [`Full`].
    pub fn take(self: &Arc<Self>, principal: &str) -> Result<Place, Full> {
        let mut taken = self.lock();
        if taken.all >= self.all {
            return Err(Full::All);
        }
        let theirs = taken.of.get(principal).copied().unwrap_or(0);
        if theirs >= self.each {
            return Err(Full::Theirs { each: self.each });
        }
        taken.all += 1;
        taken.of.insert(principal.to_owned(), theirs + 1);
        drop(taken);
        Ok(Place { places: Arc::clone(self), principal: principal.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.locked()
    }
}

/// A place, which is free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    principal: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all = taken.all.saturating_sub(1);
        if let Some(theirs) = taken.of.get_mut(&self.principal) {
            *theirs = theirs.saturating_sub(1);
            if *theirs == 0 {
                // Nobody is remembered who holds nothing.
                taken.of.remove(&self.principal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_principal_has_at_most_half_and_others_have_what_is_left() {
        let places = Places::new(5);
        let take = |who: &str| places.take(who);
        let a: Vec<Place> = (0..3).map(|_| take("a").unwrap()).collect();
        assert_eq!(take("a").unwrap_err(), Full::Theirs { each: 3 });
        let b = take("b").unwrap();
        let c = take("c").unwrap();
        assert_eq!(take("d").unwrap_err(), Full::All);
        drop(a);
        assert_eq!(places.lock().of.len(), 2);
        let d = take("d").unwrap();
        drop((b, c));
        let taken = places.lock();
        assert_eq!((taken.all, taken.of.len()), (1, 1));
        drop(taken);
        drop(d);
    }

    #[test]
    fn a_single_place_is_anybodys_and_none_is_nobodys() {
        let one = Places::new(1);
        let held = one.take("a").unwrap();
        assert_eq!(one.take("b").unwrap_err(), Full::All);
        drop(held);
        assert!(one.take("b").is_ok());
        assert_eq!(Places::new(0).take("a").unwrap_err(), Full::All);
    }
}
