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
    /// Describes the strategy called `kind`, on a host with these capabilities.
    pub fn of(kind: &str, capabilities: &Capabilities) -> Option<Self> {
        let kind = KINDS.iter().copied().find(|k| *k == kind)?;
        let available = capabilities.strategies.contains(&kind);
        let facts = facts(kind);
        Some(Self {
            kind,
            available,
            unavailable_reason: (!available).then_some("this build does not execute the strategy"),
            summary: facts.summary,
            parameters: facts.parameters.to_vec(),
            helper_addresses: facts.helper_addresses,
            exposes: facts.exposes.to_vec(),
            cannot_reach: facts.cannot_reach.to_vec(),
            when_to_use: facts.when_to_use,
        })
    }

    /// Describes every strategy.
    pub fn all(capabilities: &Capabilities) -> Vec<Self> {
        KINDS.iter().filter_map(|kind| Self::of(kind, capabilities)).collect()
    }
}

struct Facts {
    summary: &'static str,
    parameters: &'static [StrategyParameter],
    helper_addresses: &'static str,
    exposes: &'static [&'static str],
    cannot_reach: &'static [&'static str],
    when_to_use: &'static str,
}

const SHIFT: StrategyParameter = StrategyParameter {
    name: "shift",
    detail: "where RAM appears again: `4gib` (right above the bottom 4 GiB), `max-phys` (the upper half of what the \
             host's processors can address) or `explicit` with `bytes`, a multiple of 2 MiB from 4 GiB on",
};
const VIA: StrategyParameter = StrategyParameter {
    name: "via",
    detail: "how the helper's memory is filled: `launch-update` (loaded and measured like firmware; what kernels \
             allow) or `send-receive` (through the firmware into a context that shares the key; needs a guest policy \
             without NOSEND and NOKS, and no released KVM lets a mirror do it)",
};

const fn facts(kind: &str) -> Facts {
    match kind.as_bytes() {
        b"shifted" => Facts {
            summary: "The bottom 4 GiB appear one to one; every RAM block also appears at its RAM address plus a shift.",
            parameters: &[SHIFT],
            helper_addresses: "ram_addr",
            exposes: &[
                "the guest can write the helper, which lies in the guest's own memory, unless its block is unplugged",
                "the mirror's slots cover all RAM, the bottom 4 GiB twice",
                "a constant decides where RAM is in the mirror: it must keep clear of the C-bit and of reduced address \
                 bits, which is checked against the host's limits",
            ],
            cannot_reach: &[],
            when_to_use: "The usual choice: needs nothing of the guest, and RAM that is unplugged at the moment moves too.",
        },
        b"identity-cbit" => Facts {
            summary: "The guest's own addresses with the C-bit on every page, and a second mapping without it for the \
                      pages that are shared on purpose.",
            parameters: &[],
            helper_addresses: "gpa",
            exposes: &[
                "the guest can write the helper, which lies in the guest's own memory",
                "the mirror's slots are the guest's whole physical address space",
                "two virtual ranges differ in the C-bit alone: what the helper writes through the plain one, the host reads",
            ],
            cannot_reach: &[
                "private RAM that is not plugged (virtio-mem, PCI BARs): a plan names each range as refused",
                "RAM that is plugged more than 16 GiB above the end of all RAM addresses",
            ],
            when_to_use: "To compare with IBM's prototype, for guests whose RAM is all plugged; the only layout that \
                          SEV-SNP's rules would ever allow, as no page gets a second address.",
        },
        b"declared" => Facts {
            summary: "The helper declares which of the guest's pages it runs from; the mirror holds those and the RAM window.",
            parameters: &[],
            helper_addresses: "ram_addr",
            exposes: &[
                "the guest can write the helper's pages, as they are its own",
                "the guest decides where the helper lies in the mirror; the host checks every tuple and admits the \
                 helper's own block alone",
                "the mirror's slots cover all RAM once, and nothing else of the guest's address space but what was declared",
            ],
            cannot_reach: &[
                "a helper that has not declared itself: there is no plan until the guest is ready",
            ],
            when_to_use: "When the helper is part of the guest's firmware, in pieces whose places are known to the guest alone.",
        },
        _ => Facts {
            summary: "The helper's own memory is private to the mirror, high in its physical space; RAM is shared at its RAM address.",
            parameters: &[VIA],
            helper_addresses: "ram_addr",
            exposes: &[
                "the host chooses the helper: the guest's owner has its measurement to check",
                "the helper's memory is in no slot of the guest, so the guest's VM has to register it, or it is not pinned",
                "the mirror's slots cover all RAM once, at its RAM address",
            ],
            cannot_reach: &[],
            when_to_use: "When the guest must not be able to write the helper: the best separation on SEV and SEV-ES.",
        },
    }
}

/// All strategies.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StrategyList {
    /// One entry for each strategy.
    pub items: Vec<StrategyInfo>,
}
