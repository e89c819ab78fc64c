//! Where a daemon is.
//!
//! Owns: the written forms, and which of them are refused. Must not know: how connections are made.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use rustls::pki_types::ServerName;

/// Where a daemon is. Written as the daemon writes where it listens: `unix:PATH`, `tcp:ADDR:PORT` or
/// `tls:HOST:PORT`; an absolute path, `http://ADDR:PORT` and `https://HOST:PORT` are read, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket: the kernel tells the daemon which user calls.
    Unix(PathBuf),
    /// TCP in the clear, on a loopback address.
    Tcp(SocketAddr),
    /// TLS 1.3.
    Tls {
        /// Name or address of the host; its certificate must have it, unless the certificate is pinned.
        host: String,
        /// Port.
        port: u16,
    },
}

/// Why a text or a value is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It has none of the forms.
    #[error(
        "{0:?} is none of unix:PATH, tcp:ADDR:PORT, tls:HOST:PORT, http://ADDR:PORT and https://HOST:PORT"
    )]
    Form(String),
    /// A token in the clear would lie open to the network.
    #[error(
        "{0} is not a loopback address, and nothing is sent in the clear beyond this machine; use tls:{0}"
    )]
    NotLoopback(SocketAddr),
    /// The host is neither a name nor an address.
    #[error("{0:?} is no name and no address of a host")]
    Host(String),
}

impl Endpoint {
    /// What requests have in their `Host` header.
    pub(crate) fn host_header(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Tcp(address) => address.to_string(),
            Self::Tls { host, port } => authority(host, *port),
        }
    }

    /// Refuses what nothing may be sent to.
    ///
    /// # Errors
    /// TCP beyond this machine; a TLS host that is none.
    pub(crate) fn check(&self) -> Result<(), EndpointError> {
        match self {
            Self::Unix(_) => Ok(()),
            Self::Tcp(address) if address.ip().is_loopback() => Ok(()),
            Self::Tcp(address) => Err(EndpointError::NotLoopback(*address)),
            Self::Tls { host, .. } => match ServerName::try_from(host.as_str()) {
                Ok(_) => Ok(()),
                Err(_) => Err(EndpointError::Host(host.clone())),
            },
        }
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Tls { host, port } => write!(f, "tls:{}", authority(host, *port)),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let form = || EndpointError::Form(text.to_owned());
        let bare = |rest: &str| rest.strip_suffix('/').unwrap_or(rest).to_owned();
        let endpoint = if text.starts_with('/') {
            Self::Unix(text.into())
        } else if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            Self::Unix(path.into())
        } else if let Some(rest) = text.strip_prefix("http://") {
            Self::Tcp(bare(rest).parse().map_err(|_| form())?)
        } else if let Some(rest) = text.strip_prefix("tcp:") {
            Self::Tcp(rest.parse().map_err(|_| form())?)
        } else if let Some(rest) = text.strip_prefix("https://") {
            tls(&bare(rest)).ok_or_else(form)?
        } else if let Some(rest) = text.strip_prefix("tls:") {
            tls(rest).ok_or_else(form)?
        } else {
            return Err(form());
        };
        endpoint.check()?;
        Ok(endpoint)
    }
}

fn tls(authority: &str) -> Option<Endpoint> {
    let (host, port) = authority.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        // An IPv6 address without brackets: where it ends is a guess.
        None if host.contains(':') => return None,
        None => host,
    };
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    Some(Endpoint::Tls { host: host.to_owned(), port: port.parse().ok().filter(|_| digits)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, EndpointError> {
        text.parse::<Endpoint>().map(|e| e.to_string())
    }

    #[test]
    fn every_form_is_read_and_written_as_the_daemon_writes_it() {
        for (text, written, host) in [
            ("unix:/run/m.sock", "unix:/run/m.sock", "localhost"),
            ("/run/m.sock", "unix:/run/m.sock", "localhost"),
            ("unix:m.sock", "unix:m.sock", "localhost"),
            ("tcp:127.0.0.1:80", "tcp:127.0.0.1:80", "127.0.0.1:80"),
            ("http://127.8.9.1:80/", "tcp:127.8.9.1:80", "127.8.9.1:80"),
            ("tcp:[::1]:7", "tcp:[::1]:7", "[::1]:7"),
            ("tls:host-1.example:443", "tls:host-1.example:443", "host-1.example:443"),
            ("https://10.0.0.1:9/", "tls:10.0.0.1:9", "10.0.0.1:9"),
            ("https://[2001:db8::1]:9", "tls:[2001:db8::1]:9", "[2001:db8::1]:9"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.to_string().as_str(), endpoint.host_header().as_str()), (written, host));
            assert_eq!(written.parse(), Ok(endpoint));
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_and_named() {
        let none = [
            "",
            "unix:",
            "tcp:",
            "tcp:localhost:80",
            "tcp:127.0.0.1",
            "tls:host",
            "tls:host:",
            "tls:host:99999",
            "tls:host:+1",
            "tls:::1:443",
            "tls:[::1:443",
            "ftp://127.0.0.1:80",
            "http://127.0.0.1:80/v1",
            "https://host:1/v1",
        ];
        for text in none {
            assert_eq!(parse(text), Err(EndpointError::Form(text.into())));
        }
        for text in ["https://user@host:1", "tls::1", "tls:a b:1"] {
            assert!(matches!(parse(text), Err(EndpointError::Host(_))), "{text}: {:?}", parse(text));
        }
        let open = parse("tcp:192.0.2.7:80").unwrap_err().to_string();
        assert!(open.contains("use tls:192.0.2.7:80"), "{open}");
    }
}
