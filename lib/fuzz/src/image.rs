//! Helper images that somebody uploads.
//!
//! What is accepted has its sections in order, page by page, within what the layout has room for, begins to
//! run in what is executable, and ends where its file does; and a block for it can be planned or is refused.

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, GuestLayout, HelperPlacement, HelperSet};
use mirrorvm_abi::header::{FILE_MAX, GUID, HEADER_BYTES, HEADER_VERSION, Header, HeaderError};
use mirrorvm_abi::layout::{IMAGE_MAX, IMAGE_VA, LAYOUT_HASH};
use mirrorvm_abi::{ABI_VERSION, PAGE_BYTES};

use crate::{Bytes, Seed};

/// How long the file is beyond the given bytes, and what it begins with.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let more = usize::from(bytes.u8());
    let mut file = bytes.0.to_vec();
    if more > 0 {
        file.resize(file.len().max(more * PAGE_BYTES), 0);
    }
    let page = PAGE_BYTES as u64;
    match Header::parse(&file) {
        Ok(h) => {
            assert!(file.len() >= HEADER_BYTES && file[..16] == GUID);
            assert!(h.abi_min <= ABI_VERSION && ABI_VERSION <= h.abi_max && h.layout_hash == LAYOUT_HASH);
            let ends = [h.base, h.text_end, h.rodata_end, h.data_end, h.bss_end, IMAGE_VA + IMAGE_MAX];
            assert!(ends.is_sorted() && ends.iter().all(|end| end % page == 0), "{ends:x?}");
            assert!(h.entry >= h.base + HEADER_BYTES as u64 && h.entry < h.text_end, "{:x}", h.entry);
            assert_eq!(h.data_end - h.base, file.len() as u64);
            assert!(h.footprint() <= IMAGE_MAX && h.suites & 2 != 0);
            block(&h);
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            if let HeaderError::FileLength { declared, actual } = error {
                assert!(declared != actual as u64 && actual == file.len());
            }
        }
    }
}

/// A guest's block for the helper holds every part of it, none over another.
fn block(header: &Header) {
    let spec = BlockSpec { name: "ram0".into(), size_bytes: 64 << 20, gpa: Some(Gpa::new(0)) };
    let layout = GuestLayout::assign(&[spec]).unwrap();
    let Some(size) = HelperPlacement::block_size(header, &layout) else { return };
    let with = layout.with_helper(size, true).unwrap();
    let placed = HelperPlacement::new(header, &with, HelperSet::Shifted).unwrap();
    assert!(placed.block_len() <= size && placed.block_len() >= header.footprint());
}

/// The head of an image of these pages.
pub(crate) fn head(text: u64, rodata: u64, data: u64, bss: u64) -> Vec<u8> {
    let page = PAGE_BYTES as u64;
    let ends = [text, rodata, data, bss].into_iter().scan(IMAGE_VA, |at, pages| {
        *at += pages * page;
        Some(*at)
    });
    let mut bytes = GUID.to_vec();
    for word in [HEADER_VERSION, HEADER_BYTES as u32, ABI_VERSION, ABI_VERSION] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [LAYOUT_HASH, IMAGE_VA, IMAGE_VA + HEADER_BYTES as u64].into_iter().chain(ends).chain([2]) {
        bytes.extend(word.to_le_bytes());
    }
    assert!(bytes.len() == HEADER_BYTES && (text + rodata + data) * page <= FILE_MAX as u64);
    bytes
}

/// Heads of images that can be, and of some that cannot.
pub fn seeds() -> Vec<Seed> {
    let image = |pages: u8, head: Vec<u8>| [&[pages][..], &head].concat();
    let with = |at: usize, value: u64| {
        let mut bytes = head(8, 2, 1, 4);
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        image(11, bytes)
    };
    let mut all: Vec<Seed> = vec![
        ("small".into(), image(1, head(1, 0, 0, 0))),
        ("usual".into(), image(11, head(8, 2, 1, 4))),
        ("large".into(), image(255, head(200, 50, 5, 1))),
        ("of-a-page-more".into(), image(12, head(8, 2, 1, 4))),
        ("short".into(), image(0, head(8, 2, 1, 4)[..95].to_vec())),
        ("no-helper".into(), image(1, vec![0; 200])),
    ];
    let words = [
        ("version", 16, 2),
        ("abi", 24, (9 << 32) | 9),
        ("abi-turned-round", 24, 99),
        ("layout", 32, 1),
        ("base", 40, 0),
        ("entry-behind-text", 48, IMAGE_VA + 8 * 4096),
        ("entry-in-the-header", 48, IMAGE_VA + 8),
        ("text-unaligned", 56, IMAGE_VA + 8 * 4096 + 1),
        ("rodata-before-text", 64, IMAGE_VA),
        ("data-wraps", 72, u64::MAX - 4095),
        ("bss-too-far", 80, IMAGE_VA + IMAGE_MAX + 4096),
        ("no-suite", 88, 4),
        ("all-suites", 88, u64::MAX),
    ];
    all.extend(words.map(|(name, at, value)| (name.to_owned(), with(at, value))));
    all
}
