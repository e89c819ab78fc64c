//! Sealed groups and the frames that carry them, as a host reads them off a stream.
//!
//! What is accepted is encoded back to the bytes that it was read from; a front says how long its group is,
//! and what the host lets through to its helper is exactly one group of as many pages as the frame said,
//! whose list was read from memory that anybody may change.

use mirrorvm::memory::Span;
use mirrorvm::migration::records::{Mask, Pass, pass};
use mirrorvm::migration::wire::{DATA_HEADER_BYTES, DATA_MAX, DataFrame};
use mirrorvm::transport::{FrameHeader, HEADER_LEN, HeaderError};
use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::mailbox::{BATCH_MAX, PAYLOAD_BYTES};
use mirrorvm_abi::record::{
    CONTROL_STREAM, Front, HEADER_BYTES, Header, Kind, LISTED_BYTES, Listed, Suite, TAG_BYTES,
    TOKEN_BODY_BYTES, Token, front_bytes,
};

use crate::{Bytes, Seed};

// Bytes of our own where the host has a helper's memory; the library's own tests have it, too.
#[path = "../../src/memory/plain.rs"]
mod plain;

use plain::Plain;

/// A frame's header, a data frame's header, and what follows: a group, of which zeros may be left out at the
/// end (`zeros` times 16 bytes).
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (outer, inner) = (bytes.take::<HEADER_LEN>(), bytes.take::<DATA_HEADER_BYTES>());
    let (epoch, zeros) = (bytes.u32(), bytes.u16());
    frame(outer);
    let group = [bytes.0, &vec![0; usize::from(zeros) * TAG_BYTES]].concat();
    header(&group);
    let len = u32::try_from(group.len() + DATA_HEADER_BYTES).unwrap();
    let Ok(frame) = DataFrame::read(&inner, len, epoch) else { return };
    assert_eq!(inner, mirrorvm::migration::wire::data_header(frame.epoch, frame.count));
    assert!(frame.epoch == epoch && (1..=BATCH_MAX).contains(&(frame.count as usize)));
    assert!(frame.bytes == group.len() && frame.bytes <= PAYLOAD_BYTES);
    passed(&group, frame.count);
}

fn frame(raw: [u8; HEADER_LEN]) {
    match FrameHeader::decode(raw, DATA_MAX) {
        Ok(header) => assert!(header.encode() == raw && header.len <= DATA_MAX),
        Err(HeaderError::Reserved(reserved)) => assert_eq!(reserved, raw[5..]),
        Err(HeaderError::TooLong { declared, max }) => assert!(declared > max && max == DATA_MAX),
    }
}

fn header(group: &[u8]) {
    if let Some(raw) = group.first_chunk::<TOKEN_BODY_BYTES>() {
        // What a token has beyond its totals is reserved, and sealed like them.
        assert_eq!(Token::decode(raw).encode()[..80], raw[..80]);
    }
    let Some(raw) = group.first_chunk::<HEADER_BYTES>() else {
        assert!(Front::read(group).is_none());
        return;
    };
    let read = Header::decode(raw);
    assert!(read.is_none_or(|header| header.encode() == *raw));
    let Some(front) = Front::read(group) else { return };
    assert!(read == Some(front.header) && front.header.kind == Kind::Pages);
    let pages: Vec<Listed> = front.pages().collect();
    assert_eq!(pages.len(), usize::from(front.header.count));
    let list: Vec<u8> = pages.iter().flat_map(|listed| listed.encode()).collect();
    assert_eq!(list, group[HEADER_BYTES..front.bytes()]);
    assert!(pages.iter().all(|listed| listed.page < 1 << 56));
    let pieces: usize = pages.iter().map(|p| TAG_BYTES + if p.zero { 0 } else { PAGE_BYTES }).sum();
    assert_eq!(front.group_bytes(), front.bytes() + pieces);
}

