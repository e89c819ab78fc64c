//! A guest's definition as it travels to another host: the document that PREPARE carries and the engine does
//! not read.
//!
//! Owns: its form, versioned and apart from the host's own types, and the reading of it. What is not wholly
//! understood is refused by name: a field that this build would drop makes another guest of it. Must not
//! know: who may come, what is stored.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::addr::Gpa;
use crate::address_space::BlockSpec;
use crate::boot_files::{BootFile, BootFiles};
use crate::guest::Drivers;
use crate::guest::drivers::{NotUnderstood, UnknownDriver};
use crate::host::{DriverSpec, GuestRecord, GuestSpec, Labels};
use crate::memory::Backing;

/// The version that this build writes; it reads no other.
const VERSION: u32 = 1;

/// A guest as another host may define it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::host) struct Definition {
    /// What was asked for, wherever that was.
    pub spec: GuestSpec,
    /// What its driver needs to make the same machine: QEMU's machine type. A guest that was looked at and
    /// not begun to move has none.
    pub machine_type: Option<String>,
    /// What it boots from, where its driver reads files.
    pub boot: Option<BootFiles>,
    /// When it was defined.
    pub created_at: Timestamp,
}

/// Why a document is no definition for this build.
#[derive(Debug, thiserror::Error)]
pub(in crate::host) enum Unread {
    /// No JSON, a field of another type, or one that is missing.
    #[error("the definition cannot be read: {0}")]
    Malformed(#[source] serde_json::Error),
    /// Another version.
    #[error(
        "the definition is of version {0}, this host reads version {VERSION}; run the same build on both hosts"
    )]
    Version(u64),
    /// A driver that this host does not have.
    #[error("/driver/kind: {0}")]
    Driver(#[source] UnknownDriver),
    /// A field that this build does not know.
    #[error("{0}: this host does not know this part of the definition; run the same build on both hosts")]
    Unknown(String),
}

/// Version 1.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    version: u32,
    name: String,
    driver: Value,
    blocks: Vec<BlockForm>,
    backing: Option<Backing>,
    labels: Labels,
    machine_type: Option<String>,
    boot: Option<BootForm>,
    created_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockForm {
    name: String,
    size_bytes: u64,
    gpa: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BootForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kernel: Option<FileForm>,
    initrd: Option<FileForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    firmware: Option<FileForm>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    bytes: u64,
    sha256: [u8; 32],
}

impl Definition {
    /// What another host has to know of a guest.
    pub fn of(record: &GuestRecord, machine_type: Option<String>) -> Self {
        let GuestRecord { spec, boot, created_at, .. } = record;
        Self { spec: spec.clone(), machine_type, boot: *boot, created_at: *created_at }
    }

    /// The document.
    pub fn write(&self) -> Result<String, serde_json::Error> {
        let Self { spec, machine_type, boot, created_at } = self;
        let GuestSpec { name, driver, blocks, backing, labels } = spec;
        let block = |b: &BlockSpec| {
            let BlockSpec { name, size_bytes, gpa } = b;
            BlockForm { name: name.clone(), size_bytes: *size_bytes, gpa: gpa.map(Gpa::get) }
        };
        let file = |f: BootFile| {
            let BootFile { bytes, sha256 } = f;
            FileForm { bytes, sha256 }
        };
        let boot = boot.map(|b| {
            let BootFiles { kernel, initrd, firmware } = b;
            BootForm { kernel: kernel.map(file), initrd: initrd.map(file), firmware: firmware.map(file) }
        });
        serde_json::to_string(&Form {
            version: VERSION,
            name: name.clone(),
            driver: serde_json::to_value(driver)?,
            blocks: blocks.iter().map(block).collect(),
            backing: *backing,
            labels: labels.clone(),
            machine_type: machine_type.clone(),
            boot,
            created_at: *created_at,
        })
    }

