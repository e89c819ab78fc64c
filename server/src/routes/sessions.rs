//! Sessions of browsers: the link, the page that it leads to, the cookie.
//!
//! The link is `http://127.0.0.1:PORT/open#CODE`. Behind `#` the code stays in the browser: it is in no
//! request line, and so in no log, proxy or `Referer`. A GET of the page uses nothing up, whoever fetches it
//! before the user does: prefetchers, previews of messages. The page's script takes the code out of the
//! address, where the history would keep it, and posts it. That needs no click: the page does nothing when
//! another site has led to it, so that nobody is signed in with a link of somebody else's making.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use mirrorvm::host::HostError;
use uuid::Uuid;

use super::common::IdempotencyKeyParam;
use crate::access::caller::{Caller, Method, Peer};
use crate::access::presented;
use crate::access::sessions::LINK_LIFE;
use crate::api::tokens::{SessionCreate, SessionLink, Whoami};
use crate::http::body::JsonBody;
use crate::http::guard;
use crate::http::idempotency::{ChosenId, KeepInstead};
use crate::http::query::Query;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

const PAGE: &str = "/open";
const HTML: &str = include_str!("open/page.html");
const SCRIPT: &str = include_str!("open/page.js");

/// Make a link that opens a session in a browser
///
/// For a local user, over the Unix socket: the session belongs to that user, with the same role. The link can
/// be followed within 60 seconds and opens one session; `mirrorvmd open` prints it. A session ends after an
/// hour without use, after 12 hours, when it is withdrawn like a token (by the same id), and with the daemon.
#[utoipa::path(post, path = "/v1/session-links", operation_id = "session_link_create", tag = "access",
    params(IdempotencyKeyParam),
    responses((status = 201, description = "The link is good", body = SessionLink,
        headers(("Location" = String, description = "Path of the session, and of the link until then, for withdrawing it")))))]
pub async fn create_link(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    chosen: Option<Extension<ChosenId>>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    state.ready()?;
    match caller.method {
        Method::LocalUser => {}
        // Neither prolongs itself, nor outlives what it was made with.
        Method::Session | Method::Token | Method::Certificate => {
            let detail = "links to sessions are made for local users, over the Unix socket without a token";
            return Err(Problem::new(ProblemCode::Forbidden, detail));
        }
    }
    let credentials = state.credentials();
    if credentials.origins().is_empty() {
        let detail = "the daemon listens at Unix sockets alone";
        return Err(Problem::new(ProblemCode::NoNetworkListener, detail));
    }
    let id = chosen.map_or_else(Uuid::now_v7, |Extension(c)| c.id);
    let code = credentials.sessions().offer(id, &caller.principal, caller.role)?;
    let link = |urls| SessionLink {
        id,
        urls,
        expires_in_seconds: LINK_LIFE.as_secs(),
        principal: caller.principal.clone(),
        role: caller.role,
    };
    let kept = serde_json::to_vec(&link(Vec::new())).map_err(|e| HostError::internal("writing a link", e))?;
    let urls = credentials.origins().iter().map(|o| format!("{o}{PAGE}#{}", code.as_str())).collect();
    let location = HeaderValue::try_from(format!("/v1/tokens/{id}"))
        .map_err(|e| HostError::internal("writing a link's path", e))?;
    let mut response =
        (StatusCode::CREATED, [(header::LOCATION, location)], Json(link(urls))).into_response();
    response.extensions_mut().insert(KeepInstead(Bytes::from(kept)));
    Ok(response)
}

/// Open a session
///
/// Uses up the code of a link and gives the browser a cookie for it: `HttpOnly`, `SameSite=Strict`, and
/// over TLS also `Secure`. Its name is `mirrorvm-session-` and the host's id without hyphens, over TLS with
/// `__Host-` before it. With it, every method but GET and HEAD needs the header `X-Mirrorvm: 1`; a bearer
/// token counts before it. A session that the browser had before ends.
#[utoipa::path(post, path = "/v1/session", operation_id = "session_create", tag = "access",
    request_body = SessionCreate,
    params(("X-Mirrorvm" = String, Header, description = "`1`: no page of another origin can send this", pattern = "^1$",
        example = "1")),
    responses((status = 201, description = "The session is open; this is who calls by it", body = Whoami,
        headers(("Set-Cookie" = String, description = "The session")))))]
