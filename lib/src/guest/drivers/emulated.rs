//! The driver `emulated`: a software machine with a model of SEV, without `/dev/kvm`; the guest is the
//! built-in workload, as `embedded` has it.
//!
//! Owns: what is so of this driver alone. Must not know: the workload's parameters (that is
//! [`super::workload`]), the machine (that is [`crate::guest::embedded`] on
//! [`crate::hypervisor::emulated`]).

use mirrorvm_abi::header::Header;

use super::{
    Body, Definition, Driver, DriverSchema, Facts, LayoutFault, MirrorsOn, Order, WorkloadGuest, WriteRate,
    helper_block_size, workload,
};
use crate::address_space::GuestLayout;
use crate::guest::MachineError;
use crate::guest::driver::{BadParameters, DriverSpec, Parameters, ProtectionLevel};
use crate::reading::{FieldError, Fields};

const NAME: &str = "emulated";

/// The driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmulatedDriver;

impl EmulatedDriver {
    /// A guest of this driver, as a definition has it.
    pub fn spec(guest: &WorkloadGuest) -> DriverSpec {
        guest.spec(NAME)
    }
}

impl Driver for EmulatedDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schema(&self) -> DriverSchema {
        workload::schema(
            "DriverEmulated",
            "A software machine with a model of SEV; needs no `/dev/kvm`. The guest is the built-in workload.",
            "How the guest's memory is encrypted under the model of SEV. Absent: as with `{}`. Null: not at\nall.",
        )
    }

    fn read(&self, fields: &mut Fields<'_, '_>, ram_bytes: u64) -> Option<DriverSpec> {
        // Absent is the model of SEV, which is what the driver is for.
        workload::read(fields, ram_bytes, true).map(|guest| guest.spec(NAME))
    }

    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        spec.read::<WorkloadGuest>().map(|guest| guest.spec(NAME))
    }

    fn shown(&self, spec: &DriverSpec) -> Parameters {
        workload::shown(spec, true)
    }

    fn check(&self, definition: &Definition<'_>, errors: &mut Vec<FieldError>) {
        workload::check(definition, true, errors);
    }

    fn facts(&self, spec: &DriverSpec) -> Facts {
        workload::facts(spec, |_| ProtectionLevel::Modelled)
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Software
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
