//! What a guest printed: the newest bytes, with their place in all that it ever printed.

use crate::sync::Locked;
use std::collections::VecDeque;
use std::sync::Mutex;

/// Bytes that are kept.
const KEPT: usize = 256 << 10;
/// Bytes that travel with a migration.
const CARRIED: usize = 32 << 10;

/// A console's output. Offsets count from the guest's first byte and survive migration.
#[derive(Debug, Default)]
pub struct Console {
    inner: Mutex<Output>,
}

#[derive(Debug, Default)]
struct Output {
    end: u64,
    bytes: VecDeque<u8>,
}

impl Console {
    /// Adds output.
    pub fn append(&self, bytes: &[u8]) {
        let mut out = self.output();
        out.end += bytes.len() as u64;
        out.bytes.extend(bytes);
        let excess = out.bytes.len().saturating_sub(KEPT);
        out.bytes.drain(..excess);
    }

    /// At most `max` bytes from `offset` (`None`: the oldest kept): the offset of the first, the bytes, and
    /// the offset after the newest byte.
    pub fn read(&self, offset: Option<u64>, max: usize) -> (u64, Vec<u8>, u64) {
        let out = self.output();
        let oldest = out.end - out.bytes.len() as u64;
        let from = offset.unwrap_or(oldest).clamp(oldest, out.end);
        let data = out.bytes.iter().skip((from - oldest) as usize).take(max).copied().collect();
        (from, data, out.end)
    }

    /// Offset after the newest byte.
    pub fn end(&self) -> u64 {
        self.output().end
    }

    /// The newest output, to go with a migration: the end offset and the bytes before it.
    pub fn carry(&self) -> (u64, Vec<u8>) {
        let out = self.output();
        let skip = out.bytes.len().saturating_sub(CARRIED);
        (out.end, out.bytes.iter().skip(skip).copied().collect())
    }

    /// Takes over output that was carried here; nothing was printed here before.
    pub fn adopt(&self, end: u64, bytes: &[u8]) {
        let mut out = self.output();
        out.bytes = bytes.iter().copied().collect();
        out.end = end.max(bytes.len() as u64);
    }

    fn output(&self) -> std::sync::MutexGuard<'_, Output> {
        self.inner.locked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_survive_trimming_and_carrying() {
        let c = Console::default();
        for i in 0..KEPT / 8 + 100 {
            c.append(format!("{i:07}\n").as_bytes());
        }
        let (from, data, end) = c.read(Some(0), 16);
        assert_eq!(end, (KEPT + 800) as u64);
        assert_eq!(from, 800);
        assert_eq!(data, b"0000100\n0000101\n");
        let (end, tail) = c.carry();
        let d = Console::default();
        d.adopt(end, &tail);
        d.append(b"next\n");
        assert_eq!(d.read(Some(end), 100), (end, b"next\n".to_vec(), end + 5));
        assert_eq!(d.read(Some(u64::MAX), 100).1, b"");
    }
}
