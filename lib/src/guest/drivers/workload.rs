//! The guest of the drivers `embedded` and `emulated`: the built-in workload, and what both say of it.
//!
//! Owns: the parameters of such a guest, their schema, reading and checks, and how its machine is made. Must
//! not know: which hypervisor it runs on.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Beginning, Body, Definition, DriverSchema, Facts, LayoutFault, Order, WriteRate};
use crate::addr::PAGE_SIZE;
use crate::address_space::{GuestLayout, PspVia, Strategy};
use crate::guest::MachineError;
use crate::guest::attestation::{AttestationSpec, Hex, LAUNCHES, NotHex, PLATFORMS};
use crate::guest::driver::{
    DriverSpec, Fill, LaunchMirror, Parameters, ProtectionLevel, SevSpec, WorkloadSpec,
};
use crate::guest::driver::{VCPUS, WORKERS};
use crate::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec, WorkloadPlan};
use crate::reading::{Decode, Errors, FieldError, Fields, MAX_SAFE_INTEGER, Node, one_of};
use crate::sev::Policy;

/// Bytes per second that a workload of ours dirties.
pub const DIRTY_RATE: std::ops::RangeInclusive<u64> = 0..=1 << 40;
/// Default of `working_set_bytes`, where RAM is large enough.
const DEFAULT_WORKING_SET: u64 = 64 << 20;
/// Default of `dirty_bytes_per_second`.
const DEFAULT_DIRTY_RATE: u64 = 16 << 20;
/// Milliseconds after which a workload may withdraw its readiness: at most a day.
const WITHDRAWS_AFTER_MS: std::ops::RangeInclusive<u64> = 0..=86_400_000;
/// Bits of a policy that mean something: six flags, and the least API version.
const POLICY_BITS: u32 = 0xffff_003f;

/// What such a guest is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadGuest {
    /// 1 to 16.
    pub vcpus: u32,
    /// What the workload does.
    pub workload: WorkloadSpec,
    /// Encrypts its memory; `None`: not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sev: Option<SevSpec>,
}

impl WorkloadGuest {
    /// A definition's driver, for the driver of this name.
    pub(super) fn spec(&self, kind: &str) -> DriverSpec {
        DriverSpec::of(kind, self).expect("numbers, names and nothing else")
    }
}

pub(super) fn schema(title: &'static str, description: &'static str, sev: &'static str) -> DriverSchema {
    DriverSchema {
        title,
        description,
        properties: properties(sev),
        required: Vec::new(),
        components: components(),
    }
}

fn properties(sev: &str) -> Parameters {
    let or_null = |name: &str, description: &str| {
        let reference = format!("#/components/schemas/{name}");
        json!({"description": description, "oneOf": [{"$ref": reference}, {"type": "null"}]})
    };
    Map::from_iter([
        ("vcpus".to_owned(), vcpus_schema()),
        ("workload".to_owned(), or_null("Workload", "What the workload does. Absent: its defaults.")),
        ("sev".to_owned(), or_null("Sev", sev)),
    ])
}

/// How many virtual CPUs, as all stock drivers take it.
pub(super) fn vcpus_schema() -> Value {
    json!({
        "description": "Number of virtual CPUs.",
        "type": "integer",
        "format": "int32",
        "default": 1,
        "minimum": VCPUS.start(),
        "maximum": VCPUS.end(),
    })
}

