//! From a peer's endpoint to the addresses to try.
//!
//! Owns: asking the system's resolver without waiting for it longer than the caller wants, and the order of
//! what it says. Must not know: connecting.
//!
//! The resolver cannot be called off. So it has a thread of its own, which nobody waits for: an answer that
//! comes late is thrown away. How many of these there may be is bounded.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::endpoint::{Endpoint, check_connectable};
use super::here::check_reachable;

use crate::threads::{self, Role};

/// Resolvers at once; who asks for one more is told so.
const RESOLVERS_MAX: usize = 32;
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// How often a waiting caller looks whether it was called off.
const LOOK: Duration = Duration::from_millis(20);

static RESOLVERS: AtomicUsize = AtomicUsize::new(0);

/// Why a name came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The resolver's word: no such name, no server that answers.
    #[error("the resolver fails")]
    Failed(#[source] std::io::Error),
    /// None, or none that can be connected to.
    #[error("it has no address that can be connected to")]
    NoAddress,
    /// No answer in the time that there was.
    #[error("the resolver did not answer in time")]
    Late,
    /// Too many wait for it already.
    #[error("{RESOLVERS_MAX} names are being resolved already")]
    Busy,
    /// The caller does not want it any more.
    #[error("called off")]
    CalledOff,
}

/// What runs as long as it lives is counted.
struct Resolver;

impl Resolver {
    fn begin() -> Option<Self> {
        let more = |n: usize| (n < RESOLVERS_MAX).then_some(n + 1);
        RESOLVERS.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok().then_some(Self)
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        RESOLVERS.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Addresses of `endpoint`, at least one, in the order in which to try them.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve(
    endpoint: &Endpoint,
    by: Instant,
    called_off: &dyn Fn() -> bool,
) -> Result<Vec<SocketAddr>, ResolveError> {
    let (name, port) = match endpoint {
        Endpoint::Address(at) => return Ok(vec![*at]),
        Endpoint::Name { name, port } => (name.clone(), *port),
    };
    let counted = Resolver::begin().ok_or(ResolveError::Busy)?;
    let (answer, answered) = mpsc::channel();
    let ask = move || {
        threads::begin(Role::Resolver);
        let _counted = counted;
        let found = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        let found = found.map_err(|error| unreadable().unwrap_or(error));
        // Nobody may be there any more.
        let _ = answer.send(found);
    };
    std::thread::Builder::new().name("mvm-resolve".into()).spawn(ask).map_err(ResolveError::Failed)?;
    let found = loop {
        let left = by.saturating_duration_since(Instant::now());
        match answered.recv_timeout(left.min(LOOK)) {
            Ok(found) => break found.map_err(ResolveError::Failed)?,
            Err(_) if called_off() => return Err(ResolveError::CalledOff),
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
            Err(RecvTimeoutError::Timeout) => return Err(ResolveError::Late),
            Err(RecvTimeoutError::Disconnected) => return Err(ResolveError::NoAddress),
        }
    };
    let mut order = in_turn(&found);
    order.retain(|at| check_reachable(at).is_ok());
    if order.is_empty() { Err(ResolveError::NoAddress) } else { Ok(order) }
}

/// Why the resolver did not even ask: it takes a configuration that it may not read for none, and then asks
/// this machine. That happens where this process is held to the files that there were when it started.
fn unreadable() -> Option<io::Error> {
    const FILE: &str = "/etc/resolv.conf";
    let denied = |e: &io::Error| e.kind() == io::ErrorKind::PermissionDenied;
    let error = std::fs::File::open(FILE).err().filter(denied)?;
    let why = format!(
        "{FILE} may not be read ({error}); if it was replaced since the daemon started, restart the daemon"
    );
    Some(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// The resolver's order (RFC 6724), but the two families in turn: where one of them leads nowhere the other
/// is not far.
fn in_turn(found: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut usable: Vec<SocketAddr> = Vec::new();
    for at in found {
        if check_connectable(at).is_ok() && !usable.contains(at) {
            usable.push(*at);
        }
    }
    let Some(first) = usable.first().map(SocketAddr::is_ipv6) else { return usable };
    let (preferred, other): (Vec<_>, Vec<_>) = usable.into_iter().partition(|at| at.is_ipv6() == first);
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    let mut order = Vec::new();
    loop {
        let pair = [preferred.next(), other.next()];
        if pair == [None, None] {
            break;
        }
        order.extend(pair.into_iter().flatten());
    }
    order.truncate(ADDRESSES_MAX);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: &dyn Fn() -> bool = &|| false;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn an_address_is_itself_and_localhost_is_here() {
        let at: Endpoint = "192.0.2.7:7801".parse().unwrap();
        assert_eq!(resolve(&at, soon(), NEVER).unwrap(), [at.address().unwrap()]);
        let here: Endpoint = "localhost:7801".parse().unwrap();
        let found = resolve(&here, soon(), NEVER).unwrap();
        assert!(!found.is_empty() && found.iter().all(|at| at.ip().is_loopback() && at.port() == 7801));
    }

    #[test]
    fn a_name_that_nobody_has_is_told_and_a_caller_who_goes_is_not_held() {
        // Reserved to exist never (RFC 6761).
        let nobody: Endpoint = "nobody.invalid:7801".parse().unwrap();
        let error = resolve(&nobody, soon(), NEVER).unwrap_err();
        assert!(
            matches!(error, ResolveError::Failed(_) | ResolveError::NoAddress | ResolveError::Late),
            "{error}"
        );
        let gone = resolve(&nobody, Instant::now(), NEVER);
        assert!(gone.is_err());
    }

    #[test]
    fn families_take_turns_and_what_is_no_host_is_left_out() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let found = [
            at("[2001:db8::1]:1"),
            at("[2001:db8::2]:1"),
            at("0.0.0.0:1"),
            at("192.0.2.1:1"),
            at("[2001:db8::1]:1"),
            at("224.0.0.1:1"),
            at("192.0.2.2:1"),
            at("192.0.2.3:1"),
        ];
        let order: Vec<String> = in_turn(&found).iter().map(|at| at.ip().to_string()).collect();
        assert_eq!(order, ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "192.0.2.3"]);
        assert!(in_turn(&[at("0.0.0.0:1")]).is_empty());
        let many: Vec<_> = (1..100).map(|n| SocketAddr::from(([192, 0, 2, n], 1))).collect();
        assert_eq!(in_turn(&many), many[..ADDRESSES_MAX]);
    }
}
