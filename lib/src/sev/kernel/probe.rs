//! Whether this host can run SEV guests, and if not, why and what to do.
//!
//! Owns: reading CPUID, the KVM module's parameters and `/dev/sev`; the verdict is a pure function of what
//! was read. Sources: AMD APM vol. 3, Fn8000_001F; arch/x86/kvm/svm/sev.c, sev_hardware_setup.

use crate::codes::Capability;
use std::io;
use std::path::Path;

/// The security processor's device.
pub(super) const DEVICE: &str = "/dev/sev";

const PARAMETERS: &str = "/sys/module/kvm_amd/parameters";

/// Something that SEV or SEV-ES needs and that is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {why}; {fix}", what.code())]
pub struct Missing {
    /// What is missing: SEV or SEV-ES.
    pub what: Capability,
    /// Why it is missing.
    pub why: String,
    /// What would make it work.
    pub fix: String,
}

impl Missing {
    fn new(what: Capability, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what, why: why.into(), fix: fix.into() }
    }

    pub(super) fn device(error: &io::Error) -> Self {
        Device::of(Some(error)).missing()
    }
}

/// What this host can run, besides SEV guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Support {
    /// SEV-ES guests, or what they need.
    pub es: Result<(), Missing>,
}

/// What was found out about the device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Device {
    Open,
    Absent,
    Denied,
    Broken(String),
}

impl Device {
    fn of(error: Option<&io::Error>) -> Self {
        match error.map(|e| (e.kind(), e)) {
            None => Self::Open,
            Some((io::ErrorKind::NotFound, _)) => Self::Absent,
            Some((io::ErrorKind::PermissionDenied, _)) => Self::Denied,
            Some((_, e)) => Self::Broken(e.to_string()),
        }
    }

    fn missing(&self) -> Missing {
        match self {
            Self::Open | Self::Absent => Missing::new(
                Capability::Sev,
                "there is no /dev/sev",
                "load the ccp module, enable the security processor in the machine's firmware, and look for \"ccp\" in \
                 the kernel's log",
            ),
            Self::Denied => Missing::new(
                Capability::Sev,
                "/dev/sev may not be opened for reading and writing",
                "let the daemon's user open /dev/sev, for example by a udev rule that gives it to a group",
            ),
            Self::Broken(why) => Missing::new(
                Capability::Sev,
                format!("/dev/sev does not open: {why}"),
                "look for \"ccp\" in the kernel's log",
            ),
        }
    }
}

/// What was read of this host.
#[derive(Clone, Debug)]
struct Facts {
    /// CPUID Fn8000_001F: EAX, ECX (ASIDs), EDX (the first for SEV); `None` where the processor has no such
    /// leaf.
    leaf: Option<(u32, u32, u32)>,
    /// Parameters `sev` and `sev_es` of kvm_amd; `None` where that module or parameter is not there.
    sev: Option<bool>,
    es: Option<bool>,
    device: Device,
}

/// Reads this host.
///
/// # Errors
/// What SEV lacks, the first of what has to be there: processor, KVM module, device.
pub fn probe() -> Result<Support, Missing> {
    let parameter = |name| read_parameter(&Path::new(PARAMETERS).join(name));
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE);
    diagnose(&Facts {
        leaf: leaf(),
        sev: parameter("sev"),
        es: parameter("sev_es"),
        device: Device::of(opened.as_ref().err()),
    })
}

fn leaf() -> Option<(u32, u32, u32)> {
    use std::arch::x86_64::__cpuid;
    const LEAF: u32 = 0x8000_001f;
    let highest = __cpuid(0x8000_0000).eax;
    (highest >= LEAF).then(|| __cpuid(LEAF)).map(|r| (r.eax, r.ecx, r.edx))
}

/// A boolean parameter of a module: `Y` or `N`, `1` or `0` before.
fn read_parameter(path: &Path) -> Option<bool> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(matches!(text.trim(), "Y" | "y" | "1"))
}

