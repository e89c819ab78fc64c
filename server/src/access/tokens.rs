//! Bearer tokens: made here, shown once, kept as a hash.
//!
//! Owns: `mvm_<id>_<secret>` and the records behind it, those in the database and those of this run of the daemon alone.
//! Must not know: what a token's bearer may do.

use jiff::Timestamp;
use mirrorvm::host::{Act, Effect, Host, HostError};
use mirrorvm::store::Batch;
use mirrorvm::store::ledger::Space;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Role;
use super::caller::{Caller, Method};
use super::secrets::{self, SECRET_HEX};
use crate::problem::Problem;
use crate::state::AppState;

const PREFIX: &str = "mvm_";

/// Where a token comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Made with `POST /v1/tokens`; good until it expires or is withdrawn.
    #[default]
    Api,
    /// Written to `admin.token` in the state directory when the daemon started; good until the daemon ends.
    AdminFile,
}

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
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
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
    HostError::storage("keeping tokens", e).into()
}

impl TokenRecord {
    /// Makes a record and its secret, and keeps neither.
    ///
    /// # Errors
    /// `internal` when the system gives no random numbers.
    pub fn make(new: NewToken, origin: Origin) -> Result<(Self, Zeroizing<String>), Problem> {
        let secret = secrets::make()?;
        let record = Self {
            id: new.id,
            name: new.name,
            role: new.role,
            guest: new.guest,
            origin,
            hash: secrets::hash(&secret),
            created_at: Timestamp::now(),
            expires_at: new.expires_at,
            created_by: new.created_by,
        };
        Ok((record, secret))
    }

    /// Whether this is its secret.
    pub fn opens_with(&self, secret: &str) -> bool {
        secrets::opens(secret, &self.hash)
    }

    /// What its bearer sends.
    pub fn text(&self, secret: &str) -> Zeroizing<String> {
        Zeroizing::new(format!("{PREFIX}{}_{secret}", self.id.simple()))
    }

    /// Whom it stands for.
    fn caller(&self) -> Caller {
        Caller {
            principal: format!("token:{}", self.id),
            method: Method::Token,
            role: self.role,
            guest: self.guest,
        }
    }
}

/// Makes a token; the text is not kept and cannot be had again.
///
/// # Errors
/// `internal` when storage or randomness fails.
pub async fn create(host: &Host, new: NewToken) -> Result<(TokenRecord, Zeroizing<String>), Problem> {
    let (record, secret) = TokenRecord::make(new, Origin::Api)?;
    let body = serde_json::to_string(&record).map_err(|e| HostError::internal("writing a token", e))?;
    let key = record.id.to_string();
    let mut batch = Batch::new();
    batch.keyed_put(Space::Token, key, Some(record.expires_at), body).map_err(storage)?;
    let riding = Act::ride(&Effect::Token(record.id), &mut batch);
    host.ledger().commit_and(batch, || riding.arrived()).await.map_err(storage)?;
    let text = record.text(&secret);
    Ok((record, text))
}

/// Tokens that are good, by creation.
///
/// # Errors
/// `internal` when storage fails.
pub fn list(state: &AppState) -> Result<Vec<TokenRecord>, Problem> {
    let kept = state.host()?.ledger().all(Space::Token).map_err(storage)?;
    // A list with a gap would be a lie.
    let kept = kept.iter().map(|(key, body)| Space::Token.read::<TokenRecord>(key, body));
    let mut all = kept.collect::<Result<Vec<_>, _>>().map_err(storage)?;
    all.extend(state.credentials().admin().record());
    all.sort_by_key(|t| (t.created_at, t.id));
    Ok(all)
}

/// Withdraws a token; says whether there was one. It is refused from now on.
///
/// # Errors
/// `internal` when storage fails.
pub async fn withdraw(state: &AppState, id: Uuid) -> Result<bool, Problem> {
    let host = state.host()?;
    if state.credentials().admin().withdraw(host, id).is_some() {
        return Ok(true);
    }
    let mut batch = Batch::new();
    let riding = Act::ride(&Effect::Token(id), &mut batch);
    let body = host.ledger().take_with(Space::Token, id.to_string(), batch).await.map_err(storage)?;
    if body.is_some() {
        riding.arrived();
    }
    Ok(body.is_some())
}

/// The caller that a token stands for.
///
/// # Errors
/// `internal` when storage fails; `not_ready` before the database is open.
pub fn recognize(state: &AppState, text: &str) -> Result<Option<Caller>, Problem> {
    let host = state.host()?;
    let Some((id, secret)) = split(text) else { return Ok(None) };
    let record = match state.credentials().admin().record().filter(|r| r.id == id) {
        Some(record) => Some(record),
        None => {
            let key = id.to_string();
            let body = host.ledger().find(Space::Token, &key).map_err(storage)?;
            body.map(|body| Space::Token.read::<TokenRecord>(&key, &body)).transpose().map_err(storage)?
        }
    };
    Ok(record.filter(|r| r.opens_with(secret)).map(|r| r.caller()))
}

fn split(text: &str) -> Option<(Uuid, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let shaped = secret.len() == SECRET_HEX && id.len() == 32;
    Uuid::try_parse(id).ok().filter(|_| shaped).map(|id| (id, secret))
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
