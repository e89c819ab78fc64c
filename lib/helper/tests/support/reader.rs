//! An independent reader of sealed groups: keys from the documented schedule, no code of the helper.

use std::cell::RefCell;
use std::collections::HashMap;

use aes_gcm_siv::aead::AeadInOut;
use aes_gcm_siv::{Aes256GcmSiv, KeyInit};
use mirrorvm_abi::op::Greeting;
use mirrorvm_abi::record::{CONTROL_STREAM, Direction, HEADER_BYTES, Header, Listed, Suite, TAG_BYTES};
use mirrorvm_helper::PageDigester;
use ring::{aead, hkdf};
use x25519_dalek::{X25519_BASEPOINT_BYTES, x25519};

use super::{Pair, head};

/// What the secret of one direction and stream depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId {
    pub direction: u8,
    pub stream: u16,
}

pub type Key = [u8; 32];

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// The private half of what a helper greeted with, out of everything that it ever drew.
fn private(drawn: &[u8], greeting: &Greeting) -> [u8; 32] {
    thread_local! {
        static FOUND: RefCell<HashMap<[u8; 32], [u8; 32]>> = RefCell::default();
    }
    let search = || {
        let mut words = drawn.windows(32).step_by(8).rev().map(|w| w.try_into().unwrap());
        words
            .find(|key| x25519(*key, X25519_BASEPOINT_BYTES) == greeting.public_key)
            .expect("it drew its key")
    };
    FOUND.with_borrow_mut(|found| *found.entry(greeting.public_key).or_insert_with(search))
}

/// What X25519 gives of both ends' ephemeral keys: only with a private one of them.
pub fn shared(pair: &Pair) -> [u8; 32] {
    let key = private(&pair.source.machine.drawn.borrow(), &pair.greetings.0);
    x25519(key, pair.greetings.1.public_key)
}

fn expand(prk: &hkdf::Prk, info: &[&[u8]]) -> Key {
    let mut raw = [0; 32];
    prk.expand(info, Len(32)).unwrap().fill(&mut raw).unwrap();
    raw
}

/// The secret of a stream, by RFC 5869 over what the documentation names.
pub fn secret(pair: &Pair, secret: &[u8; 32], id: KeyId) -> Key {
    secret_from(pair, &[&secret[..], &shared(pair)].concat(), id)
}

/// The same from another input, such as somebody would try who lacks a part of it.
pub fn secret_from(pair: &Pair, input: &[u8], id: KeyId) -> Key {
    let (source, destination) = pair.greetings;
    let salt = [source.encode(), destination.encode()].concat();
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(input);
    let stream = id.stream.to_le_bytes();
    let (suite, direction) = ([pair.begin.suite as u8], [id.direction]);
    let label: &[u8] = b"mirrorvm stream secret v3";
    expand(&prk, &[label, &pair.begin.session, &pair.begin.transcript, &suite, &direction, &stream])
}

/// The key of the audit's digests.
pub fn audit_key(pair: &Pair, secret: &[u8; 32]) -> Key {
    let (source, destination) = pair.greetings;
    let salt = [source.encode(), destination.encode()].concat();
    let input = [&secret[..], &shared(pair)].concat();
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(&input);
    let suite = [pair.begin.suite as u8];
    let label: &[u8] = b"mirrorvm audit digest key v1";
    expand(&prk, &[label, &pair.begin.session, &pair.begin.transcript, &suite])
}

/// What digests pages under it.
pub fn audit_digester(pair: &Pair, secret: &[u8; 32]) -> PageDigester {
    PageDigester::new(&audit_key(pair, secret))
}

/// The key of the group with this header.
pub fn group_key(secret: &Key, header: &[u8; HEADER_BYTES]) -> Key {
    let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, secret);
    expand(&prk, &[b"mirrorvm group key v2", header])
}

/// Every secret of a session.
pub fn secrets(pair: &Pair, of_guest: &[u8; 32]) -> Vec<Key> {
    let pages = (0..pair.begin.streams).map(|stream| KeyId { direction: Direction::Forward as u8, stream });
    let tokens = [Direction::Forward, Direction::Backward]
        .map(|d| KeyId { direction: d as u8, stream: CONTROL_STREAM });
    pages.chain(tokens).map(|id| secret(pair, of_guest, id)).collect()
}

