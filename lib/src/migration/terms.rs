//! What is agreed of a migration and seen of it: mode, limits and their bounds, state, rounds, progress.
//!
//! Owns: these terms, each once. Must not know: who asked for a migration, where it is recorded.

use std::ops::RangeInclusive;

use mirrorvm_abi::header::Header;
use mirrorvm_abi::record;
use serde::{Deserialize, Serialize};

use crate::named::named;

/// Streams, and workers of the mirror that feeds them.
pub const STREAMS: RangeInclusive<u64> = 1..=16;
/// Pause that a migration may take, milliseconds.
pub const DOWNTIME_MS: RangeInclusive<u64> = 0..=3_600_000;
/// Time that a migration may take, milliseconds: at most a week.
pub const TIMEOUT_MS: RangeInclusive<u64> = 1..=604_800_000;
/// Time for which a link may be silent, milliseconds.
pub const STALL_TIMEOUT_MS: RangeInclusive<u64> = 1_000..=600_000;
/// Bandwidth limit, bytes per second. A full frame of 2 MiB must fit the peer's frame deadline.
pub const BANDWIDTH: RangeInclusive<u64> = 1 << 20..=1 << 50;

/// Time that an audit may take after START, milliseconds.
pub const AUDIT_TIMEOUT_MS: RangeInclusive<u64> = 1..=3_600_000;

/// How memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationMode {
    /// In rounds while the guest runs.
    Precopy,
    /// In one go while it is paused.
    StopAndCopy,
}

/// What happens when a migration has not come to its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It is given up as `not_converging`; the guest goes on here.
    #[default]
    Cancel,
    /// The guest is paused and the rest is sent, however long that takes.
    Force,
    /// The guest's vCPUs are held back step by step until it converges; given up when even that does not
    /// help.
    Throttle,
}

/// How the streams of sealed pages cross between hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamTransport {
    /// As they are, once mutual TLS has shown both ends who the other is: records are sealed helper to
    /// helper, and their headers are masked. Control messages and pages that the guest shares stay inside
    /// TLS.
    #[default]
    Sealed,
    /// Inside TLS as well: everything is encrypted twice.
    Tls,
}

named! {
    /// By what the helpers seal pages and tokens. Why which is the default:
    /// docs/decisions/0030-a-key-for-every-group.md.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub enum Suite {
        /// AES-256-GCM.
        #[default]
        Aes256Gcm = "aes-256-gcm",
        /// AES-256-GCM-SIV: slower, and what is sealed stays secret also where a host sets a helper back in
        /// the midst of a request.
        Aes256GcmSiv = "aes-256-gcm-siv",
    }
}

impl Suite {
    /// The helper's own word for it.
    pub const fn of_records(self) -> record::Suite {
        match self {
            Self::Aes256Gcm => record::Suite::Aes256Gcm,
            Self::Aes256GcmSiv => record::Suite::Aes256GcmSiv,
        }
    }

    /// Those that a helper has.
    pub fn of_helper(image: &Header) -> Vec<Self> {
        Self::ALL.iter().copied().filter(|suite| image.has(suite.of_records())).collect()
    }
}

/// Their names, as they are told.
pub fn suite_names(suites: &[Suite]) -> Vec<String> {
    suites.iter().map(|suite| suite.name().to_owned()).collect()
}

named! {
    /// When the destination compares what it opened with what lies in the source's RAM.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub enum AuditMode {
        /// When the guest runs at the destination: costs no pause, and finds out afterwards.
        #[default]
        After = "after",
        /// Before the guest may run there: a page that differs ends the migration, and the guest goes on
        /// here.
        BeforeCommit = "before_commit",
        /// Not at all.
        Never = "never",
    }
}

