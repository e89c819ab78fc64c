//! Guests on the wire.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use mirrorvm::addr::{Gpa, PAGE_SIZE};
use mirrorvm::address_space::BlockSpec;
use mirrorvm::host::{AccelChoice, ConsoleChunk, DriverSpec, Fill, GuestRecord, GuestSpec, WorkloadSpec};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::{Fault, Preview};
use crate::problem::MAX_SAFE_INTEGER;

/// Most vCPUs of a guest.
const VCPUS_MAX: u64 = 16;
/// Default of `working_set_bytes`, where RAM is large enough.
const WORKING_SET: u64 = 64 << 20;
/// Default of `dirty_bytes_per_second`.
const DIRTY_RATE: u64 = 16 << 20;

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

/// How a guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Driver)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DriverBody {
    /// The daemon is the VMM, on `/dev/kvm`; the guest is the built-in workload.
    #[schema(title = "DriverEmbedded")]
    Embedded {
        /// Virtual CPUs.
        #[serde(default)]
        #[schema(default = 1, minimum = 1, maximum = 16)]
        vcpus: u32,
        /// What the workload does; absent: its defaults.
        workload: Option<WorkloadBody>,
    },
    /// A QEMU process that boots a Linux kernel. One RAM block, at guest physical address 0, whole MiB.
    #[schema(title = "DriverQemu")]
    Qemu {
        /// Virtual CPUs.
        #[serde(default)]
        #[schema(default = 1, minimum = 1, maximum = 16)]
        vcpus: u32,
        /// Kernel image, a path on the host.
        #[schema(example = "/boot/vmlinuz")]
        kernel: String,
        /// Initial RAM disk, a path on the host.
        initrd: Option<String>,
        /// Kernel command line.
        #[serde(default)]
        #[schema(default = "")]
        append: String,
        /// Accelerator.
        #[serde(default)]
        #[schema(default = "auto")]
        accel: AccelBody,
    },
}

/// What the built-in workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Workload)]
#[serde(deny_unknown_fields)]
pub struct WorkloadBody {
    /// What RAM holds at first.
    #[serde(default)]
    #[schema(default = "random")]
    pub fill: FillBody,
    /// Bytes that are rewritten over and over, a multiple of 4 KiB, at most half of RAM. Absent: 64 MiB, or a
    /// quarter of RAM where that is less.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub working_set_bytes: Option<u64>,
    /// How fast they are rewritten; 0: counter and console only. Absent: 16 MiB a second.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub dirty_bytes_per_second: Option<u64>,
}

/// What a workload guest's RAM holds at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Fill)]
#[serde(rename_all = "snake_case")]
pub enum FillBody {
    /// Incompressible data.
    Random,
    /// Nothing: pages that the guest never writes stay zero.
    Zero,
}

/// Accelerator of a QEMU guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Accel)]
#[serde(rename_all = "snake_case")]
pub enum AccelBody {
    /// KVM where a stock guest can run under it, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// A guest's RAM.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Memory)]
#[serde(deny_unknown_fields)]
pub struct MemoryBody {
    /// RAM blocks, in the order of their RAM addresses.
    #[schema(min_items = 1)]
    pub blocks: Vec<BlockBody>,
}

/// A RAM block.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MemoryBlock)]
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

impl Decode for DriverBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let kind = f.kind(&["embedded", "qemu"])?;
        let vcpus = f.int_or("vcpus", 1..=VCPUS_MAX, 1);
        if kind == "embedded" {
            let workload = f.optional("workload");
            f.done()?;
            return Some(Self::Embedded { vcpus: vcpus?, workload: workload? });
        }
        let kernel = f.required("kernel");
        let initrd = f.optional("initrd");
        let append = f.or("append", String::new());
        let accel = f.or("accel", AccelBody::Auto);
        f.done()?;
        Some(Self::Qemu { vcpus: vcpus?, kernel: kernel?, initrd: initrd?, append: append?, accel: accel? })
    }
}

impl Decode for WorkloadBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let fill = f.or("fill", FillBody::Random);
        let working_set_bytes = f.optional("working_set_bytes");
        let dirty_bytes_per_second = f.optional("dirty_bytes_per_second");
        f.done()?;
        Some(Self {
            fill: fill?,
            working_set_bytes: working_set_bytes?,
            dirty_bytes_per_second: dirty_bytes_per_second?,
        })
    }
}

impl Decode for FillBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("random", Self::Random), ("zero", Self::Zero)])
    }
}

impl Decode for AccelBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("auto", Self::Auto), ("kvm", Self::Kvm), ("tcg", Self::Tcg)])
    }
}

impl Decode for MemoryBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let blocks = f.required("blocks");
        f.done()?;
        Some(Self { blocks: blocks? })
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

impl From<GuestCreate> for GuestSpec {
    fn from(body: GuestCreate) -> Self {
        let ram: u64 = body.memory.blocks.iter().fold(0, |sum, b| sum.saturating_add(b.size_bytes));
        Self {
            name: body.name,
            driver: driver_spec(body.driver, ram),
            blocks: body
                .memory
                .blocks
                .into_iter()
                .map(|b| BlockSpec { name: b.name, size_bytes: b.size_bytes, gpa: b.gpa.map(Gpa::new) })
                .collect(),
            labels: body.labels,
        }
    }
}

