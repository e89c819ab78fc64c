//! An event on disk.

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::host::Labels;
use crate::host::events::{Change, EventBody, ResourceKind};
use crate::store::form::{form, unchanged, words};

form! {
    EventForm of EventBody, version 5 by unchanged {
        resource: ResourceKind,
        change: Change,
        id: Uuid,
        name: Option<String>,
        generation: u64,
        labels: Labels,
        data: Map<String, Value>,
    }
}

words! {
    ResourceForm of ResourceKind {
        Host = "host",
        PeerHost = "peer_host",
        Guest = "guest",
        Mirror = "mirror",
        Migration = "migration",
        HelperImage = "helper_image",
    }
}

words! {
    ChangeForm of Change {
        Created = "created",
        Updated = "updated",
        StateChanged = "state_changed",
        Deleted = "deleted",
        RoundFinished = "round_finished",
        AuditMismatch = "audit_mismatch",
        Started = "started",
        Stopping = "stopping",
    }
}
