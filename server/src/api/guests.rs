//! Guests on the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::addr::{Gpa, PAGE_SIZE};
use mirrorvm::address_space::BlockSpec;
use mirrorvm::boot_files::BootFile;
use mirrorvm::guest::{Readiness, ReadinessReason};
use mirrorvm::host::{ConsoleChunk, GuestRecord, GuestSpec};
use mirrorvm::memory::Backing;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::driver::{DriverBody, driver_spec};
use super::{Fault, Preview, sha256_text};
use crate::problem::MAX_SAFE_INTEGER;

/// What a guest is to be.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "g1",
    "driver": {"kind": "embedded", "vcpus": 1},
    "memory": {"blocks": [{"name": "ram0", "size_bytes": 268435456, "gpa": 0}]},
    "labels": {}
}))]
pub struct GuestCreate {
    /// Name, unique on the host; not shaped like a UUID.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "g1")]
    pub name: String,
    /// How it runs.
    pub driver: DriverBody,
    /// Its RAM.
    pub memory: MemoryBody,
    /// Free labels: at most 64, keys of 1 to 63 and values of 0 to 255 bytes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A guest's RAM.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Memory)]
#[serde(deny_unknown_fields)]
pub struct MemoryBody {
    /// RAM blocks, in the order of their RAM addresses.
    #[schema(min_items = 1)]
    pub blocks: Vec<BlockBody>,
    /// What it lies on.
    #[serde(default)]
    #[schema(default = "auto")]
    pub backing: BackingBody,
}

/// What RAM lies on. `auto`: the fastest that the host has for the driver (`anonymous`; for `qemu` `hugetlb`
/// when enough reserved huge pages are free, else `memfd`). `ram-blocks` shows what it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Backing)]
#[serde(rename_all = "snake_case")]
pub enum BackingBody {
    /// The host chooses.
    #[default]
    Auto,
    /// Anonymous memory of the daemon on transparent huge pages; not for `qemu`.
    Anonymous,
    /// A memfd, on huge pages where the host gives them to shared memory.
    Memfd,
    /// A memfd on reserved 2 MiB pages.
    Hugetlb,
}

impl Decode for BackingBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(
            node,
            errors,
            &[
                ("auto", Self::Auto),
                ("anonymous", Self::Anonymous),
                ("memfd", Self::Memfd),
                ("hugetlb", Self::Hugetlb),
            ],
        )
    }
}

impl From<BackingBody> for Option<Backing> {
    fn from(body: BackingBody) -> Self {
        match body {
            BackingBody::Auto => None,
            BackingBody::Anonymous => Some(Backing::Anonymous),
            BackingBody::Memfd => Some(Backing::Memfd),
            BackingBody::Hugetlb => Some(Backing::Hugetlb),
        }
    }
}

impl From<Option<Backing>> for BackingBody {
    fn from(backing: Option<Backing>) -> Self {
        match backing {
            None => Self::Auto,
            Some(Backing::Anonymous) => Self::Anonymous,
            Some(Backing::Memfd) => Self::Memfd,
            Some(Backing::Hugetlb) => Self::Hugetlb,
        }
    }
}

/// A RAM block.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MemoryBlock, example = json!({"name": "ram1", "size_bytes": 268435456, "gpa": 4294967296u64}))]
#[serde(deny_unknown_fields)]
pub struct BlockBody {
    /// Name, unique in the guest.
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$", example = "ram0")]
    pub name: String,
    /// Bytes, a multiple of 4 KiB.
    #[schema(minimum = 4096, maximum = 9007199254740991u64, multiple_of = 4096, example = 268435456)]
    pub size_bytes: u64,
    /// Where the guest sees it, a multiple of 4 KiB; null or absent: unplugged.
    #[schema(minimum = 0, maximum = 9007199254740991u64, example = 0)]
    pub gpa: Option<u64>,
}

impl Decode for GuestCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        let driver = f.required("driver");
        let memory = f.required("memory");
        let labels = f.or("labels", BTreeMap::new());
        f.done()?;
        Some(Self { name: name?, driver: driver?, memory: memory?, labels: labels? })
    }
}

