//! Mirrors of a host's guests, and what is sealed and opened through them.

pub(super) mod batches;
