//! Making machines, plans and mirrors of what a host manages.

use crate::codes::Capability;
use std::sync::Arc;

use super::guests::command::Command;
use super::guests::entry::GuestEntry;
use super::inner::{Inner, no_sev};
use super::{DriverSpec, GuestRecord, GuestSpec, HostError, LaunchMirror, SevSpec};
use crate::address_space::{
    self, Confidentiality, Declaration, GuestLayout, HostLimits, MailboxSize, MirrorPlan, PlanRequest,
    Refusal, Strategy, StrategyKind,
};
use crate::boot_files::BootFiles;
use crate::guest::drivers::{Beginning, Body, Driver, LayoutFault, MirrorsOn, Order};
use crate::guest::embedded::{SevSetup, level};
use crate::guest::{CarriedReadiness, Machine, MachineError};
use crate::hypervisor::Hypervisor;
use crate::memory::{Backing, Budget, Claim, GuestRam, MemoryError, Purpose, Secret};
use crate::mirror::{HelperImage, HelperSource, Mirror, MirrorError};
use crate::pages::PageSet;
use crate::sev::NotSent;

/// Slots of a worker: the helper seals half of them while the others are being sent. More were no faster
/// here, and each costs half a MiB.
const SLOTS: u32 = 5;

/// What a machine that waits for its memory must be told.
pub(super) struct IncomingMachine<'a> {
    pub secret: Secret<32>,
    pub machine_type: Option<&'a str>,
    pub paused: bool,
    pub readiness: CarriedReadiness,
    /// The mirror that the migration uses.
    pub mirror: LaunchMirror,
}

/// Memory of a guest that is about to be: there is enough of it, and nobody else gets it.
pub(super) struct GuestMemory {
    ram: GuestRam,
    /// What the guest's process takes for itself.
    process: Option<Claim>,
}

/// A machine, and the mirror that an SEV-ES guest is launched with.
pub(super) struct Made {
    pub machine: Box<dyn Machine>,
    pub layout: GuestLayout,
    /// The driver's part of the definition, where it was settled.
    pub settled: Option<DriverSpec>,
    pub mirror: Option<Mirror>,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// What is around it: a hypervisor, a mirror.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl MakeError {
    /// As a guest's record shows it.
    pub fn fault(&self) -> super::Fault {
        match self {
            Self::Machine(e) => super::faults::machine_fault(e),
            Self::Host(e) => super::faults::host_fault(e),
        }
    }
}

/// What an address space is planned for, beyond guest and strategy.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Limits; `None`: this host's.
    pub limits: Option<HostLimits>,
    /// A declaration to plan with; `None`: what the guest declared, else what the reference guest would.
    pub declaration: Option<Declaration>,
    /// What protects the guest; `None`: what does.
    pub confidentiality: Option<Confidentiality>,
    /// Whether the helper's text is in a read-only slot.
    pub read_only_text: bool,
    /// The helper image, by id or name; `None`: the built-in one.
    pub helper_image: Option<String>,
}

impl Inner {
    /// A guest's layout with the blocks that are not its own: save areas, the helper's.
    pub fn layout_for(&self, driver: &DriverSpec, bare: &GuestLayout) -> Result<GuestLayout, HostError> {
        let layout = self.driver(driver)?.layout(driver, bare, self.image.header());
        layout.map_err(|fault| match fault {
            LayoutFault::HelperMemory => HostError::NoResources { what: "helper memory", source: None },
            LayoutFault::Placing(e) => HostError::internal("placing the helper's block", e),
        })
    }

    /// Claims all the memory that a guest is going to have, and maps it; nothing of it is touched. What
    /// audits keep of guests that left is given up when it is needed.
    pub fn memory_for(
        &self,
        spec: &GuestSpec,
        layout: &GuestLayout,
        boot: Option<&BootFiles>,
    ) -> Result<GuestMemory, HostError> {
        self.audits.making_room(|| self.claim_memory(spec, layout, boot))
    }

