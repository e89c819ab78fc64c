//! The strategies: their names and parameters, and what there is to know of each.
//!
//! Owns: the one list of kinds, from which everything that names strategies is made (`kinds!` below), and
//! the facts of each kind. Planner, host, API, demo, drawings and the documents' test go by these. Must not
//! know: how a strategy plans.
//!
//! A new kind is one entry in the list below and one of [`Strategy`]; from there the compiler leads: every
//! table matches on the kind without a rest.

use serde::{Deserialize, Serialize};

use super::Addressing;
use crate::named::named;
use crate::reading::{Decode, Errors, Fields, Node, one_of};

/// How far the RAM window of the `shifted` strategy is moved up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Shift {
    /// Right above the bottom 4 GiB.
    #[serde(rename = "4gib")]
    FourGib,
    /// The upper half of what a guest may address: 2^(MAXPHYADDR - reduction - 1), from CPUID.
    MaxPhys,
    /// A value of the caller's choice, in bytes: a multiple of 2 MiB, at least 4 GiB.
    Explicit {
        /// Bytes added to every `RamAddr`.
        bytes: u64,
    },
}

/// Which way pages reach a `psp-copied` helper's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PspVia {
    /// The helper image is loaded and measured like firmware, for the mirror alone.
    LaunchUpdate,
    /// Firmware SEND/RECEIVE into a context that shares the key.
    SendReceive,
}

/// How a mirror's address space is laid out. The names are the API's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Strategy {
    /// Bottom 4 GiB one to one, all RAM again at `RamAddr + shift`.
    Shifted {
        /// Where the RAM window starts.
        shift: Shift,
    },
    /// The guest's own addresses, with the C-bit on every page (IBM's prototype).
    IdentityCbit,
    /// The helper declares which of the guest's pages it needs.
    Declared,
    /// The helper's memory is private to the mirror.
    PspCopied {
        /// How its content gets there.
        via: PspVia,
    },
}

named! {
    /// What kind a strategy is, whatever its parameters.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum StrategyKind {
        /// [`Strategy::Shifted`].
        Shifted = "shifted",
        /// [`Strategy::IdentityCbit`].
        IdentityCbit = "identity-cbit",
        /// [`Strategy::Declared`].
        Declared = "declared",
        /// [`Strategy::PspCopied`].
        PspCopied = "psp-copied",
    }
}

/// What a caller chooses of a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrategyParameter {
    /// Its name in the strategy's object.
    pub name: &'static str,
    /// What it means, and its values.
    pub detail: &'static str,
}

/// What there is to know of a strategy before one is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrategyFacts {
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// What a caller chooses.
    pub parameters: &'static [StrategyParameter],
    /// What the helper calls pages by.
    pub helper_addresses: Addressing,
    /// What it lays open, each in a clause.
    pub exposes: &'static [&'static str],
    /// What it cannot reach, each in a clause.
    pub cannot_reach: &'static [&'static str],
    /// When to choose it.
    pub when_to_use: &'static str,
    /// The strategies of this kind that an encrypted guest's helper is loaded for at launch: nobody can write
    /// its memory later, so whatever is not among them has to do with what one of them uses.
    pub at_launch: &'static [Strategy],
    /// Whether the helper's memory is the mirror's alone. A guest can have one mirror whose helper lies in
    /// the guest's own memory, and one beside it whose helper does not.
    pub has_private_helper: bool,
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

impl Decode for Shift {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let decoded = match f.kind(&["4gib", "max-phys", "explicit"])? {
            "4gib" => Self::FourGib,
            "max-phys" => Self::MaxPhys,
            _ => {
                let bytes = f.required("bytes");
                f.done()?;
                return Some(Self::Explicit { bytes: bytes? });
            }
        };
        f.done().map(|()| decoded)
    }
}

impl Decode for PspVia {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("launch-update", Self::LaunchUpdate), ("send-receive", Self::SendReceive)])
    }
}

impl Decode for Strategy {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match StrategyKind::named(f.kind(StrategyKind::NAMES)?)? {
            StrategyKind::Shifted => {
                let shift = f.required("shift");
                f.done()?;
                Some(Self::Shifted { shift: shift? })
            }
            StrategyKind::IdentityCbit => f.done().map(|()| Self::IdentityCbit),
            StrategyKind::Declared => f.done().map(|()| Self::Declared),
            StrategyKind::PspCopied => {
                let via = f.required("via");
                f.done()?;
                Some(Self::PspCopied { via: via? })
            }
        }
    }
}

