//! The formats byte by byte, as their documentation has them: what one build writes another reads.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

use mirrorvm_abi::header::{self, HeaderError};
use mirrorvm_abi::layout::{IMAGE_MAX, IMAGE_VA, LAYOUT_HASH};
use mirrorvm_abi::record::*;
use mirrorvm_abi::{ABI_VERSION, PAGE_BYTES};

/// Number, kind, most pieces.
const KINDS: [(u8, Kind, u16); 6] = [
    (1, Kind::Pages, 512),
    (2, Kind::Epoch, 1),
    (3, Kind::Start, 1),
    (4, Kind::Commit, 1),
    (5, Kind::Abort, 1),
    (6, Kind::Digests, 32),
];

fn group(kind: Kind, count: u16) -> Header {
    Header {
        kind,
        suite: Suite::Aes256GcmSiv,
        stream: 0x0201,
        count,
        epoch: 0x0605_0403,
        sequence: 0x0e0d_0c0b_0a09_0807,
        random: core::array::from_fn(|i| 0x80 + i as u8),
    }
}

#[test]
fn numbers_of_kinds_and_suites_are_those_and_no_others() {
    for n in 0..=u8::MAX {
        assert_eq!(
            Kind::from_u8(n),
            KINDS.iter().find(|(number, ..)| *number == n).map(|(_, kind, _)| *kind)
        );
        let suites = [(1, Suite::Aes256Gcm), (2, Suite::Aes256GcmSiv)];
        assert_eq!(
            Suite::from_u8(n),
            suites.iter().find(|(number, _)| *number == n).map(|(_, suite)| *suite)
        );
    }
    assert_eq!(Suite::ALL.map(Suite::bit), [2, 4]);
}

#[test]
fn a_groups_header_has_every_field_in_its_place() {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&[1, 2, 2, 0, 1, 2, 0, 2]);
    bytes[8..16].copy_from_slice(&[3, 4, 5, 6, 0, 0, 0, 0]);
    bytes[16..24].copy_from_slice(&[7, 8, 9, 10, 11, 12, 13, 14]);
    bytes[24..].copy_from_slice(&core::array::from_fn::<u8, 24, _>(|i| 0x80 + i as u8));
    let header = group(Kind::Pages, 512);
    assert_eq!(header.encode(), bytes);
    assert_eq!(Header::decode(&bytes), Some(header));
    // Reserved bytes, the version, and numbers that nothing has.
    for at in [1, 3, 12, 13, 14, 15] {
        let mut bad = bytes;
        bad[at] ^= 1;
        assert_eq!(Header::decode(&bad), None, "byte {at}");
    }
}

#[test]
fn a_group_has_as_many_pieces_as_its_kind_may() {
    for (number, kind, most) in KINDS {
        for count in [0, 1, 2, 31, 32, 33, 511, 512, 513, u16::MAX] {
            let header = group(kind, count);
            let bytes = header.encode();
            assert_eq!(bytes[0], number);
            let good = (1..=most).contains(&count);
            assert_eq!(Header::decode(&bytes), good.then_some(header), "{kind:?} of {count}");
        }
    }
}

#[test]
fn a_word_of_the_list_is_a_page_below_2_to_the_56_and_a_bit() {
    let last = (1 << 56) - 1;
    for (page, zero, word) in
        [(0x0102, false, 0x0102), (0x0102, true, 1 << 63 | 0x0102), (last, false, last), (0, true, 1 << 63)]
    {
        let listed = Listed { page, zero };
        assert_eq!(listed.encode(), u64::to_le_bytes(word));
        assert_eq!(Listed::decode(u64::to_le_bytes(word)), Some(listed));
        assert_eq!(listed.body_bytes(), if zero { 0 } else { PAGE_BYTES });
    }
    for bit in 56..63 {
        for page in [0, 5] {
            assert_eq!(Listed::decode((1u64 << bit | page).to_le_bytes()), None, "bit {bit} and {page}");
        }
    }
}

