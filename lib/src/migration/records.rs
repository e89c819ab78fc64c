//! Sealed records on their way between hosts: hiding their headers from the network.
//!
//! Owns: the mask over headers, that a batch is the records that it declares. Must not know: sockets, keys of
//! the helpers, what is in a page.
//!
//! Records are sealed helper to helper, so that a stream needs no TLS around them: encrypting everything a
//! second time costs as much as sealing it. What TLS would still have hidden is the headers, that is, which
//! page of RAM was written when. They are masked instead: XORed with AES-256-CTR under a key that the control
//! link carried inside TLS. Integrity is not the mask's business: the helper binds every header to its seal,
//! so that a changed bit is a record that does not open, with or without a mask.

use aes::Aes256;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use mirrorvm_abi::record::{HEADER_BYTES, Header};

use super::MigrationFault;
use crate::memory::Span;
use crate::mirror::records::Walk;

/// Hides the headers of one stream. Both ends apply it to the same bytes in the same order; a keystream byte
/// is used once, because a session's key is fresh and a stream has an initial counter block of its own.
pub(super) struct Mask {
    cipher: Ctr128BE<Aes256>,
    /// Keystream for a batch: made at once, because ciphers are fast on many blocks and slow on two.
    ahead: Vec<u8>,
}

impl Mask {
    pub fn new(key: &[u8; 32], stream: u16) -> Self {
        let mut block = [0; 16];
        block[..2].copy_from_slice(&stream.to_le_bytes());
        Self { cipher: Ctr128BE::new(key.into(), &block.into()), ahead: Vec::new() }
    }

    /// Hides bytes that are seen, or shows bytes that are hidden.
    pub fn apply(&mut self, bytes: &mut [u8]) {
        self.cipher.apply_keystream(bytes);
    }

    /// Makes the keystream for `count` headers.
    fn prepare(&mut self, count: u32) {
        self.ahead.clear();
        self.ahead.resize(count as usize * HEADER_BYTES, 0);
        self.cipher.apply_keystream(&mut self.ahead);
    }

    /// Applies the prepared keystream of header `index`.
    fn apply_at(&self, index: u32, header: &mut [u8; HEADER_BYTES]) {
        let at = index as usize * HEADER_BYTES;
        header.iter_mut().zip(&self.ahead[at..at + HEADER_BYTES]).for_each(|(h, k)| *h ^= k);
    }
}

/// What is done to the headers of a batch.
pub(super) enum Pass<'a> {
    /// They are about to leave.
    Hide(&'a mut Mask),
    /// They came hidden.
    Show(&'a mut Mask),
    /// They came inside TLS.
    Look,
}

/// Goes over the `count` records that fill `span` (the caller has bounded it); `seen` gets each header. The
/// span is shared with a helper: every header is copied out once, and what was copied is what counts.
///
/// # Errors
/// [`MigrationFault::Protocol`] for anything that is not exactly `count` records.
pub(super) fn pass(
    span: &dyn Span,
    count: u32,
    mut what: Pass<'_>,
    mut seen: impl FnMut(&Header),
) -> Result<(), MigrationFault> {
    let broken = || MigrationFault::Protocol("a batch that is not the records it declares");
    if let Pass::Hide(mask) | Pass::Show(mask) = &mut what {
        mask.prepare(count);
    }
    let mut walk = Walk::over(span.len());
    for index in 0..count {
        let (at, mut raw) = (walk.at(), [0; HEADER_BYTES]);
        if !walk.has_header() {
            return Err(broken());
        }
        span.copy_out(at, &mut raw);
        if let Pass::Show(mask) = &what {
            mask.apply_at(index, &mut raw);
            span.copy_in(at, &raw);
        }
        let header = walk.step(&raw).ok_or_else(broken)?;
        if let Pass::Hide(mask) = &what {
            mask.apply_at(index, &mut raw);
            span.copy_in(at, &raw);
        }
        seen(&header);
    }
    if walk.is_over() { Ok(()) } else { Err(broken()) }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::os::fd::BorrowedFd;

    use mirrorvm_abi::record::{Kind, TAG_BYTES};
    use proptest::prelude::*;

    use super::*;

    struct Plain(RefCell<Vec<u8>>);

    impl Span for Plain {
        fn len(&self) -> usize {
            self.0.borrow().len()
        }
        fn write_to(&self, _: usize, _: BorrowedFd<'_>) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn read_from(&self, _: usize, _: BorrowedFd<'_>) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn copy_out(&self, at: usize, to: &mut [u8]) {
            to.copy_from_slice(&self.0.borrow()[at..at + to.len()]);
        }
        fn copy_in(&self, at: usize, from: &[u8]) {
            self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
        }
    }

    fn batch(zero: &[bool], first: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, zero) in zero.iter().enumerate() {
            let kind = if *zero { Kind::ZeroPage } else { Kind::Page };
            let len = kind.body_bytes() as u32;
            let (sequence, page) = (i as u64, first + i as u64);
            bytes.extend(Header { kind, stream: 3, epoch: 9, sequence, page, len }.encode());
            bytes.extend(std::iter::repeat_n(0x5a, len as usize + TAG_BYTES));
        }
        bytes
    }

    proptest! {
        #[test]
        fn what_was_hidden_comes_back_and_looks_like_nothing_meanwhile(
            batches in prop::collection::vec((prop::collection::vec(any::<bool>(), 1..20), 0u64..1 << 40), 1..4),
            key: [u8; 32],
        ) {
            let (mut out, mut back) = (Mask::new(&key, 3), Mask::new(&key, 3));
            for (zero, first) in batches {
                let bytes = batch(&zero, first);
                let span = Plain(RefCell::new(bytes.clone()));
                let count = zero.len() as u32;
                pass(&span, count, Pass::Hide(&mut out), |_| {}).unwrap();
                let hidden = span.0.borrow().clone();
                prop_assert_ne!(&hidden[..HEADER_BYTES], &bytes[..HEADER_BYTES]);
                let mut pages = Vec::new();
                pass(&span, count, Pass::Show(&mut back), |h| pages.push(h.page)).unwrap();
                prop_assert_eq!(&*span.0.borrow(), &bytes);
                prop_assert_eq!(pages, (first..first + zero.len() as u64).collect::<Vec<_>>());
            }
        }

        #[test]
        fn bytes_of_a_stranger_are_refused_and_never_read_past(
            bytes in prop::collection::vec(any::<u8>(), 0..9000), count in 0u32..600, key: [u8; 32],
        ) {
            let span = Plain(RefCell::new(bytes));
            let refused = pass(&span, count, Pass::Show(&mut Mask::new(&key, 0)), |_| {}).is_err();
            prop_assert!(refused || (count == 0 && span.is_empty()));
        }
    }

    #[test]
    fn a_batch_of_another_length_or_count_is_refused() {
        let bytes = batch(&[false, true, false], 7);
        let look = |bytes: &[u8], count| {
            pass(&Plain(RefCell::new(bytes.to_vec())), count, Pass::Look, |_| {}).is_ok()
        };
        assert!(look(&bytes, 3));
        assert!(!look(&bytes, 2) && !look(&bytes, 4));
        assert!(!look(&bytes[..bytes.len() - 1], 3));
        assert!(!look(&[&bytes[..], &[0]].concat(), 3));
    }

    #[test]
    fn streams_have_keystreams_of_their_own() {
        let hidden = |stream| {
            let mut bytes = [0; 64];
            Mask::new(&[7; 32], stream).apply(&mut bytes);
            bytes
        };
        assert_ne!(hidden(0), hidden(1));
        assert_ne!(hidden(1), hidden(256));
    }
}
