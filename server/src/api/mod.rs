//! Wire types of the REST API, one file per resource.
//!
//! Owns: the shape of bodies, and the way from and to the library's values. Must not know: HTTP. Wire types do
//! not travel: a body is decoded, turned into a library value and forgotten.

pub mod capabilities;
pub mod decode;
pub mod guests;
pub mod host;
pub mod json;
pub mod labels;
pub mod layout;
pub mod migrations;
pub mod mirrors;
pub mod page;
pub mod peers;
pub mod problems;
pub mod ram_blocks;
pub mod strategies;
pub mod version;

use serde::Serialize;
use utoipa::ToSchema;

/// Why a resource is in a failed state.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Fault {
    /// Stable code, `snake_case`; an open list.
    #[schema(example = "helper_unresponsive")]
    pub code: String,
    /// A sentence for people.
    pub detail: String,
}

impl From<mirrorvm::host::Fault> for Fault {
    fn from(fault: mirrorvm::host::Fault) -> Self {
        Self { code: fault.code, detail: fault.detail }
    }
}

/// `sha256:` and the digest in hex.
pub(crate) fn sha256_text(digest: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(7 + 2 * digest.len());
    text.push_str("sha256:");
    for byte in digest {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
