//! The ephemeral half of a session's keys: what two helpers agree on by X25519 (RFC 7748).
//!
//! Owns: the nonce and the key pair that `Hello` draws, until `Begin` spends them. Must not know: what the
//! result is mixed with. Whoever gets to know the guest's migration secret later cannot open what was sealed
//! before: for that the private keys were needed, and no memory holds them any more.

use mirrorvm_abi::op::Greeting;
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret, X25519_BASEPOINT_BYTES};

/// What a helper has drawn for a session that has not begun. Wiped when it is dropped; that has to be where
/// it lies, since a move would leave a copy behind.
#[derive(Clone)]
pub(crate) struct Ephemeral {
    secret: StaticSecret,
    greeting: Greeting,
}

impl Ephemeral {
    /// From fresh random bytes, of which nobody else keeps a copy.
    pub fn new(nonce: [u8; 32], secret: [u8; 32]) -> Self {
        let secret = StaticSecret::from(secret);
        // By the ladder, as every other product, and not by a table of multiples: that would be 30 KiB of
        // image and vector code that asks the processor what it can do.
        let public_key = secret.diffie_hellman(&PublicKey::from(X25519_BASEPOINT_BYTES)).to_bytes();
        Self { secret, greeting: Greeting { nonce, public_key } }
    }

    /// What the peer is told.
    pub const fn greeting(&self) -> Greeting {
        self.greeting
    }

    /// The secret shared with whoever has the private half of `peer`. `None` where that is everybody: for a
    /// point of low order the product is zero, whatever the key.
    pub fn agree(&self, peer: &Greeting) -> Option<SharedSecret> {
        let product = self.secret.diffie_hellman(&PublicKey::from(peer.public_key));
        product.was_contributory().then_some(product)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> [u8; 32] {
        assert_eq!(text.len(), 64);
        core::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
    }

    #[test]
    fn both_ends_agree_on_what_rfc_7748_says() {
        // Section 6.1.
        let private = [
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        ];
        let public = [
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        ];
        let shared = hex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
        let [alice, bob] = private.map(|key| Ephemeral::new([7; 32], hex(key)));
        for (end, key) in [&alice, &bob].into_iter().zip(public) {
            assert_eq!(end.greeting(), Greeting { nonce: [7; 32], public_key: hex(key) });
        }
        for (end, peer) in [(&alice, &bob), (&bob, &alice)] {
            assert_eq!(end.agree(&peer.greeting()).unwrap().to_bytes(), shared);
        }
    }

    #[test]
    fn with_a_point_of_low_order_nothing_is_agreed_on() {
        let end = Ephemeral::new([7; 32], [0x5a; 32]);
        // All there are, of the curve and of its twist, and what reduces to them.
        for point in [
            "0000000000000000000000000000000000000000000000000000000000000000",
            "0100000000000000000000000000000000000000000000000000000000000000",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        ] {
            // The highest bit is not looked at.
            for bit in [0, 0x80] {
                let mut public_key = hex(point);
                public_key[31] |= bit;
                let agreed = end.agree(&Greeting { nonce: [1; 32], public_key });
                assert!(agreed.is_none(), "{point} with {bit:#x}");
            }
        }
        assert!(end.agree(&end.greeting()).is_some());
    }
}
