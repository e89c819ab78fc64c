//! Exports and imports of sealed batches through a guest's mirrors: tools, tests, snapshots within one
//! guest's life.
//!
//! Owns: who may do it when, and the sessions' bookkeeping beside a mirror. Must not know: HTTP; how pages
//! are sealed.

use std::sync::Arc;

use mirrorvm_abi::op::Status;
use uuid::Uuid;

use crate::addr::{PAGE_SIZE, RamAddr, RamPage};
use crate::address_space::Addressing;
use crate::host::guests::command::Command;
use crate::host::{Ask, FieldError, GuestState, Host, HostError};
use crate::mirror::{BATCH_BYTES_MAX, BATCH_PAGES_MAX, Greeting, SealedToken};

/// What is to be sealed, and for whom.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// The import that it is for, as the importing mirror named it.
    pub import: Uuid,
    /// What the importing helper greeted with.
    pub importer: Greeting,
    /// First byte and bytes, whole pages, by RAM address.
    pub ranges: Vec<(u64, u64)>,
    /// Whether the session ends with this batch.
    pub last: bool,
}

/// Pages of RAM, sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedBatch {
    /// The import that it is for.
    pub import: Uuid,
    /// Which of its batches this is, from 1.
    pub epoch: u32,
    /// What the exporting helper greeted with.
    pub exporter: Greeting,
    /// What its records call pages.
    pub addressing: Addressing,
    /// How many.
    pub pages: u32,
    /// Sealed records, one a page.
    pub records: Vec<u8>,
    /// The helper's word on the batch: nothing is missing, nothing added.
    pub token: SealedToken,
    /// Whether more follow.
    pub last: bool,
    /// What the guest did meanwhile: pages of a running guest are each as they were when they were read.
    pub guest_state: GuestState,
}

/// What is asked of an importing mirror.
#[derive(Clone, Debug)]
pub enum ImportStep {
    /// Greet for a new import.
    Open,
    /// Take a batch.
    Batch(Box<SealedBatch>),
    /// Give the import up.
    Close(Uuid),
}

/// How an import is after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportReport {
    /// Its id.
    pub import: Uuid,
    /// `open`: no batch has come; `receiving`; `closed`.
    pub state: &'static str,
    /// What the importing helper greets exporters with.
    pub importer: Option<Greeting>,
    /// RAM that the last step wrote: first byte, bytes.
    pub written: Vec<(u64, u64)>,
}

/// Why a sealed batch was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchRefusal {
    /// Stable code: `unsealed`, `page_refused`, `page_repeated`, `incomplete`, ...
    pub code: &'static str,
    /// Which record; the number of records: the token.
    pub index: usize,
    /// RAM that was written before it: first byte, bytes.
    pub written: Vec<(u64, u64)>,
}

/// A session beside a mirror.
#[derive(Clone, Copy, Debug)]
pub(in crate::host) enum BatchSession {
    Exporting { import: Uuid, importer: Greeting, exporter: Greeting, epoch: u32 },
    Opened { import: Uuid, importer: Greeting },
    Receiving { import: Uuid, exporter: Greeting, epoch: u32 },
}

impl BatchSession {
    pub const fn import(&self) -> Uuid {
        match self {
            Self::Exporting { import, .. } | Self::Opened { import, .. } | Self::Receiving { import, .. } => {
                *import
            }
        }
    }
}

/// The refusal's code.
pub(in crate::host) const fn code_of(status: Status) -> &'static str {
    match status {
        Status::Unsealed => "unsealed",
        Status::PageRefused => "page_refused",
        Status::PageRepeated => "page_repeated",
        Status::Incomplete => "incomplete",
        Status::PolicyForbids => "policy_forbids",
        _ => "refused",
    }
}

/// Pages as runs of bytes.
pub(in crate::host) fn runs(pages: impl Iterator<Item = RamPage>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        let at = page.get() * PAGE_SIZE;
        match runs.last_mut() {
            Some((first, len)) if *first + *len == at => *len += PAGE_SIZE,
            _ => runs.push((at, PAGE_SIZE)),
        }
    }
    runs
}

