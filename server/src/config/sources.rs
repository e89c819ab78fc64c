//! Flag over environment over file over default: what counts, and where it came from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::parser::ValueSource;
use mirrorvm::qemu::QemuUsers;
use mirrorvm::transport::{Advertised, ListenAt};
use serde::Serialize;

use super::file::{ConfigError, FileConfig};
use super::{AccessRules, Config, Limits};
use crate::access::Role;
use crate::confine::Confine;
use crate::serve::{Place, SOCKET, TlsFiles};

/// Where a value of the configuration came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// It was given on the command line.
    Flag,
    /// It was given by an environment variable.
    Environment,
    /// It was given in the configuration file.
    File,
    /// Nobody gave it: it is the default.
    Default,
}

impl Source {
    /// The source, as messages name it.
    const fn name(&self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::File => "file",
            Self::Default => "default",
        }
    }
}

/// A value of the configuration, with where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Name of the setting, as in the file.
    pub name: String,
    /// The value that counts, as text: the default where nobody gave one. Null when there is none.
    pub value: Option<String>,
    /// Where the value came from.
    pub source: Source,
}

/// What the command line and the environment say of one setting.
#[derive(Clone, Debug)]
pub struct Given<T> {
    /// The value, if one was given.
    pub value: Option<T>,
    /// Where the value came from.
    pub source: Source,
}

impl<T: Clone + Send + Sync + 'static> Given<T> {
    /// Reads the argument `id`. clap knows whether it came from a flag or from the environment.
    pub fn of(matches: &ArgMatches, id: &str) -> Self {
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Source::Flag,
            Some(ValueSource::EnvVariable) => Source::Environment,
            _ => return Self { value: None, source: Source::Default },
        };
        Self { value: matches.get_one::<T>(id).cloned(), source }
    }

    /// Reads the argument `id`, which may be repeated.
    pub fn many(matches: &ArgMatches, id: &str) -> Given<Vec<T>> {
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Source::Flag,
            Some(ValueSource::EnvVariable) => Source::Environment,
            _ => return Given { value: None, source: Source::Default },
        };
        let values = matches.get_many::<T>(id).map(|v| v.cloned().collect());
        Given { value: values, source }
    }
}

impl<T> Given<T> {
    /// Falls back to the file's value, then to none.
    fn or_file(self, file: Option<T>) -> Self {
        match (self.value, file) {
            (Some(value), _) => Self { value: Some(value), source: self.source },
            (None, Some(value)) => Self { value: Some(value), source: Source::File },
            (None, None) => Self { value: None, source: Source::Default },
        }
    }
}

/// What was given on the command line and in the environment.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// Value of `--state-dir`.
    pub state_dir: Given<PathBuf>,
    /// Value of `--name`.
    pub name: Given<String>,
    /// Values of `--listen`.
    pub listen: Given<Vec<Place>>,
    /// Value of `--default-socket`.
    pub default_socket: Given<bool>,
    /// Value of `--peer-listen`.
    pub peer_listen: Given<ListenAt>,
    /// Value of `--advertise`.
    pub advertise: Given<Advertised>,
    /// Values of `--image-directory`.
    pub image_directories: Given<Vec<PathBuf>>,
    /// Values of `--volume-directory`.
    pub volume_directories: Given<Vec<PathBuf>>,
    /// Value of `--qemu-users`.
    pub qemu_users: Given<QemuUsers>,
    /// Value of `--confine`.
    pub confine: Given<Confine>,
    /// Values of `--metrics-listen`.
    pub metrics_listen: Given<Vec<Place>>,
    /// Value of `--require-if-match`.
    pub require_if_match: Given<bool>,
    /// Value of `--log-format`.
    pub log_format: Given<String>,
    /// Value of `--tls-certificate`.
    pub tls_certificate: Given<PathBuf>,
    /// Value of `--tls-key`.
    pub tls_key: Given<PathBuf>,
    /// Value of `--tls-client-ca`.
    pub tls_client_ca: Given<PathBuf>,
}