/// An administrator's word that an unconfirmed guest is this host's.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"confirm": "g1"}))]
#[serde(deny_unknown_fields)]
pub struct GuestConfirm {
    /// The guest's name: that it is this one, and that the danger is understood.
    #[schema(example = "g1")]
    pub confirm: String,
}

impl Decode for GuestConfirm {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let confirm = f.required("confirm");
        f.done()?;
        Some(Self { confirm: confirm? })
    }
}

impl Decode for MemoryBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let blocks = f.required("blocks");
        let backing = f.or("backing", BackingBody::Auto);
        f.done()?;
        Some(Self { blocks: blocks?, backing: backing? })
    }
}

impl Decode for BlockBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        let size_bytes = f.int("size_bytes", PAGE_SIZE..=MAX_SAFE_INTEGER);
        let gpa = f.optional("gpa");
        f.done()?;
        Some(Self { name: name?, size_bytes: size_bytes?, gpa: gpa? })
    }
}

impl From<BlockBody> for BlockSpec {
    fn from(body: BlockBody) -> Self {
        Self { name: body.name, size_bytes: body.size_bytes, gpa: body.gpa.map(Gpa::new) }
    }
}

impl From<GuestCreate> for GuestSpec {
    fn from(body: GuestCreate) -> Self {
        let ram: u64 = body.memory.blocks.iter().fold(0, |sum, b| sum.saturating_add(b.size_bytes));
        Self {
            name: body.name,
            driver: driver_spec(body.driver, ram),
            blocks: body.memory.blocks.into_iter().map(BlockSpec::from).collect(),
            backing: body.memory.backing.into(),
            labels: body.labels,
        }
    }
}

/// A guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Guest {
    /// UUIDv7.
    pub id: Uuid,
    /// Name, unique on the host.
    #[schema(example = "g1")]
    pub name: String,
    /// How it runs, defaults filled in.
    pub driver: DriverBody,
    /// Its RAM.
    pub memory: GuestMemory,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// `stopped`, `starting`, `running`, `paused`, `stopping`, `incoming`, `in_doubt` or `failed`; more may
    /// come.
    #[schema(example = "running")]
    pub state: &'static str,
    /// Goes up with every change; the ETag in quotes.
    #[schema(example = 3)]
    pub generation: u64,
    /// What the hardware gives it.
    pub protection: Protection,
    /// What it boots from, and nothing else; null for a driver that reads no files.
    pub boot: Option<BootFilesBody>,
    /// Whether the guest says that it can be migrated; null while it has no machine.
    pub migration_readiness: Option<MigrationReadiness>,
    /// The migration that has it now.
    pub migration: Option<Uuid>,
    /// The host that it was handed over to.
    pub moved_to: Option<String>,
    /// Whether the host's state may be older than what its peers know of the guest: a backup was put back. It
    /// is started or migrated when all known peers have said that they do not have it, or an administrator
    /// has confirmed it.
    #[schema(example = false)]
    pub unconfirmed: bool,
    /// Why it failed; of a guest that is `stopped` without having been asked to: what ended it
    /// (`guest_powered_off`, `guest_reset`, `daemon_restarted`; more may come).
    pub error: Option<Fault>,
    /// When it was defined, on whichever host that was; it goes along with migrations.
    pub created_at: Timestamp,
    /// When it last began to run here.
    pub started_at: Option<Timestamp>,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What a guest boots from, as it was when the guest was defined: a start, and a host that it comes to, must
/// have the same.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BootFilesBody {
    /// The kernel.
    pub kernel: BootFileBody,
    /// The initial RAM disk, if there is one.
    pub initrd: Option<BootFileBody>,
}

/// What a file holds.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BootFileBody {
    /// Bytes.
    pub size_bytes: u64,
    /// SHA-256 of them.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub digest: String,
}

impl From<BootFile> for BootFileBody {
    fn from(file: BootFile) -> Self {
        Self { size_bytes: file.bytes, digest: sha256_text(&file.sha256) }
    }
}

/// A guest's RAM with its sum.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestMemory {
    /// Bytes over all blocks, the helper's not counted.
    pub total_bytes: u64,
    /// RAM blocks as they were asked for; `ram-blocks` has them with their RAM addresses.
    pub blocks: Vec<BlockBody>,
    /// What it lies on, as it was asked for.
    pub backing: BackingBody,
}