    fn claim_memory(
        &self,
        spec: &GuestSpec,
        layout: &GuestLayout,
        boot: Option<&BootFiles>,
    ) -> Result<GuestMemory, HostError> {
        let driver = self.driver(&spec.driver)?;
        let own = driver.own_bytes(&spec.driver, boot);
        let claim = |bytes| Budget::of_this_process().claim(bytes, Backing::Anonymous, Purpose::Guest);
        let process = own.map(claim).transpose()?;
        let ram = driver.memory(&Arc::new(layout.clone()), backings_of(driver, spec.backing));
        Ok(GuestMemory { ram: ram.map_err(|e| HostError::memory("making memory for a guest", e))?, process })
    }

    /// Bytes of memory that [`Inner::memory_for`] a guest as it is claims, those of its program among them.
    pub fn claimed_bytes(&self, record: &GuestRecord) -> u64 {
        let driver = self.driver(&record.spec.driver).ok();
        let own = driver.and_then(|d| d.own_bytes(&record.spec.driver, record.boot.as_ref()));
        GuestRam::claimed_bytes(&record.layout).saturating_add(own.unwrap_or(0))
    }

    /// Whether [`Inner::memory_for`] a guest as it is would find enough now; claims nothing.
    pub fn has_memory_for(&self, record: &GuestRecord) -> Result<(), HostError> {
        let driver = self.driver(&record.spec.driver)?;
        let own = driver.own_bytes(&record.spec.driver, record.boot.as_ref());
        let backings = backings_of(driver, record.spec.backing);
        // What audits keep is given up for whoever comes in earnest. Asked first: what is free a moment later
        // has been counted.
        let kept = self.audits.bytes();
        match GuestRam::has_room(&record.layout, backings, own.unwrap_or(0)) {
            Err(short) if short.available.saturating_add(kept) < short.bytes => Err(short.into()),
            Err(_) | Ok(()) => Ok(()),
        }
    }

    /// What a definition's files hold; `None` for a driver that reads none. The files are opened here, so
    /// that a definition that is taken named files that could be read.
    pub fn boot_facts(&self, spec: &GuestSpec) -> Result<Option<BootFiles>, HostError> {
        let driver = self.driver(&spec.driver)?;
        driver.boot_files(&spec.definition(), &self.image_directories).map_err(HostError::Invalid)
    }

    /// What a guest's RAM would lie on now.
    pub fn backing_of(&self, record: &GuestRecord) -> Backing {
        let driver = self.drivers.of(&record.spec.driver);
        let list = driver.map_or(&[Backing::Memfd][..], |d| backings_of(d, record.spec.backing));
        let found = list.iter().find(|b| GuestRam::has_room(&record.layout, &[**b], 0).is_ok());
        found.or(list.last()).copied().unwrap_or(Backing::Memfd)
    }

    /// A machine for a guest, paused: booted afresh, or (`incoming`) waiting for memory and state.
    pub fn make_machine(
        &self,
        record: &GuestRecord,
        entry: &GuestEntry,
        memory: GuestMemory,
        incoming: Option<IncomingMachine<'_>>,
    ) -> Result<Made, MakeError> {
        let spec = &record.spec.driver;
        let driver = self.driver(spec)?;
        self.check_starts(spec)?;
        let GuestMemory { ram, process: own_memory } = memory;
        let ram = settled(ram, driver, backings_of(driver, record.spec.backing))?;
        let (secret, beginning, readiness, mirror) = match incoming {
            Some(i) => {
                let beginning = Beginning::Arrival { machine_type: i.machine_type, paused: i.paused };
                (i.secret, beginning, Some(i.readiness), Some(i.mirror))
            }
            None => (fresh_secret()?, Beginning::Boot, None, None),
        };
        // Full queue or gone guest: the owner looks after its machine by itself, too.
        let teller = entry.teller();
        let on_end = Arc::new(move |end| teller.tell(Command::Ended(end)));
        let teller = entry.teller();
        let on_readiness = Arc::new(move || teller.tell(Command::Touch));
        let home = self.home_layout(record)?;
        let hypervisor = self.hypervisor_of(driver).ok();
        let body = driver.make(Order {
            name: &short_name(record),
            id: record.id,
            guest: &record.spec.name,
            spec,
            home: &home,
            layout: &record.layout,
            ram,
            secret,
            beginning,
            hypervisor,
            helper_image: self.image.bytes(),
            declaration: self.reference_declaration(spec, &home),
            check_declaration: self.declaration_check(spec, &home),
            sev: hypervisor.map(|h| self.sev_setup(spec, &home, h)).transpose()?.flatten(),
            images: &self.image_directories,
            boot: record.boot.as_ref(),
            own_memory,
            on_end,
            on_readiness,
        })?;
        let es = self.facts(spec).sev.filter(|s| s.es);
        let made = self.launched(record, body, es.map(|s| mirror.unwrap_or(s.mirror)))?;
        if let Some(readiness) = readiness {
            made.machine.migration_control().adopt(readiness);
        }
        Ok(made)
    }

