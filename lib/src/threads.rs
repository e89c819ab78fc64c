//! Threads that the library starts, by what they do, for whoever wants to hold them to it.
//!
//! Owns: the roles, which signals such threads leave to the program's own, and one function of the program's
//! that every such thread calls before anything else. Must not know: what that function does. Programs that
//! set none have threads as any other.

use std::sync::OnceLock;

use libc::c_int;
use vmm_sys_util::signal::{self, block_signal};

/// What a thread is there for. Threads of the async runtime are the program's own, and have none of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It runs a virtual processor, of a guest or of a mirror.
    Vcpu,
    /// It carries pages of a migration, or reads them all.
    Pages,
    /// It writes the database's logs.
    Store,
    /// It waits on a QEMU: for its end, for its console.
    Keeper,
    /// It accepts or serves links of other hosts. A whole migration may run on it.
    Link,
    /// It asks the system for the addresses of a name.
    Resolver,
}

impl Role {
    /// All there are.
    pub const ALL: [Self; 6] =
        [Self::Vcpu, Self::Pages, Self::Store, Self::Keeper, Self::Link, Self::Resolver];

    /// What the log calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Pages => "pages",
            Self::Store => "store",
            Self::Keeper => "keeper",
            Self::Link => "link",
            Self::Resolver => "resolver",
        }
    }

    /// Whether such a thread leaves signals to others. Not where it may start a program, which would begin
    /// with the same ones blocked.
    const fn leaves_signals(self) -> bool {
        match self {
            Self::Vcpu | Self::Pages | Self::Store => true,
            Self::Keeper | Self::Link | Self::Resolver => false,
        }
    }
}

/// Signals that ask the process for something. The kernel gives them to whatever thread it likes, and their
/// handlers are the program's: they do what a thread that does one thing may not be allowed to do (tokio's
/// write to a socket).
const TO_THE_PROCESS: [c_int; 11] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGCHLD,
    libc::SIGWINCH,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

static HOOK: OnceLock<fn(Role)> = OnceLock::new();

/// Has every thread that the library starts from now on call `hook` first, on itself. Once for a process: a
/// later call changes nothing.
pub fn on_start(hook: fn(Role)) {
    let _ = HOOK.set(hook);
}

/// To be called by a thread before it does what it is there for.
pub(crate) fn begin(role: Role) {
    for number in TO_THE_PROCESS.into_iter().filter(|_| role.leaves_signals()) {
        match block_signal(number) {
            Ok(()) | Err(signal::Error::SignalAlreadyBlocked(_)) => {}
            Err(error) => {
                tracing::warn!(%error, number, role = role.name(), "a thread may be given the program's signals")
            }
        }
    }
    if let Some(hook) = HOOK.get() {
        hook(role);
    }
}
