//! A migration as this host knows it, with its progress and what may be said of it.

use jiff::Timestamp;
use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::codes::Code;
use mirrorvm::guest::Hex;
use mirrorvm::host::{Evidence, MigrationDirection, MigrationRecord, MigrationState};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::MigrationCreate;
use crate::api::memory_audit::MemoryAudit;
use crate::api::mirrors::Worker;
use crate::api::resolution::MigrationResolution;
use crate::api::strategies::StrategyBody;
use crate::api::{Fault, Preview};

/// A migration, as this host knows it. The other host has a record of its own under the same id.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Migration {
    /// Id, a UUIDv7. Both hosts use the same.
    pub id: Uuid,
    /// `outgoing`: the guest leaves this host. `incoming`: it arrives here.
    #[schema(example = "outgoing")]
    pub direction: &'static str,
    /// Id of the guest, which is the same on both hosts.
    pub guest: Uuid,
    /// Name of the guest.
    pub guest_name: String,
    /// Name of the other host.
    pub peer: String,
    /// What was asked for, with defaults filled in. Null at the destination.
    pub request: Option<MigrationCreate>,
    /// The strategy by which the mirror's address space is laid out.
    pub strategy: StrategyBody,
    /// The suite by which the helpers seal pages: `aes-256-gcm` or `aes-256-gcm-siv`. More may be added.
    #[schema(example = "aes-256-gcm")]
    pub suite: &'static str,
    /// `queued`, `preparing`, `precopy`, `switchover`, `finishing`, `succeeded`, `failed`, `canceled` or
    /// `in_doubt`. More states may be added.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Rises with every change. The `ETag` header has it in quotes.
    pub generation: u64,
    /// How far the migration has got. It is kept after the end.
    pub progress: MigrationProgress,
    /// State of the guest on this host after the end.
    pub guest_state_after: Option<&'static str>,
    /// Statements about how the migration is going: `Stalled`, `Converging`, `HelperUnresponsive`.
    pub conditions: Vec<Condition>,
    /// Why the migration failed, or why it is in doubt.
    pub error: Option<Fault>,
    /// Whether the guest belongs to the destination already, but the destination's disk does not accept the
    /// record of it. Both hosts hold the guest until it does, and then the guest runs at the destination.
    /// Only free space or a working disk is needed.
    pub committing: bool,
    /// What the comparison of memory found. Null: none was asked for, or the guest has not moved yet.
    pub audit: Option<MemoryAudit>,
    /// What the guest's helper was shown of the destination before it sealed a page. Null: it has not come to
    /// that, or this is the destination.
    pub evidence: Option<DestinationEvidence>,
    /// What an administrator said had become of the guest, if it was that which ended a doubt.
    pub resolution: Option<MigrationResolution>,
    /// Whether `cancel` can still succeed.
    pub cancelable: bool,
    /// When cancelling was asked for. `state` tells what came of it.
    #[serde(serialize_with = "crate::api::time::to_ms_or_null")]
    pub cancel_requested_at: Option<Timestamp>,
    /// When the migration was asked for.
    #[serde(serialize_with = "crate::api::time::to_ms")]
    pub created_at: Timestamp,
    /// When the migration left the queue.
    #[serde(serialize_with = "crate::api::time::to_ms_or_null")]
    pub started_at: Option<Timestamp>,
    /// When the migration ended.
    #[serde(serialize_with = "crate::api::time::to_ms_or_null")]
    pub finished_at: Option<Timestamp>,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// How far a migration has got.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationProgress {
    /// State of the migration, repeated for those who read only the progress.
    #[schema(example = "precopy")]
    pub state: &'static str,
    /// Milliseconds since the migration was asked for.
    pub elapsed_ms: u64,
    /// Estimated milliseconds to the end. Null when unknown.
    pub remaining_ms: Option<u64>,
    /// Milliseconds that a pause would take if the switchover came now. Null when unknown.
    pub expected_downtime_ms: Option<u64>,
    /// The shortest pause that is possible whatever the number of pages left, in milliseconds. Null when
    /// unknown. With a `limits.downtime_ms` below it the migration does not switch over by itself.
    pub downtime_floor_ms: Option<u64>,
    /// Measured length of the pause in milliseconds, from the guest's last instruction at the source to its
    /// first at the destination, without `verify_ms`. Null when there was no pause yet.
    pub downtime_ms: Option<f64>,
    /// Milliseconds until the first page was sent.
    pub setup_ms: u64,
    /// Milliseconds that verification added to the pause.
    pub verify_ms: Option<f64>,
    /// Share of the time during which the guest's vCPUs are held back, in percent.
    #[schema(minimum = 0, maximum = 99)]
    pub throttle_percent: u8,
    /// Progress of guest memory.
    pub memory: MemoryProgress,
    /// What the helper has done.
    pub helper: HelperProgress,
    /// How much of guest memory is encrypted, by the guest's own account.
    pub encryption: EncryptionProgress,
}

