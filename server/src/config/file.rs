//! The configuration file: TOML, every key optional, unknown keys refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::access::Role;

/// Longest configuration file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The content of a configuration file. Keys that are absent are `None` or empty.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// Same as `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// Same as `--name`.
    pub name: Option<String>,
    /// Same as `--listen`, once for each place.
    pub listen: Option<Vec<String>>,
    /// Same as `--default-socket`.
    pub default_socket: Option<bool>,
    /// Same as `--peer-listen`.
    pub peer_listen: Option<String>,
    /// Same as `--advertise`.
    pub advertise: Option<String>,
    /// Same as `--image-directory`, once for each directory.
    pub image_directories: Option<Vec<PathBuf>>,
    /// Same as `--volume-directory`, once for each directory.
    pub volume_directories: Option<Vec<PathBuf>>,
    /// Same as `--qemu-users`.
    pub qemu_users: Option<String>,
    /// Same as `--confine`.
    pub confine: Option<String>,
    /// Same as `--metrics-listen`, once for each place.
    pub metrics_listen: Option<Vec<String>>,
    /// Same as `--require-if-match`.
    pub require_if_match: Option<bool>,
    /// Same as `--log-format`.
    pub log_format: Option<String>,
    /// The table `[tls]`: certificate and key of the API over TLS.
    #[serde(default)]
    pub tls: TlsFile,
    /// The table `[access]`: which caller has which role.
    #[serde(default)]
    pub access: AccessFile,
    /// The table `[limits]`, by the names of [`Limits`](super::Limits).
    #[serde(default)]
    pub limits: BTreeMap<String, u64>,
}

/// Files of the API over TLS.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFile {
    /// Same as `--tls-certificate`.
    pub certificate: Option<PathBuf>,
    /// Same as `--tls-key`.
    pub key: Option<PathBuf>,
    /// Same as `--tls-client-ca`.
    pub client_ca: Option<PathBuf>,
}

/// Which callers have which role.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessFile {
    /// Roles by user id.
    #[serde(default)]
    pub users: BTreeMap<String, Role>,
    /// Roles by group id.
    #[serde(default)]
    pub groups: BTreeMap<String, Role>,
    /// Roles by a name in the client certificate.
    #[serde(default)]
    pub certificates: BTreeMap<String, Role>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has keys or types that a configuration cannot have.
    #[error("the configuration file {} cannot be used", path.display())]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// Line, column and reason.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("{key} is {value:?}, which is not {wanted} ({source_name})")]
    Value {
        /// Key of the setting.
        key: String,
        /// The value as it was given.
        value: String,
        /// What the value may be.
        wanted: String,
        /// Where the value was given.
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

/// Parses the text of a file.
///
/// # Errors
/// The place at which it stops being a configuration.
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
