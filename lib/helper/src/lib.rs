//! The migration helper's logic: seals pages on export, opens them on import, and alone decides what is
//! legal.
//!
//! The same code runs on a mirror vCPU (the bare-metal program in `image/`) and as host code in tests and the
//! `emulated` driver; [`Env`] is the seam. It owns keys, epochs, counters, the op-states of a session. It
//! must not know KVM, hosts or sockets. Everything in the mailbox comes from a stranger: entries, page
//! numbers and records are copied to private memory before they are looked at, ciphertext is opened there,
//! and a page is written only after its tag is right.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod agreement;
mod audit;
mod batch;
mod control;
mod digest;
mod env;
pub mod evidence;
mod keys;
mod maps;
pub mod op_state;
mod random;
mod scan;
mod seal;
mod shared;
mod worker;

pub use digest::PageDigester;
pub use env::{Env, Region};
pub use maps::PageMaps;
pub use scan::Digests;
pub use shared::{MemoryCopy, Shared};
pub use worker::{Cursors, Scratch, Step, Worker};
