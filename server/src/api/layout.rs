//! Address-space plans on the wire: previews and the layout of a mirror.

use mirrorvm::addr::{Gpa, MirrorGpa};
use mirrorvm::address_space::{
    Access, Addressing, Confidentiality, Declaration, GuestLayout, HostLimits, MirrorPlan, Purpose, Refusal,
    SlotBacking, Strategy, Tuple,
};
use mirrorvm::host::bounds;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use super::strategies::StrategyBody;
use crate::problem::MAX_SAFE_INTEGER;

/// What to plan.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}, "workers": 1}))]
pub struct AddressSpacePlanCreate {
    /// The strategy by which the mirror's address space is laid out.
    pub strategy: StrategyBody,
    /// Number of mirror vCPUs.
    #[serde(default)]
    #[schema(default = 1, minimum = 1, maximum = 16)]
    pub workers: u32,
    /// The limits of the host to plan for. Absent: this host's.
    pub host_limits: Option<HostLimitsBody>,
    /// What the helper declares, for the strategy `declared`. Absent: what the guest has declared, or would
    /// declare.
    #[schema(max_items = 4096)]
    pub declaration: Option<Vec<TupleBody>>,
    /// What the guest's hardware protects. Absent: what it does protect.
    pub confidentiality: Option<ConfidentialityBody>,
    /// Whether to put the helper's code into read-only slots.
    #[serde(default)]
    #[schema(default = false)]
    pub read_only_text: bool,
    /// The helper image, by id or name. Null or absent: the built-in one.
    pub helper_image: Option<String>,
}

impl AddressSpacePlanCreate {
    /// The declaration, when there is one.
    ///
    /// # Errors
    /// More tuples than there may be.
    pub fn declared(&self) -> Result<Option<Declaration>, Refusal> {
        let tuples = self.declaration.as_ref().map(|list| list.iter().copied().map(Tuple::from).collect());
        tuples.map(Declaration::new).transpose()
    }
}

/// A piece of the helper's memory, as the helper declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = DeclaredTuple)]
#[serde(deny_unknown_fields)]
pub struct TupleBody {
    /// Guest-physical address of its first byte.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub guest_gpa: u64,
    /// Length in bytes.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub size_bytes: u64,
    /// Address at which the mirror is to see it.
    #[schema(minimum = 0, maximum = 9007199254740991u64)]
    pub mirror_gpa: u64,
}

/// What the hardware protects from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Confidentiality)]
#[serde(rename_all = "kebab-case")]
pub enum ConfidentialityBody {
    /// Nothing is protected.
    None,
    /// Memory is encrypted.
    Sev,
    /// Memory and registers are encrypted.
    SevEs,
    /// Memory, registers and integrity are protected. There is no plan for it: such a guest cannot have a
    /// mirror.
    SevSnp,
}

/// What a host allows an address space to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = HostLimits)]
#[serde(deny_unknown_fields)]
pub struct HostLimitsBody {
    /// How many physical address bits there are (MAXPHYADDR).
    #[schema(minimum = 36, maximum = 52, example = 48)]
    pub max_phys_bits: u8,
    /// Bit position of the C-bit, which marks encrypted pages. Null without SEV.
    #[schema(minimum = 32, maximum = 63)]
    pub c_bit_position: Option<u8>,
    /// How many physical address bits memory encryption takes away.
    #[serde(default)]
    #[schema(default = 0, minimum = 0, maximum = 16)]
    pub phys_bit_reduction: u8,
    /// How many memory slots one VM may have.
    #[schema(minimum = 1, maximum = 32768, example = 32764)]
    pub slot_budget: u32,
    /// Whether page tables may use 1 GiB pages.
    pub gib_pages: bool,
}