    /// Ends the launch of an encrypted guest; with SEV-ES its mirror is made on the way.
    fn launched(
        &self,
        record: &GuestRecord,
        body: Body,
        mirror: Option<LaunchMirror>,
    ) -> Result<Made, MakeError> {
        let Body { mut machine, layout, settled } = body;
        let mut made = None;
        if let Some(m) = mirror {
            made = Some(self.build_mirror(record, machine.as_ref(), m, &self.image, true)?);
        }
        let areas = made.as_ref().map_or(&[][..], Mirror::launched_areas);
        machine.finish_launch(areas)?;
        if let Some(mirror) = &mut made {
            mirror.wake().map_err(mirror_error)?;
        }
        Ok(Made { machine, layout, settled, mirror: made })
    }

    /// The layout that a guest was defined with: what its own page tables know.
    fn home_layout(&self, record: &GuestRecord) -> Result<GuestLayout, HostError> {
        let bare = super::validate::guest(&self.drivers, &record.spec)?;
        self.layout_for(&record.spec.driver, &bare)
    }

    /// Whether the guest's driver could start it in the RAM of its definition: by the same layout as a start.
    ///
    /// # Errors
    /// [`HostError::LayoutUnusable`].
    pub fn check_starts_in_its_ram(&self, record: &GuestRecord) -> Result<(), HostError> {
        let home = self.home_layout(record)?;
        let starts = self.driver(&record.spec.driver)?.starts_in(&record.spec.driver, &home);
        starts.map_err(|e| HostError::LayoutUnusable { why: super::faults::machine_fault(&e).detail })
    }

    fn sev_setup(
        &self,
        driver: &DriverSpec,
        home: &GuestLayout,
        hypervisor: &dyn Hypervisor,
    ) -> Result<Option<SevSetup>, HostError> {
        let Some(sev) = self.facts(driver).sev else { return Ok(None) };
        let platform = hypervisor.sev().ok_or_else(|| no_sev(hypervisor))?;
        let level = level(platform.as_ref(), sev.es);
        let declaration = self.reference_declaration(driver, home);
        let mut sets = Vec::new();
        for strategy in StrategyKind::ALL.iter().flat_map(|kind| kind.facts().at_launch) {
            // What cannot be planned now cannot be made later either; the refusal comes when somebody asks
            // for it.
            if let Ok(plan) = address_space::plan(&self.request(
                driver,
                home,
                *strategy,
                1,
                declaration.as_ref(),
                &self.image,
            )) {
                sets.extend(plan.set_contents(level, sev.policy.0));
            }
        }
        let image = self.image.bytes().to_vec();
        Ok(Some(SevSetup {
            platform,
            policy: sev.policy,
            es: sev.es,
            image,
            sets,
            attestation: sev.attestation,
        }))
    }

    /// What the reference guest's firmware declares.
    fn reference_declaration(&self, driver: &DriverSpec, home: &GuestLayout) -> Option<Declaration> {
        address_space::reference_declaration(home, self.image.header(), self.limits_of(driver))
    }

    /// Says what is wrong with what a guest declares.
    fn declaration_check(
        &self,
        driver: &DriverSpec,
        home: &GuestLayout,
    ) -> crate::guest::embedded::CheckDeclaration {
        let request = self.request(driver, home, Strategy::Declared, 1, None, &self.image);
        let (layout, helper) = (home.clone(), *request.helper);
        let (limits, mailbox, confidentiality) =
            (*self.limits_of(driver), request.mailbox, request.confidentiality);
        Arc::new(move |declaration: &Declaration| -> Vec<Refusal> {
            address_space::plan(&PlanRequest {
                layout: &layout,
                helper: &helper,
                limits: &limits,
                strategy: Strategy::Declared,
                mailbox,
                declaration: Some(declaration),
                shared: None,
                confidentiality,
                read_only_text: false,
            })
            .err()
            .unwrap_or_default()
        })
    }

