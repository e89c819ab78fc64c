//! What both ends of a migration rely on, as one digest: it goes into every key of the helpers' session, so
//! that ends that do not mean the same cannot open each other's records.
//!
//! Owns: what is bound, and how. Must not know: what any of it means.

use ring::digest;

use super::peer::Agreed;

/// The digest for a session whose PREPARE and PREPARED are these, byte for byte as they crossed, on a control
/// link of which `agreed` is known.
///
/// Of the link: the version that is spoken, which ones each end offered, and who the two hosts are by their
/// keys; the caller is the source. The messages are bound whole: guest, definition, RAM layout, strategy,
/// streams and their transport, helper image, the suite and what both ends offered, readiness, nonces, public
/// keys, secret and mask are all in them, and a field that is added later is bound without anybody having to
/// think of it.
pub fn transcript(agreed: &Agreed, prepare: &[u8], prepared: &[u8]) -> [u8; 32] {
    let Agreed { protocol, caller_speaks, answerer_speaks, caller, answerer } = agreed;
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"mirrorvm transcript v3");
    context.update(&mirrorvm_abi::ABI_VERSION.to_le_bytes());
    context.update(&mirrorvm_abi::layout::LAYOUT_HASH.to_le_bytes());
    context.update(&protocol.to_le_bytes());
    for (role, host, speaks) in
        [(b"source     ", caller, caller_speaks), (b"destination", answerer, answerer_speaks)]
    {
        context.update(role);
        context.update(host.as_bytes());
        context.update(&(speaks.len() as u64).to_le_bytes());
        speaks.iter().for_each(|version| context.update(&version.to_le_bytes()));
    }
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
    use crate::transport::PeerIdentity;

    proptest! {
        #[test]
        fn every_bit_of_the_messages_and_of_the_agreement_is_bound(
            message in proptest::collection::vec(any::<u8>(), 1..200),
            answer in proptest::collection::vec(any::<u8>(), 1..200),
            at in any::<proptest::sample::Index>(),
            bit in 0u8..8,
            protocol in any::<u32>(),
            speaks in proptest::collection::vec(any::<u32>(), 2..6),
            hosts in any::<[[u8; 32]; 2]>(),
        ) {
            let [caller, answerer] = hosts.map(PeerIdentity::from_bytes);
            let agreed = Agreed {
                protocol,
                caller_speaks: speaks.clone(),
                answerer_speaks: speaks[1..].to_vec(),
                caller,
                answerer,
            };
            let said = transcript(&agreed, &message, &answer);
            let mut other = message.clone();
            other[at.index(message.len())] ^= 1 << bit;
            prop_assert_ne!(said, transcript(&agreed, &other, &answer));
            prop_assert_ne!(said, transcript(&agreed, &message[..message.len() - 1], &answer));
            let mut other = answer.clone();
            other[at.index(answer.len())] ^= 1 << bit;
            prop_assert_ne!(said, transcript(&agreed, &message, &other));
            // A byte that goes over from one to the other.
            let (last, rest) = message.split_last().unwrap();
            prop_assert_ne!(said, transcript(&agreed, rest, &[&[*last], &answer[..]].concat()));

            let flip = |host: PeerIdentity| {
                let mut bytes = *host.as_bytes();
                bytes[at.index(32)] ^= 1 << bit;
                PeerIdentity::from_bytes(bytes)
            };
            let mut one_less = agreed.clone();
            one_less.caller_speaks.remove(at.index(speaks.len()));
            let mut one_other = agreed.clone();
            one_other.answerer_speaks[at.index(speaks.len() - 1)] ^= 1 << bit;
            let mut moved = agreed.clone();
            let version = moved.caller_speaks.pop().unwrap();
            moved.answerer_speaks.insert(0, version);
            for changed in [
                Agreed { protocol: protocol ^ 1 << bit, ..agreed.clone() },
                Agreed { caller: flip(caller), ..agreed.clone() },
                Agreed { answerer: flip(answerer), ..agreed.clone() },
                one_less,
                one_other,
                moved,
            ] {
                prop_assert_ne!(said, transcript(&changed, &message, &answer), "{:?}", changed);
            }
            // Who is the source.
            prop_assume!(hosts[0] != hosts[1]);
            let turned = Agreed { caller: answerer, answerer: caller, ..agreed };
            prop_assert_ne!(said, transcript(&turned, &message, &answer));
        }
    }
}
