//! How long a client waits, and how much it takes.
//!
//! Owns: the bounds and their defaults. Must not know: what they are held against.

use std::time::Duration;

/// Bounds of every exchange of a client. A request may have its own for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest time until a connection is open, the TLS handshake included. Default: 10 seconds.
    pub connect: Duration,
    /// Longest time from sending a request to the last byte of its answer. Default: 120 seconds, twice the
    /// longest wait of a long poll.
    pub answer: Duration,
    /// Longest silence on an event stream. Default: 45 seconds; the daemon sends a bookmark every 15.
    pub silence: Duration,
    /// Most bytes of an answer's body, or of one event of a stream. Default: 64 MiB.
    pub body: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(120),
            silence: Duration::from_secs(45),
            body: 64 << 20,
        }
    }
}
