//! Callers: who one is, tokens, the audit log.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{Extension, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Bytes};
use jiff::Timestamp;
use mirrorvm::host::HostError;
use mirrorvm::store::ledger::Log;
use uuid::Uuid;

use super::common::{DryRunParam, IdempotencyKeyParam, PageParams, SortParams};
use crate::access::caller::Caller;
use crate::access::tokens::{self, NewToken, Origin, TokenRecord};
use crate::api::audit::{AuditEntry, AuditLog};
use crate::api::page::{LIMIT_DEFAULT, LIMIT_MAX, Place, Scope, cut};
use crate::api::tokens::{LIFE_SECONDS, Token, TokenCreate, TokenList, Whoami};
use crate::http::audit::{AuditOutcome, AuditRecord};
use crate::http::body::JsonBody;
use crate::http::change::Change;
use crate::http::idempotency::KeepInstead;
use crate::http::query::Query;
use crate::http::respond;
use crate::problem::{MAX_SAFE_INTEGER, Problem};
use crate::state::AppState;

const PATH: &str = "/v1/tokens";

/// Get who you are
///
/// The caller as the daemon recognized it: by the local user behind a Unix socket, a client certificate, a
/// bearer token, or the session of a browser.
#[utoipa::path(get, path = "/v1/whoami", operation_id = "whoami_get", tag = "access",
    responses((status = 200, description = "The caller", body = Whoami)))]
pub async fn whoami(Extension(caller): Extension<Caller>) -> Json<Whoami> {
    Json(caller.into())
}

/// List the bearer tokens and sessions
///
/// Those that are good now, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", operation_id = "token_list", tag = "access", params(SortParams, PageParams),
    responses((status = 200, description = "A page of tokens", body = TokenList)))]
pub async fn list_tokens(State(state): State<AppState>, query: Query) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let scope = Scope::new(state.page_key(), "tokens", &[]);
    let request = parameters.page(&scope, false);
    parameters.done()?;
    let all = tokens::list(&state)?;
    let place = |t: &TokenRecord| Place::of(request.order, t.created_at, "", t.id);
    let (items, next) = cut(all, &request, place);
    let (next_page_token, link) = respond::next_page(PATH, &[], &scope, &request, next);
    let items = items.into_iter().map(Token::from).collect();
    Ok(respond::list(TokenList { items, next_page_token }, link))
}

/// Make a bearer token
///
/// The secret is only in this answer: the daemon keeps nothing but its hash.
#[utoipa::path(post, path = "/v1/tokens", operation_id = "token_create", tag = "access",
    request_body = TokenCreate, params(DryRunParam, IdempotencyKeyParam),
    responses(
        (status = 200, description = "With `dry_run`: the token that would be made, without a secret", body = Token),
        (status = 201, description = "The token is good", body = Token),
    ))]
pub async fn create_token(
    State(state): State<AppState>,
    change: Change,
    JsonBody(body): JsonBody<TokenCreate>,
) -> Result<Response, Problem> {
    body.check().map_err(Problem::validation)?;
    let host = state.host()?.clone();
    let guest = match &body.guest {
        Some(key) => Some(host.guest(key)?.id),
        None => None,
    };
    let new = NewToken {
        id: change.id().unwrap_or_else(Uuid::now_v7),
        name: body.name,
        role: body.role,
        guest,
        life: Some(Duration::from_secs(
            body.expires_in_seconds.clamp(*LIFE_SECONDS.start(), *LIFE_SECONDS.end()),
        )),
        created_by: change.principal,
    };
    if change.dry_run {
        let token = Token {
            expires_at: new.expires_at(),
            id: new.id,
            name: new.name,
            role: new.role,
            guest,
            origin: Origin::Api,
            created_at: Timestamp::now(),
            created_by: new.created_by,
            secret: None,
        };
        return Ok(respond::ok(1, token));
    }
    let (record, secret) = respond::detached(async move { tokens::create(&host, new).await }).await?;
    let location = format!("{PATH}/{}", record.id);
    let shown = Token::from(record);
    let kept = serde_json::to_vec(&shown).map_err(|e| HostError::internal("writing a token", e))?;
    let token = Token { secret: Some(secret.to_string()), ..shown };
    let mut response = respond::created(&location, 1, token);
    response.extensions_mut().insert(KeepInstead(Bytes::from(kept)));
    Ok(response)
}

