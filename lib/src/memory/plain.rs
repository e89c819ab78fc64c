//! Bytes of our own as a [`Span`], for tests.
//!
//! Owns: copies to and from them. Must not know: what they are. The fuzz targets have this file, too.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;

use super::Span;

/// Bytes that nobody else writes, and that no descriptor gets.
pub struct Plain(pub RefCell<Vec<u8>>);

impl Plain {
    /// Of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(RefCell::new(bytes.to_vec()))
    }
}

impl Span for Plain {
    fn len(&self) -> usize {
        self.0.borrow().len()
    }

    fn write_to(&self, _: usize, _: BorrowedFd<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_from(&self, _: usize, _: BorrowedFd<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0.borrow()[at..at + to.len()]);
    }

    fn copy_in(&self, at: usize, from: &[u8]) {
        self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
    }
}
