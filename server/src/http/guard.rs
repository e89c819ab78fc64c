//! Against web pages: any page in a browser can send requests here, over loopback TCP and wherever TLS is
//! served, and the browser adds what it has: the session's cookie, a client certificate.
//!
//! Owns: what of a request says that a page of another origin has sent it. Must not know: who calls, what
//! for.
//!
//! DNS rebinding shows in the Host header, a request of another site in Origin and Sec-Fetch-Site. Older
//! browsers send neither of these with everything, so a change by session needs a header besides that no page
//! of another origin can add: the answer to its preflight never allows one. A Unix socket is out of reach for
//! a browser and is not checked. What HTTP/1.1 itself wants of a Host header (RFC 9112, section 3.2) holds
//! everywhere.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::problem::{Problem, ProblemCode, ProblemError};

/// The header that changes by session must have.
pub const MARK: HeaderName = HeaderName::from_static("x-mirrorvm");
/// The only value of that header.
const MARKED: &str = "1";
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// How a request came in; set on every request by the accept loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Over a Unix socket.
    Unix,
    /// Over plain TCP on a loopback address.
    LoopbackTcp,
    /// Over TLS, where the client has checked whom it talks to.
    Tls,
}

/// Refuses requests that another site may have sent.
pub async fn layer(request: Request, next: Next) -> Response {
    if !well_formed(request.version(), request.headers()) {
        let detail = "an HTTP/1.1 request has one Host header, with a host's name or address";
        let error = ProblemError::at_header(&header::HOST, "invalid_format", detail);
        return Problem::new(ProblemCode::MalformedRequest, detail).with_errors(vec![error]).into_response();
    }
    let checked = match request.extensions().get::<Transport>() {
        Some(Transport::LoopbackTcp) => over_tcp(&request),
        Some(Transport::Tls) => ours("https", &request),
        Some(Transport::Unix) | None => Ok(()),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(detail) => Problem::new(ProblemCode::OriginRefused, detail).into_response(),
    }
}

/// Whether the request has a proper Host header: exactly one in HTTP/1.1 and at most one before, with a host
/// or empty.
fn well_formed(version: Version, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => version < Version::HTTP_11,
        (Some(host), None) => host.is_empty() || host.to_str().is_ok_and(|h| h.parse::<Authority>().is_ok()),
        (Some(_), Some(_)) => false,
    }
}

fn over_tcp<B>(request: &axum::http::Request<B>) -> Result<(), &'static str> {
    if !names_loopback(request.uri(), request.headers()) {
        return Err("Host does not name this machine's loopback address");
    }
    ours("http", request)
}

/// Checks that no page of another origin has sent the request.
fn ours<B>(scheme: &str, request: &axum::http::Request<B>) -> Result<(), &'static str> {
    let headers = request.headers();
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    // Same origin means the very same host and port, not just any program on this machine.
    let same = |o: &str| {
        let authority = o.strip_prefix(scheme).and_then(|o| o.strip_prefix("://"));
        authority.is_some_and(|a| !a.is_empty() && bare(scheme, a).eq_ignore_ascii_case(bare(scheme, host)))
    };
    if !headers.get_all(header::ORIGIN).iter().all(|o| o.to_str().is_ok_and(same)) {
        return Err("Origin is not that of the Host: a page of another origin has sent this");
    }
    if !is_own(headers) && !is_navigation(request.method(), headers) {
        return Err("Sec-Fetch-Site says that a page of another origin has sent this");
    }
    Ok(())
}

/// An authority without the port that its scheme implies.
fn bare<'a>(scheme: &str, authority: &'a str) -> &'a str {
    let implied = if scheme == "https" { ":443" } else { ":80" };
    authority.strip_suffix(implied).unwrap_or(authority)
}

/// Whether, as far as the browser says, a page of this origin or the user has sent it.
fn is_own(headers: &HeaderMap) -> bool {
    headers.get_all(FETCH_SITE).iter().all(|site| site == "same-origin" || site == "none")
}

/// Whether a link was followed to a page of its own. Nobody but the user sees what comes, and it changes
/// nothing.
fn is_navigation(method: &Method, headers: &HeaderMap) -> bool {
    let is = |name: &HeaderName, value: &str| headers.get(name).is_some_and(|v| v == value);
    matches!(*method, Method::GET | Method::HEAD)
        && is(&FETCH_MODE, "navigate")
        && is(&FETCH_DEST, "document")
}

