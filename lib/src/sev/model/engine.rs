//! The memory controller's cipher: AES-128 in XTS (IEEE 1619), a page as the data unit, its system-physical
//! address as the tweak.
//!
//! So a page that is read with another key, without the C-bit, or after its ciphertext was moved to another
//! page, reads as garbage, as on real hardware. The real cipher's tweak function is not published in full;
//! nothing here depends on it.

use aes::Aes128;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

use crate::addr::PAGE_SIZE;
use crate::memory::Mapping;

const BLOCK: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;

/// The key of one ASID (the VEK).
pub struct MemoryKey {
    data: Aes128,
    tweak: Aes128,
}

impl std::fmt::Debug for MemoryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MemoryKey")
    }
}

impl MemoryKey {
    /// From 32 random bytes: data key, tweak key.
    pub fn new(key: &[u8; 32]) -> Self {
        let half = |at: usize| {
            let mut k = [0; 16];
            k.copy_from_slice(&key[at..at + 16]);
            Aes128::new(&Array::from(k))
        };
        Self { data: half(0), tweak: half(16) }
    }

    /// Reads memory as the guest would with the C-bit set.
    ///
    /// # Panics
    /// When the span leaves the mapping, as [`Mapping::read`].
    pub fn read(&self, memory: &Mapping, offset: u64, to: &mut [u8]) {
        let mut buffer = [0; PAGE];
        each_page(offset, to.len(), |at, from, len| {
            // Whole blocks around the part that is wanted.
            let (first, skip) = (at - at % BLOCK as u64, (at % BLOCK as u64) as usize);
            let span = (skip + len).next_multiple_of(BLOCK);
            memory.read(first, &mut buffer[..span]);
            self.decrypt(memory.modelled_physical() + first, &mut buffer[..span]);
            to[from..from + len].copy_from_slice(&buffer[skip..skip + len]);
        });
    }

    /// Writes memory as the guest would with the C-bit set.
    ///
    /// # Panics
    /// As [`MemoryKey::read`].
    pub fn write(&self, memory: &Mapping, offset: u64, from: &[u8]) {
        let mut buffer = [0; PAGE];
        each_page(offset, from.len(), |at, start, len| {
            let (first, skip) = (at - at % BLOCK as u64, (at % BLOCK as u64) as usize);
            let span = (skip + len).next_multiple_of(BLOCK);
            let physical = memory.modelled_physical() + first;
            if skip != 0 || span != len {
                memory.read(first, &mut buffer[..span]);
                self.decrypt(physical, &mut buffer[..span]);
            }
            buffer[skip..skip + len].copy_from_slice(&from[start..start + len]);
            self.encrypt(physical, &mut buffer[..span]);
            memory.write(first, &buffer[..span]);
        });
    }

    /// Encrypts memory in place.
    ///
    /// # Panics
    /// As [`MemoryKey::read`].
    pub fn encrypt_in_place(&self, memory: &Mapping, offset: u64, len: u64) {
        let mut buffer = [0; PAGE];
        each_page(offset, len as usize, |at, _, len| {
            memory.read(at, &mut buffer[..len]);
            self.write(memory, at, &buffer[..len]);
        });
    }

