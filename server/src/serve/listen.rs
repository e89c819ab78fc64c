//! Where the daemon listens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use listenfd::ListenFd;
use mirrorvm::transport::{ListenAt, ListenAtError, ParseEndpointError, check_listenable};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

use super::ServeError;
use super::tls::{self, TlsError, TlsFiles};
use super::unix::{self, SocketGuard};

/// A place to listen at, as it is written: a host name stands for its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// Plain TCP, on loopback addresses.
    Tcp(ListenAt),
    /// TLS 1.3, on any address.
    Tls(ListenAt),
    /// Sockets of the service manager.
    Systemd,
}

impl Place {
    /// Whether only this machine can reach it, and the daemon opens it itself.
    pub const fn is_local(&self) -> bool {
        matches!(self, Self::Unix(_) | Self::Tcp(_))
    }

    /// What there is to listen at: one for each address of this host that a name leads to.
    ///
    /// # Errors
    /// [`ListenError::Name`], [`ListenError::NameNotLoopback`].
    pub fn resolve(self) -> Result<Vec<Listen>, ListenError> {
        let (at, plain) = match &self {
            Self::Unix(path) => return Ok(vec![Listen::Unix(path.clone())]),
            Self::Systemd => return Ok(vec![Listen::Systemd]),
            Self::Tcp(at) => (at, true),
            Self::Tls(at) => (at, false),
        };
        let found = at.resolve()?;
        if plain {
            check_loopback(at, &found)?;
        }
        let own = at.own(found)?;
        if at.address().is_none() {
            tracing::info!(place = %self, addresses = listed(&own), "a name was resolved");
        }
        let listen = if plain { Listen::Tcp } else { Listen::Tls };
        Ok(own.into_iter().map(listen).collect())
    }
}

/// Where peers are awaited: of the addresses that a name leads to, the first that this host has.
///
/// # Errors
/// [`ListenError::Name`].
pub fn resolve_peer(at: &ListenAt) -> Result<SocketAddr, ListenError> {
    let own = at.own(at.resolve()?)?;
    if at.address().is_none() {
        tracing::info!(name = %at, addresses = listed(&own), "peers are awaited at the first of them");
    }
    Ok(own[0])
}

/// Whether the API may be served in the clear at all of these. One that others reach is enough to refuse a
/// name: whoever gave it meant this machine alone.
fn check_loopback(at: &ListenAt, found: &[SocketAddr]) -> Result<(), ListenError> {
    let Some(open) = found.iter().find(|at| !at.ip().is_loopback()) else { return Ok(()) };
    Err(match at.address() {
        Some(address) => ListenError::NotLoopback(address),
        None => ListenError::NameNotLoopback { name: at.to_string(), found: listed(found), open: open.ip() },
    })
}

fn listed(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(|at| at.ip().to_string()).collect::<Vec<_>>().join(", ")
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(at) => write!(f, "tcp:{at}"),
            Self::Tls(at) => write!(f, "tls:{at}"),
            Self::Systemd => f.write_str("systemd"),
        }
    }
}

/// Why a place cannot be listened at.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text has none of the forms.
    #[error("this is none of unix:PATH, tcp:HOST:PORT, tls:HOST:PORT and systemd")]
    Form,
    /// What stands for the host and the port is neither address nor name.
    #[error(transparent)]
    Host(ParseEndpointError),
    /// Plain TCP would expose the API to the network.
    #[error(
        "{0} is not a loopback address, and the API is not served in the clear beyond this machine; use \
         tls:{0}, or tcp:127.0.0.1:PORT"
    )]
    NotLoopback(SocketAddr),
    /// A name would.
    #[error(
        "{name} leads to {found}; {open} is not a loopback address, and the API is not served in the clear beyond this \
         machine; use tls:{name}, or tcp:localhost:PORT"
    )]
    NameNotLoopback {
        /// The name with its port, as it was given.
        name: String,
        /// All addresses that it was resolved to.
        found: String,
        /// The first of them that others may reach.
        open: IpAddr,
    },
    /// A name leads nowhere, or elsewhere.
    #[error(transparent)]
    Name(#[from] ListenAtError),
}

