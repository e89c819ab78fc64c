//! Where a peer can be reached: an address or a DNS name, and a port.
//!
//! Owns: how they are written, and which of them can be a peer at all. Must not know: resolving, connecting.
//!
//! A name says where a host is, never who: that is its pinned key. So a name needs no certificate, a wrong
//! answer of DNS lets nobody in, and a host that was renumbered is found without telling anybody.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest name, as DNS has it (RFC 1035, section 2.3.4).
const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// An address with its port, or a name with it. Text and serde form: `192.0.2.7:7801`, `[2001:db8::7]:7801`,
/// `[fe80::7%2]:7801`, `host.example:7801`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// An IP address with a port.
    Address(SocketAddr),
    /// A DNS name, in lower case; resolved whenever a connection is made.
    Name {
        /// The DNS name.
        name: String,
        /// Number of the port.
        port: u16,
    },
}

/// Why a text is no endpoint. Says nothing of the text, which may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseEndpointError {
    /// It has neither of the two forms.
    #[error(
        "not an IP address or DNS name with a port, as 192.0.2.7:7801, [2001:db8::7]:7801 or host.example:7801"
    )]
    Form,
    /// The port is not a number from 1 to 65535.
    #[error("the port is not a number from 1 to 65535, written without leading zeros")]
    Port,
    /// A name that is none of a host.
    #[error(
        "not a host's name: up to 253 characters in labels of 1 to 63 of [a-z0-9-], none with a hyphen at an end, the last \
         not a number; names in other scripts are written in their ASCII form (xn--...)"
    )]
    Name,
}

/// Why nobody can be connected to at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unconnectable {
    /// 0.0.0.0/8 or ::, which mean "all addresses" to a listener and none to others.
    #[error(
        "means \"all addresses\" of a listener and is none that can be connected to; give one that the host has"
    )]
    Unspecified,
    /// It is the address of a group, not of a host.
    #[error("is a multicast group and not a host; give an address that the host has")]
    Multicast,
    /// 255.255.255.255, or that of a network which this machine is in.
    #[error("is a broadcast address and not a host; give an address that the host has")]
    Broadcast,
    /// 127.0.0.0, the loopback network itself.
    #[error("is a network's own address and not a host; give an address that the host has")]
    Network,
    /// It is in 240.0.0.0/4, which is reserved.
    #[error("is in 240.0.0.0/4, which is reserved: no host has it; give an address that the host has")]
    Reserved,
    /// fe80::/10 without the interface that it is meant on.
    #[error("is link-local: say on which interface, by its number, as [fe80::7%2]:7801")]
    NoScope,
    /// A scope that is no interface of this machine.
    #[error(
        "names an interface (after the %) that this machine does not have; give the number of one that it has, as \
         `ip link` shows them"
    )]
    NoInterface,
    /// It has port 0, at which nobody can be reached.
    #[error("has port 0, which cannot be connected to; give the port that the host listens on")]
    Port,
}

/// Whether somebody can be at `at`, and how not.
///
/// # Errors
/// Why nobody can.
pub fn check_connectable(at: &SocketAddr) -> Result<(), Unconnectable> {
    check_ip(at)?;
    if at.port() == 0 { Err(Unconnectable::Port) } else { Ok(()) }
}

/// As [`check_connectable`], whatever the port.
pub(super) fn check_ip(at: &SocketAddr) -> Result<(), Unconnectable> {
    // An IPv4 address in IPv6's clothes is what it is: the kernel undresses it, too.
    match at.ip().to_canonical() {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Err(Unconnectable::Unspecified),
        IpAddr::V4(v4) if v4.is_multicast() => Err(Unconnectable::Multicast),
        IpAddr::V4(v4) if v4 == Ipv4Addr::BROADCAST || v4 == Ipv4Addr::new(127, 255, 255, 255) => {
            Err(Unconnectable::Broadcast)
        }
        IpAddr::V4(v4) if v4 == Ipv4Addr::new(127, 0, 0, 0) => Err(Unconnectable::Network),
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Err(Unconnectable::Reserved),
        IpAddr::V4(_) => Ok(()),
        IpAddr::V6(v6) if v6.is_unspecified() => Err(Unconnectable::Unspecified),
        IpAddr::V6(v6) if v6.is_multicast() => Err(Unconnectable::Multicast),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => match at {
            SocketAddr::V6(at) if at.scope_id() != 0 => Ok(()),
            _ => Err(Unconnectable::NoScope),
        },
        // ::0.0.0.0/96 beside ::1, long given up: what is in there is no host.
        IpAddr::V6(v6) if v6.segments()[..6] == [0; 6] && !v6.is_loopback() => {
            Err(Unconnectable::Unspecified)
        }
        IpAddr::V6(_) => Ok(()),
    }
}

