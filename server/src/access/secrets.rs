//! Secrets: 32 random bytes in hexadecimal, of which only the SHA-256 is kept.
//!
//! Owns: making, hashing and comparing them. Must not know: what they open.
//!
//! A secret of 32 random bytes cannot be guessed, so a plain SHA-256 of it is as good as a slow hash would be.

use std::fmt::Write as _;

use mirrorvm::host::HostError;
use ring::rand::{SecureRandom as _, SystemRandom};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::problem::Problem;

/// Characters of a secret.
pub const SECRET_HEX: usize = 64;

/// A new secret.
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

/// What is kept of a secret.
pub fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes())).to_string()
}

/// Whether `hash` is this secret's; takes as long whatever differs.
pub fn opens(secret: &str, hash: &str) -> bool {
    self::hash(secret).as_bytes().ct_eq(hash.as_bytes()).into()
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
    use super::*;

    #[test]
    fn a_secret_opens_its_own_hash_alone() {
        let (one, other) = (make().unwrap(), make().unwrap());
        assert_eq!(one.len(), SECRET_HEX);
        assert!(opens(&one, &hash(&one)) && !opens(&other, &hash(&one)));
        assert!(!opens(&one, &one) && !opens(&one, ""));
    }
}
