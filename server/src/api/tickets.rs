//! Tickets for incoming migrations on the wire.

use jiff::Timestamp;
use mirrorvm::host::{Ticket, TicketSpec, bounds};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node};

/// The ticket to issue.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "source": {
        "name": "a",
        "identity": "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    },
    "expires_in_seconds": 600
}))]
pub struct IncomingMigrationCreate {
    /// The host that the guest will come from.
    pub source: TicketSource,
    /// For how many seconds the ticket can be used.
    #[serde(default)]
    #[schema(default = 600, minimum = 1, maximum = 86400)]
    pub expires_in_seconds: u64,
}

/// The host that a guest will come from.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TicketSource {
    /// Name of that host, for the records of this one.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "a")]
    pub name: String,
    /// Identity of that host, as `identity` of its `/v1/host` says. No other host can use the ticket.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
}

impl Decode for TicketSource {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        let identity = f.required("identity");
        f.done()?;
        Some(Self { name: name?, identity: identity? })
    }
}

impl Decode for IncomingMigrationCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let source = f.required("source");
        let expires_in_seconds = f.int_or("expires_in_seconds", bounds::TICKET_SECONDS, 600);
        f.done()?;
        Some(Self { source: source?, expires_in_seconds: expires_in_seconds? })
    }
}

impl From<IncomingMigrationCreate> for TicketSpec {
    fn from(body: IncomingMigrationCreate) -> Self {
        Self {
            source_name: body.source.name,
            source_identity: body.source.identity,
            expires_in_seconds: body.expires_in_seconds,
        }
    }
}

/// Permission for one migration into this host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct IncomingMigration {
    /// Id that the migration will have.
    pub migration: Uuid,
    /// The text to send as `destination.ticket` to the source. It is a secret: whoever has it and the
    /// source's private key can bring a guest here. Absent in the answer to a repeated request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub ticket: Option<String>,
    /// Address of this host's peer listener.
    #[schema(example = "192.0.2.7:7801")]
    pub address: String,
    /// This host's identity, for the source to pin.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// By when the migration must have begun, by this host's clock as it is now. The time runs on even if the
    /// clock is set.
    #[serde(serialize_with = "super::time::to_ms")]
    pub expires_at: Timestamp,
    /// Versions of the peer protocol that this host speaks.
    #[schema(example = json!([1]))]
    pub protocol_versions: Vec<u32>,
}

impl From<Ticket> for IncomingMigration {
    fn from(ticket: Ticket) -> Self {
        Self {
            migration: ticket.session,
            ticket: Some(ticket.text()),
            address: ticket.address.to_string(),
            identity: ticket.identity,
            expires_at: ticket.expires_at,
            protocol_versions: ticket.protocol_versions,
        }
    }
}
