//! A peer on disk.

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::{Labels, PeerRecord, PeerSpec};
use crate::store::form::{Part, Wrong, form, unchanged};
use crate::transport::Endpoint;

form! {
    PeerForm of PeerRecord, version 5 by unchanged {
        id: Uuid,
        spec: PeerSpec,
        generation: u64,
        created_at: Timestamp,
    }
}

form! {
    PeerSpecForm of PeerSpec {
        name: String,
        address: Endpoint,
        identity: String,
        labels: Labels,
    }
}

/// As people write it.
impl Part for Endpoint {
    type Form = String;

    fn form(&self) -> String {
        self.to_string()
    }

    fn of(form: String) -> Result<Self, Wrong> {
        form.parse().map_err(Wrong::new)
    }
}
