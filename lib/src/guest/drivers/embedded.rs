//! The driver `embedded`: this process is the VMM, on `/dev/kvm`; the guest is the built-in workload.
//!
//! Owns: what is so of this driver alone. Must not know: the workload's parameters (that is
//! [`super::workload`]), the machine (that is [`crate::guest::embedded`]).

use mirrorvm_abi::header::Header;

use super::{
    Body, Definition, Driver, DriverSchema, Facts, LayoutFault, MirrorsOn, Order, WorkloadGuest, WriteRate,
    helper_block_size, workload,
};
use crate::address_space::GuestLayout;
use crate::guest::MachineError;
use crate::guest::driver::{BadParameters, DriverSpec, Parameters, ProtectionLevel};
use crate::reading::{FieldError, Fields};

const NAME: &str = "embedded";

/// The driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmbeddedDriver;

impl EmbeddedDriver {
    /// A guest of this driver, as a definition has it.
    pub fn spec(guest: &WorkloadGuest) -> DriverSpec {
        guest.spec(NAME)
    }
}

impl Driver for EmbeddedDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schema(&self) -> DriverSchema {
        workload::schema(
            "DriverEmbedded",
            "The daemon is the VMM, on `/dev/kvm`; the guest is the built-in workload.",
            "How the guest's memory is encrypted, on a host with SEV. Absent: not at all.",
        )
    }

    fn read(&self, fields: &mut Fields<'_, '_>, ram_bytes: u64) -> Option<DriverSpec> {
        workload::read(fields, ram_bytes, false).map(|guest| guest.spec(NAME))
    }

    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        spec.read::<WorkloadGuest>().map(|guest| guest.spec(NAME))
    }

    fn shown(&self, spec: &DriverSpec) -> Parameters {
        workload::shown(spec, false)
    }

    fn check(&self, definition: &Definition<'_>, errors: &mut Vec<FieldError>) {
        workload::check(definition, false, errors);
    }

    fn facts(&self, spec: &DriverSpec) -> Facts {
        workload::facts(spec, |sev| if sev.es { ProtectionLevel::SevEs } else { ProtectionLevel::Sev })
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Kvm
    }

    fn layout(
        &self,
        spec: &DriverSpec,
        bare: &GuestLayout,
        helper: &Header,
    ) -> Result<GuestLayout, LayoutFault> {
        let bare = workload::with_save_areas(spec, bare)?;
        Ok(bare.with_helper(helper_block_size(&bare, helper)?, true)?)
    }

    fn starts_in(&self, spec: &DriverSpec, home: &GuestLayout) -> Result<(), MachineError> {
        workload::starts_in(spec, home)
    }

    fn write_rate(&self, spec: &DriverSpec) -> Option<WriteRate> {
        workload::write_rate(spec)
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn declares(&self) -> bool {
        true
    }

    fn make(&self, order: Order<'_>) -> Result<Body, MachineError> {
        workload::make(order)
    }
}
