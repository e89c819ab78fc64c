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

/// For how many seconds a token may be good: at most a leap year.
pub const LIFE_SECONDS: RangeInclusive<u64> = 1..=31_622_400;
/// How many characters a token's name may have.
const NAME_CHARACTERS: RangeInclusive<usize> = 1..=128;

/// The token to make.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "control plane", "role": "operator", "expires_in_seconds": 2_592_000}))]
pub struct TokenCreate {
    /// The name that people know it by: 1 to 128 characters.
    #[schema(min_length = 1, max_length = 128, example = "control plane")]
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The only guest that it gives access to, by id or name. Needed with the role `vmm`, and not allowed
    /// with any other.
    pub guest: Option<String>,
    /// For how many seconds the token is good.
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
    /// Id, a UUIDv7.
    pub id: Uuid,
    /// The name that people know it by.
    #[schema(example = "control plane")]
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// The only guest that it gives access to, for the role `vmm`. Null for other roles.
    pub guest: Option<Uuid>,
    /// Where it comes from.
    pub origin: Origin,
    /// When it was made.
    #[serde(serialize_with = "super::time::to_ms")]
    pub created_at: Timestamp,
    /// When it ends, by the host's clock as it is now. The time runs on even if the clock is set. For a
    /// session: when it ends unless it is used before.
    #[serde(serialize_with = "super::time::to_ms")]
    pub expires_at: Timestamp,
    /// Who made it. For the token in `admin.token`: `daemon`. For a session: whoever opened it.
    #[schema(example = "unix:0")]
    pub created_by: String,
    /// The secret to send as `Authorization: Bearer <secret>`. It is only in the answer to the creation, and
    /// never shown again.
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

/// One page of a list of tokens.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenList {
    /// Tokens and sessions that are good now, in the order in which they were made.
    pub items: Vec<Token>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}

/// The caller, as the daemon recognized it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Whoami {
    /// The caller: `unix:<uid>`, `cert:<name>` or `token:<id>`. For a session, whoever opened it.
    #[schema(example = "unix:0")]
    pub principal: String,
    /// How the caller was recognized: `local_user`, `certificate`, `token` or `session`. More ways may be
    /// added.
    #[schema(example = "local_user")]
    pub method: &'static str,
    /// What the caller may do.
    pub role: Role,
    /// The roles that this one includes, with itself.
    pub roles: Vec<Role>,
    /// The only guest that it gives access to, for the role `vmm`. Null for other roles.
    pub guest: Option<Uuid>,
    /// Id of the session among the tokens, for a caller recognized by one.
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
    /// Id that the session will have, a UUIDv7.
    pub id: Uuid,
    /// The link, once for each address at which the daemon serves browsers. All have the same code: whichever
    /// is followed first uses it up. They are only in the answer to the creation, and never shown again.
    #[schema(example = json!(["http://127.0.0.1:8080/open#mvo_0199d3c56f0e7c4ca2b12f8a4f0d6f11_9f86d081"]))]
    pub urls: Vec<String>,
    /// For how many seconds the link can be followed.
    #[schema(example = 60)]
    pub expires_in_seconds: u64,
    /// The principal whose session it will be.
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
    /// The code that the link has behind `#`.
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
