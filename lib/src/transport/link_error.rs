//! Everything that can go wrong with a link, in one enum.
//!
//! Owns: the enum, and what the layers below mean in its terms. Must not know: when it happens.

use std::net::SocketAddr;

use rustls::AlertDescription;

use super::frame::HeaderError;
use super::identity::PeerIdentity;
use super::resolve::ResolveError;
use super::session::SessionError;
use super::socket::{SocketError, Waiting};
use super::tls::CertRefusal;

/// Why a link was not made, or is no more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// TCP did not connect.
    #[error("cannot connect to {addr}")]
    Connect {
        /// Address that was tried.
        addr: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The peer's name leads to no address.
    #[error("{name} cannot be resolved")]
    Unresolved {
        /// The name, with its port.
        name: String,
        /// What became of it.
        #[source]
        source: ResolveError,
    },
    /// We refused the peer's certificate. No application byte was exchanged.
    #[error("peer refused by its certificate")]
    PeerRefused(#[source] CertRefusal),
    /// The peer does not know this host: no host of our identity is registered there, and it gave no ticket.
    #[error(
        "the other host does not know this one, {own}: register it there with that identity (POST /v1/hosts), or pair the \
         two (`mirrorvmd identity pair`)"
    )]
    Unknown {
        /// What this host showed.
        own: PeerIdentity,
    },
    /// The peer refused us: its alert, or its hanging up before admitting us.
    #[error("the other host did not take the connection: {}", refusal(*alert))]
    RefusedByPeer {
        /// What it said, if it said anything.
        alert: Option<AlertDescription>,
    },
    /// The peer did not agree to the application protocol `mirrorvm/1`.
    #[error("peer did not agree to the application protocol")]
    WrongProtocol,
    /// Something else than a mirrorvm daemon is there: what it sent first is no TLS.
    #[error("not a mirrorvm daemon: it says \"{said}\"")]
    NotMirrorvm {
        /// Its first bytes, few and printable.
        said: String,
    },
    /// TLS failed: not TLS 1.3, a forged or damaged record, an alert.
    #[error("TLS failure")]
    Tls(#[source] rustls::Error),
    /// A wait took longer than it may.
    #[error("deadline passed waiting for {0}")]
    Deadline(Waiting),
    /// Somebody called [`cancel`](super::LinkCanceller::cancel).
    #[error("cancelled")]
    Cancelled,
    /// The connection ended where it must not: inside a frame, or without the peer's saying goodbye.
    #[error("connection ended early, {missing} bytes missing of what was announced")]
    Truncated {
        /// Bytes of header or payload that did not come; 0 at a frame boundary.
        missing: u32,
    },
    /// The peer sent a header that we do not take.
    #[error("frame refused")]
    BadFrame(#[source] HeaderError),
    /// The peer's message is longer than what there is room for now, beside those of other links.
    #[error("no room for the peer's message")]
    NoRoom,
    /// The socket failed for another reason.
    #[error("socket failure")]
    Io(#[source] std::io::Error),
    /// The caller's mistake: out of turn, a reserved kind, too long. Nothing was sent or received.
    #[error("misuse of the link: {0}")]
    Misuse(&'static str),
    /// An earlier call failed, or the link was closed.
    #[error("link is closed or broken")]
    Broken,
}

/// What a refusal before admission says.
fn refusal(alert: Option<AlertDescription>) -> String {
    match alert {
        Some(alert) => format!("TLS alert {} (RFC 8446, section 6)", u8::from(alert)),
        None => "it hung up before it let this one in".to_owned(),
    }
}

/// A failed session as the link's caller sees it.
pub(super) fn link_error(error: SessionError, waiting: Waiting) -> LinkError {
    match error {
        SessionError::Truncated => LinkError::Truncated { missing: 0 },
        SessionError::Socket(SocketError::Deadline) => LinkError::Deadline(waiting),
        SessionError::Socket(SocketError::Cancelled) => LinkError::Cancelled,
        SessionError::Socket(SocketError::Io(source)) => LinkError::Io(source),
        SessionError::Foreign(first) => LinkError::NotMirrorvm { said: said(&first) },
        SessionError::Tls(source) => match CertRefusal::within(&source) {
            Some(refusal) => LinkError::PeerRefused(refusal.clone()),
            None => LinkError::Tls(source),
        },
    }
}

/// The first line of what came, printable and short.
fn said(bytes: &[u8]) -> String {
    const MAX: usize = 60;
    let line = bytes.split(|b| matches!(b, b'\r' | b'\n')).next().unwrap_or_default();
    line.iter().take(MAX).flat_map(|b| b.escape_ascii()).map(char::from).collect()
}

/// What an error means to a client that has not been admitted yet.
pub(super) fn not_admitted(error: LinkError) -> LinkError {
    match error {
        LinkError::Tls(rustls::Error::AlertReceived(alert)) => {
            LinkError::RefusedByPeer { alert: Some(alert) }
        }
        LinkError::Truncated { .. } | LinkError::Io(_) => LinkError::RefusedByPeer { alert: None },
        LinkError::Deadline(_) => LinkError::Deadline(Waiting::Handshake),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::{AlertDescription, LinkError, said};

    #[test]
    fn a_refusal_says_its_alert_by_the_number_that_documents_have() {
        let text = |alert| LinkError::RefusedByPeer { alert }.to_string();
        assert!(text(Some(AlertDescription::NoApplicationProtocol)).contains("TLS alert 120"));
        assert!(text(None).contains("hung up"));
    }

    #[test]
    fn what_a_stranger_says_is_quoted_short_and_printable() {
        assert_eq!(said(b"SSH-2.0-OpenSSH_9.2\r\nmore"), "SSH-2.0-OpenSSH_9.2");
        assert_eq!(said(b"\x1b[31m\"red\"\xff"), "\\x1b[31m\\\"red\\\"\\xff");
        assert_eq!(said(&[7; 500]).len(), 60 * 4);
        assert_eq!(said(b"\r\n"), "");
    }
}