impl FromStr for Place {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let at = |text: &str| text.parse::<ListenAt>().map_err(ListenError::Host);
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", text)) => {
                let at = at(text)?;
                // Of a name that is looked at when it is resolved.
                if let Some(address) = at.address() {
                    check_loopback(&at, &[address])?;
                }
                Ok(Self::Tcp(at))
            }
            Some(("tls", text)) => at(text).map(Self::Tls),
            None if text == "systemd" => Ok(Self::Systemd),
            _ => Err(ListenError::Form),
        }
    }
}

/// A place to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// Plain TCP, on a loopback address. Callers need a token.
    Tcp(SocketAddr),
    /// TLS 1.3, on any address.
    Tls(SocketAddr),
    /// Sockets that the service manager opened and passed on (`LISTEN_FDS`): Unix sockets, or TCP on loopback
    /// addresses.
    Systemd,
}

/// An open listening socket.
pub(super) enum Listener {
    Unix(UnixListener, SocketGuard),
    Passed(UnixListener, String),
    Tcp(TcpListener, SocketAddr),
    Tls(TcpListener, SocketAddr, TlsAcceptor, Option<String>),
}

impl Listener {
    /// Whether it is the Unix socket at `path`, however that was written.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        match self {
            Self::Unix(_, guard) => is_same_place(guard.path(), path),
            Self::Passed(_, passed) => is_same_place(Path::new(passed), path),
            Self::Tcp(..) | Self::Tls(..) => false,
        }
    }

    /// Whether callers must bring credentials, because the kernel does not say who they are.
    pub(super) fn is_network(&self) -> bool {
        match self {
            Self::Tcp(..) | Self::Tls(..) => true,
            Self::Unix(..) | Self::Passed(..) => false,
        }
    }

    /// The address, as the `ready` line shows it.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Unix(_, guard) => format!("unix:{}", guard.path().display()),
            Self::Passed(_, path) => format!("unix:{path}"),
            Self::Tcp(_, address) => format!("tcp:{address}"),
            Self::Tls(_, address, ..) => format!("tls:{address}"),
        }
    }

    /// The origin at which a browser finds it. Addresses are written as such, because `localhost` may lead to
    /// another program on the other family's port of the same number.
    pub(super) fn origin(&self) -> Option<String> {
        match self {
            Self::Unix(..) | Self::Passed(..) => None,
            Self::Tcp(_, address) => Some(format!("http://{address}")),
            Self::Tls(_, address, _, Some(name)) => Some(format!("https://{name}:{}", address.port())),
            Self::Tls(_, address, ..) => {
                let mut address = *address;
                if address.ip().is_unspecified() {
                    address.set_ip(match address {
                        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                    });
                }
                Some(format!("https://{address}"))
            }
        }
    }
}

/// Whether two paths name the same socket: the same name in the same directory. The sockets themselves need
/// not exist.
fn is_same_place(one: &Path, other: &Path) -> bool {
    let directory = |path: &Path| {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::canonicalize(parent).ok()
    };
    one == other
        || (one.file_name() == other.file_name()
            && directory(one).is_some_and(|d| directory(other) == Some(d)))
}

