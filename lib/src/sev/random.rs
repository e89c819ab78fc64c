//! Random bytes: the operating system's, or a stream from a seed for tests that must repeat.

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// A source of random bytes.
pub(crate) enum Random {
    /// The operating system's generator.
    System(SystemRandom),
    /// HMAC-SHA256 of a counter under a key from the seed. For tests alone: who knows the seed knows all.
    Seeded {
        /// Keyed with the seed.
        key: hmac::Key,
        /// Of the next block.
        counter: u64,
    },
}

impl Random {
    pub fn system() -> Self {
        Self::System(SystemRandom::new())
    }

    pub fn seeded(seed: u64) -> Self {
        Self::Seeded { key: hmac::Key::new(hmac::HMAC_SHA256, &seed.to_le_bytes()), counter: 0 }
    }

    /// Fills `to`.
    ///
    /// # Panics
    /// When the operating system has no random bytes to give: nothing here can go on without them.
    pub fn fill(&mut self, to: &mut [u8]) {
        match self {
            Self::System(system) => system.fill(to).expect("the operating system gives random bytes"),
            Self::Seeded { key, counter } => {
                for chunk in to.chunks_mut(32) {
                    let block = hmac::sign(key, &counter.to_le_bytes());
                    chunk.copy_from_slice(&block.as_ref()[..chunk.len()]);
                    *counter += 1;
                }
            }
        }
    }

    /// Draws `N` random bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}
