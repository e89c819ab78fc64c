//! RAM blocks on the wire.

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::BlockRole;
use mirrorvm::host::RamBlockInfo;
use serde::Serialize;
use utoipa::ToSchema;

/// A RAM block with what is known of its content.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RamBlock {
    /// Name, unique in the guest.
    #[schema(example = "ram0")]
    pub name: String,
    /// Where the block starts in the guest's RAM; constant for the guest's life.
    pub ram_addr: u64,
    /// Bytes.
    pub size_bytes: u64,
    /// Where the guest sees its first byte; null: unplugged.
    pub gpa: Option<u64>,
    /// Plugged parts, by ascending offset.
    pub plugged: Vec<PluggedPart>,
    /// `ram`: the guest's memory. `helper`: home of the migration helper, never moved.
    #[schema(example = "ram")]
    pub role: &'static str,
    /// What it lies on: `anonymous`, `memfd` or `hugetlb`; of a guest that does not run, what the host would
    /// choose now.
    #[schema(example = "anonymous")]
    pub backing: &'static str,
    /// Bytes of the largest pages that the host gives such memory.
    #[schema(example = 4096)]
    pub page_size_bytes: u64,
    /// Encryption status of its pages.
    pub encryption: BlockEncryption,
}

/// A part of a block that has a guest physical address.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PluggedPart {
    /// First byte, counted from the block's start.
    pub offset_bytes: u64,
    /// Where the guest sees it.
    pub gpa: u64,
    /// Bytes.
    pub size_bytes: u64,
}

/// Encryption status of a block's pages.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BlockEncryption {
    /// Bytes whose pages are private.
    pub private_bytes: u64,
    /// Bytes whose pages the guest shares with the host.
    pub shared_bytes: u64,
    /// Bytes of unknown status (the guest is not running).
    pub unknown_bytes: u64,
}

/// The API's name of a block's role.
pub(crate) const fn role_name(role: BlockRole) -> &'static str {
    match role {
        BlockRole::Ram => "ram",
        BlockRole::Vmsa => "vmsa",
        BlockRole::Helper => "helper",
    }
}

impl From<RamBlockInfo> for RamBlock {
    fn from(info: RamBlockInfo) -> Self {
        let block = info.block;
        Self {
            gpa: block.gpa().map(Gpa::get),
            plugged: block
                .plugs
                .iter()
                .map(|p| PluggedPart { offset_bytes: p.offset, gpa: p.gpa.get(), size_bytes: p.len })
                .collect(),
            role: role_name(block.role),
            ram_addr: block.ram_addr.get(),
            size_bytes: block.size,
            name: block.name,
            backing: info.backing.name(),
            page_size_bytes: info.page_size,
            encryption: BlockEncryption {
                private_bytes: info.private_bytes,
                shared_bytes: info.shared_bytes,
                unknown_bytes: info.unknown_bytes,
            },
        }
    }
}

/// A guest's RAM blocks.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RamBlockList {
    /// Blocks by RAM address, the helper's included.
    pub items: Vec<RamBlock>,
}
