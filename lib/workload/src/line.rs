//! A line of console output, put together without an allocator.

use crate::CONSOLE_BYTES;

/// Longest line that the program prints; what is longer is cut.
const LINE_BYTES: usize = 128;
const _: () = assert!(LINE_BYTES <= CONSOLE_BYTES);

pub(crate) struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Line {
    /// Words and numbers in turn, then a new line.
    pub fn new(words: &[&str], numbers: &[u64]) -> Self {
        let mut line = Self { bytes: [0; LINE_BYTES], len: 0 };
        for (i, word) in words.iter().enumerate() {
            word.bytes().for_each(|b| line.put(b));
            if let Some(n) = numbers.get(i) {
                line.number(*n);
            }
        }
        line.put(b'\n');
        line
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, byte: u8) {
        if let Some(to) = self.bytes.get_mut(self.len) {
            *to = byte;
            self.len += 1;
        }
    }

    fn number(&mut self, n: u64) {
        if n >= 10 {
            self.number(n / 10);
        }
        self.put(b'0' + (n % 10) as u8);
    }
}