/// The token or session as it is.
fn looked_at(state: &AppState, key: &str) -> Result<Response, Problem> {
    let id = Uuid::try_parse(key).ok();
    let there = tokens::list(state)?.into_iter().find(|t| Some(t.id) == id);
    there.map(|t| respond::ok(1, Token::from(t))).ok_or_else(|| Problem::missing("token", key))
}

/// Withdraw a bearer token or a session
///
/// It is refused from now on, and long polls and event streams that were opened with it end. A link whose
/// session has not been opened yet is withdrawn by the id that the link was made with.
#[utoipa::path(delete, path = "/v1/tokens/{token}", operation_id = "token_delete", tag = "access",
    params(("token" = String, Path, description = "Id of the token", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 204, description = "The token is withdrawn")))]
pub async fn delete_token(
    State(state): State<AppState>,
    Path(key): Path<String>,
    change: Change,
) -> Result<Response, Problem> {
    let missing = || Problem::missing("token", &key);
    let id = Uuid::try_parse(&key).map_err(|_| missing())?;
    if change.dry_run {
        return looked_at(&state, &key);
    }
    let gone = respond::detached(async move { tokens::withdraw(&state, id).await }).await?;
    if gone { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(missing()) }
}

/// Look at a token's withdrawal
///
/// What `DELETE` would take away, or the problem that it would be refused with. Nothing is changed.
#[utoipa::path(get, path = "/v1/tokens/{token}/deletion-preview", operation_id = "token_deletion_preview_get",
    tag = "access", params(("token" = String, Path, description = "Id of the token", example = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")),
    responses((status = 200, description = "It as it is now, and would be gone", body = Token)))]
pub async fn token_deletion_preview(
    State(state): State<AppState>,
    Path(key): Path<String>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    looked_at(&state, &key)
}

/// List the audit log
///
/// Every change that was asked for, the newest first, including refused ones. An entry is stored before the
/// change begins, and its outcome together with the change. An entry without an outcome belongs to a change
/// that is still going on, or over which the daemon ended.
#[utoipa::path(get, path = "/v1/audit-log", operation_id = "audit_log_list", tag = "access",
    params(
        ("before" = Option<u64>, Query, description = "Only entries before this number", minimum = 1),
        ("limit" = Option<u32>, Query, description = "Most entries", minimum = 1, maximum = 1000),
        ("principal" = Option<String>, Query, description = "Only those of this principal", example = "unix:0"),
        ("operation" = Option<String>, Query, description = "Only this operation", example = "guest_create"),
    ),
    responses((status = 200, description = "A page of entries", body = AuditLog)))]
pub async fn audit_log(State(state): State<AppState>, query: Query) -> Result<Json<AuditLog>, Problem> {
    let mut parameters = query.read()?;
    let before = parameters.int("before", 1, MAX_SAFE_INTEGER);
    let limit = parameters.int("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT);
    let principal = parameters.one("principal");
    let operation = parameters.one("operation");
    parameters.done()?;
    let wanted = |r: &AuditRecord| {
        principal.as_ref().is_none_or(|p| r.principal.as_ref() == Some(p))
            && operation.as_ref().is_none_or(|o| r.operation == *o)
    };
    let failed = |e| HostError::storage("reading the audit log", e);
    let (mut records, mut unread) = (Vec::new(), None);
    let look = state.host()?.ledger().look_back(Log::Audit, before, limit, |entry| {
        match entry.read::<AuditRecord>(Log::Audit) {
            Ok(record) if wanted(&record) => {
                records.push(record);
                true
            }
            Ok(_) => false,
            Err(error) => {
                unread.get_or_insert(error);
                false
            }
        }
    });
    let look = look.map_err(failed)?;
    // Neither an entry nor what came of it is left out as if it were not there.
    if let Some(error) = unread {
        return Err(failed(error).into());
    }
    let seqs: Vec<u64> = look.entries.iter().map(|e| e.seq).collect();
    let outcomes = state.host()?.ledger().outcomes(&seqs).map_err(failed)?;
    let outcomes = outcomes.into_iter().map(|e| Ok((e.seq, (e.at, e.read::<AuditOutcome>(Log::Audit)?))));
    let mut outcomes =
        outcomes.collect::<Result<HashMap<u64, (Timestamp, AuditOutcome)>, _>>().map_err(failed)?;
    let both = look.entries.into_iter().zip(records);
    let items =
        both.map(|(e, record)| AuditEntry::new(e.seq, e.at, record, outcomes.remove(&e.seq))).collect();
    Ok(Json(AuditLog { items, next_before: look.more.then_some(look.seen) }))
}
