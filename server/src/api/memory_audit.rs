//! What is known of whether a guest's memory crossed as it was, in guests and migrations.

use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::host::{Audit, AuditState};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::migrations::Condition;

/// What the comparison of memory after a migration found: the source's helper digests every private page once
/// the guest stands still there for good, and the destination's compares that with what it opened.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MemoryAudit {
    /// Id of the migration.
    pub migration: Uuid,
    /// `pending`, `proven`, `mismatch` or `not_run`.
    #[schema(example = "proven")]
    pub state: &'static str,
    /// How many pages differ. Null unless the state is `mismatch`.
    pub pages: Option<u64>,
    /// RAM addresses of the first pages that differ, at most eight.
    pub first_ram_addrs: Vec<u64>,
    /// Why there is no verdict, such as `timeout`, `peer_lost`, `no_room`, `memory_needed` or
    /// `host_restarted`. More reasons may be added. Null unless the state is `not_run`.
    pub why: Option<&'static str>,
    /// How many pages were compared.
    pub compared_pages: u64,
    /// How many pages were left out because the guest shares them with its host by now.
    pub left_out_pages: u64,
    /// CPU time of this host's helper for the comparison, in microseconds. It is not part of the migration's
    /// own, except for the digests that the destination's helper makes while it opens pages.
    pub cpu_us: u64,
}

impl MemoryAudit {
    /// Of this migration.
    pub fn new(migration: Uuid, audit: Audit) -> Self {
        let Audit { state, compared_pages, left_out_pages, cpu_us } = audit;
        let name = state.name();
        let (pages, first, why) = match state {
            AuditState::Pending | AuditState::Proven => (None, Vec::new(), None),
            AuditState::Mismatch { pages, first } => (Some(pages), first, None),
            AuditState::NotRun { why } => (None, Vec::new(), Some(why.name())),
        };
        let first_ram_addrs = first.into_iter().map(|page| page.saturating_mul(PAGE_SIZE)).collect();
        Self { migration, state: name, pages, first_ram_addrs, why, compared_pages, left_out_pages, cpu_us }
    }

    /// What may be said of a guest with this audit.
    pub fn condition(&self) -> Condition {
        let (status, reason) = match (self.state, self.why) {
            (_, Some(why)) => ("unknown", why),
            ("proven", None) => ("true", "proven"),
            ("mismatch", None) => ("false", "audit_mismatch"),
            (state, None) => ("unknown", state),
        };
        let detail = self.pages.map(|pages| {
            format!(
                "{pages} pages are not what the source had: the guest may go wrong; stop it, and look for what loses its \
                 writes"
            )
        });
        Condition { kind: "MemoryProven", status, reason, detail }
    }
}