    /// `blocks` lie in one page, the first at system-physical `at`.
    fn encrypt(&self, at: u64, blocks: &mut [u8]) {
        self.masked(at, blocks, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }

    fn decrypt(&self, at: u64, blocks: &mut [u8]) {
        self.masked(at, blocks, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }

    fn masked(
        &self,
        at: u64,
        blocks: &mut [u8],
        run: impl Fn(&Aes128, &mut [Array<u8, aes::cipher::consts::U16>]),
    ) {
        let mut unit = [0; BLOCK];
        unit[..8].copy_from_slice(&(at / PAGE_SIZE).to_le_bytes());
        let mut tweak = Array::from(unit);
        self.tweak.encrypt_block(&mut tweak);
        let mut t = u128::from_le_bytes(tweak.into());
        for _ in 0..at % PAGE_SIZE / BLOCK as u64 {
            t = double(t);
        }
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty(), "callers give whole blocks");
        // A page at most: the masks fit on the stack.
        let mut masks = [0u128; PAGE / BLOCK];
        for mask in &mut masks[..blocks.len()] {
            *mask = t;
            t = double(t);
        }
        for (block, mask) in blocks.iter_mut().zip(&masks) {
            xor(block, *mask);
        }
        run(&self.data, blocks);
        for (block, mask) in blocks.iter_mut().zip(&masks) {
            xor(block, *mask);
        }
    }
}

fn xor(block: &mut Array<u8, aes::cipher::consts::U16>, mask: u128) {
    let value = u128::from_le_bytes((*block).into()) ^ mask;
    *block = value.to_le_bytes().into();
}

/// Multiplication by alpha in GF(2^128), IEEE 1619, 5.2.
const fn double(t: u128) -> u128 {
    (t << 1) ^ (0x87 * (t >> 127))
}

/// Cuts a span at page boundaries: offset, where in the caller's buffer, bytes.
fn each_page(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let part = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
        f(at, done, part);
        done += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IEEE 1619-2007, annex B, vector 2: data unit 0x3333333333, 32 bytes.
    #[test]
    fn the_published_xts_vector() {
        let mut key = [0x11; 32];
        key[16..].fill(0x22);
        let k = MemoryKey::new(&key);
        let mut data = [0x44u8; 32];
        k.encrypt(0x33_3333_3333 * PAGE_SIZE, &mut data);
        let expected = [
            0xc4, 0x54, 0x18, 0x5e, 0x6a, 0x16, 0x93, 0x6e, 0x39, 0x33, 0x40, 0x38, 0xac, 0xef, 0x83, 0x8b,
            0xfb, 0x18, 0x6f, 0xff, 0x74, 0x80, 0xad, 0xc4, 0x28, 0x93, 0x82, 0xec, 0xd6, 0xd3, 0x94, 0xf0,
        ];
        assert_eq!(data, expected);
        k.decrypt(0x33_3333_3333 * PAGE_SIZE, &mut data);
        assert_eq!(data, [0x44; 32]);
    }

    #[test]
    fn unaligned_parts_read_back_and_neighbours_stay() {
        let memory = Mapping::memfd("t", 2 * PAGE_SIZE).unwrap();
        let k = MemoryKey::new(&[7; 32]);
        k.write(&memory, 0, &[1; 2 * PAGE]);
        k.write(&memory, PAGE_SIZE - 5, b"across the edge");
        let mut all = vec![0; 2 * PAGE];
        k.read(&memory, 0, &mut all);
        assert_eq!(&all[PAGE - 5..PAGE + 10], b"across the edge");
        assert!(all[..PAGE - 5].iter().chain(&all[PAGE + 10..]).all(|b| *b == 1));
        let mut part = [0; 3];
        k.read(&memory, PAGE_SIZE - 1, &mut part);
        assert_eq!(&part, b"ss ");
    }

    #[test]
    fn ciphertext_that_moves_or_meets_another_key_is_garbage() {
        let memory = Mapping::memfd("t", 2 * PAGE_SIZE).unwrap();
        let k = MemoryKey::new(&[7; 32]);
        k.write(&memory, 0, &[0x5a; PAGE]);
        let mut raw = [0; PAGE];
        memory.read(0, &mut raw);
        assert!(raw.windows(16).all(|w| w != [0x5a; 16]), "the host sees no plaintext");
        memory.write(PAGE_SIZE, &raw);
        let mut moved = [0; PAGE];
        k.read(&memory, PAGE_SIZE, &mut moved);
        assert_ne!(moved, [0x5a; PAGE]);
        let mut other = [0; PAGE];
        MemoryKey::new(&[8; 32]).read(&memory, 0, &mut other);
        assert_ne!(other, [0x5a; PAGE]);
    }
}
