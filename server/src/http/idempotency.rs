//! `Idempotency-Key` on every POST (draft-ietf-httpapi-idempotency-key-header-07): the first answer again,
//! not the work.
//!
//! Owns: keys, fingerprints, what of an answer is kept. Must not know: what requests do.
//!
//! The key is claimed on disk before the work begins, together with the id that a creation will use. The
//! answer is written in the transaction of what was done, where that has a record; a daemon that is killed
//! before leaves the claim. The same request then runs again with the same id, and a creation that finds its
//! own resource there answers with it. So a request with a key takes effect once, whatever dies.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use mirrorvm::guest::Drivers;
use mirrorvm::host::{Act, Effect, Host, HostError};
use mirrorvm::store::ledger::Space;
use mirrorvm::store::{Batch, StoreError, form};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::middleware::RequestId;
use super::query::{Query, canonical_path};
use super::{body, respond};
use crate::access::caller::Caller;
use crate::access::table::{self, Operation};
use crate::api::guests::Guest;
use crate::api::helper_images::HelperImage;
use crate::api::migrations::Migration;
use crate::api::sha256_text;
use crate::problem::{Problem, ProblemCode, ProblemError};
use crate::state::AppState;
use mirrorvm::sync::Locked;

/// The header with the key.
pub const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The header of an answer that was given before.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// How long an answer is kept at least, by the time that has passed and not by a clock that can be set.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// Longest key, in characters.
const KEY_MAX: usize = 255;
/// The headers that are kept of an answer.
const KEPT: [HeaderName; 5] =
    [header::CONTENT_TYPE, header::ETAG, header::LOCATION, header::RETRY_AFTER, header::CACHE_CONTROL];

/// The id that a creation must use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChosenId {
    /// The id itself.
    pub id: Uuid,
    /// Whether an earlier daemon may have begun the same request. A resource with the id is then the one that
    /// this request made.
    pub again: bool,
}

/// Marks an answer that must not be kept as it is, because it holds a secret.
#[derive(Clone, Debug)]
pub struct KeepInstead(pub Bytes);

/// What a key was claimed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub fingerprint: String,
    /// Which run of the daemon works on it.
    pub boot: Uuid,
    pub resource: Uuid,
    pub answer: Option<Answer>,
}