/// The nonce of piece `index`: the index, little-endian, and zeros.
fn nonce(index: usize) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&(index as u64).to_le_bytes());
    nonce
}

/// The associated data of a piece: its index, its word.
fn aad(index: usize, listed: &[u8; 8]) -> Vec<u8> {
    [&(index as u64).to_le_bytes()[..], listed].concat()
}

fn less_safe(key: &Key) -> aead::LessSafeKey {
    aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, key).unwrap())
}

fn seal_piece(suite: Suite, key: &Key, index: usize, listed: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let (mut body, aad) = (body.to_vec(), aad(index, listed));
    match suite {
        Suite::Aes256Gcm => {
            let nonce = aead::Nonce::assume_unique_for_key(nonce(index));
            less_safe(key).seal_in_place_append_tag(nonce, aead::Aad::from(aad), &mut body).unwrap();
        }
        Suite::Aes256GcmSiv => {
            let cipher = Aes256GcmSiv::new(key.into());
            let tag = cipher.encrypt_inout_detached(&nonce(index).into(), &aad, body.as_mut_slice().into());
            body.extend(tag.unwrap());
        }
    }
    body
}

fn open_piece(suite: Suite, key: &Key, index: usize, listed: &[u8; 8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (mut body, aad) = (sealed.to_vec(), aad(index, listed));
    match suite {
        Suite::Aes256Gcm => {
            let nonce = aead::Nonce::assume_unique_for_key(nonce(index));
            less_safe(key).open_in_place(nonce, aead::Aad::from(aad), &mut body).ok()?;
        }
        Suite::Aes256GcmSiv => {
            let (sealed, tag) = body.split_last_chunk_mut::<TAG_BYTES>()?;
            let (cipher, tag) = (Aes256GcmSiv::new(key.into()), (*tag).into());
            cipher.decrypt_inout_detached(&nonce(index).into(), &aad, sealed.into(), &tag).ok()?;
        }
    }
    body.truncate(sealed.len() - TAG_BYTES);
    Some(body)
}

/// Seals pages as whoever has the stream's secret could.
pub fn seal(secret: &Key, header: &Header, pages: &[(Listed, &[u8])]) -> Vec<u8> {
    let mut group = header.encode().to_vec();
    let key = group_key(secret, &header.encode());
    pages.iter().for_each(|(listed, _)| group.extend(listed.encode()));
    for (i, (listed, body)) in pages.iter().enumerate() {
        group.extend(seal_piece(header.suite, &key, i, &listed.encode(), body));
    }
    group
}

/// The same for a token.
pub fn seal_token(secret: &Key, header: &Header, body: &[u8]) -> Vec<u8> {
    let key = group_key(secret, &header.encode());
    [&header.encode()[..], &seal_piece(header.suite, &key, 0, &[0; 8], body)].concat()
}

/// Opens a group of pages; `None` when a piece of it is not genuine under that secret.
pub fn open(secret: &Key, group: &[u8]) -> Option<Vec<Vec<u8>>> {
    let header = Header::decode(&head(group))?;
    let key = group_key(secret, &head(group));
    let count = usize::from(header.count);
    let (list, mut rest) = group[HEADER_BYTES..].split_at(count * 8);
    let mut bodies = Vec::new();
    for (i, word) in list.as_chunks::<8>().0.iter().enumerate() {
        let len = Listed::decode(*word)?.body_bytes() + TAG_BYTES;
        let (sealed, after) = rest.split_at_checked(len)?;
        bodies.push(open_piece(header.suite, &key, i, word, sealed)?);
        rest = after;
    }
    rest.is_empty().then_some(bodies)
}

/// Opens a token.
pub fn open_token(secret: &Key, token: &[u8]) -> Option<Vec<u8>> {
    let header = Header::decode(&head(token))?;
    open_piece(header.suite, &group_key(secret, &head(token)), 0, &[0; 8], &token[HEADER_BYTES..])
}
