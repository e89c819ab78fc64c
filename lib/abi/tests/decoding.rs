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
    fn a_flipped_bit_of_a_record_header_is_seen(bit in 0usize..256, page: u64, sequence: u64, epoch: u32) {
        let h = record::Header { kind: record::Kind::Page, stream: 3, epoch, sequence, page, len: 4096 };
        let good = h.encode();
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        prop_assert_ne!(record::Header::decode(&bad), Some(h));
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
