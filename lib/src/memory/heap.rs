//! The allocator's memory.
//!
//! Owns: how much of it lies about free, and giving that back. Must not know: what was in it.

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

/// Has the threads of this process share an arena of the heap for each processor. glibc gives eight, and what
/// is freed in one is not taken for another: of a daemon whose guests are defined by many clients at once a
/// third of the heap is such holes. To be called before there are threads, which keep the arena that they
/// have.
#[expect(unsafe_code, reason = "UNSAFETY: mallopt(3) is glibc's own, and no crate we use wraps it")]
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    {
        let arenas = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 64));
        // SAFETY: it takes no pointer, and changes no allocation that is in use.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas as libc::c_int) };
    }
}
