//! Decoding is total: no bytes make it panic, and what it accepts encodes back to the same bytes.

use mirrorvm_abi::{config::*, evidence::*, header, mailbox::*, op::*, record};
use proptest::prelude::*;

#[test]
fn a_policy_is_as_strict_with_every_flag_and_no_older_api() {
    let api = |major: u32, minor: u32| major << 16 | minor << 24;
    for (policy, own, strict) in [
        (1, 1, true),
        (1 | 4, 1, true),
        (1, 1 | 4, false),
        // NODBG, whatever one's own lacks.
        (0, 0, false),
        (1, 0, true),
        (1 | api(1, 40), 1 | api(1, 40), true),
        (1 | api(1, 41), 1 | api(1, 40), true),
        (1 | api(2, 0), 1 | api(1, 255), true),
        (1 | api(1, 39), 1 | api(1, 40), false),
        (1 | api(0, 255), 1 | api(1, 0), false),
        (0xffff, 1, true),
    ] {
        assert_eq!(is_as_strict(policy, own), strict, "{policy:#x} for {own:#x}");
    }
}

#[test]
fn a_demand_has_one_to_four_of_both() {
    for (keys, launches, possible) in
        [(1, 1, true), (4, 4, true), (0, 1, false), (1, 0, false), (5, 1, false), (1, 5, false)]
    {
        let release =
            Release::demanded(&vec![[1; KEY_BYTES]; keys], &vec![[2; LAUNCH_DIGEST_BYTES]; launches]);
        assert_eq!(release.is_some(), possible, "{keys} keys, {launches} launches");
        if let Some(release) = release {
            assert!(release.is_demanded());
            assert_eq!((release.keys().len(), release.launches().len()), (keys, launches));
            assert_eq!(Release::decode(&release.encode()), Some(release));
        }
    }
    assert_eq!(Release::decode(&Release::NOT_DEMANDED.encode()), Some(Release::NOT_DEMANDED));
    assert_eq!(Release::decode(&[0; RELEASE_BYTES]), None, "nothing there is not nothing demanded");
}

proptest! {
    #[test]
    fn release_parts(mut bytes in prop::collection::vec(any::<u8>(), RELEASE_BYTES), first in 0u8..4, keys in 0u8..6, launches in 0u8..6, zero: bool) {
        (bytes[0], bytes[1], bytes[2]) = (first, keys, launches);
        if zero {
            bytes[3..].fill(0);
        }
        let bytes: [u8; RELEASE_BYTES] = bytes.try_into().unwrap();
        if let Some(release) = Release::decode(&bytes) {
            prop_assert_eq!(release.encode(), bytes);
        }
    }

    #[test]
    fn reports(mut bytes in prop::collection::vec(any::<u8>(), REPORT_BYTES), head: bool, room: bool) {
        if head {
            bytes[52..64].copy_from_slice(&[2, 0x10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        }
        if room {
            [112..136, 184..208].into_iter().for_each(|span| bytes[span].fill(0));
        }
        let bytes: [u8; REPORT_BYTES] = bytes.try_into().unwrap();
        let read = Report::decode(&bytes);
        prop_assert!(read.is_some() || !(head && room));
        if let Some(read) = read {
            prop_assert_eq!(read.encode(), bytes);
        }
    }

    #[test]
    fn certificates(bytes in prop::collection::vec(any::<u8>(), CERTIFICATE_BYTES), head: bool) {
        let mut bytes: [u8; CERTIFICATE_BYTES] = bytes.try_into().unwrap();
        if head {
            bytes[..20].copy_from_slice(&[1, 0, 0, 0, 1, 55, 0, 0, 2, 0x10, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]);
            [68..92, 140..SIGNATURES_AT[0]].into_iter().for_each(|span| bytes[span].fill(0));
        }
        let read = PekCertificate::decode(&bytes);
        prop_assert_eq!(read.is_some(), head);
        if let Some(read) = read {
            prop_assert_eq!(&read.signed[..], &bytes[..SIGNATURES_AT[0]]);
            prop_assert_eq!(&numbers(&read.key)[..], &bytes[POINT_AT..SIGNATURES_AT[0]][..144]);
        }
    }

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