pub(super) async fn open(place: Listen, tls: Option<&TlsFiles>) -> Result<Vec<Listener>, ServeError> {
    match place {
        Listen::Unix(path) => match unix::bind(&path) {
            Ok((listener, guard)) => Ok(vec![Listener::Unix(listener, guard)]),
            Err(source) => Err(ServeError::Unix { path, source }),
        },
        Listen::Tcp(address) => {
            check_listenable(&address).map_err(|why| ServeError::Address { address, why })?;
            let tcp = |source| ServeError::Tcp { address, source };
            let listener = TcpListener::bind(address).await.map_err(tcp)?;
            let bound = listener.local_addr().map_err(tcp)?;
            Ok(vec![Listener::Tcp(listener, bound)])
        }
        Listen::Tls(address) => {
            check_listenable(&address).map_err(|why| ServeError::Address { address, why })?;
            let failed = |source| ServeError::Tls { address, source };
            let files = tls.ok_or(TlsError::NoKeys).map_err(failed)?;
            let acceptor = tls::acceptor(files).map_err(failed)?;
            let name = tls::own_name(files).map_err(failed)?;
            let tcp = |source| ServeError::Tcp { address, source };
            let listener = TcpListener::bind(address).await.map_err(tcp)?;
            let bound = listener.local_addr().map_err(tcp)?;
            Ok(vec![Listener::Tls(listener, bound, acceptor, name)])
        }
        Listen::Systemd => passed().map_err(ServeError::Passed),
    }
}

/// Sockets that the service manager passed on (sd_listen_fds(3)).
fn passed() -> std::io::Result<Vec<Listener>> {
    let mut descriptors = ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..descriptors.len() {
        if let Ok(Some(listener)) = descriptors.take_unix_listener(index) {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            let path = address.as_pathname().map_or_else(String::new, |p| p.display().to_string());
            listeners.push(Listener::Passed(UnixListener::from_std(listener)?, path));
            continue;
        }
        let Some(listener) = descriptors.take_tcp_listener(index)? else { continue };
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() {
            return Err(std::io::Error::other(format!("{}", ListenError::NotLoopback(address))));
        }
        listener.set_nonblocking(true)?;
        listeners.push(Listener::Tcp(TcpListener::from_std(listener)?, address));
    }
    if listeners.is_empty() {
        return Err(std::io::Error::other("the service manager passed no sockets"));
    }
    Ok(listeners)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_the_same_however_its_path_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(is_same_place(&real.join("s"), &link.join("s")));
        assert!(is_same_place(&real.join("../real/s"), &real.join("s")));
        assert!(!is_same_place(&real.join("s"), &real.join("t")));
        assert!(!is_same_place(&real.join("s"), &dir.path().join("s")));
        assert!(!is_same_place(&dir.path().join("none/s"), &dir.path().join("nothing/s")));
        assert!(!is_same_place(Path::new(""), &real.join("s")));
    }

    #[test]
    fn places_are_unix_sockets_or_loopback() {
        for text in [
            "unix:/a",
            "tcp:127.0.0.1:1",
            "tcp:[::1]:0",
            "tcp:localhost:80",
            "tls:[::]:1",
            "tls:h.example:7800",
            "systemd",
        ] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        }
        assert!(matches!("tcp:0.0.0.0:80".parse::<Place>(), Err(ListenError::NotLoopback(_))));
        for bad in ["", "unix:", "/run/x.sock", "http:127.0.0.1:1"] {
            assert!(matches!(bad.parse::<Place>(), Err(ListenError::Form)), "{bad}");
        }
        for bad in ["tcp:127.0.0.1", "tcp:a_b:80", "tls:h.example:70000"] {
            assert!(matches!(bad.parse::<Place>(), Err(ListenError::Host(_))), "{bad}");
        }
        let unix = "unix:/run/x".parse::<Place>().unwrap().resolve().unwrap();
        assert_eq!(unix, [Listen::Unix("/run/x".into())]);
    }

    #[test]
    fn in_the_clear_every_address_of_a_name_has_to_be_of_loopback() {
        let name: ListenAt = "h.example:80".parse().unwrap();
        let (here, there) = ("127.0.0.1:80".parse().unwrap(), "192.0.2.7:80".parse().unwrap());
        assert!(check_loopback(&name, &[here, "[::1]:80".parse().unwrap()]).is_ok());
        for found in [[here, there], [there, here]] {
            let said = check_loopback(&name, &found).unwrap_err().to_string();
            for part in ["h.example:80 leads to", "127.0.0.1", "192.0.2.7 is not a loopback address"] {
                assert!(said.contains(part), "{said}");
            }
        }
    }
}
