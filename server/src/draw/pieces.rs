//! What is in the three bars: pieces with their labels and colours, bands between them, the legend's words.

use mirrorvm::addr::MirrorGpa;
use mirrorvm::address_space::{
    Addressing, BlockRole, Confidentiality, GuestLayout, MirrorPlan, MirrorSlot, Purpose, RamBlock,
    SlotBacking,
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
    ("code", "the helper's code, read-only slot"),
    ("private", "the helper's, the mirror's alone"),
    ("mailbox", "mailbox (host memory, not encrypted)"),
];

/// A span of RAM that is also at an address of another bar.
pub(super) struct Band {
    pub ram: u64,
    pub address: u64,
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
        ram: b.ram_addr.get() + p.offset,
        address: p.gpa.get(),
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
            Some(Band { ram: ram_addr.get(), address: s.gpa.get(), len: s.len, class })
        }
        SlotBacking::Private { .. } | SlotBacking::Mailbox => None,
    };
    plan.slots.iter().filter_map(band).collect()
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
pub(super) fn facts(plan: &MirrorPlan) -> [String; 2] {
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
            "{guard}; the helper calls pages by their {by}; addresses grow downwards, heights are logarithmic, gaps are cut"
        ),
        format!("the helper's page tables: {} pages; {}", c.table_pages, used.join(", ")),
    ]
}
