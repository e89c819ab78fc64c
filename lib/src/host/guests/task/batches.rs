//! Sealed batches through a mirror that its guest's owner keeps.
//!
//! Owns: the session beside a mirror, and that a helper which has imported is never a source again. Must not
//! know: how pages are sealed.

use std::sync::Arc;

use uuid::Uuid;

use crate::host::events::Change;
use crate::host::mirrors::batches::BatchSession;
use crate::host::{
    Ask, BatchRefusal, ExportSpec, FieldError, GuestRecord, GuestState, HostError, ImportReport, ImportStep,
    MirrorState, ProtectionLevel, ResourceKind, SealedBatch, Subject,
};
use mirrorvm_abi::op::Status;

use crate::addr::RamPage;
use crate::address_space::{Addressing, GuestLayout};
use crate::mirror::{BatchFault, BatchTerms, Greeting, LaneError, Mirror, parse_records};
use crate::pages::PageSet;

use super::Owner;

impl Owner {
    pub(super) fn terms<'a>(
        session: Uuid,
        record: &'a GuestRecord,
        layout: &'a GuestLayout,
        addressing: Addressing,
    ) -> BatchTerms<'a> {
        BatchTerms { session, guest: record.id, layout, addressing }
    }

    pub(super) fn export(
        &mut self,
        id: Uuid,
        spec: &ExportSpec,
        pages: &[RamPage],
        ask: &Ask,
    ) -> Result<SealedBatch, HostError> {
        let mirror = self.own_mirror(id, ask)?;
        let plan = Arc::clone(mirror.plan());
        crate::host::mirrors::batches::check_reach(&plan, &self.shared_pages(), spec)?;
        let in_use = |session: &BatchSession| {
            let user = format!("the export or import {}", session.import());
            HostError::InUse { kind: ResourceKind::Mirror, user }
        };
        let running = match self.batches.get(&id) {
            Some(BatchSession::Exporting { import, importer, exporter, epoch })
                if *import == spec.import && *importer == spec.importer =>
            {
                Some((*exporter, *epoch))
            }
            Some(other) => return Err(in_use(other)),
            None => None,
        };
        let mut batch = SealedBatch {
            import: spec.import,
            epoch: running.map_or(1, |(_, epoch)| epoch),
            exporter: running.map_or_else(Greeting::default, |(exporter, _)| exporter),
            addressing: plan.addressing,
            pages: pages.len() as u32,
            records: Vec::new(),
            token: [0; mirrorvm_abi::record::TOKEN_BYTES],
            last: spec.last,
            guest_state: self.state,
        };
        if ask.dry_run {
            return Ok(batch);
        }
        let record = self.entry.record();
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        let mirror = self.mirrors.get_mut(&id).ok_or_else(missing)?;
        let sealed = match running {
            Some(_) => Ok(batch.exporter),
            None => {
                let layout = record.layout.clone();
                let terms = Self::terms(spec.import, &record, &layout, plan.addressing);
                mirror.begin_export(&terms, spec.importer)
            }
        };
        let sealed = sealed.and_then(|exporter| Ok((exporter, mirror.export_batch(pages, batch.epoch)?)));
        let (exporter, (records, token)) = match sealed {
            Ok(done) => done,
            Err(e) => {
                // A session half open is of no use to anybody.
                let _ = mirror.cancel();
                self.end_batches(id);
                return Err(helper_error(e, NONCE));
            }
        };
        batch.exporter = exporter;
        batch.records = records;
        batch.token = token;
        if spec.last {
            let ended = mirror.cancel();
            self.end_batches(id);
            ended.map_err(|e| helper_error(e, NONCE))?;
        } else {
            let (import, importer, epoch) = (spec.import, spec.importer, batch.epoch + 1);
            self.batches.insert(id, BatchSession::Exporting { import, importer, exporter, epoch });
            if running.is_none() {
                self.inner.set_mirror_state(id, MirrorState::Busy, None);
            }
        }
        Ok(batch)
    }

    pub(super) fn end_batches(&mut self, id: Uuid) {
        if self.batches.remove(&id).is_some() {
            self.inner.set_mirror_state(id, MirrorState::Ready, None);
        }
    }

    /// Pages that the guest shares with its host: never sealed.
    pub(super) fn shared_pages(&self) -> PageSet {
        self.machine.as_ref().map(|m| m.encryption().shared()).unwrap_or_default()
    }

    pub(super) fn import(
        &mut self,
        id: Uuid,
        step: ImportStep,
        ask: &Ask,
    ) -> Result<ImportReport, HostError> {
        let _ = self.own_mirror(id, ask)?;
        let record = self.entry.record();
        if record.protection != ProtectionLevel::None {
            let why = "writing earlier pages into an encrypted guest is a rollback, to which its owner has not agreed";
            return Err(HostError::PolicyForbids { why: why.to_owned() });
        }
        if self.state != GuestState::Paused && !matches!(step, ImportStep::Close(_)) {
            let current = self.state.name();
            return Err(HostError::WrongState {
                kind: ResourceKind::Guest.into(),
                current,
                allowed: &["paused"],
            });
        }
        match step {
            ImportStep::Open => self.open_import(id, ask),
            ImportStep::Batch(batch) => self.import_batch(id, &record, &batch, ask),
            ImportStep::Close(import) => {
                let session = self.batches.get(&id).copied();
                match session {
                    Some(
                        BatchSession::Opened { import: i, .. } | BatchSession::Receiving { import: i, .. },
                    ) if i == import => {
                        if !ask.dry_run {
                            self.renew_helper(id, &record)?;
                        }
                        Ok(ImportReport { import, state: "closed", importer: None, written: Vec::new() })
                    }
                    _ => Err(HostError::missing(Subject::Import, import.to_string())),
                }
            }
        }
    }

    pub(super) fn open_import(&mut self, id: Uuid, ask: &Ask) -> Result<ImportReport, HostError> {
        if let Some(session) = self.batches.get(&id) {
            let user = format!("the export or import {}", session.import());
            return Err(HostError::InUse { kind: ResourceKind::Mirror, user });
        }
        let import = Uuid::now_v7();
        if ask.dry_run {
            return Ok(ImportReport { import, state: "open", importer: None, written: Vec::new() });
        }
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        let mirror = self.mirrors.get_mut(&id).ok_or_else(missing)?;
        let importer = mirror.hello().map_err(|e| helper_error(e, BATCH_NONCE))?;
        self.batches.insert(id, BatchSession::Opened { import, importer });
        self.inner.set_mirror_state(id, MirrorState::Busy, None);
        Ok(ImportReport { import, state: "open", importer: Some(importer), written: Vec::new() })
    }

    pub(super) fn import_batch(
        &mut self,
        id: Uuid,
        record: &GuestRecord,
        batch: &SealedBatch,
        ask: &Ask,
    ) -> Result<ImportReport, HostError> {
        let missing = || HostError::missing(Subject::Import, batch.import.to_string());
        let bad =
            |at: &str, code, detail: String| HostError::Invalid(vec![FieldError::new(at, code, detail)]);
        let session = self.batches.get(&id).copied().filter(|s| s.import() == batch.import);
        let (begun, epoch, open) = match session.ok_or_else(missing)? {
            BatchSession::Opened { importer, .. } => (None, 1, Some(importer)),
            BatchSession::Receiving { exporter, epoch, .. } => (Some(exporter), epoch, None),
            BatchSession::Exporting { .. } => return Err(missing()),
        };
        let groups =
            parse_records(&batch.records).map_err(|e| bad("/batch/records", "not_records", e.to_string()))?;
        let mirror = self.mirrors.get_mut(&id).ok_or_else(missing)?;
        let plan = Arc::clone(mirror.plan());
        if batch.addressing != plan.addressing {
            let detail = "the mirror's strategy calls pages by other addresses than the exporting one's";
            return Err(bad("/batch/addressing", "other_addressing", detail.to_owned()));
        }
        let listed = || groups.iter().flat_map(|group| &group.pages);
        if listed().count() != batch.pages as usize {
            let detail = format!("the records are of {} pages", listed().count());
            return Err(bad("/batch/pages", "out_of_range", detail));
        }
        // As far as the host can tell; the helper says whether they may be written.
        let named: Vec<RamPage> = listed().map_while(|p| plan.ram_page(p.page)).collect();
        if ask.dry_run {
            let state = if begun.is_some() { "receiving" } else { "open" };
            return Ok(ImportReport { import: batch.import, state, importer: open, written: Vec::new() });
        }
        let begin = match begun {
            Some(_) => Ok(()),
            None => {
                let terms = Self::terms(batch.import, record, &record.layout, plan.addressing);
                mirror.begin_import(&terms, batch.exporter).map_err(BatchFault::Lane)
            }
        };
        let done = begin.and_then(|()| mirror.import_batch(&batch.records, &groups, epoch, &batch.token));
        let refused = match done {
            Ok(()) if !batch.last => {
                let (import, exporter) = (batch.import, begun.unwrap_or(batch.exporter));
                let next = BatchSession::Receiving { import, exporter, epoch: epoch + 1 };
                self.batches.insert(id, next);
                None
            }
            Ok(()) => {
                self.renew_helper(id, record)?;
                None
            }
            Err(BatchFault::Refused { status, index }) => {
                self.renew_helper(id, record)?;
                Some((crate::host::mirrors::batches::code_of(status), index))
            }
            Err(BatchFault::Lane(e)) => {
                self.renew_helper(id, record)?;
                return Err(helper_error(e, BATCH_NONCE));
            }
        };
        let written = refused.map_or(named.len(), |(_, index)| index.min(named.len()));
        let written = crate::host::mirrors::batches::runs(named.into_iter().take(written));
        match refused {
            None => {
                let state = if batch.last { "closed" } else { "receiving" };
                Ok(ImportReport { import: batch.import, state, importer: None, written })
            }
            Some((code, index)) => Err(HostError::BatchRefused(BatchRefusal { code, index, written })),
        }
    }

    /// A helper that has imported is never a source again: the mirror gets a fresh one, with the session's
    /// keys gone.
    pub(super) fn renew_helper(&mut self, id: Uuid, record: &GuestRecord) -> Result<(), HostError> {
        self.batches.remove(&id);
        let missing = || HostError::missing(ResourceKind::Mirror, id.to_string());
        let entry = self.inner.mirror_entry(id).ok_or_else(missing)?;
        let shown = entry.record();
        let (old, machine) = (self.mirrors.remove(&id), self.machine.as_ref());
        let workers = old.as_ref().map_or(1, Mirror::worker_count);
        // Before the next one: they may use the same memory.
        drop(old);
        let made = machine.ok_or_else(missing).and_then(|machine| {
            let image = self.inner.image_measuring(&shown.helper_measurement)?.ok_or_else(missing)?;
            let mirror = self.inner.make_mirror(record, machine.as_ref(), shown.strategy, workers, &image)?;
            mirror.place(&shown.placement).map_err(crate::host::mirrors::entry::placement_error)?;
            Ok(mirror)
        });
        match made {
            Ok(mirror) => {
                entry.revive(mirror.watch());
                self.mirrors.insert(id, mirror);
                self.inner.tell_mirror(&entry, Change::StateChanged);
                self.inner.changed();
                Ok(())
            }
            Err(e) => {
                self.inner.forget_mirror(id);
                Err(e)
            }
        }
    }
}

