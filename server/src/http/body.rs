//! The extractor of JSON bodies: media type, size, syntax, then values.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, MatchedPath, Request};
use axum::http::{Extensions, HeaderMap, HeaderValue, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use mirrorvm::reading::json;

use crate::api::decode::{Decode, decode};
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// Longest request body in bytes, on routes without a limit of their own.
pub const BODY_MAX: usize = 64 << 10;
/// Routes whose bodies need more: a declaration of 4096 tuples, a sealed batch of 256 pages, a helper image.
const LARGER: [(&str, usize); 3] = [
    ("/v1/guests/{guest}/address-space-plans", 1 << 20),
    ("/v1/mirrors/{mirror}/imports", 2 << 20),
    ("/v1/helper-images/{image}/content", CONTENT_MAX),
];
/// Longest content of a helper image, in bytes.
pub const CONTENT_MAX: usize = 16 << 20;
const JSON: &str = "application/json";
/// The media type of patches.
pub const MERGE_PATCH: &str = "application/merge-patch+json";
const OCTETS: &str = "application/octet-stream";

/// Longest body of a request, in bytes. It goes by the route that the request was matched to, not by its
/// path.
pub fn max_of(extensions: &Extensions) -> usize {
    let route = extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
    LARGER.iter().find(|(larger, _)| *larger == route).map_or(BODY_MAX, |(_, max)| *max)
}

/// A decoded JSON body.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<T: Decode> FromRequest<AppState> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Problem> {
        check_media_type(request.headers(), &[JSON], "accept-post")?;
        let max = max_of(request.extensions());
        let bytes = read(request.into_body(), max, timeout(state)).await?;
        parse(&bytes).map(Self)
    }
}

/// A decoded JSON merge patch (RFC 7396). A body that declares plain JSON is accepted as one.
#[derive(Debug)]
pub struct PatchBody<T>(pub T);

impl<T: Decode> FromRequest<AppState> for PatchBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Problem> {
        check_media_type(request.headers(), &[MERGE_PATCH, JSON], "accept-patch")?;
        let bytes = read(request.into_body(), BODY_MAX, timeout(state)).await?;
        parse(&bytes).map(Self)
    }
}

/// The bytes of a helper image.
#[derive(Debug)]
pub struct ContentBody(pub bytes::Bytes);

impl FromRequest<AppState> for ContentBody {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Problem> {
        check_media_type(request.headers(), &[OCTETS], "accept-post")?;
        read(request.into_body(), CONTENT_MAX, timeout(state)).await.map(Self)
    }
}

fn timeout(state: &AppState) -> Duration {
    Duration::from_secs(state.config().limits.body_seconds.into())
}

/// Decodes the bytes of a body.
///
/// # Errors
/// `malformed_json` or `validation_failed`.
pub fn parse<T: Decode>(bytes: &[u8]) -> Result<T, Problem> {
    let value = json::parse(bytes).map_err(|e| Problem::new(ProblemCode::MalformedJson, e.to_string()))?;
    decode(&value).map_err(Problem::validation)
}

fn check_media_type(
    headers: &HeaderMap,
    taken: &[&'static str],
    accept: &'static str,
) -> Result<(), Problem> {
    let unsupported = |detail: &str| {
        Problem::new(ProblemCode::UnsupportedMediaType, detail)
            .with_header(header::HeaderName::from_static(accept), HeaderValue::from_static(taken[0]))
    };
    let plain = |e: &HeaderValue| e.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(header::CONTENT_ENCODING).iter().all(plain) {
        return Err(unsupported("the body must not have a content encoding"));
    }
    let mut given = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(value), None) = (given.next(), given.next()) else {
        return Err(unsupported("Content-Type must be given once"));
    };
    let text = value.to_str().unwrap_or_default();
    let mut parts = text.split(';').map(str::trim);
    let json = parts.next().is_some_and(|m| taken.iter().any(|t| m.eq_ignore_ascii_case(t)));
    let utf8 = parts.filter(|p| !p.is_empty()).all(|p| {
        let (name, value) = p.split_once('=').unwrap_or((p, ""));
        !name.trim().eq_ignore_ascii_case("charset")
            || ["utf-8", "\"utf-8\""].iter().any(|u| value.trim().eq_ignore_ascii_case(u))
    });
    let wanted = || format!("Content-Type is not {} (in UTF-8)", taken[0]);
    if json && utf8 { Ok(()) } else { Err(unsupported(&wanted())) }
}

/// The request with its whole body in memory.
///
/// # Errors
/// As [`read`].
pub async fn whole(state: &AppState, request: Request) -> Result<Request, Problem> {
    let (parts, body) = request.into_parts();
    let bytes = read(body, max_of(&parts.extensions), timeout(state)).await?;
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

/// Reads a body of at most `max` bytes, which must have arrived within `limit`.
///
/// # Errors
/// `payload_too_large`, `request_timeout`, `malformed_request`.
pub async fn read(body: Body, max: usize, limit: Duration) -> Result<bytes::Bytes, Problem> {
    let too_large = || {
        Problem::new(ProblemCode::PayloadTooLarge, format!("the body has more than {max} bytes"))
            .with_header(header::CONNECTION, HeaderValue::from_static("close"))
    };
    // What Content-Length says is known before a byte of it is there.
    if HttpBody::size_hint(&body).lower() > max as u64 {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(limit, Limited::new(body, max).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.downcast_ref::<LengthLimitError>().is_some() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::new(ProblemCode::MalformedRequest, "the body broke off")),
        Err(_) => Err(Problem::new(ProblemCode::RequestTimeout, "the body took too long")
            .with_header(header::CONNECTION, HeaderValue::from_static("close"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(content_type: &[&'static str]) -> u16 {
        let mut headers = HeaderMap::new();
        for value in content_type {
            headers.append(header::CONTENT_TYPE, HeaderValue::from_static(value));
        }
        check_media_type(&headers, &[JSON], "accept-post")
            .map_or_else(|p| p.code().status().as_u16(), |()| 200)
    }

    #[test]
    fn routes_with_larger_bodies_are_routes() {
        for (route, _) in LARGER {
            assert!(crate::access::table::OPERATIONS.iter().any(|o| o.path == route), "{route}");
        }
    }

    #[test]
    fn json_in_utf_8_is_taken_and_nothing_else() {
        assert_eq!(status(&["application/json"]), 200);
        assert_eq!(status(&["Application/JSON; charset=\"UTF-8\""]), 200);
        assert_eq!(status(&["application/json; charset=latin1"]), 415);
        assert_eq!(status(&["text/plain"]), 415);
        assert_eq!(status(&[]), 415);
        assert_eq!(status(&["application/json", "text/plain"]), 415);
    }
}
