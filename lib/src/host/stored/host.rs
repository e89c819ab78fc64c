//! The documents of which a host has one: its id, its identity, its secret, what was set.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::host::{HostSettings, Labels};
use crate::store::form::{Part, Wrong, form, unchanged};
use crate::transport::PeerIdentity;

form! {
    SettingsForm of HostSettings, version 5 by unchanged {
        labels: Labels,
        maintenance: bool,
        migration_slots: u32,
        generation: u64,
    }
}

/// The host's id, made with the database.
#[derive(Debug)]
pub(in crate::host) struct HostId {
    pub id: Uuid,
}

form! {
    HostIdForm of HostId, version 5 by id_forward {
        id: Uuid,
    }
}

/// It was the id alone.
fn id_forward(_from: u64, document: &mut Value) {
    *document = json!({ "id": document.take() });
}

/// The identity that the database belongs to.
#[derive(Debug)]
pub(in crate::host) struct KnownIdentity {
    pub identity: PeerIdentity,
}

form! {
    KnownIdentityForm of KnownIdentity, version 5 by identity_forward {
        identity: PeerIdentity,
    }
}

/// It was the identity alone.
fn identity_forward(_from: u64, document: &mut Value) {
    *document = json!({ "identity": document.take() });
}

/// As people write it.
impl Part for PeerIdentity {
    type Form = String;

    fn form(&self) -> String {
        self.to_string()
    }

    fn of(form: String) -> Result<Self, Wrong> {
        form.parse().map_err(Wrong::new)
    }
}

/// What marks that the host gives out are made with.
#[derive(Debug)]
pub(in crate::host) struct PageSecret {
    pub secret: [u8; 32],
}

form! {
    PageSecretForm of PageSecret, version 5 by secret_forward {
        secret: [u8; 32],
    }
}

/// It was the bytes alone.
fn secret_forward(_from: u64, document: &mut Value) {
    *document = json!({ "secret": document.take() });
}