fn components() -> Vec<(&'static str, Value)> {
    vec![
        (
            "Workload",
            json!({
                "additionalProperties": false,
                "description": "What the built-in workload does.",
                "properties": {
                    "dirty_bytes_per_second": {
                        "description": "How fast the working set is rewritten, in bytes per second. With 0 only the counter and the console\nare written. Absent: 16 MiB per second.",
                        "format": "int64",
                        "maximum": DIRTY_RATE.end(),
                        "minimum": 0,
                        "type": [
                            "integer",
                            "null"
                        ]
                    },
                    "fill": {
                        "$ref": "#/components/schemas/Fill",
                        "default": "random",
                        "description": "What RAM holds in the beginning."
                    },
                    "withdraws_readiness_after_ms": {
                        "description": "After how many milliseconds the guest clears MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes\noffline. From then on it is not ready to be migrated. Absent: never.",
                        "format": "int64",
                        "maximum": WITHDRAWS_AFTER_MS.end(),
                        "minimum": 0,
                        "type": [
                            "integer",
                            "null"
                        ]
                    },
                    "working_set_bytes": {
                        "description": "How many bytes are rewritten over and over: a multiple of 4 KiB, at most half of RAM. Absent: 64 MiB,\nor a quarter of RAM where that is less.",
                        "format": "int64",
                        "maximum": MAX_SAFE_INTEGER,
                        "minimum": 0,
                        "type": [
                            "integer",
                            "null"
                        ]
                    }
                },
                "type": "object"
            }),
        ),
        (
            "Sev",
            json!({
                "additionalProperties": false,
                "description": "How a guest's memory is encrypted.",
                "properties": {
                    "attestation": {
                        "description": "What evidence the guest's helper demands of a destination's helper before pages leave. Absent: evidence\nof the modelled chip and of the same guest, waiting for pages, where SEV is modelled; none elsewhere.",
                        "oneOf": [
                            {
                                "$ref": "#/components/schemas/Attestation"
                            },
                            {
                                "type": "null"
                            }
                        ]
                    },
                    "es": {
                        "default": false,
                        "description": "Whether the registers of its vCPUs are encrypted as well (SEV-ES).",
                        "type": "boolean"
                    },
                    "mirror": {
                        "description": "With `es`: the mirror that the guest is launched with, which is the only one it can have. Absent:\n`psp-copied` by launch-update, with 2 workers.",
                        "oneOf": [
                            {
                                "$ref": "#/components/schemas/LaunchMirror"
                            },
                            {
                                "type": "null"
                            }
                        ]
                    },
                    "policy": {
                        "default": 0,
                        "description": "SEV guest policy, as a sum: NODBG 1, NOKS 2, ES 4, NOSEND 8, DOMAIN 16, SEV 32, and the least API\nversion from bit 16 on. 0 or absent stands for the default, NODBG alone (with ES when `es` is true),\nand that is what answers show. A guest whose policy lacks NODBG gets no mirror, because its host could\nread it through one. A guest whose policy has NOSEND is not migrated.",
                        "example": 0,
                        "format": "int32",
                        "maximum": u32::MAX,
                        "minimum": 0,
                        "type": "integer"
                    }
                },
                "type": "object"
            }),
        ),
        (
            "Attestation",
            json!({
                "additionalProperties": false,
                "description": "What a guest's owner demands of a destination: an attestation report of its platform's firmware, made for\nthis migration, checked by the guest's helper. The report's policy must be as strict as the guest's.",
                "properties": {
                    "demanded": {
                        "default": true,
                        "description": "Whether evidence is demanded. When it is missing or does not do, no page leaves and the migration\nfails as `evidence_missing` or `evidence_refused`.",
                        "type": "boolean"
                    },
                    "launches": {
                        "description": "Launch digests (SHA-256) of which the destination's guest must have one. Absent: that of a guest of the\nsame definition which waits for pages, launched by the same build.",
                        "items": {
                            "pattern": "^[0-9a-f]{64}$",
                            "type": "string"
                        },
                        "maxItems": LAUNCHES.end(),
                        "minItems": LAUNCHES.start(),
                        "type": [
                            "array",
                            "null"
                        ]
                    },
                    "platforms": {
                        "description": "Public keys on P-384, x and y, of which one must have signed the certificate of the destination's PEK:\nkeys of chips (CEK) that were checked against AMD's certificates, or of a platform's owner (OCA). Absent:\nthe modelled chip's. `platform_key` of a host is such a key.",
                        "items": {
                            "pattern": "^[0-9a-f]{192}$",
                            "type": "string"
                        },
                        "maxItems": PLATFORMS.end(),
                        "minItems": PLATFORMS.start(),
                        "type": [
                            "array",
                            "null"
                        ]
                    }
                },
                "type": "object"
            }),
        ),
        (
            "LaunchMirror",
            json!({
                "additionalProperties": false,
                "description": "The mirror that an SEV-ES guest is launched with.",
                "properties": {
                    "strategy": {
                        "$ref": "#/components/schemas/Strategy",
                        "description": "The strategy by which its address space is laid out."
                    },
                    "workers": {
                        "default": 1,
                        "description": "Number of mirror vCPUs.",
                        "format": "int32",
                        "maximum": WORKERS.end(),
                        "minimum": WORKERS.start(),
                        "type": "integer"
                    }
                },
                "required": [
                    "strategy"
                ],
                "type": "object"
            }),
        ),
        (
            "Fill",
            json!({
                "description": "What the RAM of a workload guest holds in the beginning.",
                "enum": [
                    "random",
                    "zero"
                ],
                "type": "string"
            }),
        ),
    ]
}

