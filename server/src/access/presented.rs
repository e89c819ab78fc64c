//! The credential that a request shows in its head: a bearer token, the cookie of a session, or none.
//!
//! Owns: reading `Authorization` and `Cookie`, and which of two counts. Must not know: whose a credential is.
//!
//! A bearer token counts before a cookie: somebody has put it there, while a browser sends its cookies along
//! with everything. So it is no forgery, and a wrong one is refused, not forgotten in favour of the cookie.
//! There is no third place: a token in a query would be in logs, histories and `Referer` headers.

use axum::http::{HeaderMap, Uri, header};
use uuid::Uuid;

use crate::http::query;

/// Query parameters under which other APIs take tokens.
const IN_QUERY: [&str; 3] = ["access_token", "token", "authorization"];

/// The credential that a request shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presented<'a> {
    /// The request has no credential.
    Nothing,
    /// A bearer token, from `Authorization: Bearer ...`.
    Bearer(&'a str),
    /// The text of a session's cookie.
    Session(&'a str),
}

/// The name of the cookie of sessions. A browser sends cookies to every port of an address and keeps one of
/// each name, so the daemon's id is part of it: otherwise two daemons on one machine would end each other's
/// sessions. Over TLS the prefix makes the browser refuse a cookie that somebody else set in the clear (RFC
/// 6265bis, section 4.1.3.2).
pub fn cookie_name(host: Uuid, over_tls: bool) -> String {
    format!("{}mirrorvm-session-{}", if over_tls { "__Host-" } else { "" }, host.simple())
}

/// Reads the head. `cookie` is the name of the session's cookie where one counts.
///
/// # Errors
/// A sentence that says why what is there cannot be told apart or read.
pub fn read<'a>(headers: &'a HeaderMap, cookie: Option<&str>) -> Result<Presented<'a>, &'static str> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    if let Some(value) = given.next() {
        if given.next().is_some() {
            return Err("Authorization is given more than once");
        }
        let text = value.to_str().map_err(|_| "Authorization is not visible ASCII")?.trim();
        let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
        // An empty one is a client's variable that was not set: no credential, not a wrong one.
        if !scheme.is_empty() {
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err("Authorization is not a bearer token");
            }
            let token = token.trim();
            if !token.is_empty() {
                return Ok(Presented::Bearer(token));
            }
        }
    }
    match cookie {
        Some(name) => session(headers, name),
        None => Ok(Presented::Nothing),
    }
}

/// Reads the session's cookie. Of two cookies with the name, one was put there by somebody else, such as a
/// page of another port of the same address.
fn session<'a>(headers: &'a HeaderMap, name: &str) -> Result<Presented<'a>, &'static str> {
    // Other programs' cookies may hold any bytes.
    let pairs = headers.get_all(header::COOKIE).iter().flat_map(|v| v.as_bytes().split(|b| *b == b';'));
    let mut found = pairs.filter_map(|pair| {
        let mut parts = pair.splitn(2, |b| *b == b'=');
        let named = parts.next()?.trim_ascii() == name.as_bytes();
        named.then(|| parts.next().unwrap_or_default().trim_ascii())
    });
    match (found.next(), found.next()) {
        (None, _) => Ok(Presented::Nothing),
        (Some(value), None) => {
            let text = std::str::from_utf8(value).map_err(|_| "the session's cookie is not ASCII")?;
            Ok(Presented::Session(text))
        }
        (Some(_), Some(_)) => Err("the session's cookie is given more than once"),
    }
}

