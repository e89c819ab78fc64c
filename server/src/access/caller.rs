//! From a connection and a token to a caller.

use axum::http::{HeaderMap, Uri, header};
use uuid::Uuid;

use super::lease::Lease;
use super::presented::{self, Presented};
use super::{Role, tokens};
use crate::config::AccessRules;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// What the transport says of the other end; set on every request by the accept loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine, over a Unix socket, as `SO_PEERCRED` describes it.
    Unix {
        /// User id of the process.
        uid: u32,
        /// Group id of the process.
        gid: u32,
    },
    /// Somebody over TCP in the clear. A TCP connection does not say who has its other end, not even on
    /// loopback: whatever could be looked up about it is about another moment.
    Tcp,
    /// Somebody over TLS.
    Tls {
        /// The names in the client certificate: `dns:...`, `uri:...`, `email:...`, `ip:...`. Empty when none
        /// was shown.
        names: Vec<String>,
    },
}

/// How a caller was recognized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// By the user of a process on this machine.
    LocalUser,
    /// By a client certificate.
    Certificate,
    /// By a bearer token.
    Token,
    /// By the cookie of a session that a local user opened for a browser.
    Session,
}

impl Method {
    /// The name that the API uses for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LocalUser => "local_user",
            Self::Certificate => "certificate",
            Self::Token => "token",
            Self::Session => "session",
        }
    }
}

/// The caller of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// `unix:<uid>`, `cert:<name>` or `token:<id>`. For a session, whoever opened it.
    pub principal: String,
    /// How the caller was recognized.
    pub method: Method,
    /// What the caller may do.
    pub role: Role,
    /// The only guest that it gives access to, for the role `vmm`. `None` for other roles.
    pub guest: Option<Uuid>,
    /// The token or session that the caller was recognized by.
    pub lease: Option<Lease>,
}

impl Caller {
    /// Id of the session that the caller was recognized by.
    pub fn session(&self) -> Option<Uuid> {
        let by_session = self.method == Method::Session;
        self.lease.as_ref().filter(|_| by_session).map(|lease| lease.id)
    }
}

/// Recognizes the caller of a request. A token or session counts before anything that the transport says:
/// whoever sends one wants to be what it says, also when that is less.
///
/// # Errors
/// `unauthenticated`; `not_ready` when a token comes before the database is open.
pub fn recognize(
    state: &AppState,
    peer: Option<&Peer>,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Caller, Problem> {
    let cookie = cookie_name(state, peer, headers)?;
    match presented::read(headers, cookie.as_deref()).map_err(unknown)? {
        Presented::Bearer(token) => tokens::recognize(state, token)?
            .ok_or_else(|| unknown("the bearer token is unknown, expired or withdrawn")),
        Presented::Session(text) => state.credentials().sessions().recognize(text).ok_or_else(|| {
            unknown("the session has ended: it was not used for long, or the daemon was restarted")
        }),
        Presented::Nothing => {
            let known = by_transport(&state.config().access, peer);
            known.map_err(|problem| match presented::in_query(uri) {
                Some(name) if problem.code() == ProblemCode::Unauthenticated => unknown(&format!(
                    "a credential is not read from the query, where logs and histories have it: send what is in \
                     `{name}` as `Authorization: Bearer <token>`, or rather another token in its place"
                )),
                _ => problem,
            })
        }
    }
}

/// The name of the session's cookie. `None` for a Unix socket, where no browser is: a proxy in front of it is
/// a local user, and passes on whatever cookies others send to it.
fn cookie_name(
    state: &AppState,
    peer: Option<&Peer>,
    headers: &HeaderMap,
) -> Result<Option<String>, Problem> {
    let over_tls = match peer {
        Some(Peer::Tcp) => false,
        Some(Peer::Tls { .. }) => true,
        Some(Peer::Unix { .. }) | None => return Ok(None),
    };
    if !headers.contains_key(header::COOKIE) {
        return Ok(None);
    }
    Ok(Some(presented::cookie_name(state.host()?.info().id, over_tls)))
}

fn by_transport(rules: &AccessRules, peer: Option<&Peer>) -> Result<Caller, Problem> {
    match peer {
        Some(Peer::Unix { uid, gid }) => {
            let role = rules.role_of_user(*uid, *gid).ok_or_else(|| {
                Problem::new(ProblemCode::Forbidden, format!("local user {uid} has no role at this daemon"))
            })?;
            Ok(Caller {
                principal: format!("unix:{uid}"),
                method: Method::LocalUser,
                role,
                guest: None,
                lease: None,
            })
        }
        Some(Peer::Tls { names }) if !names.is_empty() => {
            let found = names.iter().find_map(|n| Some((n, *rules.certificates.get(n)?)));
            let (name, role) = found.ok_or_else(|| {
                Problem::new(ProblemCode::Forbidden, "no name of the client certificate has a role")
            })?;
            Ok(Caller {
                principal: format!("cert:{name}"),
                method: Method::Certificate,
                role,
                guest: None,
                lease: None,
            })
        }
        Some(Peer::Tcp | Peer::Tls { .. }) | None => Err(unknown("the request carries no credentials")),
    }
}

/// The problem that says that the caller is unknown.
pub fn unknown(detail: &str) -> Problem {
    Problem::new(ProblemCode::Unauthenticated, detail)
        .with_header(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer realm=\"mirrorvm\""))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(role(&rules, Peer::Tcp), Err(ProblemCode::Unauthenticated));
        assert_eq!(role(&rules, Peer::Tls { names: vec![] }), Err(ProblemCode::Unauthenticated));
        let known = Peer::Tls { names: vec!["dns:x".into(), "uri:spiffe://a/b".into()] };
        assert_eq!(role(&rules, known.clone()), Err(ProblemCode::Forbidden));
        rules.certificates.insert("uri:spiffe://a/b".into(), Role::Peer);
        assert_eq!(role(&rules, known), Ok(Role::Peer));
        assert_eq!(by_transport(&rules, None).unwrap_err().code(), ProblemCode::Unauthenticated);
    }
}
