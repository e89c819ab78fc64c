//! Guests on the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::addr::{Gpa, PAGE_SIZE};
use mirrorvm::address_space::BlockSpec;
use mirrorvm::boot_files::BootFile;
use mirrorvm::guest::{DriverSpec, Drivers, Readiness, ReadinessReason};
use mirrorvm::host::{ConsoleChunk, GuestRecord, GuestSpec, parts_of_guest};
use mirrorvm::memory::Backing;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::driver::DriverBody;
use super::memory_audit::MemoryAudit;
use super::migrations::Condition;
use super::{Fault, Preview, sha256_text};
use crate::problem::MAX_SAFE_INTEGER;

/// The definition of a new guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "g1",
    "driver": {"kind": "embedded", "vcpus": 1},
    "memory": {"blocks": [{"name": "ram0", "size_bytes": 268435456, "gpa": 0}]},
    "labels": {}
}))]
pub struct GuestCreate {
    /// Name of the guest, unique on the host. It must not look like a UUID.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "g1")]
    pub name: String,
    /// How the guest runs.
    #[schema(value_type = DriverBody)]
    pub driver: DriverSpec,
    /// The guest's RAM.
    pub memory: MemoryBody,
    /// Labels of your choice: at most 64, with keys of 1 to 63 bytes and values of 0 to 255 bytes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// The RAM of a guest, as it is defined.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Memory)]
#[serde(deny_unknown_fields)]
pub struct MemoryBody {
    /// RAM blocks, in the order of their RAM addresses.
    #[schema(min_items = 1)]
    pub blocks: Vec<BlockBody>,
    /// What kind of host memory the RAM lies on.
    #[serde(default)]
    #[schema(default = "auto")]
    pub backing: BackingBody,
}

/// What kind of host memory RAM lies on. `auto` is the fastest that the host has for the driver: `anonymous`,
/// or for `qemu` `hugetlb` when enough reserved huge pages are free and `memfd` otherwise. `ram-blocks` shows
/// what was chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Backing)]
#[serde(rename_all = "snake_case")]
pub enum BackingBody {
    /// Chosen by the host.
    #[default]
    Auto,
    /// Anonymous memory of the daemon on transparent huge pages. Not available for `qemu`.
    Anonymous,
    /// A memfd, on huge pages where the host gives them to shared memory.
    Memfd,
    /// A memfd on reserved pages of 2 MiB.
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

/// A block of RAM, as it is defined.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MemoryBlock, example = json!({"name": "ram1", "size_bytes": 268435456, "gpa": 4294967296u64}))]
#[serde(deny_unknown_fields)]
pub struct BlockBody {
    /// Name of the block, unique within the guest.
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$", example = "ram0")]
    pub name: String,
    /// Length in bytes: a multiple of 4 KiB.
    #[schema(minimum = 4096, maximum = 9007199254740991u64, multiple_of = 4096, example = 268435456)]
    pub size_bytes: u64,
    /// Guest-physical address of its first byte: a multiple of 4 KiB. Null or absent: the block is unplugged.
    #[schema(minimum = 0, maximum = 9007199254740991u64, example = 0)]
    pub gpa: Option<u64>,
}

impl GuestCreate {
    /// Decodes a definition for a daemon with these drivers, noting every problem.
    pub fn decode(node: &Node<'_>, errors: &mut Errors, drivers: &Drivers) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name: Option<String> = f.required("name");
        // What is left out of a driver's part may depend on how much RAM there is.
        let ram = f.ahead::<MemoryBody>("memory").map_or(0, |memory| memory.bytes());
        let driver = f.required_by("driver", |node, errors| drivers.read(node, errors, ram));
        let memory: Option<MemoryBody> = f.required("memory");
        let labels = f.or("labels", BTreeMap::new());
        let done = f.done();
        if !errors.is_empty() {
            // The host will not see it: what could be read is looked at here.
            let blocks = memory
                .as_ref()
                .map(|memory| memory.blocks.iter().cloned().map(BlockSpec::from).collect::<Vec<_>>());
            let backing = memory.as_ref().and_then(|memory| memory.backing.into());
            errors.extend(parts_of_guest(name.as_deref(), labels.as_ref(), blocks.as_deref(), backing));
        }
        done?;
        Some(Self { name: name?, driver: driver?, memory: memory?, labels: labels? })
    }
}

/// An administrator's word that an unconfirmed guest belongs to this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"confirm": "g1"}))]
#[serde(deny_unknown_fields)]
pub struct GuestConfirm {
    /// The guest's name, to confirm which guest is meant and that the danger is understood.
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

impl MemoryBody {
    /// Bytes of all blocks.
    fn bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.size_bytes).fold(0, u64::saturating_add)
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
        Self {
            name: body.name,
            driver: body.driver,
            blocks: body.memory.blocks.into_iter().map(BlockSpec::from).collect(),
            backing: body.memory.backing.into(),
            labels: body.labels,
        }
    }
}

/// A guest of this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Guest {
    /// Id, a UUIDv7.
    pub id: Uuid,
    /// Name of the guest, unique on the host.
    #[schema(example = "g1")]
    pub name: String,
    /// How the guest runs, with defaults filled in.
    pub driver: DriverBody,
    /// The guest's RAM.
    pub memory: GuestMemory,
    /// Labels of your choice.
    pub labels: BTreeMap<String, String>,
    /// State of the guest: `stopped`, `starting`, `running`, `paused`, `stopping`, `incoming`, `in_doubt` or
    /// `failed`. More states may be added.
    #[schema(example = "running")]
    pub state: &'static str,
    /// Rises with every change. The `ETag` header has it in quotes.
    #[schema(example = 3)]
    pub generation: u64,
    /// What the hardware protects of this guest.
    pub protection: Protection,
    /// The kernel that the guest boots, and its initial RAM disk. Null for a guest that boots from a disk,
    /// and for drivers that read no files.
    pub boot: Option<BootFilesBody>,
    /// The code of the firmware that the guest boots, as it was when the guest was defined. Null: QEMU's own.
    pub boot_firmware: Option<BootFileBody>,
    /// Whether the guest says that it can be migrated. Null while it has no machine.
    pub migration_readiness: Option<MigrationReadiness>,
    /// Id of the migration that has the guest at the moment.
    pub migration: Option<Uuid>,
    /// Name of the host that the guest was handed over to.
    pub moved_to: Option<String>,
    /// Whether this host's state may be older than what its peers know of the guest, because a backup was put
    /// back. Such a guest cannot be started or migrated until all known peers have said that they do not have
    /// it, or an administrator has confirmed it.
    #[schema(example = false)]
    pub unconfirmed: bool,
    /// What is known of whether the guest's memory crossed as it was, in the migration that brought it here
    /// or took it away. Null: it did not migrate since it last started here, or there was no audit.
    pub audit: Option<MemoryAudit>,
    /// Statements about the guest: `MemoryProven` after a migration with an audit.
    pub conditions: Vec<Condition>,
    /// Why the guest failed. For a guest that is `stopped` without having been asked to stop: what ended it,
    /// such as `guest_powered_off`, `guest_reset` or `daemon_restarted`.
    pub error: Option<Fault>,
    /// When the guest was defined, on whichever host that was. It keeps this date when it migrates.
    #[serde(serialize_with = "super::time::to_ms")]
    pub created_at: Timestamp,
    /// When the guest last began to run on this host.
    #[serde(serialize_with = "super::time::to_ms_or_null")]
    pub started_at: Option<Timestamp>,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// The files that a guest boots from, as they were when it was defined. A start, and a host that the guest
/// migrates to, must have the same content.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BootFilesBody {
    /// The kernel image.
    pub kernel: BootFileBody,
    /// The initial RAM disk. Null when there is none.
    pub initrd: Option<BootFileBody>,
}

