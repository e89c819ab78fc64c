//! Owns the choice between KVM and software emulation. Must not know how QEMU is started.

use std::fs::OpenOptions;
use std::path::Path;

/// How QEMU runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// `/dev/kvm`.
    Kvm,
    /// QEMU's translator: slow, works everywhere.
    Tcg,
}

/// What the host says that matters to the choice; a value, so that the choice is testable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostFacts {
    /// `kvm_pvm` is loaded: a shadow-paging KVM on which a stock Linux does not reach user space.
    pvm: bool,
    /// `kvm_intel` or `kvm_amd` is loaded (or built in with parameters).
    hardware: bool,
    /// `/dev/kvm` opens for reading and writing.
    device_opens: bool,
}

/// Chooses KVM only where a stock Linux can run on it; the second value says why, for logs and the API.
#[must_use]
pub fn pick_accel() -> (Accel, &'static str) {
    decide(HostFacts {
        pvm: Path::new("/sys/module/kvm_pvm").exists(),
        hardware: Path::new("/sys/module/kvm_intel").exists() || Path::new("/sys/module/kvm_amd").exists(),
        device_opens: OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok(),
    })
}

fn decide(host: HostFacts) -> (Accel, &'static str) {
    match host {
        HostFacts { pvm: true, .. } => {
            (Accel::Tcg, "kvm is kvm_pvm (shadow paging), on which a stock linux does not boot")
        }
        HostFacts { hardware: false, .. } => (Accel::Tcg, "neither kvm_intel nor kvm_amd is loaded"),
        HostFacts { device_opens: false, .. } => (Accel::Tcg, "/dev/kvm cannot be opened"),
        HostFacts { .. } => (Accel::Kvm, "hardware kvm is loaded and /dev/kvm opens"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_needs_hardware_and_a_device_and_no_pvm() {
        for bits in 0..8u8 {
            let host = HostFacts { pvm: bits & 1 != 0, hardware: bits & 2 != 0, device_opens: bits & 4 != 0 };
            let expected = if bits == 0b110 { Accel::Kvm } else { Accel::Tcg };
            assert_eq!(decide(host).0, expected, "{host:?}");
        }
    }
}
