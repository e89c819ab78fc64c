//! Decoding is total: no bytes make it panic, and what it accepts encodes back to the same bytes.

use mirrorvm_abi::{config::*, header, mailbox::*, op::*, record};
use proptest::prelude::*;

proptest! {
    #[test]
    fn image_headers(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = header::Header::parse(&bytes);
    }

    #[test]
    fn an_image_header_that_starts_right(tail in prop::collection::vec(any::<u8>(), 0..4096)) {
        let mut bytes = header::GUID.to_vec();
        bytes.extend(header::HEADER_VERSION.to_le_bytes());
        bytes.extend((header::HEADER_BYTES as u32).to_le_bytes());
        bytes.extend(tail);
        // Random sections cannot be right: the base and the layout hash are fixed.
        prop_assert!(header::Header::parse(&bytes).is_err());
    }

    #[test]
    fn record_headers(bytes: [u8; record::HEADER_BYTES]) {
        if let Some(h) = record::Header::decode(&bytes) {
            prop_assert_eq!(h.encode(), bytes);
        }
    }

    #[test]
    fn a_flipped_bit_of_a_record_header_is_seen(
        bit in 0..record::HEADER_BYTES * 8, random: [u8; 24], sequence: u64, epoch: u32, count in 1u16..=512,
    ) {
        let (kind, suite) = (record::Kind::Pages, record::Suite::Aes256Gcm);
        let h = record::Header { kind, suite, stream: 3, count, epoch, sequence, random };
        let good = h.encode();
        prop_assert_eq!(record::Header::decode(&good), Some(h));
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        prop_assert_ne!(record::Header::decode(&bad), Some(h));
    }

    #[test]
    fn words_of_a_list(bytes: [u8; record::LISTED_BYTES]) {
        if let Some(listed) = record::Listed::decode(bytes) {
            prop_assert_eq!(listed.encode(), bytes);
        }
    }

    #[test]
    fn fronts_of_groups(bytes in prop::collection::vec(any::<u8>(), 0..6000), count: u16, good: bool) {
        let mut bytes = bytes;
        if good && bytes.len() >= record::HEADER_BYTES {
            let header = record::Header {
                kind: record::Kind::Pages,
                suite: record::Suite::Aes256GcmSiv,
                stream: 0,
                count,
                epoch: 1,
                sequence: 0,
                random: [1; 24],
            };
            bytes[..record::HEADER_BYTES].copy_from_slice(&header.encode());
            let list = &mut bytes[record::HEADER_BYTES..];
            list.chunks_mut(8).for_each(|word| word[word.len() - 1] &= 0x80);
        }
        let whole = (1..=512).contains(&count) && bytes.len() >= record::front_bytes(count.into());
        let front = record::Front::read(&bytes);
        if good && bytes.len() >= record::HEADER_BYTES {
            prop_assert_eq!(front.is_some(), whole);
        }
        if let Some(front) = front {
            let zero = front.pages().filter(|p| p.zero).count();
            let all = front.pages().len();
            prop_assert_eq!(front.group_bytes() + zero * 4096, record::group_bytes(all));
        }
    }

    #[test]
    fn ring_entries(bytes: [u8; ENTRY_BYTES], id: u64, op: u32, slot: u32, count: u32, len: u32, epoch: u32) {
        let _ = (Submission::decode(&bytes), Completion::decode(&bytes));
        let s = Submission { id, op, slot, count, len, epoch };
        prop_assert_eq!(Submission::decode(&s.encode()), s);
        let c = Completion { id, status: op, len, count, zero: slot };
        prop_assert_eq!(Completion::decode(&c.encode()), c);
    }

    #[test]
    fn begin_parameters(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
        if let Some(b) = Begin::decode(&bytes) {
            prop_assert_eq!(&b.encode()[..], &bytes[..]);
        }
    }

    #[test]
    fn configurations(bytes: [u8; FIXED_BYTES]) {
        if let Some(c) = Config::decode(&bytes) {
            prop_assert_eq!(Config::decode(&c.encode()), Some(c));
        }
    }
}
