//! ASIDs as KVM hands them out, and what the memory controller holds for each.
//!
//! KVM (arch/x86/kvm/svm/sev.c, sev_asid_new and sev_flush_asids): SEV-ES guests have the ASIDs below a
//! limit, SEV guests those from it on. An ASID that was given back is not used again until all caches were
//! written back (WBINVD) and the data fabric was flushed (DF_FLUSH), which KVM does when it has no other
//! left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::MemoryKey;
use crate::sev::FirmwareError;

/// How many guests of each kind a platform can have at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsidLimits {
    /// Of SEV-ES: ASIDs from 1 on.
    pub es: u32,
    /// Of SEV: the ASIDs after those.
    pub sev: u32,
}

impl Default for AsidLimits {
    /// Those of a common second-generation server with the firmware's defaults.
    fn default() -> Self {
        Self { es: 99, sev: 410 }
    }
}

impl AsidLimits {
    const fn span(self, es: bool) -> std::ops::RangeInclusive<u32> {
        if es { 1..=self.es } else { self.es + 1..=self.es + self.sev }
    }
}

/// The table of ASIDs and who has them.
#[derive(Debug, Default)]
pub(super) struct Asids {
    limits: AsidLimits,
    /// Given to a VM.
    used: BTreeSet<u32>,
    /// Given back and not flushed since.
    stale: BTreeSet<u32>,
    /// The keys that the memory controller holds, by ACTIVATE, and the guest's handle.
    active: BTreeMap<u32, (u32, Arc<MemoryKey>)>,
    /// Deactivated since the last DF_FLUSH; the firmware's own account.
    unflushed: BTreeSet<u32>,
    /// Caches were written back since the last DEACTIVATE.
    written_back: bool,
}

impl Asids {
    pub fn new(limits: AsidLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// One for a new VM, flushing if there is no other; `None` when all are in use (KVM: EBUSY).
    pub fn take(&mut self, es: bool) -> Option<u32> {
        let span = self.limits.span(es);
        let free = |s: &Self| span.clone().find(|a| !s.used.contains(a) && !s.stale.contains(a));
        let asid = free(self).or_else(|| {
            if !span.clone().any(|a| self.stale.contains(&a)) {
                return None;
            }
            self.write_back();
            self.df_flush().expect("caches were written back");
            self.stale.clear();
            free(self)
        })?;
        self.used.insert(asid);
        Some(asid)
    }

    /// A VM is gone.
    pub fn give_back(&mut self, asid: u32) {
        self.used.remove(&asid);
        self.stale.insert(asid);
    }

    /// How many ASIDs are in use.
    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    /// WBINVD on all cores.
    pub fn write_back(&mut self) {
        self.written_back = true;
    }

    /// DF_FLUSH.
    ///
    /// # Errors
    /// WBINVD_REQUIRED: first.
    pub fn df_flush(&mut self) -> Result<(), FirmwareError> {
        if !self.unflushed.is_empty() && !self.written_back {
            return Err(FirmwareError::WbinvdRequired);
        }
        self.unflushed.clear();
        Ok(())
    }

    /// ACTIVATE: loads the key of guest `handle`.
    ///
    /// # Errors
    /// INVALID_ASID: of the other kind, or none. ASID_OWNED: by another guest. ACTIVE: this guest has one
    /// already. DF_FLUSH_REQUIRED: it was used before.
    pub fn activate(
        &mut self,
        asid: u32,
        handle: u32,
        es: bool,
        key: &Arc<MemoryKey>,
    ) -> Result<(), FirmwareError> {
        if !self.limits.span(es).contains(&asid) {
            return Err(FirmwareError::InvalidAsid);
        }
        if self.active.contains_key(&asid) {
            return Err(FirmwareError::AsidOwned);
        }
        if self.active.values().any(|(h, _)| *h == handle) {
            return Err(FirmwareError::Active);
        }
        if self.unflushed.contains(&asid) {
            return Err(FirmwareError::DfFlushRequired);
        }
        self.active.insert(asid, (handle, Arc::clone(key)));
        Ok(())
    }

    /// DEACTIVATE: the memory controller forgets the key of guest `handle`. Nothing for one that has no ASID.
    pub fn deactivate(&mut self, handle: u32) {
        let Some(asid) = self.active.iter().find_map(|(asid, (h, _))| (*h == handle).then_some(*asid)) else {
            return;
        };
        self.active.remove(&asid);
        self.unflushed.insert(asid);
        self.written_back = false;
    }

    /// The key that memory accesses under `asid` use.
    pub fn key(&self, asid: u32) -> Option<Arc<MemoryKey>> {
        self.active.get(&asid).map(|(_, key)| Arc::clone(key))
    }

    /// Whether guest `handle` has an ASID.
    pub fn is_active(&self, handle: u32) -> bool {
        self.active.values().any(|(h, _)| *h == handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Arc<MemoryKey> {
        Arc::new(MemoryKey::new(&[1; 32]))
    }

    #[test]
    fn kinds_have_their_own_ranges_and_limits() {
        let mut asids = Asids::new(AsidLimits { es: 2, sev: 1 });
        assert_eq!([asids.take(true), asids.take(true), asids.take(true)], [Some(1), Some(2), None]);
        assert_eq!([asids.take(false), asids.take(false)], [Some(3), None]);
        assert_eq!(asids.activate(3, 1, true, &key()), Err(FirmwareError::InvalidAsid));
        assert_eq!(asids.activate(0, 1, true, &key()), Err(FirmwareError::InvalidAsid));
        assert_eq!(asids.activate(1, 1, false, &key()), Err(FirmwareError::InvalidAsid));
    }

    #[test]
    fn an_asid_is_reused_after_a_flush_alone() {
        let mut asids = Asids::new(AsidLimits { es: 0, sev: 1 });
        let asid = asids.take(false).unwrap();
        asids.activate(asid, 7, false, &key()).unwrap();
        assert_eq!(asids.activate(asid, 8, false, &key()), Err(FirmwareError::AsidOwned));
        asids.deactivate(7);
        assert!(asids.key(asid).is_none());
        assert_eq!(asids.activate(asid, 8, false, &key()), Err(FirmwareError::DfFlushRequired));
        assert_eq!(asids.df_flush(), Err(FirmwareError::WbinvdRequired));
        asids.give_back(asid);
        assert_eq!(asids.take(false), Some(asid), "KVM flushes when it has no other");
        asids.activate(asid, 8, false, &key()).unwrap();
    }
}
