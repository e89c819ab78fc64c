//! What both ends of a migration rely on, as one digest: it goes into every key of the helpers' session, so
//! that ends that do not mean the same cannot open each other's records.
//!
//! Owns: what is bound, and how. Must not know: what any of it means.

use ring::digest;

/// The digest for a session whose PREPARE and PREPARED are these, byte for byte as they crossed, spoken in
/// version `protocol` of the peer protocol.
///
/// The messages are bound whole: guest, definition, RAM layout, strategy, streams and their transport, helper
/// image, the suite and what both ends offered, readiness, nonces, secret and mask are all in them, and a
/// field that is added later is bound without anybody having to think of it.
pub(super) fn transcript(protocol: u32, prepare: &[u8], prepared: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"mirrorvm transcript v3");
    context.update(&protocol.to_le_bytes());
    context.update(&mirrorvm_abi::ABI_VERSION.to_le_bytes());
    context.update(&mirrorvm_abi::layout::LAYOUT_HASH.to_le_bytes());
    for message in [prepare, prepared] {
        context.update(&(message.len() as u64).to_le_bytes());
        context.update(message);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// SHA-256.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_bit_of_the_messages_and_the_version_is_bound(
            message in proptest::collection::vec(any::<u8>(), 1..200),
            answer in proptest::collection::vec(any::<u8>(), 1..200),
            at in any::<proptest::sample::Index>(),
            bit in 0u8..8,
            protocol in any::<u32>(),
        ) {
            let said = transcript(protocol, &message, &answer);
            let mut other = message.clone();
            other[at.index(message.len())] ^= 1 << bit;
            prop_assert_ne!(said, transcript(protocol, &other, &answer));
            prop_assert_ne!(said, transcript(protocol ^ 1, &message, &answer));
            prop_assert_ne!(said, transcript(protocol, &message[..message.len() - 1], &answer));
            let mut other = answer.clone();
            other[at.index(answer.len())] ^= 1 << bit;
            prop_assert_ne!(said, transcript(protocol, &message, &other));
            // A byte that goes over from one to the other.
            let (last, rest) = message.split_last().unwrap();
            prop_assert_ne!(said, transcript(protocol, rest, &[&[*last], &answer[..]].concat()));
        }
    }
}
