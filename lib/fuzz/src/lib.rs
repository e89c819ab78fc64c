//! What bytes of a stranger must not do, one module for each place where they arrive.
//!
//! Owns: for each place what is to hold for all bytes (`run`, which panics where it does not), and the seeds
//! that a search begins with, made of real encodings (`seeds`). Must not know: who searches. `fuzz_targets`
//! gives these to libFuzzer; `tests/corpus.rs` repeats what lies in `corpus`; `run` builds and searches. How
//! a target is added is in the project's CONTRIBUTING.
#![allow(clippy::unwrap_used, reason = "a target says what must hold by panicking where it does not")]

pub mod course;
pub mod database;
pub mod declaration;
pub mod descriptor;
pub mod evidence;
pub mod image;
pub mod peer;
pub mod receive;
pub mod record;
pub mod rest;
pub mod stored;

// The machine that the helper's own tests run it on.
#[allow(clippy::single_range_in_vec_init, reason = "a guest may have its RAM in one piece")]
#[path = "../../helper/tests/support/mod.rs"]
mod support;

/// A seed: the name of its file, and its bytes.
pub type Seed = (String, Vec<u8>);

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: that of its program, and of its folder in `corpus`.
    pub name: &'static str,
    /// Panics where the bytes break what is promised.
    pub run: fn(&[u8]),
    /// What a search begins with.
    pub seeds: fn() -> Vec<Seed>,
}

/// Every target.
pub const TARGETS: [Target; 11] = [
    Target { name: "record", run: record::run, seeds: record::seeds },
    Target { name: "descriptor", run: descriptor::run, seeds: descriptor::seeds },
    Target { name: "receive", run: receive::run, seeds: receive::seeds },
    Target { name: "evidence", run: evidence::run, seeds: evidence::seeds },
    Target { name: "image", run: image::run, seeds: image::seeds },
    Target { name: "declaration", run: declaration::run, seeds: declaration::seeds },
    Target { name: "stored", run: stored::run, seeds: stored::seeds },
    Target { name: "database", run: database::run, seeds: database::seeds },
    Target { name: "peer", run: peer::run, seeds: peer::seeds },
    Target { name: "rest", run: rest::run, seeds: rest::seeds },
    Target { name: "course", run: course::run, seeds: course::seeds },
];

/// Numbers out of a target's bytes; zeros when they are used up.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let there = self.0.len().min(N);
        taken[..there].copy_from_slice(&self.0[..there]);
        self.0 = &self.0[there..];
        taken
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// As many of the next `most` bytes as there are.
    fn up_to(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