impl Decode for Fill {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("random", Self::Random), ("zero", Self::Zero)])
    }
}

/// What a caller says of the workload; what is absent depends on the guest's RAM.
#[derive(Default)]
struct AskedWorkload {
    fill: Option<Fill>,
    working_set_bytes: Option<u64>,
    dirty_bytes_per_second: Option<u64>,
    withdraws_readiness_after_ms: Option<u64>,
}

impl Decode for AskedWorkload {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let fill = f.optional_not_null("fill");
        let working_set_bytes = f.optional("working_set_bytes");
        let dirty_bytes_per_second = f.optional_int("dirty_bytes_per_second", DIRTY_RATE);
        let withdraws_readiness_after_ms = f.optional_int("withdraws_readiness_after_ms", WITHDRAWS_AFTER_MS);
        f.done()?;
        Some(Self {
            fill: fill?,
            working_set_bytes: working_set_bytes?,
            dirty_bytes_per_second: dirty_bytes_per_second?,
            withdraws_readiness_after_ms: withdraws_readiness_after_ms?,
        })
    }
}

impl AskedWorkload {
    fn filled_in(self, ram_bytes: u64) -> WorkloadSpec {
        let default_set = DEFAULT_WORKING_SET.min(ram_bytes / 4 / PAGE_SIZE * PAGE_SIZE);
        WorkloadSpec {
            fill: self.fill.unwrap_or(Fill::Random),
            working_set_bytes: self.working_set_bytes.unwrap_or(default_set),
            dirty_bytes_per_second: self.dirty_bytes_per_second.unwrap_or(DEFAULT_DIRTY_RATE),
            withdraws_readiness_after_ms: self.withdraws_readiness_after_ms,
        }
    }
}

/// What a caller says of encryption, filled in but for what depends on the driver.
struct AskedSev(SevSpec);

impl Decode for AskedSev {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let policy = f.int_or("policy", 0..=u64::from(u32::MAX), 0);
        let es = f.or("es", false);
        let mirror = f.optional("mirror");
        let attestation = f.optional("attestation");
        f.done()?;
        Some(Self(SevSpec { attestation: attestation?, ..sev_spec(policy?, es?, mirror?) }))
    }
}

impl Decode for AttestationSpec {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let demanded = f.or("demanded", true);
        let platforms = f.optional("platforms");
        let launches = f.optional("launches");
        f.done()?;
        Some(Self { demanded: demanded?, platforms: platforms?, launches: launches? })
    }
}

impl<const N: usize> Decode for Hex<N> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let read = text.parse();
        read.map_err(|not: NotHex| node.invalid(errors, &not.to_string())).ok()
    }
}

impl Decode for LaunchMirror {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let strategy = f.required("strategy");
        let workers = f.int_or("workers", WORKERS, 1);
        f.done()?;
        Some(Self { strategy: strategy?, workers: workers? })
    }
}

/// Policy 0 is the default, whose bits depend on `es`.
fn sev_spec(policy: u32, es: bool, mirror: Option<LaunchMirror>) -> SevSpec {
    let bits = if es { Policy::ES } else { 0 };
    let policy = if policy == 0 { SevSpec::DEFAULT_POLICY | bits } else { policy };
    let mirror = mirror
        .unwrap_or(LaunchMirror { strategy: Strategy::PspCopied { via: PspVia::LaunchUpdate }, workers: 2 });
    SevSpec { policy: Policy(policy), es, mirror, attestation: None }
}