#[test]
fn a_front_ends_where_its_list_does_and_a_group_where_its_pieces_do() {
    assert_eq!((CHUNK_PAGES, CHUNKS_MAX, GROUP_MAX, header::FILE_MAX), (256, 32, 512, 16 * 1024 * 1024));
    assert_eq!((front_bytes(0), front_bytes(1), front_bytes(512)), (48, 56, 48 + 512 * 8));
    assert_eq!((group_bytes(1), group_bytes(3)), (56 + 4112, 72 + 3 * 4112));
    let listed = [Listed { page: 7, zero: true }, Listed { page: 9, zero: false }];
    let mut bytes = group(Kind::Pages, 2).encode().to_vec();
    listed.iter().for_each(|l| bytes.extend(l.encode()));
    let front = Front::read(&bytes).unwrap();
    assert_eq!((front.header, front.bytes()), (group(Kind::Pages, 2), 64));
    assert!(front.pages().eq(listed));
    assert_eq!(front.pages().len(), 2);
    assert_eq!(front.group_bytes(), 64 + 16 + 4096 + 16);
    assert!(Front::read(&bytes[..63]).is_none(), "a word is missing");
    let token = group(Kind::Start, 1).encode();
    assert!(Front::read(&[&token[..], &[0; 8]].concat()).is_none(), "a token is no group of pages");
    bytes[63] = 0x40;
    assert!(Front::read(&bytes).is_none(), "a reserved bit is set");
}

#[test]
fn a_front_of_digests_has_chunks_that_ascend_and_none_that_is_zero() {
    let read = |kind, words: &[u64]| {
        let mut bytes = group(kind, words.len() as u16).encode().to_vec();
        words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        Front::read_digests(&bytes).map(|front| front.pages().map(|chunk| chunk.page).collect::<Vec<_>>())
    };
    assert_eq!(read(Kind::Digests, &[3]), Some(vec![3]));
    assert_eq!(read(Kind::Digests, &[3, 4, 9]), Some(vec![3, 4, 9]));
    for words in [&[4, 3][..], &[3, 3], &[3, 9, 4], &[1 << 63 | 3], &[3, 1 << 63 | 4], &[1 << 56]] {
        assert_eq!(read(Kind::Digests, words), None, "{words:x?}");
    }
    assert_eq!(read(Kind::Pages, &[3]), None, "pages are no digests");
    let mut digests = group(Kind::Digests, 1).encode().to_vec();
    digests.extend([0; 8]);
    assert!(Front::read(&digests).is_none(), "digests are no pages");
}