/// How far the guest's memory has moved.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MemoryProgress {
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes of page content that have been moved, over all rounds.
    pub processed_bytes: u64,
    /// Bytes that are still to be sent in this round.
    pub remaining_bytes: u64,
    /// Number of zero pages. For each of them a sealed mark was sent and no content.
    pub zero_pages: u64,
    /// Number of pages whose content was sent, over all rounds.
    pub normal_pages: u64,
    /// Bytes of the pages whose content was sent.
    pub normal_bytes: u64,
    /// Bytes of one page.
    #[schema(example = 4096)]
    pub page_size_bytes: u64,
    /// Pages that the guest writes per second, measured over about the last second.
    pub dirty_pages_per_second: u64,
    /// Bytes of page content per second over all streams, as last measured.
    pub throughput_bytes_per_second: u64,
    /// Number of the round, from 1. 0 before the first.
    pub iteration: u32,
    /// Bytes that were moved while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes that were moved while the guest was paused.
    pub downtime_bytes: u64,
    /// Bytes that were moved after the guest ran at the destination.
    pub postcopy_bytes: u64,
}

/// What the helper has done for a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperProgress {
    /// Number of pages that it sealed or opened, including marks for zero pages.
    pub pages_encrypted: u64,
    /// Number of pages that were sent without it, because the guest shares them with its host.
    pub pages_plain: u64,
    /// How many requests the helper refused.
    pub helper_errors: u64,
    /// How much of their time the helper's vCPU threads spent working for this migration, in percent. Null
    /// when there was no mirror yet.
    #[schema(minimum = 0, maximum = 100)]
    pub helper_busy_percent: Option<u8>,
    /// The helper's vCPUs: CPU time for this migration, and exits since each was made.
    pub per_worker: Vec<Worker>,
}

/// How much of guest memory is encrypted. The source shows it as of the beginning of the latest round; the
/// destination learns it with the guest's state. At level `none` memory counts as encrypted unless the guest
/// shares it, because it is sent sealed all the same.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncryptionProgress {
    /// Bytes that are private to the guest.
    pub encrypted_bytes: u64,
    /// Bytes that the guest shares with its host.
    pub shared_bytes: u64,
    /// Bytes for which this host does not know it yet.
    pub unknown_bytes: u64,
    /// How many pages the guest shared or took back while the migration ran, counted at the source.
    pub status_changes: u64,
}

/// A statement about how a migration is going, or about a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Condition {
    /// Name of the statement: `Stalled`, `Converging` or `HelperUnresponsive` of a migration, `MemoryProven`
    /// of a guest. More may be added.
    #[serde(rename = "type")]
    #[schema(example = "Converging")]
    pub kind: &'static str,
    /// Whether the statement holds: `true`, `false` or `unknown`.
    #[schema(example = "true")]
    pub status: &'static str,
    /// Why, as a code in `snake_case`. The list is open: new codes may be added.
    #[schema(example = "dirty_rate_below_throughput")]
    pub reason: &'static str,
    /// Why, and what would help, in a sentence. Absent where the reason says it all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(
        nullable = false,
        example = "the shortest pause is about 420 ms: raise limits.downtime_ms to that"
    )]
    pub detail: Option<String>,
}

impl Condition {
    fn of(record: &MigrationRecord) -> Vec<Self> {
        let p = &record.progress;
        let moving = record.state == MigrationState::Precopy;
        let code = record.error.as_ref().and_then(|e| e.code.known());
        let dirty = p.dirty_pages_per_second.saturating_mul(PAGE_SIZE);
        let is = |kind, so: Option<bool>, reason| Self {
            kind,
            status: so.map_or("unknown", |so| if so { "true" } else { "false" }),
            reason,
            detail: None,
        };
        let limit = record.spec.as_ref().map(|s| s.limits.downtime_ms);
        let floor = p.downtime_floor_ms.filter(|floor| moving && limit.is_some_and(|limit| *floor > limit));
        let measured = moving && p.iteration > 1 && p.throughput_bytes_per_second > 0;
        let converging = match (code, measured) {
            (Some(Code::NotConverging), _) => is("Converging", Some(false), Code::NotConverging.as_str()),
            _ if floor.is_some() => Self {
                detail: floor.map(|ms| {
                    format!(
                        "the shortest pause is about {ms} ms: raise limits.downtime_ms to that, or ask for the switchover"
                    )
                }),
                ..is("Converging", Some(false), Code::DowntimeLimitBelowFloor.as_str())
            },
            (_, true) if dirty < p.throughput_bytes_per_second => {
                is("Converging", Some(true), "dirty_rate_below_throughput")
            }
            (_, true) => is("Converging", Some(false), "dirty_rate_above_throughput"),
            (_, false) => is("Converging", None, "not_measured"),
        };
        let stalled = match code {
            Some(Code::PeerLost) => is("Stalled", Some(true), Code::PeerLost.as_str()),
            _ if record.state == MigrationState::InDoubt => is("Stalled", Some(true), "in_doubt"),
            _ if record.committing => is("Stalled", Some(true), Code::Committing.as_str()),
            _ => is("Stalled", Some(false), "progress"),
        };
        let failed = code.filter(|code| *code == Code::HelperFailed);
        let helper = is("HelperUnresponsive", Some(failed.is_some()), failed.map_or("answers", Code::as_str));
        vec![stalled, converging, helper]
    }
}

