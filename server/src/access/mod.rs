//! Who may call what: roles, the table of operations, and how a connection or a token becomes a caller.
//!
//! Owns: the answer to "may this caller do that". Must not know: what operations do.

pub mod admin_token;
pub mod caller;
pub mod credentials;
pub mod lease;
pub mod presented;
pub mod secrets;
pub mod sessions;
pub mod table;
pub mod tokens;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Reports on the memory of one guest, and nothing else.
    Vmm,
    /// Opens incoming migrations, and nothing else.
    Peer,
    /// Reads.
    Viewer,
    /// Reads and runs guests, mirrors and migrations.
    Operator,
    /// Everything: hosts, tokens, settings, the audit log.
    Admin,
}

impl Role {
    /// Every role with its name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("vmm", Self::Vmm),
        ("peer", Self::Peer),
        ("viewer", Self::Viewer),
        ("operator", Self::Operator),
        ("admin", Self::Admin),
    ];

    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Peer => "peer",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// The roles that this one includes, itself too.
    pub fn includes(self) -> &'static [Self] {
        match self {
            Self::Vmm => &[Self::Vmm],
            Self::Peer => &[Self::Peer],
            Self::Viewer => &[Self::Viewer],
            Self::Operator => &[Self::Viewer, Self::Operator],
            Self::Admin => &[Self::Viewer, Self::Operator, Self::Admin],
        }
    }
}

/// Who may call an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody, known or not.
    Public,
    /// Anybody who is known.
    Known,
    /// `viewer` and up.
    Read,
    /// `operator` and up.
    Operate,
    /// `admin`.
    Administer,
    /// `peer`, and `operator` and up.
    LetIn,
    /// `vmm` for its own guest, and `operator` and up.
    Report,
}

impl Access {
    /// Whether a caller of this role may.
    pub const fn allows(self, role: Role) -> bool {
        match self {
            Self::Public | Self::Known => true,
            Self::Read => matches!(role, Role::Viewer | Role::Operator | Role::Admin),
            Self::Operate => matches!(role, Role::Operator | Role::Admin),
            Self::Administer => matches!(role, Role::Admin),
            Self::LetIn => matches!(role, Role::Peer | Role::Operator | Role::Admin),
            Self::Report => matches!(role, Role::Vmm | Role::Operator | Role::Admin),
        }
    }

    /// For the document.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Public => "Anybody may call this, with or without credentials.",
            Self::Known => "Needs any role.",
            Self::Read => "Needs the role `viewer`.",
            Self::Operate => "Needs the role `operator`.",
            Self::Administer => "Needs the role `admin`.",
            Self::LetIn => "Needs the role `operator` or `peer`.",
            Self::Report => "Needs the role `operator`, or `vmm` for the guest of its token.",
        }
    }
}
