//! Where the daemon listens.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::net::{TcpListener, UnixListener};

use super::ServeError;
use super::unix::{self, SocketGuard};

/// A place to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP, on a loopback address.
    Tcp(SocketAddr),
}

/// Why a place is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// It is neither form.
    #[error("this is neither unix:PATH nor tcp:ADDR:PORT")]
    Form,
    /// Plain TCP would lay the API open to the network.
    #[error(
        "{0} is not a loopback address: there is no TLS yet, and the API is not served in the clear beyond \
         this machine; use unix:PATH or tcp:127.0.0.1:PORT"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => {
                let address: SocketAddr = address.parse().map_err(|_| ListenError::Form)?;
                if address.ip().is_loopback() {
                    Ok(Self::Tcp(address))
                } else {
                    Err(ListenError::NotLoopback(address))
                }
            }
            _ => Err(ListenError::Form),
        }
    }
}

/// An open socket.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener, SocketGuard),
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    /// As the `ready` line has it.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Unix(_, guard) => format!("unix:{}", guard.path().display()),
            Self::Tcp(_, address) => format!("tcp:{address}"),
        }
    }
}

pub(super) async fn open(place: Listen) -> Result<Listener, ServeError> {
    match place {
        Listen::Unix(path) => match unix::bind(&path) {
            Ok((listener, guard)) => Ok(Listener::Unix(listener, guard)),
            Err(source) => Err(ServeError::Unix { path, source }),
        },
        Listen::Tcp(address) => {
            let tcp = |source| ServeError::Tcp { address, source };
            let listener = TcpListener::bind(address).await.map_err(tcp)?;
            let bound = listener.local_addr().map_err(tcp)?;
            Ok(Listener::Tcp(listener, bound))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_unix_sockets_or_loopback() {
        assert_eq!("unix:/run/x.sock".parse(), Ok(Listen::Unix("/run/x.sock".into())));
        assert_eq!("tcp:[::1]:0".parse(), Ok(Listen::Tcp("[::1]:0".parse().unwrap())));
        assert!(matches!("tcp:0.0.0.0:80".parse::<Listen>(), Err(ListenError::NotLoopback(_))));
        for bad in ["", "unix:", "tcp:localhost:80", "/run/x.sock", "tcp:127.0.0.1"] {
            assert_eq!(bad.parse::<Listen>(), Err(ListenError::Form), "{bad}");
        }
    }
}
