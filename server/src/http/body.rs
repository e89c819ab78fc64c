//! The extractor of JSON bodies: media type, size, syntax, then values.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, HeaderValue, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::api::decode::{Decode, decode};
use crate::api::json;
use crate::problem::{Problem, ProblemCode};

/// Most bytes of a request body.
pub const BODY_MAX: usize = 64 << 10;
/// Longest time that a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A decoded JSON body.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<T: Decode, S: Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers())?;
        let bytes = read(request.into_body()).await?;
        parse(&bytes).map(Self)
    }
}

/// Decodes the bytes of a body.
///
/// # Errors
/// `malformed_json` or `validation_failed`.
pub fn parse<T: Decode>(bytes: &[u8]) -> Result<T, Problem> {
    let value = json::parse(bytes).map_err(|e| Problem::new(ProblemCode::MalformedJson, e.to_string()))?;
    decode(&value).map_err(Problem::validation)
}

fn check_media_type(headers: &HeaderMap) -> Result<(), Problem> {
    let unsupported = |detail: &str| {
        Problem::new(ProblemCode::UnsupportedMediaType, detail).with_header(
            header::HeaderName::from_static("accept-post"),
            HeaderValue::from_static("application/json"),
        )
    };
    if headers.get(header::CONTENT_ENCODING).is_some_and(|e| e != "identity") {
        return Err(unsupported("the body must not have a content encoding"));
    }
    let mut given = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(value), None) = (given.next(), given.next()) else {
        return Err(unsupported("Content-Type must be given once"));
    };
    let text = value.to_str().unwrap_or_default();
    let mut parts = text.split(';').map(str::trim);
    let json = parts.next().is_some_and(|m| m.eq_ignore_ascii_case("application/json"));
    let utf8 = parts.filter(|p| !p.is_empty()).all(|p| {
        let (name, value) = p.split_once('=').unwrap_or((p, ""));
        !name.trim().eq_ignore_ascii_case("charset")
            || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
    });
    if json && utf8 { Ok(()) } else { Err(unsupported("Content-Type is not application/json in UTF-8")) }
}

async fn read(body: Body) -> Result<bytes::Bytes, Problem> {
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_MAX).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.downcast_ref::<LengthLimitError>().is_some() => {
            let detail = format!("the body has more than {BODY_MAX} bytes");
            Err(Problem::new(ProblemCode::PayloadTooLarge, detail)
                .with_header(header::CONNECTION, HeaderValue::from_static("close")))
        }
        Ok(Err(_)) => Err(Problem::new(ProblemCode::MalformedRequest, "the body broke off")),
        Err(_) => Err(Problem::new(ProblemCode::RequestTimeout, "the body took longer than 30 s")
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
        check_media_type(&headers).map_or_else(|p| p.code().status().as_u16(), |()| 200)
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