/// The pages of ranges that are whole, apart and not too many. Sizes are checked before anything is
/// allocated.
pub(in crate::host) fn pages_of(ranges: &[(u64, u64)]) -> Result<Vec<RamPage>, HostError> {
    let bad = |i: usize, field: &str, code, detail: String| {
        Err(HostError::Invalid(vec![FieldError::new(format!("/ranges/{i}/{field}"), code, detail)]))
    };
    let (mut pages, mut taken): (Vec<RamPage>, Vec<(u64, u64)>) = (Vec::new(), Vec::new());
    for (i, (at, len)) in ranges.iter().copied().enumerate() {
        if !at.is_multiple_of(PAGE_SIZE) {
            return bad(i, "ram_addr", "unaligned", format!("{at} is not a multiple of {PAGE_SIZE}"));
        }
        let room = (BATCH_PAGES_MAX - pages.len()) as u64 * PAGE_SIZE;
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > room {
            let detail = format!(
                "{len} is no whole number of pages, or the ranges have more than {BATCH_PAGES_MAX} together"
            );
            return bad(i, "size_bytes", "out_of_range", detail);
        }
        let Some(end) = at.checked_add(len) else {
            return bad(i, "ram_addr", "out_of_range", format!("{at} with {len} bytes passes 2^64"));
        };
        if taken.iter().any(|(a, e)| at < *e && *a < end) {
            return bad(i, "ram_addr", "overlap", "a page is in two ranges".to_owned());
        }
        taken.push((at, end));
        pages.extend((at..end).step_by(PAGE_SIZE as usize).map(|a| RamAddr::new(a).page()));
    }
    Ok(pages)
}

impl Host {
    /// Seals pages of a guest for an import that another of its mirrors has opened. The session goes on until
    /// its last batch; a batch of no ranges that is the last ends it.
    ///
    /// # Errors
    /// No such mirror; ranges that are no RAM, that the mirror does not reach or that the guest shares;
    /// another session, a migration; [`HostError::GenerationMismatch`].
    pub async fn export_batch(
        &self,
        mirror: Uuid,
        spec: ExportSpec,
        ask: &Ask,
    ) -> Result<SealedBatch, HostError> {
        let record = self.mirror(mirror)?;
        let pages = pages_of(&spec.ranges)?;
        if pages.is_empty() && !spec.last {
            let detail = "there is nothing to seal, and the session does not end";
            return Err(HostError::Invalid(vec![FieldError::new("/ranges", "out_of_range", detail)]));
        }
        let guest = self.inner.find_guest(&record.guest.to_string())?;
        guest.ask(|reply| Command::Export { mirror, spec, pages, ask: ask.clone(), reply }).await
    }

    /// One step of an import into a paused guest.
    ///
    /// # Errors
    /// As [`Host::export_batch`]; [`HostError::BatchRefused`], after which the import is over.
    pub async fn import_step(
        &self,
        mirror: Uuid,
        step: ImportStep,
        ask: &Ask,
    ) -> Result<ImportReport, HostError> {
        let record = self.mirror(mirror)?;
        if let ImportStep::Batch(batch) = &step
            && batch.records.len() > BATCH_BYTES_MAX
        {
            let detail = format!("more than {BATCH_BYTES_MAX} bytes");
            return Err(HostError::Invalid(vec![FieldError::new("/batch/records", "out_of_range", detail)]));
        }
        let guest = self.inner.find_guest(&record.guest.to_string())?;
        guest.ask(|reply| Command::Import { mirror, step, ask: ask.clone(), reply }).await
    }
}

/// The ranges of a batch's pages that cannot be exported: what the helper would refuse, said by range.
pub(in crate::host) fn check_reach(
    plan: &Arc<crate::address_space::MirrorPlan>,
    shared: &crate::pages::PageSet,
    spec: &ExportSpec,
) -> Result<(), HostError> {
    for (i, (at, len)) in spec.ranges.iter().enumerate() {
        for a in (*at..at + len).step_by(PAGE_SIZE as usize) {
            let page = RamAddr::new(a).page();
            let wrong = if plan.helper_page(page).is_none() {
                Some(("not_reachable", "is no RAM of the guest that this mirror reaches"))
            } else if shared.contains(page) {
                Some(("shared", "is shared with the host by the guest: there is nothing to seal"))
            } else {
                None
            };
            if let Some((code, why)) = wrong {
                let error = FieldError::new(format!("/ranges/{i}"), code, format!("the page at {a} {why}"));
                return Err(HostError::Invalid(vec![error]));
            }
        }
    }
    Ok(())
}
