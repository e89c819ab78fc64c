//! Certificates over TLS: whom the client takes for the daemon, and what it shows of itself.
//!
//! Owns: reading PEM files, pins, the TLS configuration. Must not know: requests.
//!
//! The authorities of the operating system do not count: a daemon's certificate is its operator's own matter,
//! and one that any public authority could issue says nothing of it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::SetupError;

/// Whom the client takes for the daemon. With both authorities and a pin, both must hold.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    authorities: Option<Arc<RootCertStore>>,
    pin: Option<[u8; 32]>,
}

impl Trust {
    /// A host whose certificate one of these authorities issued: PEM. The certificate must be valid now and
    /// have the host's name.
    ///
    /// # Errors
    /// The file cannot be read, or holds no certificate of an authority.
    pub fn authorities(path: &Path) -> Result<Self, SetupError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|e| unusable(path, e))?;
        }
        Ok(Self { authorities: Some(Arc::new(roots)), pin: None })
    }

    /// The host with this very certificate, by the SHA-256 of its DER: 64 hexadecimal digits, with or without
    /// colons between bytes and `sha256:` before them, as `openssl x509 -fingerprint -sha256` prints it.
    /// Without authorities neither the certificate's names nor its dates count then.
    ///
    /// # Errors
    /// It is no such digest.
    pub fn pin(digest: &str) -> Result<Self, SetupError> {
        Self::default().and_pin(digest)
    }

    /// The same, and the certificate must be this one: see [`Trust::pin`].
    ///
    /// # Errors
    /// As [`Trust::pin`].
    pub fn and_pin(mut self, digest: &str) -> Result<Self, SetupError> {
        self.pin = Some(digest_of(digest).ok_or_else(|| SetupError::Pin(digest.to_owned()))?);
        Ok(self)
    }
}

/// The certificate that a client shows, and its private key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    /// Its `Debug` does not show it.
    key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl Identity {
    /// From PEM files: the certificate with what leads to its authority, and its key.
    ///
    /// # Errors
    /// A file cannot be read or holds nothing of its kind; others than its owner have access to the key.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, SetupError> {
        private(key)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| unusable(key, e))?;
        Ok(Self { chain: certificates(certificate)?, key })
    }
}

/// Refuses a file with a secret that others than its owner have access to.
pub(crate) fn private(path: &Path) -> Result<(), SetupError> {
    let mode = std::fs::metadata(path).map_err(|e| unusable(path, e))?.mode() & 0o7777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(SetupError::TooOpen { path: path.to_owned(), mode }) }
}

/// What handshakes go by.
pub(crate) fn config(trust: &Trust, identity: Option<&Identity>) -> Result<ClientConfig, SetupError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let authorities = match &trust.authorities {
        Some(roots) => {
            let builder =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider));
            Some(builder.build().map_err(|e| SetupError::Certificate(e.into()))?)
        }
        None => None,
    };
    if authorities.is_none() && trust.pin.is_none() {
        return Err(SetupError::NoTrust);
    }
    let verifier = Verifier { authorities, pin: trust.pin, provider: Arc::clone(&provider) };
    let tls = |e| SetupError::Certificate(Box::new(e));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(own) => builder.with_client_auth_cert(own.chain.clone(), own.key.clone_key()).map_err(tls)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A connection is for one request or is kept: there is nothing to resume.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Holds a server's certificate against authorities, a pin, or both.
#[derive(Debug)]
struct Verifier {
    authorities: Option<Arc<WebPkiServerVerifier>>,
    pin: Option<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(authorities) = &self.authorities {
            authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        }
        if let Some(pin) = self.pin {
            let digest = ring::digest::digest(&ring::digest::SHA256, end_entity);
            if digest.as_ref() != pin {
                let shown: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
                return Err(rustls::Error::General(format!(
                    "its certificate is sha256:{shown}, not the pinned one"
                )));
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|e| unusable(path, e))?.collect();
    let found = found.map_err(|e| unusable(path, e))?;
    if found.is_empty() { Err(unusable(path, "there is no certificate in it")) } else { Ok(found) }
}

fn unusable(path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SetupError {
    SetupError::File { path: path.to_owned(), source: source.into() }
}

fn digest_of(text: &str) -> Option<[u8; 32]> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let bytes: Vec<&str> = if digits.contains(':') {
        digits.split(':').collect()
    } else {
        // ASCII: a byte is a character.
        let even = digits.is_ascii() && digits.len() == 64;
        (0..digits.len()).step_by(2).take_while(|_| even).map(|at| &digits[at..at + 2]).collect()
    };
    let hex = |b: &str| (b.len() == 2 && b.bytes().all(|c| c.is_ascii_hexdigit())).then_some(());
    let bytes: Option<Vec<u8>> =
        bytes.into_iter().map(|b| hex(b).and_then(|()| u8::from_str_radix(b, 16).ok())).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_read_as_tools_write_them() {
        let plain = "5a".repeat(32);
        let colons = vec!["5A"; 32].join(":");
        for good in [plain.clone(), format!("sha256:{plain}"), colons] {
            assert_eq!(digest_of(&good), Some([0x5a; 32]), "{good}");
        }
        for bad in
            ["", "5a", &plain[1..], &format!("{plain}5a"), &plain.replace("5a", "5g"), "5\u{e9}", "+5:-5"]
        {
            assert_eq!(digest_of(bad), None, "{bad}");
            assert!(matches!(Trust::pin(bad), Err(SetupError::Pin(_))));
        }
    }

    #[test]
    fn tls_without_anybody_to_trust_is_no_configuration() {
        assert!(matches!(config(&Trust::default(), None), Err(SetupError::NoTrust)));
    }
}
