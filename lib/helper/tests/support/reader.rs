//! An independent reader of sealed records: keys from the documented schedule, no code of the helper.

use mirrorvm_abi::record::{CONTROL_STREAM, Direction, HEADER_BYTES, Header};
use ring::{aead, hkdf};

use super::Pair;

/// What the key of one direction and stream depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId {
    pub direction: u8,
    pub stream: u16,
}

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// The raw key, by RFC 5869 over what the record format's documentation names.
pub fn key(pair: &Pair, secret: &[u8; 32], id: KeyId) -> [u8; 32] {
    let salt = [pair.nonces.0, pair.nonces.1].concat();
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(secret);
    let stream = id.stream.to_le_bytes();
    let direction = [id.direction];
    let info: [&[u8]; 5] =
        [b"mirrorvm session key v1", &pair.begin.session, &pair.begin.transcript, &direction, &stream];
    let mut raw = [0; 32];
    prk.expand(&info, Len(32)).unwrap().fill(&mut raw).unwrap();
    raw
}

/// Every key of a session.
pub fn keys(pair: &Pair, secret: &[u8; 32]) -> Vec<[u8; 32]> {
    let pages = (0..pair.begin.streams).map(|stream| KeyId { direction: Direction::Forward as u8, stream });
    let tokens = [Direction::Forward, Direction::Backward]
        .map(|d| KeyId { direction: d as u8, stream: CONTROL_STREAM });
    pages.chain(tokens).map(|id| key(pair, secret, id)).collect()
}

/// The nonce that a record's header gives.
pub fn nonce(record: &[u8]) -> [u8; 12] {
    let mut n = [0; 12];
    n[2..4].copy_from_slice(&record[2..4]);
    n[4..].copy_from_slice(&record[8..16]);
    n
}

/// The associated data of a record with this header.
fn aad(pair: &Pair, direction: Direction, header: &[u8]) -> [u8; 64] {
    let mut aad = [0; 64];
    aad[..8].copy_from_slice(b"mvm-rec1");
    aad[8..24].copy_from_slice(&pair.begin.session);
    aad[24] = direction as u8;
    aad[32..].copy_from_slice(header);
    aad
}

fn less_safe(key: &[u8; 32]) -> aead::LessSafeKey {
    aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, key).unwrap())
}

/// Seals `body` as whoever has `key` could.
pub fn seal(pair: &Pair, key: &[u8; 32], direction: Direction, header: &Header, body: &[u8]) -> Vec<u8> {
    let mut record = header.encode().to_vec();
    let nonce = aead::Nonce::assume_unique_for_key(nonce(&record));
    let aad = aead::Aad::from(aad(pair, direction, &record));
    let mut sealed = body.to_vec();
    let tag = less_safe(key).seal_in_place_separate_tag(nonce, aad, &mut sealed).unwrap();
    record.extend(sealed);
    record.extend(tag.as_ref());
    record
}

/// Opens a record; `None` when it is not genuine under that key.
pub fn open(pair: &Pair, key: &[u8; 32], direction: Direction, record: &[u8]) -> Option<Vec<u8>> {
    let nonce = aead::Nonce::assume_unique_for_key(nonce(record));
    let mut body = record[HEADER_BYTES..].to_vec();
    let len = less_safe(key)
        .open_in_place(nonce, aead::Aad::from(aad(pair, direction, &record[..HEADER_BYTES])), &mut body)
        .ok()?
        .len();
    body.truncate(len);
    Some(body)
}
