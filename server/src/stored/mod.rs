//! The daemon's own documents as they are on disk: tokens, answers that are kept, the audit log.
//!
//! Owns: their forms, and what leads to them from those of earlier versions. Must not know: when they are
//! written.
//!
//! None of them is rewritten when a database comes forward: they go by themselves, or are a log. They are
//! read in whatever version they were written. What each of this version looks like is in
//! `server/tests/data/stored/v5`; see [`form`](mirrorvm::store::form).

mod answer;
mod audit;
mod token;

#[cfg(test)]
mod tests;
