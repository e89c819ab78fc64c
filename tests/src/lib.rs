//! Harness of the whole-system tests: daemons as processes, their REST API, a network that breaks on demand.
//!
//! Owns: spawning and cleaning up, waiting (always by polling something observable, with a deadline),
//! counting what a process holds. Must not know: the library; tests speak to daemons as any client would, by
//! the crate `mirrorvm-client`.
#![allow(clippy::unwrap_used, reason = "a harness fails by panicking, with the place")]

mod addresses;
pub mod campaign;
mod daemon;
pub mod debian;
mod disk;
mod group;
mod guest;
mod http;
mod preload;
mod proxy;
mod tls;
mod wait;

pub use addresses::{nobody, own_address};
pub use daemon::{Census, Daemon, children, daemon_binary, launcher};
pub use disk::{SmallDisk, can_mount, mounts};
pub use group::MemoryGroup;
pub use guest::{
    Pair, Ticks, embedded, emulated, is_terminal, kvm, linux_guest, migration, qemu_binary, repository,
    two_daemons,
};
pub use http::{Reply, Request};
pub use preload::{Page, Preload};
pub use proxy::{Act, Break, Proxy, Traffic, Way};
pub use tls::AnyServer;
pub use wait::{until, until_some};