/// What a guest says of being migrated (MSR_KVM_MIGRATION_CONTROL), and what its helper declared with it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationReadiness {
    /// Whether it can be migrated as far as the guest is concerned.
    pub ready: bool,
    /// `not_encrypted`, `not_yet`, `announced` or `withdrawn`; more may come.
    #[schema(example = "announced")]
    pub reason: &'static str,
    /// The reason as a sentence.
    pub detail: &'static str,
    /// Pieces that its helper declared for the `declared` strategy, frozen since; null: none.
    pub declared_pieces: Option<u64>,
    /// Why its last declaration was not taken.
    pub declaration_refusals: Vec<String>,
}

impl From<Readiness> for MigrationReadiness {
    fn from(r: Readiness) -> Self {
        Self {
            ready: r.ready,
            reason: match r.reason {
                ReadinessReason::NotEncrypted => "not_encrypted",
                ReadinessReason::NotYet => "not_yet",
                ReadinessReason::Announced => "announced",
                ReadinessReason::Withdrawn => "withdrawn",
            },
            detail: r.reason.sentence(),
            declared_pieces: r.declaration.map(|d| d.tuples().len() as u64),
            declaration_refusals: r.refusals.iter().map(ToString::to_string).collect(),
        }
    }
}

/// What the hardware gives a guest, and what that promises.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Protection {
    /// `none`, `modelled`, `sev` or `sev-es`; more may come.
    #[schema(example = "none")]
    pub level: &'static str,
    /// What holds at this level.
    pub promise: &'static str,
}

impl From<GuestRecord> for Guest {
    fn from(record: GuestRecord) -> Self {
        Self::from(&record)
    }
}

impl From<&GuestRecord> for Guest {
    fn from(record: &GuestRecord) -> Self {
        use mirrorvm::host::ProtectionLevel;
        let promise = match record.protection {
            ProtectionLevel::None => {
                "the host can read and write the guest's memory; pages are sealed on the way between hosts"
            }
            ProtectionLevel::Modelled => {
                "a model of SEV in software: memory is ciphertext and wrong keys, bits and addresses read as garbage, but \
                 this process holds the keys; it shows what SEV does and protects nothing"
            }
            ProtectionLevel::Sev => {
                "memory is encrypted by the processor; a passive host cannot read it. Registers are not encrypted, and an \
                 active host can remap memory or read keys from the helper's registers"
            }
            ProtectionLevel::SevEs => {
                "memory and registers are encrypted by the processor; integrity against a host that remaps memory is not \
                 given"
            }
        };
        Self {
            id: record.id,
            name: record.spec.name.clone(),
            driver: record.spec.driver.clone().into(),
            memory: GuestMemory {
                total_bytes: record.layout.ram_bytes(),
                blocks: record
                    .spec
                    .blocks
                    .iter()
                    .map(|b| BlockBody {
                        name: b.name.clone(),
                        size_bytes: b.size_bytes,
                        gpa: b.gpa.map(Gpa::get),
                    })
                    .collect(),
                backing: record.spec.backing.into(),
            },
            labels: record.spec.labels.clone(),
            state: record.state.name(),
            generation: record.generation,
            protection: Protection { level: record.protection.name(), promise },
            boot: record
                .boot
                .map(|b| BootFilesBody { kernel: b.kernel.into(), initrd: b.initrd.map(BootFileBody::from) }),
            migration_readiness: record.readiness.clone().map(MigrationReadiness::from),
            migration: record.migration,
            moved_to: record.moved_to.clone(),
            unconfirmed: record.unconfirmed,
            error: record.error.clone().map(Fault::from),
            created_at: record.created_at,
            started_at: record.started_at,
            preview: None,
        }
    }
}

/// One page of guests.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestList {
    /// Guests by creation.
    pub items: Vec<Guest>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}

/// A piece of console output.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Console {
    /// Offset of the first byte of `data` in everything that the guest ever printed. Above the offset asked
    /// for when older output is no longer kept.
    pub offset: u64,
    /// Offset to ask for next.
    pub next_offset: u64,
    /// Offset after the newest byte there is.
    pub end_offset: u64,
    /// The output; bytes that are not UTF-8 appear as U+FFFD.
    pub data: String,
}

