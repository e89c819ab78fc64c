//! The configuration file: TOML, every key optional, unknown keys refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::access::Role;

/// Bytes that a configuration file may have.
const FILE_MAX: u64 = 1 << 20;

/// What the file says.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// As `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// As `--name`.
    pub name: Option<String>,
    /// As `--listen`.
    pub listen: Option<Vec<String>>,
    /// As `--peer-listen`.
    pub peer_listen: Option<String>,
    /// As `--advertise`.
    pub advertise: Option<String>,
    /// As `--image-directory`.
    pub image_directories: Option<Vec<PathBuf>>,
    /// As `--qemu-users`.
    pub qemu_users: Option<String>,
    /// As `--metrics-listen`.
    pub metrics_listen: Option<Vec<String>>,
    /// As `--require-if-match`.
    pub require_if_match: Option<bool>,
    /// As `--log-format`.
    pub log_format: Option<String>,
    /// The API over TLS.
    #[serde(default)]
    pub tls: TlsFile,
    /// Who has which role.
    #[serde(default)]
    pub access: AccessFile,
    /// How much of what, by the names of [`Limits`](super::Limits).
    #[serde(default)]
    pub limits: BTreeMap<String, u64>,
}

/// Keys of the API over TLS.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFile {
    /// As `--tls-certificate`.
    pub certificate: Option<PathBuf>,
    /// As `--tls-key`.
    pub key: Option<PathBuf>,
    /// As `--tls-client-ca`.
    pub client_ca: Option<PathBuf>,
}

/// Who has which role.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessFile {
    /// Roles by user id.
    #[serde(default)]
    pub users: BTreeMap<String, Role>,
    /// Roles by group id.
    #[serde(default)]
    pub groups: BTreeMap<String, Role>,
    /// Roles by name in the client certificate.
    #[serde(default)]
    pub certificates: BTreeMap<String, Role>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML, or says what cannot be said.
    #[error("the configuration file {} cannot be used", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("{key} is {value:?}, which is not {wanted} ({source_name})")]
    Value {
        /// Which.
        key: String,
        /// What it is.
        value: String,
        /// What it may be.
        wanted: String,
        /// Where it comes from.
        source_name: String,
    },
}

/// Reads the file at `path`.
///
/// # Errors
/// [`ConfigError::Read`], [`ConfigError::Parse`].
pub fn read(path: &Path) -> Result<FileConfig, ConfigError> {
    use std::io::Read as _;
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    let bytes = file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if bytes as u64 > FILE_MAX {
        return Err(failed(std::io::Error::other("the file has more than 1 MiB")));
    }
    parse(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
}

/// Reads a file's text.
///
/// # Errors
/// Where it stops being a configuration.
pub fn parse(text: &str) -> Result<FileConfig, Box<toml::de::Error>> {
    toml::from_str(text).map_err(Box::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_strict() {
        let file = parse(
            "listen = [\"unix:/run/x\"]\n[access.users]\n1000 = \"operator\"\n\
             [access.certificates]\n\"uri:spiffe://a/b\" = \"peer\"\n[limits]\nstreams = 3\n",
        )
        .unwrap();
        assert_eq!(file.access.users["1000"], Role::Operator);
        assert_eq!(file.access.certificates["uri:spiffe://a/b"], Role::Peer);
        assert_eq!(file.limits["streams"], 3);
        for bad in ["x = 1", "[access.users]\n1 = \"root\"", "[tls]\ncert = \"x\"", "listen = 1", "a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
