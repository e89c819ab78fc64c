//! Drivers: what runs guests. One trait, a table of those that a host has, and the three stock ones.
//!
//! Owns: the contract between a host and a driver, and the table. Must not know: hosts, records, mirrors.
//! Whatever is particular to a driver is in that driver's file and nowhere else; whoever embeds the library
//! adds drivers of their own to the table ([`Drivers::with`]), and the host, the daemon's API and its
//! document take them up from there.

mod embedded;
mod emulated;
mod qemu;
mod table;
mod understood;
mod workload;

use crate::codes::Capability;
use std::sync::Arc;

use mirrorvm_abi::header::Header;
use serde_json::{Value, json};
use uuid::Uuid;

pub use embedded::EmbeddedDriver;
pub use emulated::EmulatedDriver;
pub use qemu::{QemuDriver, QemuGuest};
pub use table::{BadDriverName, Drivers, UnknownDriver};
pub use understood::NotUnderstood;
pub use workload::WorkloadGuest;

use super::attestation::AttestationSpec;
use super::driver::{BadParameters, DriverSpec, Parameters, ProtectionLevel, SevSpec};
use super::embedded::{CheckDeclaration, SevSetup};
use super::{Machine, MachineError, OnEnd};
use crate::address_space::{BlockSpec, Declaration, GuestLayout, HelperPlacement, LayoutError};
use crate::boot_files::{BootFiles, ImageDirectories};
use crate::hypervisor::Hypervisor;
use crate::memory::{Backing, Claim, GuestRam, MemoryError, Secret};
use crate::qemu::QemuUsers;
use crate::reading::{FieldError, Fields};

/// What a driver's part of a definition looks like: one entry of the document's `Driver` union.
#[derive(Clone, Debug)]
pub struct DriverSchema {
    /// Name of the entry, e.g. `DriverEmbedded`; generated clients name a type by it.
    pub title: &'static str,
    /// What the driver is, in a sentence or two.
    pub description: &'static str,
    /// JSON schemas of the driver's members by name, without `kind`.
    pub properties: Parameters,
    /// Members that must be there.
    pub required: Vec<&'static str>,
    /// Schemas that `properties` refer to as `#/components/schemas/NAME`. What the stock document has of that
    /// name may be referred to without being here.
    pub components: Vec<(&'static str, Value)>,
}

impl DriverSchema {
    /// The entry of the union for the driver called `kind`.
    pub fn entry(&self, kind: &str) -> Value {
        let kind = json!({"type": "string", "enum": [kind]});
        let mut properties = Parameters::from_iter([("kind".to_owned(), kind)]);
        properties.extend(self.properties.clone());
        let required: Vec<_> = std::iter::once("kind").chain(self.required.iter().copied()).collect();
        json!({
            "title": self.title,
            "description": self.description,
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": false,
        })
    }
}

/// What of a definition a driver judges.
#[derive(Clone, Copy, Debug)]
pub struct Definition<'a> {
    /// The driver's own part.
    pub spec: &'a DriverSpec,
    /// RAM blocks, as they were asked for.
    pub blocks: &'a [BlockSpec],
    /// What RAM is to lie on; `None`: the host chooses.
    pub backing: Option<Backing>,
}

impl Definition<'_> {
    /// Bytes of all blocks.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.size_bytes).fold(0, u64::saturating_add)
    }
}

/// What hosts need to know of a guest, whatever its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// How its memory is encrypted; `None`: not at all.
    pub sev: Option<SevSpec>,
    /// What protects it.
    pub protection: ProtectionLevel,
}

impl Facts {
    /// Whether the guest's owner demands evidence of a destination before pages leave.
    pub fn demands_evidence(&self) -> bool {
        let default = AttestationSpec::default_at(self.protection == ProtectionLevel::Modelled);
        self.sev.as_ref().is_some_and(|sev| sev.attestation.as_ref().unwrap_or(&default).demanded)
    }
}

/// Which hypervisor a driver's guests get their mirrors from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorsOn {
    /// KVM: mirrors need `/dev/kvm`.
    Kvm,
    /// The software machine, which is always there. It knows the built-in helper by its bytes, and no other.
    Software,
}

/// How the pages are found that a running guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindsWrites {
    /// The machine logs them ([`Machine::log_dirty`]).
    Log,
    /// Nobody logs them: the helper digests every page and compares, for which its block has to have room.
    Scan {
        /// What the host lacks when a guest is to be moved while it runs and the helper has no room.
        lacks: Capability,
        /// Why nobody logs them: a clause, with what it takes and the way on.
        why: &'static str,
    },
}

/// How fast a guest writes, as far as its definition tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteRate {
    /// Bytes per second.
    pub bytes_per_second: u64,
    /// Bytes that are written over and over.
    pub working_set_bytes: u64,
}

/// Something that this host cannot do, and what would help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingCapability {
    /// What is missing.
    pub what: Capability,
    /// Why it is missing.
    pub why: String,
    /// What to do about it.
    pub fix: String,
}

