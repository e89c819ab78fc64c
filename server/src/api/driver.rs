//! How guests run, on the wire.

use std::path::PathBuf;

use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::host::{AccelChoice, DriverSpec, Fill, LaunchMirror, SevSpec, WorkloadSpec, bounds};
use mirrorvm::sev::Policy;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::strategies::{PspViaBody, StrategyBody};

/// Default of `working_set_bytes`, unless RAM is too small for it.
const WORKING_SET: u64 = 64 << 20;
/// Default of `dirty_bytes_per_second`, in bytes.
const DIRTY_RATE: u64 = 16 << 20;

/// How a guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Driver)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DriverBody {
    /// The daemon is the VMM, on `/dev/kvm`; the guest is the built-in workload.
    #[schema(title = "DriverEmbedded")]
    Embedded {
        /// Number of virtual CPUs.
        #[serde(default)]
        #[schema(default = 1, minimum = 1, maximum = 16)]
        vcpus: u32,
        /// What the workload does. Absent: its defaults.
        workload: Option<WorkloadBody>,
        /// How the guest's memory is encrypted, on a host with SEV. Absent: not at all.
        sev: Option<SevBody>,
    },
    /// A software machine with a model of SEV; needs no `/dev/kvm`. The guest is the built-in workload.
    #[schema(title = "DriverEmulated")]
    Emulated {
        /// Number of virtual CPUs.
        #[serde(default)]
        #[schema(default = 1, minimum = 1, maximum = 16)]
        vcpus: u32,
        /// What the workload does. Absent: its defaults.
        workload: Option<WorkloadBody>,
        /// How the guest's memory is encrypted under the model of SEV. Absent: as with `{}`. Null: not at
        /// all.
        sev: Option<SevBody>,
    },
    /// A QEMU process that boots a Linux kernel. The guest has one RAM block of whole MiB, at guest-physical
    /// address 0.
    #[schema(title = "DriverQemu")]
    Qemu {
        /// Number of virtual CPUs.
        #[serde(default)]
        #[schema(default = 1, minimum = 1, maximum = 16)]
        vcpus: u32,
        /// Path of the kernel image, beneath one of the host's image directories.
        #[schema(example = "/boot/vmlinuz")]
        kernel: String,
        /// Path of the initial RAM disk, beneath one of the host's image directories.
        initrd: Option<String>,
        /// Kernel command line: at most 2047 bytes, without control characters.
        #[serde(default)]
        #[schema(default = "")]
        append: String,
        /// The accelerator that QEMU uses.
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
    /// What RAM holds in the beginning.
    #[serde(default)]
    #[schema(default = "random")]
    pub fill: FillBody,
    /// How many bytes are rewritten over and over: a multiple of 4 KiB, at most half of RAM. Absent: 64 MiB,
    /// or a quarter of RAM where that is less.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub working_set_bytes: Option<u64>,
    /// How fast the working set is rewritten, in bytes per second. With 0 only the counter and the console
    /// are written. Absent: 16 MiB per second.
    #[schema(minimum = 0, maximum = 1099511627776u64)]
    pub dirty_bytes_per_second: Option<u64>,
    /// After how many milliseconds the guest clears MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes
    /// offline. From then on it is not ready to be migrated. Absent: never.
    #[schema(minimum = 0, maximum = 86_400_000)]
    pub withdraws_readiness_after_ms: Option<u64>,
}

/// How a guest's memory is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Sev)]
#[serde(deny_unknown_fields)]
pub struct SevBody {
    /// SEV guest policy, as a sum: NODBG 1, NOKS 2, ES 4, NOSEND 8, DOMAIN 16, SEV 32, and the least API
    /// version from bit 16 on. 0 or absent stands for the default, NODBG alone (with ES when `es` is true),
    /// and that is what answers show. A guest whose policy lacks NODBG gets no mirror, because its host could
    /// read it through one. A guest whose policy has NOSEND is not migrated.
    #[serde(default)]
    #[schema(default = 0, minimum = 0, maximum = 4294967295u64, example = 0)]
    pub policy: u32,
    /// Whether the registers of its vCPUs are encrypted as well (SEV-ES).
    #[serde(default)]
    #[schema(default = false)]
    pub es: bool,
    /// With `es`: the mirror that the guest is launched with, which is the only one it can have. Absent:
    /// `psp-copied` by launch-update, with 2 workers.
    pub mirror: Option<LaunchMirrorBody>,
}

/// The mirror that an SEV-ES guest is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = LaunchMirror)]
#[serde(deny_unknown_fields)]
pub struct LaunchMirrorBody {
    /// The strategy by which its address space is laid out.
    pub strategy: StrategyBody,
    /// Number of mirror vCPUs.
    #[serde(default)]
    #[schema(default = 1, minimum = 1, maximum = 16)]
    pub workers: u32,
}

/// What the RAM of a workload guest holds in the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Fill)]
#[serde(rename_all = "snake_case")]
pub enum FillBody {
    /// Random data, which cannot be compressed.
    Random,
    /// Zeros: pages that the guest never writes stay zero.
    Zero,
}

/// The accelerator of a QEMU guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Accel)]
#[serde(rename_all = "snake_case")]
pub enum AccelBody {
    /// KVM where a stock guest can run under it, otherwise TCG.
    Auto,
    /// Hardware virtualization by KVM.
    Kvm,
    /// TCG, QEMU's own translator.
    Tcg,
}