fn diagnose(facts: &Facts) -> Result<Support, Missing> {
    let no_processor = || {
        Missing::new(
            Capability::Sev,
            "this processor does not offer SEV (CPUID 0x8000001f)",
            "use an AMD EPYC host with SEV enabled in its firmware; inside a virtual machine there is none",
        )
    };
    let (eax, asids, first) = facts.leaf.filter(|(eax, ..)| eax & 0b10 != 0).ok_or_else(no_processor)?;
    match facts.sev {
        Some(true) => {}
        Some(false) => {
            return Err(Missing::new(
                Capability::Sev,
                "KVM was loaded with SEV off, or could not turn it on (/sys/module/kvm_amd/parameters/sev is N)",
                "load kvm_amd with sev=1, and enable SEV, SME and enough ASIDs in the machine's firmware",
            ));
        }
        None => {
            return Err(Missing::new(
                Capability::Sev,
                "the kvm_amd module is not loaded",
                "load kvm_amd with sev=1",
            ));
        }
    }
    if facts.device != Device::Open {
        return Err(facts.device.missing());
    }
    if first > asids {
        return Err(Missing::new(
            Capability::Sev,
            "the machine's firmware gives all ASIDs to SEV-ES",
            "lower the SEV-ES ASID limit in the machine's firmware",
        ));
    }
    Ok(Support { es: diagnose_es(eax, first, facts.es) })
}

fn diagnose_es(eax: u32, first: u32, parameter: Option<bool>) -> Result<(), Missing> {
    if eax & 0b1000 == 0 {
        return Err(Missing::new(
            Capability::SevEs,
            "this processor does not offer SEV-ES (CPUID 0x8000001f)",
            "use an AMD EPYC of the second generation or later",
        ));
    }
    if first <= 1 {
        return Err(Missing::new(
            Capability::SevEs,
            "the machine's firmware gives no ASIDs to SEV-ES",
            "raise the SEV-ES ASID limit in the machine's firmware",
        ));
    }
    if parameter != Some(true) {
        return Err(Missing::new(
            Capability::SevEs,
            "KVM has SEV-ES off (/sys/module/kvm_amd/parameters/sev_es)",
            "load kvm_amd with sev_es=1; it needs MMIO caching (kvm.mmio_caching=1)",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_there() -> Facts {
        Facts { leaf: Some((0b1010, 509, 100)), sev: Some(true), es: Some(true), device: Device::Open }
    }

    #[test]
    fn a_host_with_all_of_it_has_both() {
        assert_eq!(diagnose(&all_there()), Ok(Support { es: Ok(()) }));
    }

    #[test]
    fn each_thing_missing_is_named() {
        let cases: [(Facts, &str); 8] = [
            (Facts { leaf: None, ..all_there() }, "processor"),
            (Facts { leaf: Some((0b1000, 509, 100)), ..all_there() }, "processor"),
            (Facts { sev: None, ..all_there() }, "kvm_amd module"),
            (Facts { sev: Some(false), ..all_there() }, "parameters/sev is N"),
            (Facts { device: Device::Absent, ..all_there() }, "no /dev/sev"),
            (Facts { device: Device::Denied, ..all_there() }, "may not be opened"),
            (Facts { device: Device::Broken("I/O".into()), ..all_there() }, "I/O"),
            (Facts { leaf: Some((0b1010, 99, 100)), ..all_there() }, "all ASIDs to SEV-ES"),
        ];
        for (facts, part) in cases {
            let missing = diagnose(&facts).unwrap_err();
            assert!(missing.what == Capability::Sev && missing.why.contains(part), "{facts:?}: {missing}");
            assert!(!missing.fix.is_empty());
        }
        let es: [(Facts, &str); 4] = [
            (Facts { leaf: Some((0b0010, 509, 100)), ..all_there() }, "processor"),
            (Facts { leaf: Some((0b1010, 509, 1)), ..all_there() }, "no ASIDs"),
            (Facts { es: Some(false), ..all_there() }, "sev_es"),
            (Facts { es: None, ..all_there() }, "sev_es"),
        ];
        for (facts, part) in es {
            let missing = diagnose(&facts).unwrap().es.unwrap_err();
            assert!(missing.what == Capability::SevEs && missing.why.contains(part), "{facts:?}: {missing}");
        }
    }

    #[test]
    fn this_host_gives_an_answer() {
        if let Err(missing) = probe() {
            assert!(missing.what == Capability::Sev && !missing.why.is_empty());
        }
    }

    #[test]
    fn parameters_read_in_both_spellings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sev");
        for (text, value) in [("Y\n", true), ("1\n", true), ("N\n", false), ("0\n", false)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_parameter(&path), Some(value));
        }
        assert_eq!(read_parameter(&dir.path().join("none")), None);
    }
}
