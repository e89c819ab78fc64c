//! The low-level half of the `qemu` driver: one QEMU process whose RAM is a memfd of ours.
//!
//! Owns: the command line, the process and its death, the QMP conversation, the parsing of QEMU's views of
//! guest RAM, and the blob that carries the state of vCPUs and devices. Must not know: guests as the library
//! sees them, mirrors, migrations, HTTP. Blocking throughout, no async; callers run it on a thread of their
//! own.
//!
//! QEMU is **not trusted** once guest code has run: every line, blob and wait is bounded, nothing it says can
//! panic us, and it cannot shrink the RAM that we map (see [`seal_ram`]).
//!
//! How a guest moves (`x-ignore-shared` makes QEMU leave shared RAM out of its own stream):
//!
//! ```text
//! source                                     destination
//! stop()                                     Qemu::launch(incoming: true), on a memfd of its own
//! save_device_state()  -- bytes -->          (bytes kept)
//! last copy of dirty RAM -- pages -->        (written to the memfd)
//!                                            load_device_state(bytes), then cont()
//! quit()   or, on abort, cont()
//! ```
//!
//! The state is saved *before* the last RAM copy because saving may write to guest RAM (none was seen to with
//! the devices we configure, on 7.2 and 10.0, but under KVM a vCPU ioctl may update the steal-time page). It
//! is loaded *after* RAM is whole because devices look at RAM when they are loaded, and because loading
//! writes to RAM: under KVM the kvmclock structure was seen to change (version and flags). Starting with
//! `incoming` writes nothing.

mod accel;
mod child;
mod command;
mod console;
mod device_state;
mod end;
mod error;
mod exit;
mod keeper;
mod launcher;
mod mtree;
mod process;
mod qmp;
mod ramblock;
mod reactor;
mod start;
mod starter;
mod user;
mod wire;

pub use accel::{Accel, KvmAccess, kvm_access, pick_accel};
pub use command::{
    APPEND_MAX, GuestFiles, MEMORY_UNIT, QemuSpec, RunAs, Timeouts, is_command_line, qemu_binary, seal_ram,
};
pub use console::ConsoleSink;
pub use device_state::MAX_DEVICE_STATE_BYTES;
pub use end::{QemuEnd, QemuWatch, ShutdownCause};
pub use error::QemuError;
pub use exit::ExitInfo;
pub use keeper::{OomKills, keep};
pub use launcher::{Launcher, launcher_pair, serve};
pub use mtree::RamPiece;
pub use process::{Qemu, RunState};
pub use qmp::{Qmp, QmpError, QmpEvent};
pub use ramblock::{LayoutError, QemuRamBlock};
pub use start::close_on_exec;
pub use starter::Starter;
pub use user::{NoQemuUsers, QemuUsers, UserLease, UserPool, may_change_users};