impl MissingCapability {
    /// No `/dev/kvm`, for the reason that opening it gave.
    pub fn kvm(why: &str) -> Self {
        Self {
            what: Capability::Kvm,
            why: why.to_owned(),
            fix: crate::hypervisor::kvm_denied_fix().unwrap_or_else(|| {
                "load the kvm module for this processor (modprobe kvm_amd or kvm_intel) and let the daemon open /dev/kvm".into()
            }),
        }
    }
}

/// Why a guest cannot be taken in from another host just now.
#[derive(Debug, thiserror::Error)]
pub enum CannotReceive {
    /// The host lacks something; a sentence that names the definition's field where it is about one.
    #[error("{0}")]
    Missing(String),
    /// No machine can be made at the moment.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Why a guest's RAM cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub enum LayoutFault {
    /// The helper would need more memory than can be addressed.
    #[error("the helper needs more memory than can be addressed")]
    HelperMemory,
    /// A block that is not the guest's own finds no place.
    #[error("a block beside the guest's own finds no place")]
    Placing(#[source] LayoutError),
}

impl From<Vec<LayoutError>> for LayoutFault {
    fn from(errors: Vec<LayoutError>) -> Self {
        errors.into_iter().next().map_or(Self::HelperMemory, Self::Placing)
    }
}

/// How a machine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning<'a> {
    /// Afresh: the guest boots when it is resumed.
    Boot,
    /// Waiting for memory and state that come from another host's machine ([`Machine::load_state`]).
    Arrival {
        /// What that machine says of itself ([`Machine::machine_type`]).
        machine_type: Option<&'a str>,
        /// Whether the guest stays paused when it is here.
        paused: bool,
    },
}

/// What a machine is made of.
pub struct Order<'a> {
    /// A few characters of the guest's name, for threads.
    pub name: &'a str,
    /// The guest's id.
    pub id: Uuid,
    /// The guest's name.
    pub guest: &'a str,
    /// The driver's part of the definition.
    pub spec: &'a DriverSpec,
    /// The layout that the guest was defined with: what its own page tables know.
    pub home: &'a GuestLayout,
    /// The layout with what is plugged where now.
    pub layout: &'a GuestLayout,
    /// Its memory.
    pub ram: GuestRam,
    /// The guest's migration secret, which [`Machine::migration_secret`] shows.
    pub secret: Secret<32>,
    /// How it begins.
    pub beginning: Beginning<'a>,
    /// What its mirrors run on; `None` where the host has no such hypervisor.
    pub hypervisor: Option<&'a dyn Hypervisor>,
    /// The built-in helper image. Where memory is encrypted, the guest's launch has to load it.
    pub helper_image: &'a [u8],
    /// What the reference guest's firmware declares for the helper.
    pub declaration: Option<Declaration>,
    /// Says what is wrong with what the guest then declares.
    pub check_declaration: CheckDeclaration,
    /// How its memory is encrypted; `None`: not at all.
    pub sev: Option<SevSetup>,
    /// Directories that files of the host may come from.
    pub images: &'a ImageDirectories,
    /// What those files held when the guest was defined.
    pub boot: Option<&'a BootFiles>,
    /// The claim on [`Driver::own_bytes`].
    pub own_memory: Option<Claim>,
    /// To be called, from any thread, when the guest ends by itself.
    pub on_end: OnEnd,
    /// To be called when the guest says whether it can be migrated.
    pub on_readiness: Arc<dyn Fn() + Send + Sync>,
}

/// A machine that was made, paused.
pub struct Body {
    /// The machine. What [`Machine::finish_launch`] does is still to come.
    pub machine: Box<dyn Machine>,
    /// Where its RAM is plugged, as it turned out.
    pub layout: GuestLayout,
    /// The driver's part of the definition as it is from now on, where starting settled something of it.
    pub settled: Option<DriverSpec>,
}

/// Something that runs guests.
///
/// A driver is one value for all guests of a host. Calls come from any thread; those that give a [`Result`]
/// may look at the host (files, devices), the others only at what they are given. Parameters that reach a
/// driver other than by [`Driver::read`] may be anybody's: [`Driver::check`] says what is wrong with them,
/// and nothing else may panic over them.
pub trait Driver: Send + Sync {
    /// Its name, `kind` in definitions: 1 to 32 of `[a-z0-9-]`.
    fn name(&self) -> &'static str;

    /// What its part of a definition looks like, for the API's document.
    fn schema(&self) -> DriverSchema;

    /// Reads its part of a definition as a caller wrote it, for a guest with `ram_bytes` of RAM, and fills in
    /// what was left out. Asks `fields` for every member that it knows; those that it did not ask for are
    /// refused afterwards. `None`: `fields` has noted why.
    fn read(&self, fields: &mut Fields<'_, '_>, ram_bytes: u64) -> Option<DriverSpec>;