impl Decode for DriverBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let kind = f.kind(&["embedded", "emulated", "qemu"])?;
        let vcpus = f.int_or("vcpus", bounds::VCPUS, 1);
        if kind == "embedded" {
            let (workload, sev) = (f.optional("workload"), f.optional("sev"));
            f.done()?;
            return Some(Self::Embedded { vcpus: vcpus?, workload: workload?, sev: sev? });
        }
        if kind == "emulated" {
            let workload = f.optional("workload");
            // Absent is the model of SEV, which is what the driver is for.
            let sev = if f.has("sev") { f.optional("sev") } else { Some(Some(SevBody::default())) };
            f.done()?;
            return Some(Self::Emulated { vcpus: vcpus?, workload: workload?, sev: sev? });
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
        let dirty_bytes_per_second = f.optional_int("dirty_bytes_per_second", bounds::DIRTY_RATE);
        let withdraws_readiness_after_ms = f.optional_int("withdraws_readiness_after_ms", 0..=86_400_000);
        f.done()?;
        Some(Self {
            fill: fill?,
            working_set_bytes: working_set_bytes?,
            dirty_bytes_per_second: dirty_bytes_per_second?,
            withdraws_readiness_after_ms: withdraws_readiness_after_ms?,
        })
    }
}

impl Decode for SevBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let policy = f.int_or("policy", 0..=u64::from(u32::MAX), 0);
        let es = f.or("es", false);
        let mirror = f.optional("mirror");
        f.done()?;
        Some(Self { policy: policy?, es: es?, mirror: mirror? })
    }
}

impl Decode for LaunchMirrorBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let strategy = f.required("strategy");
        let workers = f.int_or("workers", bounds::WORKERS, 1);
        f.done()?;
        Some(Self { strategy: strategy?, workers: workers? })
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

/// Turns a driver's body into the library's value, for a guest with `ram` bytes of RAM.
pub(super) fn driver_spec(body: DriverBody, ram: u64) -> DriverSpec {
    match body {
        DriverBody::Embedded { vcpus, workload, sev } => {
            DriverSpec::Embedded { vcpus, workload: workload_spec(workload, ram), sev: sev.map(sev_spec) }
        }
        DriverBody::Emulated { vcpus, workload, sev } => {
            DriverSpec::Emulated { vcpus, workload: workload_spec(workload, ram), sev: sev.map(sev_spec) }
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

fn workload_spec(asked: Option<WorkloadBody>, ram: u64) -> WorkloadSpec {
    let asked = asked.unwrap_or(WorkloadBody {
        fill: FillBody::Random,
        working_set_bytes: None,
        dirty_bytes_per_second: None,
        withdraws_readiness_after_ms: None,
    });
    let default_set = WORKING_SET.min(ram / 4 / PAGE_SIZE * PAGE_SIZE);
    WorkloadSpec {
        fill: match asked.fill {
            FillBody::Random => Fill::Random,
            FillBody::Zero => Fill::Zero,
        },
        working_set_bytes: asked.working_set_bytes.unwrap_or(default_set),
        dirty_bytes_per_second: asked.dirty_bytes_per_second.unwrap_or(DIRTY_RATE),
        withdraws_readiness_after_ms: asked.withdraws_readiness_after_ms,
    }
}

fn sev_spec(body: SevBody) -> SevSpec {
    let es = if body.es { Policy::ES } else { 0 };
    let policy = if body.policy == 0 { SevSpec::DEFAULT_POLICY | es } else { body.policy };
    let mirror = body.mirror.unwrap_or(LaunchMirrorBody {
        strategy: StrategyBody::PspCopied { via: PspViaBody::LaunchUpdate },
        workers: 2,
    });
    let mirror = LaunchMirror { strategy: mirror.strategy.into(), workers: mirror.workers };
    SevSpec { policy: Policy(policy), es: body.es, mirror }
}

fn workload_body(workload: &WorkloadSpec) -> Option<WorkloadBody> {
    Some(WorkloadBody {
        fill: match workload.fill {
            Fill::Random => FillBody::Random,
            Fill::Zero => FillBody::Zero,
        },
        working_set_bytes: Some(workload.working_set_bytes),
        dirty_bytes_per_second: Some(workload.dirty_bytes_per_second),
        withdraws_readiness_after_ms: workload.withdraws_readiness_after_ms,
    })
}

fn sev_body(sev: &SevSpec) -> SevBody {
    let mirror = LaunchMirrorBody { strategy: sev.mirror.strategy.into(), workers: sev.mirror.workers };
    SevBody { policy: sev.policy.0, es: sev.es, mirror: sev.es.then_some(mirror) }
}

impl From<DriverSpec> for DriverBody {
    fn from(spec: DriverSpec) -> Self {
        match spec {
            DriverSpec::Embedded { vcpus, workload, sev } => {
                Self::Embedded { vcpus, workload: workload_body(&workload), sev: sev.as_ref().map(sev_body) }
            }
            DriverSpec::Emulated { vcpus, workload, sev } => {
                Self::Emulated { vcpus, workload: workload_body(&workload), sev: sev.as_ref().map(sev_body) }
            }
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
