//! The launch of an SEV guest, from INIT to LAUNCH_FINISH, with this host in the guest owner's part.
//!
//! Everything that a helper needs later is loaded, encrypted and measured here, once for the guest's block
//! and once more for a copy that no address of the guest leads to: no host can write encrypted memory
//! afterwards. Written against the trait alone; real firmware has never run it (there is no such hardware
//! here).

use std::sync::Arc;

use mirrorvm_abi::config;
use mirrorvm_abi::evidence::Release;

use crate::addr::PageRange;
use crate::guest::{AttestationSpec, LaunchedHelper, MachineError, helper_block};
use crate::hypervisor::Vm;
use crate::memory::{GuestRam, Mapping, Secret};
use crate::sev::model::MemoryKey;
use crate::sev::{Context, CopySource, GuestOwner, Platform, Policy, SevError};

/// How a guest is to be launched.
pub struct SevSetup {
    /// The security processor.
    pub platform: Arc<dyn Platform>,
    /// The policy in force.
    pub policy: Policy,
    /// SEV-ES.
    pub es: bool,
    /// The helper image.
    pub image: Vec<u8>,
    /// Configuration and page tables of every strategy that a mirror may be made by: offset in the helper's
    /// block, bytes.
    pub sets: Vec<(u64, Vec<u8>)>,
    /// What the guest's owner demands of a destination; `None`: what is the default at its level.
    pub attestation: Option<AttestationSpec>,
}

/// A launch, going on or done.
pub(super) struct SevLaunch {
    setup: SevSetup,
    context: Arc<dyn Context>,
    owner: GuestOwner,
    /// Over everything that was added, in order.
    digest: ring::digest::Context,
    /// Over what is added where such a guest waits for pages from elsewhere: nothing of its own content.
    arrival: ring::digest::Context,
    release: Option<Arc<Release>>,
    private: Arc<Mapping>,
    secrets: Vec<(Arc<Mapping>, u64)>,
    sets: Arc<[(u64, [u8; 32])]>,
    finished: bool,
}

impl SevLaunch {
    /// INIT, region registration, LAUNCH_START.
    pub fn begin(vm: &dyn Vm, setup: SevSetup, ram: &GuestRam) -> Result<Self, MachineError> {
        let context = vm.sev().ok_or(MachineError::Unsupported { what: "encrypt memory" })?;
        context.init(setup.es)?;
        let layout = ram.layout();
        for block in layout.blocks() {
            let memory = ram.mapping(block).ok_or(MachineError::NothingPlugged)?;
            context.register_region(memory, 0, block.size)?;
        }
        let helper = layout.helper().ok_or(MachineError::NothingPlugged)?;
        let private = Mapping::memfd("mirrorvm.private", helper.size)?;
        context.register_region(&private, 0, helper.size)?;
        let owner = GuestOwner::new(&setup.platform.pdh()?, setup.policy)?;
        context.launch_start(setup.policy, Some(owner.session()))?;
        let sets = setup.sets.iter().map(|(at, bytes)| (*at, helper_block::digest(bytes))).collect();
        Ok(Self {
            setup,
            context,
            owner,
            digest: ring::digest::Context::new(&ring::digest::SHA256),
            arrival: ring::digest::Context::new(&ring::digest::SHA256),
            release: None,
            private,
            secrets: Vec::new(),
            sets,
            finished: false,
        })
    }

    /// Encrypts and measures `launched` parts of the guest, then the helper, twice.
    pub fn add(&mut self, ram: &GuestRam, launched: &[PageRange]) -> Result<(), MachineError> {
        for range in launched {
            let at = crate::addr::RamAddr::new(range.start());
            let (memory, offset) = ram.locate(at, range.len()).map_err(|_| MachineError::NothingPlugged)?;
            self.update(&Arc::clone(memory), offset, range.len(), false)?;
        }
        let layout = ram.layout();
        let block = layout.helper().ok_or(MachineError::NothingPlugged)?;
        let helper = Arc::clone(ram.mapping(block).ok_or(MachineError::NothingPlugged)?);
        let placement = helper_block::placement(ram, &self.setup.image)?;
        for memory in [helper, Arc::clone(&self.private)] {
            helper_block::fill(&memory, &self.setup.image, &placement, None, &self.setup.sets);
            // Room for digests lies behind: what is there is never read before the helper has written it.
            self.update(&memory, 0, placement.block_len(), true)?;
            self.secrets.push((memory, placement.secret_at));
        }
        Ok(())
    }