/// Checks a request that a browser's cookie lets in.
///
/// # Errors
/// `origin_refused` for a page of another port of this address, to which browsers give the same cookies, and
/// for an upgrade without an origin; `session_header_required`.
pub fn check_session(method: &Method, headers: &HeaderMap) -> Result<(), Problem> {
    let refused = |detail: &str| Err(Problem::new(ProblemCode::OriginRefused, detail));
    if !is_own(headers) {
        return refused("Sec-Fetch-Site says that a page of another origin leads here");
    }
    // Browsers send Origin with every upgrade, and nothing else of what is checked here.
    if headers.contains_key(header::UPGRADE) && !headers.contains_key(header::ORIGIN) {
        return refused("an upgrade by session needs Origin");
    }
    if matches!(*method, Method::GET | Method::HEAD) { Ok(()) } else { check_mark(headers) }
}

/// Checks that a page of another origin cannot have made the browser send this.
///
/// # Errors
/// `session_header_required`.
pub fn check_mark(headers: &HeaderMap) -> Result<(), Problem> {
    let mut given = headers.get_all(MARK).iter();
    if given.next().is_some_and(|v| v == MARKED) && given.next().is_none() {
        return Ok(());
    }
    let detail = format!("{MARK} is not there with the value {MARKED}");
    let code = if headers.contains_key(MARK) { "unknown_value" } else { "missing" };
    let error = ProblemError::at_header(&MARK, code, detail.clone());
    Err(Problem::new(ProblemCode::SessionHeaderRequired, detail).with_errors(vec![error]))
}

/// Checks that no page has led here by a link: the user typed or pasted it, or a program handed it to the
/// browser.
///
/// # Errors
/// `origin_refused`.
pub fn check_typed(headers: &HeaderMap) -> Result<(), Problem> {
    if is_own(headers) {
        return Ok(());
    }
    let detail = "a page of another site leads here; paste what `mirrorvmd open` prints into the browser's address bar";
    Err(Problem::new(ProblemCode::OriginRefused, detail))
}

fn names_loopback(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next().and_then(|h| h.to_str().ok()), hosts.next()) else {
        return false;
    };
    host.parse::<Authority>().is_ok_and(|a| is_loopback(&a)) && uri.authority().is_none_or(is_loopback)
}

