//! The strategy union, and what the API tells of each strategy.

use mirrorvm::address_space::{PspVia, Shift, Strategy};
use mirrorvm::host::Capabilities;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node, one_of};

/// How far the RAM window of `shifted` is moved up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Shift)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ShiftBody {
    /// Right above the bottom 4 GiB.
    #[serde(rename = "4gib")]
    #[schema(title = "ShiftFourGib")]
    FourGib {},
    /// The upper half of what a guest may address: 2^(MAXPHYADDR - reduction - 1).
    #[schema(title = "ShiftMaxPhys")]
    MaxPhys {},
    /// A value of the caller's choice.
    #[schema(title = "ShiftExplicit")]
    Explicit {
        /// Bytes added to every RAM address: a multiple of 2 MiB, at least 4 GiB.
        #[schema(example = 4294967296u64, maximum = 9007199254740991u64)]
        bytes: u64,
    },
}

impl Decode for ShiftBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let decoded = match f.kind(&["4gib", "max-phys", "explicit"])? {
            "4gib" => Self::FourGib {},
            "max-phys" => Self::MaxPhys {},
            _ => {
                let bytes = f.required("bytes");
                f.done()?;
                return Some(Self::Explicit { bytes: bytes? });
            }
        };
        f.done().map(|()| decoded)
    }
}

/// Which way a `psp-copied` helper's memory is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = PspVia)]
#[serde(rename_all = "kebab-case")]
pub enum PspViaBody {
    /// The helper image is loaded and measured like firmware, for the mirror alone.
    LaunchUpdate,
    /// Firmware SEND/RECEIVE into a context that shares the key.
    SendReceive,
}

impl Decode for PspViaBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("launch-update", Self::LaunchUpdate), ("send-receive", Self::SendReceive)])
    }
}

/// How a mirror's address space is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Strategy)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum StrategyBody {
    /// Bottom 4 GiB one to one, all RAM again at its RAM address plus the shift.
    #[schema(title = "StrategyShifted")]
    Shifted {
        /// Where the RAM window starts.
        shift: ShiftBody,
    },
    /// The guest's own addresses, with the C-bit on every page.
    #[schema(title = "StrategyIdentityCbit")]
    IdentityCbit {},
    /// The helper declares which of the guest's pages it needs.
    #[schema(title = "StrategyDeclared")]
    Declared {},
    /// The helper's memory is private to the mirror.
    #[schema(title = "StrategyPspCopied")]
    PspCopied {
        /// How its content gets there.
        via: PspViaBody,
    },
}

/// The kinds of strategy, as the API spells them.
pub const KINDS: [&str; 4] = ["shifted", "identity-cbit", "declared", "psp-copied"];

impl Decode for StrategyBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match f.kind(&KINDS)? {
            "shifted" => {
                let shift = f.required("shift");
                f.done()?;
                Some(Self::Shifted { shift: shift? })
            }
            "identity-cbit" => f.done().map(|()| Self::IdentityCbit {}),
            "declared" => f.done().map(|()| Self::Declared {}),
            _ => {
                let via = f.required("via");
                f.done()?;
                Some(Self::PspCopied { via: via? })
            }
        }
    }
}

impl From<StrategyBody> for Strategy {
    fn from(body: StrategyBody) -> Self {
        match body {
            StrategyBody::Shifted { shift } => Self::Shifted {
                shift: match shift {
                    ShiftBody::FourGib {} => Shift::FourGib,
                    ShiftBody::MaxPhys {} => Shift::MaxPhys,
                    ShiftBody::Explicit { bytes } => Shift::Explicit { bytes },
                },
            },
            StrategyBody::IdentityCbit {} => Self::IdentityCbit,
            StrategyBody::Declared {} => Self::Declared,
            StrategyBody::PspCopied { via } => Self::PspCopied {
                via: match via {
                    PspViaBody::LaunchUpdate => PspVia::LaunchUpdate,
                    PspViaBody::SendReceive => PspVia::SendReceive,
                },
            },
        }
    }
}

