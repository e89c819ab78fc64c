//! Address-space strategies: pure planners from a guest's layout to the mirror's address space.
//!
//! Owns: what a guest's RAM layout is, the strategies, plans, refusals, page tables. Must not know: file
//! descriptors, KVM, threads, clocks. A plan is a value; `mirror` executes it.

mod declaration;
mod declared;
mod draft;
mod exposures;
mod identity;
mod layout;
mod limits;
mod page_tables;
mod placement;
mod plan;
mod psp_copied;
mod refusal;
mod request;
mod rules;
mod shifted;
mod spans;
mod walk;

pub use declaration::{Declaration, Tuple, reference_declaration};
pub use layout::{
    BlockRole, BlockSpec, GuestLayout, HELPER_BLOCK, LayoutError, MAX_RAM_BYTES, Plug, RamBlock, VMSA_BLOCK,
};
pub use limits::HostLimits;
pub use page_tables::{Access, Mapping, PageTables, TableError};
pub use placement::{HelperPlacement, HelperSet};
pub use plan::{
    Addressing, Coverage, Exposure, HelperPiece, MirrorPlan, MirrorSlot, PlannedMapping, Purpose,
    SlotBacking, Unreachable, WindowRun, plan,
};
pub use refusal::{Refusal, RefusalCode};
pub use request::{Confidentiality, MailboxSize, PlanRequest};
pub use walk::{Translation, WalkError, walk};

use serde::{Deserialize, Serialize};

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

impl Strategy {
    /// The API's name of this strategy.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Shifted { .. } => "shifted",
            Self::IdentityCbit => "identity-cbit",
            Self::Declared => "declared",
            Self::PspCopied { .. } => "psp-copied",
        }
    }
}

/// The bytes of guest-physical space that every PC keeps one to one under `shifted`.
pub const FOUR_GIB: u64 = 4 << 30;

/// What a block of the guest is shown as in the helper's window.
const fn window_purpose(role: BlockRole) -> Purpose {
    match role {
        BlockRole::Ram => Purpose::RamWindow,
        BlockRole::Vmsa => Purpose::Vmsa,
        BlockRole::Helper => Purpose::Helper,
    }
}
