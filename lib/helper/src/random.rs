//! Random bytes that are looked at before they are used.
//!
//! Owns: what a drawn word may not be. Must not know: where words come from, what they are for. No test tells
//! good randomness from bad; these find a source that is stuck, which processors have been seen to be: all
//! ones with the flag that says success (AMD, after suspend), or one value for ever. A sound source is taken
//! for a stuck one less than once in 2^58 draws.

use mirrorvm_abi::op::Status;

use crate::Env;

/// Words of the largest draw.
const WORDS: usize = 4;

/// What was drawn last, which nothing drawn next may equal. Zeroed memory is a valid one.
#[derive(Clone, Copy)]
pub(crate) struct Drawn([u64; WORDS]);

impl Drawn {
    pub const fn nothing() -> Self {
        Self([0; WORDS])
    }

    /// Draws `N` bytes, whole words of 8 and at most 32.
    ///
    /// # Errors
    /// [`Status::NoEntropy`]; what came is not used.
    pub fn draw<const N: usize>(&mut self, env: &mut impl Env) -> Result<[u8; N], Status> {
        const { assert!(N.is_multiple_of(8) && N <= WORDS * 8) };
        let mut words = [0; WORDS];
        let wanted = &mut words[..N / 8];
        if !env.random(wanted) || !sound(wanted, &self.0) {
            return Err(Status::NoEntropy);
        }
        let mut bytes = [0; N];
        for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(wanted.iter()) {
            *bytes = word.to_le_bytes();
        }
        self.0[..N / 8].copy_from_slice(&words[..N / 8]);
        Ok(bytes)
    }
}

/// Whether words may come from a source that works: none is all zero or all ones, no two are equal, and none
/// was in the last draw.
fn sound(words: &[u64], last: &[u64; WORDS]) -> bool {
    words.iter().enumerate().all(|(i, word)| {
        let before = words[..i].iter().chain(last);
        *word != 0 && *word != u64::MAX && !before.into_iter().any(|other| other == word)
    })
}

#[cfg(test)]
mod tests {
    use mirrorvm_abi::{PAGE_BYTES, evidence::RELEASE_BYTES, mailbox::Doorbell};

    use super::*;
    use crate::Region;

    /// A processor that gives these words, one draw after the other, and then none.
    struct Source(Vec<Vec<u64>>);

    impl Env for Source {
        fn load(&self, _: Region) -> u32 {
            unreachable!("drawing looks at no cursor")
        }
        fn store(&mut self, _: Region, _: u32) {
            unreachable!("drawing moves no cursor")
        }
        fn read_mailbox(&mut self, _: Region, _: &mut [u8]) {
            unreachable!("drawing reads no mailbox")
        }
        fn write_mailbox(&mut self, _: Region, _: &[u8]) {
            unreachable!("drawing writes no mailbox")
        }
        fn read_page(&mut self, _: u64, _: &mut [u8; PAGE_BYTES]) {
            unreachable!("drawing reads no page")
        }
        fn write_page(&mut self, _: u64, _: &[u8; PAGE_BYTES]) {
            unreachable!("drawing writes no page")
        }
        fn random(&mut self, words: &mut [u64]) -> bool {
            if self.0.is_empty() {
                return false;
            }
            words.copy_from_slice(&self.0.remove(0));
            true
        }
        fn secret(&self) -> Option<[u8; 32]> {
            None
        }
        fn release(&self) -> [u8; RELEASE_BYTES] {
            [0; RELEASE_BYTES]
        }
        fn doorbell(&mut self, _: Doorbell) {}
    }

    /// How many draws of three words a source that gives these is good for.
    fn draws(words: &[[u64; 3]]) -> usize {
        let mut source = Source(words.iter().map(|w| w.to_vec()).collect());
        let mut drawn = Drawn::nothing();
        std::iter::from_fn(|| drawn.draw::<24>(&mut source).ok()).count()
    }

    #[test]
    fn a_source_that_is_stuck_or_silent_is_not_used() {
        assert_eq!(draws(&[]), 0, "none");
        for stuck in [[0; 3], [u64::MAX; 3], [7; 3]] {
            assert_eq!(draws(&[stuck, stuck]), 0, "{stuck:?}");
        }
        // One bad word among good ones, at every place.
        for bad in [0, u64::MAX, 5, 6] {
            for at in 0..3 {
                let mut words = [5, 6, 7];
                words[at] = bad;
                let repeated = words[(at + 1) % 3] == bad || words[(at + 2) % 3] == bad;
                let bad = repeated || bad == 0 || bad == u64::MAX;
                assert_eq!(draws(&[words]), usize::from(!bad), "{words:?}");
            }
        }
        // The draw before, whole or in part, in any order.
        assert_eq!(draws(&[[1, 2, 3], [1, 2, 3]]), 1);
        assert_eq!(draws(&[[1, 2, 3], [4, 5, 6], [7, 8, 4]]), 2);
        assert_eq!(draws(&[[1, 2, 3], [4, 5, 6], [7, 8, 9]]), 3);
        // The processors whose source says that it works and gives all ones from some day on.
        assert_eq!(draws(&[[1, 2, 3], [4, 5, 6], [u64::MAX; 3]]), 2);
    }

    #[test]
    fn what_is_drawn_is_what_the_source_gave() {
        let mut source = Source(vec![vec![1, 2, 3], vec![4, 5, 6, 7]]);
        let mut drawn = Drawn::nothing();
        let words = |bytes: &[u8]| -> Vec<u64> {
            bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
        };
        assert_eq!(words(&drawn.draw::<24>(&mut source).unwrap()), [1, 2, 3]);
        assert_eq!(words(&drawn.draw::<32>(&mut source).unwrap()), [4, 5, 6, 7]);
        assert_eq!(drawn.draw::<32>(&mut source), Err(Status::NoEntropy));
    }
}
