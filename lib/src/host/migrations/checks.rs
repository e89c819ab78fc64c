//! Looking closely, changing nothing: a guest's counters and page status, whether a migration would work,
//! whether a peer answers.

use uuid::Uuid;

use crate::guest::drivers::FindsWrites;
use crate::host::migrations::asking::{self, Answer};
use crate::host::migrations::outgoing;
use crate::host::{
    GuestRecord, GuestState, Host, HostError, MigrationMode, MigrationRecord, MigrationSpec, MigrationState,
    MirrorChoice,
};
use crate::host::{PeerAnswer, PeerSilence};
use crate::migration::Fixed;
use crate::store::Trouble;

/// Bytes of RAM that a scan is assumed to read in a millisecond, before one was measured here.
const SCANNED_PER_MS: u64 = 4_000_000;
/// Page content per second that is assumed before any migration was measured here.
const THROUGHPUT: u64 = 300_000_000;

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

/// What a migration would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Time until the guest would be paused, milliseconds.
    pub precopy_ms: u64,
    /// Pause, milliseconds; `None`: not known.
    pub downtime_ms: Option<u64>,
    /// The shortest pause that can be had, milliseconds, whatever the number of pages.
    pub downtime_floor_ms: u64,
    /// Whether pre-copy would get done; `None`: the guest's rate of writing is not known.
    pub converges: Option<bool>,
    /// Page content per second that this is reckoned with.
    pub throughput_bytes_per_second: u64,
}

/// Whether a migration would work.
#[derive(Clone, Debug)]
pub struct MigrationCheck {
    /// What stands in its way, all at once.
    pub blockers: Vec<Finding>,
    /// What could not be found out: as long as there is any of it, nobody says that the migration would work.
    pub unknowns: Vec<Finding>,
    /// What does not stand in the way, and may surprise.
    pub warnings: Vec<Finding>,
    /// What it would take; `None` without a guest.
    pub estimate: Option<Estimate>,
    /// The guest.
    pub guest: Uuid,
}

impl PeerAnswer {
    /// What of a guest's needs the peer lacks, by its own word.
    fn lacks(&self, driver: &str, measurement: Option<[u8; 32]>) -> Vec<Finding> {
        let mut found = Vec::new();
        if !self.abilities.drivers.iter().any(|d| d == driver) {
            found.push(Finding {
                code: "destination_lacks_driver".into(),
                detail: format!("the other host has no driver {driver}"),
                fix: "its capabilities.missing tells what would help; or choose another destination".into(),
            });
        }
        if measurement.is_some_and(|m| m != self.abilities.helper_measurement) {
            found.push(Finding {
                code: "destination_has_another_helper".into(),
                detail: "the built-in helper image of the other host is not this host's".into(),
                fix: "run the same build on both, or name an uploaded image that both have".into(),
            });
        }
        found
    }
}

impl Host {
    /// Looks whether a migration would work, at both hosts; starts none. Everything that stands in the way is
    /// in the answer, not in the error.
    ///
    /// # Errors
    /// No such guest, values that cannot be.
    pub async fn check_migration(&self, spec: MigrationSpec) -> Result<MigrationCheck, HostError> {
        let mut looked = outgoing::look(&self.inner, None, &spec)?;
        let mut blockers = Vec::new();
        for e in std::mem::take(&mut looked.against) {
            match e {
                HostError::Invalid(fields) => return Err(HostError::Invalid(fields)),
                e => blockers.extend(findings(&e)),
            }
        }
        if let Err(e) = outgoing::may_claim(&looked.guest, &spec).await {
            blockers.extend(findings(&e));
        }
        if let Err(e) = outgoing::has_room(&self.inner, &looked.record, &spec).await {
            blockers.extend(findings(&e));
        }
        let mut unknowns = Vec::new();
        match asking::ask(&self.inner, &looked, &spec).await {
            Some(Answer::Against(reasons)) => blockers.extend(reasons),
            Some(Answer::Silent(silence)) => blockers.push(silence.finding()),
            Some(Answer::Unknown) => unknowns.push(not_asked()),
            None => {}
        }
        // Its general word, from builds that cannot be asked about this migration, too.
        if let Some(peer) = looked.peer.clone()
            && let Ok(answer) = self.probe(peer).await
        {
            let built_in =
                matches!(spec.mirror, MirrorChoice::Template(_)) && spec.template.helper_image.is_none();
            let measurement = built_in.then(|| self.inner.image.measurement());
            blockers.extend(answer.lacks(looked.record.spec.driver.kind(), measurement));
        }
        let mut seen = std::collections::BTreeSet::new();
        blockers.retain(|f| seen.insert((f.code.clone(), f.detail.clone())));
        let (guest, mut warnings) = (looked.record, Vec::new());
        let estimate = self.estimate(&guest, &spec);
        let (floor, limit) = (estimate.downtime_floor_ms, spec.limits.downtime_ms);
        let live = spec.mode == MigrationMode::Precopy && guest.state != GuestState::Paused;
        if live && floor > limit {
            warnings.push(Finding {
                code: "downtime_limit_below_floor".into(),
                detail: format!("the shortest pause is about {floor} ms, and the limit is {limit} ms"),
                fix: format!("raise limits.downtime_ms to {floor} or more, choose on_timeout force, or use stop_and_copy"),
            });
        } else if estimate.converges == Some(false) {
            warnings.push(Finding {
                code: "not_converging".into(),
                detail: "the guest may write faster than pages move".into(),
                fix:
                    "raise the bandwidth limit or allow a longer downtime, add streams, or use stop_and_copy"
                        .into(),
            });
        }
        if self.inner.outgoing_slots.available_permits() == 0 {
            warnings.push(Finding {
                code: "queued".into(),
                detail: "all migration slots of this host are taken; the migration would wait".into(),
                fix: "wait, or raise migration_slots of the host".into(),
            });
        }
        Ok(MigrationCheck { blockers, unknowns, warnings, estimate: Some(estimate), guest: guest.id })
    }