/// An answer as it is given again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// Answers a repeated request with the answer that the first one got.
pub async fn layer(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if request.method() != Method::POST || !request.headers().contains_key(KEY) {
        return next.run(request).await;
    }
    // Keys are a principal's. Nobody known has none, and cannot fill the database with them.
    if request.extensions().get::<Caller>().is_none() {
        return next.run(request).await;
    }
    match run(&state, request, next).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

async fn run(state: &AppState, request: Request, next: Next) -> Result<Response, Problem> {
    let host = state.host()?.clone();
    let (mut parts, body) = request.into_parts();
    let key = key_of(&parts.headers)?;
    let principal = parts.extensions.get::<Caller>().map_or("", |c| c.principal.as_str());
    let key = format!("{principal}\n{key}");
    let limit = Duration::from_secs(state.config().limits.body_seconds.into());
    let bytes = body::read(body, body::max_of(&parts.extensions), limit).await?;
    let query = Query::of(&parts.uri, &mut parts.extensions).canonical();
    let path = canonical_path(parts.uri.path());
    let target = if query.is_empty() { path } else { format!("{path}?{query}") };
    let fingerprint = fingerprint(parts.method.as_str(), &target, &parts.headers, &bytes);
    let mine = claim(&host, &key, fingerprint, state.boot()).await?;
    let (claim, again) = match mine {
        Turn::Answered(answer) => return Ok(answer.replay()),
        Turn::Ours { claim, again } => (claim, again),
    };
    let matched = parts.extensions.get::<MatchedPath>().map(|m| m.as_str().to_owned());
    let operation = matched.as_deref().and_then(|path| table::find(&parts.method, path));
    let mut request = Request::from_parts(parts, Body::from(bytes));
    request.extensions_mut().insert(ChosenId { id: claim.resource, again });
    let path = request.uri().path().to_owned();
    let id = request.extensions().get::<RequestId>().map_or_else(String::new, |r| r.0.clone());
    let claim = Arc::new(Mutex::new(claim));
    if let (Some(act), Some(operation)) = (Act::current(), operation) {
        // With the record of what was done goes the answer to it: whoever asks again after a crash is
        // answered so.
        let (claim, key, drivers) = (Arc::clone(&claim), key.clone(), state.drivers().clone());
        act.write_along(move |effect, batch| {
            keep_along(answer_to(operation, effect, &drivers), &claim, key, batch);
        });
    }
    // The gate has this run to the end even when the caller goes away: the key does not stay claimed.
    let response = next.run(request).await;
    Ok(settle(&host, key, &claim, response, &path, &id).await)
}

/// Adds the answer to be kept to the batch of what was done, where the record alone says what the answer will
/// be.
fn keep_along(answer: Option<Answer>, claim: &Mutex<Claim>, key: String, batch: &mut Batch) {
    let mut claim = claim.locked();
    claim.answer = answer;
    if claim.answer.is_some()
        && let Ok(text) = text_of(&claim)
        && let Err(error) = batch.keyed_put(Space::Idempotency, key, Some(LIFE), text)
    {
        tracing::error!(%error, "an answer is too long to be kept");
    }
}

fn answer_to(operation: &Operation, effect: &Effect<'_>, drivers: &Drivers) -> Option<Answer> {
    let json = |shown: Result<Vec<u8>, serde_json::Error>| shown.ok().map(Bytes::from);
    let (location, generation, body) = match (operation.id, effect) {
        (
            "guest_create" | "guest_start" | "guest_pause" | "guest_resume" | "guest_stop" | "guest_confirm",
            Effect::Guest(r),
        ) => {
            let body = json(serde_json::to_vec(&Guest::of(r, drivers)))?;
            (format!("/v1/guests/{}", r.id), r.generation, body)
        }
        ("migration_create", Effect::Migration(r)) => {
            let body = json(serde_json::to_vec(&Migration::from((*r).clone())))?;
            (format!("/v1/migrations/{}", r.id), r.generation, body)
        }
        ("helper_image_create", Effect::Image(r)) => {
            let body = json(serde_json::to_vec(&HelperImage::from((*r).clone())))?;
            (format!("/v1/helper-images/{}", r.id), r.generation, body)
        }
        // A token's or ticket's secret is not kept; another that is asked for again is another.
        _ => return None,
    };
    let empty = serde_json::Value::Null;
    let response = match operation.id {
        "guest_create" | "migration_create" | "helper_image_create" => {
            respond::created(&location, generation, empty)
        }
        _ => respond::accepted(&location, generation, empty),
    };
    Some(Answer::of(response.status(), response.headers(), &body))
}

enum Turn {
    Answered(Answer),
    Ours { claim: Claim, again: bool },
}

async fn claim(host: &Host, key: &str, fingerprint: String, boot: Uuid) -> Result<Turn, Problem> {
    let mut claim = Claim { fingerprint, boot, resource: Uuid::now_v7(), answer: None };
    let mut again = false;
    loop {
        let text = text_of(&claim)?;
        let ledger = host.ledger();
        let Some(there) =
            ledger.claim(Space::Idempotency, key.to_owned(), Some(LIFE), text).await.map_err(storage)?
        else {
            return Ok(Turn::Ours { claim, again });
        };
        let there: Claim =
            form::read(there.as_bytes()).map_err(|e| HostError::internal("reading a key", e))?;
        if there.fingerprint != claim.fingerprint {
            let detail = "the key came with another method, path or body before";
            return Err(Problem::new(ProblemCode::IdempotencyKeyReused, detail));
        }
        if let Some(answer) = there.answer {
            return Ok(Turn::Answered(answer));
        }
        if there.boot == boot {
            let detail = "the first request with this key has not been answered yet";
            return Err(Problem::new(ProblemCode::IdempotencyKeyInUse, detail));
        }
        // An earlier daemon's. Whoever takes it away takes it over.
        if ledger.take(Space::Idempotency, key.to_owned()).await.map_err(storage)?.is_some() {
            claim.resource = there.resource;
            again = true;
        }
    }
}

/// Keeps the answer if it is final, and otherwise frees the key.
async fn settle(
    host: &Host,
    key: String,
    claim: &Mutex<Claim>,
    response: Response,
    path: &str,
    id: &str,
) -> Response {
    let problem = response.extensions().get::<Problem>().cloned();
    let (parts, body) = match &problem {
        Some(problem) => problem.render(path, id).into_parts(),
        None => response.into_parts(),
    };
    // Our own bodies are whole already.
    let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut batch = Batch::new();
    if is_final(parts.status, problem.as_ref()) {
        let shown = parts.extensions.get::<KeepInstead>().map_or(&bytes, |k| &k.0);
        let answer = Answer::of(parts.status, &parts.headers, shown);
        let mut claim = claim.locked();
        let recorded = Act::current().is_some_and(|act| act.is_recorded());
        if !recorded || claim.answer.as_ref() != Some(&answer) {
            claim.answer = Some(answer);
            let kept = text_of(&claim).and_then(|text| {
                batch.keyed_put(Space::Idempotency, key.clone(), Some(LIFE), text).map_err(storage)
            });
            if kept.is_err() {
                // Without an answer nobody could tell the key from one that is worked on.
                tracing::error!("an answer is too long to be kept; its idempotency key is free again");
                batch.keyed_delete(Space::Idempotency, key);
            }
        }
    } else {
        batch.keyed_delete(Space::Idempotency, key);
    }
    // What the database does not take now is owed to it: the key must not stay claimed.
    if !batch.is_empty()
        && let Err(error) = host.ledger().owe(batch).await
    {
        tracing::error!(%error, "what became of an idempotency key is not stored yet");
    }
    let mut response = Response::from_parts(parts, Body::from(bytes));
    if let Some(problem) = problem {
        response.extensions_mut().insert(problem);
    }
    response
}

/// Whether an answer is final: the same request could not be answered better later.
fn is_final(status: StatusCode, problem: Option<&Problem>) -> bool {
    let passing = matches!(status.as_u16(), 400 | 401 | 403 | 408 | 413 | 415) || status.is_server_error();
    !passing && problem.is_none_or(|p| !p.code().retryable())
}

impl Answer {
    fn of(status: StatusCode, headers: &HeaderMap, body: &Bytes) -> Self {
        let kept = KEPT.iter().filter_map(|name| {
            let value = headers.get(name)?.to_str().ok()?;
            Some((name.as_str().to_owned(), value.to_owned()))
        });
        let body = String::from_utf8_lossy(body).into_owned();
        Self { status: status.as_u16(), headers: kept.collect(), body }
    }

    fn replay(self) -> Response {
        let mut response = Body::from(self.body).into_response();
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().insert(name, value);
            }
        }
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        response
    }
}

