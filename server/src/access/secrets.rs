//! Secrets: 32 random bytes in hexadecimal, of which only the SHA-256 is kept.
//!
//! Owns: making, hashing and comparing them, and the text `<prefix><id>_<secret>` that whoever has one shows.
//! Must not know: what they open.
//!
//! A secret of 32 random bytes cannot be guessed, so a plain SHA-256 of it is as good as a slow hash would
//! be.

use std::fmt::Write as _;

use mirrorvm::host::HostError;
use ring::rand::{SecureRandom as _, SystemRandom};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::problem::Problem;

/// How many hexadecimal digits a secret has.
pub const SECRET_HEX: usize = 64;

/// Draws a new secret.
///
/// # Errors
/// `internal` when the system gives no random numbers.
pub fn make() -> Result<Zeroizing<String>, Problem> {
    let mut secret = Zeroizing::new([0; SECRET_HEX / 2]);
    SystemRandom::new()
        .fill(secret.as_mut())
        .map_err(|_| Problem::from(HostError::internal("making a secret", "no random numbers")))?;
    Ok(hex(secret.as_ref()))
}

/// What is kept of a secret: its SHA-256.
pub fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes())).to_string()
}

/// Whether `hash` belongs to this secret. Takes the same time wherever they differ.
pub fn opens(secret: &str, hash: &str) -> bool {
    self::hash(secret).as_bytes().ct_eq(hash.as_bytes()).into()
}

/// The text that a caller gets: prefix, id and secret. The prefix keeps one kind of secret from being taken
/// for another.
pub fn text(prefix: &str, id: Uuid, secret: &str) -> Zeroizing<String> {
    // Room for all of it, and for a line's end: growing would leave copies behind that nobody wipes.
    let mut text =
        Zeroizing::new(String::with_capacity(prefix.len() + 2 * size_of::<Uuid>() + secret.len() + 2));
    // Writing to a String does not fail.
    let _ = write!(text, "{prefix}{}_{secret}", id.simple());
    text
}

/// Splits a text with this prefix into id and secret, if it has that form.
pub fn split<'a>(prefix: &str, text: &'a str) -> Option<(Uuid, &'a str)> {
    let (id, secret) = text.strip_prefix(prefix)?.split_once('_')?;
    let shaped = secret.len() == SECRET_HEX && id.len() == 2 * size_of::<Uuid>();
    Uuid::try_parse(id).ok().filter(|_| shaped).map(|id| (id, secret))
}

fn hex(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(2 * bytes.len()));
    for byte in bytes {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_has_the_form_of_a_secret_or_not(text in "\\PC{0,120}", hex in "[0-9a-f]{64}") {
            prop_assert!(split("mvm_", &text).is_none());
            let id = Uuid::nil();
            let shown = super::text("mvm_", id, &hex);
            prop_assert_eq!(split("mvm_", &shown), Some((id, hex.as_str())));
            prop_assert!(split("mvs_", &shown).is_none());
            prop_assert!(split("mvm_", &shown[..shown.len() - 1]).is_none());
        }
    }

    #[test]
    fn a_secret_opens_its_own_hash_alone() {
        let (one, other) = (make().unwrap(), make().unwrap());
        assert_eq!(one.len(), SECRET_HEX);
        assert!(opens(&one, &hash(&one)) && !opens(&other, &hash(&one)));
        assert!(!opens(&one, &one) && !opens(&one, ""));
    }
}
