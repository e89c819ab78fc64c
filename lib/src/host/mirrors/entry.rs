//! What readers see of a mirror without asking its guest's owner.

use std::sync::{Arc, RwLock};

use jiff::Timestamp;
use uuid::Uuid;

use crate::codes::{Capability, Code};
use crate::host::registry::{Facet, Listed};
use crate::host::{
    Expected, Fault, FieldError, HostError, MirrorRecord, MirrorState, ResourceKind, WorkerInfo,
};
use crate::mirror::{MirrorWatch, Placement, PlacementError};
use crate::sync::Shared;

/// A mirror as others see it.
pub(in crate::host) struct MirrorEntry {
    pub id: Uuid,
    pub guest: Uuid,
    created_at: Timestamp,
    record: RwLock<MirrorRecord>,
    watch: RwLock<MirrorWatch>,
}

impl Listed for MirrorEntry {
    fn id(&self) -> Uuid {
        self.id
    }

    fn name(&self) -> Option<Arc<str>> {
        None
    }

    fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// Its state is none: a mirror fails without telling anybody.
    fn facets(&self) -> Vec<Facet> {
        vec![Facet::Guest(self.guest)]
    }
}

impl MirrorEntry {
    pub fn new(record: MirrorRecord, watch: MirrorWatch) -> Self {
        let (id, guest, created_at) = (record.id, record.guest, record.created_at);
        Self { id, guest, created_at, record: RwLock::new(record), watch: RwLock::new(watch) }
    }

    pub fn set_state(&self, state: MirrorState, error: Option<Fault>) {
        let mut record = self.record.to_write();
        record.state = state;
        record.error = error;
        record.generation += 1;
    }

    /// Changes where its threads run, and notes it, if it is at the expected generation then.
    pub fn place(
        &self,
        change: impl FnOnce(&Placement) -> Result<Placement, HostError>,
        expected: &Expected,
    ) -> Result<MirrorRecord, HostError> {
        let watch = self.watch();
        {
            let mut record = self.record.to_write();
            expected.check(ResourceKind::Mirror, record.generation)?;
            let placement = change(&record.placement)?;
            watch.place(&placement).map_err(placement_error)?;
            record.placement = placement;
            record.generation += 1;
        }
        Ok(self.record())
    }

    /// A view of its workers.
    pub fn watch(&self) -> MirrorWatch {
        self.watch.to_read().clone()
    }

    /// Its helper was started anew: other threads.
    pub fn revive(&self, watch: MirrorWatch) {
        *self.watch.to_write() = watch;
        self.set_state(MirrorState::Ready, None);
    }

    /// The record with the workers as they are now.
    pub fn record(&self) -> MirrorRecord {
        let mut record = self.record.to_read().clone();
        let stats = self.watch().stats();
        if let Some(end) = stats.iter().find_map(|s| s.ended) {
            record.state = MirrorState::Failed;
            record.error = Some(Fault::new(Code::HelperFailed, end.to_string()));
        }
        record.workers =
            stats.iter().map(|s| WorkerInfo { tid: s.tid, exits: s.exits, cpu_ns: s.cpu_ns }).collect();
        record
    }
}

/// Why threads are not where a caller wants them.
pub(in crate::host) fn placement_error(e: PlacementError) -> HostError {
    match e {
        PlacementError::NoSuchCpu => {
            HostError::Invalid(vec![FieldError::new("/placement/cpus", "out_of_range", e.to_string())])
        }
        PlacementError::Forbidden => HostError::lacks(Capability::Scheduling, e.to_string()),
        PlacementError::Kernel(_) => HostError::internal("placing a mirror's threads", e),
    }
}
