//! The API over TLS 1.3: this host's certificate, and the names in the client's.
//!
//! A client certificate is asked for when there is an authority to check it against, and not required: a
//! caller without one needs a bearer token. One that is shown and does not check out ends the handshake.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// How many names of a client certificate are looked at.
const NAMES_MAX: usize = 64;

/// The PEM files that TLS needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Path of the certificate, followed by those that lead to its authority.
    pub certificate: PathBuf,
    /// Path of its private key. Only the daemon's user may be able to read it.
    pub key: PathBuf,
    /// Path of the authorities that sign client certificates.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No keys were given.
    #[error("a tls: address needs --tls-certificate and --tls-key")]
    NoKeys,
    /// A file cannot be read, or does not contain what it should.
    #[error("cannot use {}", path.display())]
    File {
        /// Path of the file or directory.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Others may read the private key.
    #[error("{} has mode {mode:04o}: group and others must have no access to a private key", path.display())]
    TooOpen {
        /// Path of the file or directory.
        path: PathBuf,
        /// Its permission bits, which are too wide.
        mode: u32,
    },
    /// Certificate and key cannot be used.
    #[error("the certificate and its key cannot be used")]
    Keys(#[source] rustls::Error),
}

/// Makes what answers TLS handshakes.
///
/// # Errors
/// [`TlsError`].
pub(super) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, TlsError> {
    let chain = certificates(&files.certificate)?;
    let mode = std::fs::metadata(&files.key).map_err(|e| unusable(&files.key, e))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TlsError::TooOpen { path: files.key.clone(), mode });
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| unusable(&files.key, e))?;
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Keys)?;
    let builder = match &files.client_ca {
        Some(path) => builder.with_client_cert_verifier(verifier(path, provider)?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Keys)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would carry a client's certificate beyond its end.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn verifier(
    path: &Path,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|e| unusable(path, e))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|e| unusable(path, e))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|e| unusable(path, e))?.collect();
    let found = found.map_err(|e| unusable(path, e))?;
    if found.is_empty() { Err(unusable(path, "there is no certificate in it")) } else { Ok(found) }
}

fn unusable(path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TlsError {
    TlsError::File { path: path.to_owned(), source: source.into() }
}

/// The first name in this host's certificate to which a browser could be sent.
///
/// # Errors
/// As [`acceptor`].
pub(super) fn own_name(files: &TlsFiles) -> Result<Option<String>, TlsError> {
    let chain = certificates(&files.certificate)?;
    let names = chain.first().map_or_else(Vec::new, |own| names(own));
    let plain =
        |n: &str| n.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)).then(|| n.to_owned());
    Ok(names.iter().filter_map(|n| n.strip_prefix("dns:")).find_map(plain))
}

/// The names in a verified certificate, written as in the configuration. The subject does not count.
pub(super) fn names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(extension)) = parsed.subject_alternative_name() else { return Vec::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(n) => Some(format!("dns:{}", n.to_ascii_lowercase())),
        GeneralName::URI(n) => Some(format!("uri:{n}")),
        GeneralName::RFC822Name(n) => Some(format!("email:{n}")),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| format!("ip:{}", std::net::Ipv4Addr::from(b))),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|b| format!("ip:{}", std::net::Ipv6Addr::from(b))),
            _ => None,
        },
        _ => None,
    };
    extension.value.general_names.iter().take(NAMES_MAX).filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    #[test]
    fn names_are_read_from_the_alternative_names_alone() {
        let mut params = CertificateParams::new(vec!["Ops.example".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://a/b".try_into().unwrap()));
        params.subject_alt_names.push(SanType::IpAddress("192.0.2.1".parse().unwrap()));
        params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        assert_eq!(names(certificate.der()), ["dns:ops.example", "uri:spiffe://a/b", "ip:192.0.2.1"]);
        assert!(names(b"x").is_empty());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = (dir.path().join("c.pem"), dir.path().join("k.pem"));
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let files = TlsFiles { certificate, key: key.clone(), client_ca: None };
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(acceptor(&files), Err(TlsError::TooOpen { mode: 0o640, .. })));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(acceptor(&files).is_ok());
        let empty = TlsFiles { certificate: key.clone(), ..files };
        assert!(matches!(acceptor(&empty), Err(TlsError::File { .. })));
    }
}