named! {
    /// Why an audit came to no verdict.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum NotRun {
        /// It took longer than its limit.
        Timeout = "timeout",
        /// The link to the other host broke, or that host said what makes no sense.
        PeerLost = "peer_lost",
        /// The other host's build knows no audits.
        PeerVersion = "peer_version",
        /// The helper's block has no room for digests.
        NoRoom = "no_room",
        /// A helper failed or refused.
        HelperFailed = "helper_failed",
        /// The memory that the source kept for it was needed, or its definition was removed.
        MemoryNeeded = "memory_needed",
        /// A mirror of the guest was asked for at the destination, by a migration or by a caller.
        MirrorNeeded = "mirror_needed",
        /// The guest ended or was stopped at the destination.
        GuestStopped = "guest_stopped",
        /// A host shut down.
        ShuttingDown = "shutting_down",
        /// This host's daemon ended in the midst of it.
        HostRestarted = "host_restarted",
    }
}

/// How far an audit is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditState {
    /// It has not come to an end.
    Pending,
    /// Every private page is at the destination as the source has it.
    Proven,
    /// Some are not.
    Mismatch {
        /// How many.
        pages: u64,
        /// The first of them, by their numbers in RAM.
        first: Vec<u64>,
    },
    /// There is no verdict.
    NotRun {
        /// Why.
        why: NotRun,
    },
}

impl AuditState {
    /// Its names, in the order in which they are shown.
    pub const NAMES: [&'static str; 4] = ["pending", "proven", "mismatch", "not_run"];

    /// Its name in the API and in metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Proven => "proven",
            Self::Mismatch { .. } => "mismatch",
            Self::NotRun { .. } => "not_run",
        }
    }
}

/// An audit as one host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// How far it is.
    pub state: AuditState,
    /// Pages whose digests were compared.
    pub compared_pages: u64,
    /// Pages that crossed sealed and are shared now, so that both hosts left them out.
    pub left_out_pages: u64,
    /// CPU time of this host's helper for it, microseconds; what the destination's took while it opened pages
    /// is in the migration's own.
    pub cpu_us: u64,
}

impl Audit {
    /// One that has nothing to show yet.
    pub const fn new(state: AuditState) -> Self {
        Self { state, compared_pages: 0, left_out_pages: 0, cpu_us: 0 }
    }

    /// One that came to no verdict.
    pub const fn not_run(why: NotRun) -> Self {
        Self::new(AuditState::NotRun { why })
    }

    /// Whether it has not come to an end.
    pub const fn is_pending(&self) -> bool {
        matches!(self.state, AuditState::Pending)
    }
}

/// What a source knows of where its guest's pages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The guest's owner demands none.
    NotDemanded,
    /// The helper has checked it, before it made keys.
    Verified {
        /// SHA-256 of what the destination's guest was launched with.
        launch_digest: [u8; 32],
        /// SHA-256 of the key that stands for the destination's platform.
        platform: [u8; 32],
    },
}

impl Evidence {
    /// Its names, in the order in which they are shown.
    pub const NAMES: [&'static str; 2] = ["not_demanded", "verified"];

    /// Its name in the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotDemanded => "not_demanded",
            Self::Verified { .. } => "verified",
        }
    }
}

/// Limits of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationLimits {
    /// Bytes of page content per second over all streams; `None`: as fast as it goes.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause of a live migration, milliseconds. Kept up to START, with a tolerance of a tenth and at
    /// least 5 ms; what the destination takes beyond the prediction from there on comes on top.
    pub downtime_ms: u64,
    /// Longest time from the first page to the switchover, milliseconds.
    pub timeout_ms: u64,
    /// Longest silence of the peer, milliseconds.
    pub stall_timeout_ms: u64,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// Whether the guest's vCPUs are held back, step by step, as soon as rounds do not shrink.
    pub auto_throttle: bool,
    /// Longest time that the audit may take, milliseconds. Then it is given up.
    pub audit_timeout_ms: u64,
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_second: None,
            downtime_ms: 300,
            timeout_ms: 3_600_000,
            stall_timeout_ms: 30_000,
            on_timeout: OnTimeout::Cancel,
            auto_throttle: false,
            audit_timeout_ms: 60_000,
        }
    }
}