impl From<ConsoleChunk> for Console {
    /// A character that is cut at the chunk's end waits for the next one, so that text read in pieces is the
    /// text read at once.
    fn from(chunk: ConsoleChunk) -> Self {
        let cut = match std::str::from_utf8(&chunk.data) {
            Err(e) if e.error_len().is_none() && e.valid_up_to() > 0 => e.valid_up_to(),
            _ => chunk.data.len(),
        };
        Self {
            offset: chunk.offset,
            next_offset: chunk.offset + cut as u64,
            end_offset: chunk.end,
            data: String::from_utf8_lossy(&chunk.data[..cut]).into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm::host::{DriverSpec, Fill, WorkloadSpec};
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::json::Json;

    use super::*;
    use crate::api::decode::decode;

    fn create(driver: serde_json::Value) -> serde_json::Value {
        json!({"name": "g", "driver": driver, "memory": {"blocks": [{"name": "r", "size_bytes": 8388608, "gpa": 0}]}})
    }

    #[test]
    fn defaults_of_an_embedded_guest() {
        let spec = GuestSpec::from(
            decode::<GuestCreate>(&Json::from(&create(json!({"kind": "embedded"})))).unwrap(),
        );
        let workload = WorkloadSpec {
            fill: Fill::Random,
            working_set_bytes: 2 << 20,
            dirty_bytes_per_second: 16 << 20,
            withdraws_readiness_after_ms: None,
        };
        assert_eq!(spec.driver, DriverSpec::Embedded { vcpus: 1, workload, sev: None });
        assert_eq!(spec.blocks[0].gpa, Some(Gpa::new(0)));
        let back = DriverBody::from(spec.driver.clone());
        assert_eq!(driver_spec(back, 1), spec.driver);
    }

    #[test]
    fn an_emulated_guest_is_encrypted_unless_it_says_no() {
        let sev = |driver: serde_json::Value| {
            let spec = GuestSpec::from(decode::<GuestCreate>(&Json::from(&create(driver))).unwrap());
            assert_eq!(driver_spec(DriverBody::from(spec.driver.clone()), 1), spec.driver);
            spec.driver.sev().map(|s| (s.policy.0, s.es))
        };
        assert_eq!(sev(json!({"kind": "emulated"})), Some((1, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"policy": 0, "es": false}})), Some((1, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"es": true}})), Some((5, true)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"policy": 34}})), Some((34, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": null})), None);
        assert_eq!(sev(json!({"kind": "embedded"})), None);
    }

    #[test]
    fn every_problem_is_named_at_once_with_its_place() {
        let body = json!({
            "driver": {"kind": "qemu", "vcpus": 17, "accel": "xen", "workload": {}},
            "memory": {"blocks": [{"name": 1, "size_bytes": 0, "gpa": -1, "x/y": 1}], "size": 1},
        });
        let errors = decode::<GuestCreate>(&Json::from(&body)).unwrap_err();
        let mut found: Vec<(&str, &str)> =
            errors.iter().map(|e| (e.pointer.as_deref().unwrap(), e.code.as_str())).collect();
        found.sort_unstable();
        let wanted = [
            ("/driver/accel", "unknown_value"),
            ("/driver/kernel", "missing"),
            ("/driver/vcpus", "out_of_range"),
            ("/driver/workload", "unknown_field"),
            ("/memory/blocks/0/gpa", "out_of_range"),
            ("/memory/blocks/0/name", "wrong_type"),
            ("/memory/blocks/0/size_bytes", "out_of_range"),
            ("/memory/blocks/0/x~1y", "unknown_field"),
            ("/memory/size", "unknown_field"),
            ("/name", "missing"),
        ];
        assert_eq!(found, wanted);
    }

    proptest! {
        #[test]
        fn console_text_read_in_pieces_is_the_text_read_at_once(text in "\\PC{0,40}", size in 4usize..9) {
            let (bytes, mut at, mut read) = (text.as_bytes(), 0usize, String::new());
            while at < bytes.len() {
                let data = bytes[at..bytes.len().min(at + size)].to_vec();
                let console = Console::from(ConsoleChunk { offset: at as u64, data, end: bytes.len() as u64 });
                prop_assert!(console.next_offset as usize > at);
                at = console.next_offset as usize;
                read.push_str(&console.data);
            }
            prop_assert_eq!(read, text);
        }
    }
}