/// The configuration that results from all sources.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Each setting with its source, in the order of the file's documentation.
    pub settings: Vec<Setting>,
    /// The state directory. `None` when nobody gave one.
    pub state_dir: Option<PathBuf>,
    /// Name of the host.
    pub name: Option<String>,
    /// Where the API is served, besides the Unix socket in the state directory.
    pub listen: Vec<Place>,
    /// Whether the API is served on the Unix socket in the state directory.
    pub default_socket: bool,
    /// The address on which peers connect.
    pub peer_listen: Option<ListenAt>,
    /// The address that peers are told to connect to.
    pub advertise: Option<Advertised>,
    /// The directories that files named by definitions may come from.
    pub image_directories: Vec<PathBuf>,
    /// The directories whose files are guests' to write.
    pub volume_directories: Vec<PathBuf>,
    /// The users that QEMU processes run as, under a daemon that runs as root.
    pub qemu_users: QemuUsers,
    /// Whether the daemon confines itself.
    pub confine: Confine,
    /// Where health and counters are served on listeners of their own.
    pub metrics_listen: Vec<Place>,
    /// Whether the log is JSON.
    pub log_json: bool,
    /// Files of the API over TLS.
    pub tls: Option<TlsFiles>,
    /// The part that handlers and middleware need.
    pub config: Config,
}