named! {
    /// A migration's state.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum MigrationState {
        /// Waits for a migration slot of the host.
        Queued = "queued",
        /// Mirrors are made, the destination gets ready.
        Preparing = "preparing",
        /// Pages move while the guest runs.
        Precopy = "precopy",
        /// The guest is paused; the last pages and its state move.
        Switchover = "switchover",
        /// START is out; the destination's answer is awaited.
        Finishing = "finishing",
        /// The guest runs at the destination.
        Succeeded = "succeeded",
        /// It did not work; the guest is where it was.
        Failed = "failed",
        /// Called off; the guest is where it was.
        Canceled = "canceled",
        /// START is out and no token settles what became of it.
        InDoubt = "in_doubt",
    }
}

impl MigrationState {
    /// Whether its course can still be changed: START is not out.
    pub const fn is_moving(self) -> bool {
        matches!(self, Self::Queued | Self::Preparing | Self::Precopy | Self::Switchover)
    }

    /// Whether nothing more will happen.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Canceled)
    }
}

/// One pass over memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// Pages sent sealed, marks for zero pages included.
    pub pages_sealed: u64,
    /// Pages sent as they are, because the guest shares them with its host.
    pub pages_shared: u64,
    /// Of these, pages that are all zero: a sealed mark crossed, no content.
    pub pages_zero: u64,
    /// Bytes of page content that crossed.
    pub bytes: u64,
    /// Duration, microseconds.
    pub duration_us: u64,
    /// Pages that the guest dirtied meanwhile; 0 for the last round.
    pub dirtied_pages: u64,
    /// Whether the guest was paused.
    pub paused: bool,
}

/// How far a migration is; kept after its end.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Progress {
    /// Since the request, milliseconds.
    pub elapsed_ms: u64,
    /// Until the first page, milliseconds.
    pub setup_ms: u64,
    /// Estimate to the end; `None`: unknown.
    pub remaining_ms: Option<u64>,
    /// Pause that the next switchover would cost, milliseconds.
    pub expected_downtime_ms: Option<u64>,
    /// The shortest pause that can be had, whatever the number of pages, milliseconds; `None`: not known yet.
    /// A limit below it is never met.
    pub downtime_floor_ms: Option<u64>,
    /// The pause as measured from the guest's last instruction here to its first there, `verify_ms` taken
    /// off.
    pub downtime_ms: Option<f64>,
    /// Time that verification added to the pause.
    pub verify_ms: Option<f64>,
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes of page content moved so far, all rounds.
    pub processed_bytes: u64,
    /// Bytes of this round still to go.
    pub remaining_bytes: u64,
    /// Pages moved sealed, all rounds, marks for zero pages included.
    pub pages_sealed: u64,
    /// Pages moved unsealed (shared pages), all rounds.
    pub pages_shared: u64,
    /// Of these, pages that are all zero: a sealed mark crossed, no content.
    pub pages_zero: u64,
    /// Pages that the guest dirties per second, over about the last second that was looked at.
    pub dirty_pages_per_second: u64,
    /// Page content per second, all streams, as last measured.
    pub throughput_bytes_per_second: u64,
    /// Round, from 1; 0 before the first.
    pub iteration: u32,
    /// Bytes moved while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes moved while it was paused.
    pub downtime_bytes: u64,
    /// Refusals that the helper answered.
    pub helper_errors: u64,
    /// Bytes whose pages the guest shares with its host, as this host knew last; `None`: nobody has told it
    /// yet.
    pub shared_bytes: Option<u64>,
    /// Pages that the guest shared or took back while the migration ran, at the source.
    pub status_changes: u64,
    /// Share of their time that the guest's vCPUs are held, percent.
    pub throttle_percent: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_still_be_changed_is_not_over() {
        let moving: Vec<_> = MigrationState::ALL.iter().filter(|s| s.is_moving()).map(|s| s.name()).collect();
        assert_eq!(moving, ["queued", "preparing", "precopy", "switchover"]);
        assert!(MigrationState::ALL.iter().all(|s| !(s.is_moving() && s.is_terminal())));
    }
}
