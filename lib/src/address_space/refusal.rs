//! Why a plan cannot be made: stable codes with the offending value.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $sentence:literal;)+) => {
        /// What rule a layout, strategy, declaration or host breaks. The names are part of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum RefusalCode {
            $($(#[doc = $doc])+ #[serde(rename = $code)] $name,)+
        }

        impl RefusalCode {
            /// All codes, in the order of the list.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The code as the API spells it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// What it means, for people.
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$name => $sentence,)+ }
            }
        }
    };
}

codes! {
    /// The layout has no helper's block.
    NoHelper = "no_helper", "the guest has no helper block";
    /// The helper's block is too small for the image, its tables and its page maps.
    HelperTooSmall = "helper_too_small", "the helper block is too small";
    /// The helper image is linked for other addresses than this build of mirrorvm.
    HelperLayoutMismatch = "helper_layout_mismatch", "the helper image is built for another layout";
    /// The strategy runs the helper from where the guest sees it, and the guest does not see (all of) it.
    HelperUnplugged = "helper_unplugged", "a part of the helper that the strategy needs has no guest physical address";
    /// The mailbox has no workers or slots, or more than the helper's ABI knows.
    MailboxSize = "mailbox_size", "the mailbox has an impossible number of workers or slots";
    /// The shift is not a multiple of 2 MiB.
    ShiftUnaligned = "shift_unaligned", "the shift is not a multiple of 2 MiB";
    /// The shift lies below 4 GiB and would collide with the window that is one to one.
    ShiftTooLow = "shift_too_low", "the shift is below 4 GiB";
    /// An address would lie at or above 2^(MAXPHYADDR - reduction).
    AboveMaxPhys = "above_max_phys", "an address lies beyond the usable physical bits";
    /// An address of the mirror would have the C-bit set.
    CBitInAddress = "c_bit_in_address", "an address has the C-bit set";
    /// The guest is encrypted and the host's limits have no C-bit.
    CBitMissing = "c_bit_missing", "an encrypted guest needs a host with a C-bit";
    /// Address arithmetic would pass 2^64.
    Wraps = "wraps", "an address wraps past 2^64";
    /// Two slots of the mirror would overlap.
    SlotOverlap = "slot_overlap", "two memory slots overlap";
    /// One host page would be reachable through two slots, and the strategy does not say so.
    SlotAlias = "slot_alias", "two memory slots reach the same memory";
    /// More slots than KVM gives one VM.
    SlotBudget = "slot_budget", "the plan needs more memory slots than KVM gives";
    /// More ranges of RAM than the helper's configuration has room for.
    ConfigSpace = "config_space", "the list of RAM ranges needs more room than the helper's configuration has";
    /// The page tables do not fit their place in the helper's block.
    PageTableSpace = "page_table_space", "the page tables need more room than the helper block has";
    /// The page tables would fit their place, but it does not lie in one piece in the mirror.
    TablesNotContiguous = "tables_not_contiguous", "no contiguous piece of the helper's memory has room for the page tables";
    /// The page tables could not be built or did not translate as planned.
    PageTables = "page_tables", "the page tables do not translate as planned";
    /// The driver does not execute the strategy.
    StrategyUnavailable = "strategy_unavailable", "the guest's driver does not execute the strategy";
    /// Mirrors of SEV-SNP guests: `sev_vm_copy_enc_context_from` refuses them (June 2026), since the features
    /// in the vCPUs' save areas would have to be copied too; and a page may be at one address only (RMP).
    SnpMirror = "snp_mirror", "KVM does not copy the encryption context of an SEV-SNP guest, as its VMSA features would have to be copied as well";
    /// KVM cannot honour read-only slots for guests with encrypted registers: it cannot emulate the write and
    /// enters the guest again and again.
    ReadOnlySlots = "read_only_slots", "KVM cannot honour read-only memory slots for a guest with encrypted registers";
    /// A private range of RAM has no guest physical address, and the strategy addresses by those.
    UnpluggedPrivate = "unplugged_private", "private RAM has no guest physical address and the strategy knows no other";
    /// A guest physical address lies above what the helper's page maps cover.
    GpaAboveMaps = "gpa_above_maps", "RAM is plugged above what the helper's page maps cover";
    /// `declared` without a declaration.
    NoDeclaration = "no_declaration", "the helper has not declared its memory";
    /// More tuples than there may be, or another number than was announced.
    DeclarationCount = "declaration_count", "the number of declared tuples is not possible";
    /// A part that the helper needs is not declared.
    DeclarationIncomplete = "declaration_incomplete", "the declaration lacks a part that the helper needs";
    /// A tuple of no bytes.
    TupleZero = "tuple_zero", "a declared tuple has no length";
    /// An address or length of a tuple is not a multiple of 4 KiB.
    TupleUnaligned = "tuple_unaligned", "a declared tuple is not a multiple of 4 KiB";
    /// A tuple covers what is no plugged RAM: a hole, or a device.
    TupleNotRam = "tuple_not_ram", "a declared tuple covers what is not the guest's RAM";
    /// A tuple covers RAM outside the helper's block: somebody else's, and it would be reachable twice.
    TupleNotHelper = "tuple_not_helper", "a declared tuple covers RAM that is not the helper's";
    /// Two tuples have a page in common, of the guest or of the mirror.
    TupleOverlap = "tuple_overlap", "two declared tuples share addresses";
    /// A tuple lies in or above the RAM window of the mirror, or in its mailbox.
    TupleInWindow = "tuple_in_window", "a declared tuple lies in the mirror's RAM window or mailbox";
    /// Firmware SEND needs a context, which a guest without encryption does not have.
    SendReceiveUnencrypted = "send_receive_unencrypted", "a guest without encryption has no context to send";
}

/// One reason why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{} ({what}: {value:#x}{})", code.sentence(), bound.map(|b| format!(", bound {b:#x}")).unwrap_or_default())]
pub struct Refusal {
    /// The rule that is broken.
    pub code: RefusalCode,
    /// What the value is: `shift`, `slot`, `block`, ...
    pub what: String,
    /// Index of the offending slot (by ascending address), block or tuple, when there is a list of them.
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
