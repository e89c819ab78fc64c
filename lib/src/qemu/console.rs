//! Owns what takes a guest's console output. Must not know what the bytes mean.
//!
//! Lossless as long as the sink keeps up: QEMU's UART retries a full socket only a few times and then drops,
//! and all guests' consoles have one thread, so a sink must not block (a bounded buffer that overwrites its
//! oldest bytes is the right shape).

/// Takes console bytes in order, in chunks of at most 4 KiB. Runs on the thread of all consoles.
pub type ConsoleSink = Box<dyn FnMut(&[u8]) + Send>;