fn driver_spec(body: DriverBody, ram: u64) -> DriverSpec {
    match body {
        DriverBody::Embedded { vcpus, workload } => {
            let asked = workload.unwrap_or(WorkloadBody {
                fill: FillBody::Random,
                working_set_bytes: None,
                dirty_bytes_per_second: None,
            });
            let default_set = WORKING_SET.min(ram / 4 / PAGE_SIZE * PAGE_SIZE);
            let workload = WorkloadSpec {
                fill: match asked.fill {
                    FillBody::Random => Fill::Random,
                    FillBody::Zero => Fill::Zero,
                },
                working_set_bytes: asked.working_set_bytes.unwrap_or(default_set),
                dirty_bytes_per_second: asked.dirty_bytes_per_second.unwrap_or(DIRTY_RATE),
            };
            DriverSpec::Embedded { vcpus, workload }
        }
        DriverBody::Qemu { vcpus, kernel, initrd, append, accel } => DriverSpec::Qemu {
            vcpus,
            kernel: PathBuf::from(kernel),
            initrd: initrd.map(PathBuf::from),
            append,
            accel: match accel {
                AccelBody::Auto => AccelChoice::Auto,
                AccelBody::Kvm => AccelChoice::Kvm,
                AccelBody::Tcg => AccelChoice::Tcg,
            },
        },
    }
}

impl From<DriverSpec> for DriverBody {
    fn from(spec: DriverSpec) -> Self {
        match spec {
            DriverSpec::Embedded { vcpus, workload } => Self::Embedded {
                vcpus,
                workload: Some(WorkloadBody {
                    fill: match workload.fill {
                        Fill::Random => FillBody::Random,
                        Fill::Zero => FillBody::Zero,
                    },
                    working_set_bytes: Some(workload.working_set_bytes),
                    dirty_bytes_per_second: Some(workload.dirty_bytes_per_second),
                }),
            },
            DriverSpec::Qemu { vcpus, kernel, initrd, append, accel } => Self::Qemu {
                vcpus,
                kernel: kernel.to_string_lossy().into_owned(),
                initrd: initrd.map(|p| p.to_string_lossy().into_owned()),
                append,
                accel: match accel {
                    AccelChoice::Auto => AccelBody::Auto,
                    AccelChoice::Kvm => AccelBody::Kvm,
                    AccelChoice::Tcg => AccelBody::Tcg,
                },
            },
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
    /// `stopped`, `starting`, `running`, `paused`, `stopping`, `incoming`, `in_doubt` or `failed`; more may come.
    #[schema(example = "running")]
    pub state: &'static str,
    /// Goes up with every change; the ETag in quotes.
    #[schema(example = 3)]
    pub generation: u64,
    /// What the hardware gives it.
    pub protection: Protection,
    /// The migration that has it now.
    pub migration: Option<Uuid>,
    /// The host that it was handed over to.
    pub moved_to: Option<String>,
    /// Why it failed.
    pub error: Option<Fault>,
    /// When it was defined.
    pub created_at: Timestamp,
    /// When it last began to run here.
    pub started_at: Option<Timestamp>,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// A guest's RAM with its sum.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GuestMemory {
    /// Bytes over all blocks, the helper's not counted.
    pub total_bytes: u64,
    /// RAM blocks as they were asked for; `ram-blocks` has them with their RAM addresses.
    pub blocks: Vec<BlockBody>,
}

/// What the hardware gives a guest, and what that promises.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Protection {
    /// `none`; more will come.
    #[schema(example = "none")]
    pub level: &'static str,
    /// What holds at this level.
    pub promise: &'static str,
}

impl From<GuestRecord> for Guest {
    fn from(record: GuestRecord) -> Self {
        use mirrorvm::host::ProtectionLevel;
        let promise = match record.protection {
            ProtectionLevel::None => {
                "the host can read and write the guest's memory; pages are sealed on the way between hosts"
            }
        };
        Self {
            id: record.id,
            name: record.spec.name,
            driver: record.spec.driver.into(),
            memory: GuestMemory {
                total_bytes: record.layout.ram_bytes(),
                blocks: record
                    .spec
                    .blocks
                    .into_iter()
                    .map(|b| BlockBody { name: b.name, size_bytes: b.size_bytes, gpa: b.gpa.map(Gpa::get) })
                    .collect(),
            },
            labels: record.spec.labels,
            state: record.state.name(),
            generation: record.generation,
            protection: Protection { level: record.protection.name(), promise },
            migration: record.migration,
            moved_to: record.moved_to,
            error: record.error.map(Fault::from),
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
    /// Offset of the first byte of `data` in everything that the guest ever printed. Above the offset asked for
    /// when older output is no longer kept.
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
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::api::decode::decode;

    fn create(driver: serde_json::Value) -> serde_json::Value {
        json!({"name": "g", "driver": driver, "memory": {"blocks": [{"name": "r", "size_bytes": 8388608.0, "gpa": 0}]}})
    }

    #[test]
    fn defaults_of_an_embedded_guest() {
        let spec = GuestSpec::from(decode::<GuestCreate>(&create(json!({"kind": "embedded"}))).unwrap());
        let workload =
            WorkloadSpec { fill: Fill::Random, working_set_bytes: 2 << 20, dirty_bytes_per_second: 16 << 20 };
        assert_eq!(spec.driver, DriverSpec::Embedded { vcpus: 1, workload });
        assert_eq!(spec.blocks[0].gpa, Some(Gpa::new(0)));
        let back = DriverBody::from(spec.driver.clone());
        assert_eq!(driver_spec(back, 1), spec.driver);
    }

    #[test]
    fn every_problem_is_named_at_once_with_its_place() {
        let body = json!({
            "driver": {"kind": "qemu", "vcpus": 17, "accel": "xen", "workload": {}},
            "memory": {"blocks": [{"name": 1, "size_bytes": 0, "gpa": -1, "x/y": 1}], "size": 1},
        });
        let errors = decode::<GuestCreate>(&body).unwrap_err();
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
