//! Events on the wire, shaped after CloudEvents.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::host::events::{Change, Event as HostEvent, EventBody, EventCursor, ResourceKind};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::labels::Selector;

/// A change of a resource of this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Event {
    /// Place of the event in this host's history, `<epoch>-<seq>`. Send it as a cursor to continue after it.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub id: String,
    /// `<resource>.<change>`, such as `guest.state_changed`, `migration.round_finished` or `host.started`.
    /// More types may be added.
    #[serde(rename = "type")]
    #[schema(example = "guest.state_changed")]
    pub kind: String,
    /// Name of the host on which it happened.
    #[schema(example = "/v1/host/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub source: String,
    /// Path of the resource.
    #[schema(example = "/v1/guests/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")]
    pub subject: String,
    /// When it happened.
    #[serde(serialize_with = "super::time::to_ms")]
    pub time: Timestamp,
    /// What is known of the resource after the change.
    pub data: EventData,
}

/// What an event tells about its resource. Only the first five members are always present.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EventData {
    /// Kind of the resource: `host`, `peer_host`, `guest`, `mirror`, `migration` or `helper_image`; more may
    /// come.
    #[schema(example = "guest")]
    pub resource: &'static str,
    /// Id of the resource.
    pub id: Uuid,
    /// Name of the resource. Null for resources without names.
    #[schema(example = "g1")]
    pub name: Option<String>,
    /// Generation of the resource after the change. 0 when it is gone.
    #[schema(example = 3)]
    pub generation: u64,
    /// Labels of the resource. Mirrors and migrations have those of their guest.
    pub labels: BTreeMap<String, String>,
    /// State after the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "running")]
    pub state: Option<String>,
    /// State before the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "starting")]
    pub previous_state: Option<String>,
    /// Id of the guest that the resource belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub guest: Option<String>,
    /// Name of the guest that the resource belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub guest_name: Option<String>,
    /// Id of the migration that has the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub migration: Option<String>,
    /// Name of the other host of a migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub peer: Option<String>,
    /// Name of the host that the guest was handed over to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub moved_to: Option<String>,
    /// Code of what went wrong, or of what ended the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// Number of the round that has finished.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub round: Option<u64>,
    /// Bytes of page content that were sent in that round.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bytes: Option<u64>,
    /// How many pages the guest wrote during that round.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub dirtied_pages: Option<u64>,
    /// How many pages of a guest are not what its source had.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pages: Option<u64>,
    /// Whether the host is in maintenance.
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
                pages: number("pages"),
                maintenance: body.data.get("maintenance").and_then(Value::as_bool),
                name: body.name,
                labels: body.labels,
            },
        }
    }
}

impl Event {
    /// A mark in a stream of the host `host`: `bookmark` or `closing`, at the place that the stream has
    /// reached.
    pub fn mark(kind: &str, at: &EventCursor, host: Uuid) -> Self {
        let body = EventBody::new(ResourceKind::Host, Change::Updated, host, 0);
        let event = HostEvent { cursor: at.clone(), at: Timestamp::now(), body };
        Self { kind: kind.to_owned(), ..Self::new(event, host) }
    }
}

/// Events of this host, in order.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EventList {
    /// Events, the oldest first.
    pub items: Vec<Event>,
    /// Send it as `after` next time. It is beyond events that the filters left out.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub next_cursor: String,
    /// Whether further events are available already.
    pub more: bool,
}

/// Which events a reader wants.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Types, either exact or as `<resource>.*`. An empty list stands for all.
    pub types: Vec<String>,
    /// Ids or names of resources. An empty list stands for all.
    pub resources: Vec<String>,
    /// Labels that the resource must have.
    pub labels: Vec<Selector>,
}

impl EventFilter {
    /// Whether the filter lets an event of one of the resources through.
    pub fn wants(&self, body: &EventBody) -> bool {
        let kind = body.kind();
        let of_type = |wanted: &String| match wanted.strip_suffix(".*") {
            Some(resource) => body.resource.name() == resource,
            None => *wanted == kind,
        };
        (self.types.is_empty() || self.types.iter().any(of_type))
            && Selector::all_hold(&self.labels, &body.labels)
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm::host::events::Change;

    use super::*;
    use crate::api::labels;

    #[test]
    fn filters_go_by_type_and_label() {
        let mut body = EventBody::new(ResourceKind::Migration, Change::StateChanged, Uuid::from_u128(7), 2);
        body.labels.insert("rack".into(), "r1".into());
        let wants = |types: &[&str], having: &[&str]| {
            let filter = EventFilter {
                types: types.iter().map(ToString::to_string).collect(),
                resources: Vec::new(),
                labels: having.iter().map(|l| labels::parse(l).unwrap()).collect(),
            };
            filter.wants(&body)
        };
        assert!(wants(&[], &[]));
        assert!(wants(&["guest.created", "migration.state_changed"], &["rack=r1"]));
        assert!(wants(&["migration.*"], &["rack"]));
        assert!(!wants(&["guest.*"], &[]));
        assert!(!wants(&[], &["rack=r2"]));
    }
}