impl Decode for AddressSpacePlanCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let strategy = f.required("strategy");
        let workers = f.int_or("workers", bounds::WORKERS, 1);
        let host_limits = f.optional("host_limits");
        let declaration = f.optional("declaration");
        let confidentiality = f.optional("confidentiality");
        let read_only_text = f.or("read_only_text", false);
        let helper_image = f.optional("helper_image");
        f.done()?;
        Some(Self {
            strategy: strategy?,
            workers: workers?,
            host_limits: host_limits?,
            declaration: declaration?,
            confidentiality: confidentiality?,
            read_only_text: read_only_text?,
            helper_image: helper_image?,
        })
    }
}

impl Decode for TupleBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let guest_gpa = f.required("guest_gpa");
        let size_bytes = f.required("size_bytes");
        let mirror_gpa = f.required("mirror_gpa");
        f.done()?;
        Some(Self { guest_gpa: guest_gpa?, size_bytes: size_bytes?, mirror_gpa: mirror_gpa? })
    }
}

impl Decode for ConfidentialityBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let known =
            [("none", Self::None), ("sev", Self::Sev), ("sev-es", Self::SevEs), ("sev-snp", Self::SevSnp)];
        one_of(node, errors, &known)
    }
}

impl From<TupleBody> for Tuple {
    fn from(body: TupleBody) -> Self {
        Self {
            guest: Gpa::new(body.guest_gpa),
            len: body.size_bytes,
            mirror: MirrorGpa::new(body.mirror_gpa),
        }
    }
}

impl From<ConfidentialityBody> for Confidentiality {
    fn from(body: ConfidentialityBody) -> Self {
        match body {
            ConfidentialityBody::None => Self::None,
            ConfidentialityBody::Sev => Self::Sev,
            ConfidentialityBody::SevEs => Self::SevEs,
            ConfidentialityBody::SevSnp => Self::SevSnp,
        }
    }
}

impl From<Confidentiality> for ConfidentialityBody {
    fn from(level: Confidentiality) -> Self {
        match level {
            Confidentiality::None => Self::None,
            Confidentiality::Sev => Self::Sev,
            Confidentiality::SevEs => Self::SevEs,
            Confidentiality::SevSnp => Self::SevSnp,
        }
    }
}

impl Decode for HostLimitsBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let max_phys_bits = f.int("max_phys_bits", 36..=52);
        let c_bit_position = f.optional_int("c_bit_position", 32..=63);
        let phys_bit_reduction = f.int_or("phys_bit_reduction", 0..=16, 0);
        let slot_budget = f.int("slot_budget", 1..=32_768);
        let gib_pages = f.required("gib_pages");
        f.done()?;
        Some(Self {
            max_phys_bits: max_phys_bits?,
            c_bit_position: c_bit_position?,
            phys_bit_reduction: phys_bit_reduction?,
            slot_budget: slot_budget?,
            gib_pages: gib_pages?,
        })
    }
}

impl From<HostLimitsBody> for HostLimits {
    fn from(body: HostLimitsBody) -> Self {
        Self {
            max_phys_bits: body.max_phys_bits,
            c_bit: body.c_bit_position,
            phys_bit_reduction: body.phys_bit_reduction,
            slot_budget: body.slot_budget,
            gib_pages: body.gib_pages,
        }
    }
}

impl From<HostLimits> for HostLimitsBody {
    fn from(limits: HostLimits) -> Self {
        Self {
            max_phys_bits: limits.max_phys_bits,
            c_bit_position: limits.c_bit,
            phys_bit_reduction: limits.phys_bit_reduction,
            slot_budget: limits.slot_budget,
            gib_pages: limits.gib_pages,
        }
    }
}