impl From<Strategy> for StrategyBody {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Shifted { shift } => Self::Shifted {
                shift: match shift {
                    Shift::FourGib => ShiftBody::FourGib {},
                    Shift::MaxPhys => ShiftBody::MaxPhys {},
                    Shift::Explicit { bytes } => ShiftBody::Explicit { bytes },
                },
            },
            Strategy::IdentityCbit => Self::IdentityCbit {},
            Strategy::Declared => Self::Declared {},
            Strategy::PspCopied { via } => Self::PspCopied {
                via: match via {
                    PspVia::LaunchUpdate => PspViaBody::LaunchUpdate,
                    PspVia::SendReceive => PspViaBody::SendReceive,
                },
            },
        }
    }
}

/// What the API tells of a strategy.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyInfo {
    /// Its name.
    #[schema(example = "shifted")]
    pub kind: &'static str,
    /// Whether this host executes it.
    pub available: bool,
    /// Why not, when it does not.
    pub unavailable_reason: Option<&'static str>,
    /// What it does.
    pub summary: &'static str,
    /// What the helper calls pages by: `ram_addr` or `gpa`.
    #[schema(example = "ram_addr")]
    pub helper_addresses: &'static str,
    /// What it lays open.
    pub exposes: Vec<&'static str>,
    /// What it cannot reach.
    pub cannot_reach: Vec<&'static str>,
    /// When to choose it.
    pub when_to_use: &'static str,
}

impl StrategyInfo {
    /// About the strategy called `kind`, on a host with these capabilities.
    pub fn of(kind: &str, capabilities: &Capabilities) -> Option<Self> {
        let kind = KINDS.iter().copied().find(|k| *k == kind)?;
        let available = capabilities.strategies.contains(&kind);
        let facts = facts(kind);
        Some(Self {
            kind,
            available,
            unavailable_reason: (!available).then_some("this build does not execute the strategy"),
            summary: facts.summary,
            helper_addresses: facts.helper_addresses,
            exposes: facts.exposes.to_vec(),
            cannot_reach: facts.cannot_reach.to_vec(),
            when_to_use: facts.when_to_use,
        })
    }

    /// About every strategy.
    pub fn all(capabilities: &Capabilities) -> Vec<Self> {
        KINDS.iter().filter_map(|kind| Self::of(kind, capabilities)).collect()
    }
}

struct Facts {
    summary: &'static str,
    helper_addresses: &'static str,
    exposes: &'static [&'static str],
    cannot_reach: &'static [&'static str],
    when_to_use: &'static str,
}

fn facts(kind: &str) -> Facts {
    match kind {
        "shifted" => Facts {
            summary: "The bottom 4 GiB appear one to one; every RAM block also appears at its RAM address plus a shift.",
            helper_addresses: "ram_addr",
            exposes: &[
                "the mirror's slots cover all RAM, the bottom 4 GiB twice",
                "a helper that lies in plugged RAM can be written by the guest",
            ],
            cannot_reach: &[],
            when_to_use: "The usual choice: RAM that is unplugged at the moment moves too.",
        },
        "identity-cbit" => Facts {
            summary: "The guest's own addresses with the C-bit on every page, and a second mapping without it for shared pages.",
            helper_addresses: "gpa",
            exposes: &["the mirror's slots cover the guest's whole address space"],
            cannot_reach: &["private pages that are not plugged"],
            when_to_use: "To compare with IBM's prototype, or for guests whose RAM is all plugged.",
        },
        "declared" => Facts {
            summary: "The helper declares which of the guest's pages it runs from; the mirror holds those and the RAM window.",
            helper_addresses: "ram_addr",
            exposes: &["the guest can write the helper's pages, as they are its own"],
            cannot_reach: &[],
            when_to_use: "When the helper is part of the guest's firmware and its place is known to the guest alone.",
        },
        _ => Facts {
            summary: "The helper's own memory is private to the mirror; only the RAM window is shared.",
            helper_addresses: "ram_addr",
            exposes: &[],
            cannot_reach: &[],
            when_to_use: "When the guest must not be able to write the helper.",
        },
    }
}

/// The strategies.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyList {
    /// One entry each.
    pub items: Vec<StrategyInfo>,
}
