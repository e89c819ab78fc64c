//! The parts of a machine as they are defined: firmware, processor, disks, network interfaces, what else is
//! plugged in.
//!
//! Owns: their fields, each stated once, with its range and its default. Must not know: what of a definition
//! makes no sense together (that is [`super::check`]), nor how QEMU is told (that is [`super::line`]).

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::reading::shape::{Shape, component, object, reference, shape, word};
use crate::reading::{Decode, Errors, Fields, Node};

/// Slots of a machine's root bus that its disks and network interfaces have. Those below are the chipset's
/// and of devices that a machine has one of.
pub const SLOTS: std::ops::RangeInclusive<u8> = 0x08..=0x1e;
/// Ports of a virtual machine's TCP and UDP.
pub const PORTS: std::ops::RangeInclusive<u64> = 1..=65_535;
/// Frames of an interface, bytes without the header: what virtio-net takes.
pub const MTU: std::ops::RangeInclusive<u64> = 68..=65_535;
/// Order in which firmware tries devices.
pub const BOOT_INDEX: std::ops::RangeInclusive<u64> = 0..=255;
/// Limits of a disk: above any device there is.
pub const IO_LIMIT: std::ops::RangeInclusive<u64> = 1..=1 << 40;
/// Sockets, cores of each, threads of each.
pub const TOPOLOGY: std::ops::RangeInclusive<u64> = 1..=255;

/// Where a device is on a machine's PCI: a slot of the root bus and a function of it. On `q35` that of the
/// root port that the device is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// 8 to 30.
    pub slot: u8,
    /// 0 to 7; 0 on a machine `pc`, whose devices take a slot each.
    pub function: u8,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.slot, self.function)
    }
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (slot, function) = text.split_once('.').ok_or(())?;
        let digits =
            |t: &str, len| t.len() == len && t.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !digits(slot, 2) || !digits(function, 1) {
            return Err(());
        }
        let number = |t| u8::from_str_radix(t, 16).map_err(|_| ());
        let (slot, function) = (number(slot)?, number(function)?);
        if SLOTS.contains(&slot) && function < 8 { Ok(Self { slot, function }) } else { Err(()) }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Decode for Place {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let place = text.parse().ok();
        if place.is_none() {
            node.invalid(
                errors,
                "this is no place of a device: two hexadecimal digits from 08 to 1e, a dot, and 0 to 7",
            );
        }
        place
    }
}

impl Shape for Place {
    fn schema() -> Value {
        json!({"type": "string", "pattern": "^(0[89a-f]|1[0-9a-e])\\.[0-7]$"})
    }
}

/// Hardware address of a network interface, of one card alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(())?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| ())?;
        }
        // One that stands for many, or for none, is no card's.
        let usable = parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6];
        if usable { Ok(Self(bytes)) } else { Err(()) }
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Decode for Mac {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let mac = text.parse().ok();
        if mac.is_none() {
            node.invalid(errors, "this is no address of a network card: six pairs of hexadecimal digits with colons, the first even");
        }
        mac
    }
}

impl Shape for Mac {
    fn schema() -> Value {
        json!({"type": "string", "pattern": "^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$"})
    }
}

impl Decode for Ipv4Addr {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let address = String::decode(node, errors)?.parse().ok();
        if address.is_none() {
            node.invalid(errors, "this is no IPv4 address");
        }
        address
    }
}

impl Shape for Ipv4Addr {
    fn schema() -> Value {
        json!({"type": "string", "format": "ipv4"})
    }
}

word! {
    "QemuFormat", "How a file holds a disk's content.":
    pub enum Format {
        /// Byte for byte.
        Raw = "raw",
        /// QEMU's own, which grows as it is written.
        Qcow2 = "qcow2",
    }
}

word! {
    "QemuDiskBus", "What a disk is plugged into.":
    pub enum Bus {
        /// virtio-blk: a PCI device of its own.
        Virtio = "virtio",
        /// A disk of the machine's virtio-scsi controller.
        Scsi = "scsi",
        /// A disk of the machine's AHCI controller.
        Sata = "sata",
    }
}

