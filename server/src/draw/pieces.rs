//! What is in the four bars: pieces with their labels and colours, bands between them, the legend's words.

use mirrorvm::addr::MirrorGpa;
use mirrorvm::address_space::{
    Access, Addressing, BlockRole, Confidentiality, GuestLayout, Mapping, MirrorPlan, MirrorSlot,
    PlannedMapping, Purpose, RamBlock, SlotBacking,
};

use super::bar::Piece;

/// Classes in the order of the legend, with what they mean.
pub(super) const LEGEND: [(&str, &str); 9] = [
    ("ram", "RAM"),
    ("low", "RAM again, bottom 4 GiB one to one"),
    ("off", "RAM that the guest does not see now"),
    ("out", "out of the helper's reach"),
    ("vmsa", "save areas of vCPUs"),
    ("helper", "the helper's block"),
    ("code", "the helper's code"),
    ("private", "the helper's, the mirror's alone"),
    ("mailbox", "mailbox (host memory, not encrypted)"),
];

/// Bytes that two neighbouring bars show, each at its own address.
pub(super) struct Band {
    pub left: u64,
    pub right: u64,
    pub len: u64,
    pub class: &'static str,
}

/// What the guest sees.
pub(super) fn guest(layout: &GuestLayout) -> Vec<Piece> {
    let parts = layout.plugged().into_iter();
    parts.map(|(b, p)| Piece::new(p.gpa.get(), p.len, part_label(b, p.len), role_class(b.role))).collect()
}

fn part_label(block: &RamBlock, len: u64) -> String {
    if len == block.size { block.name.clone() } else { format!("{} (part)", block.name) }
}

/// RAM as the host counts it, with what is unplugged, unused and out of reach.
pub(super) fn ram(plan: &MirrorPlan, layout: &GuestLayout) -> Vec<Piece> {
    let mut list = Vec::new();
    for b in layout.blocks() {
        let start = b.ram_addr.get();
        if b.role != BlockRole::Ram {
            let unused = plan.strategy.has_private_helper() && b.role == BlockRole::Helper;
            let note = match (unused, b.plugs.is_empty()) {
                (true, _) => " (unused)",
                (false, true) => " (unplugged)",
                (false, false) => "",
            };
            list.push(Piece::new(start, b.size, format!("{}{note}", b.name), role_class(b.role)));
            continue;
        }
        let mut at = 0;
        for (from, to) in b.plugs.iter().map(|p| (p.offset, p.offset + p.len)).chain([(b.size, b.size)]) {
            if from > at {
                let left = plan.unreachable.iter().any(|u| u.ram_addr.get() == start + at);
                let class = if left { "out" } else { "off" };
                list.push(Piece::new(start + at, from - at, format!("{} (unplugged)", b.name), class));
            }
            if to > from {
                list.push(Piece::new(start + from, to - from, part_label(b, to - from), "ram"));
            }
            at = to;
        }
    }
    list
}

/// What the mirror sees.
pub(super) fn mirror(plan: &MirrorPlan, layout: &GuestLayout) -> Vec<Piece> {
    let name = |ram| layout.block_at(ram).map_or_else(String::new, |b| b.name.clone());
    let piece = |s: &MirrorSlot| {
        let what = |otherwise: &dyn Fn() -> String| {
            if s.read_only { "code, read only".to_owned() } else { otherwise() }
        };
        let label = match (s.backing, s.purpose) {
            (SlotBacking::Mailbox, _) if plan.addressing == Addressing::Gpa => {
                "mailbox (plain alias)".to_owned()
            }
            (SlotBacking::Mailbox, _) => "mailbox".to_owned(),
            (SlotBacking::Private { .. }, _) => format!("private: {}", what(&|| parts(plan, s))),
            (SlotBacking::Ram { .. }, Purpose::DeclaredPiece) => {
                format!("declared: {}", what(&|| parts(plan, s)))
            }
            (SlotBacking::Ram { ram_addr }, purpose) => {
                let prefix = if purpose == Purpose::LowWindow { "low" } else { "window" };
                format!("{prefix}: {}", what(&|| name(ram_addr)))
            }
        };
        Piece::new(s.gpa.get(), s.len, label, slot_class(s, layout))
    };
    plan.slots.iter().map(piece).collect()
}

