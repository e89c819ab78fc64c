//! Making machines, plans and mirrors of what a host manages.

use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::guests::command::Command;
use super::guests::entry::GuestEntry;
use super::inner::{Inner, qemu_binary};
use super::{DriverSpec, Fill, GuestRecord, GuestSpec, HostError, LaunchMirror, SevSpec, WorkloadSpec};
use crate::address_space::{
    self, Confidentiality, Declaration, GuestLayout, HelperPlacement, HostLimits, MailboxSize, MirrorPlan,
    PlanRequest, PspVia, Refusal, Shift, Strategy,
};
use crate::boot_files::BootFiles;
use crate::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec, SevSetup, level};
use crate::guest::qemu::{QEMU_RESERVED, QemuMachine, QemuMachineSpec};
use crate::guest::{CarriedReadiness, Machine, MachineError};
use crate::hypervisor::Hypervisor;
use crate::memory::{Backing, Budget, Claim, GuestRam, MemoryError, Purpose};
use crate::mirror::{HelperImage, HelperSource, Mirror, MirrorError};
use crate::pages::PageSet;
use crate::qemu::UserPool;
use crate::sev::Policy;

/// Slots of a worker: the helper seals half of them while the others are being sent. More were no faster
/// here, and each costs half a MiB.
const SLOTS: u32 = 5;
/// The strategies that an encrypted guest's helper is loaded for at launch.
const LAUNCHED: [Strategy; 5] = [
    Strategy::Shifted { shift: Shift::FourGib },
    Strategy::Shifted { shift: Shift::MaxPhys },
    Strategy::IdentityCbit,
    Strategy::Declared,
    Strategy::PspCopied { via: PspVia::LaunchUpdate },
];

/// What a machine that waits for its memory must be told.
pub(super) struct IncomingMachine<'a> {
    pub secret: Zeroizing<[u8; 32]>,
    pub machine_type: Option<&'a str>,
    pub readiness: CarriedReadiness,
    /// The mirror that the migration uses.
    pub mirror: LaunchMirror,
}

