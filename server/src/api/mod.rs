//! Wire types of the REST API, one file per resource.
//!
//! Owns: the shape of bodies, and the way from and to the library's values. Must not know: HTTP. Wire types
//! do not travel: a body is decoded, turned into a library value and forgotten.

pub mod audit;
pub mod batches;
pub mod capabilities;
pub mod checks;
pub mod decode;
pub mod driver;
pub mod encryption;
pub mod events;
pub mod guests;
pub mod helper_images;
pub mod host;
pub mod labels;
pub mod layout;
pub mod memory_audit;
pub mod migrations;
pub mod mirrors;
pub mod page;
pub mod patch;
pub mod peers;
pub mod problems;
pub mod ram_blocks;
pub mod resolution;
pub mod stats;
pub mod strategies;
pub mod tickets;
pub mod time;
pub mod tokens;
pub mod version;

use mirrorvm::codes::{AnyCode, Code, PeerRefusal};
use serde::Serialize;
use utoipa::ToSchema;

use crate::problem::{Entry, sentence};

/// Why a resource has failed, or what ended it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Fault {
    /// A stable code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "helper_unresponsive")]
    pub code: String,
    /// What happened, in a sentence.
    pub detail: String,
    /// What helps against it, in sentences: the `fix` of the code's entry in `/v1/problems`. Of a migration
    /// that the destination may have refused, it also says what helps there.
    #[schema(example = "Look into the other daemon's log.")]
    pub fix: String,
}

/// Something that does not stand in the way but may come as a surprise.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Warning {
    /// A stable code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "memory_is_lost")]
    pub code: String,
    /// What it is, in a sentence.
    pub detail: String,
}

impl Warning {
    /// A warning.
    pub fn new(code: &str, detail: impl Into<String>) -> Self {
        Self { code: code.to_owned(), detail: detail.into() }
    }
}

/// What only the answer to a `dry_run` has. The resource around it is what would result; nothing was changed.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Preview {
    /// What does not stand in the way but may come as a surprise.
    pub warnings: Vec<Warning>,
    /// The address space of the mirror that would be made. Absent where none would be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub address_space_plan: Option<layout::AddressSpacePlan>,
}

impl Fault {
    /// A fault of this code.
    pub(crate) fn new(code: AnyCode, detail: String) -> Self {
        let fix = Entry::fix_of(&code);
        Self { code: code.into(), detail, fix }
    }

    /// The fault of a migration. What an outgoing one failed with may be the destination's refusal, and then
    /// it is there that something helps.
    pub(crate) fn of_migration(fault: mirrorvm::host::Fault, outgoing: bool) -> Self {
        let refusal = fault.code.known().filter(|_| outgoing).and_then(Code::refusal).map(PeerRefusal::fix);
        let mut fault = Self::from(fault);
        if let Some(there) = refusal
            && sentence(there) != fault.fix
        {
            fault.fix = format!("{} If it was the destination that refused: {there}.", fault.fix);
        }
        fault
    }
}

impl From<mirrorvm::host::Fault> for Fault {
    fn from(fault: mirrorvm::host::Fault) -> Self {
        Self::new(fault.code, fault.detail)
    }
}

/// Renders a digest as `sha256:` and hexadecimal digits.
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