fn key_of(headers: &HeaderMap) -> Result<String, Problem> {
    let mut given = headers.get_all(KEY).iter();
    let text = match (given.next(), given.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    };
    // The draft has a quoted string (RFC 9651); most clients send it bare.
    let text =
        text.map(str::trim).map(|t| t.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(t));
    let printable =
        |t: &&str| (1..=KEY_MAX).contains(&t.len()) && t.bytes().all(|b| (b' '..=b'~').contains(&b));
    text.filter(printable).map(str::to_owned).ok_or_else(|| {
        let detail =
            format!("idempotency-key is not given once with 1 to {KEY_MAX} printable ASCII characters");
        Problem::validation(vec![ProblemError::at_header(&KEY, "invalid_format", detail)])
    })
}

fn fingerprint(method: &str, target: &str, headers: &HeaderMap, body: &[u8]) -> String {
    let mut hash = Sha256::new();
    let conditions = [header::CONTENT_TYPE, header::IF_MATCH];
    // All of a header's values, as whoever goes by it reads them.
    let values = conditions.iter().map(|name| {
        let all: Vec<&[u8]> = headers.get_all(name).iter().map(|v| v.as_bytes()).collect();
        all.join(&b", "[..])
    });
    let values: Vec<Vec<u8>> = values.collect();
    let values = values.iter().map(Vec::as_slice);
    for part in [method.as_bytes(), target.as_bytes()].into_iter().chain(values).chain([body]) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    sha256_text(&hash.finalize())
}

fn text_of(claim: &Claim) -> Result<String, Problem> {
    form::write(claim).map_err(|e| HostError::internal("writing a key", e).into())
}

fn storage(e: StoreError) -> Problem {
    HostError::storage("keeping idempotency keys", e).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_short_printable_and_given_once() {
        let key = |values: &[&str]| {
            let headers: HeaderMap =
                values.iter().map(|v| (KEY, HeaderValue::from_str(v).unwrap())).collect();
            key_of(&headers).ok()
        };
        assert_eq!(key(&["abc"]).as_deref(), Some("abc"));
        assert_eq!(key(&["\"abc\""]).as_deref(), Some("abc"));
        assert_eq!(key(&[&"k".repeat(255)]).map(|k| k.len()), Some(255));
        for bad in [&["", "x"][..], &[""], &["\"\""], &["a\tb"], &["a", "b"]] {
            assert_eq!(key(bad), None, "{bad:?}");
        }
        assert_eq!(key(&[&"k".repeat(256)]), None);
    }

    #[test]
    fn fingerprints_tell_requests_apart() {
        let none = HeaderMap::new();
        let one = fingerprint("POST", "/v1/guests", &none, b"{}");
        assert_eq!(one, fingerprint("POST", "/v1/guests", &none, b"{}"));
        assert_ne!(one, fingerprint("POST", "/v1/guests?dry_run=true", &none, b"{}"));
        assert_ne!(one, fingerprint("POST", "/v1/guest", &none, b"s{}"));
        assert_ne!(one, fingerprint("POST", "/v1/guests", &none, b"{} "));
        let conditional = [(header::IF_MATCH, HeaderValue::from_static("\"1\""))].into_iter().collect();
        assert_ne!(one, fingerprint("POST", "/v1/guests", &conditional, b"{}"));
        let tag = |tag| (header::IF_MATCH, HeaderValue::from_static(tag));
        let both: HeaderMap = [tag("\"1\""), tag("\"2\"")].into_iter().collect();
        assert_ne!(
            fingerprint("POST", "/v1/guests", &conditional, b"{}"),
            fingerprint("POST", "/v1/guests", &both, b"{}")
        );
    }

    #[test]
    fn answers_stay_unless_a_later_one_may_be_better() {
        let problem = |code| Some(Problem::new(code, "x"));
        for (code, stays) in [
            (ProblemCode::NotFound, true),
            (ProblemCode::NameTaken, true),
            (ProblemCode::GuestMigrating, false),
            (ProblemCode::ValidationFailed, true),
            (ProblemCode::Internal, false),
            (ProblemCode::NotReady, false),
            (ProblemCode::PayloadTooLarge, false),
        ] {
            let p = problem(code);
            assert_eq!(is_final(code.status(), p.as_ref()), stays, "{code:?}");
        }
        assert!(is_final(StatusCode::CREATED, None));
    }
}
