//! Why a plan cannot be made: stable codes with the offending value.

use serde::{Deserialize, Serialize};

/// What rule a layout, strategy or host breaks. The names are part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The layout has no helper's block.
    NoHelper,
    /// The helper's block is too small for the image, its tables and its page maps.
    HelperTooSmall,
    /// The helper image is linked for other addresses than this build of mirrorvm.
    HelperLayoutMismatch,
    /// The mailbox has no workers or slots, or more than the helper's ABI knows.
    MailboxSize,
    /// The shift is not a multiple of 2 MiB.
    ShiftUnaligned,
    /// The shift lies below 4 GiB and would collide with the window that is one to one.
    ShiftTooLow,
    /// An address would lie at or above 2^(MAXPHYADDR - reduction).
    AboveMaxPhys,
    /// An address of the mirror would have the C-bit set.
    CBitInAddress,
    /// Address arithmetic would pass 2^64.
    Wraps,
    /// Two slots of the mirror would overlap.
    SlotOverlap,
    /// More slots than KVM gives one VM.
    SlotBudget,
    /// The page tables do not fit their place in the helper's block.
    PageTableSpace,
    /// The page tables could not be built or did not translate as planned.
    PageTables,
    /// This build does not execute the strategy.
    StrategyUnavailable,
}

impl RefusalCode {
    /// The code as the API spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoHelper => "no_helper",
            Self::HelperTooSmall => "helper_too_small",
            Self::HelperLayoutMismatch => "helper_layout_mismatch",
            Self::MailboxSize => "mailbox_size",
            Self::ShiftUnaligned => "shift_unaligned",
            Self::ShiftTooLow => "shift_too_low",
            Self::AboveMaxPhys => "above_max_phys",
            Self::CBitInAddress => "c_bit_in_address",
            Self::Wraps => "wraps",
            Self::SlotOverlap => "slot_overlap",
            Self::SlotBudget => "slot_budget",
            Self::PageTableSpace => "page_table_space",
            Self::PageTables => "page_tables",
            Self::StrategyUnavailable => "strategy_unavailable",
        }
    }

    const fn sentence(self) -> &'static str {
        match self {
            Self::NoHelper => "the guest has no helper block",
            Self::HelperTooSmall => "the helper block is too small",
            Self::HelperLayoutMismatch => "the helper image is built for another layout",
            Self::MailboxSize => "the mailbox has an impossible number of workers or slots",
            Self::ShiftUnaligned => "the shift is not a multiple of 2 MiB",
            Self::ShiftTooLow => "the shift is below 4 GiB",
            Self::AboveMaxPhys => "an address lies beyond the usable physical bits",
            Self::CBitInAddress => "an address has the C-bit set",
            Self::Wraps => "an address wraps past 2^64",
            Self::SlotOverlap => "two memory slots overlap",
            Self::SlotBudget => "the plan needs more memory slots than KVM gives",
            Self::PageTableSpace => "the page tables need more room than the helper block has",
            Self::PageTables => "the page tables do not translate as planned",
            Self::StrategyUnavailable => "this build does not execute the strategy",
        }
    }
}

/// One reason why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{} ({what}: {value:#x}{})", code.sentence(), bound.map(|b| format!(", bound {b:#x}")).unwrap_or_default())]
pub struct Refusal {
    /// The broken rule.
    pub code: RefusalCode,
    /// What the value is: `shift`, `slot`, `block`, ...
    pub what: String,
    /// Index of the offending slot, block or tuple, when there is a list of them.
    pub index: Option<usize>,
    /// The offending value: an address, a size or a count.
    pub value: u64,
    /// The bound that it breaks, when there is one.
    pub bound: Option<u64>,
}

impl Refusal {
    /// A refusal of one value.
    pub fn new(code: RefusalCode, what: impl Into<String>, value: u64) -> Self {
        Self { code, what: what.into(), index: None, value, bound: None }
    }

    /// The same with the index of the offending element.
    pub fn at(mut self, index: usize) -> Self {
        self.index = Some(index);
        self
    }

    /// The same with the bound that was broken.
    pub fn bound(mut self, bound: u64) -> Self {
        self.bound = Some(bound);
        self
    }
}