/// The query parameter that looks as if it were meant for a credential.
pub fn in_query(uri: &Uri) -> Option<&'static str> {
    let names = uri.query()?.split('&').map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    let names: Vec<String> = names.filter_map(query::unescape).collect();
    IN_QUERY.into_iter().find(|known| names.iter().any(|n| n.eq_ignore_ascii_case(known)))
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    const NAME: &str = "mirrorvm-session-1";

    fn of(headers: &[(HeaderName, &str)]) -> Result<String, &'static str> {
        let headers: HeaderMap = headers
            .iter()
            .map(|(n, v)| (n.clone(), HeaderValue::from_bytes(v.as_bytes()).unwrap()))
            .collect();
        let found = read(&headers, Some(NAME)).map(|p| format!("{p:?}"));
        let without = read(&headers, None).map(|p| format!("{p:?}"));
        assert!(
            found == without
                || !headers.contains_key(header::AUTHORIZATION)
                || without == Ok("Nothing".into())
        );
        found
    }

    fn authorization(value: &str) -> (HeaderName, &str) {
        (header::AUTHORIZATION, value)
    }

    fn cookie(value: &str) -> (HeaderName, &str) {
        (header::COOKIE, value)
    }

    #[test]
    fn one_credential_is_read_and_two_are_never_mixed_up() {
        let mine = format!("{NAME}=s");
        assert_eq!(of(&[]).unwrap(), "Nothing");
        for bearer in ["Bearer t", "bearer t", "BEARER   t ", "Bearer t "] {
            assert_eq!(of(&[authorization(bearer)]).unwrap(), "Bearer(\"t\")", "{bearer}");
            assert_eq!(of(&[authorization(bearer), cookie(&mine)]).unwrap(), "Bearer(\"t\")", "{bearer}");
        }
        for empty in ["Bearer", "Bearer ", "bearer   ", "", " "] {
            assert_eq!(of(&[authorization(empty)]).unwrap(), "Nothing", "{empty:?}");
            assert_eq!(of(&[authorization(empty), cookie(&mine)]).unwrap(), "Session(\"s\")", "{empty:?}");
        }
        for bad in ["Basic eDp5", "t", "Bearer\tt", "Bearer: t", "\u{e9}"] {
            assert!(
                of(&[authorization(bad)]).is_err() && of(&[authorization(bad), cookie(&mine)]).is_err(),
                "{bad}"
            );
        }
        assert!(of(&[authorization("Bearer t"), authorization("Bearer t")]).is_err());
        assert!(of(&[authorization("Bearer"), authorization("Bearer t")]).is_err());
    }

    #[test]
    fn the_sessions_cookie_is_found_among_others_and_only_once() {
        for (value, found) in [
            (format!("{NAME}=s"), "Session(\"s\")"),
            (format!("a=b; {NAME}=s; caf\u{e9}=\u{e9}"), "Session(\"s\")"),
            (format!(" {NAME} = s ;"), "Session(\"s\")"),
            (format!("{NAME}=s=t"), "Session(\"s=t\")"),
            (format!("{NAME}="), "Session(\"\")"),
            (NAME.to_owned(), "Session(\"\")"),
            (format!("x{NAME}=s; {NAME}x=s; __Host-{NAME}=s; {}=s", NAME.to_uppercase()), "Nothing"),
            (format!("a=\"{NAME}=s\""), "Nothing"),
        ] {
            assert_eq!(of(&[cookie(&value)]).unwrap(), found, "{value}");
        }
        let (one, two) = (format!("{NAME}=s"), format!("{NAME}=s; {NAME}=s"));
        assert!(of(&[cookie(&two)]).is_err());
        assert!(of(&[cookie(&one), cookie(&one)]).is_err(), "in two headers");
        assert_eq!(of(&[cookie("a=b"), cookie(&one)]).unwrap(), "Session(\"s\")");
    }

    #[test]
    fn a_credential_in_the_query_is_noticed_and_not_read() {
        for (target, name) in [
            ("/?access_token=x", Some("access_token")),
            ("/?a=b&TOKEN=x", Some("token")),
            ("/?acc%65ss_token", Some("access_token")),
            ("/?page_token=x", None),
            ("/", None),
        ] {
            assert_eq!(in_query(&Uri::from_static(target)), name, "{target}");
        }
    }

    #[test]
    fn the_cookies_name_is_the_daemons_own() {
        assert_eq!(cookie_name(Uuid::nil(), false), format!("mirrorvm-session-{}", "0".repeat(32)));
        assert_eq!(cookie_name(Uuid::nil(), true), format!("__Host-mirrorvm-session-{}", "0".repeat(32)));
    }
}