    /// A request for a plan on this host, without the guest's present state.
    fn request<'a>(
        &'a self,
        driver: &DriverSpec,
        layout: &'a GuestLayout,
        strategy: Strategy,
        workers: u32,
        declaration: Option<&'a Declaration>,
        image: &'a HelperImage,
    ) -> PlanRequest<'a> {
        let sev = self.facts(driver).sev;
        let confidentiality = match &sev {
            None => Confidentiality::None,
            Some(SevSpec { es: false, .. }) => Confidentiality::Sev,
            Some(SevSpec { es: true, .. }) => Confidentiality::SevEs,
        };
        // Page tables of an encrypted guest's helper are made before anybody knows how many workers it gets.
        let workers = if sev.is_some() { mirrorvm_abi::layout::WORKERS_MAX } else { workers };
        PlanRequest {
            layout,
            helper: image.header(),
            limits: self.limits_of(driver),
            strategy,
            mailbox: MailboxSize { workers, slots: SLOTS },
            declaration,
            shared: None,
            confidentiality,
            read_only_text: false,
        }
    }

    /// Plans an address space for a guest as it is: its declaration, its shared pages.
    pub fn plan(
        &self,
        entry: &GuestEntry,
        strategy: Strategy,
        workers: u32,
        options: &PlanOptions,
    ) -> Result<MirrorPlan, HostError> {
        let record = entry.record();
        let driver = &record.spec.driver;
        self.check_strategy(driver, strategy)?;
        let declaration = options.declaration.clone().or_else(|| self.known_declaration(entry, &record));
        let shared = entry.encryption().map(|e| e.shared());
        let image = self.helper_image(driver, options.helper_image.as_deref())?;
        let request = self.request(driver, &record.layout, strategy, workers, declaration.as_ref(), &image);
        self.plan_request(PlanRequest {
            limits: options.limits.as_ref().unwrap_or(request.limits),
            shared: shared.as_ref(),
            confidentiality: options.confidentiality.unwrap_or(request.confidentiality),
            read_only_text: options.read_only_text,
            ..request
        })
    }

    /// Of a guest that runs, what it declared; of one that does not, what the reference guest is going to
    /// declare.
    pub fn known_declaration(&self, entry: &GuestEntry, record: &GuestRecord) -> Option<Declaration> {
        let driver = &record.spec.driver;
        match (entry.readiness(), self.drivers.of(driver).is_ok_and(Driver::declares)) {
            (Some(readiness), _) => readiness.declaration.as_deref().cloned(),
            (None, false) => None,
            (None, true) => {
                self.home_layout(record).ok().and_then(|home| self.reference_declaration(driver, &home))
            }
        }
    }

    /// Whether a guest of this driver can have a mirror of this strategy at all, whatever its layout.
    pub fn check_strategy(&self, driver: &DriverSpec, strategy: Strategy) -> Result<(), HostError> {
        // The planner refuses what the guest itself rules out, an unencrypted one among that.
        let Some(sev) = self.facts(driver).sev.filter(|_| strategy.is_sent_by_firmware()) else {
            return Ok(());
        };
        let modelled = self.driver(driver)?.mirrors_on() == MirrorsOn::Software;
        NotSent::reason(sev.es, modelled, sev.policy).map_or(Ok(()), |why| Err(not_sent(why)))
    }

    /// Plans for a guest that is about to arrive.
    pub fn plan_arrival(
        &self,
        driver: &DriverSpec,
        layout: &GuestLayout,
        strategy: Strategy,
        workers: u32,
        declaration: Option<&Declaration>,
        image: &HelperImage,
    ) -> Result<MirrorPlan, HostError> {
        self.check_strategy(driver, strategy)?;
        self.plan_request(self.request(driver, layout, strategy, workers, declaration, image))
    }

    fn plan_request(&self, request: PlanRequest<'_>) -> Result<MirrorPlan, HostError> {
        address_space::plan(&request).map_err(HostError::PlanRefused)
    }

    /// A mirror of a machine, its helper waiting for work.
    pub fn make_mirror(
        &self,
        record: &GuestRecord,
        machine: &dyn Machine,
        strategy: Strategy,
        workers: u32,
        image: &HelperImage,
    ) -> Result<Mirror, HostError> {
        let mut mirror =
            self.build_mirror(record, machine, LaunchMirror { strategy, workers }, image, false)?;
        mirror.wake().map_err(mirror_error)?;
        Ok(mirror)
    }

    fn build_mirror(
        &self,
        record: &GuestRecord,
        machine: &dyn Machine,
        kind: LaunchMirror,
        image: &HelperImage,
        launching: bool,
    ) -> Result<Mirror, HostError> {
        let LaunchMirror { strategy, workers } = kind;
        let driver = &record.spec.driver;
        self.check_strategy(driver, strategy)?;
        let hypervisor = self.hypervisor(driver)?;
        let layout = machine.ram().layout();
        let live = machine.migration_control().readiness().declaration;
        // Before a guest has run it has declared nothing; what the reference guest is going to declare is
        // known.
        let reference = || self.reference_declaration(driver, &layout).filter(|_| launching);
        let declaration = live.as_deref().cloned().or_else(reference);
        let shared: PageSet = machine.encryption().shared();
        let request = self.request(driver, &layout, strategy, workers, declaration.as_ref(), image);
        let plan = self.plan_request(PlanRequest { shared: Some(&shared), ..request })?;
        let launched = machine.launched_helper();
        let helper = match &launched {
            Some(launched) => HelperSource::Launched(launched),
            None => HelperSource::Loaded { secret: machine.migration_secret() },
        };
        let ram = machine.ram();
        Mirror::build(hypervisor, &short_name(record), Arc::new(plan), workers, ram, image, helper)
            .map_err(mirror_error)
    }
}

