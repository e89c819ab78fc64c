//! The encryption status of a guest's pages on the wire.

use mirrorvm::host::StatusExtent;
use serde::Serialize;
use utoipa::ToSchema;

/// A run of pages with the same status.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionExtent {
    /// First byte, in the guest's RAM.
    #[schema(example = 0)]
    pub ram_addr: u64,
    /// Bytes.
    #[schema(example = 4096)]
    pub size_bytes: u64,
    /// `private`, `shared` or `unknown` (the guest is not running); more may come.
    #[schema(example = "private")]
    pub status: &'static str,
}

impl From<StatusExtent> for EncryptionExtent {
    fn from(e: StatusExtent) -> Self {
        let status = match e.shared {
            Some(true) => "shared",
            Some(false) => "private",
            None => "unknown",
        };
        Self { ram_addr: e.ram_addr, size_bytes: e.len, status }
    }
}

/// One page of runs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionStatusList {
    /// Runs by RAM address, without gaps.
    pub items: Vec<EncryptionExtent>,
    /// What to send as `from` for what follows; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_from: Option<u64>,
}
