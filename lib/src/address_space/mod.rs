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
mod strategy;
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
pub use strategy::{PspVia, Shift, Strategy, StrategyFacts, StrategyKind, StrategyParameter};
pub use walk::{Translation, WalkError, walk};

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
