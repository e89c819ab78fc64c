//! A token on disk: a hash, and what its secret opens.

use jiff::Timestamp;
use mirrorvm::store::form::{Document, Part, Version, Wrong, fill, there};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::access::Role;
use crate::access::tokens::{Origin, TokenRecord};

/// The form of a [`TokenRecord`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenForm {
    version: Version<5>,
    id: Uuid,
    name: String,
    role: RoleForm,
    #[serde(deserialize_with = "there")]
    guest: Option<Uuid>,
    origin: OriginForm,
    hash: String,
    created_at: Timestamp,
    expires_at: Timestamp,
    created_by: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RoleForm {
    Vmm,
    Peer,
    Viewer,
    Operator,
    Admin,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OriginForm {
    Api,
    AdminFile,
    Session,
}

impl Part for TokenRecord {
    type Form = TokenForm;

    fn form(&self) -> TokenForm {
        let Self { id, name, role, guest, origin, hash, created_at, expires_at, created_by } = self;
        TokenForm {
            version: Version,
            id: *id,
            name: name.clone(),
            role: match role {
                Role::Vmm => RoleForm::Vmm,
                Role::Peer => RoleForm::Peer,
                Role::Viewer => RoleForm::Viewer,
                Role::Operator => RoleForm::Operator,
                Role::Admin => RoleForm::Admin,
            },
            guest: *guest,
            origin: match origin {
                Origin::Api => OriginForm::Api,
                Origin::AdminFile => OriginForm::AdminFile,
                Origin::Session => OriginForm::Session,
            },
            hash: hash.clone(),
            created_at: *created_at,
            expires_at: *expires_at,
            created_by: created_by.clone(),
        }
    }

    fn of(form: TokenForm) -> Result<Self, Wrong> {
        let TokenForm { version: _, id, name, role, guest, origin, hash, created_at, expires_at, created_by } =
            form;
        let role = match role {
            RoleForm::Vmm => Role::Vmm,
            RoleForm::Peer => Role::Peer,
            RoleForm::Viewer => Role::Viewer,
            RoleForm::Operator => Role::Operator,
            RoleForm::Admin => Role::Admin,
        };
        let origin = match origin {
            OriginForm::Api => Origin::Api,
            OriginForm::AdminFile => Origin::AdminFile,
            OriginForm::Session => Origin::Session,
        };
        Ok(Self { id, name, role, guest, origin, hash, created_at, expires_at, created_by })
    }
}

impl Document for TokenRecord {
    const VERSION: u64 = 5;

    /// Earlier builds knew one origin.
    fn forward(_from: u64, document: &mut Value) {
        fill(document, [("origin", json!("api")), ("guest", Value::Null)]);
    }
}