/// The address space of a mirror, planned or in force.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AddressSpacePlan {
    /// The strategy that it follows.
    pub strategy: StrategyBody,
    /// What the guest's hardware protects.
    pub confidentiality: ConfidentialityBody,
    /// Which addresses the helper is asked by: `ram_addr` (place in RAM) or `gpa` (guest-physical address).
    #[schema(example = "ram_addr")]
    pub addressing: &'static str,
    /// Distance in bytes between a RAM address and its place in the RAM window. 0 under `identity-cbit`,
    /// where it is not constant.
    pub shift_bytes: u64,
    /// Memory slots of the mirror. They do not overlap and are sorted by address.
    pub slots: Vec<Slot>,
    /// The size and root of the helper's page tables.
    pub page_tables: PageTablesSummary,
    /// How much the page tables cover.
    pub coverage: CoverageBody,
    /// What the page tables map: the parts of the helper and its windows.
    pub mappings: Vec<Mapping>,
    /// Where the helper is in memory.
    pub helper: HelperPlace,
    /// The rings and buffers that the helper shares with the host.
    pub mailbox: Mailbox,
    /// RAM that the helper may export and import.
    pub allowed: Vec<AllowedRange>,
    /// RAM that the helper cannot reach, and why.
    pub unreachable: Vec<UnreachableRange>,
    /// What this address space exposes.
    pub exposures: Vec<PlanExposure>,
}

/// One memory slot of a mirror.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Slot {
    /// Its first address in the mirror's physical address space.
    pub mirror_gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// What the slot is for: `low_window`, `ram_window`, `vmsa`, `helper`, `declared_piece`, `helper_private`
    /// or `mailbox`. More purposes may be added.
    #[schema(example = "ram_window")]
    pub purpose: &'static str,
    /// What is behind it: `ram`, `private` (memory that only the mirror has) or `mailbox`.
    #[schema(example = "ram")]
    pub backing: &'static str,
    /// For a `ram` slot: the RAM address of its first byte.
    pub ram_addr: Option<u64>,
    /// For a `ram` slot: the name of the RAM block in which it starts.
    pub block: Option<String>,
    /// For a `private` slot: the offset of its first byte in the helper's block.
    pub private_offset_bytes: Option<u64>,
    /// Whether the mirror can only read it.
    pub read_only: bool,
}

/// How much the page tables cover, in numbers.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[schema(as = PageTableCoverage)]
pub struct CoverageBody {
    /// Entries in use in the root table. Each covers 512 GiB.
    pub pml4_entries: u64,
    /// Number of pages of 1 GiB.
    pub gib_pages: u64,
    /// Number of pages of 2 MiB.
    pub mib2_pages: u64,
    /// Number of pages of 4 KiB.
    pub kib4_pages: u64,
    /// Bytes that are mapped without the C-bit, so that the host can read them.
    pub alias_bytes: u64,
    /// Bytes of RAM that the helper's window shows.
    pub window_bytes: u64,
}

/// The helper's page tables, in numbers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PageTablesSummary {
    /// Mirror-physical address of the root table (CR3 without the C-bit).
    pub root: u64,
    /// Number of pages that hold tables.
    pub pages: u64,
    /// Bytes of the tables.
    pub bytes: u64,
}

/// One contiguous mapping in the helper's address space.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Mapping {
    /// What the mapping is for, such as `ram_window`, `mailbox`, `helper_text` or `helper_data`. More
    /// purposes may be added.
    #[schema(example = "ram_window")]
    pub purpose: &'static str,
    /// First virtual address of the mapping.
    pub helper_va: u64,
    /// Mirror-physical address that it leads to.
    pub mirror_gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// What the helper may do there: `read`, `read_write` or `read_execute`.
    #[schema(example = "read_write")]
    pub access: &'static str,
    /// Whether the C-bit is set. It has no effect on a host without one.
    pub encrypted: bool,
    /// The RAM block that it leads to, or the first of several. Null for the mailbox and for memory that only
    /// the mirror has.
    pub block: Option<String>,
}