impl MigrationProgress {
    fn new(state: &'static str, record: &MigrationRecord) -> Self {
        let p = &record.progress;
        let moved = (p.pages_sealed + p.pages_shared).saturating_sub(p.pages_zero);
        Self {
            state,
            elapsed_ms: p.elapsed_ms,
            remaining_ms: p.remaining_ms,
            expected_downtime_ms: p.expected_downtime_ms,
            downtime_floor_ms: p.downtime_floor_ms,
            downtime_ms: p.downtime_ms,
            setup_ms: p.setup_ms,
            verify_ms: p.verify_ms,
            throttle_percent: p.throttle_percent,
            memory: MemoryProgress {
                total_bytes: p.total_bytes,
                processed_bytes: p.processed_bytes,
                remaining_bytes: p.remaining_bytes,
                zero_pages: p.pages_zero,
                normal_pages: moved,
                normal_bytes: moved.saturating_mul(PAGE_SIZE),
                page_size_bytes: PAGE_SIZE,
                dirty_pages_per_second: p.dirty_pages_per_second,
                throughput_bytes_per_second: p.throughput_bytes_per_second,
                iteration: p.iteration,
                precopy_bytes: p.precopy_bytes,
                downtime_bytes: p.downtime_bytes,
                postcopy_bytes: 0,
            },
            helper: HelperProgress {
                pages_encrypted: p.pages_sealed,
                pages_plain: p.pages_shared,
                helper_errors: p.helper_errors,
                helper_busy_percent: record.helper_busy_percent,
                per_worker: record.workers.iter().cloned().map(Worker::from).collect(),
            },
            encryption: EncryptionProgress {
                encrypted_bytes: p.shared_bytes.map_or(0, |shared| p.total_bytes.saturating_sub(shared)),
                shared_bytes: p.shared_bytes.unwrap_or(0),
                unknown_bytes: if p.shared_bytes.is_some() { 0 } else { p.total_bytes },
                status_changes: p.status_changes,
            },
        }
    }
}

/// What a guest's helper was shown of a destination: an attestation report of its platform's firmware, made
/// for this migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DestinationEvidence {
    /// `verified`: the helper has checked it before it made keys. `not_demanded`: the guest's owner demands
    /// none.
    #[schema(example = "verified")]
    pub state: &'static str,
    /// What the destination's guest was launched with. Null unless `verified`.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub launch_digest: Option<String>,
    /// Fingerprint of the key that stands for the destination's platform, as in its `platform_key`. Null
    /// unless `verified`.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub platform_key: Option<String>,
}

impl From<Evidence> for DestinationEvidence {
    fn from(evidence: Evidence) -> Self {
        let state = evidence.name();
        let shown = |digest| Some(format!("sha256:{}", Hex::<32>(digest)));
        let (launch_digest, platform_key) = match evidence {
            Evidence::NotDemanded => (None, None),
            Evidence::Verified { launch_digest, platform } => (shown(launch_digest), shown(platform)),
        };
        Self { state, launch_digest, platform_key }
    }
}

impl From<MigrationRecord> for Migration {
    fn from(record: MigrationRecord) -> Self {
        let state = record.state.name();
        let conditions = Condition::of(&record);
        let progress = MigrationProgress::new(state, &record);
        let outgoing = record.direction == MigrationDirection::Outgoing;
        Self {
            id: record.id,
            direction: match record.direction {
                MigrationDirection::Outgoing => "outgoing",
                MigrationDirection::Incoming => "incoming",
            },
            guest: record.guest,
            guest_name: record.guest_name,
            peer: record.peer,
            request: record.spec.map(MigrationCreate::from),
            strategy: record.strategy.into(),
            suite: record.suite.name(),
            state,
            generation: record.generation,
            progress,
            guest_state_after: record.guest_state_after.map(|s| s.name()),
            error: record.error.map(|fault| Fault::of_migration(fault, outgoing)),
            committing: record.committing,
            audit: record.audit.map(|audit| MemoryAudit::new(record.id, audit)),
            evidence: record.evidence.map(DestinationEvidence::from),
            resolution: record.resolution.map(MigrationResolution::from),
            cancelable: record.state.is_moving(),
            cancel_requested_at: record.cancel_requested_at,
            created_at: record.created_at,
            started_at: record.started_at,
            finished_at: record.finished_at,
            conditions,
            preview: None,
        }
    }
}

/// One page of a list of migrations.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationList {
    /// Migrations, in the order in which they were asked for unless requested otherwise.
    pub items: Vec<Migration>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
    /// Follow `/v1/events` after it to learn what changes from here on: everything before it is in the list
    /// already. Of a list in several pages, that of the first counts.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub events_cursor: String,
}
