//! Sealed groups on their way between hosts: hiding their headers and lists from the network.
//!
//! Owns: the mask over what a group begins with, that a frame is the group that it declares. Must not know:
//! sockets, keys of the helpers, what is in a page.
//!
//! Groups are sealed helper to helper, so that a stream needs no TLS around them: encrypting everything a
//! second time costs as much as sealing it. What TLS would still have hidden is the lists, that is, which
//! page of RAM was written when. They are masked instead: XORed with AES-256-CTR under a key that the control
//! link carried inside TLS. Integrity is not the mask's business: the helper binds header and list to its
//! seals, so that a changed bit is a group that does not open, with or without a mask.

use aes::Aes256;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::record::{Front, Listed, front_bytes};

use super::MigrationFault;
use crate::memory::Span;

/// Hides what the groups of one stream begin with. Both ends apply it to the same bytes in the same order; a
/// keystream byte is used once, because a session's key is fresh and a stream has an initial counter block of
/// its own.
pub struct Mask {
    cipher: Ctr128BE<Aes256>,
}

impl Mask {
    /// The mask of a stream under its session's key.
    pub fn new(key: &[u8; 32], stream: u16) -> Self {
        let mut block = [0; 16];
        block[..2].copy_from_slice(&stream.to_le_bytes());
        Self { cipher: Ctr128BE::new(key.into(), &block.into()) }
    }

    /// Hides bytes that are seen, or shows bytes that are hidden.
    pub fn apply(&mut self, bytes: &mut [u8]) {
        self.cipher.apply_keystream(bytes);
    }
}

/// What is done to what a group begins with.
pub enum Pass<'a> {
    /// It is about to leave.
    Hide(&'a mut Mask),
    /// It came hidden.
    Show(&'a mut Mask),
    /// It came inside TLS.
    Look,
}

/// Looks at the group of `count` pages (at most [`BATCH_MAX`]) that fills `span`; `seen` gets each of them.
/// The span is shared with a helper: header and list are copied out once, and what was copied is what counts.
///
/// # Errors
/// [`MigrationFault::Protocol`] for anything that is not exactly one group of `count` pages.
pub fn pass(
    span: &dyn Span,
    count: u32,
    mut what: Pass<'_>,
    seen: impl FnMut(Listed),
) -> Result<(), MigrationFault> {
    const BROKEN: MigrationFault = MigrationFault::Protocol("a frame that is not the group it declares");
    let mut room = [0; front_bytes(BATCH_MAX)];
    let bytes = front_bytes(count as usize);
    let copy = room.get_mut(..bytes).filter(|_| bytes <= span.len()).ok_or(BROKEN)?;
    span.copy_out(0, copy);
    if let Pass::Show(mask) = &mut what {
        mask.apply(copy);
        span.copy_in(0, copy);
    }
    {
        let front = Front::read(copy).filter(|f| f.bytes() == bytes && f.group_bytes() == span.len());
        front.ok_or(BROKEN)?.pages().for_each(seen);
    }
    if let Pass::Hide(mask) = &mut what {
        mask.apply(copy);
        span.copy_in(0, copy);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::plain::Plain;
    use crate::mirror::records::tests::group;

    fn batch(zero: &[bool], first: u64) -> Vec<u8> {
        let listed = |(i, zero): (usize, &bool)| Listed { page: first + i as u64, zero: *zero };
        group(&zero.iter().enumerate().map(listed).collect::<Vec<_>>())
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
                let span = Plain::new(&bytes);
                let (count, front) = (zero.len() as u32, front_bytes(zero.len()));
                pass(&span, count, Pass::Hide(&mut out), |_| {}).unwrap();
                let hidden = span.0.borrow().clone();
                for (word, seen) in hidden[..front].chunks(8).zip(bytes.chunks(8)) {
                    prop_assert_ne!(word, seen, "a word of header or list in plain sight");
                }
                prop_assert_eq!(&hidden[front..], &bytes[front..]);
                let mut pages = Vec::new();
                pass(&span, count, Pass::Show(&mut back), |p| pages.push(p.page)).unwrap();
                prop_assert_eq!(&*span.0.borrow(), &bytes);
                prop_assert_eq!(pages, (first..first + zero.len() as u64).collect::<Vec<_>>());
            }
        }

        #[test]
        fn bytes_of_a_stranger_are_refused_and_never_read_past(
            bytes in prop::collection::vec(any::<u8>(), 0..9000), count in 0u32..600, key: [u8; 32],
        ) {
            let span = Plain::new(&bytes);
            let shown = pass(&span, count, Pass::Show(&mut Mask::new(&key, 0)), |_| ());
            let seen = pass(&span, count, Pass::Look, |_| ());
            prop_assert!(shown.is_err() && seen.is_err());
        }
    }

    #[test]
    fn a_batch_of_another_length_or_count_is_refused() {
        let bytes = batch(&[false, true, false], 7);
        let look = |bytes: &[u8], count| pass(&Plain::new(bytes), count, Pass::Look, |_| {}).is_ok();
        assert!(look(&bytes, 3));
        for count in [0, 1, 2, 4, BATCH_MAX as u32 + 1, u32::MAX] {
            assert!(!look(&bytes, count), "{count}");
        }
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