    /// Reads a document that came from outside. What the definition says is for others to check.
    pub fn read(text: &str, drivers: &Drivers) -> Result<Self, Unread> {
        // The version first: a later one may have any form.
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        let Version { version } = serde_json::from_str(text).map_err(Unread::Malformed)?;
        if version != u64::from(VERSION) {
            return Err(Unread::Version(version));
        }
        let form: Form = serde_json::from_str(text).map_err(Unread::Malformed)?;
        let block =
            |b: BlockForm| BlockSpec { name: b.name, size_bytes: b.size_bytes, gpa: b.gpa.map(Gpa::new) };
        let file = |f: FileForm| BootFile { bytes: f.bytes, sha256: f.sha256 };
        Ok(Self {
            spec: GuestSpec {
                name: form.name,
                driver: driver(form.driver, drivers)?,
                blocks: form.blocks.into_iter().map(block).collect(),
                backing: form.backing,
                labels: form.labels,
            },
            machine_type: form.machine_type,
            boot: form.boot.map(|b| BootFiles {
                kernel: b.kernel.map(file),
                initrd: b.initrd.map(file),
                firmware: b.firmware.map(file),
            }),
            created_at: form.created_at,
        })
    }
}

/// A driver's part, of which nothing may be lost.
fn driver(form: Value, drivers: &Drivers) -> Result<DriverSpec, Unread> {
    let spec: DriverSpec = serde_json::from_value(form).map_err(Unread::Malformed)?;
    drivers.understood(&spec).map_err(|not| match not {
        NotUnderstood::Driver(unknown) => Unread::Driver(unknown),
        NotUnderstood::Parameters(bad) => Unread::Malformed(bad.source),
        NotUnderstood::Unknown { at, .. } => Unread::Unknown(format!("/driver{at}")),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({
            "version": 1,
            "name": "g1",
            "driver": {
                "kind": "embedded",
                "vcpus": 2,
                "workload": {"fill": "random", "working_set_bytes": 4096, "dirty_bytes_per_second": 7},
            },
            "blocks": [{"name": "ram", "size_bytes": 2 << 20, "gpa": 0}],
            "backing": "memfd",
            "labels": {"a": "b"},
            "machine_type": null,
            "boot": {"kernel": {"bytes": 5, "sha256": vec![7; 32]}, "initrd": null},
            "created_at": "2026-01-02T03:04:05Z",
        })
    }

    fn read(document: &Value) -> Result<Definition, String> {
        Definition::read(&document.to_string(), &Drivers::default()).map_err(|e| e.to_string())
    }

    #[test]
    fn version_1_is_this_document() {
        let read = read(&document()).unwrap();
        let again = read.write().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&again).unwrap(), document());
    }

    #[test]
    fn what_would_be_lost_is_refused_with_its_place() {
        let with = |pointer: &str, value: Value| {
            let mut document = document();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            document.pointer_mut(parent).unwrap()[key] = value;
            read(&document).err()
        };
        assert_eq!(with("/driver/vcpus", json!(3)), None);
        assert_eq!(with("/driver/later", json!(null)), None);
        let refused = |pointer, value| with(pointer, value).unwrap();
        assert!(refused("/driver/disks", json!([1])).starts_with("/driver/disks: "));
        assert!(refused("/driver/workload/pace", json!(1)).starts_with("/driver/workload/pace: "));
        assert!(
            refused("/driver/kind", json!("firecracker"))
                .starts_with("/driver/kind: this host has no driver")
        );
        assert!(refused("/version", json!(2)).contains("version 2"));
        assert!(refused("/colour", json!("red")).contains("colour"));
        assert!(refused("/blocks/0/hot", json!(true)).contains("hot"));
        assert!(refused("/boot/kernel/name", json!("x")).contains("name"));
        assert!(refused("/driver/vcpus", json!("two")).contains("cannot be read"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_definition_or_refused(text in "\\PC{0,300}") {
            proptest::prop_assert!(Definition::read(&text, &Drivers::default()).is_err());
        }
    }
}
