//! RAM blocks on the wire.

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::BlockRole;
use mirrorvm::host::RamBlockInfo;
use serde::Serialize;
use utoipa::ToSchema;

/// A RAM block of a guest, with what is known of its content.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RamBlock {
    /// Name of the block, unique within the guest.
    #[schema(example = "ram0")]
    pub name: String,
    /// RAM address of its first byte. It stays the same for the guest's life.
    pub ram_addr: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Guest-physical address of its first byte. Null: it is unplugged.
    pub gpa: Option<u64>,
    /// The parts of it that are plugged, sorted by offset.
    pub plugged: Vec<PluggedPart>,
    /// `ram` is memory of the guest. `helper` is the memory of the migration helper, which is never moved.
    #[schema(example = "ram")]
    pub role: &'static str,
    /// What kind of host memory it lies on: `anonymous`, `memfd` or `hugetlb`. For a guest that does not run:
    /// what the host would choose now.
    #[schema(example = "anonymous")]
    pub backing: &'static str,
    /// Bytes of the largest pages that the host gives such memory.
    #[schema(example = 4096)]
    pub page_size_bytes: u64,
    /// Encryption status of its pages, summed up.
    pub encryption: BlockEncryption,
}

/// A part of a RAM block that has a guest-physical address.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PluggedPart {
    /// Offset of its first byte in the block.
    pub offset_bytes: u64,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// Encryption status of a block's pages, summed up.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BlockEncryption {
    /// Bytes whose pages are private.
    pub private_bytes: u64,
    /// Bytes whose pages the guest shares with the host.
    pub shared_bytes: u64,
    /// Bytes of pages whose status is not known, because the guest does not run.
    pub unknown_bytes: u64,
}

/// The name that the API uses for a block's role.
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

/// The RAM blocks of a guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RamBlockList {
    /// Blocks sorted by RAM address, including the helper's.
    pub items: Vec<RamBlock>,
}
