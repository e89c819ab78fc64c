//! The text of a ticket: what its bearer carries to the source.
//!
//! Owns: its form, and how one is read. Must not know: who gives one, or what it is good for.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::host::{Destination, FieldError, HostError, PeerRecord, PeerSpec, validate};
use crate::transport::Endpoint;

/// Longest text of a ticket.
pub const TICKET_MAX: usize = 4096;

const PREFIX: &str = "mvmt1.";

/// What a caller wants of a ticket.
#[derive(Clone, Debug)]
pub struct TicketSpec {
    /// Name of the source, for records; shaped as a host's name.
    pub source_name: String,
    /// Identity of the source, which no other may use the ticket with.
    pub source_identity: String,
    /// How long it is good: `bounds::TICKET_SECONDS`.
    pub expires_in_seconds: u64,
}

impl Destination {
    /// The ticket that leads there, if one does.
    ///
    /// # Errors
    /// Its text is no ticket's.
    pub(super) fn ticket(&self) -> Result<Option<Ticket>, HostError> {
        match self {
            Self::Host(_) => Ok(None),
            Self::Ticket(text) => Ticket::parse(text).map(Some),
        }
    }
}

/// What a ticket says to its bearer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Name of the destination.
    pub host: String,
    /// Where the destination's peer listener is.
    pub address: Endpoint,
    /// Its pinned identity.
    pub identity: String,
    /// The one session that it is good for: the migration's id.
    pub session: Uuid,
    /// Until when the migration must have begun, by the destination's wall clock when it was made. It counts
    /// the time itself.
    pub expires_at: Timestamp,
    /// Versions of the peer protocol that the destination speaks.
    pub protocol_versions: Vec<u32>,
}

impl Ticket {
    /// The text that a caller carries to the source.
    pub fn text(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        json.iter().fold(PREFIX.to_owned(), |mut text, byte| {
            use std::fmt::Write as _;
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Reads a ticket's text.
    ///
    /// # Errors
    /// A problem with `/destination/ticket`.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        let bad = |code, detail: &str| {
            HostError::Invalid(vec![FieldError::new("/destination/ticket", code, detail)])
        };
        let digits = text.strip_prefix(PREFIX).filter(|d| text.len() <= TICKET_MAX && d.len() % 2 == 0);
        let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
        let bytes: Option<Vec<u8>> = digits.and_then(|d| {
            d.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
        });
        bytes
            .and_then(|b| serde_json::from_slice(&b).ok())
            .ok_or_else(|| bad("invalid_ticket", "this is not a ticket of this version"))
    }

    /// The destination as a peer that is known for the ticket's session alone.
    pub(in crate::host) fn peer(&self) -> Result<PeerRecord, HostError> {
        let spec = PeerSpec {
            name: self.host.clone(),
            address: self.address.clone(),
            identity: self.identity.clone(),
            labels: crate::host::Labels::new(),
        };
        validate::peer(&spec)?;
        Ok(PeerRecord { id: Uuid::nil(), spec, generation: 1, created_at: Timestamp::now() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            host: "b".into(),
            address: "192.0.2.7:7801".parse().unwrap(),
            identity: format!("sha256:{}", "5a".repeat(32)),
            session: Uuid::from_u128(7),
            expires_at: Timestamp::from_second(1_800_000_000).unwrap(),
            protocol_versions: vec![1],
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_ticket_or_a_refusal(text in "\\PC{0,60}", hex in "mvmt1\\.[0-9a-f]{0,80}") {
            prop_assert!(Ticket::parse(&text).is_err());
            prop_assert!(Ticket::parse(&hex).is_err());
        }
    }

    #[test]
    fn a_ticket_is_read_as_it_is_written() {
        let text = ticket().text();
        assert!(text.len() < TICKET_MAX && text.is_ascii());
        assert_eq!(Ticket::parse(&text).unwrap(), ticket());
        assert!(ticket().peer().is_ok());
        assert!(Ticket { identity: "x".into(), ..ticket() }.peer().is_err());
    }
}
