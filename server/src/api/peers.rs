//! Known peers ("hosts" in the API) on the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::host::{PeerAnswer, PeerRecord, PeerSpec};
use mirrorvm::transport::{Endpoint, ParseEndpointError};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::capabilities::HelperAbiRange;
use super::decode::{Decode, Errors, Fields, Node};
use super::{Preview, sha256_text};
use crate::problem::ProblemError;

/// What is said of another host.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "b",
    "address": "192.0.2.7:7801",
    "identity": "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "labels": {}
}))]
pub struct PeerHostCreate {
    /// Name, unique among hosts; not shaped like a UUID.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "b")]
    pub name: String,
    /// Where its peer listener is: IP address or DNS name, and port. A name is resolved for each connection
    /// and says nothing of who is there: that is `identity`.
    #[schema(example = "192.0.2.7:7801")]
    pub address: String,
    /// Its pinned identity, as its daemon prints it.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// Free labels: at most 64, keys of 1 to 63 and values of 0 to 255 bytes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Decode for PeerHostCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        let address = f.required("address");
        let identity = f.required("identity");
        let labels = f.or("labels", BTreeMap::new());
        f.done()?;
        Some(Self { name: name?, address: address?, identity: identity?, labels: labels? })
    }
}

/// An address of a peer listener.
///
/// # Errors
/// What is wrong with `/address`.
pub(crate) fn parse_address(text: &str) -> Result<Endpoint, Vec<ProblemError>> {
    text.parse().map_err(|why: ParseEndpointError| {
        let said: String = text.chars().take(80).flat_map(char::escape_debug).collect();
        vec![ProblemError::at_pointer("/address", "invalid_format", format!("\"{said}\": {why}"))]
    })
}

impl TryFrom<PeerHostCreate> for PeerSpec {
    type Error = Vec<ProblemError>;

    fn try_from(body: PeerHostCreate) -> Result<Self, Self::Error> {
        let address = parse_address(&body.address)?;
        Ok(Self { name: body.name, address, identity: body.identity, labels: body.labels })
    }
}

/// A known host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHost {
    /// UUIDv7.
    pub id: Uuid,
    /// Name, unique among hosts.
    pub name: String,
    /// Where its peer listener is.
    pub address: String,
    /// Its pinned identity.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Goes up with every change; the ETag in quotes.
    pub generation: u64,
    /// When it was added.
    pub created_at: Timestamp,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What a known host answers right now.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHostCapabilities {
    /// The host.
    pub host: Uuid,
    /// Its name.
    #[schema(example = "b")]
    pub name: String,
    /// Always true: a host that does not answer is a problem, `peer_failed` for example.
    pub reachable: bool,
    /// Versions of the peer protocol that both hosts speak.
    #[schema(example = json!([2]))]
    pub protocol_versions: Vec<u32>,
    /// Drivers that work there, by its own word, as all that follows.
    #[schema(example = json!(["embedded", "emulated"]))]
    pub drivers: Vec<String>,
    /// Strategies that its build executes.
    #[schema(example = json!(["shifted", "identity-cbit", "declared", "psp-copied"]))]
    pub strategies: Vec<String>,
    /// Helper ABIs that work there.
    pub helper_abi: HelperAbiRange,
    /// SHA-256 of its built-in helper image. Migrations with the built-in helper need the same at both hosts.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// Physical address bits of its guests.
    #[schema(maximum = 64, example = 48)]
    pub max_phys_bits: u8,
    /// Position of its C-bit; null without SEV.
    #[schema(maximum = 63)]
    pub c_bit_position: Option<u8>,
    /// Physical address bits lost to memory encryption.
    #[schema(maximum = 64)]
    pub phys_bit_reduction: u8,
    /// Memory slots one VM may have.
    #[schema(example = 32764)]
    pub slot_budget: u32,
    /// Codes of what it lacks; its own `GET /v1/host/capabilities` says why, and what would help.
    #[schema(example = json!(["sev", "sev-snp"]))]
    pub missing: Vec<String>,
    /// From the first packet to the end of the TLS handshake and the agreement on a version.
    #[schema(example = 1800)]
    pub round_trip_us: u64,
    /// When it was asked.
    pub checked_at: Timestamp,
}

impl PeerHostCapabilities {
    /// The answer of `peer`, as one of the host that speaks `ours`.
    pub fn new(peer: PeerRecord, answer: PeerAnswer, ours: &[u32]) -> Self {
        let said = answer.abilities;
        Self {
            host: peer.id,
            name: peer.spec.name,
            reachable: true,
            protocol_versions: ours.iter().copied().filter(|v| said.protocol_versions.contains(v)).collect(),
            drivers: said.drivers,
            strategies: said.strategies,
            helper_abi: HelperAbiRange { min: said.helper_abi.0, max: said.helper_abi.1 },
            helper_measurement: sha256_text(&said.helper_measurement),
            max_phys_bits: said.max_phys_bits,
            c_bit_position: said.c_bit,
            phys_bit_reduction: said.phys_bit_reduction,
            slot_budget: said.slot_budget,
            missing: said.missing,
            round_trip_us: answer.round_trip.as_micros() as u64,
            checked_at: Timestamp::now(),
        }
    }
}

impl From<PeerRecord> for PeerHost {
    fn from(record: PeerRecord) -> Self {
        Self {
            id: record.id,
            name: record.spec.name,
            address: record.spec.address.to_string(),
            identity: record.spec.identity,
            labels: record.spec.labels,
            generation: record.generation,
            created_at: record.created_at,
            preview: None,
        }
    }
}

/// One page of known hosts.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHostList {
    /// Hosts by creation.
    pub items: Vec<PeerHost>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}