word! {
    "QemuMedia", "Whether a disk is fixed, or a disc in a drive.":
    pub enum Media {
        /// A fixed disk.
        Disk = "disk",
        /// A disc in a drive, which may be empty; on `scsi` or `sata`.
        Cdrom = "cdrom",
    }
}

word! {
    "QemuCache", "How a disk's writes go through the host's page cache.":
    pub enum Cache {
        /// Past it, so that another host that has the same file sees them.
        None = "none",
        /// Through it; what the guest flushes is on the disk.
        Writeback = "writeback",
        /// Through it, and each write is flushed.
        Writethrough = "writethrough",
        /// Past it, and each write is flushed.
        Directsync = "directsync",
        /// Through it, and what the guest flushes may be lost with the host: for installations alone.
        Unsafe = "unsafe",
    }
}

word! {
    "QemuDiscard", "What becomes of blocks that the guest lets go.":
    pub enum Discard {
        /// They stay.
        Ignore = "ignore",
        /// Their room in the file is given back.
        Unmap = "unmap",
    }
}

word! {
    "QemuOnError", "What happens when the host cannot read or write a disk.":
    pub enum OnError {
        /// The guest is paused, and tries again when it is resumed.
        Pause = "pause",
        /// The guest is told.
        Report = "report",
    }
}

word! {
    "QemuNicModel", "What card a network interface is.":
    pub enum NicModel {
        /// virtio-net.
        Virtio = "virtio",
        /// Intel 82574L.
        E1000e = "e1000e",
    }
}

word! {
    "QemuOnReboot", "What a guest's reboot comes to.":
    pub enum OnReboot {
        /// It boots again.
        Restart = "restart",
        /// It is stopped.
        Stop = "stop",
    }
}

word! {
    "QemuRtc", "What the guest's clock shows.":
    pub enum Rtc {
        /// Universal time.
        Utc = "utc",
        /// The host's local time.
        Localtime = "localtime",
    }
}

word! {
    "QemuProtocol", "Of what a port is.":
    pub enum Protocol {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
    }
}

