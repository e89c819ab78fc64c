//! A modelled security processor, shared by the VMs of a modelled host.

use std::sync::{Arc, Mutex, MutexGuard};

use super::MemoryKey;
use super::asids::AsidLimits;
use super::context::ModelContext;
use super::firmware::{API, BUILD, Firmware};
use crate::sev::random::Random;
use crate::sev::{Endorsement, FirmwareError, PdhCert, Platform, PlatformStatus, SevError};
use crate::sync::Locked;

/// A security processor that protects nothing, with KVM's table of ASIDs beside it.
pub struct ModelPlatform {
    /// One command at a time: the real processor has one mailbox.
    firmware: Mutex<Firmware>,
}

impl std::fmt::Debug for ModelPlatform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ModelPlatform")
    }
}

impl ModelPlatform {
    /// With keys of its own and the usual number of ASIDs.
    pub fn new() -> Arc<Self> {
        Self::with_limits(AsidLimits::default())
    }

    /// With `limits` on guests.
    pub fn with_limits(limits: AsidLimits) -> Arc<Self> {
        Self::with_random(Random::system(), limits)
    }

    /// With all keys from `seed`, for tests that must repeat.
    pub fn seeded(seed: u64, limits: AsidLimits) -> Arc<Self> {
        Self::with_random(Random::seeded(seed), limits)
    }

    /// Of another chip than all others of the model: what stands for those does not stand for it.
    pub fn of_another_chip() -> Arc<Self> {
        let platform = Self::new();
        platform.lock().change_chip();
        platform
    }

    fn with_random(random: Random, limits: AsidLimits) -> Arc<Self> {
        Arc::new(Self { firmware: Mutex::new(Firmware::new(random, limits)) })
    }

    /// The context of a new VM of this host. Give it to one VM.
    pub fn context(self: &Arc<Self>) -> Arc<ModelContext> {
        ModelContext::new(self)
    }

    /// ASIDs that VMs of this host hold.
    pub fn asids_in_use(&self) -> usize {
        self.lock().asids.in_use()
    }

    /// The key under which memory accesses with `asid` go, once ACTIVATE loaded it.
    pub(super) fn key(&self, asid: u32) -> Option<Arc<MemoryKey>> {
        self.lock().asids.key(asid)
    }

    /// The firmware, for one command.
    pub(super) fn lock(&self) -> MutexGuard<'_, Firmware> {
        // A panic in between leaves whole values: every command changes a guest after its last check.
        self.firmware.locked()
    }

    /// Runs one command of the firmware.
    pub(super) fn command<T>(
        &self,
        command: &'static str,
        f: impl FnOnce(&mut Firmware) -> Result<T, FirmwareError>,
    ) -> Result<T, SevError> {
        f(&mut self.lock()).map_err(|code| SevError::Firmware { command, code })
    }
}

impl Platform for ModelPlatform {
    fn is_modelled(&self) -> bool {
        true
    }

    fn status(&self) -> Result<PlatformStatus, SevError> {
        Ok(PlatformStatus { api: API, build: BUILD, es: true, guests: self.lock().guests() })
    }

    fn pdh(&self) -> Result<PdhCert, SevError> {
        Ok(self.lock().pdh().clone())
    }

    fn endorsement(&self) -> Result<Endorsement, SevError> {
        Ok(self.lock().endorsement().clone())
    }
}
