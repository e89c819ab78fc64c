//! The command line that makes QEMU a machine.
//!
//! Owns: every option, each device with an id and a place of its own. QEMU opens nothing by a name of the
//! host's: files are descriptors (`/dev/fdset/N` for those it may have to open anew for writing, as it does
//! when a guest arrives). Formats are said, never probed, and a file beneath another is the one of the
//! definition or none. Must not know: how the process is started.

use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use serde_json::{Value, json};
use uuid::Uuid;

use super::check::Family;
use super::parts::{
    Bus, Cache, Discard, Disk, Format, Machine, Media, Network, Nic, NicModel, OnError, OnReboot, Place, Rtc,
};
use super::passed::{DiskFiles, Passed};
use crate::qemu::accel::Accel;
use crate::qemu::command::MEMORY_UNIT;
use crate::qemu::command::{Arriving, RAM_ID, accel_option};

/// Slots of the root bus of devices that a machine has one of. They never change: guests know their devices
/// by them. 02 is kept for a display.
const RNG: u8 = 0x03;
const CHANNELS: u8 = 0x04;
const SCSI: u8 = 0x06;
/// `pc` alone: `q35` has one in its chipset.
const AHCI: u8 = 0x07;

/// What a command line is made of.
pub(in crate::qemu) struct Line<'a> {
    pub accel: Accel,
    pub machine: &'a Machine,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub append: &'a str,
    pub id: Uuid,
    pub passed: &'a Passed,
    pub qmp: RawFd,
    pub arriving: Option<Arriving>,
}

/// The list as it grows.
#[derive(Default)]
struct List {
    arguments: Vec<String>,
    sets: u32,
}

impl List {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.arguments.extend([option.to_owned(), value.into()]);
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.add(option, value.to_string());
    }

    /// A set of descriptors of one file, under one of which QEMU opens it; gives its name.
    fn set<'f>(&mut self, fds: impl IntoIterator<Item = &'f OwnedFd>) -> String {
        self.sets += 1;
        let set = self.sets;
        for fd in fds {
            self.add("-add-fd", format!("fd={},set={set}", fd.as_raw_fd()));
        }
        format!("/dev/fdset/{set}")
    }
}

