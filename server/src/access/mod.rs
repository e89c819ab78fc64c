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
    /// Calls the operations that only read, except those for operators and administrators.
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

    /// The name that the API uses for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Peer => "peer",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// The roles that this one includes, with itself.
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

/// Which callers may call an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody, known or not.
    Public,
    /// Every known caller.
    Known,
    /// Callers with the role `viewer` or a higher one.
    Read,
    /// Callers with the role `operator` or a higher one.
    Operate,
    /// Callers with the role `admin`.
    Administer,
    /// Callers with the role `peer`, or `operator` or a higher one.
    LetIn,
    /// Callers with the role `vmm`, for their own guest, or `operator` or a higher one.
    Report,
}

impl Access {
    /// Whether a caller with this role may call the operation.
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

    /// The sentence about it in the operation's description.
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
