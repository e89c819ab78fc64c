//! What of a machine's definition cannot be, and filling in what was left out.
//!
//! Owns: both, as pure functions. Must not know: files, other guests, what this host has.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::parts::{
    BOOT_INDEX, Bus, Cpu, Disk, FORWARDS_MAX, Format, IO_LIMIT, MTU, Mac, Machine, Media, Network, Nic,
    NicModel, PORTS, Place, SLOTS, TOPOLOGY,
};
use crate::qemu::accel::Accel;
use crate::reading::FieldError;

/// Disks at most, and interfaces: each may take a slot of a machine `pc`.
const DISKS_MAX: usize = 16;
const NICS_MAX: usize = 8;
/// Disks that the AHCI controller has ports for.
const SATA_MAX: usize = 6;
/// Bytes of each of cloud-init's documents.
const DOCUMENT_MAX: usize = 64 << 10;
/// Bytes of each of SMBIOS's texts.
const SMBIOS_MAX: usize = 64;
/// Features of a processor that are named.
const FEATURES_MAX: usize = 64;
/// The vendor's part of hardware addresses that are made here: what QEMU and KVM have.
const VENDOR: [u8; 3] = [0x52, 0x54, 0x00];

/// Chipsets. A machine type is one of a family's versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// i440FX: one PCI bus.
    Pc,
    /// Q35: PCI Express; a device is plugged into a root port.
    Q35,
}

impl Family {
    /// By a machine type's name; `None`: no machine that can be defined here.
    #[must_use]
    pub fn of(machine: &str) -> Option<Self> {
        let versioned = |family: &str| machine.strip_prefix(family).is_some_and(|v| v.starts_with('-'));
        if machine == "q35" || versioned("pc-q35") {
            Some(Self::Q35)
        } else if machine == "pc" || versioned("pc-i440fx") {
            Some(Self::Pc)
        } else {
            None
        }
    }

    /// Places that devices can have, in the order in which they get them.
    pub fn places(self) -> impl Iterator<Item = Place> {
        let functions = match self {
            Self::Pc => 0..1,
            Self::Q35 => 0..8,
        };
        SLOTS.flat_map(move |slot| functions.clone().map(move |function| Place { slot, function }))
    }

    fn has(self, place: Place) -> bool {
        self == Self::Q35 || place.function == 0
    }
}

/// The processor of a guest that asks for none: what `x86-64-v2` has and AES, which all processors of the
/// last ten years have, and which QEMU's translator has, too.
#[must_use]
pub fn default_cpu(accel: Accel) -> Cpu {
    let features = ["+aes", "+cx16", "+lahf-lm", "+popcnt", "+sse4.1", "+sse4.2", "+ssse3"];
    // The translator has all of them and runs a named model at the same speed as `max`.
    let (Accel::Kvm | Accel::Tcg) = accel;
    Cpu { model: "qemu64".into(), features: features.map(str::to_owned).to_vec() }
}

impl Disk {
    /// Whether QEMU may write to it.
    #[must_use]
    pub fn is_written(&self) -> bool {
        !self.read_only && self.media == Media::Disk
    }

    /// Whether it takes a place of its own on the machine's PCI.
    #[must_use]
    pub fn has_place(&self) -> bool {
        self.bus == Bus::Virtio
    }
}

