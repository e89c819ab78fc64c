//! What a plan is asked for: everything that a planner may look at, and nothing else.

use mirrorvm_abi::{header::Header, mailbox};
use serde::{Deserialize, Serialize};

use super::{Declaration, GuestLayout, HostLimits, Strategy};
use crate::addr::PAGE_2M;
use crate::named::named;
use crate::pages::PageSet;

named! {
    /// What the hardware keeps from the host, of the guest and so of its mirror.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Confidentiality {
        /// Nothing: an ordinary guest.
        #[default]
        None = "none",
        /// Memory (SEV, real or modelled).
        Sev = "sev",
        /// Memory and registers (SEV-ES).
        SevEs = "sev-es",
        /// Memory, registers and integrity (SEV-SNP). No such guest can have a mirror.
        SevSnp = "sev-snp",
    }
}

impl Confidentiality {
    /// Whether private pages have the C-bit.
    pub const fn is_encrypted(self) -> bool {
        !matches!(self, Self::None)
    }
}

/// Size of a mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MailboxSize {
    /// Workers, 1 to 16.
    pub workers: u32,
    /// Slots a worker, 1 to 16.
    pub slots: u32,
}

impl MailboxSize {
    /// Bytes that anything is ever written to.
    pub fn used(self) -> u64 {
        mailbox::mailbox_bytes(self.workers, self.slots) as u64
    }

    /// Bytes of its place in the mirror: a multiple of 2 MiB, so that huge pages can back it.
    pub fn bytes(self) -> u64 {
        self.used().next_multiple_of(PAGE_2M)
    }
}

/// A question to the planners.
#[derive(Clone, Copy, Debug)]
pub struct PlanRequest<'a> {
    /// The guest's RAM, with the helper's block.
    pub layout: &'a GuestLayout,
    /// The helper image's header.
    pub helper: &'a Header,
    /// What the host allows.
    pub limits: &'a HostLimits,
    /// How to lay the mirror out.
    pub strategy: Strategy,
    /// How many workers and slots the mailbox is to have.
    pub mailbox: MailboxSize,
    /// What the helper declared; `declared` alone looks at it.
    pub declaration: Option<&'a Declaration>,
    /// Pages that are known to be shared with the host; `None`: every page is private.
    pub shared: Option<&'a PageSet>,
    /// What the guest's hardware protects.
    pub confidentiality: Confidentiality,
    /// Whether the helper's code is to lie in read-only slots.
    pub read_only_text: bool,
}

impl<'a> PlanRequest<'a> {
    /// A request with nothing declared, everything private, no encryption and writable slots.
    pub const fn new(
        layout: &'a GuestLayout,
        helper: &'a Header,
        limits: &'a HostLimits,
        strategy: Strategy,
        mailbox: MailboxSize,
    ) -> Self {
        Self {
            layout,
            helper,
            limits,
            strategy,
            mailbox,
            declaration: None,
            shared: None,
            confidentiality: Confidentiality::None,
            read_only_text: false,
        }
    }

    /// The C-bit that the mirror's page tables use: 0 unless the guest is encrypted. (For an ordinary guest
    /// of a host with SEV that bit is an address bit like any other.)
    pub(super) const fn c_bit_mask(&self) -> u64 {
        if self.confidentiality.is_encrypted() { self.limits.c_bit_mask() } else { 0 }
    }
}
