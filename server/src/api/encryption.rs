//! Encryption status and plugging of RAM, on the wire.

use mirrorvm::guest::StatusExtent;
use mirrorvm::host::bounds;
use serde::Serialize;
use utoipa::ToSchema;

use super::decode::{Decode, Errors, Fields, Node};
use crate::problem::MAX_SAFE_INTEGER;

/// At which address to plug a RAM block.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"gpa": 4294967296u64}))]
pub struct RamBlockPlug {
    /// Guest-physical address of its first byte: a multiple of 4 KiB. The built-in workload uses a block only
    /// at the address that it was defined with.
    #[schema(minimum = 0, maximum = 9007199254740991u64, example = 4294967296u64)]
    pub gpa: u64,
}

impl Decode for RamBlockPlug {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let gpa = f.int("gpa", 0..=MAX_SAFE_INTEGER);
        f.done()?;
        Some(Self { gpa: gpa? })
    }
}

/// A report of page status, as a guest makes it with the hypercall KVM_HC_MAP_GPA_RANGE.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"gpa": 1048576, "pages": 16, "encrypted": false}))]
pub struct EncryptionStatusUpdate {
    /// Guest-physical address of the first page: a multiple of 4 KiB.
    #[schema(minimum = 0, maximum = 9007199254740991u64, example = 1048576)]
    pub gpa: u64,
    /// Number of 4 KiB pages.
    #[schema(minimum = 1, maximum = 17179869184u64, example = 16)]
    pub pages: u64,
    /// Whether the pages are encrypted (private) from now on. False: shared with the host.
    pub encrypted: bool,
}

impl Decode for EncryptionStatusUpdate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let gpa = f.int("gpa", 0..=MAX_SAFE_INTEGER);
        let pages = f.int("pages", bounds::REPORT_PAGES);
        let encrypted = f.required("encrypted");
        f.done()?;
        Some(Self { gpa: gpa?, pages: pages?, encrypted: encrypted? })
    }
}

/// Consecutive pages with one encryption status, by RAM address. Includes RAM that is not plugged.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[schema(as = EncryptionExtent)]
pub struct Extent {
    /// RAM address of the first byte.
    #[schema(example = 0)]
    pub ram_addr: u64,
    /// Length in bytes, in whole pages.
    #[schema(example = 1048576)]
    pub size_bytes: u64,
    /// `private` or `shared`; `unknown` while the guest has no machine.
    #[schema(example = "private")]
    pub status: &'static str,
}

impl From<StatusExtent> for Extent {
    fn from(e: StatusExtent) -> Self {
        Self {
            ram_addr: e.range.start(),
            size_bytes: e.range.len(),
            status: if e.shared { "shared" } else { "private" },
        }
    }
}

impl Extent {
    /// A run of pages whose status is not known.
    pub const fn unknown(ram_addr: u64, size_bytes: u64) -> Self {
        Self { ram_addr, size_bytes, status: "unknown" }
    }
}

/// One page of a list of runs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionStatusList {
    /// Runs in the order of their RAM addresses. Together with the other pages they cover all RAM that moves
    /// with the guest.
    pub items: Vec<Extent>,
    /// Send it as `from` to go on. Absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_from: Option<u64>,
}