/// Size and digest of a file.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BootFileBody {
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the file's content.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub digest: String,
}

impl From<BootFile> for BootFileBody {
    fn from(file: BootFile) -> Self {
        Self { size_bytes: file.bytes, digest: sha256_text(&file.sha256) }
    }
}

/// The RAM of a guest, with its total.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestMemory {
    /// Bytes of all blocks together, without the helper's block.
    pub total_bytes: u64,
    /// RAM blocks as they were defined. `ram-blocks` lists them with their RAM addresses.
    pub blocks: Vec<BlockBody>,
    /// What kind of host memory was asked for.
    pub backing: BackingBody,
}

/// Whether a guest says that it can be migrated (MSR_KVM_MIGRATION_CONTROL), and what its helper has
/// declared.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationReadiness {
    /// Whether the guest can be migrated, as far as it is itself concerned.
    pub ready: bool,
    /// Why: `not_encrypted`, `not_yet`, `announced` or `withdrawn`. More reasons may be added.
    #[schema(example = "announced")]
    pub reason: &'static str,
    /// The reason, as a sentence.
    pub detail: &'static str,
    /// How many pieces of memory its helper has declared for the strategy `declared`; they cannot change any
    /// more. Null: none.
    pub declared_pieces: Option<u64>,
    /// Why its last declaration was refused.
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