/// Combines all sources. `environment` gives the variables of limits, `MIRRORVM_LIMITS_<NAME>`.
///
/// # Errors
/// [`ConfigError::Value`].
pub fn resolve(
    arguments: Arguments,
    file: FileConfig,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Resolved, ConfigError> {
    let mut settings = Vec::new();
    let mut note = |name: &str, value: Option<String>, source: &Source| {
        settings.push(Setting { name: name.to_owned(), value, source: source.clone() });
    };
    let shown = |p: &PathBuf| p.display().to_string();

    let state_dir = arguments.state_dir.or_file(file.state_dir);
    let directory = state_dir.value.clone().or_else(default_state_dir);
    note("state_dir", directory.as_ref().map(shown), &state_dir.source);
    let name = arguments.name.or_file(file.name);
    if let Some(bad) = name.value.as_ref().filter(|name| !mirrorvm::host::is_name(name)) {
        return Err(wrong("name", bad, mirrorvm::host::NAME_RULE, name.source.name()));
    }
    note("name", Some(name.value.clone().unwrap_or_else(mirrorvm::host::node_name)), &name.source);
    let listen = arguments.listen.or_file(file.listen.map(|l| all("listen", l)).transpose()?);
    let places: Vec<String> = listen.value.iter().flatten().map(ToString::to_string).collect();
    note("listen", (!places.is_empty()).then(|| places.join(", ")), &listen.source);
    let default_socket = arguments.default_socket.or_file(file.default_socket);
    let at_socket = default_socket.value.unwrap_or(true);
    note("default_socket", Some(at_socket.to_string()), &default_socket.source);
    if !at_socket && listen.value.as_ref().is_none_or(Vec::is_empty) {
        let wanted = "of use without listen: nobody could call the API";
        return Err(wrong("default_socket", "false", wanted, default_socket.source.name()));
    }
    // Follows from the state directory, and is said because it is served whatever `listen` says.
    let socket = directory.filter(|_| at_socket).map(|d| format!("unix:{}", d.join(SOCKET).display()));
    note("socket", socket, if at_socket { &state_dir.source } else { &default_socket.source });
    let peer = file.peer_listen.map(|p| {
        p.parse::<ListenAt>().map_err(|e| wrong("peer_listen", &p, &format!("usable: this is {e}"), "file"))
    });
    let peer_listen = arguments.peer_listen.or_file(peer.transpose()?);
    note("peer_listen", peer_listen.value.as_ref().map(ToString::to_string), &peer_listen.source);
    let told = file.advertise.map(|a| {
        a.parse::<Advertised>().map_err(|e| wrong("advertise", &a, &format!("usable: {e}"), "file"))
    });
    let advertise = arguments.advertise.or_file(told.transpose()?);
    if let (Some(advertised), None) = (&advertise.value, &peer_listen.value) {
        let wanted = "of use without peer_listen: nobody could connect to it";
        return Err(wrong("advertise", &advertised.to_string(), wanted, advertise.source.name()));
    }
    // Without it others are told where peers are awaited, unless that is on all addresses.
    let told = advertise.value.as_ref().map(ToString::to_string).or_else(|| {
        let everywhere = |at: &ListenAt| at.address().is_some_and(|at| at.ip().is_unspecified());
        peer_listen.value.as_ref().filter(|at| !everywhere(at)).map(ToString::to_string)
    });
    note("advertise", told, &advertise.source);
    let images = arguments.image_directories.or_file(file.image_directories);
    let listed: Vec<String> = images.value.iter().flatten().map(shown).collect();
    note("image_directories", (!listed.is_empty()).then(|| listed.join(", ")), &images.source);
    let volumes = arguments.volume_directories.or_file(file.volume_directories);
    let listed: Vec<String> = volumes.value.iter().flatten().map(shown).collect();
    note("volume_directories", (!listed.is_empty()).then(|| listed.join(", ")), &volumes.source);
    let users = file.qemu_users.map(|u| {
        u.parse::<QemuUsers>().map_err(|e| wrong("qemu_users", &u, &format!("usable: {e}"), "file"))
    });
    let qemu_users = arguments.qemu_users.or_file(users.transpose()?);
    let users = qemu_users.value.unwrap_or_default();
    note("qemu_users", Some(users.to_string()), &qemu_users.source);
    let confined = file.confine.map(|c| one("confine", c, "enforce, log or none")).transpose()?;
    let confine = arguments.confine.or_file(confined);
    let confined = confine.value.unwrap_or_default();
    note("confine", Some(confined.name().to_owned()), &confine.source);
    let metrics_file = file.metrics_listen.map(|l| all("metrics_listen", l)).transpose()?;
    let metrics_listen = arguments.metrics_listen.or_file(metrics_file);
    if let Some(place) = metrics_listen.value.iter().flatten().find(|p| !p.is_local()) {
        let wanted = "unix:PATH or tcp:127.0.0.1:PORT: it asks nobody who they are";
        return Err(wrong("metrics_listen", &place.to_string(), wanted, metrics_listen.source.name()));
    }
    let places: Vec<String> = metrics_listen.value.iter().flatten().map(ToString::to_string).collect();
    note("metrics_listen", (!places.is_empty()).then(|| places.join(", ")), &metrics_listen.source);
    let require = arguments.require_if_match.or_file(file.require_if_match);
    note("require_if_match", Some(require.value.unwrap_or(false).to_string()), &require.source);
    let log = arguments.log_format.or_file(file.log_format);
    let log_format = log.value.clone().unwrap_or_else(|| "text".to_owned());
    if !["text", "json"].contains(&log_format.as_str()) {
        return Err(wrong("log_format", &log_format, "text or json", "file"));
    }
    note("log_format", Some(log_format.clone()), &log.source);

    let certificate = arguments.tls_certificate.or_file(file.tls.certificate);
    note("tls.certificate", certificate.value.as_ref().map(shown), &certificate.source);
    let key = arguments.tls_key.or_file(file.tls.key);
    note("tls.key", key.value.as_ref().map(shown), &key.source);
    let client_ca = arguments.tls_client_ca.or_file(file.tls.client_ca);
    note("tls.client_ca", client_ca.value.as_ref().map(shown), &client_ca.source);
    let tls = match (certificate.value, key.value) {
        (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key, client_ca: client_ca.value }),
        (None, None) => None,
        (Some(_), None) => return Err(wrong("tls.key", "", "given beside tls.certificate", "default")),
        (None, Some(_)) => return Err(wrong("tls.certificate", "", "given beside tls.key", "default")),
    };

    let access = AccessRules {
        users: ids("access.users", &file.access.users, &mut note)?,
        groups: ids("access.groups", &file.access.groups, &mut note)?,
        certificates: file.access.certificates.clone(),
        ..AccessRules::default()
    };
    for (name, role) in &access.certificates {
        let kinds = ["dns:", "uri:", "email:", "ip:"];
        if !kinds.iter().any(|k| name.len() > k.len() && name.starts_with(k)) {
            return Err(wrong("access.certificates", name, "dns:, uri:, email: or ip: and a name", "file"));
        }
        note(&format!("access.certificates.{name:?}"), Some(role.name().to_owned()), &Source::File);
    }
    let limits = limits(&file.limits, environment, &mut note)?;
    let config = Config { access, limits, require_if_match: require.value.unwrap_or(false) };
    Ok(Resolved {
        settings,
        state_dir: state_dir.value,
        name: name.value,
        listen: listen.value.unwrap_or_default(),
        default_socket: at_socket,
        peer_listen: peer_listen.value,
        advertise: advertise.value,
        image_directories: images.value.unwrap_or_default(),
        volume_directories: volumes.value.unwrap_or_default(),
        qemu_users: users,
        confine: confined,
        metrics_listen: metrics_listen.value.unwrap_or_default(),
        log_json: log_format == "json",
        tls,
        config,
    })
}