/// Where the helper is in memory.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperPlace {
    /// Mirror-physical address of the first page of its image, which is where its block begins. `pieces`
    /// lists the rest.
    pub mirror_gpa: u64,
    /// The pieces of its block that the mirror has, by offset.
    pub pieces: Vec<HelperPieceBody>,
    /// Offset of the configuration pages in the block, in bytes.
    pub config_offset_bytes: u64,
    /// Offset of the page with the secret, in bytes.
    pub secret_offset_bytes: u64,
    /// Offset of the workers' areas, in bytes.
    pub workers_offset_bytes: u64,
    /// Offset of the page maps, in bytes.
    pub maps_offset_bytes: u64,
    /// Offset of the page tables, in bytes.
    pub tables_offset_bytes: u64,
}

/// A piece of the helper's block.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[schema(as = HelperPiece)]
pub struct HelperPieceBody {
    /// Offset of its first byte in the block.
    pub offset_bytes: u64,
    /// Mirror-physical address of its first byte.
    pub mirror_gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// The memory that host and helper share.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Mailbox {
    /// Number of workers that it serves.
    pub workers: u32,
    /// How many batches each worker may have in flight.
    pub slots: u32,
    /// Mirror-physical address of its first byte.
    pub mirror_gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// A range of RAM that the helper may export and import.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AllowedRange {
    /// RAM address of the first byte.
    pub ram_addr: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// The address by which the helper is asked for the first byte. Whether it is a RAM address or a
    /// guest-physical one is told by `addressing`.
    pub helper_addr: u64,
    /// Its first address in the mirror's physical address space.
    pub mirror_gpa: u64,
}

/// A range of RAM that the helper cannot reach.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct UnreachableRange {
    /// RAM address of the first byte.
    pub ram_addr: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Why, as a stable code. The list is open: new codes may be added.
    pub code: &'static str,
}

/// Something that an address space exposes.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PlanExposure {
    /// A stable code. The list is open: new codes may be added.
    #[schema(example = "mirror_reaches_all_ram")]
    pub code: &'static str,
    /// What it means, in a sentence.
    pub detail: String,
}

/// The name that the API uses for a purpose.
pub(crate) const fn purpose_name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::LowWindow => "low_window",
        Purpose::RamWindow => "ram_window",
        Purpose::Vmsa => "vmsa",
        Purpose::Helper => "helper",
        Purpose::DeclaredPiece => "declared_piece",
        Purpose::HelperPrivate => "helper_private",
        Purpose::Mailbox => "mailbox",
        Purpose::PlainAlias => "plain_alias",
        Purpose::HelperText => "helper_text",
        Purpose::HelperRodata => "helper_rodata",
        Purpose::HelperData => "helper_data",
        Purpose::HelperConfig => "helper_config",
        Purpose::HelperSecret => "helper_secret",
        Purpose::HelperTss => "helper_tss",
        Purpose::HelperStack => "helper_stack",
        Purpose::HelperMaps => "helper_maps",
        Purpose::HelperDigests => "helper_digests",
    }
}

const fn access_name(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::ReadWrite => "read_write",
        Access::ReadExecute => "read_execute",
    }
}

