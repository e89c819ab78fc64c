//! The allocator's memory.
//!
//! Owns: giving free memory of it back. Must not know: what was in it.

/// Gives the heap's free pages back to the kernel. To be called after something large and short-lived: the
/// allocator keeps what was freed in the middle, and a daemon that has built its API document holds several
/// MiB for nothing.
#[expect(unsafe_code, reason = "UNSAFETY: malloc_trim(3) is glibc's own, and no crate we use wraps it")]
pub fn give_back_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it takes no pointer, is thread-safe, and changes no allocation that is in use.
        unsafe { libc::malloc_trim(0) };
    }
}