/// Which parts of the helper lie in a slot, by their short names.
fn parts(plan: &MirrorPlan, slot: &MirrorSlot) -> String {
    let holds = |gpa: MirrorGpa| gpa >= slot.gpa && gpa.get() - slot.gpa.get() < slot.len;
    let mut names: Vec<&str> = Vec::new();
    let tables = holds(plan.tables.root()).then_some("tables");
    for name in plan.mappings.iter().filter(|(_, m)| holds(m.gpa)).map(|(p, _)| part_name(*p)).chain(tables) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.len() > 4 { "the helper".to_owned() } else { names.join(", ") }
}

const fn part_name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::HelperText => "code",
        Purpose::HelperRodata | Purpose::HelperData => "data",
        Purpose::HelperConfig => "config",
        Purpose::HelperSecret => "secret",
        Purpose::HelperTss => "TSS",
        Purpose::HelperStack => "stacks",
        Purpose::HelperMaps => "maps",
        Purpose::HelperDigests => "digests",
        Purpose::LowWindow
        | Purpose::RamWindow
        | Purpose::Vmsa
        | Purpose::Helper
        | Purpose::DeclaredPiece
        | Purpose::HelperPrivate
        | Purpose::Mailbox
        | Purpose::PlainAlias => "RAM",
    }
}

/// Between what the guest sees and RAM.
pub(super) fn guest_bands(layout: &GuestLayout) -> Vec<Band> {
    let band = |(b, p): (&RamBlock, mirrorvm::address_space::Plug)| Band {
        left: p.gpa.get(),
        right: b.ram_addr.get() + p.offset,
        len: p.len,
        class: role_class(b.role),
    };
    layout.plugged().into_iter().map(band).collect()
}

/// Between RAM and what the mirror sees.
pub(super) fn mirror_bands(plan: &MirrorPlan, layout: &GuestLayout) -> Vec<Band> {
    let band = |s: &MirrorSlot| match s.backing {
        SlotBacking::Ram { ram_addr } => {
            let class = slot_class(s, layout);
            Some(Band { left: ram_addr.get(), right: s.gpa.get(), len: s.len, class })
        }
        SlotBacking::Private { .. } | SlotBacking::Mailbox => None,
    };
    plan.slots.iter().filter_map(band).collect()
}

/// What the helper sees, by its page tables.
pub(super) fn helper(plan: &MirrorPlan) -> Vec<Piece> {
    let piece = |(purpose, m): &PlannedMapping| {
        let label = match purpose {
            Purpose::RamWindow => "window on RAM",
            Purpose::LowWindow => "window, bottom 4 GiB",
            Purpose::Mailbox => "mailbox",
            Purpose::PlainAlias => "mailbox (plain alias)",
            Purpose::Vmsa => "save areas",
            Purpose::HelperRodata => "constants",
            Purpose::Helper | Purpose::DeclaredPiece | Purpose::HelperPrivate => "the helper",
            Purpose::HelperText
            | Purpose::HelperData
            | Purpose::HelperConfig
            | Purpose::HelperSecret
            | Purpose::HelperTss
            | Purpose::HelperStack
            | Purpose::HelperMaps
            | Purpose::HelperDigests => part_name(*purpose),
        };
        let piece = Piece::new(m.va.get(), m.len, label.to_owned(), mapping_class(*purpose, plan));
        piece.with_access(access(m, plan.confidentiality.is_encrypted()))
    };
    plan.mappings.iter().map(piece).collect()
}

/// Between what the mirror sees and what the helper sees.
pub(super) fn helper_bands(plan: &MirrorPlan) -> Vec<Band> {
    let band = |(purpose, m): &PlannedMapping| Band {
        left: m.gpa.get(),
        right: m.va.get(),
        len: m.len,
        class: mapping_class(*purpose, plan),
    };
    let mut list: Vec<Band> = plan.mappings.iter().map(band).collect();
    list.sort_by_key(|b| b.right);
    list
}

