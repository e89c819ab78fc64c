//! Where this host itself is to listen: an address, or a name that leads to some of its own.
//!
//! Owns: how that is written, and which addresses it comes to. Must not know: who may listen where, binding.
//!
//! A listener's name is resolved once, before anything listens: what it leads to later moves no socket.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::str::FromStr;

use super::endpoint::{Endpoint, ParseEndpointError, parsed};
use super::here::is_own;

/// An address with its port, or a name with it; port 0 picks a free one. Text form: `127.0.0.1:7801`,
/// `[::]:7801`, `localhost:0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAt(Endpoint);

/// Why a name is no place to listen at.
#[derive(Debug, thiserror::Error)]
pub enum ListenAtError {
    /// The resolver knows no address.
    #[error(
        "{at}: the name cannot be resolved; give an address of this host, or put the name into /etc/hosts"
    )]
    Unresolved {
        /// The name with its port, as it was given.
        at: String,
        /// What the resolver said.
        #[source]
        source: std::io::Error,
    },
    /// It has addresses, all of them others'.
    #[error("{at}: the name leads to {}, and this host has none of these addresses", listed(found))]
    Elsewhere {
        /// The name with its port, as it was given.
        at: String,
        /// What it was resolved to.
        found: Vec<SocketAddr>,
    },
}

impl ListenAt {
    /// The address, if it is not a name.
    pub fn address(&self) -> Option<SocketAddr> {
        self.0.address()
    }

    /// All addresses, whoever has them, each once and in the resolver's order. Waits for the resolver for as
    /// long as the system's configuration lets it.
    ///
    /// # Errors
    /// [`ListenAtError::Unresolved`].
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, ListenAtError> {
        let (name, port) = match &self.0 {
            Endpoint::Address(at) => return Ok(vec![*at]),
            Endpoint::Name { name, port } => (name.as_str(), *port),
        };
        let failed = |source| ListenAtError::Unresolved { at: self.to_string(), source };
        let mut found = Vec::new();
        for at in (name, port).to_socket_addrs().map_err(failed)? {
            if !found.contains(&at) {
                found.push(at);
            }
        }
        if found.is_empty() {
            return Err(failed(std::io::Error::other("it has no address")));
        }
        Ok(found)
    }

    /// Of the addresses that a name leads to, those that this host has: where there is no IPv6, `localhost`
    /// may still lead to `::1`. An address that was given as such stays: what is wrong with it, binding says.
    ///
    /// # Errors
    /// [`ListenAtError::Elsewhere`].
    pub fn own(&self, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, ListenAtError> {
        if self.address().is_some() {
            return Ok(found);
        }
        let own: Vec<SocketAddr> = found.iter().copied().filter(|at| is_own(at.ip())).collect();
        if own.is_empty() { Err(ListenAtError::Elsewhere { at: self.to_string(), found }) } else { Ok(own) }
    }
}

impl From<SocketAddr> for ListenAt {
    fn from(at: SocketAddr) -> Self {
        Self(at.into())
    }
}

impl FromStr for ListenAt {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parsed(text).map(Self)
    }
}

impl fmt::Display for ListenAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Addresses without their ports, as a sentence lists them.
fn listed(found: &[SocketAddr]) -> String {
    found.iter().map(|at| at.ip().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> ListenAt {
        text.parse().unwrap()
    }

    #[test]
    fn listeners_are_written_as_addresses_or_names_with_any_port() {
        for text in ["127.0.0.1:0", "[::]:7801", "localhost:0", "host.example:7801"] {
            assert_eq!(at(text).to_string(), text);
        }
        for bad in ["", "localhost", "host:", "a_b:1", "localhost:65536", "::1:7801"] {
            assert!(bad.parse::<ListenAt>().is_err(), "{bad}");
        }
        assert_eq!(at("[::1]:7").resolve().unwrap(), ["[::1]:7".parse().unwrap()]);
    }

    #[test]
    fn a_name_comes_to_those_of_its_addresses_that_this_host_has() {
        let loopback = "127.0.0.1:7".parse().unwrap();
        let documentation = "192.0.2.7:7".parse().unwrap();
        assert_eq!(at("h.example:7").own(vec![documentation, loopback]).unwrap(), [loopback]);
        let error =
            at("h.example:7").own(vec![documentation, "[2001:db8::7]:7".parse().unwrap()]).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("h.example:7") && said.contains("192.0.2.7, 2001:db8::7"), "{said}");
        // Who gives an address means it.
        assert_eq!(at("192.0.2.7:7").own(vec![documentation]).unwrap(), [documentation]);
    }

    #[test]
    fn a_name_that_there_is_not_is_told_by_itself() {
        // RFC 6761: no resolver has an answer for it.
        let said = at("no-such-host.invalid:7801").resolve().unwrap_err().to_string();
        assert!(said.contains("no-such-host.invalid:7801"), "{said}");
    }
}
