//! A host's identity: a key pair in two PEM files, known to peers by a digest of its public half.
//!
//! Owns: creating, storing, checking and loading them. Must not know: handshakes.
//!
//! The certificate is only the envelope that TLS wants: nobody signs it but the key itself, and peers compare
//! the public key, not names or dates. The key file decides whether an identity exists; it is published last
//! and never replaced. A certificate that is lost, damaged, of another key or not valid for ever is made
//! again for the key that is there: peers of earlier builds look at its dates, and no clock of ours or theirs
//! is to decide whether two hosts know each other.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::digest;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zeroize::{Zeroize, Zeroizing};

use super::tls;
use crate::private_files::{PrivateDir, PrivateFileError};

pub(super) const KEY_FILE: &str = "host-key.pem";
const CERTIFICATE_FILE: &str = "host-certificate.pem";
const LOCK_FILE: &str = "host-key.lock";
pub(super) const MAX_PEM_BYTES: u64 = 16 << 10;
/// What a certificate says of its dates: since 1970, and no end (RFC 5280 section 4.1.2.5, the year 9999).
const VALID_FROM: SystemTime = UNIX_EPOCH;
const VALID_UNTIL: Duration = Duration::from_secs(253_402_300_799);

/// What a host is to its peers: SHA-256 of the DER SubjectPublicKeyInfo of its certificate (RFC 7469 section
/// 2.4).
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

    /// The bytes of the digest.
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
        /// What the PEM reader says.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The key is of a kind we do not use, or does not belong to the certificate.
    #[error("the host key cannot be used with the host certificate")]
    Key(#[source] rustls::Error),
    /// There was an identity, and it is gone.
    #[error(
        "{dir} holds no host key, and the database beside it belongs to the host with identity {expected}; put the key back \
         from a backup, or make this host another one to its peers with `mirrorvmd identity accept`"
    )]
    Lost {
        /// Where it should be.
        dir: PathBuf,
        /// Whose it is; `an earlier build did not note` when nobody knows.
        expected: String,
    },
    /// There is another key than the one that the host had.
    #[error(
        "{dir} holds the key of {found}, and the database beside it belongs to the host with identity {expected}; put the key \
         back from a backup, or make this host another one to its peers with `mirrorvmd identity accept`"
    )]
    Replaced {
        /// Directory of the identity.
        dir: PathBuf,
        /// The identity that the host had.
        expected: PeerIdentity,
        /// The identity of the key that is there.
        found: PeerIdentity,
    },
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

/// What there is to tell of an identity's files.
#[derive(Clone, Debug)]
pub struct IdentityFacts {
    /// What peers pin.
    pub pin: PeerIdentity,
    /// Path of the private key.
    pub key: PathBuf,
    /// Path of the certificate.
    pub certificate: PathBuf,
    /// Names in the certificate. No peer goes by them.
    pub names: Vec<String>,
    /// From when to when the certificate says that it is valid; `None` while there is none of this key. No
    /// peer goes by it.
    pub validity: Option<(String, String)>,
}

impl Identity {
    /// What is in `dir`, as it is: nothing is made or mended.
    ///
    /// # Errors
    /// [`IdentityError::Missing`] without a key, and what is wrong with files or key.
    pub fn facts(dir: &Path) -> Result<IdentityFacts, IdentityError> {
        let missing = |error| match error {
            PrivateFileError::Missing { .. } => IdentityError::Missing,
            other => other.into(),
        };
        let files = PrivateDir::open(dir).map_err(missing)?;
        let key = files.read(KEY_FILE, MAX_PEM_BYTES).map_err(missing)?;
        let own = files
            .read(CERTIFICATE_FILE, MAX_PEM_BYTES)
            .ok()
            .and_then(|pem| Some((Self::from_pem(&pem, &key).ok()?, true)));
        let (identity, there) = match own {
            Some(own) => own,
            None => (Self::from_pem(envelope_of(&key)?.as_bytes(), &key)?, false),
        };
        let said =
            identity.certified.cert.first().filter(|_| there).and_then(|leaf| tls::names_and_dates(leaf));
        let (names, validity) = said.map_or((Vec::new(), None), |(names, dates)| (names, Some(dates)));
        let (key, certificate) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        Ok(IdentityFacts { pin: identity.pin, key, certificate, names, validity })
    }

    /// Makes a new key in `dir` (created with mode 0700 if missing). Fails if there is one: a host that loses
    /// its key is another host to its peers.
    pub fn create(dir: &Path) -> Result<Self, IdentityError> {
        let dir = PrivateDir::open_or_create(dir)?;
        // Two creators at once would pair one's certificate with the other's key.
        let _lock = dir.lock(LOCK_FILE)?;
        if dir.contains(KEY_FILE)? {
            return Err(IdentityError::Exists);
        }
        let (certificate, key) = generate()?;
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
        let certificate = match dir.read(CERTIFICATE_FILE, MAX_PEM_BYTES) {
            Ok(pem) => Some(pem),
            Err(PrivateFileError::Missing { .. } | PrivateFileError::TooLong { .. }) => None,
            Err(other) => return Err(other.into()),
        };
        let there = certificate.and_then(|pem| Self::from_pem(&pem, &key_pem).ok());
        if let Some(identity) = there.filter(Self::is_valid_for_ever) {
            return Ok(identity);
        }
        let pem = envelope_of(&key_pem)?;
        tracing::warn!(
            "the host's certificate was lost, damaged or not valid for ever, and is made again for the same key"
        );
        if let Err(error) = dir.replace(CERTIFICATE_FILE, pem.as_bytes()) {
            // Good for this run all the same.
            tracing::warn!(error = %error, "the host's certificate could not be written");
        }
        Self::from_pem(pem.as_bytes(), &key_pem)
    }

    /// Whether peers of earlier builds, which look at the dates, take its certificate whatever their clocks
    /// say.
    fn is_valid_for_ever(&self) -> bool {
        self.certified.cert.first().is_some_and(|leaf| tls::is_valid_for_ever(leaf))
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

/// A fresh Ed25519 key and its certificate, in PEM.
pub(super) fn generate() -> Result<(String, Zeroizing<String>), IdentityError> {
    let mut key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(IdentityError::Generate)?;
    let certificate = envelope(&key, VALID_FROM, UNIX_EPOCH + VALID_UNTIL);
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok((certificate.map_err(IdentityError::Generate)?, key_pem))
}

/// A certificate for a key that is there, in PEM.
fn envelope_of(key_pem: &[u8]) -> Result<String, IdentityError> {
    let not_text =
        || IdentityError::Pem { file: KEY_FILE, source: rustls::pki_types::pem::Error::NoItemsFound };
    let text = std::str::from_utf8(key_pem).map_err(|_| not_text())?;
    // The reader's own reason is the better one.
    PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|source| IdentityError::Pem { file: KEY_FILE, source })?
        .zeroize();
    let mut key = rcgen::KeyPair::from_pem(text).map_err(IdentityError::Generate)?;
    let certificate = envelope(&key, VALID_FROM, UNIX_EPOCH + VALID_UNTIL);
    key.zeroize();
    certificate.map_err(IdentityError::Generate)
}

/// A certificate that is valid between two dates, in PEM.
pub(super) fn envelope(
    key: &rcgen::KeyPair,
    from: SystemTime,
    until: SystemTime,
) -> Result<String, rcgen::Error> {
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "mirrorvm host");
    params.not_before = from.into();
    params.not_after = until.into();
    Ok(params.self_signed(key)?.pem())
}