shape! {
    "QemuCpu", "The processor that a guest sees.":
    pub struct Cpu {
        req model: String = "A model of QEMU's by name (`qemu-system-x86_64 -cpu help` lists them). `max` and `host` are whatever the\nhost has: guests of these move between equal hosts alone.", {"example": "qemu64", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"};
        list features: Vec<String> = "Features that the model is given (`+aes`) or has not (`-svm`).", {"maxItems": 64, "example": ["+aes"], "items": {"type": "string", "pattern": "^[+-][A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}};
    }
}

shape! {
    "QemuTopology", "How a guest's processors are arranged: their numbers multiply to `vcpus`.":
    pub struct Topology {
        or(1)[TOPOLOGY] sockets: u32 = "Sockets.", {};
        or(1)[TOPOLOGY] cores: u32 = "Cores of a socket.", {};
        or(1)[TOPOLOGY] threads: u32 = "Threads of a core.", {};
    }
}

shape! {
    "QemuFirmware", "UEFI firmware.":
    pub struct Firmware {
        req code: String = "Path of the firmware's code, beneath one of the host's image directories.", {"example": "/usr/share/OVMF/OVMF_CODE_4M.fd"};
        req nvram: String = "Path of the guest's own file with the firmware's variables, beneath one of the host's volume directories.\nIt is made from `template` at a start where it is not there.", {"example": "/var/lib/mirrorvm-volumes/g1_VARS.fd"};
        opt template: String = "Path of the variables that a new guest begins with, beneath one of the host's image directories. Of the\nsame size as `nvram`.", {"example": "/usr/share/OVMF/OVMF_VARS_4M.fd"};
        or(false) secure_boot: bool = "Whether the firmware's variables are out of the guest's reach but through the firmware, as secure boot\nneeds: with firmware built for it, on a machine `q35`.", {};
    }
}

shape! {
    "QemuBacking", "The file that a qcow2 file takes what it does not hold from. It is only read.":
    pub struct Backing {
        req path: String = "Its path, beneath one of the host's image or volume directories.", {"example": "/var/lib/mirrorvm-images/debian.qcow2"};
        req format: Format = "How it holds the content.", {};
    }
}

shape! {
    "QemuIoLimits", "How much of a disk a guest may use.":
    pub struct IoLimits {
        opt[IO_LIMIT] bytes_per_second: u64 = "Bytes read and written in a second.", {};
        opt[IO_LIMIT] operations_per_second: u64 = "Reads and writes in a second.", {};
    }
}

shape! {
    "QemuDisk", "A disk of a guest.":
    pub struct Disk {
        req name: String = "Its name, of the guest's disks and interfaces its alone.", {"example": "root", "pattern": "^[a-z][a-z0-9_-]{0,23}$"};
        opt path: String = "The file that it is in, beneath one of the host's volume directories (of one that is only read: image\ndirectories as well). Absent for an empty drive.", {"example": "/var/lib/mirrorvm-volumes/g1.qcow2"};
        or(Format::Qcow2) format: Format = "How the file holds the disk's content. It is never guessed.", {};
        or(Bus::Virtio) bus: Bus = "What it is plugged into.", {};
        or(Media::Disk) media: Media = "Whether it is fixed, or a disc in a drive.", {};
        or(false) read_only: bool = "Whether it is only read. A disc always is.", {};
        opt backing: Backing = "Of a qcow2 file: the file beneath it. A file that names another in its header is refused where that is\nnot given here.", {};
        opt serial: String = "Serial number that the guest reads.", {"pattern": "^[A-Za-z0-9._-]{1,20}$"};
        opt[BOOT_INDEX] boot_index: u32 = "When the firmware tries to boot from it: the lowest first. Absent: as the firmware likes.", {};
        or(Cache::None) cache: Cache = "How its writes go through the host's page cache.", {};
        or(Discard::Unmap) discard: Discard = "What becomes of blocks that the guest lets go.", {};
        or(OnError::Pause) on_error: OnError = "What happens when the host cannot read or write it.", {};
        opt limits: IoLimits = "How much of it the guest may use. Absent: all there is.", {};
        opt address: Place = "Its place on the machine's PCI, of a virtio disk. Absent: the first that is free, which is kept.", {"example": "08.0"};
    }
}

shape! {
    "QemuForward", "A port of the host that leads to one of the guest's.":
    pub struct Forward {
        or(Protocol::Tcp) protocol: Protocol = "Of what the ports are.", {};
        or(Ipv4Addr::LOCALHOST) host_address: Ipv4Addr = "The host's address.", {};
        req[PORTS] host_port: u32 = "The host's port.", {};
        req[PORTS] guest_port: u32 = "The guest's port.", {};
    }
}

/// What a network interface leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Network {
    /// A network of the guest's own behind QEMU's user-mode NAT: out, and in by forwards.
    User {
        /// Ports of the host that lead to the guest.
        forwards: Vec<Forward>,
    },
}

/// Forwards of an interface.
pub const FORWARDS_MAX: usize = 64;

impl Forward {
    /// As QEMU takes it.
    #[must_use]
    pub fn told(&self) -> String {
        let Self { protocol, host_address, host_port, guest_port } = self;
        format!("{}:{host_address}:{host_port}-:{guest_port}", protocol.name())
    }
}

impl Decode for Network {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut fields = Fields::open(node, errors)?;
        fields.kind(&["user"])?;
        let read = fields.or("forwards", Vec::new()).map(|forwards| Self::User { forwards });
        fields.done()?;
        read
    }
}

impl Shape for Network {
    fn schema() -> Value {
        reference("QemuNetwork")
    }

    fn components(list: &mut Vec<(&'static str, Value)>) {
        let variant = |title: &str, about: &str, kind: &str, name: &str, field: Value, required: &[&str]| {
            let properties =
                [("kind".to_owned(), json!({"type": "string", "enum": [kind]})), (name.to_owned(), field)];
            let mut schema = object(about, properties.into_iter().collect(), required);
            schema["title"] = title.into();
            schema
        };
        let forwards = json!({
            "description": "Ports of the host that lead to the guest.",
            "type": "array",
            "items": Forward::schema(),
            "maxItems": FORWARDS_MAX,
        });
        component(list, "QemuNetwork", || {
            json!({
                "description": "What a network interface leads to.",
                "oneOf": [
                    variant("QemuNetworkUser", "A network of the guest's own behind QEMU's NAT in user mode: out to everywhere, in by forwards.", "user", "forwards", forwards, &["kind"]),
                ],
            })
        });
        Forward::components(list);
    }
}

shape! {
    "QemuNic", "A network interface of a guest.":
    pub struct Nic {
        req name: String = "Its name, of the guest's disks and interfaces its alone.", {"example": "lan", "pattern": "^[a-z][a-z0-9_-]{0,23}$"};
        req network: Network = "What it leads to.", {};
        opt mac: Mac = "Its hardware address. Absent: one is made, and kept.", {"example": "52:54:00:12:34:56"};
        or(NicModel::Virtio) model: NicModel = "What card it is.", {};
        opt[MTU] mtu: u32 = "Largest frame that the guest is told of, in bytes without its header; of a virtio card.", {};
        or(true) link: bool = "Whether its cable is plugged in.", {};
        opt address: Place = "Its place on the machine's PCI. Absent: the first that is free, which is kept.", {"example": "09.0"};
    }
}

shape! {
    "QemuCloudInit", "What cloud-init in the guest reads from a disk of its own (NoCloud).":
    pub struct CloudInit {
        req user_data: String = "`user-data`, such as a `#cloud-config`.", {"maxLength": 65536, "example": "#cloud-config\nhostname: g1\n"};
        opt meta_data: String = "`meta-data`, YAML. Absent: the guest's id as `instance-id`, and its name as `local-hostname`.", {"maxLength": 65536};
        opt network_config: String = "`network-config`, YAML. Absent: what the guest's system does by itself.", {"maxLength": 65536};
    }
}

shape! {
    "QemuSmbios", "What the guest reads of its machine (SMBIOS, system information).":
    pub struct Smbios {
        opt manufacturer: String = "Manufacturer.", {"maxLength": 64};
        opt product: String = "Product.", {"maxLength": 64};
        opt version: String = "Version.", {"maxLength": 64};
        opt serial: String = "Serial number.", {"maxLength": 64};
        opt sku: String = "SKU.", {"maxLength": 64};
        opt family: String = "Family.", {"maxLength": 64};
    }
}

shape! {
    "QemuMachine", "A machine: everything of a QEMU guest but its memory and where it runs.":
    pub struct Machine {
        or("pc".to_owned()) machine: String = "Machine type: `pc` or `q35`, for the newest that the host has, or an exact one. Once the guest has been\nstarted it is the exact one that it was started with.", {"pattern": "^[a-z0-9][A-Za-z0-9._-]{0,63}$"};
        opt cpu: Cpu = "The processor that the guest sees. Absent: a model that every host with such processors of the last ten\nyears has, which is kept.", {};
        opt topology: Topology = "How the processors are arranged. Absent: a socket each.", {};
        opt firmware: Firmware = "UEFI firmware. Absent: SeaBIOS.", {};
        list disks: Vec<Disk> = "Disks.", {"maxItems": 16};
        list nics: Vec<Nic> = "Network interfaces.", {"maxItems": 8};
        opt cloud_init: CloudInit = "What cloud-init in the guest reads. Absent: no such disk.", {};
        or(true) rng: bool = "Whether it has a source of random numbers (virtio-rng).", {};
        or(true) guest_agent: bool = "Whether it has a channel to QEMU's guest agent.", {};
        or(true) pvpanic: bool = "Whether it has a device by which the guest's system says that it panicked (pvpanic).", {};
        opt smbios: Smbios = "What the guest reads of its machine.", {};
        or(Rtc::Utc) rtc: Rtc = "What the guest's clock shows when it boots.", {};
        or(OnReboot::Restart) on_reboot: OnReboot = "What the guest's reboot comes to.", {};
    }
}

impl Machine {
    /// What definitions meant that were written before machines could be defined.
    #[must_use]
    pub fn before() -> Self {
        Self {
            machine: "pc".into(),
            cpu: Some(Cpu { model: "max".into(), features: Vec::new() }),
            topology: None,
            firmware: None,
            disks: Vec::new(),
            nics: Vec::new(),
            cloud_init: None,
            rng: false,
            guest_agent: false,
            pvpanic: false,
            smbios: None,
            rtc: Rtc::Utc,
            on_reboot: OnReboot::Stop,
        }
    }
}
