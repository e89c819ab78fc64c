//! Known peers ("hosts" in the API) on the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mirrorvm::host::{PeerAnswer, PeerRecord, PeerSpec, parts_of_peer};
use mirrorvm::transport::{Endpoint, ParseEndpointError};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::capabilities::HelperAbiRange;
use super::decode::{self, Decode, Errors, Fields, Node};
use super::{Preview, sha256_text};
use crate::problem::ProblemError;

/// A host to register as a peer.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "b",
    "address": "192.0.2.7:7801",
    "identity": "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "labels": {}
}))]
pub struct PeerHostCreate {
    /// Name by which to know the host, unique among registered hosts. It must not look like a UUID.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "b")]
    pub name: String,
    /// Address of its peer listener: an IP address or DNS name, and a port. A name is resolved for each
    /// connection. It does not prove who is there: `identity` does.
    #[schema(example = "192.0.2.7:7801")]
    pub address: String,
    /// The identity to pin: the digest of its public key, as its daemon shows it.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// Labels of your choice: at most 64, with keys of 1 to 63 bytes and values of 0 to 255 bytes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Decode for PeerHostCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name: Option<String> = f.required("name");
        let address = f.required("address");
        let identity: Option<String> = f.required("identity");
        let labels = f.or("labels", BTreeMap::new());
        let done = f.done();
        if !errors.is_empty() {
            // The host will not see it: what could be read is looked at here.
            errors.extend(parts_of_peer(name.as_deref(), labels.as_ref(), identity.as_deref()));
        }
        done?;
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
        let address = parse_address(&body.address).map_err(|mut wrong| {
            let rest = parts_of_peer(Some(&body.name), Some(&body.labels), Some(&body.identity));
            wrong.extend(decode::problems(rest));
            wrong
        })?;
        Ok(Self { name: body.name, address, identity: body.identity, labels: body.labels })
    }
}

/// A registered host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHost {
    /// Id, a UUIDv7.
    pub id: Uuid,
    /// Name of the host, unique among registered hosts.
    pub name: String,
    /// Address of its peer listener: an IP address or DNS name, and a port.
    pub address: String,
    /// The identity that is pinned for it: the digest of its public key.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub identity: String,
    /// Labels of your choice.
    pub labels: BTreeMap<String, String>,
    /// Rises with every change. The `ETag` header has it in quotes.
    pub generation: u64,
    /// When the host was registered.
    #[serde(serialize_with = "super::time::to_ms")]
    pub created_at: Timestamp,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What a registered host answers when it is asked.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHostCapabilities {
    /// Id of the host in this host's register.
    pub host: Uuid,
    /// Name of the host.
    #[schema(example = "b")]
    pub name: String,
    /// Always true. A host that does not answer is a problem instead, such as `peer_failed`.
    pub reachable: bool,
    /// Versions of the peer protocol that both hosts speak.
    #[schema(example = json!([2]))]
    pub protocol_versions: Vec<u32>,
    /// The drivers that work there. This and all that follows is what the host says of itself.
    #[schema(example = json!(["embedded", "emulated"]))]
    pub drivers: Vec<String>,
    /// The strategies that its build can execute.
    #[schema(example = json!(["shifted", "identity-cbit", "declared", "psp-copied"]))]
    pub strategies: Vec<String>,
    /// The range of helper ABI versions that it runs.
    pub helper_abi: HelperAbiRange,
    /// SHA-256 of its built-in helper image. To migrate with the built-in helper, both hosts need the same.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub helper_measurement: String,
    /// The suites that its built-in helper seals pages by.
    #[schema(example = json!(["aes-256-gcm", "aes-256-gcm-siv"]))]
    pub suites: Vec<String>,
    /// How many physical address bits its guests have.
    #[schema(maximum = 64, example = 48)]
    pub max_phys_bits: u8,
    /// Bit position of its C-bit. Null without SEV.
    #[schema(maximum = 63)]
    pub c_bit_position: Option<u8>,
    /// How many physical address bits memory encryption takes away.
    #[schema(maximum = 64)]
    pub phys_bit_reduction: u8,
    /// How many memory slots one VM may have.
    #[schema(example = 32764)]
    pub slot_budget: u32,
    /// Codes of what it lacks. Its own `GET /v1/host/capabilities` says why, and what would help.
    #[schema(example = json!(["sev", "sev-snp"]))]
    pub missing: Vec<String>,
    /// Microseconds from the first packet until the TLS handshake was done and a version was agreed upon.
    #[schema(example = 1800)]
    pub round_trip_us: u64,
    /// When the host was asked.
    #[serde(serialize_with = "super::time::to_ms")]
    pub checked_at: Timestamp,
}

impl PeerHostCapabilities {
    /// Combines a peer's answer with the versions `ours` that this host speaks.
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
            suites: said.suites,
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

/// One page of a list of registered hosts.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerHostList {
    /// Hosts, in the order in which they were registered unless asked for otherwise.
    pub items: Vec<PeerHost>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
    /// Follow `/v1/events` after it to learn what changes from here on: everything before it is in the list
    /// already. Of a list in several pages, that of the first counts.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub events_cursor: String,
}
