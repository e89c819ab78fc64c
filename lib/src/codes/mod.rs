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

/// What helps against another host that is not heard.
pub const THEIR_LINK: &str = "check address, identity and that the other daemon knows this host";

/// What brings the file of a helper image back.
const CONTENT_AGAIN: &str = "PUT the same content again, or delete the image and upload another";

/// Who says of a code what leads to it and what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explained {
    /// It answers requests, too: the catalogue of whoever answers them.
    Answer(Answer),
    /// It stands in records, findings and reasons alone: its own entry.
    Here(Explanation),
}

/// What leads to a code that answers no request, and what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    title: &'static str,
    /// Whether the same attempt may succeed later.
    pub retryable: bool,
    /// What leads to it, in sentences.
    pub cause: &'static str,
    /// What to do about it: part of a sentence.
    pub fix: &'static str,
}

impl Explanation {
    /// Short name, for people.
    pub fn title(&self) -> &'static str {
        self.title.trim().trim_end_matches('.')
    }
}

macro_rules! codes {
    ($(#[doc = $doc:literal] $name:ident = $code:literal
        $(, answers $request:ident)? $(, retry $retry:literal, cause $cause:literal)? $(, fix $own:expr)?
        $(, refuses $fix:expr)?;)+) => {
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

            /// Where it is explained. An entry that neither answers requests nor says cause and fix does not
            /// compile.
            pub const fn explained(self) -> Explained {
                match self {
                    $(Self::$name => codes!(@explained $name $doc $($request)?, $($retry $cause)?, [$($own)?] [$($fix)?]),)+
                }
            }
        }

        codes!(@answers $($($request $name;)?)+);
        codes!(@refusals $($($name $fix;)?)+);
    };
    (@explained $name:ident $doc:literal requests,, [] [$($theirs:expr)?]) => {
        Explained::Answer(Answer::$name)
    };
    (@explained $name:ident $doc:literal, $retry:literal $cause:literal, [$fix:expr] [$($theirs:expr)?]) => {
        Explained::Here(Explanation { title: $doc, retryable: $retry, cause: $cause, fix: $fix })
    };
    // What helps against the refusal is all there is.
    (@explained $name:ident $doc:literal, $retry:literal $cause:literal, [] [$fix:expr]) => {
        Explained::Here(Explanation { title: $doc, retryable: $retry, cause: $cause, fix: $fix })
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
    Invalid = "invalid", retry false,
        cause "A definition or a record that another host gave has values that cannot be used here: most often a file that the guest boots from is not where it says.",
        refuses "put the files there under the same paths, beneath one of its image_directories or volume_directories, and give its daemon leave to \
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
    Maintenance = "maintenance", retry true,
        cause "The destination is in maintenance: guests may leave it, and none is let in.",
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
    /// The file of a helper image is missing.
    ContentMissing = "content_missing", retry false,
        cause "The file of the helper image in the state directory is gone.",
        fix CONTENT_AGAIN;
    /// The file of a helper image is not what was uploaded.
    ContentChanged = "content_changed", retry false,
        cause "The file of the helper image in the state directory does not hold what was uploaded.",
        fix CONTENT_AGAIN;
    /// The file of a helper image cannot be read.
    ContentUnreadable = "content_unreadable", retry false,
        cause "The file of the helper image in the state directory cannot be read, or others could have written it.",
        fix CONTENT_AGAIN;
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
    Storage = "storage", retry true,
        cause "The disk of a state directory, here or at the other host, does not take what has to be stored of a hand-over, so none was begun.",
        fix "look at the disk and the free space of the state directory of the host that `detail` speaks of, then migrate again",
        refuses "free space in the file system of the other daemon's state directory";
    /// A fault of the daemon.
    Internal = "internal", answers requests;

    /// The destination would not let the migration in.
    DestinationRefuses = "destination_refuses", answers requests;
    /// The destination is the host itself.
    DestinationIsSelf = "destination_is_self", retry false,
        cause "The destination's name, address or identity is this host's own.",
        fix "choose another host";
    /// The other host did not do its part.
    PeerFailed = "peer_failed", answers requests;
    /// The other host did not answer in time.
    PeerTimedOut = "peer_timed_out", answers requests;
    /// Something else than a daemon is at the other host's address.
    PeerNotMirrorvm = "peer_not_mirrorvm", answers requests;
    /// The other host's name leads nowhere.
    PeerUnresolved = "peer_unresolved", answers requests;
    /// Nothing answers at the other host's address.
    PeerUnreachable = "peer_unreachable", retry true,
        cause "Nothing answers at the address by which this host knows the other one: its daemon does not run or has no peer listener, the address is wrong, or something between the hosts drops connections.",
        fix THEIR_LINK;
    /// Another host is there than the pinned one, or it does not admit this one.
    PeerIdentity = "peer_identity", retry false,
        cause "What is at the other host's address shows another identity than the pinned one, or that host does not know this one.",
        fix "compare the `identity` of each side's /v1/host with what the other has pinned in /v1/hosts; correct the one that differs, and add this host there with POST /v1/hosts where it is missing";
    /// The link broke.
    PeerLost = "peer_lost", retry true,
        cause "The link to the other host broke or went silent: its daemon or the network between the hosts failed.",
        fix THEIR_LINK;
    /// The other host sent what the protocol does not allow.
    PeerProtocol = "peer_protocol", retry false,
        cause "The other host sent a message that the protocol does not allow at this point.",
        fix "run the same build on both hosts; both daemons' logs say what was sent";
    /// There is no version that both hosts speak.
    PeerVersion = "peer_version", retry false,
        cause "The builds of the two hosts have no version of the peer protocol in common.",
        fix "run the same build on both hosts",
        refuses THEIR_LOG;
    /// The other host refuses, with a code that is none.
    PeerRefused = "peer_refused", retry false,
        cause "The other host refuses with a code that is none.",
        refuses THEIR_LOG;
    /// The other host does not know what the link is for.
    PurposeUnknown = "purpose_unknown", retry false,
        cause "The other host does not know what this one opened the link for: its build is older.",
        refuses THEIR_LOG;
    /// The other host does not know the session.
    UnknownSession = "unknown_session", retry false,
        cause "The other host knows nothing of this migration: it was given up there, or its state was put back from a backup.",
        refuses THEIR_LOG;
    /// The other host has seen the session.
    SessionExists = "session_exists", retry false,
        cause "The other host has seen a migration with this id already.",
        refuses "a ticket is good for one migration; get another one";
    /// The other host has the guest.
    GuestExists = "guest_exists", retry false,
        cause "The destination has a guest with this id.",
        refuses "remove the guest with this id there first: it must not run twice";
    /// The source is neither known nor has a ticket.
    TicketInvalid = "ticket_invalid", retry false,
        cause "The destination does not know this host, and the migration has no ticket that is good there now.",
        refuses "add this host there with POST /v1/hosts, or get another ticket";
    /// A file that the guest boots from holds something else there.
    BootFileDiffers = "boot_file_differs", retry false,
        cause "A file that the guest boots from has other content at the destination.",
        refuses "put the same file there under the same path";
    /// The other host has no such helper.
    HelperMismatch = "helper_mismatch", retry false,
        cause "The destination does not have the helper image that this host would use.",
        refuses "run the same build on both hosts, or upload the helper image there, too";
    /// The definition comes to another layout there.
    LayoutMismatch = "layout_mismatch", retry false,
        cause "The destination lays the guest's RAM out otherwise: another build, or another helper image.",
        refuses "run the same build on both hosts, or upload the helper image there, too";
    /// The other host's helper does not seal by the suite that was asked for.
    SuiteMissing = "suite_missing", retry false,
        cause "The destination's helper does not seal by the suite that was asked for.",
        refuses "ask for a suite that both hosts' capabilities name";
    /// COMMIT is being stored; it is too late to call off.
    Committing = "committing", retry true,
        cause "The destination is storing that the guest is its own.",
        refuses THEIR_LOG;
    /// The destination failed.
    DestinationFailed = "destination_failed", retry true,
        cause "Something failed at the destination before the guest was its own; the guest runs on at the source.",
        refuses THEIR_LOG;

    /// It was called off.
    Canceled = "canceled", retry false,
        cause "Somebody called the migration off, at one of the hosts.",
        fix "none is needed; migrate again if the guest should move after all";
    /// A private page is out of the helper's reach.
    PageUnreachable = "page_unreachable", retry true,
        cause "Under the mirror's strategy the helper cannot reach a private page: a RAM block was plugged or unplugged, or a page's status changed, after the mirror was planned.",
        fix "migrate again, with a new mirror or a strategy that reaches all RAM; address-space-plans shows what each reaches";
    /// The guest shares its pages in too many pieces.
    PageStatusFragmented = "page_status_fragmented", retry false,
        cause "The guest shares its pages in more pieces than a migration carries.",
        fix "have the guest share whole ranges of pages; encryption-status lists them";
    /// The helper failed.
    HelperFailed = "helper_failed", retry true,
        cause "The migration helper in the mirror failed, refused or did not answer; the guest runs on where it was.",
        fix "migrate again: it gets a new mirror; the daemon's log has the reason";
    /// The mirror failed, or the host did while it was made.
    MirrorFailed = "mirror_failed", retry true,
        cause "The mirror could not be made, or this host failed while it was.",
        fix "look into the daemon's log, then migrate again";
    /// The guest's machine failed in a migration.
    GuestFailed = "guest_failed", retry true,
        cause "The guest's machine did not do as it was told during the migration.",
        fix "look at the guest and into the daemon's log";
    /// The guest writes faster than pages move.
    NotConverging = "not_converging", retry true,
        cause "The guest writes faster than pages move, or the shortest pause that can be had is longer than `limits.downtime_ms`.",
        fix "raise the bandwidth limit or allow a longer downtime, add streams, or use stop_and_copy";
    /// Pages at the destination are not what the source has.
    AuditMismatch = "audit_mismatch", retry true,
        cause "The comparison of memory found pages at the destination that are not what the source has. The guest was not started there.",
        fix "migrate again; if it comes back, check both hosts' memory and report it: no page may differ";
    /// The audit before COMMIT came to no verdict.
    AuditNotRun = "audit_not_run", retry true,
        cause "The comparison of memory that must come before the hand-over came to no verdict, so the guest stayed.",
        fix "raise `limits.audit_timeout_ms`, or migrate with another `audit` than before_commit; `detail` says why there is no verdict";
    /// The guest's owner demands evidence of the destination, and there is none.
    EvidenceMissing = "evidence_missing", retry false,
        cause "The guest's owner demands evidence of the destination, and the destination or its build gives none.",
        fix "run the same build on both hosts, or define the guest so that its `attestation` is not demanded";
    /// The destination's evidence is not what the guest's owner demands.
    EvidenceRefused = "evidence_refused", retry false,
        cause "The guest's owner demands evidence of the destination, and what it showed is not that; no page left.",
        fix "choose a destination that the guest's owner has admitted, with its platform key and launch digest";
    /// An administrator ended the doubt.
    Resolved = "resolved", retry false,
        cause "Nobody could say whether the destination had taken the guest, and an administrator decided it.",
        fix "none is needed; `resolution` of the migration says who decided what";
    /// The journal of hand-overs could not be written.
    Journal = "journal", retry true,
        cause "The journal of hand-overs could not be written, so the destination was not told to start the guest.",
        fix "look at the disk of the state directory and into the daemon's log, then migrate again";
    /// The daemon ended in the midst of it.
    DaemonRestarted = "daemon_restarted", retry true,
        cause "The daemon ended, in order or not, while the guest ran or the migration was under way. The memory of a guest that ran is lost; a migration did not move it.",
        fix "start the guest, or migrate it, again; the host's log says why the daemon ended";
    /// The source's daemon ended before it knew how the hand-over had.
    SourceRestarted = "source_restarted", retry false,
        cause "The source's daemon ended between START and its answer, and the guest turned out not to have moved. Its memory at the source is lost.",
        fix "start the guest again at the source";

    /// The guest has ended.
    GuestEnded = "guest_ended", retry true,
        cause "The guest ended by itself: it switched itself off, was reset or crashed.",
        fix "look at the guest's console and `error`, then start it again";
    /// The guest switched itself off.
    GuestPoweredOff = "guest_powered_off", retry true,
        cause "The guest switched itself off.",
        fix "start it again when it should run";
    /// The guest asked for a reset.
    GuestReset = "guest_reset", retry true,
        cause "The guest asked for a reset: a reboot, a panic that reboots, or a triple fault. A reset ends a guest.",
        fix "start it again; if nobody rebooted it, its console says why";
    /// The guest's operating system panicked.
    GuestPanicked = "guest_panicked", retry true,
        cause "The guest's operating system panicked.",
        fix "its console says why; start it again";
    /// A vCPU of the guest could not go on.
    GuestCrashed = "guest_crashed", retry true,
        cause "A vCPU did something that the hypervisor cannot go on from.",
        fix "`detail` says what; look at the guest's console, then start it again";
    /// QEMU ended, or did not do as told.
    QemuFailed = "qemu_failed", retry true,
        cause "QEMU did not start, ended, or did not do as told.",
        fix "`detail` has QEMU's last words; the daemon's log has all of them",
        refuses THEIR_LOG;
    /// No machine could be made for the guest, or it failed.
    MachineFailed = "machine_failed", retry true,
        cause "No machine could be made for the guest, or the one that it had failed.",
        fix "look into the daemon's log for what the hypervisor said, then start the guest again";
    /// The guest does not fit its RAM.
    LayoutUnusable = "layout_unusable", answers requests;
    /// A disk could not be read or written, and the guest is paused.
    IoError = "io_error", retry true,
        cause "The host could not read or write a disk of the guest, which is paused.",
        fix "make room or mend the storage, then POST .../resume: the guest tries again";
    /// A file that the guest boots from cannot be used.
    BootFileUnusable = "boot_file_unusable", retry true,
        cause "A file that the guest boots from or has as a disk is missing, cannot be read or written, or is not beneath a \
            directory of images or volumes.",
        fix "put the file beneath one of image_directories or volume_directories where the daemon may use it; `detail` names it";
    /// A file that the guest boots from has changed.
    BootFileChanged = "boot_file_changed", retry false,
        cause "A file that the guest boots from is not what it was when the guest was defined.",
        fix "put the file back as it was, or define the guest anew with the new one";
    /// The definition's parameters are none of the driver's.
    InvalidDefinition = "invalid_definition", retry false,
        cause "The stored definition has parameters that this build's driver does not take.",
        fix "define the guest anew, or run the build that it was defined with";
    /// The launch measurement is another.
    LaunchMeasurement = "launch_measurement", retry false,
        cause "The firmware measured something else than this host loaded: the guest did not start.",
        fix "start the guest again; if it comes back, do not trust this host with it, and look into the daemon's log";
    /// SEV refused.
    SevRefused = "sev_refused", retry true,
        cause "The SEV firmware, or its model, refused a command.",
        fix "look into the daemon's log for the command and the firmware's status";

    /// There is no such peer.
    PeerUnknown = "peer_unknown", retry false,
        cause "No host of this name or id is in /v1/hosts.",
        fix "add the destination with POST /v1/hosts";
    /// A fault of this host, as a finding names it.
    HostFailed = "host_failed", retry true,
        cause "Something failed at this host that has nothing to do with the request.",
        fix "look into the daemon's log";
    /// The other host cannot be asked.
    DestinationNotAsked = "destination_not_asked", retry false,
        cause "The other host's build cannot be asked whether it would let a migration in.",
        fix "run the same build on both hosts, or start the migration: what is in the way ends it before a page moves";
    /// The other host has no such driver.
    DestinationLacksDriver = "destination_lacks_driver", retry false,
        cause "The other host has not the driver that the guest runs by.",
        fix "its capabilities.missing tells what would help; or choose another destination";
    /// The other host has another built-in helper.
    DestinationHasAnotherHelper = "destination_has_another_helper", retry false,
        cause "The built-in helper images of the two hosts differ.",
        fix "run the same build on both, or name an uploaded image that both have";
    /// No pause can be as short as asked for.
    DowntimeLimitBelowFloor = "downtime_limit_below_floor", retry false,
        cause "The shortest pause that can be had with this guest is longer than `limits.downtime_ms`.",
        fix "raise limits.downtime_ms above the floor, choose on_timeout force, or use stop_and_copy";
    /// The migration would wait for a slot.
    Queued = "queued", retry true,
        cause "All slots for migrations of this host are taken.",
        fix "wait, or raise migration_slots of the host";

    /// A migration is what blocks the request.
    MigrationActive = "migration_active", retry true,
        cause "A migration has the guest and has not ended.",
        fix "wait for the migration to end, or cancel it";
    /// What blocks the request: a peer has not said whether it has the guest.
    WhereaboutsUnknown = "whereabouts_unknown", retry true,
        cause "A known peer has not said whether it has the guest.",
        fix "wait until that peer answers; or, where it cannot have the guest, confirm the guest";
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