fn passed(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

impl Line<'_> {
    /// The arguments.
    pub fn arguments(&self) -> Vec<String> {
        let mut list = List::default();
        let m = self.machine;
        list.add("-name", format!("guest={}", self.id));
        list.add("-uuid", self.id.to_string());
        list.add("-accel", accel_option(self.accel));
        self.firmware(&mut list);
        let ram = json!({
            "qom-type": "memory-backend-file", "id": RAM_ID, "size": self.memory_bytes,
            "mem-path": "/proc/self/fd/0", "share": true, "dump": false, "merge": false,
        });
        list.json("-object", &ram);
        list.add("-machine", self.machine_option());
        if let Some(cpu) = &m.cpu {
            let features = cpu.features.iter().map(|f| {
                let (sign, name) = f.split_at(1);
                format!(",{name}={}", if sign == "+" { "on" } else { "off" })
            });
            list.add("-cpu", std::iter::once(cpu.model.clone()).chain(features).collect::<String>());
        }
        let topology = m.topology.as_ref().map_or_else(String::new, |t| {
            format!(",sockets={},cores={},threads={}", t.sockets, t.cores, t.threads)
        });
        list.add("-smp", format!("cpus={}{topology}", self.vcpus));
        list.add("-m", format!("{}M", self.memory_bytes / MEMORY_UNIT));
        if let Some(kernel) = &self.passed.kernel {
            list.add("-kernel", passed(kernel));
            if let Some(initrd) = &self.passed.initrd {
                list.add("-initrd", passed(initrd));
            }
            list.add("-append", self.append);
        }
        self.smbios(&mut list);
        list.add(
            "-rtc",
            format!(
                "base={},clock=host,driftfix=slew",
                match m.rtc {
                    Rtc::Utc => "utc",
                    Rtc::Localtime => "localtime",
                }
            ),
        );
        list.add("-display", "none");
        list.add("-chardev", "socket,id=console,fd=1");
        list.add("-serial", "chardev:console");
        list.add("-chardev", format!("socket,id=qmp,fd={}", self.qmp));
        list.add("-mon", "chardev=qmp,mode=control");
        self.ports(&mut list);
        self.singles(&mut list);
        for (i, disk) in m.disks.iter().enumerate() {
            self.disk(&mut list, i, disk);
        }
        m.nics.iter().for_each(|nic| self.nic(&mut list, nic));
        list.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        let reboot = match m.on_reboot {
            OnReboot::Restart => "reset",
            OnReboot::Stop => "shutdown",
        };
        list.add("-action", format!("reboot={reboot},panic=shutdown"));
        if self.arriving.is_some() {
            list.add("-incoming", "defer");
        }
        list.arguments.extend(["-nodefaults", "-no-user-config", "-S"].map(str::to_owned));
        list.arguments
    }

    fn machine_option(&self) -> String {
        let m = self.machine;
        let mut option = format!(
            "{},memory-backend={RAM_ID},usb=off,vmport=off,dump-guest-core=off,mem-merge=off",
            m.machine
        );
        if let Some(firmware) = &m.firmware {
            option.push_str(",pflash0=CODE,pflash1=NVRAM");
            if firmware.secure_boot {
                option.push_str(",smm=on");
            }
        }
        option
    }

    fn firmware(&self, list: &mut List) {
        let (Some(code), Some(nvram)) = (&self.passed.code, &self.passed.nvram) else { return };
        if self.machine.firmware.as_ref().is_some_and(|f| f.secure_boot) {
            // Variables are written by the firmware's own code alone, which runs in SMM.
            list.add("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        // Sealed memory: nobody else can have it open for writing, and there is nothing to lock.
        let file = json!({
            "driver": "file", "node-name": "CODE.f", "filename": passed(code), "read-only": true, "locking": "off",
        });
        list.json("-blockdev", &file);
        list.json(
            "-blockdev",
            &json!({"driver": "raw", "node-name": "CODE", "file": "CODE.f", "read-only": true}),
        );
        let set = list.set(nvram.write.iter().chain(&nvram.read));
        list.json(
            "-blockdev",
            &json!({"driver": "file", "node-name": "NVRAM.f", "filename": set, "read-only": false}),
        );
        list.json(
            "-blockdev",
            &json!({"driver": "raw", "node-name": "NVRAM", "file": "NVRAM.f", "read-only": false}),
        );
    }

    fn smbios(&self, list: &mut List) {
        let Some(s) = &self.machine.smbios else { return };
        let fields = [
            ("manufacturer", &s.manufacturer),
            ("product", &s.product),
            ("version", &s.version),
            ("serial", &s.serial),
            ("sku", &s.sku),
            ("family", &s.family),
        ];
        // A comma is part of a value when it is written twice.
        let fields = fields
            .into_iter()
            .filter_map(|(name, text)| Some(format!(",{name}={}", text.as_ref()?.replace(',', ",,"))));
        list.add("-smbios", format!("type=1{}", fields.collect::<String>()));
    }

    fn root(&self) -> &'static str {
        match self.machine.family() {
            Family::Pc => "pci.0",
            Family::Q35 => "pcie.0",
        }
    }

    /// Root ports: eight for each slot of which a device has one, so that a device more needs no new machine.
    fn ports(&self, list: &mut List) {
        let m = self.machine;
        if m.family() != Family::Q35 {
            return;
        }
        let disks = m.disks.iter().filter_map(|d| d.address);
        let mut slots: Vec<u8> =
            disks.chain(m.nics.iter().filter_map(|n| n.address)).map(|p| p.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        for slot in slots {
            for function in 0..8 {
                let place = Place { slot, function };
                list.json("-device", &json!({
                    "driver": "pcie-root-port", "id": format!("port-{place}"), "bus": "pcie.0", "addr": format!("0x{slot:x}.{function}"),
                    "multifunction": function == 0, "chassis": u32::from(slot) * 8 + u32::from(function), "port": u32::from(slot) * 8 + u32::from(function),
                }));
            }
        }
    }

    /// A device of a place: on `pc` in a slot, on `q35` in a root port.
    fn at(&self, place: Option<Place>) -> (String, String) {
        match (self.machine.family(), place) {
            (Family::Q35, Some(place)) => (format!("port-{place}"), "0x0".to_owned()),
            (Family::Pc, Some(place)) => ("pci.0".to_owned(), format!("0x{:x}", place.slot)),
            // Checked before: every device has one.
            (_, None) => (self.root().to_owned(), String::new()),
        }
    }

    fn single(&self, list: &mut List, driver: &str, id: &str, slot: u8) {
        list.json(
            "-device",
            &json!({"driver": driver, "id": id, "bus": self.root(), "addr": format!("0x{slot:x}")}),
        );
    }

    fn singles(&self, list: &mut List) {
        let m = self.machine;
        if m.rng {
            list.json("-object", &json!({"qom-type": "rng-builtin", "id": "entropy"}));
            list.json("-device", &json!({
                "driver": "virtio-rng-pci", "id": "rng", "rng": "entropy", "bus": self.root(), "addr": format!("0x{RNG:x}"),
            }));
        }
        if let Some(agent) = &self.passed.agent {
            self.single(list, "virtio-serial-pci", "channels", CHANNELS);
            list.add("-chardev", format!("socket,id=agent,fd={}", agent.as_raw_fd()));
            list.json("-device", &json!({
                "driver": "virtserialport", "id": "agent-port", "bus": "channels.0", "nr": 1, "chardev": "agent",
                "name": "org.qemu.guest_agent.0",
            }));
        }
        if m.pvpanic {
            list.json("-device", &json!({"driver": "pvpanic", "id": "pvpanic"}));
        }
        if m.disks.iter().any(|d| d.bus == Bus::Scsi) {
            self.single(list, "virtio-scsi-pci", "scsi", SCSI);
        }
        if m.family() == Family::Pc && m.disks.iter().any(|d| d.bus == Bus::Sata) {
            self.single(list, "ahci", "ahci", AHCI);
        }
        if let Some(seed) = &self.passed.seed {
            let file = json!({
                "driver": "file", "node-name": "SEED.f", "filename": passed(seed), "read-only": true, "locking": "off",
            });
            list.json("-blockdev", &file);
            list.json(
                "-blockdev",
                &json!({"driver": "raw", "node-name": "SEED", "file": "SEED.f", "read-only": true}),
            );
            let slot = match m.family() {
                Family::Pc => 0x1f,
                Family::Q35 => 0x07,
            };
            list.json("-device", &json!({
                "driver": "virtio-blk-pci", "id": "seed", "drive": "SEED", "bus": self.root(), "addr": format!("0x{slot:x}"),
            }));
        }
    }

    fn disk(&self, list: &mut List, index: usize, disk: &Disk) {
        let empty = DiskFiles::default();
        let files = self.passed.disks.get(index).unwrap_or(&empty);
        let drive = disk.path.as_ref().map(|_| nodes(list, disk, files));
        let id = format!("disk-{}", disk.name);
        let mut device = json!({"id": id});
        let of_bus = self.machine.disks.iter().take(index).filter(|d| d.bus == disk.bus).count();
        match disk.bus {
            Bus::Virtio => {
                let (bus, addr) = self.at(disk.address);
                merge(&mut device, json!({"driver": "virtio-blk-pci", "bus": bus, "addr": addr}));
            }
            Bus::Scsi => {
                let driver = if disk.media == Media::Cdrom { "scsi-cd" } else { "scsi-hd" };
                merge(
                    &mut device,
                    json!({"driver": driver, "bus": "scsi.0", "channel": 0, "scsi-id": of_bus, "lun": 0}),
                );
            }
            Bus::Sata => {
                let driver = if disk.media == Media::Cdrom { "ide-cd" } else { "ide-hd" };
                let bus = match self.machine.family() {
                    Family::Pc => "ahci",
                    Family::Q35 => "ide",
                };
                merge(&mut device, json!({"driver": driver, "bus": format!("{bus}.{of_bus}"), "unit": 0}));
            }
        }
        if let Some(drive) = drive {
            let writes = matches!(disk.cache, Cache::None | Cache::Writeback | Cache::Unsafe);
            let (werror, rerror) = match disk.on_error {
                OnError::Pause => ("stop", "stop"),
                OnError::Report => ("report", "report"),
            };
            merge(
                &mut device,
                json!({"drive": drive, "write-cache": if writes { "on" } else { "off" }, "werror": werror, "rerror": rerror}),
            );
        }
        if let Some(serial) = &disk.serial {
            merge(&mut device, json!({"serial": serial}));
        }
        if let Some(order) = disk.boot_index {
            merge(&mut device, json!({"bootindex": order}));
        }
        list.json("-device", &device);
    }

    fn nic(&self, list: &mut List, nic: &Nic) {
        let id = format!("nic-{}", nic.name);
        let netdev = match &nic.network {
            // Of a guest that arrives they are asked for when it runs: on one host the source has them until
            // then.
            Network::User { forwards } if self.arriving.is_none() => {
                let forwards: Vec<Value> = forwards.iter().map(|f| json!({"str": f.told()})).collect();
                json!({"type": "user", "id": id, "hostfwd": forwards})
            }
            Network::User { .. } => json!({"type": "user", "id": id}),
        };
        list.json("-netdev", &netdev);
        let driver = match nic.model {
            NicModel::Virtio => "virtio-net-pci",
            NicModel::E1000e => "e1000e",
        };
        let (bus, addr) = self.at(nic.address);
        // Without its ROM, which is a file of the host's and part of the machine's state.
        let mut device =
            json!({"driver": driver, "id": id, "netdev": id, "bus": bus, "addr": addr, "romfile": ""});
        if let Some(mac) = nic.mac {
            merge(&mut device, json!({"mac": mac}));
        }
        if let Some(mtu) = nic.mtu {
            merge(&mut device, json!({"host_mtu": mtu}));
        }
        list.json("-device", &device);
    }
}

/// A disk's nodes; gives the topmost one's name.
fn nodes(list: &mut List, disk: &Disk, files: &DiskFiles) -> String {
    let name = &disk.name;
    let cache = json!({
        "direct": matches!(disk.cache, Cache::None | Cache::Directsync),
        "no-flush": disk.cache == Cache::Unsafe,
    });
    let read_only = !disk.is_written();
    let discard = match disk.discard {
        Discard::Ignore => "ignore",
        Discard::Unmap => "unmap",
    };
    let set = list.set(files.write.iter().chain(&files.read));
    let common = json!({"read-only": read_only, "cache": cache, "discard": discard});
    let mut file =
        json!({"driver": "file", "node-name": format!("{name}.f"), "filename": set, "aio": "threads"});
    merge(&mut file, common.clone());
    list.json("-blockdev", &file);
    let mut node = json!({"driver": disk.format.name(), "node-name": name, "file": format!("{name}.f")});
    merge(&mut node, common);
    if disk.format == Format::Qcow2 {
        let beneath = match (&disk.backing, &files.backing) {
            (Some(backing), Some(fd)) => {
                let set = list.set([fd]);
                let read = json!({"read-only": true, "cache": {"direct": false, "no-flush": false}});
                let mut file = json!({"driver": "file", "node-name": format!("{name}.bf"), "filename": set, "aio": "threads"});
                merge(&mut file, read.clone());
                list.json("-blockdev", &file);
                let mut node = json!({"driver": backing.format.name(), "node-name": format!("{name}.b"), "file": format!("{name}.bf")});
                merge(&mut node, read);
                if backing.format == Format::Qcow2 {
                    merge(&mut node, json!({"backing": null}));
                }
                list.json("-blockdev", &node);
                json!(format!("{name}.b"))
            }
            _ => Value::Null,
        };
        merge(&mut node, json!({"backing": beneath}));
    }
    list.json("-blockdev", &node);
    let Some(limits) = &disk.limits else { return name.clone() };
    let mut rates = json!({});
    if let Some(bytes) = limits.bytes_per_second {
        merge(&mut rates, json!({"bps-total": bytes}));
    }
    if let Some(operations) = limits.operations_per_second {
        merge(&mut rates, json!({"iops-total": operations}));
    }
    list.json(
        "-object",
        &json!({"qom-type": "throttle-group", "id": format!("limit-{name}"), "limits": rates}),
    );
    list.json("-blockdev", &json!({
        "driver": "throttle", "node-name": format!("{name}.t"), "throttle-group": format!("limit-{name}"), "file": name,
        "read-only": read_only,
    }));
    format!("{name}.t")
}

fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}
