//! Bearer tokens: made here, shown once, kept as a hash.
//!
//! Owns: `mvm_<id>_<secret>` and the records behind it, those in the database and those of this run of the daemon alone; what
//! is listed and withdrawn like them. Must not know: what a token's bearer may do.

use std::time::{Duration, Instant};

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
use super::lease::Lease;
use super::secrets;
use crate::problem::Problem;
use crate::state::AppState;

const PREFIX: &str = "mvm_";
/// Longest time for which a token is taken to be good without another look: the clock of the wall may be set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Where a token comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Made with `POST /v1/tokens`; good until it expires or is withdrawn.
    #[default]
    Api,
    /// Written to `admin.token` in the state directory when the daemon started; good until the daemon ends.
    AdminFile,
    /// A session of a browser, opened with a link of `mirrorvmd open`; good until it is not used for an hour, for 12 hours at
    /// most, and not beyond the daemon's end.
    Session,
}

impl Origin {
    /// What the text of its secrets begins with.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Api | Self::AdminFile => PREFIX,
            Self::Session => super::sessions::PREFIX,
        }
    }
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
        secrets::text(self.origin.prefix(), self.id, secret)
    }

    /// Whom it stands for.
    fn caller(&self) -> Option<Caller> {
        Some(Caller {
            principal: format!("token:{}", self.id),
            method: Method::Token,
            role: self.role,
            guest: self.guest,
            lease: Some(Lease { id: self.id, until: self.good_until(Instant::now())? }),
        })
    }

    /// Until when it is good without another look; `None` when it is not.
    fn good_until(&self, now: Instant) -> Option<Instant> {
        let left = Duration::try_from(self.expires_at.duration_since(Timestamp::now())).ok()?;
        (!left.is_zero()).then(|| now + left.min(LOOK_AGAIN))
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

/// Tokens and sessions that are good, by creation.
///
/// # Errors
/// `internal` when storage fails.
pub fn list(state: &AppState) -> Result<Vec<TokenRecord>, Problem> {
    let kept = state.host()?.ledger().all(Space::Token).map_err(storage)?;
    // A list with a gap would be a lie.
    let kept = kept.iter().map(|(key, body)| Space::Token.read::<TokenRecord>(key, body));
    let mut all = kept.collect::<Result<Vec<_>, _>>().map_err(storage)?;
    let credentials = state.credentials();
    all.extend(credentials.admin().record());
    all.extend(credentials.sessions().list());
    all.sort_by_key(|t| (t.created_at, t.id));
    Ok(all)
}

/// Withdraws a token, a session or a link that has opened none yet; says whether there was one. It is refused from now on,
/// and what it has opened ends.
///
/// # Errors
/// `internal` when storage fails.
pub async fn withdraw(state: &AppState, id: Uuid) -> Result<bool, Problem> {
    let host = state.host()?;
    let credentials = state.credentials();
    if credentials.admin().withdraw(host, id).is_some() || credentials.sessions().withdraw(id).is_some() {
        credentials.say_withdrawn();
        return Ok(true);
    }
    let mut batch = Batch::new();
    let riding = Act::ride(&Effect::Token(id), &mut batch);
    let body = host.ledger().take_with(Space::Token, id.to_string(), batch).await.map_err(storage)?;
    if body.is_some() {
        riding.arrived();
        credentials.say_withdrawn();
    }
    Ok(body.is_some())
}

/// The caller that a token stands for.
///
/// # Errors
/// `internal` when storage fails; `not_ready` before the database is open.
pub fn recognize(state: &AppState, text: &str) -> Result<Option<Caller>, Problem> {
    state.host()?;
    let Some((id, secret)) = secrets::split(PREFIX, text) else { return Ok(None) };
    Ok(find(state, id)?.filter(|r| r.opens_with(secret)).and_then(|r| r.caller()))
}

/// Until when the token or session `id` is good without another look; `None` when it is not.
///
/// # Errors
/// As [`recognize`].
pub fn good_until(state: &AppState, id: Uuid) -> Result<Option<Instant>, Problem> {
    if let Some(until) = state.credentials().sessions().good_until(id) {
        return Ok(Some(until));
    }
    Ok(find(state, id)?.and_then(|r| r.good_until(Instant::now())))
}

fn find(state: &AppState, id: Uuid) -> Result<Option<TokenRecord>, Problem> {
    if let Some(record) = state.credentials().admin().record().filter(|r| r.id == id) {
        return Ok(Some(record));
    }
    let key = id.to_string();
    let body = state.host()?.ledger().find(Space::Token, &key).map_err(storage)?;
    body.map(|body| Space::Token.read::<TokenRecord>(&key, &body)).transpose().map_err(storage)
}