/// The state directory when none was given: the system's for root, otherwise the user's own.
pub fn default_state_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/mirrorvm"));
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("mirrorvm"))
}

type Note<'a> = &'a mut dyn FnMut(&str, Option<String>, &Source);

fn ids(key: &str, file: &BTreeMap<String, Role>, note: Note<'_>) -> Result<BTreeMap<u32, Role>, ConfigError> {
    let mut map = BTreeMap::new();
    for (text, role) in file {
        let id: u32 = one(key, text.clone(), "a numeric id")?;
        note(&format!("{key}.{id}"), Some(role.name().to_owned()), &Source::File);
        map.insert(id, *role);
    }
    Ok(map)
}

fn limits(
    file: &BTreeMap<String, u64>,
    environment: impl Fn(&str) -> Option<String>,
    note: Note<'_>,
) -> Result<Limits, ConfigError> {
    let mut limits = Limits::default();
    let small = |n: &mut u32, value: u64| *n = u32::try_from(value).unwrap_or(u32::MAX);
    // Name, smallest and largest value, where it goes.
    type Set<'a> = Box<dyn FnOnce(&mut Limits, u64) + 'a>;
    let d = Limits::default();
    let table: [(&str, u64, u64, u64, Set<'_>); 11] = [
        ("connections", 1, 65_536, d.connections.into(), Box::new(|l, v| small(&mut l.connections, v))),
        ("streams", 0, 65_536, d.streams.into(), Box::new(|l, v| small(&mut l.streams, v))),
        ("long_polls", 0, 65_536, d.long_polls.into(), Box::new(|l, v| small(&mut l.long_polls, v))),
        (
            "requests_per_second",
            0,
            1_000_000,
            d.requests_per_second.into(),
            Box::new(|l, v| small(&mut l.requests_per_second, v)),
        ),
        (
            "handshake_seconds",
            1,
            300,
            d.handshake_seconds.into(),
            Box::new(|l, v| small(&mut l.handshake_seconds, v)),
        ),
        ("header_seconds", 1, 300, d.header_seconds.into(), Box::new(|l, v| small(&mut l.header_seconds, v))),
        ("body_seconds", 1, 300, d.body_seconds.into(), Box::new(|l, v| small(&mut l.body_seconds, v))),
        ("drain_seconds", 0, 300, d.drain_seconds.into(), Box::new(|l, v| small(&mut l.drain_seconds, v))),
        (
            "stream_stall_seconds",
            1,
            3600,
            d.stream_stall_seconds.into(),
            Box::new(|l, v| small(&mut l.stream_stall_seconds, v)),
        ),
        ("events_kept", 10, 100_000_000, d.events_kept, Box::new(|l, v| l.events_kept = v)),
        ("memory_reserve_mib", 0, 1 << 24, d.memory_reserve_mib, Box::new(|l, v| l.memory_reserve_mib = v)),
    ];
    let known: Vec<&str> = table.iter().map(|(name, ..)| *name).collect();
    if let Some((name, value)) = file.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        return Err(wrong(&format!("limits.{name}"), &value.to_string(), "a limit that there is", "file"));
    }
    for (name, low, high, default, set) in table {
        let variable = format!("MIRRORVM_LIMITS_{}", name.to_ascii_uppercase());
        let (value, source) = match (environment(&variable), file.get(name)) {
            // Digits alone, as in the file.
            (Some(text), _) if !text.bytes().all(|b| b.is_ascii_digit()) => {
                let wanted = format!("a number from {low} to {high}, in digits alone");
                return Err(wrong(&variable, &text, &wanted, "environment"));
            }
            (Some(text), _) => (one(&variable, text, &format!("{low} to {high}"))?, Source::Environment),
            (None, Some(value)) => (*value, Source::File),
            (None, None) => (default, Source::Default),
        };
        if !(low..=high).contains(&value) {
            let wanted = format!("{low} to {high}");
            return Err(wrong(&format!("limits.{name}"), &value.to_string(), &wanted, "limits"));
        }
        note(&format!("limits.{name}"), Some(value.to_string()), &source);
        set(&mut limits, value);
    }
    Ok(limits)
}

fn all<T: std::str::FromStr<Err: std::fmt::Display>>(
    key: &str,
    list: Vec<String>,
) -> Result<Vec<T>, ConfigError> {
    list.into_iter()
        .map(|text| text.parse().map_err(|e| wrong(key, &text, &format!("usable: {e}"), "file")))
        .collect()
}