/// Where a request to export says what the other helper greeted with, and where one to import does.
const NONCE: &str = "/nonce";
const BATCH_NONCE: &str = "/batch/nonce";

/// What a helper's refusal of a control operation, or its failure, is to a caller who said at `nonce` what
/// the other helper greeted with.
fn helper_error(e: LaneError, nonce: &str) -> HostError {
    match e {
        LaneError::Refused { status: Status::WrongState | Status::Busy, .. } => {
            HostError::WrongState { kind: Subject::Helper, current: "in a session", allowed: &["idle"] }
        }
        LaneError::Refused { status: Status::PolicyForbids, .. } => {
            HostError::PolicyForbids { why: "the guest must not leave its platform, in no part".to_owned() }
        }
        LaneError::Refused { status: Status::EvidenceRefused, .. } => {
            let why = "the guest's owner demands evidence of where pages go, and whoever imports a batch shows none";
            HostError::PolicyForbids { why: why.to_owned() }
        }
        LaneError::Refused { status: Status::KeyRefused, .. } => {
            let detail = "its second half is a public key that keeps nothing secret; hand on what the other mirror gave";
            HostError::Invalid(vec![FieldError::new(nonce, "not_a_key", detail)])
        }
        LaneError::Refused { status: Status::PageRefused, index } => {
            HostError::Invalid(vec![FieldError::new(
                "/ranges",
                "not_reachable",
                format!("the helper refuses page {index} of the ranges"),
            )])
        }
        e => HostError::internal("an operation of the helper", e),
    }
}