/// What the helper may do there, and, where there is a C-bit, whether it is set.
const fn access(mapping: &Mapping, encrypted: bool) -> &'static str {
    match (mapping.access, encrypted, mapping.encrypted) {
        (Access::Read, false, _) => "R",
        (Access::ReadWrite, false, _) => "RW",
        (Access::ReadExecute, false, _) => "RX",
        (Access::Read, true, true) => "R C",
        (Access::ReadWrite, true, true) => "RW C",
        (Access::ReadExecute, true, true) => "RX C",
        (Access::Read, true, false) => "R -",
        (Access::ReadWrite, true, false) => "RW -",
        (Access::ReadExecute, true, false) => "RX -",
    }
}

fn mapping_class(purpose: Purpose, plan: &MirrorPlan) -> &'static str {
    match purpose {
        Purpose::RamWindow => "ram",
        Purpose::LowWindow => "low",
        Purpose::Vmsa => "vmsa",
        Purpose::Mailbox | Purpose::PlainAlias => "mailbox",
        Purpose::HelperText => "code",
        Purpose::Helper
        | Purpose::DeclaredPiece
        | Purpose::HelperPrivate
        | Purpose::HelperRodata
        | Purpose::HelperData
        | Purpose::HelperConfig
        | Purpose::HelperSecret
        | Purpose::HelperTss
        | Purpose::HelperStack
        | Purpose::HelperMaps
        | Purpose::HelperDigests => {
            if plan.strategy.has_private_helper() {
                "private"
            } else {
                "helper"
            }
        }
    }
}

const fn role_class(role: BlockRole) -> &'static str {
    match role {
        BlockRole::Ram => "ram",
        BlockRole::Vmsa => "vmsa",
        BlockRole::Helper => "helper",
    }
}

fn slot_class(slot: &MirrorSlot, layout: &GuestLayout) -> &'static str {
    let SlotBacking::Ram { ram_addr } = slot.backing else {
        let private = matches!(slot.backing, SlotBacking::Private { .. });
        return if slot.read_only {
            "code"
        } else if private {
            "private"
        } else {
            "mailbox"
        };
    };
    match layout.block_at(ram_addr).map_or(BlockRole::Ram, |b| b.role) {
        BlockRole::Helper if slot.read_only => "code",
        BlockRole::Ram if slot.purpose == Purpose::LowWindow => "low",
        role => role_class(role),
    }
}

/// The lines under the heading.
pub(super) fn facts(plan: &MirrorPlan) -> [String; 3] {
    let by = match plan.addressing {
        Addressing::RamAddr => "RAM address",
        Addressing::Gpa => "guest physical address",
    };
    let guard = match plan.confidentiality {
        Confidentiality::None => "guest without encryption",
        Confidentiality::Sev => "guest with SEV",
        Confidentiality::SevEs => "guest with SEV-ES",
        Confidentiality::SevSnp => "guest with SEV-SNP",
    };
    let c = &plan.coverage;
    let counts = [
        (c.pml4_entries, "root entries of 512 GiB"),
        (c.gib_leaves, "pages of 1 GiB"),
        (c.mib2_leaves, "of 2 MiB"),
        (c.kib4_leaves, "of 4 KiB"),
    ];
    let used = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
    let used: Vec<String> = used.collect();
    [
        format!(
            "{guard}; the helper calls pages by their {by}; addresses grow upwards, heights are logarithmic, gaps are cut"
        ),
        format!("the helper's page tables: {} pages; {}", c.table_pages, used.join(", ")),
        if plan.confidentiality.is_encrypted() {
            "R, W, X: what the helper may do there; C: with the C-bit, in the guest's key; -: without it, the host reads along".into()
        } else {
            "R, W, X: what the helper may do there; nothing is encrypted, so no page has a C-bit".into()
        },
    ]
}
