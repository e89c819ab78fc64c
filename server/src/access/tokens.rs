//! Bearer tokens: made here, shown once, kept as a hash.
//!
//! Owns: `mvm_<id>_<secret>` and the records behind it, those in the database and those of this run of the
//! daemon alone; what is listed and withdrawn like them. Must not know: what a token's bearer may do.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mirrorvm::host::{Act, Effect, Host, HostError};
use mirrorvm::store::ledger::{Kept, Space};
use mirrorvm::store::{Batch, StoreError, form};
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
/// How long a token may count as good without being looked at again. A machine that sleeps wakes up later
/// than it notices.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Where a token comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Made with `POST /v1/tokens`. Good until it expires or is withdrawn.
    #[default]
    Api,
    /// Written to `admin.token` in the state directory when the daemon started. Good until the daemon ends.
    AdminFile,
    /// A session of a browser, opened with a link of `mirrorvmd open`. Good until it was not used for an
    /// hour, for at most 12 hours, and not beyond the daemon's end.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRecord {
    /// Id, a UUIDv7.
    pub id: Uuid,
    /// The name that people know it by.
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The only guest that it gives access to, for the role `vmm`. `None` for other roles.
    pub guest: Option<Uuid>,
    /// Where it comes from.
    pub origin: Origin,
    /// SHA-256 of the secret, in hexadecimal.
    pub(crate) hash: String,
    /// When it was made, by the wall clock.
    pub created_at: Timestamp,
    /// When it ends, by the wall clock as it was when this was read or made. It ends when that much time has
    /// passed, whatever the clock is set to meanwhile.
    pub expires_at: Timestamp,
    /// The principal that made it.
    pub created_by: String,
}

/// A token that is about to be made.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// Id that the token will have.
    pub id: Uuid,
    /// Becomes [`TokenRecord::name`].
    pub name: String,
    /// Becomes [`TokenRecord::role`].
    pub role: Role,
    /// Becomes [`TokenRecord::guest`].
    pub guest: Option<Uuid>,
    /// How long it will be good. `None`: for as long as the daemon runs.
    pub life: Option<Duration>,
    /// Becomes [`TokenRecord::created_by`].
    pub created_by: String,
}

/// 9999-01-01 in seconds since 1970, shown for what has no end of its own.
const NO_END: i64 = 253_370_764_800;

impl NewToken {
    /// When it would end if it were made now.
    pub fn expires_at(&self) -> Timestamp {
        self.life.map_or_else(|| Timestamp::from_second(NO_END).unwrap_or(Timestamp::MAX), after)
    }
}

/// The wall clock's time when `left` will have passed.
fn after(left: Duration) -> Timestamp {
    Timestamp::now().saturating_add(left).unwrap_or(Timestamp::MAX)
}

fn storage(e: StoreError) -> Problem {
    HostError::storage("keeping tokens", e).into()
}

impl TokenRecord {
    /// Makes a record and its secret, and keeps neither.
    ///
    /// # Errors
    /// `internal` when the system gives no random numbers.
    pub fn make(new: NewToken, origin: Origin) -> Result<(Self, Zeroizing<String>), Problem> {
        let (secret, expires_at) = (secrets::make()?, new.expires_at());
        let record = Self {
            id: new.id,
            name: new.name,
            role: new.role,
            guest: new.guest,
            origin,
            hash: secrets::hash(&secret),
            created_at: Timestamp::now(),
            expires_at,
            created_by: new.created_by,
        };
        Ok((record, secret))
    }

    /// Whether `secret` is the secret of this token.
    pub fn opens_with(&self, secret: &str) -> bool {
        secrets::opens(secret, &self.hash)
    }

    /// What its bearer sends.
    pub fn text(&self, secret: &str) -> Zeroizing<String> {
        secrets::text(self.origin.prefix(), self.id, secret)
    }

    /// The caller that it stands for, while it is good.
    fn caller(&self, until: Instant) -> Caller {
        Caller {
            principal: format!("token:{}", self.id),
            method: Method::Token,
            role: self.role,
            guest: self.guest,
            lease: Some(Lease { id: self.id, until }),
        }
    }
}

/// Makes a token; the text is not kept and cannot be had again.
///
/// # Errors
/// `internal` when storage or randomness fails.
pub async fn create(host: &Host, new: NewToken) -> Result<(TokenRecord, Zeroizing<String>), Problem> {
    let life = new.life;
    let (record, secret) = TokenRecord::make(new, Origin::Api)?;
    let body = form::write(&record).map_err(|e| HostError::internal("writing a token", e))?;
    let key = record.id.to_string();
    let mut batch = Batch::new();
    batch.keyed_put(Space::Token, key, life, body).map_err(storage)?;
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
    let kept = kept.iter().map(|(key, kept)| shown(key, kept));
    let mut all = kept.collect::<Result<Vec<_>, _>>().map_err(storage)?;
    let credentials = state.credentials();
    all.extend(credentials.admin().record());
    all.extend(credentials.sessions().list());
    all.sort_by_key(|t| (t.created_at, t.id));
    Ok(all)
}

/// Withdraws a token, a session or a link that has opened none yet; says whether there was one. It is refused
/// from now on, and what it has opened ends.
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
    let found = find(state, id)?.filter(|(record, _)| record.opens_with(secret));
    Ok(found.map(|(record, until)| record.caller(until)))
}

/// Until when the token or session `id` is good without another look; `None` when it is not.
///
/// # Errors
/// As [`recognize`].
pub fn good_until(state: &AppState, id: Uuid) -> Result<Option<Instant>, Problem> {
    if let Some(until) = state.credentials().sessions().good_until(id) {
        return Ok(Some(until));
    }
    Ok(find(state, id)?.map(|(_, until)| until))
}

/// A token that is good, and until when it is without another look.
fn find(state: &AppState, id: Uuid) -> Result<Option<(TokenRecord, Instant)>, Problem> {
    let until = |left: Option<Duration>| Instant::now() + left.map_or(LOOK_AGAIN, |l| l.min(LOOK_AGAIN));
    if let Some(record) = state.credentials().admin().record().filter(|r| r.id == id) {
        return Ok(Some((record, until(None))));
    }
    let key = id.to_string();
    let kept = state.host()?.ledger().find(Space::Token, &key).map_err(storage)?;
    let found = kept.map(|kept| Ok((shown(&key, &kept)?, until(kept.left))));
    found.transpose().map_err(storage)
}

/// By how much the wall clock may deviate from the time that has passed before an end is shown by the clock
/// as it is now.
const DRIFT: SignedDuration = SignedDuration::from_secs(60);

/// A stored token with the end that it has by the wall clock as it is now: as it was given, unless the clock
/// was set since.
fn shown(key: &str, kept: &Kept) -> Result<TokenRecord, StoreError> {
    let record: TokenRecord = Space::Token.read(key, &kept.body)?;
    let given = record.expires_at;
    let now = kept.left.map_or(given, after);
    let expires_at = if now.duration_since(given).abs() <= DRIFT { given } else { now };
    Ok(TokenRecord { expires_at, ..record })
}