impl Machine {
    /// The chipset; of a machine that cannot be defined, `pc`'s.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(&self.machine).unwrap_or(Family::Pc)
    }

    /// Everything that has a place, with where in the definition it is said, and the place.
    fn placed(&self) -> impl Iterator<Item = (String, Option<Place>)> {
        let disks = self.disks.iter().enumerate().filter(|(_, d)| d.has_place());
        let disks = disks.map(|(i, d)| (format!("/driver/disks/{i}/address"), d.address));
        disks.chain(
            self.nics.iter().enumerate().map(|(i, n)| (format!("/driver/nics/{i}/address"), n.address)),
        )
    }

    /// The same with everything that was left out and is to stay the same from now on: the processor, places,
    /// hardware addresses, of which `mac` makes the last three bytes. What is there is kept, so that a second
    /// call changes nothing. Where there is no place any more, a device has none, which [`Machine::check`]
    /// notes.
    #[must_use]
    pub fn settled(mut self, accel: Accel, mut mac: impl FnMut() -> [u8; 3]) -> Self {
        self.cpu.get_or_insert_with(|| default_cpu(accel));
        let mut taken: Vec<Place> = self.placed().filter_map(|(_, place)| place).collect();
        let family = self.family();
        let mut next = || {
            let free = family.places().find(|place| !taken.contains(place));
            taken.extend(free);
            free
        };
        for disk in self.disks.iter_mut().filter(|d| d.has_place()) {
            disk.address = disk.address.or_else(&mut next);
        }
        for nic in &mut self.nics {
            nic.address = nic.address.or_else(&mut next);
            let made = || {
                let ([a, b, c], [d, e, f]) = (VENDOR, mac());
                Mac([a, b, c, d, e, f])
            };
            nic.mac.get_or_insert_with(made);
        }
        self
    }

    /// Notes everything that cannot be, by pointers from the top of a guest's definition.
    pub fn check(&self, vcpus: u32, kernel: bool, errors: &mut Vec<FieldError>) {
        let mut bad =
            |at: String, code: &'static str, detail: String| errors.push(FieldError::new(at, code, detail));
        let of_driver = |at: &str| format!("/driver/{at}");
        if Family::of(&self.machine).is_none() {
            let detail = format!(
                "\"{}\" is neither pc nor q35, nor a version of one (pc-i440fx-7.2, pc-q35-7.2)",
                shown(&self.machine)
            );
            bad(of_driver("machine"), "unknown_value", detail);
        } else if !is_name(&self.machine) {
            bad(of_driver("machine"), "invalid_format", "this is no name of a machine type".into());
        }
        self.check_cpu(vcpus, &mut bad);
        if let Some(firmware) = &self.firmware
            && firmware.secure_boot
            && self.family() != Family::Q35
        {
            bad(of_driver("firmware/secure_boot"), "impossible", "secure boot needs a machine q35".into());
        }
        self.check_disks(kernel, &mut bad);
        self.check_nics(&mut bad);
        let names = self.disks.iter().enumerate().map(|(i, d)| (format!("disks/{i}"), d.name.as_str()));
        let names =
            names.chain(self.nics.iter().enumerate().map(|(i, n)| (format!("nics/{i}"), n.name.as_str())));
        let mut seen = BTreeMap::new();
        for (at, name) in names {
            if !is_device_name(name) {
                let rule = "a lower-case letter, and up to 23 more of them, digits, - and _";
                bad(
                    of_driver(&format!("{at}/name")),
                    "invalid_name",
                    format!("\"{}\" is no name: {rule}", shown(name)),
                );
            } else if let Some(first) = seen.insert(name, at.clone()) {
                bad(
                    of_driver(&format!("{at}/name")),
                    "duplicate_name",
                    format!("{name} is the name of {first} as well"),
                );
            }
        }
        self.check_places(&mut bad);
        let documents = self.cloud_init.iter().flat_map(|c| {
            let given = [
                ("user_data", Some(&c.user_data)),
                ("meta_data", c.meta_data.as_ref()),
                ("network_config", c.network_config.as_ref()),
            ];
            given.into_iter().filter_map(|(name, text)| Some((name, text?.len())))
        });
        for (name, bytes) in documents.filter(|(_, bytes)| *bytes > DOCUMENT_MAX) {
            bad(
                of_driver(&format!("cloud_init/{name}")),
                "out_of_range",
                format!("{bytes} bytes are given, and there are at most {DOCUMENT_MAX}"),
            );
        }
        let smbios = self.smbios.iter().flat_map(|s| {
            [
                ("manufacturer", &s.manufacturer),
                ("product", &s.product),
                ("version", &s.version),
                ("serial", &s.serial),
                ("sku", &s.sku),
                ("family", &s.family),
            ]
        });
        for (name, text) in smbios.filter_map(|(name, text)| Some((name, text.as_ref()?))) {
            if text.is_empty() || text.len() > SMBIOS_MAX || !text.bytes().all(|b| (0x20..0x7f).contains(&b))
            {
                bad(
                    of_driver(&format!("smbios/{name}")),
                    "invalid_format",
                    format!("1 to {SMBIOS_MAX} printable ASCII characters make such a text"),
                );
            }
        }
    }

    fn check_cpu(&self, vcpus: u32, bad: &mut impl FnMut(String, &'static str, String)) {
        if let Some(cpu) = &self.cpu {
            if !is_name(&cpu.model) {
                bad(
                    "/driver/cpu/model".into(),
                    "invalid_format",
                    format!("\"{}\" is no name of a model", shown(&cpu.model)),
                );
            }
            if cpu.features.len() > FEATURES_MAX {
                bad(
                    "/driver/cpu/features".into(),
                    "out_of_range",
                    format!(
                        "{} features are named, and there are at most {FEATURES_MAX}",
                        cpu.features.len()
                    ),
                );
            }
            for (i, feature) in cpu.features.iter().take(FEATURES_MAX).enumerate() {
                if !feature.strip_prefix(['+', '-']).is_some_and(is_name) {
                    bad(
                        format!("/driver/cpu/features/{i}"),
                        "invalid_format",
                        format!("\"{}\" is no feature: + or -, and its name", shown(feature)),
                    );
                }
            }
        }
        if let Some(t) = &self.topology {
            for (name, value) in [("sockets", t.sockets), ("cores", t.cores), ("threads", t.threads)] {
                range(&format!("topology/{name}"), value, &TOPOLOGY, bad);
            }
            let product =
                u64::from(t.sockets).saturating_mul(t.cores.into()).saturating_mul(t.threads.into());
            if product != u64::from(vcpus) {
                bad(
                    "/driver/topology".into(),
                    "impossible",
                    format!("its numbers multiply to {product}, and vcpus is {vcpus}"),
                );
            }
        }
    }

    fn check_disks(&self, kernel: bool, bad: &mut impl FnMut(String, &'static str, String)) {
        if self.disks.len() > DISKS_MAX {
            bad(
                "/driver/disks".into(),
                "out_of_range",
                format!("{} disks are given, and there are at most {DISKS_MAX}", self.disks.len()),
            );
        }
        if !kernel && self.disks.is_empty() && self.nics.is_empty() {
            bad(
                "/driver/kernel".into(),
                "missing",
                "a guest boots from a kernel or from a disk: neither is given".into(),
            );
        }
        if self.disks.iter().filter(|d| d.bus == Bus::Sata).count() > SATA_MAX {
            bad(
                "/driver/disks".into(),
                "out_of_range",
                format!("the machine's AHCI controller has {SATA_MAX} ports"),
            );
        }
        let mut order = BTreeMap::new();
        for (i, disk) in self.disks.iter().enumerate() {
            let at = |field: &str| format!("/driver/disks/{i}/{field}");
            if disk.path.is_none() && disk.media == Media::Disk {
                bad(at("path"), "missing", "a fixed disk is in a file".into());
            }
            if disk.media == Media::Cdrom && disk.bus == Bus::Virtio {
                bad(at("bus"), "impossible", "there are no virtio drives: a drive is on scsi or sata".into());
            }
            if disk.backing.is_some() && disk.format != Format::Qcow2 {
                bad(at("backing"), "impossible", "only qcow2 files have another beneath them".into());
            }
            if disk.address.is_some() && !disk.has_place() {
                bad(at("address"), "impossible", "a disk of a controller has no place of its own".into());
            }
            if disk.path.is_some()
                && disk.backing.as_ref().is_some_and(|b| Some(&b.path) == disk.path.as_ref())
            {
                bad(at("backing/path"), "impossible", "a file cannot lie beneath itself".into());
            }
            if disk.serial.as_ref().is_some_and(|s| s.len() > 20 || !is_name(s)) {
                bad(
                    at("serial"),
                    "invalid_format",
                    "1 to 20 letters, digits, - _ and . make a serial number".into(),
                );
            }
            if let Some(index) = disk.boot_index {
                range(&format!("disks/{i}/boot_index"), index, &BOOT_INDEX, bad);
                if let Some(first) = order.insert(index, i) {
                    bad(at("boot_index"), "duplicate", format!("disks/{first} has {index} as well"));
                }
            }
            if let Some(limits) = &disk.limits {
                for (name, limit) in [
                    ("bytes_per_second", limits.bytes_per_second),
                    ("operations_per_second", limits.operations_per_second),
                ] {
                    if let Some(limit) = limit {
                        range(&format!("disks/{i}/limits/{name}"), limit, &IO_LIMIT, bad);
                    }
                }
            }
        }
        let mut paths = BTreeMap::new();
        for (i, disk) in self.disks.iter().enumerate().filter(|(_, d)| d.is_written()) {
            let Some(path) = &disk.path else { continue };
            if let Some(first) = paths.insert(path, i) {
                bad(
                    format!("/driver/disks/{i}/path"),
                    "duplicate",
                    format!("disks/{first} is in the same file"),
                );
            }
        }
    }

    fn check_nics(&self, bad: &mut impl FnMut(String, &'static str, String)) {
        if self.nics.len() > NICS_MAX {
            bad(
                "/driver/nics".into(),
                "out_of_range",
                format!("{} interfaces are given, and there are at most {NICS_MAX}", self.nics.len()),
            );
        }
        let (mut macs, mut ports) = (BTreeMap::new(), BTreeMap::new());
        for (i, Nic { network, mac, model, mtu, .. }) in self.nics.iter().enumerate() {
            let at = |field: &str| format!("/driver/nics/{i}/{field}");
            if let Some(mac) = mac
                && let Some(first) = macs.insert(mac, i)
            {
                bad(at("mac"), "duplicate", format!("nics/{first} has {mac} as well"));
            }
            if let Some(mtu) = mtu {
                range(&format!("nics/{i}/mtu"), *mtu, &MTU, bad);
                if *model != NicModel::Virtio {
                    bad(at("mtu"), "impossible", "only virtio cards tell the guest of it".into());
                }
            }
            match network {
                Network::User { forwards } => {
                    if forwards.len() > FORWARDS_MAX {
                        bad(
                            at("network/forwards"),
                            "out_of_range",
                            format!(
                                "{} forwards are given, and there are at most {FORWARDS_MAX}",
                                forwards.len()
                            ),
                        );
                    }
                    for (j, forward) in forwards.iter().enumerate() {
                        range(
                            &format!("nics/{i}/network/forwards/{j}/host_port"),
                            forward.host_port,
                            &PORTS,
                            bad,
                        );
                        range(
                            &format!("nics/{i}/network/forwards/{j}/guest_port"),
                            forward.guest_port,
                            &PORTS,
                            bad,
                        );
                        let port = (forward.protocol.name(), forward.host_address, forward.host_port);
                        if let Some((i, k)) = ports.insert(port, (i, j)) {
                            bad(
                                at(&format!("network/forwards/{j}/host_port")),
                                "duplicate",
                                format!("nics/{i}/network/forwards/{k} has it as well"),
                            );
                        }
                    }
                }
            }
        }
    }

    fn check_places(&self, bad: &mut impl FnMut(String, &'static str, String)) {
        let family = self.family();
        let mut seen: BTreeMap<Place, String> = BTreeMap::new();
        for (at, place) in self.placed() {
            let Some(place) = place else {
                bad(at, "out_of_range", "there is no place left on the machine's PCI".into());
                continue;
            };
            if !family.has(place) {
                bad(
                    at.clone(),
                    "impossible",
                    format!("{place} is no place on a machine pc, whose devices have function 0"),
                );
            }
            if let Some(first) = seen.insert(place, at.clone()) {
                bad(at, "duplicate", format!("{first} is at {place} as well"));
            }
        }
    }
}

fn range<T: Into<u64> + Copy + Display>(
    at: &str,
    value: T,
    bound: &std::ops::RangeInclusive<u64>,
    bad: &mut impl FnMut(String, &'static str, String),
) {
    if !bound.contains(&value.into()) {
        bad(
            format!("/driver/{at}"),
            "out_of_range",
            format!("{value} is not between {} and {}", bound.start(), bound.end()),
        );
    }
}

/// Whether a text is a name that QEMU could know, without anything that means something on its command line.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(allowed) && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// Whether a text names a device: part of its id in QEMU.
fn is_device_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    (1..=24).contains(&text.len()) && text.bytes().all(allowed) && text.as_bytes()[0].is_ascii_lowercase()
}

fn shown(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}
