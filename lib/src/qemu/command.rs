//! Owns what a QEMU is asked to be (`QemuSpec`) and the command line that says so. Must not start anything.
//!
//! QEMU opens nothing of the host by a name: stdin *is* the RAM memfd (QEMU opens `/proc/self/fd/0`), stdout
//! is the guest's serial port, stderr is captured, and the others are passed under the numbers that they have
//! in the daemon: the control socket, sealed copies of what it boots from, which QEMU opens as
//! `/proc/self/fd/N`, and its disks ([`super::machine`]). A memfd opens so for QEMU's own user, too, who
//! could not open the files themselves. How they pass without leaking into other children is
//! [`super::start`]'s.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::accel::{Accel, TRANSLATED_MIB};
use super::error::QemuError;
use super::machine::{Line, Machine, Passed};
use crate::boot_files::is_sealed;

/// Id of the memory backend, and so the name of the main RAM block.
pub(super) const RAM_ID: &str = "ram0";
/// QEMU takes whole MiB.
pub const MEMORY_UNIT: u64 = 1 << 20;
/// What the `pc` machine takes (CPU hot-plug limit of its ACPI tables).
const MAX_VCPUS: u32 = 255;
/// The longest kernel command line on x86, in bytes: `COMMAND_LINE_SIZE` less the zero byte at its end.
pub const APPEND_MAX: usize = 2047;

/// Where QEMU is, when it is.
#[must_use]
pub fn qemu_binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|p| p.is_file())
}

/// Whom QEMU runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunAs {
    /// User id that QEMU runs as.
    pub uid: u32,
    /// Group id that QEMU runs as.
    pub gid: u32,
    /// The only other group, that of `/dev/kvm`.
    pub kvm_group: Option<u32>,
}

/// How a guest comes that is not booted here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arriving {
    /// It runs as soon as it is here: QEMU takes its disks then, and until then the source may go on.
    ToRun,
    /// It stays paused: QEMU takes its disks with its state. (If it took them when it runs, 7.2 would abort
    /// when the guest moves on before that.)
    ToPause,
}

/// What to start. Source and destination of a migration differ in `ram`, `passed`, `run_as` and `arriving`
/// only.
#[derive(Debug)]
pub struct QemuSpec {
    /// QEMU for x86-64: an absolute path, or a name to be found in `PATH`.
    pub binary: PathBuf,
    /// How QEMU executes the guest's instructions.
    pub accel: Accel,
    /// The machine, whole and checked. Its type may be an alias (`pc`, `q35`) within one QEMU version;
    /// between versions, give the destination what [`super::Qemu::machine_type`] said on the source.
    pub machine: Machine,
    /// Number of vCPUs, 1 to 255.
    pub vcpus: u32,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Command line for the guest's kernel.
    pub append: String,
    /// The guest: QEMU's name, and the machine's UUID.
    pub id: Uuid,
    /// Guest RAM: a memfd of exactly `memory_bytes`, made with `MFD_ALLOW_SEALING`; it is sealed against
    /// resizing.
    pub ram: OwnedFd,
    /// What else it is made from. The channel of the guest's agent is added at the launch.
    pub passed: Passed,
    /// Whom it runs as; `None`: this process's user.
    pub run_as: Option<RunAs>,
    /// Start empty and wait for [`super::Qemu::load_device_state`].
    pub arriving: Option<Arriving>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// How long QEMU is given. The defaults suit TCG on a loaded machine.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From spawn until it takes commands.
    pub launch: Duration,
    /// For an ordinary command, also for `stop` and `cont` to take effect.
    pub command: Duration,
    /// For saving or loading device state.
    pub state: Duration,
    /// For a graceful exit, and again for the exit after a kill.
    pub quit: Duration,
    /// For another QEMU to let go of an image's lock.
    pub lock: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            launch: Duration::from_secs(30),
            command: Duration::from_secs(10),
            state: Duration::from_secs(60),
            quit: Duration::from_secs(5),
            lock: Duration::from_secs(8),
        }
    }
}

