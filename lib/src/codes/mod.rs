//! Codes of what can go wrong: programs go by them, people by the sentence beside them.
//!
//! Owns: the closed list of codes, each stated once with what it is for: which of them answer a request,
//! which of them refuse a guest that would come and what then helps there; and the names of what a host can
//! lack. Must not know: which fault has which code (`host::codes` and `migration::error` say it), HTTP. A
//! code that was published stays.

mod any;
mod capability;

pub use any::AnyCode;
pub use capability::{Capability, DriverCapability};

/// What helps against a refusal that only the other host can explain.
pub const THEIR_LOG: &str = "look into the other daemon's log";

macro_rules! codes {
    ($(#[doc = $doc:literal] $name:ident = $code:literal
        $(, answers $request:ident)? $(, refuses $fix:expr)?;)+) => {
        /// A code of this build.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $doc] $name,)+ }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The code as it is published.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }
        }

        codes!(@answers $($($request $name;)?)+);
        codes!(@refusals $($($name $fix;)?)+);
    };
    (@answers $(requests $name:ident;)+) => {
        /// The code that answers a request which a host did not carry out. The daemon's catalogue has status
        /// and words for each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Answer { $(#[doc = concat!("[`Code::", stringify!($name), "`].")] $name,)+ }

        impl Answer {
            /// Every answer.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Its code.
            pub const fn code(self) -> Code {
                match self { $(Self::$name => Code::$name,)+ }
            }
        }
    };
    (@refusals $($name:ident $fix:expr;)+) => {
        /// The code by which a host refuses another's guest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PeerRefusal { $(#[doc = concat!("[`Code::", stringify!($name), "`].")] $name,)+ }

        impl PeerRefusal {
            /// Every refusal.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Its code.
            pub const fn code(self) -> Code {
                match self { $(Self::$name => Code::$name,)+ }
            }

            /// What would help, for whoever is at the host that was refused.
            pub const fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)+ }
            }
        }
    };
}

