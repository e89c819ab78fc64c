//! Owns what a QEMU is asked to be (`QemuSpec`) and the command line that says so. Must not start anything.
//!
//! No descriptor is passed by number, so nothing of the daemon's leaks into another child and no `pre_exec` is needed:
//! stdin *is* the RAM memfd (QEMU opens `/proc/self/fd/0`), stdout is the guest's serial port, stderr is captured, and
//! the control socket is a path relative to the working directory, which is the run directory.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};

use super::accel::Accel;
use super::error::QemuError;

/// Name of the control socket in the run directory.
pub(super) const QMP_SOCKET: &str = "qmp.sock";
/// Id of the memory backend, and so the name of the main RAM block.
pub(super) const RAM_ID: &str = "ram0";
/// QEMU takes whole MiB.
const MEMORY_UNIT: u64 = 1 << 20;
/// What the `pc` machine takes (CPU hot-plug limit of its ACPI tables).
const MAX_VCPUS: u32 = 255;
/// The longest kernel command line on x86 (`COMMAND_LINE_SIZE`), in bytes.
const MAX_APPEND_BYTES: usize = 2048;

/// What to start. Source and destination of a migration differ in `ram`, `run_dir` and `incoming` only.
#[derive(Debug)]
pub struct QemuSpec {
    /// QEMU for x86-64: an absolute path, or a name to be found in `PATH`.
    pub binary: PathBuf,
    /// How instructions run.
    pub accel: Accel,
    /// Machine type. An alias (`pc`, `q35`) is good within one QEMU version; between versions, give the destination
    /// what [`super::Qemu::machine_type`] said on the source.
    pub machine: String,
    /// CPU model, with features if need be (`max,-arch-capabilities`). `max` boots fastest under TCG and is migratable
    /// under both accelerators, between equal hosts.
    pub cpu: String,
    /// Number of vCPUs, 1 to 255.
    pub vcpus: u32,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Linux kernel image (absolute path).
    pub kernel: PathBuf,
    /// Initramfs (absolute path).
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// Guest RAM: a memfd of exactly `memory_bytes`, made with `MFD_ALLOW_SEALING`; it is sealed against resizing.
    pub ram: OwnedFd,
    /// Existing directory of ours alone (mode 0700), one per QEMU; holds the control socket.
    pub run_dir: PathBuf,
    /// Start empty and wait for [`super::Qemu::load_device_state`].
    pub incoming: bool,
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
        if self.append.len() >= MAX_APPEND_BYTES || self.append.contains('\0') {
            return bad("append", &self.append.escape_debug());
        }
        // Our own properties follow the machine's name, so it must not bring any.
        if !is_plain_name(&self.machine, b"") {
            return bad("machine", &self.machine.escape_debug());
        }
        if !is_plain_name(&self.cpu, b",=") {
            return bad("cpu", &self.cpu.escape_debug());
        }
        for (field, path) in [("kernel", Some(&self.kernel)), ("initrd", self.initrd.as_ref())] {
            if let Some(path) = path.filter(|path| !path.is_absolute() || !path.is_file()) {
                return bad(field, &path.display());
            }
        }
        if !self.run_dir.is_absolute() || !self.run_dir.is_dir() {
            return bad("run_dir", &self.run_dir.display());
        }
        seal_ram(&self.ram, self.memory_bytes)
    }

    /// The process to spawn, with its three standard descriptors still to be set.
    ///
    /// `setpriv` (util-linux, essential on Debian) sets the parent-death signal and execs, so the pid is QEMU's.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--no-new-privs", "--"]).arg(&self.binary);
        command.args(self.arguments()).current_dir(&self.run_dir);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }

    fn arguments(&self) -> Vec<OsString> {
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
        add("-kernel", self.kernel.as_path().into());
        if let Some(initrd) = &self.initrd {
            add("-initrd", initrd.as_path().into());
        }
        add("-append", self.append.as_str().into());
        add("-display", "none".into());
        add("-chardev", "socket,id=console,fd=1".into());
        add("-serial", "chardev:console".into());
        add("-chardev", format!("socket,id=qmp,path={QMP_SOCKET}").into());
        add("-mon", "chardev=qmp,mode=control".into());
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        if self.incoming {
            add("-incoming", "defer".into());
        }
        list.extend(["-nodefaults", "-no-user-config", "-no-reboot", "-S"].map(OsString::from));
        list
    }
}

fn accel_option(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        // The default translation buffer is an eighth of the host's memory, up to 1 GiB per QEMU.
        Accel::Tcg => "tcg,tb-size=128",
    }
}

/// Whether a name is made of harmless characters and the ones in `also`.
fn is_plain_name(name: &str, also: &[u8]) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._+".contains(&byte) || also.contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
}

/// Checks the size of a guest's RAM and seals it against growing and shrinking. Without the seal a QEMU that the
/// guest took over could truncate it and kill us with `SIGBUS` at our next access.
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

/// The control socket's path for our side: through the directory's descriptor, so that the length limit of a socket
/// address (108 bytes) does not apply to the run directory.
pub(super) fn qmp_socket_via(directory: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(QMP_SOCKET)
}
