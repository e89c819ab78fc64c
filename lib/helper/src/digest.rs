//! The digest of a page: a keyed sum that tells whether a page's content is another than it was.
//!
//! ```text
//! digest(M) = E(k, m[0] ^ o[0]) ^ E(k, m[1] ^ o[1]) ^ ... ^ E(k, m[255] ^ o[255])      o[i] = E(k', i)
//! ```
//!
//! `E` is AES-128, `m[i]` are the page's 256 blocks, `k` and `k'` are fresh for every session and never leave
//! the helper. It is the hash inside of PMAC (Black and Rogaway, EUROCRYPT 2002) with masks of their own
//! instead of multiples of one: all blocks are independent of each other, so AES runs as many of them at once
//! as the processor can.
//!
//! **Why two contents have two digests.** Not because AES is a hash: because whoever chooses the contents
//! does not know the key. Let `E(k', .)` and `E(k, .)` be random (AES as a pseudorandom permutation). Two
//! pages that differ in block `j` collide only if (a) one of the inputs `m[j] ^ o[j]`, `m'[j] ^ o[j]` meets
//! another input of the two sums: at most 2 * 510 meetings of 2^-128 each as `o[j]` is independent of the
//! other masks, or (b) the value of `E` at an input that occurs once happens to cancel the rest: at most 1 /
//! (2^128 - 512). Together below 2^-117 for each pair that is compared. Digests are never shown, and a guest
//! learns of a collision at most that it had one, so it cannot search: after 2^48 comparisons (a 1 TiB guest
//! scanned 2^20 times) the chance of one missed page is below 2^-69. The masks are distinct rather than
//! random, which is within 2^-113 of it (256^2 / 2^129).
//!
//! Equal contents always have equal digests, so nothing is sent twice for the digest's sake.

use aes::Aes128;
use aes::cipher::{
    Array, BlockCipherEncBackend, BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit,
    ParBlocks, ParBlocksSizeUser, consts::U16, typenum::Unsigned,
};
use mirrorvm_abi::PAGE_BYTES;

use crate::scan::PageDigest;

/// Bytes of an AES block.
const BLOCK: usize = 16;
/// Blocks of a page.
const BLOCKS: usize = PAGE_BYTES / BLOCK;

type Block = aes::Block;

/// A key's digests of pages.
#[derive(Clone)]
pub struct PageDigester {
    cipher: Aes128,
    masks: [Block; BLOCKS],
}

impl PageDigester {
    /// Digests under `key`: half of it for the sum, half for the masks.
    pub fn new(key: &[u8; 32]) -> Self {
        let (sum, mask) = key.split_at(BLOCK);
        let half = |bytes: &[u8]| {
            let mut half = Block::default();
            half.copy_from_slice(bytes);
            Aes128::new(&half)
        };
        let mut masks = [Block::default(); BLOCKS];
        for (mask, i) in masks.iter_mut().zip(0u64..) {
            mask[..8].copy_from_slice(&i.to_le_bytes());
        }
        half(mask).encrypt_blocks(&mut masks);
        Self { cipher: half(sum), masks }
    }

    /// The digest of a page.
    pub fn digest(&self, page: &[u8; PAGE_BYTES]) -> PageDigest {
        let mut sum = 0;
        self.cipher.encrypt_with_backend(Sum {
            blocks: page.as_chunks().0,
            masks: &self.masks,
            sum: &mut sum,
        });
        [sum as u64, (sum >> 64) as u64]
    }
}

/// The sum over a page's blocks, handed to whatever implementation of AES the processor has: as many blocks
/// at once as that takes side by side. The last of them may be too few: what is behind them is of earlier
/// blocks and left out of the sum, which costs less than one block after the other.
struct Sum<'a> {
    blocks: &'a [[u8; BLOCK]],
    masks: &'a [Block],
    sum: &'a mut u128,
}

impl BlockSizeUser for Sum<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Sum<'_> {
    #[inline]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        let at_once = <B as ParBlocksSizeUser>::ParBlocksSize::USIZE;
        let mut some = ParBlocks::<B>::default();
        for (blocks, masks) in self.blocks.chunks(at_once).zip(self.masks.chunks(at_once)) {
            for ((input, block), mask) in some.iter_mut().zip(blocks).zip(masks) {
                *input = Array((u128::from_ne_bytes(*block) ^ u128::from_ne_bytes(mask.0)).to_ne_bytes());
            }
            backend.encrypt_par_blocks((&mut some).into());
            *self.sum = some
                .iter()
                .take(blocks.len())
                .fold(*self.sum, |sum, output| sum ^ u128::from_ne_bytes(output.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// The sum as the module's doc has it, block by block.
    fn by_the_book(key: &[u8; 32], page: &[u8; PAGE_BYTES]) -> PageDigest {
        let aes = |half: &[u8], input: u128| {
            let mut block = Block::default();
            block.copy_from_slice(&input.to_le_bytes());
            let mut k = Block::default();
            k.copy_from_slice(half);
            Aes128::new(&k).encrypt_block(&mut block);
            u128::from_le_bytes(block.0)
        };
        let mut sum = 0;
        for (i, block) in page.chunks(16).enumerate() {
            let block = u128::from_le_bytes(block.try_into().unwrap());
            sum ^= aes(&key[..16], block ^ aes(&key[16..], i as u128));
        }
        [sum as u64, (sum >> 64) as u64]
    }

    fn random_page(mut seed: u64) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        for chunk in page.chunks_exact_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            chunk.copy_from_slice(&(seed ^ seed >> 29).to_le_bytes());
        }
        page
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn is_the_documented_sum_and_moves_with_every_change(
            key: [u8; 32], seed: u64, at in 0..PAGE_BYTES, bit in 0u8..8, (a, b) in (0usize..256, 0usize..256),
        ) {
            let digester = PageDigester::new(&key);
            let page = random_page(seed);
            let digest = digester.digest(&page);
            prop_assert_eq!(digest, by_the_book(&key, &page));
            prop_assert_eq!(digest, digester.digest(&page));
            let mut other = page;
            other[at] ^= 1 << bit;
            prop_assert_ne!(digest, digester.digest(&other));
            // The masks tell places apart: the same blocks in another order are another page.
            let mut swapped = page;
            swapped.copy_within(a * 16..a * 16 + 16, b * 16);
            swapped[a * 16..a * 16 + 16].copy_from_slice(&page[b * 16..b * 16 + 16]);
            prop_assert_eq!(digest == digester.digest(&swapped), page == swapped);
            let mut other_key = key;
            other_key[at % 32] ^= 1 << bit;
            prop_assert_ne!(digest, PageDigester::new(&other_key).digest(&page));
        }
    }

    #[test]
    fn pages_of_equal_blocks_do_not_cancel_out() {
        // Without masks an even number of equal blocks would sum up to nothing, whatever they are.
        let digester = PageDigester::new(&[7; 32]);
        let digests: HashSet<_> = (0..=255).map(|byte| digester.digest(&[byte; PAGE_BYTES])).collect();
        assert_eq!(digests.len(), 256);
        assert!(!digests.contains(&[0, 0]));
    }
}
