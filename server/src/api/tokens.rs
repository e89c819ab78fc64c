//! Bearer tokens and callers on the wire.

use std::ops::RangeInclusive;

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node, one_of};
use crate::access::Role;
use crate::access::caller::Caller;
use crate::access::tokens::{Origin, TokenRecord};
use crate::problem::ProblemError;

/// Seconds for which a token is good: at most a leap year.
pub const LIFE_SECONDS: RangeInclusive<u64> = 1..=31_622_400;
/// Characters of a token's name.
const NAME_CHARACTERS: RangeInclusive<usize> = 1..=128;

/// What a token is to be.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "control plane", "role": "operator", "expires_in_seconds": 2_592_000}))]
pub struct TokenCreate {
    /// What people call it: 1 to 128 characters.
    #[schema(min_length = 1, max_length = 128, example = "control plane")]
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The one guest that it is about, by id or name; with the role `vmm`, and only with it.
    pub guest: Option<String>,
    /// How long it is good.
    #[serde(default)]
    #[schema(default = 2_592_000, minimum = 1, maximum = 31_622_400)]
    pub expires_in_seconds: u64,
}

impl Decode for Role {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &Self::ALL)
    }
}

impl Decode for TokenCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        let role = f.required("role");
        let guest = f.optional("guest");
        let expires_in_seconds = f.int_or("expires_in_seconds", LIFE_SECONDS, 2_592_000);
        f.done()?;
        Some(Self { name: name?, role: role?, guest: guest?, expires_in_seconds: expires_in_seconds? })
    }
}

impl TokenCreate {
    /// What the schema cannot say.
    ///
    /// # Errors
    /// A name that is none, a guest without the role or the role without a guest.
    pub fn check(&self) -> Result<(), Vec<ProblemError>> {
        let mut errors = Vec::new();
        if !NAME_CHARACTERS.contains(&self.name.chars().count()) || self.name.chars().any(char::is_control) {
            let (low, high) = (NAME_CHARACTERS.start(), NAME_CHARACTERS.end());
            let detail = format!("{low} to {high} characters, no control characters");
            errors.push(ProblemError::at_pointer("/name", "invalid_name", detail));
        }
        match (self.role, &self.guest) {
            (Role::Vmm, None) => {
                errors.push(ProblemError::at_pointer("/guest", "missing", "the role vmm is about one guest"));
            }
            (Role::Vmm, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                let detail = "only the role vmm is about one guest";
                errors.push(ProblemError::at_pointer("/guest", "not_applicable", detail));
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }
}

/// A bearer token or a session, without its secret.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Token {
    /// UUIDv7.
    pub id: Uuid,
    /// What people call it.
    #[schema(example = "control plane")]
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The one guest that it is about, of role `vmm`.
    pub guest: Option<Uuid>,
    /// Where it comes from.
    pub origin: Origin,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends to be good, by the host's clock as it is now: its time passes however that is set. Of a
    /// session unless it is used before.
    pub expires_at: Timestamp,
    /// Who made it; `daemon` of the one in `admin.token`; of a session whoever has opened it.
    #[schema(example = "unix:0")]
    pub created_by: String,
    /// What to send as `Authorization: Bearer <secret>`. In the answer to its creation alone, and never
    /// again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub secret: Option<String>,
}

impl From<TokenRecord> for Token {
    fn from(r: TokenRecord) -> Self {
        Self {
            id: r.id,
            name: r.name,
            role: r.role,
            guest: r.guest,
            origin: r.origin,
            created_at: r.created_at,
            expires_at: r.expires_at,
            created_by: r.created_by,
            secret: None,
        }
    }
}

/// One page of tokens.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenList {
    /// Tokens and sessions that are good, by creation.
    pub items: Vec<Token>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}

/// Who calls.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Whoami {
    /// `unix:<uid>`, `cert:<name>` or `token:<id>`; by a session whoever has opened it.
    #[schema(example = "unix:0")]
    pub principal: String,
    /// How the caller was recognized: `local_user`, `certificate`, `token` or `session`; more may come.
    #[schema(example = "local_user")]
    pub method: &'static str,
    /// What the caller may do.
    pub role: Role,
    /// The roles that this one includes, itself too.
    pub roles: Vec<Role>,
    /// The one guest that it is about, of role `vmm`.
    pub guest: Option<Uuid>,
    /// The session that the caller is known by, of `session`: its id among the tokens.
    pub session: Option<Uuid>,
}

impl From<Caller> for Whoami {
    fn from(c: Caller) -> Self {
        Self {
            session: c.session(),
            principal: c.principal,
            method: c.method.name(),
            role: c.role,
            roles: c.role.includes().to_vec(),
            guest: c.guest,
        }
    }
}

/// A link that opens a session in a browser.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionLink {
    /// UUIDv7: the id that the session will have.
    pub id: Uuid,
    /// The link for each address at which the daemon serves browsers, with one code for all: the first that
    /// is followed uses it up. In the answer to its creation alone, and never again.
    #[schema(example = json!(["http://127.0.0.1:8080/open#mvo_0199d3c56f0e7c4ca2b12f8a4f0d6f11_9f86d081"]))]
    pub urls: Vec<String>,
    /// How long it is good.
    #[schema(example = 60)]
    pub expires_in_seconds: u64,
    /// Whose session it will be.
    #[schema(example = "unix:0")]
    pub principal: String,
    /// What that session may do.
    pub role: Role,
}

/// What opens a session.
#[derive(Clone, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"code": "mvo_0199d3c56f0e7c4ca2b12f8a4f0d6f11_9f86d081"}))]
pub struct SessionCreate {
    /// What the link has behind `#`.
    pub code: String,
}

impl std::fmt::Debug for SessionCreate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionCreate")
    }
}

impl Decode for SessionCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let code = f.required("code");
        f.done()?;
        Some(Self { code: code? })
    }
}