/// Bytes of what a guest boots from.
fn file_bytes(boot: Option<&BootFiles>) -> u64 {
    boot.map_or(0, |b| b.kernel.bytes.saturating_add(b.initrd.map_or(0, |i| i.bytes)))
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
        let placed = |mut e: Vec<_>| HostError::internal("placing the helper's block", e.swap_remove(0));
        let bare = match driver.sev() {
            // One more than the workload's vCPUs: the firmware's.
            Some(SevSpec { es: true, .. }) => bare.with_save_areas(driver.vcpus() + 1).map_err(placed)?,
            _ => bare.clone(),
        };
        // Nobody logs the writes of QEMU's guests: their helper finds them, and needs room for it.
        let size = match driver {
            DriverSpec::Qemu { .. } => HelperPlacement::block_size_with_digests(self.image.header(), &bare),
            DriverSpec::Embedded { .. } | DriverSpec::Emulated { .. } => {
                HelperPlacement::block_size(self.image.header(), &bare)
            }
        };
        let size = size.ok_or(HostError::NoResources { what: "helper memory", source: None })?;
        let layout = match driver {
            DriverSpec::Embedded { .. } | DriverSpec::Emulated { .. } => bare.with_helper(size, true),
            DriverSpec::Qemu { .. } => {
                let from = bare.ram_end().checked_add(QEMU_RESERVED).unwrap_or(bare.ram_end());
                bare.with_helper_after(from, size, false)
            }
        };
        layout.map_err(placed)
    }

    /// Claims all the memory that a guest is going to have, and maps it; nothing of it is touched.
    pub fn memory_for(
        &self,
        spec: &GuestSpec,
        layout: &GuestLayout,
        boot: Option<&BootFiles>,
    ) -> Result<GuestMemory, HostError> {
        let own = self.process_bytes(&spec.driver, boot);
        let claim = |bytes| Budget::of_this_process().claim(bytes, Backing::Anonymous, Purpose::Guest);
        let process = own.map(claim).transpose()?;
        let ram = GuestRam::allocate_first(&Arc::new(layout.clone()), backings_of(spec));
        Ok(GuestMemory { ram: ram.map_err(|e| HostError::memory("making memory for a guest", e))?, process })
    }

    /// Whether [`Inner::memory_for`] a guest as it is would find enough now; claims nothing.
    pub fn has_memory_for(&self, record: &GuestRecord) -> Result<(), HostError> {
        let own = self.process_bytes(&record.spec.driver, record.boot.as_ref());
        Ok(GuestRam::has_room(&record.layout, backings_of(&record.spec), own.unwrap_or(0))?)
    }

    /// What a guest's process takes beside the guest's memory.
    fn process_bytes(&self, driver: &DriverSpec, boot: Option<&BootFiles>) -> Option<u64> {
        let DriverSpec::Qemu { accel, .. } = driver else { return None };
        // The sealed copies, and what QEMU reads of them.
        Some(self.choose_accel(*accel).own_bytes().saturating_add(file_bytes(boot).saturating_mul(2)))
    }

    /// A machine for a guest, paused: booted afresh, or (`incoming`) waiting for memory and state.
    pub fn make_machine(
        &self,
        record: &GuestRecord,
        entry: &GuestEntry,
        memory: GuestMemory,
        incoming: Option<IncomingMachine<'_>>,
    ) -> Result<Made, MakeError> {
        let GuestMemory { ram, process } = memory;
        let ram = settled(ram, &record.spec)?;
        let boot = incoming.is_none();
        let (secret, machine_type, readiness, mirror) = match incoming {
            Some(i) => (i.secret, i.machine_type.map(str::to_owned), Some(i.readiness), Some(i.mirror)),
            None => (fresh_secret()?, None, None, None),
        };
        let made = match &record.spec.driver {
            DriverSpec::Embedded { vcpus, workload, sev } | DriverSpec::Emulated { vcpus, workload, sev } => {
                let hypervisor = self.hypervisor(&record.spec.driver)?;
                let machine =
                    self.embedded(record, entry, (*vcpus, workload), hypervisor, ram, secret, boot)?;
                let mirror = sev.as_ref().filter(|s| s.es).map(|s| mirror.unwrap_or(s.mirror));
                self.launched(record, machine, mirror)?
            }
            DriverSpec::Qemu { vcpus, append, accel, .. } => {
                let (kernel, initrd) = self.boot_copies(record)?;
                // They are there now, and are none of what the process will have for itself.
                process.iter().for_each(|claim| claim.was_taken(file_bytes(record.boot.as_ref())));
                let lease = |pool: &UserPool| pool.lease().ok_or(MachineError::NoUser);
                let user = self.qemu_users.as_ref().map(lease).transpose()?;
                let spec = QemuMachineSpec {
                    binary: qemu_binary().ok_or(MachineError::Unsupported { what: "find QEMU" })?,
                    machine_type: machine_type.unwrap_or_else(|| "pc".into()),
                    accel: self.choose_accel(*accel),
                    vcpus: *vcpus,
                    kernel,
                    initrd,
                    append: append.clone(),
                    user,
                    memory: process,
                    incoming: !boot,
                };
                let mut machine = QemuMachine::launch(spec, ram, secret)?;
                let layout = if boot { machine.true_layout(&record.layout)? } else { record.layout.clone() };
                Made { machine: Box::new(machine), layout, mirror: None }
            }
        };
        if let Some(readiness) = readiness {
            made.machine.migration_control().adopt(readiness);
        }
        Ok(made)
    }

    #[expect(clippy::too_many_arguments, reason = "all of it goes into one setup")]
    fn embedded(
        &self,
        record: &GuestRecord,
        entry: &GuestEntry,
        (vcpus, workload): (u32, &WorkloadSpec),
        hypervisor: &dyn Hypervisor,
        ram: GuestRam,
        secret: Zeroizing<[u8; 32]>,
        boot: bool,
    ) -> Result<Embedded, MakeError> {
        let spec = EmbeddedSpec {
            vcpus,
            fill: workload.fill == Fill::Random,
            working_set: workload.working_set_bytes,
            dirty_bytes_per_second: workload.dirty_bytes_per_second,
            withdraw_after: workload.withdraws_readiness_after_ms.map(Duration::from_millis),
        };
        let sender = entry.sender();
        let on_end = Arc::new(move |end| {
            // Full queue or gone guest: the owner looks after its machine by itself, too.
            let _ = sender.try_send((Command::Ended(end), None));
        });
        let sender = entry.sender();
        let on_readiness = Arc::new(move || {
            let _ = sender.try_send((Command::Touch, None));
        });
        let home = self.home_layout(record)?;
        let driver = &record.spec.driver;
        let setup = EmbeddedSetup {
            name: &short_name(record),
            home: &home,
            ram,
            helper_image: self.image.bytes(),
            secret,
            boot,
            declaration: self.reference_declaration(driver, &home),
            check_declaration: self.declaration_check(driver, &home),
            on_readiness,
            sev: self.sev_setup(driver, &home, hypervisor)?,
            on_end,
        };
        Ok(Embedded::new(hypervisor, &spec, setup)?)
    }

    /// Ends the launch of an encrypted guest; with SEV-ES its mirror is made on the way.
    fn launched(
        &self,
        record: &GuestRecord,
        mut machine: Embedded,
        mirror: Option<LaunchMirror>,
    ) -> Result<Made, MakeError> {
        let mut made = None;
        if let Some(m) = mirror {
            made = Some(self.build_mirror(record, &machine, (m.strategy, m.workers), &self.image, true)?);
        }
        let areas = made.as_ref().map_or(&[][..], Mirror::launched_areas);
        machine.finish_launch(areas)?;
        if let Some(mirror) = &mut made {
            mirror.wake().map_err(mirror_error)?;
        }
        Ok(Made { machine: Box::new(machine), layout: record.layout.clone(), mirror: made })
    }

    /// The layout that a guest was defined with: what its own page tables know.
    fn home_layout(&self, record: &GuestRecord) -> Result<GuestLayout, HostError> {
        let bare = super::validate::guest(&record.spec)?;
        self.layout_for(&record.spec.driver, &bare)
    }

    fn sev_setup(
        &self,
        driver: &DriverSpec,
        home: &GuestLayout,
        hypervisor: &dyn Hypervisor,
    ) -> Result<Option<SevSetup>, HostError> {
        let Some(sev) = driver.sev() else { return Ok(None) };
        let platform = hypervisor.sev().ok_or_else(|| no_sev(hypervisor))?;
        let level = level(platform.as_ref(), sev.es);
        let declaration = self.reference_declaration(driver, home);
        let mut sets = Vec::new();
        for strategy in LAUNCHED {
            // What cannot be planned now cannot be made later either; the refusal comes when somebody asks
            // for it.
            if let Ok(plan) = address_space::plan(&self.request(
                driver,
                home,
                strategy,
                1,
                declaration.as_ref(),
                &self.image,
            )) {
                sets.extend(plan.set_contents(level, sev.policy.0));
            }
        }
        let image = self.image.bytes().to_vec();
        Ok(Some(SevSetup { platform, policy: sev.policy, es: sev.es, image, sets }))
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
        let confidentiality = match driver.sev() {
            None => Confidentiality::None,
            Some(SevSpec { es: false, .. }) => Confidentiality::Sev,
            Some(SevSpec { es: true, .. }) => Confidentiality::SevEs,
        };
        // Page tables of an encrypted guest's helper are made before anybody knows how many workers it gets.
        let workers = if driver.sev().is_some() { mirrorvm_abi::layout::WORKERS_MAX } else { workers };
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
        match (entry.readiness(), driver) {
            (Some(readiness), _) => readiness.declaration.as_deref().cloned(),
            (None, DriverSpec::Qemu { .. }) => None,
            (None, DriverSpec::Embedded { .. } | DriverSpec::Emulated { .. }) => {
                self.home_layout(record).ok().and_then(|home| self.reference_declaration(driver, &home))
            }
        }
    }

    /// Whether a guest of this driver can have a mirror of this strategy at all, whatever its layout.
    pub fn check_strategy(&self, driver: &DriverSpec, strategy: Strategy) -> Result<(), HostError> {
        if !matches!(strategy, Strategy::PspCopied { via: PspVia::SendReceive }) {
            return Ok(());
        }
        let cannot = |why: &str| {
            let why = why.to_owned();
            Err(HostError::CapabilityMissing { what: "psp-copied by send-receive", why })
        };
        match (driver, driver.sev()) {
            // The planner refuses it, as it refuses whatever the guest itself rules out.
            (_, None) => Ok(()),
            (_, Some(sev)) if sev.es => cannot(
                "with SEV-ES the mirror is made during the launch, and firmware sends running guests only",
            ),
            (DriverSpec::Emulated { .. }, Some(sev)) if sev.policy.has(Policy::NOKS) => {
                let why = "NOKS: the firmware does not share the guest's key with another guest".to_owned();
                Err(HostError::PolicyForbids { why })
            }
            (DriverSpec::Emulated { .. }, Some(sev)) if sev.policy.has(Policy::NOSEND) => {
                let why = "NOSEND: the firmware refuses SEND_START".to_owned();
                Err(HostError::PolicyForbids { why })
            }
            (DriverSpec::Emulated { .. }, Some(_)) => Ok(()),
            (DriverSpec::Embedded { .. } | DriverSpec::Qemu { .. }, Some(_)) => cannot(
                "KVM refuses RECEIVE commands on a VM that shares another's context, and copying a context into a VM that \
                 has one; use launch-update",
            ),
        }
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
        let mut mirror = self.build_mirror(record, machine, (strategy, workers), image, false)?;
        mirror.wake().map_err(mirror_error)?;
        Ok(mirror)
    }

    fn build_mirror(
        &self,
        record: &GuestRecord,
        machine: &dyn Machine,
        (strategy, workers): (Strategy, u32),
        image: &HelperImage,
        launching: bool,
    ) -> Result<Mirror, HostError> {
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

pub(super) fn no_sev(hypervisor: &dyn Hypervisor) -> HostError {
    let why = format!("{} has no SEV here; capabilities.missing tells why", hypervisor.name());
    HostError::CapabilityMissing { what: "sev", why }
}

fn mirror_error(e: MirrorError) -> HostError {
    match e {
        MirrorError::Memory(e) => HostError::memory("making memory for a mirror", e),
        MirrorError::Debuggable => HostError::PolicyForbids { why: e.to_string() },
        MirrorError::AfterLaunch => HostError::MirrorAtLaunch,
        MirrorError::NotLaunched { offset } => HostError::NotLaunched { offset },
        MirrorError::Via(why) => HostError::CapabilityMissing { what: "psp-copied", why: why.to_owned() },
        e => HostError::internal("making the mirror", e),
    }
}

/// 32 random bytes.
pub(super) fn fresh_secret() -> Result<Zeroizing<[u8; 32]>, MachineError> {
    use ring::rand::SecureRandom;
    let mut secret = Zeroizing::new([0; 32]);
    ring::rand::SystemRandom::new()
        .fill(secret.as_mut())
        .map_err(|_| MachineError::Unsupported { what: "get random numbers" })?;
    Ok(secret)
}

/// What a guest's RAM may lie on, the best first: what was asked for, or transparent huge pages where guest
/// and mirror are of one process, and for QEMU a file, on reserved huge pages if there are enough of them.
const fn backings_of(spec: &GuestSpec) -> &'static [Backing] {
    match (spec.backing, &spec.driver) {
        (Some(Backing::Anonymous), _) | (None, DriverSpec::Embedded { .. } | DriverSpec::Emulated { .. }) => {
            &[Backing::Anonymous]
        }
        (Some(Backing::Memfd), _) => &[Backing::Memfd],
        (Some(Backing::Hugetlb), _) => &[Backing::Hugetlb],
        (None, DriverSpec::Qemu { .. }) => &[Backing::Hugetlb, Backing::Memfd],
    }
}

/// What a guest's RAM would lie on now.
pub(super) fn backing_of(record: &GuestRecord) -> Backing {
    let list = backings_of(&record.spec);
    let found = list.iter().find(|b| GuestRam::has_room(&record.layout, &[**b], 0).is_ok());
    found.or(list.last()).copied().unwrap_or(Backing::Memfd)
}

/// Memory whose reserved pages are there. Where a guest does not insist on them, it gets other memory if they
/// are not.
fn settled(ram: GuestRam, spec: &GuestSpec) -> Result<GuestRam, MachineError> {
    match (ram.take_reserved(), backings_of(spec)) {
        (Err(MemoryError::NotEnough(why)), [first, rest @ ..]) if !rest.is_empty() => {
            tracing::info!(%why, backing = first.name(), "a guest gets other memory");
            let layout = Arc::new(GuestLayout::clone(&ram.layout()));
            drop(ram);
            Ok(GuestRam::allocate_first(&layout, rest)?)
        }
        (taken, _) => {
            taken?;
            Ok(ram)
        }
    }
}