/// What the hardware protects of a guest, and what that promises.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Protection {
    /// Protection level: `none`, `modelled`, `sev` or `sev-es`. More levels may be added.
    #[schema(example = "none")]
    pub level: &'static str,
    /// What holds at this level, in a sentence.
    pub promise: &'static str,
    /// Whether the guest's helper lets pages leave only for a destination whose evidence it has checked:
    /// `demanded` or `not_demanded`, as the driver's `sev.attestation` says.
    #[schema(example = "not_demanded")]
    pub evidence: &'static str,
}

impl Guest {
    /// A guest of a daemon with these drivers.
    pub fn of(record: &GuestRecord, drivers: &Drivers) -> Self {
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
                 active host can remap memory or read keys from the helper's registers. What a host puts back of the \
                 helper's memory between two requests makes no key be used twice; in the midst of one it does, which \
                 migrations with the suite `aes-256-gcm-siv` bear"
            }
            ProtectionLevel::SevEs => {
                "memory and registers are encrypted by the processor; integrity against a host that remaps memory is not \
                 given. What a host puts back of the helper's memory between two requests makes no key be used twice; \
                 memory and save area together, in the midst of one request, do, which migrations with the suite \
                 `aes-256-gcm-siv` bear"
            }
        };
        let demands = drivers.facts(&record.spec.driver).demands_evidence();
        let evidence = if demands { "demanded" } else { "not_demanded" };
        let audit = record.audit.clone().map(|of| MemoryAudit::new(of.migration, of.audit));
        Self {
            id: record.id,
            name: record.spec.name.clone(),
            driver: DriverBody::shown(&record.spec.driver, drivers),
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
            protection: Protection { level: record.protection.name(), promise, evidence },
            boot: record.boot.and_then(|b| {
                Some(BootFilesBody { kernel: b.kernel?.into(), initrd: b.initrd.map(BootFileBody::from) })
            }),
            boot_firmware: record.boot.and_then(|b| b.firmware).map(BootFileBody::from),
            migration_readiness: record.readiness.clone().map(MigrationReadiness::from),
            migration: record.migration,
            moved_to: record.moved_to.clone(),
            unconfirmed: record.unconfirmed,
            conditions: audit.iter().map(MemoryAudit::condition).collect(),
            audit,
            error: record.error.clone().map(Fault::from),
            created_at: record.created_at,
            started_at: record.started_at,
            preview: None,
        }
    }
}

/// One page of a list of guests.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestList {
    /// Guests, in the order in which they were defined unless asked for otherwise.
    pub items: Vec<Guest>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
    /// Follow `/v1/events` after it to learn what changes from here on: everything before it is in the list
    /// already. Of a list in several pages, that of the first counts.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub events_cursor: String,
}

/// A piece of a guest's console output.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Console {
    /// Offset of the first byte of `data`, counted over everything that the guest ever printed. It is larger
    /// than the offset that was asked for when older output is no longer kept.
    pub offset: u64,
    /// Offset to ask for next.
    pub next_offset: u64,
    /// Offset behind the newest byte that there is.
    pub end_offset: u64,
    /// The output. Bytes that are not UTF-8 appear as U+FFFD.
    pub data: String,
}