impl StrategyKind {
    /// What there is to know of it.
    pub const fn facts(self) -> &'static StrategyFacts {
        match self {
            Self::Shifted => &SHIFTED,
            Self::IdentityCbit => &IDENTITY_CBIT,
            Self::Declared => &DECLARED,
            Self::PspCopied => &PSP_COPIED,
        }
    }
}

impl Strategy {
    /// Its kind.
    pub const fn kind(&self) -> StrategyKind {
        match self {
            Self::Shifted { .. } => StrategyKind::Shifted,
            Self::IdentityCbit => StrategyKind::IdentityCbit,
            Self::Declared => StrategyKind::Declared,
            Self::PspCopied { .. } => StrategyKind::PspCopied,
        }
    }

    /// The name of its kind.
    pub const fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// The way by which its helper's memory is filled, where it has a choice of ways.
    pub const fn via(&self) -> Option<PspVia> {
        match self {
            Self::PspCopied { via } => Some(*via),
            Self::Shifted { .. } | Self::IdentityCbit | Self::Declared => None,
        }
    }

    /// Whether its helper comes by the firmware's SEND and RECEIVE.
    pub fn is_sent_by_firmware(&self) -> bool {
        self.via() == Some(PspVia::SendReceive)
    }

    /// Whether the helper's memory is the mirror's alone: see [`StrategyFacts::has_private_helper`].
    pub const fn has_private_helper(&self) -> bool {
        self.kind().facts().has_private_helper
    }
}

const SHIFTED: StrategyFacts = StrategyFacts {
    summary: "The bottom 4 GiB appear one to one; every RAM block also appears at its RAM address plus a shift.",
    parameters: &[SHIFT],
    helper_addresses: Addressing::RamAddr,
    exposes: &[
        "the guest can write the helper, which lies in the guest's own memory, unless its block is unplugged",
        "the mirror's slots cover all RAM, the bottom 4 GiB twice",
        "a constant decides where RAM is in the mirror: it must keep clear of the C-bit and of reduced address \
                 bits, which is checked against the host's limits",
    ],
    cannot_reach: &[],
    when_to_use: "The usual choice: needs nothing of the guest, and RAM that is unplugged at the moment moves too.",
    at_launch: &[Strategy::Shifted { shift: Shift::FourGib }, Strategy::Shifted { shift: Shift::MaxPhys }],
    has_private_helper: false,
};

const IDENTITY_CBIT: StrategyFacts = StrategyFacts {
    summary: "The guest's own addresses with the C-bit on every page, and a second mapping without it for the \
                      pages that are shared on purpose.",
    parameters: &[],
    helper_addresses: Addressing::Gpa,
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
    at_launch: &[Strategy::IdentityCbit],
    has_private_helper: false,
};

const DECLARED: StrategyFacts = StrategyFacts {
    summary: "The helper declares which of the guest's pages it runs from; the mirror holds those and the RAM window.",
    parameters: &[],
    helper_addresses: Addressing::RamAddr,
    exposes: &[
        "the guest can write the helper's pages, as they are its own",
        "the guest decides where the helper lies in the mirror; the host checks every tuple and admits the \
                 helper's own block alone",
        "the mirror's slots cover all RAM once, and nothing else of the guest's address space but what was declared",
    ],
    cannot_reach: &["a helper that has not declared itself: there is no plan until the guest is ready"],
    when_to_use: "When the helper is part of the guest's firmware, in pieces whose places are known to the guest alone.",
    at_launch: &[Strategy::Declared],
    has_private_helper: false,
};

const PSP_COPIED: StrategyFacts = StrategyFacts {
    summary: "The helper's own memory is private to the mirror, high in its physical space; RAM is shared at its RAM address.",
    parameters: &[VIA],
    helper_addresses: Addressing::RamAddr,
    exposes: &[
        "the host chooses the helper: the guest's owner has its measurement to check",
        "the helper's memory is in no slot of the guest, so the guest's VM has to register it, or it is not pinned",
        "the mirror's slots cover all RAM once, at its RAM address",
    ],
    cannot_reach: &[],
    when_to_use: "When the guest must not be able to write the helper: the best separation on SEV and SEV-ES.",
    at_launch: &[Strategy::PspCopied { via: PspVia::LaunchUpdate }],
    has_private_helper: true,
};