fn short_name(record: &GuestRecord) -> String {
    record.spec.name.chars().take(8).collect()
}

/// What the policy rules out is the caller's to change; the rest is this host's lack.
fn not_sent(why: NotSent) -> HostError {
    match why {
        NotSent::NoKeySharing | NotSent::NoSend => HostError::PolicyForbids { why: why.to_string() },
        NotSent::NoContext | NotSent::EncryptedState | NotSent::Kernel => {
            HostError::lacks(Capability::PspCopiedBySendReceive, why.to_string())
        }
    }
}

fn mirror_error(e: MirrorError) -> HostError {
    match e {
        MirrorError::Memory(e) => HostError::memory("making memory for a mirror", e),
        MirrorError::Debuggable => HostError::PolicyForbids { why: e.to_string() },
        MirrorError::AfterLaunch => HostError::MirrorAtLaunch,
        MirrorError::NotLaunched { offset } => HostError::NotLaunched { offset },
        MirrorError::Via(why) => not_sent(why),
        e => HostError::internal("making the mirror", e),
    }
}

/// 32 random bytes.
pub(super) fn fresh_secret() -> Result<Secret<32>, MachineError> {
    use ring::rand::SecureRandom;
    Secret::try_filled(|bytes: &mut [u8; 32]| {
        let drawn = ring::rand::SystemRandom::new().fill(bytes);
        drawn.map_err(|_| MachineError::Unsupported { what: "get random numbers" })
    })
}

/// What a guest's RAM may lie on, the best first: what was asked for, or else what its driver prefers.
fn backings_of(driver: &dyn Driver, asked: Option<Backing>) -> &'static [Backing] {
    match asked {
        None => driver.backings(),
        Some(Backing::Anonymous) => &[Backing::Anonymous],
        Some(Backing::Memfd) => &[Backing::Memfd],
        Some(Backing::Hugetlb) => &[Backing::Hugetlb],
    }
}

/// Memory whose reserved pages are there. Where a guest does not insist on them, it gets other memory if they
/// are not.
fn settled(ram: GuestRam, driver: &dyn Driver, backings: &[Backing]) -> Result<GuestRam, MachineError> {
    match (ram.take_reserved(), backings) {
        (Err(MemoryError::NotEnough(why)), [first, rest @ ..]) if !rest.is_empty() => {
            tracing::info!(%why, backing = first.name(), "a guest gets other memory");
            let layout = Arc::new(GuestLayout::clone(&ram.layout()));
            drop(ram);
            Ok(driver.memory(&layout, rest)?)
        }
        (taken, _) => {
            taken?;
            Ok(ram)
        }
    }
}
