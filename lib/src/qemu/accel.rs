//! Owns the choice between KVM and software emulation. Must not know how QEMU is started.

use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// How QEMU runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// Hardware virtualization by `/dev/kvm`.
    Kvm,
    /// QEMU's translator: slow, works everywhere.
    Tcg,
}

impl Accel {
    /// Bytes that a QEMU takes for itself at most, beside the guest's memory and the files that it boots:
    /// code that it translated, device models, stacks.
    #[must_use]
    pub const fn own_bytes(self) -> u64 {
        match self {
            // A Linux with one disk in memory was seen to take 12 MiB.
            Self::Kvm => 24 << 20,
            Self::Tcg => (24 + TRANSLATED_MIB) << 20,
        }
    }
}

/// MiB of translated code that a QEMU keeps. Its default is an eighth of the host's memory, up to 1 GiB for
/// each. A Linux that has booted fills about 50; a full one is emptied and filled anew.
pub(super) const TRANSLATED_MIB: u64 = 64;

/// What the host says that matters to the choice; a value, so that the choice is testable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostFacts {
    /// `kvm_pvm` is loaded: a shadow-paging KVM on which a stock Linux does not reach user space.
    pvm: bool,
    /// `kvm_intel` or `kvm_amd` is loaded (or built in with parameters).
    hardware: bool,
    /// `/dev/kvm` opens for reading and writing, for the daemon and for QEMU's user.
    device_opens: bool,
}

/// How QEMU's user comes to `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmAccess {
    /// It can open it as it is.
    Open,
    /// As a member of this group.
    Group(u32),
    /// It cannot be opened.
    Closed,
}

/// Whether a QEMU can open `/dev/kvm`: one that runs as the daemon's user, or (`separate`) as one of its own,
/// who is in no group but the one that the device asks for.
#[must_use]
pub fn kvm_access(separate: bool) -> KvmAccess {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return KvmAccess::Closed;
    }
    if !separate {
        return KvmAccess::Open;
    }
    std::fs::metadata("/dev/kvm").map_or(KvmAccess::Closed, |m| access_of(m.mode(), m.gid()))
}

/// By the device's mode and group. Root's group is given to nobody.
fn access_of(mode: u32, gid: u32) -> KvmAccess {
    match (mode & 0o006 == 0o006, mode & 0o060 == 0o060) {
        (true, _) => KvmAccess::Open,
        (false, true) if gid != 0 => KvmAccess::Group(gid),
        _ => KvmAccess::Closed,
    }
}

/// Chooses KVM only where a stock Linux can run on it; the second value says why, for logs and the API.
/// `separate`: QEMU runs as a user of its own.
#[must_use]
pub fn pick_accel(separate: bool) -> (Accel, &'static str) {
    decide(HostFacts {
        pvm: Path::new("/sys/module/kvm_pvm").exists(),
        hardware: Path::new("/sys/module/kvm_intel").exists() || Path::new("/sys/module/kvm_amd").exists(),
        device_opens: kvm_access(separate) != KvmAccess::Closed,
    })
}

fn decide(host: HostFacts) -> (Accel, &'static str) {
    match host {
        HostFacts { pvm: true, .. } => {
            (Accel::Tcg, "kvm is kvm_pvm (shadow paging), on which a stock linux does not boot")
        }
        HostFacts { hardware: false, .. } => (Accel::Tcg, "neither kvm_intel nor kvm_amd is loaded"),
        HostFacts { device_opens: false, .. } => (
            Accel::Tcg,
            "/dev/kvm cannot be opened by QEMU's user: give the device a group of its own and mode 0660, as Debian does",
        ),
        HostFacts { .. } => (Accel::Kvm, "hardware kvm is loaded and /dev/kvm opens for QEMU's user"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_reached_by_everybody_or_through_a_group_that_is_not_root_s() {
        assert_eq!(access_of(0o20666, 0), KvmAccess::Open);
        assert_eq!(access_of(0o20660, 104), KvmAccess::Group(104));
        for (mode, gid) in [(0o20660, 0), (0o20600, 104), (0o20640, 104), (0o20664, 0)] {
            assert_eq!(access_of(mode, gid), KvmAccess::Closed, "{mode:o} {gid}");
        }
    }

    #[test]
    fn kvm_needs_hardware_and_a_device_and_no_pvm() {
        for bits in 0..8u8 {
            let host = HostFacts { pvm: bits & 1 != 0, hardware: bits & 2 != 0, device_opens: bits & 4 != 0 };
            let expected = if bits == 0b110 { Accel::Kvm } else { Accel::Tcg };
            assert_eq!(decide(host).0, expected, "{host:?}");
        }
    }
}
