//! Locks of a daemon that goes on after a thread of it has panicked.
//!
//! A panic is a fault of ours; that the locks which the thread held refuse everybody from then on would make
//! it everybody's. What they guard is changed in one step at a time, so that it is whole whenever a thread
//! lets go of it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// [`Mutex::lock`], whoever has panicked with it.
pub trait Locked<T: ?Sized> {
    /// Waits for the lock.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T: ?Sized> Locked<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`RwLock::read`] and [`RwLock::write`], whoever has panicked with them.
pub trait Shared<T: ?Sized> {
    /// Waits until nobody changes it.
    fn to_read(&self) -> RwLockReadGuard<'_, T>;

    /// Waits until nobody has it.
    fn to_write(&self) -> RwLockWriteGuard<'_, T>;
}

impl<T: ?Sized> Shared<T> for RwLock<T> {
    fn to_read(&self) -> RwLockReadGuard<'_, T> {
        self.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn to_write(&self) -> RwLockWriteGuard<'_, T> {
        self.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`Condvar::wait`], whoever has panicked with the lock.
pub trait WaitLocked {
    /// Lets go of the lock until somebody signals, or for no reason: look again at what is waited for.
    fn wait_locked<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T>;

    /// The same, for no longer than `at_most`.
    fn wait_locked_for<'a, T>(&self, guard: MutexGuard<'a, T>, at_most: Duration) -> MutexGuard<'a, T>;
}

impl WaitLocked for Condvar {
    fn wait_locked<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_locked_for<'a, T>(&self, guard: MutexGuard<'a, T>, at_most: Duration) -> MutexGuard<'a, T> {
        self.wait_timeout(guard, at_most).unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_panicked_with_is_still_there() {
        let (mutex, lock) = (Mutex::new(1), RwLock::new(2));
        let panics = std::thread::scope(|s| {
            s.spawn(|| {
                let (_a, _b) = (mutex.locked(), lock.to_write());
                panic!("meant");
            })
            .join()
            .is_err()
        });
        assert!(panics && mutex.is_poisoned() && lock.is_poisoned());
        assert_eq!((*mutex.locked(), *lock.to_read()), (1, 2));
        assert_eq!(*lock.to_write(), 2);
    }
}
