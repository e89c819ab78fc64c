//! Memory that bytes of a frame go to or come from without a buffer in between.
//!
//! Owns: the trait that the memory's owner implements. Must not know: whose memory it is.

use std::io;
use std::os::fd::BorrowedFd;

/// A span of memory that others may write at any time, as guest and helper memory is: reached by copies and
/// system calls only. Offsets count from the span's start and never leave it.
pub trait Span {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Whether it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes bytes from `at` on into `fd`; gives how many it took.
    ///
    /// # Errors
    /// The system's, `WouldBlock` included.
    fn write_to(&self, at: usize, fd: BorrowedFd<'_>) -> io::Result<usize>;

    /// Reads from `fd` to `at` and behind; gives how many bytes came, 0 at the end.
    ///
    /// # Errors
    /// The system's, `WouldBlock` included.
    fn read_from(&self, at: usize, fd: BorrowedFd<'_>) -> io::Result<usize>;

    /// Copies bytes from the span, beginning at offset `at`.
    fn copy_out(&self, at: usize, to: &mut [u8]);

    /// Copies bytes into the span, beginning at offset `at`.
    fn copy_in(&self, at: usize, from: &[u8]);
}