    /// The parameters of a definition that comes from another host, as this driver understands them: what it
    /// does not know is left out, and the host refuses the guest over it.
    ///
    /// # Errors
    /// Parameters that cannot be read.
    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        Ok(spec.clone())
    }

    /// The driver's part of a definition as callers see it, without `kind`: such that reading it gives `spec`
    /// again.
    fn shown(&self, spec: &DriverSpec) -> Parameters {
        spec.parameters().clone()
    }

    /// Notes everything that is wrong with a definition of its guests, with pointers from the top of the
    /// definition (`/driver/...`, `/memory/...`).
    fn check(&self, definition: &Definition<'_>, errors: &mut Vec<FieldError>);

    /// What hosts need to know of such a guest. Of parameters that cannot be read: what the default says.
    fn facts(&self, spec: &DriverSpec) -> Facts;

    /// What its guests' mirrors run on.
    fn mirrors_on(&self) -> MirrorsOn;

    /// Whether guests of it can be started here.
    ///
    /// # Errors
    /// What is missing.
    fn works(&self, hypervisor: Result<&dyn Hypervisor, &str>) -> Result<(), MissingCapability> {
        hypervisor.map(|_| ()).map_err(MissingCapability::kvm)
    }

    /// Whether a guest can be taken in from another host now. [`Driver::works`] has been asked, where mirrors
    /// are concerned.
    ///
    /// # Errors
    /// What is missing.
    fn can_receive(&self, spec: &DriverSpec) -> Result<(), CannotReceive> {
        let _ = spec;
        Ok(())
    }

    /// The guest's layout with the blocks that are not its own: the helper's, at least.
    ///
    /// # Errors
    /// [`LayoutFault`].
    fn layout(
        &self,
        spec: &DriverSpec,
        bare: &GuestLayout,
        helper: &Header,
    ) -> Result<GuestLayout, LayoutFault> {
        let _ = spec;
        Ok(bare.with_helper(helper_block_size(bare, helper)?, true)?)
    }

    /// Whether a guest could start in RAM that is laid out like this: `home`, with the blocks that are not
    /// its own, as [`Driver::layout`] gives it. Looks at the numbers alone, by the same as [`Driver::make`].
    ///
    /// # Errors
    /// What [`Driver::make`] would fail with.
    fn starts_in(&self, spec: &DriverSpec, home: &GuestLayout) -> Result<(), MachineError> {
        let _ = (spec, home);
        Ok(())
    }

    /// What RAM may lie on where the definition leaves that to the host, the best first; at least one.
    fn backings(&self) -> &'static [Backing] {
        &[Backing::Anonymous]
    }

    /// Memory for all blocks of `layout`, on the first of `backings` that there is enough of.
    ///
    /// # Errors
    /// [`MemoryError::NotEnough`] where the host has not so much; otherwise what the system says.
    fn memory(&self, layout: &Arc<GuestLayout>, backings: &[Backing]) -> Result<GuestRam, MemoryError> {
        GuestRam::allocate_first(layout, backings)
    }

    /// Bytes that such a guest takes for itself beside its RAM; `None`: nothing worth counting.
    fn own_bytes(&self, spec: &DriverSpec, boot: Option<&BootFiles>) -> Option<u64> {
        let _ = (spec, boot);
        None
    }

    /// What the files hold that a guest boots from; `None` for a driver that reads none. They are opened
    /// here, so that a definition that is taken named files that could be read.
    ///
    /// # Errors
    /// Every file that cannot be used.
    fn boot_files(
        &self,
        definition: &Definition<'_>,
        images: &ImageDirectories,
    ) -> Result<Option<BootFiles>, Vec<FieldError>> {
        let _ = (definition, images);
        Ok(None)
    }

    /// How the pages are found that its guests write.
    fn finds_writes(&self) -> FindsWrites {
        FindsWrites::Log
    }

    /// How fast such a guest writes, if its definition tells.
    fn write_rate(&self, spec: &DriverSpec) -> Option<WriteRate> {
        let _ = spec;
        None
    }

    /// Whether its machines can hold back their vCPUs, as [`Machine::can_throttle`] says of one that is
    /// there.
    fn can_throttle(&self) -> bool {
        false
    }

    /// Whether its guests' firmware declares for the helper what the reference guest's does.
    fn declares(&self) -> bool {
        false
    }

    /// Whether RAM blocks can be added to a guest that is defined.
    ///
    /// # Errors
    /// Why not: a clause.
    fn can_add_blocks(&self) -> Result<(), &'static str> {
        Ok(())
    }

    /// Which accelerator a guest gets that asks for none, and why; `None` for a driver without a choice, or
    /// where it does not work.
    fn accelerator(&self) -> Option<(&'static str, &'static str)> {
        None
    }

    /// The users that its processes run as; `None`: it has none, or they run as this process's user.
    fn process_users(&self) -> Option<QemuUsers> {
        None
    }

    /// A machine for a guest, paused.
    ///
    /// # Errors
    /// [`MachineError`]; nothing stays behind.
    fn make(&self, order: Order<'_>) -> Result<Body, MachineError>;
}

/// How large a helper's block has to be beside `bare`: with room for a digest of every page, by which a
/// helper finds writes that nobody logs, and compares RAM after a migration.
///
/// # Errors
/// [`LayoutFault::HelperMemory`].
pub fn helper_block_size(bare: &GuestLayout, helper: &Header) -> Result<u64, LayoutFault> {
    HelperPlacement::block_size_with_digests(helper, bare).ok_or(LayoutFault::HelperMemory)
}
