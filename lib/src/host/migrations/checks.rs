//! Looking closely, changing nothing: a guest's counters and page status, whether a migration would work,
//! whether a peer answers.

use crate::codes::Code;
use uuid::Uuid;

use crate::guest::drivers::FindsWrites;
use crate::host::PeerAnswer;
use crate::host::migrations::asking::{self, Answer};
use crate::host::migrations::findings::{Finding, findings, not_asked};
use crate::host::migrations::outgoing;
use crate::host::{
    GuestRecord, GuestState, Host, HostError, MigrationMode, MigrationRecord, MigrationSpec, MigrationState,
    MirrorChoice,
};
use crate::migration::Fixed;
use crate::migration::wire::EVIDENCE_SINCE;

/// Bytes of RAM that a scan is assumed to read in a millisecond, before one was measured here.
const SCANNED_PER_MS: u64 = 4_000_000;
/// Page content per second that is assumed before any migration was measured here.
const THROUGHPUT: u64 = 300_000_000;

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
            found.push(Finding::new(
                Code::DestinationLacksDriver,
                format!("the other host has no driver {driver}"),
            ));
        }
        if measurement.is_some_and(|m| m != self.abilities.helper_measurement) {
            found.push(Finding::new(
                Code::DestinationHasAnotherHelper,
                "the built-in helper image of the other host is not this host's",
            ));
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
            let demanded = self.inner.facts(&looked.record.spec.driver).demands_evidence();
            if demanded && !answer.abilities.protocol_versions.iter().any(|v| *v >= EVIDENCE_SINCE) {
                blockers.push(Finding::new(
                    Code::EvidenceMissing,
                    "the guest's owner demands evidence of the destination, which the other host's build does not give",
                ));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        blockers.retain(|f| seen.insert((f.code.clone(), f.detail.clone())));
        let (guest, mut warnings) = (looked.record, Vec::new());
        let estimate = self.estimate(&guest, &spec);
        let (floor, limit) = (estimate.downtime_floor_ms, spec.limits.downtime_ms);
        let live = spec.mode == MigrationMode::Precopy && guest.state != GuestState::Paused;
        if live && floor > limit {
            let detail = format!("the shortest pause is about {floor} ms, and the limit is {limit} ms");
            let fix = format!(
                "raise limits.downtime_ms to {floor} or more, choose on_timeout force, or use stop_and_copy"
            );
            warnings.push(Finding::new(Code::DowntimeLimitBelowFloor, detail).fixed_by(fix));
        } else if estimate.converges == Some(false) {
            warnings.push(Finding::new(Code::NotConverging, "the guest may write faster than pages move"));
        }
        if self.inner.outgoing_slots.available_permits() == 0 {
            warnings.push(Finding::new(
                Code::Queued,
                "all migration slots of this host are taken; the migration would wait",
            ));
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
