//! Events on the wire, shaped after CloudEvents.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::host::events::{Event as HostEvent, EventBody, ResourceKind};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::labels::{Selector, all_hold};

/// Something that happened.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Event {
    /// Its place in this host's history, `<epoch>-<seq>`: the cursor to continue after it.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub id: String,
    /// `<resource>.<change>`: `guest.state_changed`, `migration.round_finished`, `host.started`, ...; more
    /// may come.
    #[serde(rename = "type")]
    #[schema(example = "guest.state_changed")]
    pub kind: String,
    /// The host that it happened on.
    #[schema(example = "/v1/host/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub source: String,
    /// Path of the resource.
    #[schema(example = "/v1/guests/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub subject: String,
    /// When.
    pub time: Timestamp,
    /// What.
    pub data: EventData,
}

/// What an event tells. Members beyond the first five are there when they say something.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EventData {
    /// Kind of the resource: `host`, `peer_host`, `guest`, `mirror`, `migration` or `helper_image`; more may
    /// come.
    #[schema(example = "guest")]
    pub resource: &'static str,
    /// Its id.
    pub id: Uuid,
    /// Its name; null where it has none.
    #[schema(example = "g1")]
    pub name: Option<String>,
    /// Its generation after the change; 0 when there is nothing any more.
    #[schema(example = 3)]
    pub generation: u64,
    /// Its labels; of a mirror or migration, its guest's.
    pub labels: BTreeMap<String, String>,
    /// Its state after the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "running")]
    pub state: Option<String>,
    /// Its state before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "starting")]
    pub previous_state: Option<String>,
    /// Id of the guest that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub guest: Option<String>,
    /// Name of that guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub guest_name: Option<String>,
    /// Id of the migration that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub migration: Option<String>,
    /// Name of the other host.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub peer: Option<String>,
    /// The host that it was handed over to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub moved_to: Option<String>,
    /// Code of what went wrong, or of what ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// Number of the round that is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub round: Option<u64>,
    /// Bytes of page content that crossed in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bytes: Option<u64>,
    /// Pages that the guest dirtied meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub dirtied_pages: Option<u64>,
    /// Whether the host takes nothing new.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub maintenance: Option<bool>,
}

const fn collection(kind: ResourceKind) -> &'static str {
    match kind {
        ResourceKind::Host => "/v1/host",
        ResourceKind::PeerHost => "/v1/hosts",
        ResourceKind::Guest => "/v1/guests",
        ResourceKind::Mirror => "/v1/mirrors",
        ResourceKind::Migration => "/v1/migrations",
        ResourceKind::HelperImage => "/v1/helper-images",
    }
}

impl Event {
    /// An event of the host `host`.
    pub fn new(event: HostEvent, host: Uuid) -> Self {
        let HostEvent { cursor, at, mut body } = event;
        let mut text = |name: &str| match body.data.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let (state, previous_state, guest) = (text("state"), text("previous_state"), text("guest"));
        let (guest_name, migration, peer) = (text("guest_name"), text("migration"), text("peer"));
        let (moved_to, error) = (text("moved_to"), text("error"));
        let number = |name: &str| body.data.get(name).and_then(Value::as_u64);
        let subject = match body.resource {
            ResourceKind::Host => collection(body.resource).to_owned(),
            kind => format!("{}/{}", collection(kind), body.id),
        };
        Self {
            id: cursor.to_string(),
            kind: body.kind(),
            source: format!("/v1/host/{host}"),
            subject,
            time: at,
            data: EventData {
                resource: body.resource.name(),
                id: body.id,
                generation: body.generation,
                state,
                previous_state,
                guest,
                guest_name,
                migration,
                peer,
                moved_to,
                error,
                round: number("round"),
                bytes: number("bytes"),
                dirtied_pages: number("dirtied_pages"),
                maintenance: body.data.get("maintenance").and_then(Value::as_bool),
                name: body.name,
                labels: body.labels,
            },
        }
    }
}

/// Some events, in order.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EventList {
    /// Events, the oldest first.
    pub items: Vec<Event>,
    /// What to send as `after` next: beyond events that the filters left out, too.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub next_cursor: String,
    /// Whether more follow already.
    pub more: bool,
}

/// Which events are wanted.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Types, exact or `<resource>.*`; none: all.
    pub types: Vec<String>,
    /// Ids or names of resources; none: all.
    pub resources: Vec<String>,
    /// Labels that must hold.
    pub labels: Vec<Selector>,
}

impl EventFilter {
    /// Whether an event is wanted.
    pub fn wants(&self, body: &EventBody) -> bool {
        let kind = body.kind();
        let of_type = |wanted: &String| match wanted.strip_suffix(".*") {
            Some(resource) => body.resource.name() == resource,
            None => *wanted == kind,
        };
        let id = body.id.to_string();
        let of_resource = |wanted: &String| {
            let named = body.name.as_deref() == Some(wanted.as_str());
            let guests =
                ["guest", "guest_name"].iter().any(|k| body.data.get(*k).is_some_and(|v| v == wanted));
            named || *wanted == id || guests
        };
        (self.types.is_empty() || self.types.iter().any(of_type))
            && (self.resources.is_empty() || self.resources.iter().any(of_resource))
            && all_hold(&self.labels, &body.labels)
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm::host::events::Change;

    use super::*;

    #[test]
    fn filters_go_by_type_resource_and_label() {
        let mut body = EventBody::new(ResourceKind::Migration, Change::StateChanged, Uuid::from_u128(7), 2);
        body.data.insert("guest_name".into(), "g1".into());
        body.labels.insert("rack".into(), "r1".into());
        let wants = |types: &[&str], resources: &[&str], labels: &[&str]| {
            let filter = EventFilter {
                types: types.iter().map(ToString::to_string).collect(),
                resources: resources.iter().map(ToString::to_string).collect(),
                labels: labels.iter().map(|l| Selector::parse(l).unwrap()).collect(),
            };
            filter.wants(&body)
        };
        assert!(wants(&[], &[], &[]));
        assert!(wants(&["guest.created", "migration.state_changed"], &[], &["rack=r1"]));
        assert!(wants(&["migration.*"], &["g1"], &[]));
        assert!(wants(&[], &["00000000-0000-0000-0000-000000000007"], &[]));
        assert!(!wants(&["guest.*"], &[], &[]));
        assert!(!wants(&[], &["g2"], &[]));
        assert!(!wants(&[], &[], &["rack=r2"]));
    }
}