#[test]
fn nonce_and_associated_data_of_a_piece_are_its_index_and_its_word() {
    assert_eq!(piece_nonce(0x0201), [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(piece_aad(0x0201, [0xf; 8]), [1, 2, 0, 0, 0, 0, 0, 0, 15, 15, 15, 15, 15, 15, 15, 15]);
}

#[test]
fn a_token_has_every_total_in_its_place() {
    let token = Token { records: 0x0201, pages: 0x0403, exported: [5; 32], state: [6; 32] };
    let mut bytes = [0; TOKEN_BODY_BYTES];
    bytes[..2].copy_from_slice(&[1, 2]);
    bytes[8..10].copy_from_slice(&[3, 4]);
    bytes[16..48].fill(5);
    bytes[48..80].fill(6);
    assert_eq!(token.encode(), bytes);
    assert_eq!(Token::decode(&bytes), token);
    assert_eq!(TOKEN_BYTES, 48 + 96 + 16);
}

/// A helper image of one page each of text, read-only data and data, and two of bss.
fn image() -> Vec<u8> {
    let mut file = header::GUID.to_vec();
    for word in [1u32, 96, ABI_VERSION, ABI_VERSION + 3] {
        file.extend(word.to_le_bytes());
    }
    let page = PAGE_BYTES as u64;
    for word in [
        LAYOUT_HASH,
        IMAGE_VA,
        IMAGE_VA + 96,
        IMAGE_VA + page,
        IMAGE_VA + 2 * page,
        IMAGE_VA + 3 * page,
        IMAGE_VA + 5 * page,
        Suite::ALL.map(Suite::bit).iter().sum(),
    ] {
        file.extend(word.to_le_bytes());
    }
    file.resize(3 * PAGE_BYTES, 0xcc);
    file
}

fn with(at: usize, word: u64) -> Result<header::Header, HeaderError> {
    let mut file = image();
    file[at..at + 8].copy_from_slice(&word.to_le_bytes());
    header::Header::parse(&file)
}

#[test]
fn an_image_tells_where_its_sections_are_and_what_it_seals_by() {
    let read = header::Header::parse(&image()).unwrap();
    let page = PAGE_BYTES as u64;
    let wanted = header::Header {
        abi_min: ABI_VERSION,
        abi_max: ABI_VERSION + 3,
        layout_hash: LAYOUT_HASH,
        base: IMAGE_VA,
        entry: IMAGE_VA + 96,
        text_end: IMAGE_VA + page,
        rodata_end: IMAGE_VA + 2 * page,
        data_end: IMAGE_VA + 3 * page,
        bss_end: IMAGE_VA + 5 * page,
        suites: 6,
    };
    assert_eq!(read, wanted);
    assert_eq!(read.footprint(), 5 * page);
    assert!(Suite::ALL.iter().all(|suite| read.has(*suite)));
    assert!(!with(88, 2).unwrap().has(Suite::Aes256GcmSiv));
}

#[test]
fn an_image_of_another_build_or_file_is_refused_by_what_is_wrong() {
    type E = HeaderError;
    let file = image();
    assert_eq!(header::Header::parse(&file[..95]), Err(E::Short { len: 95 }));
    // A header and nothing else is long enough to be looked at.
    assert_eq!(header::Header::parse(&file[..96]), Err(E::FileLength { declared: 3 * 4096, actual: 96 }));
    assert_eq!(with(0, 0), Err(E::NotAHelper));
    assert_eq!(with(8, 0), Err(E::NotAHelper));
    assert_eq!(with(16, 96 << 32 | 2), Err(E::HeaderVersion { version: 2 }));
    assert_eq!(with(16, 95 << 32 | 1), Err(E::HeaderVersion { version: 1 }), "another length of the header");
    let abi = |min: u32, max: u32| with(24, u64::from(max) << 32 | u64::from(min));
    let (now, past, next) = (ABI_VERSION, ABI_VERSION - 1, ABI_VERSION + 1);
    for (min, max) in [(now, now), (past, now), (now, next), (0, u32::MAX)] {
        assert!(abi(min, max).is_ok(), "{min} to {max}");
    }
    for (min, max) in [(past, past), (next, next), (now, past), (next, now), (next, past)] {
        assert_eq!(abi(min, max), Err(E::Abi { min, max }));
    }
    assert_eq!(with(32, !LAYOUT_HASH), Err(E::Layout { hash: !LAYOUT_HASH }));
    for suites in [0, 4, !2] {
        assert_eq!(with(88, suites), Err(E::Suites { suites }));
    }
    for file in [&file[..file.len() - 1], &[&file[..], &[0]].concat()] {
        assert_eq!(
            header::Header::parse(file),
            Err(E::FileLength { declared: 3 * 4096, actual: file.len() })
        );
    }
}

#[test]
fn sections_lie_in_their_order_on_pages_and_within_the_images_room() {
    let page = PAGE_BYTES as u64;
    let end = IMAGE_VA + IMAGE_MAX;
    let bad = |at, value, field| {
        assert_eq!(with(at, value), Err(HeaderError::Section { field, value }), "{field} = {value:#x}");
    };
    for value in [0, IMAGE_VA - page, IMAGE_VA + page, u64::MAX] {
        bad(40, value, "base");
    }
    let sections = [(56, "text_end", 1), (64, "rodata_end", 2), (72, "data_end", 3), (80, "bss_end", 5)];
    for (i, (at, field, pages)) in sections.into_iter().enumerate() {
        let before = if i == 0 { 0 } else { sections[i - 1].2 };
        let here = IMAGE_VA + pages * page;
        for value in [here + 1, here - 1, here + page / 2, end + page, u64::MAX - page + 1, 0] {
            bad(at, value, field);
        }
        if i > 0 {
            bad(at, IMAGE_VA + (before - 1) * page, field);
        }
    }
    // An empty section is one, and the room may be used up.
    assert!(
        with(64, IMAGE_VA + page).is_ok() && with(80, IMAGE_VA + 3 * page).is_ok() && with(80, end).is_ok()
    );
    for value in [0, IMAGE_VA, IMAGE_VA + 95, IMAGE_VA + page, IMAGE_VA + page + 1, u64::MAX] {
        bad(48, value, "entry");
    }
    assert!(with(48, IMAGE_VA + page - 1).is_ok());
}

#[test]
fn what_is_wrong_is_told_with_what_was_found() {
    let page = PAGE_BYTES as u64;
    let hash = format!("{:#018x}", !LAYOUT_HASH);
    for (error, words) in [
        (with(16, 96 << 32 | 7), vec!["header version 7", "1"]),
        (with(24, 9 << 32 | 8), vec!["ABI 8 to 9"]),
        (with(32, !LAYOUT_HASH), vec![hash.as_str()]),
        (with(40, page), vec!["base", "0x1000"]),
        (with(88, 4), vec!["0x4", "AES-256-GCM"]),
        (with(0, 0), vec!["GUID"]),
        (header::Header::parse(&[0; 5]), vec!["5 bytes", "96"]),
        (header::Header::parse(&image()[..4096]), vec!["12288", "4096"]),
    ] {
        let told = error.unwrap_err().to_string();
        assert!(words.iter().all(|word| told.contains(word)), "{told}");
    }
}
