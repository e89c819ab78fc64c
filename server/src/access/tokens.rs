//! Bearer tokens: made here, shown once, kept as a hash.
//!
//! A token is `mvm_<id>_<secret>`; the secret is 32 random bytes, so that a plain SHA-256 of it is as good as a slow
//! hash would be.

use std::fmt::Write as _;

use jiff::Timestamp;
use mirrorvm::host::{Host, HostError};
use mirrorvm::store::ledger::Space;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Role;
use super::caller::{Caller, Method};
use crate::problem::Problem;

const PREFIX: &str = "mvm_";
const SECRET_HEX: usize = 64;

/// A token as the database has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// What people call it.
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The one guest that it is about, of role `vmm`.
    pub guest: Option<Uuid>,
    /// SHA-256 of the secret, in hexadecimal.
    hash: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends to be good.
    pub expires_at: Timestamp,
    /// Who made it.
    pub created_by: String,
}

/// What a token is to be.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// The id.
    pub id: Uuid,
    /// As [`TokenRecord::name`].
    pub name: String,
    /// As [`TokenRecord::role`].
    pub role: Role,
    /// As [`TokenRecord::guest`].
    pub guest: Option<Uuid>,
    /// As [`TokenRecord::expires_at`].
    pub expires_at: Timestamp,
    /// As [`TokenRecord::created_by`].
    pub created_by: String,
}

fn storage(e: mirrorvm::store::StoreError) -> Problem {
    HostError::internal("keeping tokens", e).into()
}

/// Makes a token; the text is not kept and cannot be had again.
///
/// # Errors
/// `internal` when storage or randomness fails.
pub async fn create(host: &Host, new: NewToken) -> Result<(TokenRecord, Zeroizing<String>), Problem> {
    let mut secret = Zeroizing::new([0; SECRET_HEX / 2]);
    SystemRandom::new()
        .fill(secret.as_mut())
        .map_err(|_| Problem::from(HostError::internal("making a token", "no random numbers")))?;
    let secret = hex(secret.as_ref());
    let record = TokenRecord {
        id: new.id,
        name: new.name,
        role: new.role,
        guest: new.guest,
        hash: hash(&secret),
        created_at: Timestamp::now(),
        expires_at: new.expires_at,
        created_by: new.created_by,
    };
    let body = serde_json::to_string(&record).map_err(|e| HostError::internal("writing a token", e))?;
    let key = record.id.to_string();
    host.ledger().put(Space::Token, key, Some(record.expires_at), body).await.map_err(storage)?;
    let text = Zeroizing::new(format!("{PREFIX}{}_{}", record.id.simple(), secret.as_str()));
    Ok((record, text))
}

/// Tokens that are good, by creation.
///
/// # Errors
/// `internal` when storage fails.
pub fn list(host: &Host) -> Result<Vec<TokenRecord>, Problem> {
    let all = host.ledger().all(Space::Token).map_err(storage)?;
    Ok(all.into_iter().filter_map(|(_, body)| serde_json::from_str(&body).ok()).collect())
}

/// Withdraws a token; says which one, if there was one.
///
/// # Errors
/// `internal` when storage fails.
pub async fn withdraw(host: &Host, id: Uuid) -> Result<Option<TokenRecord>, Problem> {
    let body = host.ledger().take(Space::Token, id.to_string()).await.map_err(storage)?;
    Ok(body.and_then(|b| serde_json::from_str(&b).ok()))
}

/// The caller that a token stands for.
///
/// # Errors
/// `internal` when storage fails.
pub fn recognize(host: &Host, text: &str) -> Result<Option<Caller>, Problem> {
    let Some((id, secret)) = split(text) else { return Ok(None) };
    let Some(body) = host.ledger().find(Space::Token, &id.to_string()).map_err(storage)? else {
        return Ok(None);
    };
    let Ok(record) = serde_json::from_str::<TokenRecord>(&body) else { return Ok(None) };
    let same: bool = hash(secret).as_bytes().ct_eq(record.hash.as_bytes()).into();
    Ok(same.then(|| Caller {
        principal: format!("token:{}", record.id),
        method: Method::Token,
        role: record.role,
        guest: record.guest,
    }))
}

fn split(text: &str) -> Option<(Uuid, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let shaped = secret.len() == SECRET_HEX && id.len() == 32;
    Uuid::try_parse(id).ok().filter(|_| shaped).map(|id| (id, secret))
}

fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes())).to_string()
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
        fn any_text_is_a_token_or_none(text in "\\PC{0,120}", hex in "[0-9a-f]{64}") {
            prop_assert!(split(&text).is_none());
            let id = Uuid::nil();
            let token = format!("mvm_{}_{hex}", id.simple());
            prop_assert_eq!(split(&token), Some((id, hex.as_str())));
            prop_assert!(split(&token[..token.len() - 1]).is_none());
        }
    }
}