    /// LAUNCH_UPDATE_DATA, and what the guest's owner expects of it. `everywhere`: also where the guest only
    /// waits for pages.
    fn update(
        &mut self,
        memory: &Mapping,
        offset: u64,
        len: u64,
        everywhere: bool,
    ) -> Result<(), MachineError> {
        let mut page = [0; 4096];
        for at in (offset..offset + len).step_by(4096) {
            memory.read(at, &mut page);
            self.digest.update(&page);
            if everywhere {
                self.arrival.update(&page);
            }
        }
        Ok(self.context.launch_update_data(memory, offset, len)?)
    }

    /// SEV-ES: encrypts and measures the save areas of the guest's vCPUs.
    pub fn add_vcpus(&mut self) -> Result<(), MachineError> {
        if self.setup.es {
            for area in add_save_areas(self.context.as_ref())? {
                self.digest.update(&area);
                // A vCPU that was never entered has nothing there (the model's; real areas are not computed).
                self.arrival.update(&vec![0; area.len()]);
            }
        }
        Ok(())
    }

    /// Measures, compares, delivers the secret, ends the launch. `mirror_areas`: save areas of the mirror's
    /// vCPUs, which were measured after the guest's.
    pub fn finish(&mut self, secret: &Secret<32>, mirror_areas: &[Vec<u8>]) -> Result<(), MachineError> {
        if self.finished {
            return Ok(());
        }
        if self.setup.es && !self.setup.platform.is_modelled() {
            let why = "the content of real save areas is not computed here, so the launch cannot be checked";
            return Err(
                SevError::Unsupported { what: "launching an SEV-ES guest on real firmware", why }.into()
            );
        }
        // Mirrors of one definition are entered alike at all hosts.
        for area in mirror_areas {
            self.digest.update(area);
            self.arrival.update(area);
        }
        let measurement = self.context.launch_measure()?;
        let (expected, arrival) = (finished(&self.digest), finished(&self.arrival));
        let modelled = self.setup.platform.is_modelled();
        let attestation = self.setup.attestation.clone();
        let release = attestation
            .unwrap_or(AttestationSpec::default_at(modelled))
            .release(modelled, arrival)
            .ok_or(MachineError::Unsupported { what: "demand evidence of platforms that are not named" })?;
        let status = self.setup.platform.status()?;
        let mut verified =
            self.owner.verify(&status, &expected, &measurement).map_err(|_| MachineError::Measurement)?;
        let span = helper_block::secret_span(secret, &release);
        for (memory, at) in &self.secrets {
            let (header, packet) = verified.secret(span.as_slice())?;
            self.context.launch_secret(&header, &packet, memory, *at)?;
        }
        self.context.launch_finish()?;
        self.release = Some(Arc::new(release));
        self.finished = true;
        Ok(())
    }

    /// What a mirror finds.
    pub fn helper(&self) -> LaunchedHelper {
        LaunchedHelper {
            context: Arc::clone(&self.context),
            es: self.setup.es,
            finished: self.finished,
            policy: self.setup.policy,
            platform: Arc::clone(&self.setup.platform),
            sets: Arc::clone(&self.sets),
            release: self.release.clone(),
            private: Arc::clone(&self.private),
        }
    }

    /// The memory controller's key, when it is a model's.
    pub fn modelled_key(&self) -> Option<Arc<MemoryKey>> {
        match self.context.copy_source() {
            CopySource::Model(context) => context.memory_key(),
            CopySource::Kernel(_) => None,
        }
    }
}

/// What a digest has come to.
fn finished(digest: &ring::digest::Context) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest.clone().finish().as_ref());
    out
}

/// LAUNCH_UPDATE_VMSA; gives what was measured, where that can be known.
///
/// # Errors
/// What firmware or kernel refuse.
pub fn add_save_areas(context: &dyn Context) -> Result<Vec<Vec<u8>>, SevError> {
    let read = |(memory, at): &(Arc<Mapping>, u64)| {
        let mut page = vec![0; 4096];
        memory.read(*at, &mut page);
        page
    };
    let areas = context.save_areas().iter().map(read).collect();
    context.launch_update_vmsa()?;
    Ok(areas)
}

impl LaunchedHelper {
    /// The level as the helper's configuration spells it.
    pub fn level(&self) -> u32 {
        level(self.platform.as_ref(), self.es)
    }
}

/// The level of guests of this platform, as the helper's configuration spells it.
pub fn level(platform: &dyn Platform, es: bool) -> u32 {
    match (platform.is_modelled(), es) {
        (true, _) => config::PROTECTION_MODELLED,
        (false, false) => config::PROTECTION_SEV,
        (false, true) => config::PROTECTION_SEV_ES,
    }
}
