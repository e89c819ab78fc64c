//! The daemon's version on the wire.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Serialize;
use utoipa::ToSchema;

/// Version of the API, which is the document's `info.version`. It rises with every addition.
pub const API_VERSION: &str = "1.3.0";

/// The names of what this build of the API has beyond its first version. Clients test for names in this list,
/// not for versions.
pub const FEATURES: &[&str] = &[
    "long_poll",
    "etags",
    "address_space_plans",
    "layout_svg",
    "page_digests",
    "events",
    "idempotency_keys",
    "put_create",
    "merge_patch",
    "dry_run",
    "label_selectors",
    "sort_by",
    "tokens",
    "tls",
    "audit_log",
    "migration_checks",
    "migration_tickets",
    "helper_images",
    "encryption_status",
    "host_settings",
    "metrics",
    "memory_audits",
    "destination_evidence",
    "deletion_previews",
    "events_cursor",
];

/// The commit that this program was built from, or `unknown`.
const COMMIT: &str = env!("MIRRORVMD_COMMIT");

/// What `mirrorvmd --version` says.
pub fn line() -> &'static str {
    static LINE: LazyLock<String> = LazyLock::new(|| {
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        let version = env!("CARGO_PKG_VERSION");
        let commit =
            if COMMIT == "unknown" { "an unknown commit".into() } else { format!("commit {COMMIT}") };
        format!("{version} ({build} build of {commit}, API {API_VERSION})")
    });
    &LINE
}

/// Version of the API and of the daemon.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Version {
    /// Version of the API, by semantic versioning.
    #[schema(example = "1.0.0")]
    pub api_version: &'static str,
    /// Which build of the daemon this is.
    pub build: Build,
    /// Names of features. The list is open and only grows.
    #[schema(value_type = Vec<String>, example = json!(["long_poll"]))]
    pub features: &'static [&'static str],
    /// SHA-256 of `/v1/openapi.json`.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub openapi_sha256: String,
}

/// Which build of a daemon is running.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Build {
    /// Name of the program.
    #[schema(example = "mirrorvmd")]
    pub name: &'static str,
    /// Version of the program.
    #[schema(example = "0.1.0")]
    pub version: &'static str,
    /// Whether it was built with optimizations.
    pub release: bool,
    /// The commit that it was built from, in full; `-modified` follows where its sources were changed since,
    /// and `unknown` stands where the build was told none. Debug builds are told none unless
    /// `MIRRORVM_COMMIT` is set.
    #[schema(example = "unknown", pattern = "^(unknown|[0-9a-f]{40,64}(-modified)?)$")]
    pub commit: &'static str,
}

/// Where to begin.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Index {
    /// Name of the program.
    #[schema(example = "mirrorvmd")]
    pub name: &'static str,
    /// Version of the API, by semantic versioning.
    #[schema(example = "1.0.0")]
    pub api_version: &'static str,
    /// Paths, by what is there. The list is open and only grows.
    #[schema(value_type = std::collections::BTreeMap<String, String>,
        example = json!({"documentation": "/docs/", "openapi": "/v1/openapi.json"}))]
    pub links: BTreeMap<&'static str, &'static str>,
}

impl Index {
    /// What this build has.
    pub fn of_this_build() -> Self {
        let links = [
            ("documentation", "/docs/"),
            ("openapi", "/v1/openapi.json"),
            ("openapi_3_0", "/v1/openapi-3.0.json"),
            ("problems", "/v1/problems"),
            ("version", "/v1/version"),
            ("whoami", "/v1/whoami"),
            ("host", "/v1/host"),
            ("guests", "/v1/guests"),
            ("migrations", "/v1/migrations"),
            ("events", "/v1/events"),
            ("health", "/readyz"),
            ("metrics", "/metrics"),
        ];
        Self { name: env!("CARGO_PKG_NAME"), api_version: API_VERSION, links: links.into() }
    }
}

impl Version {
    /// Of this build, with this document.
    pub fn new(openapi_sha256: String) -> Self {
        Self {
            api_version: API_VERSION,
            build: Build {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
                release: !cfg!(debug_assertions),
                commit: COMMIT,
            },
            features: FEATURES,
            openapi_sha256,
        }
    }
}
