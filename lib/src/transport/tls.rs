//! TLS 1.3 between hosts that pin each other's public keys.
//!
//! Owns: the rustls configurations and the verifiers. Must not know: sockets, frames.
//!
//! No certificate authority takes part, so the usual tricks (a leaf that signs another, a name that fits, a
//! valid chain of somebody else) have nothing to hold on to: exactly one certificate, its public key's digest
//! is who the peer is, and the handshake signature is verified with *those very key bytes* (not with what a
//! second parser finds in the certificate). Resumption, tickets and early data are off: each would let a peer
//! in without showing its key.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, ServerConfig, SignatureScheme,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::identity::{Identity, PeerIdentity};

/// The one application protocol; a change of the wire gets a new name.
pub(super) const ALPN: &[u8] = b"mirrorvm/1";
/// Longest certificate looked at, in bytes; ours have about 400.
const MAX_CERTIFICATE: usize = 8 << 10;

/// Asked within the handshake whether a peer may enter.
pub type PeerFilter = Arc<dyn Fn(&PeerIdentity) -> bool + Send + Sync>;

/// Why a certificate was refused. Carries nothing the peer wrote except the digest of its key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertRefusal {
    /// The peer sent more than its own certificate.
    #[error("{0} certificates beside the peer's own, expected none")]
    Chain(usize),
    /// The certificate is longer than any of ours.
    #[error("certificate of {0} bytes, at most {MAX_CERTIFICATE} are looked at")]
    TooLong(usize),
    /// Not a DER certificate, or bytes follow it.
    #[error("malformed certificate")]
    Malformed,
    /// The server is not the one that the client meant.
    #[error("peer is {presented}, expected {expected}")]
    WrongPeer {
        /// Identity of the peer that was meant.
        expected: PeerIdentity,
        /// Who answered (possession of the key not proven at that point).
        presented: PeerIdentity,
    },
    /// The server is the client: the address leads back.
    #[error(
        "peer is {own}, this host itself, and not {expected}: the address leads here; give the other host's address"
    )]
    Oneself {
        /// Identity of this host.
        own: PeerIdentity,
        /// Identity of the peer that was meant.
        expected: PeerIdentity,
    },
    /// The client is not among those that the server admits.
    #[error("peer {0} is not admitted")]
    NotAdmitted(PeerIdentity),
}

impl From<CertRefusal> for Error {
    fn from(refusal: CertRefusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

impl CertRefusal {
    /// Finds one of our refusals in what rustls reports.
    pub(super) fn within(error: &Error) -> Option<&Self> {
        match error {
            Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.downcast_ref(),
            _ => None,
        }
    }
}

/// Whether the certificate has no date by which a peer of an earlier build would refuse it: valid since
/// before there were any, and after every clock has been wrong.
pub(super) fn is_valid_for_ever(certificate: &[u8]) -> bool {
    const YEAR_2000: i64 = 946_684_800;
    const YEAR_9000: i64 = 221_845_392_000;
    parse(certificate).is_ok_and(|parsed| {
        let validity = parsed.validity();
        validity.not_before.timestamp() < YEAR_2000 && validity.not_after.timestamp() > YEAR_9000
    })
}

/// The identity in a certificate. Its dates are nobody's business: whoever pins a key pins it until told
/// otherwise, and a clock that is wrong on either side must not part two hosts.
pub(super) fn identity_of(certificate: &[u8]) -> Result<PeerIdentity, CertRefusal> {
    Ok(PeerIdentity::of_public_key(parse(certificate)?.public_key().raw))
}

/// The names in a certificate, printable, and its dates, for people.
pub(super) fn names_and_dates(certificate: &[u8]) -> Option<(Vec<String>, (String, String))> {
    let parsed = parse(certificate).ok()?;
    let subject = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let names = subject.map(|name| name.escape_debug().to_string()).collect();
    // RFC 5280, section 4.1.2.5: no end. Later than what timestamps reach.
    const NO_END: i64 = 253_402_300_799;
    let date = |at: i64| match jiff::Timestamp::from_second(at) {
        Ok(at) => at.to_string(),
        Err(_) if at == NO_END => "9999-12-31T23:59:59Z".to_owned(),
        Err(_) => format!("{at} seconds since 1970"),
    };
    let validity = parsed.validity();
    Some((names, (date(validity.not_before.timestamp()), date(validity.not_after.timestamp()))))
}

fn parse(certificate: &[u8]) -> Result<X509Certificate<'_>, CertRefusal> {
    if certificate.len() > MAX_CERTIFICATE {
        return Err(CertRefusal::TooLong(certificate.len()));
    }
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(CertRefusal::Malformed),
    }
}

/// Whom a verifier takes.
enum Expected {
    /// This one (we connect).
    Exactly(PeerIdentity),
    /// Whom the filter takes (we accept).
    Filter(PeerFilter),
}

/// The verifier of both directions: it compares public keys with pins.
struct PinVerifier {
    provider: Arc<CryptoProvider>,
    expected: Expected,
}

impl std::fmt::Debug for PinVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinVerifier").finish_non_exhaustive()
    }
}

impl PinVerifier {
    fn verify(&self, certificate: &[u8], intermediates: usize) -> Result<(), CertRefusal> {
        if intermediates != 0 {
            return Err(CertRefusal::Chain(intermediates));
        }
        let presented = identity_of(certificate)?;
        match &self.expected {
            Expected::Exactly(expected) if *expected == presented => Ok(()),
            Expected::Exactly(expected) => Err(CertRefusal::WrongPeer { expected: *expected, presented }),
            Expected::Filter(admits) if admits(&presented) => Ok(()),
            Expected::Filter(_) => Err(CertRefusal::NotAdmitted(presented)),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &[u8],
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let parsed = parse(certificate)?;
        let spki = SubjectPublicKeyInfoDer::from(parsed.public_key().raw);
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &spki, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates.len())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for PinVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates.len())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// One cipher suite: hosts of SEV guests have AES instructions, and with nothing to choose there is no
/// downgrade.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites = vec![rustls::crypto::ring::cipher_suite::TLS13_AES_256_GCM_SHA384];
    provider
}

/// The connecting end of a handshake that ends well only with `expected`.
pub(super) fn client(
    provider: CryptoProvider,
    identity: &Identity,
    expected: PeerIdentity,
) -> Result<UnbufferedClientConnection, Error> {
    let provider = Arc::new(provider);
    let verifier = PinVerifier { provider: provider.clone(), expected: Expected::Exactly(expected) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    // Never sent nor compared: peers have keys, not names.
    let name = ServerName::try_from("mirrorvm").map_err(|_| Error::General("constant name".into()))?;
    UnbufferedClientConnection::new(Arc::new(config), name)
}

/// What the accepting end needs for each handshake; made once per listener.
pub(super) fn server_config(
    provider: CryptoProvider,
    identity: &Identity,
    admits: PeerFilter,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(provider);
    let verifier = PinVerifier { provider: provider.clone(), expected: Expected::Filter(admits) };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// The accepting end of one handshake.
pub(super) fn server(config: Arc<ServerConfig>) -> Result<UnbufferedServerConnection, Error> {
    UnbufferedServerConnection::new(config)
}