codes! {
    /// There is no such resource.
    NotFound = "not_found", answers requests;
    /// Another guest or host has the name.
    NameTaken = "name_taken", answers requests,
        refuses "rename or remove the guest of that name there, or choose another destination";
    /// Another resource has the id.
    IdTaken = "id_taken", answers requests;
    /// Values of a request cannot be.
    ValidationFailed = "validation_failed", answers requests;
    /// Values that somebody else gave cannot be: a definition from another host, a record.
    Invalid = "invalid",
        refuses "put the files there under the same paths, beneath one of its image_directories, and give its daemon leave to \
                 read them";
    /// The action does not fit the resource's state.
    StateConflict = "state_conflict", answers requests;
    /// A migration has the guest.
    GuestMigrating = "guest_migrating", answers requests;
    /// The guest was handed over to another host.
    GuestMoved = "guest_moved", answers requests;
    /// Nobody has confirmed that the guest is this host's.
    GuestUnconfirmed = "guest_unconfirmed", answers requests;
    /// The resource is at another generation.
    PreconditionFailed = "precondition_failed", answers requests;
    /// Something uses the resource.
    InUse = "in_use", answers requests;
    /// The host takes nothing new.
    HostInMaintenance = "host_in_maintenance", answers requests;
    /// The destination takes nothing new.
    Maintenance = "maintenance",
        refuses "unset maintenance there with PATCH /v1/host, or choose another destination";
    /// The daemon shuts down.
    ShuttingDown = "shutting_down", answers requests,
        refuses "try again when the other daemon runs again, or choose another destination";
    /// START has gone out.
    PastPointOfNoReturn = "past_point_of_no_return", answers requests;
    /// The planner refuses.
    PlanRefused = "plan_refused", answers requests,
        refuses "choose another strategy or shift; address-space-plans previews them";
    /// The guest's policy forbids it.
    PolicyForbids = "policy_forbids", answers requests,
        refuses "define the guest with a policy that has NODBG and not NOSEND";
    /// The mirror comes with the guest's launch.
    MirrorAtLaunch = "mirror_at_launch", answers requests;
    /// The helper was not launched for it.
    HelperNotLaunched = "helper_not_launched", answers requests, refuses "use the built-in helper image";
    /// A helper image's file is not what was uploaded.
    HelperImageFailed = "helper_image_failed", answers requests,
        refuses "upload the same content there again, or put a backup of that host's state back";
    /// The helper takes no sealed batch.
    BatchRefused = "batch_refused", answers requests;
    /// The guest does not say that it can be migrated.
    GuestNotReady = "guest_not_ready", answers requests;
    /// A RAM block cannot be plugged or unplugged.
    PlugRefused = "plug_refused", answers requests;
    /// The host lacks something; [`Capability`] says what.
    CapabilityMissing = "capability_missing", answers requests,
        refuses "`missing` of the other host's capabilities says what would help; or choose another one";
    /// There is not that much memory.
    NoMemory = "no_memory", answers requests,
        refuses "stop guests there, give its daemon more memory or huge pages, or choose another destination";
    /// Another resource has run out.
    NoResources = "no_resources", answers requests,
        refuses "the detail says what ran out there; free some, or choose another destination";
    /// No space is left for what has to be stored.
    StorageFull = "storage_full", answers requests,
        refuses "free space in the file system of the other daemon's state directory";
    /// Another process keeps the database locked.
    StorageBusy = "storage_busy", answers requests;
    /// The database cannot be read or written.
    StorageFailed = "storage_failed", answers requests;
    /// The other host cannot store, for whatever reason but space.
    Storage = "storage", refuses "free space in the file system of the other daemon's state directory";
    /// A fault of the daemon.
    Internal = "internal", answers requests;

    /// The destination would not let the migration in.
    DestinationRefuses = "destination_refuses", answers requests;
    /// The destination is the host itself.
    DestinationIsSelf = "destination_is_self";
    /// The other host did not do its part.
    PeerFailed = "peer_failed", answers requests;
    /// The other host did not answer in time.
    PeerTimedOut = "peer_timed_out", answers requests;
    /// Something else than a daemon is at the other host's address.
    PeerNotMirrorvm = "peer_not_mirrorvm", answers requests;
    /// The other host's name leads nowhere.
    PeerUnresolved = "peer_unresolved", answers requests;
    /// Nothing answers at the other host's address.
    PeerUnreachable = "peer_unreachable";
    /// Another host is there than the pinned one, or it does not admit this one.
    PeerIdentity = "peer_identity";
    /// The link broke.
    PeerLost = "peer_lost";
    /// The other host sent what the protocol does not allow.
    PeerProtocol = "peer_protocol";
    /// There is no version that both hosts speak.
    PeerVersion = "peer_version", refuses THEIR_LOG;
    /// The other host refuses, with a code that is none.
    PeerRefused = "peer_refused", refuses THEIR_LOG;
    /// The other host does not know what the link is for.
    PurposeUnknown = "purpose_unknown", refuses THEIR_LOG;
    /// The other host does not know the session.
    UnknownSession = "unknown_session", refuses THEIR_LOG;
    /// The other host has seen the session.
    SessionExists = "session_exists", refuses "a ticket is good for one migration; get another one";
    /// The other host has the guest.
    GuestExists = "guest_exists",
        refuses "remove the guest with this id there first: it must not run twice";
    /// The source is neither known nor has a ticket.
    TicketInvalid = "ticket_invalid", refuses "add this host there with POST /v1/hosts, or get another ticket";
    /// A file that the guest boots from holds something else there.
    BootFileDiffers = "boot_file_differs", refuses "put the same file there under the same path";
    /// The other host has no such helper.
    HelperMismatch = "helper_mismatch",
        refuses "run the same build on both hosts, or upload the helper image there, too";
    /// The definition comes to another layout there.
    LayoutMismatch = "layout_mismatch",
        refuses "run the same build on both hosts, or upload the helper image there, too";
    /// The other host's helper does not seal by the suite that was asked for.
    SuiteMissing = "suite_missing",
        refuses "ask for a suite that both hosts' capabilities name";
    /// COMMIT is being stored; it is too late to call off.
    Committing = "committing", refuses THEIR_LOG;
    /// The destination failed.
    DestinationFailed = "destination_failed", refuses THEIR_LOG;

    /// It was called off.
    Canceled = "canceled";
    /// A private page is out of the helper's reach.
    PageUnreachable = "page_unreachable";
    /// The guest shares its pages in too many pieces.
    PageStatusFragmented = "page_status_fragmented";
    /// The helper failed.
    HelperFailed = "helper_failed";
    /// The mirror failed, or the host did while it was made.
    MirrorFailed = "mirror_failed";
    /// The guest's machine failed in a migration.
    GuestFailed = "guest_failed";
    /// The guest writes faster than pages move.
    NotConverging = "not_converging";
    /// Pages at the destination are not what the source has.
    AuditMismatch = "audit_mismatch";
    /// The audit before COMMIT came to no verdict.
    AuditNotRun = "audit_not_run";
    /// The guest's owner demands evidence of the destination, and there is none.
    EvidenceMissing = "evidence_missing";
    /// The destination's evidence is not what the guest's owner demands.
    EvidenceRefused = "evidence_refused";
    /// An administrator ended the doubt.
    Resolved = "resolved";
    /// The journal of hand-overs could not be written.
    Journal = "journal";
    /// The daemon ended in the midst of it.
    DaemonRestarted = "daemon_restarted";
    /// The source's daemon ended before it knew how the hand-over had.
    SourceRestarted = "source_restarted";

    /// The guest has ended.
    GuestEnded = "guest_ended";
    /// The guest switched itself off.
    GuestPoweredOff = "guest_powered_off";
    /// The guest asked for a reset.
    GuestReset = "guest_reset";
    /// The guest's operating system panicked.
    GuestPanicked = "guest_panicked";
    /// A vCPU of the guest could not go on.
    GuestCrashed = "guest_crashed";
    /// QEMU ended, or did not do as told.
    QemuFailed = "qemu_failed", refuses THEIR_LOG;
    /// No machine could be made for the guest, or it failed.
    MachineFailed = "machine_failed";
    /// The guest does not fit its RAM.
    LayoutUnusable = "layout_unusable";
    /// A file that the guest boots from cannot be used.
    BootFileUnusable = "boot_file_unusable";
    /// A file that the guest boots from has changed.
    BootFileChanged = "boot_file_changed";
    /// The definition's parameters are none of the driver's.
    InvalidDefinition = "invalid_definition";
    /// The launch measurement is another.
    LaunchMeasurement = "launch_measurement";
    /// SEV refused.
    SevRefused = "sev_refused";

    /// There is no such peer.
    PeerUnknown = "peer_unknown";
    /// A fault of this host, as a finding names it.
    HostFailed = "host_failed";
    /// The other host cannot be asked.
    DestinationNotAsked = "destination_not_asked";
    /// The other host has no such driver.
    DestinationLacksDriver = "destination_lacks_driver";
    /// The other host has another built-in helper.
    DestinationHasAnotherHelper = "destination_has_another_helper";
    /// No pause can be as short as asked for.
    DowntimeLimitBelowFloor = "downtime_limit_below_floor";
    /// The migration would wait for a slot.
    Queued = "queued";

    /// A migration is what blocks the request.
    MigrationActive = "migration_active";
    /// What blocks the request: a peer has not said whether it has the guest.
    WhereaboutsUnknown = "whereabouts_unknown";
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Answer> for Code {
    fn from(answer: Answer) -> Self {
        answer.code()
    }
}

impl From<PeerRefusal> for Code {
    fn from(refusal: PeerRefusal) -> Self {
        refusal.code()
    }
}

impl Code {
    /// The code that is published as `code`; `None`: another build's.
    pub fn parse(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.as_str() == code)
    }

    /// The refusal of this code, if it is one.
    pub fn refusal(self) -> Option<PeerRefusal> {
        PeerRefusal::ALL.iter().copied().find(|r| r.code() == self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_there_once_and_found_by_its_name() {
        for code in Code::ALL.iter().copied() {
            assert_eq!(Code::parse(code.as_str()), Some(code), "{code} is there twice");
            assert!(code.as_str().bytes().all(|c| c.is_ascii_lowercase() || c == b'_'), "{code}");
        }
        assert_eq!(Code::parse("colour"), None);
    }

    #[test]
    fn every_refusal_says_what_would_help() {
        for refusal in PeerRefusal::ALL.iter().copied() {
            assert_eq!(refusal.code().refusal(), Some(refusal));
            assert!(refusal.fix().contains(' '), "{refusal:?}");
        }
        assert_eq!(Code::Canceled.refusal(), None);
    }
}
