//! What stands in a migration's way, said so that a caller knows what would help.
//!
//! Owns: the codes and remedies of findings, for errors of this host and refusals of the other. Must not
//! know: how anything is found out.

use crate::host::HostError;
use crate::host::peers::probe::PeerSilence;
use crate::migration::wire::Refused;
use crate::store::Trouble;

/// Something that a look at a migration found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable code.
    pub code: String,
    /// What it is.
    pub detail: String,
    /// What would help.
    pub fix: String,
}

impl PeerSilence {
    pub(in crate::host) fn finding(self) -> Finding {
        let fix = "check address, identity and that the other daemon knows this host";
        Finding { code: self.code, detail: self.detail, fix: fix.into() }
    }
}

/// A destination that cannot say whether it would let the migration in.
pub(in crate::host) fn not_asked() -> Finding {
    Finding {
        code: "destination_not_asked".into(),
        detail: "the other host's build cannot be asked whether it would let this migration in".into(),
        fix: "run the same build on both hosts, or start the migration: what is in the way ends it before a page moves"
            .into(),
    }
}

/// An error of a request as what stands in its way.
pub(in crate::host) fn findings(e: &HostError) -> Vec<Finding> {
    let one =
        |code: &str, fix: &str| vec![Finding { code: code.into(), detail: e.to_string(), fix: fix.into() }];
    match e {
        HostError::PlanRefused(refusals) => refusals
            .iter()
            .map(|r| Finding {
                code: r.code.as_str().into(),
                detail: r.to_string(),
                fix: "choose another strategy or shift; address-space-plans previews them".into(),
            })
            .collect(),
        HostError::NotFound { kind, .. } => one(
            if *kind == "host" { "peer_unknown" } else { "not_found" },
            "add the destination with POST /v1/hosts, or name a mirror that exists",
        ),
        HostError::Invalid(fields) => fields
            .iter()
            .map(|f| Finding {
                code: f.code.into(),
                detail: format!("{}: {}", f.pointer, f.detail),
                fix: "correct the value that the pointer names".into(),
            })
            .collect(),
        HostError::WrongState { .. } => one("state_conflict", "start the guest first"),
        HostError::GuestMigrating { .. } => one("guest_migrating", "wait for its migration, or cancel it"),
        HostError::GuestMoved { .. } => one("guest_moved", "ask the host that has it"),
        HostError::GuestUnconfirmed { .. } => {
            one("guest_unconfirmed", "wait until all known peers have answered, or confirm the guest")
        }
        HostError::CapabilityMissing { what: "throttling", .. } => {
            one("throttling", "leave auto_throttle off, and choose on_timeout cancel or force")
        }
        HostError::CapabilityMissing { what, .. } => {
            one(&what.replace(' ', "_"), "`missing` of /v1/host/capabilities says what would help")
        }
        HostError::InUse { .. } => one("in_use", "remove what uses it first, or name it"),
        HostError::ShuttingDown => one("shutting_down", "try again when the daemon runs again"),
        HostError::DestinationIsSelf => one("destination_is_self", "choose another host"),
        HostError::DestinationRefuses(list) => list.clone(),
        HostError::PeerSilent(silence) => vec![silence.clone().finding()],
        HostError::IdTaken { .. } => one("id_taken", "choose another id; a ticket is good for one migration"),
        HostError::PolicyForbids { .. } => {
            one("policy_forbids", "define the guest with a policy that has NODBG and not NOSEND")
        }
        HostError::MirrorAtLaunch => one(
            "mirror_at_launch",
            "migrate through the mirror that the guest has, or name another in driver.sev.mirror and start it anew",
        ),
        HostError::NotLaunched { .. } | HostError::ImageNotLaunched => one(
            "helper_not_launched",
            "use a strategy as GET /v1/strategies lists it, and the built-in helper image",
        ),
        HostError::ImageFailed { .. } => {
            one("helper_image_failed", "PUT the same content again, or name another helper image")
        }
        HostError::GuestNotReady { .. } => {
            one("guest_not_ready", "wait until the guest announces itself; migration_readiness shows it")
        }
        HostError::NoMemory(_) => one("no_memory", "stop a guest, or give the daemon more memory"),
        HostError::NoResources { .. } => one("no_resources", "free some of what the detail names"),
        HostError::Maintenance => one("host_in_maintenance", "unset maintenance with PATCH /v1/host"),
        HostError::Storage { trouble: Trouble::Full, .. }
        | HostError::Owed { trouble: Trouble::Full, .. } => {
            one("storage_full", "free space in the file system of the state directory")
        }
        HostError::Storage { .. } | HostError::Owed { .. } => {
            one("storage_failed", "look at the disk of the state directory")
        }
        HostError::NameTaken { .. }
        | HostError::GenerationMismatch { .. }
        | HostError::PastPointOfNoReturn
        | HostError::BatchRefused(_)
        | HostError::PlugRefused(_)
        | HostError::Internal { .. } => one("host_failed", "look into the daemon's log"),
    }
}

/// A destination's reason, with what would help.
pub(in crate::host) fn finding(refused: Refused) -> Finding {
    let fix = match refused.code.as_str() {
        "name_taken" => "rename or remove the guest of that name there, or choose another destination",
        "guest_exists" => "remove the guest with this id there first: it must not run twice",
        "session_exists" => "a ticket is good for one migration; get another one",
        "ticket_invalid" => "add this host there with POST /v1/hosts, or get another ticket",
        "maintenance" => "unset maintenance there with PATCH /v1/host, or choose another destination",
        "shutting_down" => "try again when the other daemon runs again, or choose another destination",
        "invalid" => {
            "put the files there under the same paths, beneath one of its image_directories, and give its daemon leave to \
             read them"
        }
        "boot_file_differs" => "put the same file there under the same path",
        "no_memory" => {
            "stop guests there, give its daemon more memory or huge pages, or choose another destination"
        }
        "storage_full" | "storage" => "free space in the file system of the other daemon's state directory",
        "no_resources" => "the detail says what ran out there; free some, or choose another destination",
        "capability_missing" => {
            "`missing` of the other host's capabilities says what would help; or choose another one"
        }
        "helper_mismatch" | "layout_mismatch" => {
            "run the same build on both hosts, or upload the helper image there, too"
        }
        "plan_refused" => "choose another strategy or shift; address-space-plans previews them",
        "policy_forbids" => "define the guest with a policy that has NODBG and not NOSEND",
        "helper_image_failed" => {
            "upload the same content there again, or put a backup of that host's state back"
        }
        "helper_not_launched" => "use the built-in helper image",
        _ => "look into the other daemon's log",
    };
    Finding { code: refused.code, detail: refused.detail, fix: fix.into() }
}
