//! The strategy union, and what the API tells of each strategy.

use mirrorvm::address_space::{Addressing, PspVia, Shift, Strategy, StrategyKind};
use mirrorvm::host::Capabilities;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Node};

/// How far the RAM window of `shifted` is moved up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Shift)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ShiftBody {
    /// By 4 GiB: the window begins right above the bottom 4 GiB.
    #[serde(rename = "4gib")]
    #[schema(title = "ShiftFourGib")]
    FourGib {},
    /// To the upper half of what a guest can address: 2^(MAXPHYADDR - reduction - 1).
    #[schema(title = "ShiftMaxPhys")]
    MaxPhys {},
    /// By a value of the caller's choice.
    #[schema(title = "ShiftExplicit")]
    Explicit {
        /// Bytes added to every RAM address: a multiple of 2 MiB, at least 4 GiB.
        #[schema(example = 4294967296u64, maximum = 9007199254740991u64)]
        bytes: u64,
    },
}

/// How the memory of a `psp-copied` helper is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = PspVia)]
#[serde(rename_all = "kebab-case")]
pub enum PspViaBody {
    /// The helper image is loaded and measured like firmware, for the mirror alone.
    LaunchUpdate,
    /// The firmware sends the helper and receives it into a context that shares the key.
    SendReceive,
}

/// How a mirror's address space is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Strategy)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum StrategyBody {
    /// The bottom 4 GiB appear at the same addresses, and all RAM appears again at its RAM address plus the
    /// shift.
    #[schema(title = "StrategyShifted")]
    Shifted {
        /// Where the RAM window starts.
        shift: ShiftBody,
    },
    /// Everything appears at the guest's own addresses, with the C-bit on every page.
    #[schema(title = "StrategyIdentityCbit")]
    IdentityCbit {},
    /// The helper declares which of the guest's pages it needs, and the mirror has only these and the RAM
    /// window.
    #[schema(title = "StrategyDeclared")]
    Declared {},
    /// The helper's memory belongs to the mirror alone.
    #[schema(title = "StrategyPspCopied")]
    PspCopied {
        /// How the helper gets into that memory.
        via: PspViaBody,
    },
}

impl Decode for StrategyBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        Strategy::decode(node, errors).map(Self::from)
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

/// A strategy by which a mirror's address space can be laid out.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyInfo {
    /// Name of the strategy.
    #[schema(example = "shifted")]
    pub kind: &'static str,
    /// Whether this host can execute the strategy.
    pub available: bool,
    /// Why the strategy is not available. Null when it is.
    pub unavailable_reason: Option<&'static str>,
    /// What the strategy does, in a sentence.
    pub summary: &'static str,
    /// What a caller can choose.
    pub parameters: Vec<StrategyParameter>,
    /// Which addresses the helper is asked by: `ram_addr` (place in RAM) or `gpa` (guest-physical address).
    #[schema(example = "ram_addr")]
    pub helper_addresses: &'static str,
    /// What the strategy exposes.
    pub exposes: Vec<&'static str>,
    /// What the helper cannot reach under it.
    pub cannot_reach: Vec<&'static str>,
    /// When to choose the strategy.
    pub when_to_use: &'static str,
}

/// Something that a caller can choose about a strategy.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StrategyParameter {
    /// Name of the member in the strategy's object.
    #[schema(example = "shift")]
    pub name: &'static str,
    /// What the parameter means, and which values it takes.
    pub detail: &'static str,
}

impl StrategyInfo {
    /// Describes a kind of strategy, on a host with these capabilities.
    pub fn of(kind: StrategyKind, capabilities: &Capabilities) -> Self {
        let available = capabilities.strategies.contains(&kind.name());
        let facts = kind.facts();
        let parameter = |p: &mirrorvm::address_space::StrategyParameter| StrategyParameter {
            name: p.name,
            detail: p.detail,
        };
        Self {
            kind: kind.name(),
            available,
            unavailable_reason: (!available).then_some("this build does not execute the strategy"),
            summary: facts.summary,
            parameters: facts.parameters.iter().map(parameter).collect(),
            helper_addresses: match facts.helper_addresses {
                Addressing::RamAddr => "ram_addr",
                Addressing::Gpa => "gpa",
            },
            exposes: facts.exposes.to_vec(),
            cannot_reach: facts.cannot_reach.to_vec(),
            when_to_use: facts.when_to_use,
        }
    }

    /// Describes every kind of strategy.
    pub fn all(capabilities: &Capabilities) -> Vec<Self> {
        StrategyKind::ALL.iter().map(|kind| Self::of(*kind, capabilities)).collect()
    }
}

/// All strategies.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyList {
    /// One entry for each strategy.
    pub items: Vec<StrategyInfo>,
}