/// Reads a guest as a caller wrote it. `encrypted`: whether it is where the caller says nothing of it.
pub(super) fn read(fields: &mut Fields<'_, '_>, ram_bytes: u64, encrypted: bool) -> Option<WorkloadGuest> {
    let vcpus = fields.int_or("vcpus", VCPUS, 1);
    let workload = fields.optional::<AskedWorkload>("workload");
    let sev = if encrypted && !fields.has("sev") {
        Some(Some(AskedSev(sev_spec(0, false, None))))
    } else {
        fields.optional::<AskedSev>("sev")
    };
    // The driver that encrypts by itself is the model.
    let default = AttestationSpec::default_at(encrypted);
    Some(WorkloadGuest {
        vcpus: vcpus?,
        workload: workload?.unwrap_or_default().filled_in(ram_bytes),
        sev: sev?.map(|AskedSev(sev)| SevSpec {
            attestation: sev.attestation.filter(|asked| *asked != default),
            ..sev
        }),
    })
}

/// A guest as callers see it: every default filled in, the launch's mirror only where there is one.
pub(super) fn shown(spec: &DriverSpec, modelled: bool) -> Parameters {
    let Ok(guest) = spec.read::<WorkloadGuest>() else { return spec.parameters().clone() };
    let w = &guest.workload;
    let workload = json!({
        "fill": w.fill,
        "working_set_bytes": w.working_set_bytes,
        "dirty_bytes_per_second": w.dirty_bytes_per_second,
        "withdraws_readiness_after_ms": w.withdraws_readiness_after_ms,
    });
    let sev = guest.sev.map(|sev| {
        let mirror = sev.es.then_some(sev.mirror);
        let AttestationSpec { demanded, platforms, launches } =
            sev.attestation.unwrap_or(AttestationSpec::default_at(modelled));
        let attestation = json!({"demanded": demanded, "platforms": platforms, "launches": launches});
        json!({"policy": sev.policy.0, "es": sev.es, "mirror": mirror, "attestation": attestation})
    });
    Map::from_iter([
        ("vcpus".to_owned(), guest.vcpus.into()),
        ("workload".to_owned(), workload),
        ("sev".to_owned(), sev.into()),
    ])
}

/// Notes what is wrong with a guest.
pub(super) fn check(definition: &Definition<'_>, modelled: bool, errors: &mut Vec<FieldError>) {
    let guest: WorkloadGuest = match definition.spec.read() {
        Ok(guest) => guest,
        Err(bad) => return errors.push(FieldError::new("/driver", "invalid", bad.source.to_string())),
    };
    FieldError::check_bound("/driver/vcpus", guest.vcpus.into(), &VCPUS, errors);
    if let Some(sev) = &guest.sev {
        check_sev(sev, errors);
        check_attestation(sev.attestation.as_ref(), modelled, errors);
    }
    let (set, most) = (guest.workload.working_set_bytes, definition.ram_bytes() / 2);
    if set % PAGE_SIZE != 0 || set > most {
        let detail = format!("{set} is not a multiple of 4096 up to half of the RAM ({most})");
        errors.push(FieldError::new("/driver/workload/working_set_bytes", "out_of_range", detail));
    }
    let at = "/driver/workload/dirty_bytes_per_second";
    FieldError::check_bound(at, guest.workload.dirty_bytes_per_second, &DIRTY_RATE, errors);
}

fn check_sev(sev: &SevSpec, errors: &mut Vec<FieldError>) {
    let policy = sev.policy.0;
    if policy & !POLICY_BITS != 0 {
        let detail = format!("{policy:#x} has reserved bits set (6 to 15)");
        errors.push(FieldError::new("/driver/sev/policy", "out_of_range", detail));
    }
    if sev.policy.has(Policy::ES) != sev.es {
        let detail = format!("policy {policy:#x} and es {} contradict each other (bit 2 is ES)", sev.es);
        errors.push(FieldError::new("/driver/sev/es", "contradiction", detail));
    }
    if sev.es && sev.mirror.strategy.is_sent_by_firmware() {
        let detail = "with SEV-ES the mirror is made during the launch, and firmware sends running guests only; KVM has \
                      no RECEIVE_UPDATE_VMSA for its vCPUs either";
        errors.push(FieldError::new("/driver/sev/mirror/strategy", "impossible", detail));
    }
    FieldError::check_bound("/driver/sev/mirror/workers", sev.mirror.workers.into(), &WORKERS, errors);
}

