//! A host's identity: a key pair in two PEM files, known to peers by a digest of its public half.
//!
//! Owns: creating, storing, checking and loading them. Must not know: handshakes.
//!
//! The certificate is only the envelope that TLS wants: nobody signs it but the key itself, and peers compare the public
//! key, not names. The key file decides whether an identity exists; it is published last and never replaced.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ring::digest;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, Zeroizing};

use super::tls::{self, CertRefusal};
use crate::private_files::{PrivateDir, PrivateFileError};

const KEY_FILE: &str = "host-key.pem";
const CERTIFICATE_FILE: &str = "host-certificate.pem";
const LOCK_FILE: &str = "host-key.lock";
const MAX_PEM_BYTES: u64 = 16 << 10;
/// How far a peer's clock may lag behind ours at creation.
const BACKDATED: Duration = Duration::from_secs(24 * 3600);
/// Ten years: there is no authority to renew with, peers hold the key for as long as they like.
const VALID_FOR: Duration = Duration::from_secs(3652 * 24 * 3600);

/// What a host is to its peers: SHA-256 of the DER SubjectPublicKeyInfo of its certificate (RFC 7469 section 2.4).
///
/// Text and serde form: `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity([u8; 32]);

const PREFIX: &str = "sha256:";

impl PeerIdentity {
    /// Wraps a digest computed elsewhere.
    pub const fn from_bytes(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(super) fn of_public_key(spki: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        Self(out)
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a peer identity. Says nothing of the text, which may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a peer identity, expected sha256: and 64 lower-case hexadecimal digits")]
pub struct ParsePeerIdentityError;

impl FromStr for PeerIdentity {
    type Err = ParsePeerIdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix(PREFIX).ok_or(ParsePeerIdentityError)?.as_bytes();
        let mut out = [0; 32];
        if digits.len() != 2 * out.len() {
            return Err(ParsePeerIdentityError);
        }
        // One identity has one spelling: upper case is refused.
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(ParsePeerIdentityError),
        };
        for (byte, pair) in out.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(out))
    }
}

impl Serialize for PeerIdentity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerIdentity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why there is no identity to work with.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// `create` was asked for and there is one.
    #[error("the directory already holds a host identity")]
    Exists,
    /// `load` was asked for and there is none.
    #[error("the directory holds no host identity")]
    Missing,
    /// A directory or file did not pass the checks, or could not be read or written.
    #[error("the host identity's files cannot be used")]
    Files(#[from] PrivateFileError),
    /// A new key or certificate could not be made.
    #[error("cannot generate a host identity")]
    Generate(#[source] rcgen::Error),
    /// A file is not PEM of the expected content.
    #[error("{file} is not the expected PEM")]
    Pem {
        /// File name in the identity's directory.
        file: &'static str,
        /// The reader's reason.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The key is of a kind we do not use, or does not belong to the certificate.
    #[error("the host key cannot be used with the host certificate")]
    Key(#[source] rustls::Error),
    /// Peers would refuse the certificate (expired, malformed).
    #[error("the host certificate is not one that peers accept")]
    Certificate(#[source] CertRefusal),
}

/// This host's key and certificate, ready for handshakes. Cheap to clone; never shows the key.
#[derive(Clone)]
pub struct Identity {
    pin: PeerIdentity,
    certified: Arc<CertifiedKey>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes a new key in `dir` (created with mode 0700 if missing). Fails if there is one: a host that loses
    /// its key is another host to its peers.
    pub fn create(dir: &Path) -> Result<Self, IdentityError> {
        let dir = PrivateDir::open_or_create(dir)?;
        // Two creators at once would pair one's certificate with the other's key.
        let _lock = dir.lock(LOCK_FILE)?;
        if dir.contains(KEY_FILE)? {
            return Err(IdentityError::Exists);
        }
        let (certificate, key) = generate(SystemTime::now())?;
        // A certificate without a key is what a crash between the two leaves behind.
        dir.remove_if_present(CERTIFICATE_FILE)?;
        dir.create(CERTIFICATE_FILE, certificate.as_bytes())?;
        dir.create(KEY_FILE, key.as_bytes())?;
        Self::load_from(&dir)
    }

    /// Loads the identity in `dir`.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        match PrivateDir::open(dir) {
            Ok(dir) => Self::load_from(&dir),
            Err(PrivateFileError::Missing { .. }) => Err(IdentityError::Missing),
            Err(error) => Err(error.into()),
        }
    }

    /// Loads the identity in `dir`, or creates it if there is none.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        match Self::load(dir) {
            Err(IdentityError::Missing) => match Self::create(dir) {
                // Someone else was faster, and is done.
                Err(IdentityError::Exists) => Self::load(dir),
                created => created,
            },
            loaded => loaded,
        }
    }

    /// What peers have to pin.
    pub fn pin(&self) -> &PeerIdentity {
        &self.pin
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    fn load_from(dir: &PrivateDir) -> Result<Self, IdentityError> {
        let key_pem = match dir.read(KEY_FILE, MAX_PEM_BYTES) {
            Err(PrivateFileError::Missing { .. }) => return Err(IdentityError::Missing),
            read => read?,
        };
        let certificate_pem = dir.read(CERTIFICATE_FILE, MAX_PEM_BYTES)?;
        let identity = Self::from_pem(&certificate_pem, &key_pem)?;
        let leaf = identity.certified.cert.first().ok_or(IdentityError::Missing)?;
        tls::examine(leaf, SystemTime::now()).map_err(IdentityError::Certificate)?;
        Ok(identity)
    }

    /// Builds an identity from PEM text without asking whether the certificate is valid today.
    pub(super) fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, IdentityError> {
        let pem = |file| move |source| IdentityError::Pem { file, source };
        let certificate = CertificateDer::from_pem_slice(certificate).map_err(pem(CERTIFICATE_FILE))?;
        let mut key = PrivateKeyDer::from_pem_slice(key).map_err(pem(KEY_FILE))?;
        // Borrowed: the provider copies what it needs, and this copy can be wiped.
        let signer = rustls::crypto::ring::sign::any_supported_type(&key);
        key.zeroize();
        let certified = CertifiedKey::new(vec![certificate], signer.map_err(IdentityError::Key)?);
        certified.keys_match().map_err(IdentityError::Key)?;
        let spki = certified.key.public_key().ok_or(IdentityError::Missing)?;
        Ok(Self { pin: PeerIdentity::of_public_key(&spki), certified: Arc::new(certified) })
    }
}

/// A fresh Ed25519 key and its certificate, in PEM, valid from about `now`.
pub(super) fn generate(now: SystemTime) -> Result<(String, Zeroizing<String>), IdentityError> {
    let mut key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(IdentityError::Generate)?;
    let certificate = (|| {
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "mirrorvm host");
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + VALID_FOR).into();
        params.self_signed(&key)
    })();
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok((certificate.map_err(IdentityError::Generate)?.pem(), key_pem))
}