/// What the host makes of it on a stream without TLS, and inside TLS.
fn passed(group: &[u8], count: u32) {
    let span = Plain::new(group);
    let mut seen = Vec::new();
    let looked = pass(&span, count, Pass::Look, |listed| seen.push(listed));
    let whole =
        Front::read(group).filter(|f| u32::from(f.header.count) == count && f.group_bytes() == group.len());
    assert_eq!(looked.is_ok(), whole.is_some(), "one group of {count} pages, or refused");
    if let Some(front) = whole {
        assert!(front.pages().eq(seen));
    }
    // Hidden and shown again it is what it was; and whatever came hidden, only front is shown.
    let (mut hide, mut show) = (Mask::new(&[7; 32], 3), Mask::new(&[7; 32], 3));
    let hidden = pass(&span, count, Pass::Hide(&mut hide), |_| {});
    assert_eq!(hidden.is_ok(), looked.is_ok());
    if hidden.is_ok() {
        assert_ne!(*span.0.borrow(), group);
        pass(&span, count, Pass::Show(&mut show), |_| {}).unwrap();
    }
    assert_eq!(*span.0.borrow(), group);
    let _ = pass(&span, count, Pass::Show(&mut show), |_| {});
    let front = front_bytes(count as usize).min(group.len());
    assert_eq!(span.0.borrow()[front..], group[front..]);
}

/// Real groups, whole and nearly so.
pub fn seeds() -> Vec<Seed> {
    let header = |kind, count, stream| Header {
        kind,
        suite: if stream == 1 { Suite::Aes256GcmSiv } else { Suite::Aes256Gcm },
        stream,
        count,
        epoch: 3,
        sequence: 9,
        random: [0xa5; 24],
    };
    let group = |pages: &[(u64, bool)], stream| {
        let mut bytes = header(Kind::Pages, pages.len() as u16, stream).encode().to_vec();
        bytes.extend(pages.iter().flat_map(|(page, zero)| Listed { page: *page, zero: *zero }.encode()));
        bytes
    };
    let framed = |count: u32, epoch: u32, begin: &[u8], zeros: u16| {
        let len = (begin.len() + usize::from(zeros) * TAG_BYTES + DATA_HEADER_BYTES) as u32;
        let outer = FrameHeader { kind: 6, len }.encode();
        let inner = mirrorvm::migration::wire::data_header(epoch, count);
        [&outer[..], &inner, &epoch.to_le_bytes(), &zeros.to_le_bytes(), begin].concat()
    };
    let page = 257;
    let mut all = vec![
        ("one-page".into(), framed(1, 3, &group(&[(5, false)], 0), page)),
        ("one-zero-page".into(), framed(1, 3, &group(&[(5, true)], 0), 1)),
        ("three-pages".into(), framed(3, 3, &group(&[(5, true), (6, false), (1 << 55, true)], 1), page + 2)),
        ("another-count".into(), framed(2, 3, &group(&[(5, true)], 0), 1)),
        ("too-short".into(), framed(1, 3, &group(&[(5, false)], 0), page - 1)),
        ("too-long".into(), framed(1, 3, &group(&[(5, true)], 0), 2)),
        ("page-out-of-range".into(), framed(1, 3, &group(&[(1 << 56, true)], 0), 1)),
        ("no-pages".into(), framed(0, 3, &group(&[], 0), 0)),
        ("another-epoch".into(), framed(1, 4, &group(&[(5, true)], 0), 1)),
        ("cut-in-the-list".into(), framed(2, 3, &group(&[(5, true), (6, true)], 0)[..HEADER_BYTES + 9], 0)),
    ];
    let many: Vec<_> = (0..BATCH_MAX as u64).map(|n| (n * 3, true)).collect();
    all.push((
        "a-full-batch-of-zero-pages".into(),
        framed(BATCH_MAX as u32, 1, &group(&many, 2), many.len() as u16),
    ));
    for (n, kind) in [Kind::Epoch, Kind::Start, Kind::Commit, Kind::Abort].into_iter().enumerate() {
        let token = Token { records: 7, pages: 6, exported: [1; 32], state: [2; 32] };
        let bytes =
            [&header(kind, 1, CONTROL_STREAM).encode()[..], &token.encode(), &[3; TAG_BYTES]].concat();
        all.push((format!("token-{n}"), framed(1, 3, &bytes, 0)));
    }
    let reserved = FrameHeader { kind: 255, len: DATA_MAX }.encode().map(|b| b | 1);
    all.push(("reserved-bits".into(), reserved.to_vec()));
    let listed = LISTED_BYTES * 2;
    all.push(("nothing".into(), vec![0; listed]));
    all
}