fn check_attestation(asked: Option<&AttestationSpec>, modelled: bool, errors: &mut Vec<FieldError>) {
    let Some(AttestationSpec { demanded, platforms, launches }) = asked else { return };
    let mut bound = |name: &str, count: Option<usize>, bounds: &RangeInclusive<u64>| {
        let at = format!("/driver/sev/attestation/{name}");
        if let Some(count) = count {
            FieldError::check_bound(&at, count as u64, bounds, errors);
        }
    };
    bound("platforms", platforms.as_ref().map(Vec::len), &PLATFORMS);
    bound("launches", launches.as_ref().map(Vec::len), &LAUNCHES);
    let at = "/driver/sev/attestation/demanded";
    if !demanded && (platforms.is_some() || launches.is_some()) {
        let detail = "platforms and launches are named, and no evidence is demanded";
        errors.push(FieldError::new(at, "contradiction", detail));
    }
    if *demanded && platforms.is_none() && !modelled {
        let detail = "of a real platform evidence is demanded by its key: name some in platforms";
        errors.push(FieldError::new("/driver/sev/attestation/platforms", "missing", detail));
    }
}

/// What hosts need to know of a guest, which is protected as `protection` says of how it is encrypted.
pub(super) fn facts(spec: &DriverSpec, protection: impl FnOnce(&SevSpec) -> ProtectionLevel) -> Facts {
    let Ok(guest) = spec.read::<WorkloadGuest>() else { return Facts::default() };
    let protection = guest.sev.as_ref().map_or(ProtectionLevel::None, protection);
    Facts { vcpus: guest.vcpus, sev: guest.sev, protection }
}

/// The layout with room for save areas, where vCPUs' registers are encrypted.
pub(super) fn with_save_areas(spec: &DriverSpec, bare: &GuestLayout) -> Result<GuestLayout, LayoutFault> {
    match spec.read::<WorkloadGuest>() {
        // One more than the workload's vCPUs: the firmware's.
        Ok(WorkloadGuest { vcpus, sev: Some(SevSpec { es: true, .. }), .. }) => {
            Ok(bare.with_save_areas(vcpus.saturating_add(1))?)
        }
        Ok(WorkloadGuest { sev: Some(_) | None, .. }) | Err(_) => Ok(bare.clone()),
    }
}

/// Whether the workload finds room in the first block.
pub(super) fn starts_in(spec: &DriverSpec, home: &GuestLayout) -> Result<(), MachineError> {
    let WorkloadGuest { vcpus, workload, .. } = spec.read().map_err(MachineError::Parameters)?;
    WorkloadPlan::new(home, vcpus, workload.working_set_bytes).map(drop)
}

pub(super) fn write_rate(spec: &DriverSpec) -> Option<WriteRate> {
    let workload = spec.read::<WorkloadGuest>().ok()?.workload;
    Some(WriteRate {
        bytes_per_second: workload.dirty_bytes_per_second,
        working_set_bytes: workload.working_set_bytes,
    })
}

/// A machine for a guest.
pub(super) fn make(order: Order<'_>) -> Result<Body, MachineError> {
    let guest: WorkloadGuest = order.spec.read().map_err(MachineError::Parameters)?;
    let hypervisor =
        order.hypervisor.ok_or(MachineError::Unsupported { what: "run without a hypervisor" })?;
    let WorkloadGuest { vcpus, workload, .. } = guest;
    let spec = EmbeddedSpec {
        vcpus,
        fill: workload.fill == Fill::Random,
        working_set: workload.working_set_bytes,
        dirty_bytes_per_second: workload.dirty_bytes_per_second,
        withdraw_after: workload.withdraws_readiness_after_ms.map(Duration::from_millis),
    };
    let setup = EmbeddedSetup {
        name: order.name,
        home: order.home,
        ram: order.ram,
        helper_image: order.helper_image,
        secret: order.secret,
        boot: order.beginning == Beginning::Boot,
        declaration: order.declaration,
        check_declaration: order.check_declaration,
        on_readiness: order.on_readiness,
        sev: order.sev,
        on_end: order.on_end,
    };
    let machine = Box::new(Embedded::new(hypervisor, &spec, setup)?);
    Ok(Body { machine, layout: order.layout.clone(), settled: None })
}