fn one<T: std::str::FromStr>(key: &str, text: String, wanted: &str) -> Result<T, ConfigError> {
    text.parse().map_err(|_| wrong(key, &text, wanted, "file or environment"))
}

fn wrong(key: &str, value: &str, wanted: &str, source: &str) -> ConfigError {
    ConfigError::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        wanted: wanted.to_owned(),
        source_name: source.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file;

    fn given<T>(value: Option<T>, source: Source) -> Given<T> {
        Given { value, source }
    }

    fn arguments(name: Option<&str>, source: Source) -> Arguments {
        Arguments {
            state_dir: given(None, Source::Default),
            name: given(name.map(str::to_owned), source),
            listen: given(None, Source::Default),
            default_socket: given(None, Source::Default),
            peer_listen: given(None, Source::Default),
            advertise: given(None, Source::Default),
            image_directories: Given { value: None, source: Source::Default },
            volume_directories: Given { value: None, source: Source::Default },
            qemu_users: Given { value: None, source: Source::Default },
            confine: given(None, Source::Default),
            metrics_listen: given(None, Source::Default),
            require_if_match: given(None, Source::Default),
            log_format: given(None, Source::Default),
            tls_certificate: given(None, Source::Default),
            tls_key: given(None, Source::Default),
            tls_client_ca: given(None, Source::Default),
        }
    }

    #[test]
    fn flag_over_environment_over_file_over_default() {
        let text = "name = \"f\"\nlisten = [\"unix:/x\"]\n[limits]\nstreams = 5\nconnections = 9\n[access.users]\n7 = \"viewer\"\n";
        let environment = |name: &str| (name == "MIRRORVM_LIMITS_STREAMS").then(|| "6".to_owned());
        let of =
            |name, source| resolve(arguments(name, source), file::parse(text).unwrap(), environment).unwrap();
        let source = |r: &Resolved, name: &str| {
            let s = r.settings.iter().find(|s| s.name == name).unwrap();
            (s.value.clone().unwrap_or_default(), s.source.clone())
        };
        let flag = of(Some("x"), Source::Flag);
        assert_eq!(source(&flag, "name"), ("x".into(), Source::Flag));
        assert_eq!(source(&of(None, Source::Default), "name"), ("f".into(), Source::File));
        assert_eq!(source(&flag, "limits.streams"), ("6".into(), Source::Environment));
        assert_eq!(source(&flag, "limits.connections"), ("9".into(), Source::File));
        assert_eq!(source(&flag, "limits.drain_seconds"), ("10".into(), Source::Default));
        assert_eq!(source(&flag, "access.users.7"), ("viewer".into(), Source::File));
        assert_eq!((flag.config.limits.streams, flag.listen.len()), (6, 1));
        assert_eq!(flag.config.access.role_of_user(7, 7), Some(Role::Viewer));
    }

    #[test]
    fn values_that_cannot_be_are_named() {
        for (text, key) in [
            ("listen = [\"tcp:192.0.2.1:1\"]", "listen"),
            ("peer_listen = \"x\"", "peer_listen"),
            ("peer_listen = \"a_b:1\"", "peer_listen"),
            ("default_socket = false", "default_socket"),
            ("default_socket = false\nlisten = []", "default_socket"),
            ("peer_listen = \"0.0.0.0:1\"\nadvertise = \"0.0.0.0\"", "advertise"),
            ("peer_listen = \"0.0.0.0:1\"\nadvertise = \"a_b\"", "advertise"),
            ("advertise = \"192.0.2.7\"", "advertise"),
            ("log_format = \"xml\"", "log_format"),
            ("confine = \"no\"", "confine"),
            ("name = \"\"", "name"),
            ("name = \"x/y\"", "name"),
            ("name = \"0190a4c2-7b1e-7c00-8000-000000000000\"", "name"),
            ("[limits]\nspeed = 1", "limits.speed"),
            ("[limits]\nconnections = 0", "limits.connections"),
            ("[access.users]\nroot = \"admin\"", "access.users"),
            ("[access.certificates]\nx = \"admin\"", "access.certificates"),
            ("[tls]\ncertificate = \"/x\"", "tls.key"),
        ] {
            let error = resolve(arguments(None, Source::Default), file::parse(text).unwrap(), |_| None);
            let Err(ConfigError::Value { key: found, .. }) = error else { panic!("{text}: {error:?}") };
            assert_eq!(found, key, "{text}");
        }
    }
}