impl AddressSpacePlan {
    /// Describes `plan`, made for a guest with this layout (with the helper's block).
    pub fn new(plan: &MirrorPlan, layout: &GuestLayout) -> Self {
        let block_at =
            |ram_addr: u64| layout.block_at(mirrorvm::addr::RamAddr::new(ram_addr)).map(|b| b.name.clone());
        let p = &plan.placement;
        Self {
            strategy: Strategy::into(plan.strategy),
            confidentiality: plan.confidentiality.into(),
            addressing: match plan.addressing {
                Addressing::RamAddr => "ram_addr",
                Addressing::Gpa => "gpa",
            },
            shift_bytes: plan.shift,
            slots: plan.slots.iter().map(|s| slot(s, &block_at)).collect(),
            page_tables: PageTablesSummary {
                root: plan.tables.root().get(),
                pages: plan.tables.page_count() as u64,
                bytes: plan.tables.page_count() as u64 * mirrorvm::addr::PAGE_SIZE,
            },
            coverage: CoverageBody {
                pml4_entries: plan.coverage.pml4_entries,
                gib_pages: plan.coverage.gib_leaves,
                mib2_pages: plan.coverage.mib2_leaves,
                kib4_pages: plan.coverage.kib4_leaves,
                alias_bytes: plan.coverage.alias_bytes,
                window_bytes: plan.coverage.window_bytes,
            },
            mappings: plan
                .mappings
                .iter()
                .map(|(purpose, m)| Mapping {
                    purpose: purpose_name(*purpose),
                    helper_va: m.va.get(),
                    mirror_gpa: m.gpa.get(),
                    size_bytes: m.len,
                    access: access_name(m.access),
                    encrypted: m.encrypted,
                    block: ram_behind(plan, m.gpa.get()).and_then(block_at),
                })
                .collect(),
            helper: HelperPlace {
                // The image's first page is what every accepted plan has.
                mirror_gpa: plan.helper_at(0).map_or(0, MirrorGpa::get),
                pieces: plan
                    .helper
                    .iter()
                    .map(|h| HelperPieceBody {
                        offset_bytes: h.offset,
                        mirror_gpa: h.gpa.get(),
                        size_bytes: h.len,
                    })
                    .collect(),
                config_offset_bytes: p.config_at,
                secret_offset_bytes: p.secret_at,
                workers_offset_bytes: p.workers_at,
                maps_offset_bytes: p.maps_at,
                tables_offset_bytes: p.tables_at,
            },
            mailbox: Mailbox {
                workers: plan.mailbox.workers,
                slots: plan.mailbox.slots,
                mirror_gpa: plan.mailbox_gpa.get(),
                size_bytes: plan.mailbox.bytes(),
            },
            allowed: plan
                .window()
                .map(|w| AllowedRange {
                    ram_addr: w.ram_addr.get(),
                    size_bytes: w.len,
                    helper_addr: w.helper_addr,
                    mirror_gpa: w.gpa.get(),
                })
                .collect(),
            unreachable: plan
                .unreachable
                .iter()
                .map(|u| UnreachableRange { ram_addr: u.ram_addr.get(), size_bytes: u.len, code: u.code })
                .collect(),
            exposures: plan
                .exposures
                .iter()
                .map(|e| PlanExposure { code: e.code, detail: e.detail.clone() })
                .collect(),
        }
    }
}

fn slot(slot: &mirrorvm::address_space::MirrorSlot, block_at: &impl Fn(u64) -> Option<String>) -> Slot {
    let (backing, ram_addr, private) = match slot.backing {
        SlotBacking::Ram { ram_addr } => ("ram", Some(ram_addr.get()), None),
        SlotBacking::Private { offset } => ("private", None, Some(offset)),
        SlotBacking::Mailbox => ("mailbox", None, None),
    };
    Slot {
        mirror_gpa: slot.gpa.get(),
        size_bytes: slot.len,
        purpose: purpose_name(slot.purpose),
        backing,
        ram_addr,
        block: ram_addr.and_then(block_at),
        private_offset_bytes: private,
        read_only: slot.read_only,
    }
}

/// The RAM address behind a mirror-physical one.
fn ram_behind(plan: &MirrorPlan, gpa: u64) -> Option<u64> {
    let after = plan.slots.partition_point(|s| s.gpa.get() <= gpa);
    let slot = plan.slots.get(after.checked_sub(1)?).filter(|s| gpa - s.gpa.get() < s.len)?;
    match slot.backing {
        SlotBacking::Ram { ram_addr } => ram_addr.get().checked_add(gpa - slot.gpa.get()),
        SlotBacking::Private { .. } | SlotBacking::Mailbox => None,
    }
}

/// The largest integer that a plan may show. Addresses in plans have at most 52 bits.
const _: () = assert!(MAX_SAFE_INTEGER >= 1 << 52);