    fn estimate(&self, guest: &GuestRecord, spec: &MigrationSpec) -> Estimate {
        let ended = |m: &crate::host::MigrationRecord| {
            m.state == MigrationState::Succeeded && m.progress.throughput_bytes_per_second > 0
        };
        let measured = self.migrations().into_iter().rev().find(ended);
        let measured = measured.map_or(THROUGHPUT, |m| m.progress.throughput_bytes_per_second);
        let throughput = spec.limits.bandwidth_bytes_per_second.map_or(measured, |b| b.min(measured)).max(1);
        let total = guest.layout.ram_bytes();
        let ms =
            |bytes: u64| u64::try_from(u128::from(bytes) * 1000 / u128::from(throughput)).unwrap_or(u64::MAX);
        // Where the driver does not tell, nothing is known before the first round.
        let rate = self.inner.drivers.of(&guest.spec.driver).ok();
        let rate = rate.and_then(|driver| driver.write_rate(&guest.spec.driver));
        let rate = rate.map(|r| (r.bytes_per_second, r.working_set_bytes));
        let downtime_floor_ms = self.floor(guest);
        if spec.mode == MigrationMode::StopAndCopy {
            let all = ms(total);
            return Estimate {
                precopy_ms: 0,
                downtime_ms: Some(all),
                downtime_floor_ms,
                converges: Some(true),
                throughput_bytes_per_second: throughput,
            };
        }
        // Each round leaves what was written during it; rounds shrink by the ratio of the two rates.
        let converges = rate.map(|(dirty, set)| dirty < throughput || ms(set) <= spec.limits.downtime_ms);
        let converges = if downtime_floor_ms > spec.limits.downtime_ms { Some(false) } else { converges };
        let downtime_ms = rate.map(|(dirty, set)| ms(set.min(dirty / 10)).max(downtime_floor_ms));
        Estimate {
            precopy_ms: ms(total),
            downtime_ms,
            downtime_floor_ms,
            converges,
            throughput_bytes_per_second: throughput,
        }
    }

    /// The shortest pause of a guest, milliseconds. Where all RAM has to be read in it: by what that took in
    /// the last migration of such a guest from here, else by what is assumed.
    fn floor(&self, guest: &GuestRecord) -> u64 {
        let scans = |record: &GuestRecord| {
            let driver = self.inner.drivers.of(&record.spec.driver);
            driver.is_ok_and(|d| matches!(d.finds_writes(), FindsWrites::Scan { .. }))
        };
        if !scans(guest) {
            return Fixed::assumed(false).total().as_millis() as u64;
        }
        let fixed = Fixed::assumed(true).total().as_millis() as u64;
        let total = guest.layout.ram_bytes();
        let scanned = |m: &MigrationRecord| {
            let there = self.inner.find_guest(&m.guest.to_string()).ok()?.record();
            scans(&there).then_some(())?;
            let (floor, bytes) = (m.progress.downtime_floor_ms?, m.progress.total_bytes.max(1));
            let by_size = u128::from(floor.saturating_sub(fixed)) * u128::from(total) / u128::from(bytes);
            u64::try_from(by_size).ok()
        };
        let measured = self.migrations().iter().rev().find_map(scanned);
        fixed + measured.unwrap_or(total / SCANNED_PER_MS)
    }
}

impl PeerSilence {
    fn finding(self) -> Finding {
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
fn findings(e: &HostError) -> Vec<Finding> {
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
