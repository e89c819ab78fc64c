//! Threads that the library starts, by what they do, for whoever wants to hold them to it.
//!
//! Owns: the roles, and one function of the program's that every such thread calls before anything else. Must
//! not know: what that function does. Programs that set none have threads as any other.

use std::sync::OnceLock;

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
}

static HOOK: OnceLock<fn(Role)> = OnceLock::new();

/// Has every thread that the library starts from now on call `hook` first, on itself. Once for a process: a
/// later call changes nothing.
pub fn on_start(hook: fn(Role)) {
    let _ = HOOK.set(hook);
}

/// To be called by a thread before it does what it is there for.
pub(crate) fn begin(role: Role) {
    if let Some(hook) = HOOK.get() {
        hook(role);
    }
}
