//! Against web pages: over loopback TCP any page in a browser on this machine can send requests here.
//!
//! DNS rebinding shows in the Host header, a cross-site request in Origin. A Unix socket is out of reach for a
//! browser and is not checked. What HTTP/1.1 itself wants of a Host header (RFC 9112, section 3.2) holds everywhere.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::problem::{Problem, ProblemCode, ProblemError};

/// How a request came in; set on every request by the accept loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A Unix socket.
    Unix,
    /// TCP on a loopback address.
    LoopbackTcp,
    /// TLS: the client has checked whom it talks to.
    Tls,
}

/// Refuses requests over TCP that another site may have sent.
pub async fn layer(request: Request, next: Next) -> Response {
    if !well_formed(request.version(), request.headers()) {
        let detail = "an HTTP/1.1 request has one Host header, with a host's name or address";
        let error = ProblemError::at_header(&header::HOST, "invalid_format", detail);
        return Problem::new(ProblemCode::MalformedRequest, detail).with_errors(vec![error]).into_response();
    }
    let over_tcp = request.extensions().get::<Transport>() == Some(&Transport::LoopbackTcp);
    if over_tcp && !allowed(request.uri(), request.headers()) {
        let detail = "Host, or Origin where there is one, does not name this machine's loopback address";
        return Problem::new(ProblemCode::OriginRefused, detail).into_response();
    }
    next.run(request).await
}

/// One Host header in HTTP/1.1 and at most one before; a host, or empty where there is none to name.
fn well_formed(version: Version, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => version < Version::HTTP_11,
        (Some(host), None) => host.is_empty() || host.to_str().is_ok_and(|h| h.parse::<Authority>().is_ok()),
        (Some(_), Some(_)) => false,
    }
}

fn allowed(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next().and_then(|h| h.to_str().ok()), hosts.next()) else {
        return false;
    };
    let host_is_ours = host.parse::<Authority>().is_ok_and(|a| is_loopback(&a));
    let target_is_ours = uri.authority().is_none_or(is_loopback);
    let origin_is_ours = headers.get_all(header::ORIGIN).iter().all(|origin| {
        // Same origin means the very same host and port, not just any program on this machine.
        origin
            .to_str()
            .ok()
            .and_then(|o| o.strip_prefix("http://"))
            .is_some_and(|o| o.eq_ignore_ascii_case(host))
    });
    host_is_ours && target_is_ours && origin_is_ours
}

fn is_loopback(authority: &Authority) -> bool {
    let host = authority.host();
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn check(host: &'static str, origin: Option<&'static str>, target: &'static str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static(host));
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
        }
        allowed(&Uri::from_static(target), &headers)
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
        for host in
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:1", "192.0.2.1", "", "[::2]"]
        {
            assert!(!check(host, None, "/v1/guests"), "{host}");
        }
        assert!(check("127.0.0.1:7800", Some("http://127.0.0.1:7800"), "/"));
        assert!(!check("127.0.0.1:7800", Some("http://127.0.0.1:3000"), "/"));
        assert!(!check("127.0.0.1:7800", Some("http://evil.example"), "/"));
        assert!(!check("127.0.0.1:7800", Some("null"), "/"));
        assert!(!check("127.0.0.1:7800", None, "http://evil.example/v1/guests"));
        assert!(!allowed(&Uri::from_static("/"), &HeaderMap::new()));
    }
}