impl Endpoint {
    /// Number of the port.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Address(at) => at.port(),
            Self::Name { port, .. } => *port,
        }
    }

    /// Its address, if it is not a name.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Address(at) => Some(*at),
            Self::Name { .. } => None,
        }
    }

    /// Whether somebody can be there. Of a name only its resolution tells.
    ///
    /// # Errors
    /// Why nobody can.
    pub fn check_connectable(&self) -> Result<(), Unconnectable> {
        match self {
            Self::Address(at) => check_connectable(at),
            Self::Name { port: 0, .. } => Err(Unconnectable::Port),
            Self::Name { .. } => Ok(()),
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(at: SocketAddr) -> Self {
        Self::Address(at)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(at) => at.fmt(f),
            Self::Name { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match parsed(text)? {
            // Of an address it is told as of one that cannot be connected to.
            Self::Name { port: 0, .. } => Err(ParseEndpointError::Port),
            endpoint => Ok(endpoint),
        }
    }
}

/// As [`Endpoint`]'s text form, with port 0 for names, too: a listener's means any.
pub(super) fn parsed(text: &str) -> Result<Endpoint, ParseEndpointError> {
    let (host, port) = text.rsplit_once(':').ok_or(ParseEndpointError::Form)?;
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).is_some();
    if host.is_empty() || (!bracketed && host.contains([':', '[', ']', '/', '@'])) {
        return Err(ParseEndpointError::Form);
    }
    // What the port is does not hang on what the host is: the wrong one of them is told.
    let port = port_of(port).ok_or(ParseEndpointError::Port)?;
    if bracketed {
        return text
            .parse()
            .map(|at| Endpoint::Address(SocketAddr::V6(at)))
            .map_err(|_| ParseEndpointError::Form);
    }
    if let Ok(v4) = host.parse::<Ipv4Addr>() {
        return Ok(Endpoint::Address((v4, port).into()));
    }
    let name = host_name(host).ok_or(ParseEndpointError::Name)?;
    Ok(Endpoint::Name { name, port })
}

/// A port, 0 included, written as it is kept.
fn port_of(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let zeros = text.len() > 1 && text.starts_with('0');
    text.parse().ok().filter(|_| digits && !zeros)
}

/// A name in the spelling that is kept, if it can be one of a host (RFC 1123, section 2.1). What looks like
/// an address to some resolvers (`127.1`, `0x7f000001`) is none.
fn host_name(text: &str) -> Option<String> {
    let name = text.to_ascii_lowercase();
    let label = |label: &str| {
        (1..=LABEL_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next()?;
    let number = last.bytes().all(|b| b.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    (name.len() <= NAME_MAX && name.split('.').all(label) && !number).then_some(name)
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a host tells others to find it: an endpoint whose port may be left to the listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertised {
    host: Endpoint,
    port_given: bool,
}

/// Why a text is nothing to advertise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdvertiseError {
    /// It is no address or name.
    #[error(transparent)]
    Form(#[from] ParseEndpointError),
    /// Nobody could connect to it.
    #[error("this {0}")]
    Unconnectable(#[from] Unconnectable),
}

impl Advertised {
    /// The endpoint, for a listener at `port`.
    pub fn for_port(&self, port: u16) -> Endpoint {
        let port = if self.port_given { self.host.port() } else { port };
        match &self.host {
            Endpoint::Address(at) => Endpoint::Address({
                let mut at = *at;
                at.set_port(port);
                at
            }),
            Endpoint::Name { name, .. } => Endpoint::Name { name: name.clone(), port },
        }
    }
}

impl FromStr for Advertised {
    type Err = AdvertiseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Without a port: any will do to look at the rest.
        let bracketed = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        let ip = match bracketed {
            Some(inside) => inside.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            None => text.parse().ok(),
        };
        let bare = match ip {
            Some(ip) => Some(SocketAddr::new(ip, 1).into()),
            None => host_name(text).map(|name| Endpoint::Name { name, port: 1 }),
        };
        let advertised = match bare {
            Some(host) => Self { host, port_given: false },
            None => Self { host: text.parse()?, port_given: true },
        };
        advertised.host.check_connectable()?;
        Ok(advertised)
    }
}

impl fmt::Display for Advertised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            host if self.port_given => host.fmt(f),
            Endpoint::Address(at) => at.ip().fmt(f),
            Endpoint::Name { name, .. } => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Result<Endpoint, ParseEndpointError> {
        text.parse()
    }

    #[test]
    fn addresses_and_names_are_read_and_written_in_one_spelling() {
        for (text, shown) in [
            ("192.0.2.7:7801", "192.0.2.7:7801"),
            ("[2001:DB8::7]:7801", "[2001:db8::7]:7801"),
            ("[fe80::7%2]:7801", "[fe80::7%2]:7801"),
            ("Host-1.Example:1", "host-1.example:1"),
            ("localhost:65535", "localhost:65535"),
            ("xn--bcher-kva.example:80", "xn--bcher-kva.example:80"),
            ("3com.example:80", "3com.example:80"),
        ] {
            assert_eq!(parsed(text).unwrap().to_string(), shown);
        }
        let long = format!("{}.{}.{}.{}", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61));
        assert!(parsed(&format!("{long}:1")).is_ok());
        assert_eq!(parsed(&format!("{long}d:1")), Err(ParseEndpointError::Name));
    }

    #[test]
    fn what_is_no_address_and_no_name_is_refused_by_what_is_wrong() {
        use ParseEndpointError::{Form, Name, Port};
        for (text, why) in [
            ("", Form),
            ("host.example", Form),
            (":7801", Form),
            ("2001:db8::7:7801", Form),
            ("[host]:1", Form),
            ("http://host:80", Form),
            ("user@host:80", Form),
            ("host:", Port),
            ("host:0", Port),
            ("host:65536", Port),
            ("host:+80", Port),
            ("host:080", Port),
            ("host: 80", Port),
            ("1.2.3.4:65536", Port),
            ("1.2.3.4:01", Port),
            ("1.2.3.4:00", Port),
            ("1.2.3.4: 1", Port),
            ("1.2.3.4:+1", Port),
            ("1.2.3.4:", Port),
            ("[::1]:65536", Port),
            ("[::1]:01", Port),
            ("[::1]:", Port),
            ("1.2.3.4", Form),
            ("[::1]", Form),
            ("[[::1]]:1", Form),
            ("[::1]]:1", Form),
            ("[::1:1", Form),
            ("[1.2.3.4]:1", Form),
            ("[]:1", Form),
            ("ho st:80", Name),
            ("-a:80", Name),
            ("a-.b:80", Name),
            ("a..b:80", Name),
            ("a.:80", Name),
            ("a_b:80", Name),
            ("b\u{fc}cher.example:80", Name),
            ("127.1:80", Name),
            ("2130706433:80", Name),
            ("0x7f000001:80", Name),
            ("1.2.3.4.5:80", Name),
            ("256.0.0.1:80", Name),
        ] {
            assert_eq!(parsed(text), Err(why), "{text:?}");
        }
        assert_eq!(parsed(&format!("{}.example:80", "a".repeat(64))), Err(Name));
    }

    #[test]
    fn addresses_that_no_host_has_are_told_by_kind() {
        use Unconnectable::{Broadcast, Multicast, Network, NoScope, Port, Reserved, Unspecified};
        for (text, why) in [
            ("0.0.0.0:1", Unspecified),
            ("0.1.2.3:1", Unspecified),
            ("[::]:1", Unspecified),
            ("[::ffff:0.0.0.0]:1", Unspecified),
            ("[::7]:1", Unspecified),
            ("224.0.0.1:1", Multicast),
            ("239.255.255.255:1", Multicast),
            ("[ff02::1]:1", Multicast),
            ("[::ffff:224.0.0.1]:1", Multicast),
            ("255.255.255.255:1", Broadcast),
            ("[::ffff:255.255.255.255]:1", Broadcast),
            ("127.255.255.255:1", Broadcast),
            ("127.0.0.0:1", Network),
            ("240.0.0.1:1", Reserved),
            ("255.255.255.254:1", Reserved),
            ("[::ffff:240.0.0.1]:1", Reserved),
            ("[fe80::1]:1", NoScope),
            ("192.0.2.7:0", Port),
            ("[2001:db8::7]:0", Port),
        ] {
            assert_eq!(parsed(text).unwrap().check_connectable(), Err(why), "{text}");
        }
        for text in ["127.0.0.1:1", "[::1]:1", "10.0.0.255:1", "[fe80::1%1]:1", "[::ffff:192.0.2.7]:1", "a:1"]
        {
            assert_eq!(parsed(text).unwrap().check_connectable(), Ok(()), "{text}");
        }
    }

    #[test]
    fn what_is_advertised_takes_the_listeners_port_where_it_has_none() {
        let at =
            |text: &str| text.parse::<Advertised>().map(|a| (a.for_port(7801).to_string(), a.to_string()));
        for (text, endpoint) in [
            ("192.0.2.7", "192.0.2.7:7801"),
            ("192.0.2.7:9", "192.0.2.7:9"),
            ("2001:db8::7", "[2001:db8::7]:7801"),
            ("[2001:db8::7]", "[2001:db8::7]:7801"),
            ("[2001:db8::7]:9", "[2001:db8::7]:9"),
            ("host.example", "host.example:7801"),
            ("host.example:9", "host.example:9"),
        ] {
            let (found, shown) = at(text).unwrap();
            assert_eq!(found, endpoint);
            assert_eq!(at(&shown).unwrap().0, endpoint, "{shown}");
        }
        for text in [
            "0.0.0.0",
            "0.0.0.0:9",
            "::",
            "255.255.255.255",
            "ff02::1",
            "fe80::1",
            "192.0.2.7:0",
            "192.0.2.7:",
            "192.0.2.7:09",
            "[[::1",
            "::1]]",
            "[::1",
            "::1]",
            "[[::1]]",
            "[192.0.2.7]",
            "240.0.0.1",
            "a_b",
            "",
            ":9",
        ] {
            assert!(at(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_endpoint_that_is_read_as_it_is_written_or_refused(text in "\\PC{0,40}|[a-z0-9.:%\\[\\]-]{0,40}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                let json = serde_json::to_string(&endpoint).unwrap();
                prop_assert_eq!(serde_json::from_str::<Endpoint>(&json).unwrap(), endpoint);
            }
            let _ = text.parse::<Advertised>();
        }
    }
}