impl From<ConsoleChunk> for Console {
    /// Leaves a character that is cut at the end of the chunk to the next one, so that text read in pieces is
    /// the same as text read at once.
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
    use mirrorvm::host::{EmbeddedDriver, Fill, WorkloadGuest, WorkloadSpec};
    use proptest::prelude::*;
    use serde_json::json;

    use mirrorvm::reading::{FieldError, Json, decode_by};

    use super::*;

    fn create(driver: serde_json::Value) -> serde_json::Value {
        json!({"name": "g", "driver": driver, "memory": {"blocks": [{"name": "r", "size_bytes": 8388608, "gpa": 0}]}})
    }

    fn decoded(body: &serde_json::Value) -> Result<GuestSpec, Vec<FieldError>> {
        let drivers = Drivers::default();
        let by = |node: &Node<'_>, errors: &mut Errors| GuestCreate::decode(node, errors, &drivers);
        decode_by(&Json::from(body), by).map(GuestSpec::from)
    }

    /// The same guest, defined as an answer shows it.
    fn shown_and_defined_again(spec: &GuestSpec) -> GuestSpec {
        let shown = serde_json::to_value(DriverBody::shown(&spec.driver, &Drivers::default())).unwrap();
        decoded(&create(shown)).unwrap()
    }

    #[test]
    fn defaults_of_an_embedded_guest() {
        let spec = decoded(&create(json!({"kind": "embedded"}))).unwrap();
        let workload = WorkloadSpec {
            fill: Fill::Random,
            working_set_bytes: 2 << 20,
            dirty_bytes_per_second: 16 << 20,
            withdraws_readiness_after_ms: None,
        };
        assert_eq!(spec.driver, EmbeddedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }));
        assert_eq!(spec.blocks[0].gpa, Some(Gpa::new(0)));
        assert_eq!(shown_and_defined_again(&spec), spec);
    }

    #[test]
    fn an_emulated_guest_is_encrypted_unless_it_says_no() {
        let sev = |driver: serde_json::Value| {
            let spec = decoded(&create(driver)).unwrap();
            assert_eq!(shown_and_defined_again(&spec), spec);
            Drivers::default().facts(&spec.driver).sev.map(|s| (s.policy.0, s.es))
        };
        assert_eq!(sev(json!({"kind": "emulated"})), Some((1, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"policy": 0, "es": false}})), Some((1, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"es": true}})), Some((5, true)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": {"policy": 34}})), Some((34, false)));
        assert_eq!(sev(json!({"kind": "emulated", "sev": null})), None);
        assert_eq!(sev(json!({"kind": "embedded"})), None);
    }

    #[test]
    fn a_qemu_guest_is_shown_as_it_was_asked_for_with_its_defaults() {
        let spec = decoded(&create(json!({"kind": "qemu", "kernel": "/k"}))).unwrap();
        let shown = serde_json::to_value(DriverBody::shown(&spec.driver, &Drivers::default())).unwrap();
        let cpu = json!({"model": "qemu64",
            "features": ["+aes", "+cx16", "+lahf-lm", "+popcnt", "+sse4.1", "+sse4.2", "+ssse3"]});
        let all = json!({
            "kind": "qemu", "vcpus": 1, "kernel": "/k", "initrd": null, "append": "", "accel": "auto",
            "machine": "pc", "cpu": cpu, "disks": [], "nics": [], "rng": true, "guest_agent": true,
            "pvpanic": true, "rtc": "utc", "on_reboot": "restart",
        });
        assert_eq!(shown, all);
        assert_eq!(shown_and_defined_again(&spec), spec);
    }

    #[test]
    fn every_problem_is_named_at_once_with_its_place() {
        let body = json!({
            "driver": {"kind": "qemu", "vcpus": 17, "accel": "xen", "workload": {}},
            "memory": {"blocks": [{"name": 1, "size_bytes": 0, "gpa": -1, "x/y": 1}], "size": 1},
        });
        let errors = decoded(&body).unwrap_err();
        let mut found: Vec<(&str, &str)> = errors.iter().map(|e| (e.pointer.as_str(), e.code)).collect();
        found.sort_unstable();
        let wanted = [
            ("/driver/accel", "unknown_value"),
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