fn is_loopback(authority: &Authority) -> bool {
    let host = authority.host();
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let ours =
        host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    // No browser sends a user's name there, and none is wanted.
    ours && !authority.as_str().contains('@')
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn request(
        method: &str,
        target: &'static str,
        headers: &[(&'static str, &'static str)],
    ) -> axum::http::Request<()> {
        let mut request = axum::http::Request::new(());
        *request.method_mut() = method.parse().unwrap();
        *request.uri_mut() = Uri::from_static(target);
        for (name, value) in headers {
            request.headers_mut().append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        request
    }

    fn check(host: &'static str, origin: Option<&'static str>, target: &'static str) -> bool {
        let headers: Vec<_> = [("host", host)].into_iter().chain(origin.map(|o| ("origin", o))).collect();
        over_tcp(&request("GET", target, &headers)).is_ok()
    }

    #[test]
    fn http_1_1_has_one_host_and_http_1_0_may_have_none() {
        let of = |version, hosts: &[&'static str]| {
            let hosts = hosts.iter().map(|h| (header::HOST, HeaderValue::from_static(h)));
            well_formed(version, &hosts.collect())
        };
        assert!(of(Version::HTTP_10, &[]) && of(Version::HTTP_10, &["a"]) && of(Version::HTTP_11, &["a:1"]));
        assert!(of(Version::HTTP_11, &[""]) && of(Version::HTTP_11, &["[::1]:7800"]));
        assert!(!of(Version::HTTP_11, &[]) && !of(Version::HTTP_11, &["a", "a"]));
        assert!(!of(Version::HTTP_11, &["a b"]) && !of(Version::HTTP_10, &["a/b", "a"]));
    }

    #[test]
    fn only_this_machine_may_be_named() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:7800", "127.8.9.1", "[::1]:7800"] {
            assert!(check(host, None, "/v1/guests"), "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:1",
            "evil.localhost",
            "evil.example@127.0.0.1:7800",
            "localhost.",
            "127.1",
            "0",
            "192.0.2.1",
            "",
            "[::2]",
        ] {
            assert!(!check(host, None, "/v1/guests"), "{host}");
        }
        assert!(check("127.0.0.1:7800", Some("http://127.0.0.1:7800"), "/"));
        assert!(!check("127.0.0.1:7800", None, "http://evil.example/v1/guests"));
        assert!(over_tcp(&request("GET", "/", &[])).is_err());
        assert!(over_tcp(&request("GET", "/", &[("host", "localhost"), ("host", "localhost")])).is_err());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let with = |scheme: &str, host: &'static str, origin: &'static str| {
            ours(scheme, &request("GET", "/", &[("host", host), ("origin", origin)])).is_ok()
        };
        assert!(
            with("http", "127.0.0.1", "http://127.0.0.1") && with("http", "127.0.0.1:80", "http://127.0.0.1")
        );
        assert!(with("https", "api.example", "https://API.example") && with("https", "a:443", "https://a"));
        for (scheme, host, origin) in [
            ("http", "127.0.0.1:7800", "http://127.0.0.1:3000"),
            ("http", "127.0.0.1:7800", "http://localhost:7800"),
            ("http", "127.0.0.1:7800", "https://127.0.0.1:7800"),
            ("http", "127.0.0.1:7800", "http://evil.example"),
            ("http", "127.0.0.1:7800", "null"),
            ("http", "127.0.0.1:7800", ""),
            ("https", "api.example", "https://evil.example"),
            ("https", "api.example", "http://api.example"),
            ("https", "api.example", "https://api.example:8443"),
            ("https", "", "https://"),
        ] {
            assert!(!with(scheme, host, origin), "{scheme} {host} {origin}");
        }
        let twice = [("host", "a"), ("origin", "https://a"), ("origin", "https://b")];
        assert!(ours("https", &request("GET", "/", &twice)).is_err());
    }

    #[test]
    fn what_another_site_fetches_is_refused_and_a_link_may_be_followed() {
        let with = |method: &str, site: &'static str, mode: &'static str, dest: &'static str| {
            let headers =
                [("host", "a"), ("sec-fetch-site", site), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)];
            ours("https", &request(method, "/", &headers)).is_ok()
        };
        for site in ["cross-site", "same-site", "anything"] {
            assert!(with("GET", site, "navigate", "document"));
            assert!(!with("POST", site, "navigate", "document"), "a form");
            assert!(!with("GET", site, "navigate", "iframe") && !with("GET", site, "no-cors", "image"));
            assert!(!with("GET", site, "cors", "empty") && !with("POST", site, "no-cors", "empty"));
        }
        assert!(with("POST", "same-origin", "cors", "empty") && with("GET", "none", "navigate", "document"));
    }

    #[test]
    fn a_session_is_checked_more_narrowly() {
        let code = |method: &str, headers: &[(&'static str, &'static str)]| {
            let request = request(method, "/", headers);
            check_session(request.method(), request.headers()).map_err(|p| p.code())
        };
        let (refused, unmarked) = (ProblemCode::OriginRefused, ProblemCode::SessionHeaderRequired);
        assert_eq!((code("GET", &[]), code("HEAD", &[])), (Ok(()), Ok(())));
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"] {
            assert_eq!(code(method, &[]), Err(unmarked), "{method}");
            assert_eq!(code(method, &[("x-mirrorvm", "1")]), Ok(()), "{method}");
        }
        for wrong in
            [&[("x-mirrorvm", "0")][..], &[("x-mirrorvm", "")], &[("x-mirrorvm", "1"), ("x-mirrorvm", "1")]]
        {
            assert_eq!(code("POST", wrong), Err(unmarked), "{wrong:?}");
        }
        assert_eq!(code("GET", &[("sec-fetch-site", "same-site")]), Err(refused));
        assert_eq!(code("POST", &[("sec-fetch-site", "cross-site"), ("x-mirrorvm", "1")]), Err(refused));
        assert_eq!(code("GET", &[("upgrade", "websocket")]), Err(refused));
        assert_eq!(code("GET", &[("upgrade", "websocket"), ("origin", "http://a")]), Ok(()));
    }
}