pub async fn create(
    State(state): State<AppState>,
    Extension(peer): Extension<Peer>,
    before: Option<Extension<Caller>>,
    query: Query,
    JsonBody(body): JsonBody<SessionCreate>,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    state.ready()?;
    let over_tls = over_tls(&peer)?;
    let credentials = state.credentials();
    let opened = credentials.sessions().open(&body.code)?;
    let ended = before
        .and_then(|Extension(caller)| caller.session())
        .and_then(|before| credentials.sessions().withdraw(before));
    if ended.is_some() || opened.displaced {
        credentials.say_withdrawn();
    }
    let cookie = set_cookie(&state, over_tls, &opened.cookie, None)?;
    let mut response =
        (StatusCode::CREATED, [(header::SET_COOKIE, cookie)], Json(Whoami::from(opened.caller.clone())))
            .into_response();
    // For the audit log: who it was is known only now.
    response.extensions_mut().insert(opened.caller);
    Ok(response)
}

/// End the session
///
/// The session that this request is made with. What is still being read with it ends, too.
#[utoipa::path(delete, path = "/v1/session", operation_id = "session_delete", tag = "access",
    responses((status = 204, description = "The session has ended",
        headers(("Set-Cookie" = String, description = "Removes the cookie")))))]
pub async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(peer): Extension<Peer>,
    query: Query,
) -> Result<Response, Problem> {
    query.read()?.done()?;
    let missing = || Problem::missing("session", "of this request");
    let id = caller.session().ok_or_else(missing)?;
    let cookie = set_cookie(&state, over_tls(&peer)?, "", Some(Duration::ZERO))?;
    state.credentials().sessions().withdraw(id).ok_or_else(missing)?;
    state.credentials().say_withdrawn();
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)]).into_response())
}

/// Whether the request came over TLS. Refuses requests over a Unix socket, because a session is for browsers.
fn over_tls(peer: &Peer) -> Result<bool, Problem> {
    match peer {
        Peer::Tcp => Ok(false),
        Peer::Tls { .. } => Ok(true),
        Peer::Unix { .. } => {
            let detail =
                "a session is opened over TCP or TLS: over the Unix socket the kernel says who calls";
            Err(Problem::new(ProblemCode::Forbidden, detail))
        }
    }
}

/// The header that sets the cookie. The cookie has no age, so the browser keeps it off the disk and forgets
/// it when it ends.
fn set_cookie(
    state: &AppState,
    over_tls: bool,
    value: &str,
    age: Option<Duration>,
) -> Result<HeaderValue, Problem> {
    let name = presented::cookie_name(state.host()?.info().id, over_tls);
    let mut text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict");
    if over_tls {
        text.push_str("; Secure");
    }
    if let Some(age) = age {
        text.push_str(&format!("; Max-Age={}", age.as_secs()));
    }
    let mut header = HeaderValue::try_from(text).map_err(|e| HostError::internal("writing a cookie", e))?;
    header.set_sensitive(true);
    Ok(header)
}

/// The page of the link and its script, which are no part of the API.
pub fn page() -> Router<AppState> {
    Router::new()
        .route(
            PAGE,
            get(async |headers: HeaderMap| guard::check_typed(&headers).map(|()| file("text/html", HTML))),
        )
        .route("/open/page.js", get(async || file("text/javascript", SCRIPT)))
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let policy = "default-src 'none'; script-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                  frame-ancestors 'none'";
    let kind = HeaderValue::try_from(format!("{kind}; charset=utf-8"));
    let headers = [
        (header::CONTENT_TYPE, kind.unwrap_or(HeaderValue::from_static("text/plain"))),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy)),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (headers, text)
}
