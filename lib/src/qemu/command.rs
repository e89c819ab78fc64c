//! Owns what a QEMU is asked to be (`QemuSpec`) and the command line that says so. Must not start anything.
//!
//! QEMU opens nothing of the host by a name: stdin *is* the RAM memfd (QEMU opens `/proc/self/fd/0`), stdout
//! is the guest's serial port, stderr is captured, and three descriptors are passed under the numbers that
//! they have in the daemon: the control socket, and sealed copies of kernel and initial RAM disk, which QEMU
//! opens as `/proc/self/fd/N`. A memfd opens so for QEMU's own user, too, who could not open the files
//! themselves. How they pass without leaking into other children is [`super::start`]'s.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use serde::{Deserialize, Serialize};

use super::accel::{Accel, TRANSLATED_MIB};
use super::error::QemuError;
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

/// What to start. Source and destination of a migration differ in `ram`, `run_as` and `incoming` only.
#[derive(Debug)]
pub struct QemuSpec {
    /// QEMU for x86-64: an absolute path, or a name to be found in `PATH`.
    pub binary: PathBuf,
    /// How QEMU executes the guest's instructions.
    pub accel: Accel,
    /// Machine type. An alias (`pc`, `q35`) is good within one QEMU version; between versions, give the
    /// destination what [`super::Qemu::machine_type`] said on the source.
    pub machine: String,
    /// CPU model, with features if need be (`max,-arch-capabilities`). `max` boots fastest under TCG and is
    /// migratable under both accelerators, between equal hosts.
    pub cpu: String,
    /// Number of vCPUs, 1 to 255.
    pub vcpus: u32,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Linux kernel image: a sealed memfd.
    pub kernel: OwnedFd,
    /// Initramfs: a sealed memfd.
    pub initrd: Option<OwnedFd>,
    /// Command line for the guest's kernel.
    pub append: String,
    /// Guest RAM: a memfd of exactly `memory_bytes`, made with `MFD_ALLOW_SEALING`; it is sealed against
    /// resizing.
    pub ram: OwnedFd,
    /// Whom it runs as; `None`: this process's user.
    pub run_as: Option<RunAs>,
    /// Start empty and wait for [`super::Qemu::load_device_state`].
    pub incoming: bool,
    /// Where its keeper keeps what it says, and what of it outlives the daemon's memory; `None`: nowhere.
    pub files: Option<GuestFiles>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// A directory of a guest's own.
#[derive(Debug)]
pub struct GuestFiles {
    /// The guest's id: letters, digits and dashes.
    pub guest: String,
    /// The directory, of this process's user and with mode 0700.
    pub directory: OwnedFd,
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
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            launch: Duration::from_secs(30),
            command: Duration::from_secs(10),
            state: Duration::from_secs(60),
            quit: Duration::from_secs(5),
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
        // Our own properties follow the machine's name, so it must not bring any.
        if !is_plain_name(&self.machine, b"") {
            return bad("machine", &self.machine.escape_debug());
        }
        if !is_plain_name(&self.cpu, b",=") {
            return bad("cpu", &self.cpu.escape_debug());
        }
        if self.files.as_ref().is_some_and(|files| !is_guest_id(&files.guest)) {
            return bad("guest", &"no guest's id");
        }
        for (field, fd) in [("kernel", Some(&self.kernel)), ("initrd", self.initrd.as_ref())] {
            if fd.is_some_and(|fd| !is_sealed(fd)) {
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

    fn arguments(&self, qmp: &OwnedFd) -> Vec<OsString> {
        let passed = |fd: &OwnedFd| OsString::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let bytes = self.memory_bytes;
        let mut list = Vec::new();
        let mut add = |option: &str, value: OsString| list.extend([OsString::from(option), value]);
        let machine = format!(
            "{},memory-backend={RAM_ID},usb=off,vmport=off,dump-guest-core=off,mem-merge=off",
            self.machine
        );
        let ram = format!("memory-backend-file,id={RAM_ID},size={bytes}B,mem-path=/proc/self/fd/0,share=on");
        add("-accel", accel_option(self.accel).into());
        add("-machine", machine.into());
        add("-object", ram.into());
        add("-cpu", self.cpu.as_str().into());
        add("-smp", self.vcpus.to_string().into());
        add("-m", format!("{}M", bytes / MEMORY_UNIT).into());
        add("-kernel", passed(&self.kernel));
        if let Some(initrd) = &self.initrd {
            add("-initrd", passed(initrd));
        }
        add("-append", self.append.as_str().into());
        add("-display", "none".into());
        add("-chardev", "socket,id=console,fd=1".into());
        add("-serial", "chardev:console".into());
        add("-chardev", format!("socket,id=qmp,fd={}", qmp.as_raw_fd()).into());
        add("-mon", "chardev=qmp,mode=control".into());
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        if self.incoming {
            add("-incoming", "defer".into());
        }
        list.extend(["-nodefaults", "-no-user-config", "-no-reboot", "-S"].map(OsString::from));
        list
    }
}

/// Whether a kernel can be given this as its command line.
pub fn is_command_line(text: &str) -> bool {
    text.len() <= APPEND_MAX && !text.chars().any(char::is_control)
}

fn accel_option(accel: Accel) -> String {
    match accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg => format!("tcg,tb-size={TRANSLATED_MIB}"),
    }
}

/// Whether this can be a guest's id.
fn is_guest_id(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Whether a name is made of harmless characters and the ones in `also`.
fn is_plain_name(name: &str, also: &[u8]) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._+".contains(&byte) || also.contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
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