impl QemuSpec {
    /// Checks everything that can be checked without starting anything, and seals the RAM.
    pub(super) fn check(&self) -> Result<(), QemuError> {
        let bad = |field, value: &dyn ToString| Err(QemuError::BadSpec { field, value: value.to_string() });
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return bad("vcpus", &self.vcpus);
        }
        if self.memory_bytes == 0 || !self.memory_bytes.is_multiple_of(MEMORY_UNIT) {
            return bad("memory_bytes", &self.memory_bytes);
        }
        if !is_command_line(&self.append) {
            return bad("append", &format_args!("{} bytes", self.append.len()));
        }
        // Nothing of it means anything else on a command line than what it says.
        let mut errors = Vec::new();
        self.machine.check(self.vcpus, self.passed.kernel.is_some(), &mut errors);
        if let Some(error) = errors.first() {
            return bad("machine", &format_args!("{}: {}", error.pointer, error.detail));
        }
        let sealed = [
            ("kernel", &self.passed.kernel),
            ("initrd", &self.passed.initrd),
            ("firmware", &self.passed.code),
        ];
        for (field, fd) in sealed.into_iter().chain([("cloud_init", &self.passed.seed)]) {
            if fd.as_ref().is_some_and(|fd| !is_sealed(fd)) {
                return bad(field, &"not sealed memory");
            }
        }
        if self.run_as.is_some_and(|r| r.uid == 0 || r.gid == 0 || r.kvm_group == Some(0)) {
            return bad("run_as", &"root");
        }
        seal_ram(&self.ram, self.memory_bytes)
    }

    /// The process to spawn, with its three standard descriptors still to be set and `qmp` and the boot files
    /// to be passed.
    ///
    /// `setpriv` (util-linux, essential on Debian) changes the user, sets the parent-death signal after that
    /// (a change of user clears it) and execs, so the pid is QEMU's.
    pub(super) fn command(&self, qmp: &OwnedFd) -> Command {
        let mut command = Command::new("setpriv");
        if let Some(RunAs { uid, gid, kvm_group }) = self.run_as {
            command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
            match kvm_group {
                Some(group) => command.args(["--groups", &group.to_string()]),
                None => command.arg("--clear-groups"),
            };
            command.arg("--inh-caps=-all");
        }
        command.args(["--pdeathsig", "KILL", "--no-new-privs", "--"]).arg(&self.binary);
        command.args(self.arguments(qmp)).current_dir("/");
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }

    fn arguments(&self, qmp: &OwnedFd) -> Vec<String> {
        let Self { accel, machine, vcpus, memory_bytes, append, id, passed, arriving, .. } = self;
        let line = Line {
            accel: *accel,
            machine,
            vcpus: *vcpus,
            memory_bytes: *memory_bytes,
            append,
            id: *id,
            passed,
            qmp: qmp.as_raw_fd(),
            arriving: *arriving,
        };
        line.arguments()
    }
}

/// Whether a kernel can be given this as its command line.
pub fn is_command_line(text: &str) -> bool {
    text.len() <= APPEND_MAX && !text.chars().any(char::is_control)
}

pub(super) fn accel_option(accel: Accel) -> String {
    match accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg => format!("tcg,tb-size={TRANSLATED_MIB}"),
    }
}

/// Checks the size of a guest's RAM and seals it against growing and shrinking. Without the seal a QEMU that
/// the guest took over could truncate it and kill us with `SIGBUS` at our next access.
///
/// # Errors
/// [`QemuError::BadRam`] if the size differs or the descriptor cannot be sealed.
pub fn seal_ram(ram: &impl AsFd, memory_bytes: u64) -> Result<(), QemuError> {
    let needed = SealFlags::SHRINK | SealFlags::GROW;
    let found = fstat(ram).ok().and_then(|stat| u64::try_from(stat.st_size).ok()).unwrap_or(0);
    let sealed = || fcntl_get_seals(ram).is_ok_and(|seals| seals.contains(needed));
    // Sealed before the size is believed; a second sealing by someone else is no failure.
    if (sealed() || fcntl_add_seals(ram, needed).is_ok()) && found == memory_bytes {
        return Ok(());
    }
    Err(QemuError::BadRam { wanted: memory_bytes, found })
}
