//! From a connection and a token to a caller.

use std::net::SocketAddr;

use axum::http::{HeaderMap, header};
use uuid::Uuid;

use super::{Role, tokens};
use crate::config::AccessRules;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// What the transport says of the other end; set on every request by the accept loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine, over a Unix socket: what `SO_PEERCRED` says.
    Unix {
        /// Its user.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// A process on this machine over loopback TCP; the user as the kernel's table of sockets has it.
    Loopback {
        /// `None`: the table did not say.
        uid: Option<u32>,
    },
    /// Somebody over TLS; names in the client certificate, if one was shown: `dns:...`, `uri:...`, `email:...`, `ip:...`.
    Tls {
        /// Empty: no certificate.
        names: Vec<String>,
    },
}

/// How a caller was recognized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// User of a process on this machine.
    LocalUser,
    /// Client certificate.
    Certificate,
    /// Bearer token.
    Token,
}

impl Method {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LocalUser => "local_user",
            Self::Certificate => "certificate",
            Self::Token => "token",
        }
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// `unix:<uid>`, `cert:<name>` or `token:<id>`.
    pub principal: String,
    /// How it is known.
    pub method: Method,
    /// What it may do.
    pub role: Role,
    /// The one guest that it is about, of role `vmm`.
    pub guest: Option<Uuid>,
}

/// Recognizes the caller of a request. A token counts before anything that the transport says: whoever sends one wants
/// to be what it says, also when that is less.
///
/// # Errors
/// `unauthenticated`; `not_ready` when a token comes before the database is open.
pub fn recognize(state: &AppState, peer: Option<&Peer>, headers: &HeaderMap) -> Result<Caller, Problem> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    match (given.next(), given.next()) {
        (Some(value), None) => {
            let text = value.to_str().unwrap_or_default();
            let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(unknown("Authorization is not a bearer token"));
            }
            tokens::recognize(state.host()?, token.trim())?
                .ok_or_else(|| unknown("the bearer token is unknown, expired or withdrawn"))
        }
        (Some(_), Some(_)) => Err(unknown("Authorization is given more than once")),
        (None, _) => by_transport(&state.config().access, peer),
    }
}

fn by_transport(rules: &AccessRules, peer: Option<&Peer>) -> Result<Caller, Problem> {
    let local = |uid: u32, gid: Option<u32>| {
        let role = rules.role_of_user(uid, gid);
        let role = role.ok_or_else(|| {
            Problem::new(ProblemCode::Forbidden, format!("local user {uid} has no role at this daemon"))
        })?;
        Ok(Caller { principal: format!("unix:{uid}"), method: Method::LocalUser, role, guest: None })
    };
    match peer {
        Some(Peer::Unix { uid, gid }) => local(*uid, Some(*gid)),
        Some(Peer::Loopback { uid: Some(uid) }) => local(*uid, None),
        Some(Peer::Tls { names }) if !names.is_empty() => {
            let found = names.iter().find_map(|n| Some((n, *rules.certificates.get(n)?)));
            let (name, role) = found.ok_or_else(|| {
                Problem::new(ProblemCode::Forbidden, "no name of the client certificate has a role")
            })?;
            Ok(Caller { principal: format!("cert:{name}"), method: Method::Certificate, role, guest: None })
        }
        Some(Peer::Loopback { uid: None } | Peer::Tls { .. }) | None => {
            Err(unknown("the request carries no credentials"))
        }
    }
}

fn unknown(detail: &str) -> Problem {
    Problem::new(ProblemCode::Unauthenticated, detail)
        .with_header(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer realm=\"mirrorvm\""))
}

/// The user of the process at the other end of a loopback connection, as `/proc/net/tcp` has it: the row whose local
/// end is the peer's (Documentation/networking/proc_net_tcp.rst).
pub fn loopback_user(peer: SocketAddr, ours: SocketAddr) -> Option<u32> {
    let table = if peer.is_ipv4() { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
    let text = std::fs::read_to_string(table).ok()?;
    let (peer, ours) = (spelled(peer), spelled(ours));
    text.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (local, remote) = (fields.nth(1)?, fields.next()?);
        if local != peer || remote != ours {
            return None;
        }
        // State, queues, timer, retransmissions; then the user.
        fields.nth(4)?.parse().ok()
    })
}

/// An address as the table has it: 32-bit words in the machine's byte order, in hexadecimal.
fn spelled(address: SocketAddr) -> String {
    let bytes: Vec<u8> = match address {
        SocketAddr::V4(a) => a.ip().octets().to_vec(),
        SocketAddr::V6(a) => a.ip().octets().to_vec(),
    };
    let words = bytes.chunks_exact(4).map(|w| {
        let word = u32::from_ne_bytes([w[0], w[1], w[2], w[3]]);
        format!("{word:08X}")
    });
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_user_at_the_other_end_of_a_loopback_connection_is_found() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let ours = listener.local_addr().unwrap();
            let client = TcpStream::connect(ours).unwrap();
            let (_, peer) = listener.accept().unwrap();
            let me = rustix::process::geteuid().as_raw();
            assert_eq!(loopback_user(peer, ours), Some(me), "{address}");
            drop(client);
            let nobody: SocketAddr = if ours.is_ipv4() { "127.0.0.1:1" } else { "[::1]:1" }.parse().unwrap();
            assert_eq!(loopback_user(nobody, ours), None);
        }
    }

    #[test]
    fn roles_come_from_the_rules() {
        let me = rustix::process::geteuid().as_raw();
        let mut rules = AccessRules::default();
        let role = |rules: &AccessRules, peer| {
            by_transport(rules, Some(&peer)).map(|c| c.role).map_err(|p| p.code())
        };
        assert_eq!(role(&rules, Peer::Unix { uid: me, gid: 1 }), Ok(Role::Admin));
        assert_eq!(role(&rules, Peer::Unix { uid: 0, gid: 0 }), Ok(Role::Admin));
        let other = Peer::Unix { uid: 4_000_000, gid: 77 };
        assert_eq!(role(&rules, other.clone()), Err(ProblemCode::Forbidden));
        rules.groups.insert(77, Role::Viewer);
        assert_eq!(role(&rules, other.clone()), Ok(Role::Viewer));
        rules.users.insert(4_000_000, Role::Operator);
        assert_eq!(role(&rules, other), Ok(Role::Operator), "a user's own rule counts first");
        assert_eq!(role(&rules, Peer::Loopback { uid: None }), Err(ProblemCode::Unauthenticated));
        assert_eq!(role(&rules, Peer::Tls { names: vec![] }), Err(ProblemCode::Unauthenticated));
        let known = Peer::Tls { names: vec!["dns:x".into(), "uri:spiffe://a/b".into()] };
        assert_eq!(role(&rules, known.clone()), Err(ProblemCode::Forbidden));
        rules.certificates.insert("uri:spiffe://a/b".into(), Role::Peer);
        assert_eq!(role(&rules, known), Ok(Role::Peer));
        assert_eq!(by_transport(&rules, None).unwrap_err().code(), ProblemCode::Unauthenticated);
    }
}
