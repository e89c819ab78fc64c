//! A driver whose guests run nowhere, because no host has what they need. It says so in its own words.

use mirrorvm::codes::{Capability, DriverCapability};
use mirrorvm::guest::drivers::{Body, Definition, Driver, DriverSchema, Facts, MirrorsOn, Order};
use mirrorvm::guest::{DriverSpec, MachineError, MissingCapability};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::reading::{FieldError, Fields};
use serde_json::Map;

const NAME: &str = "unfit";
const CLOCK: DriverCapability = DriverCapability::new("cuckoo_clock", "a clock with a cuckoo");

/// The driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unfit;

impl Driver for Unfit {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schema(&self) -> DriverSchema {
        DriverSchema {
            title: "DriverUnfit",
            description: "Runs nowhere, for tests.",
            properties: Map::new(),
            required: Vec::new(),
            components: Vec::new(),
        }
    }

    fn read(&self, _: &mut Fields<'_, '_>, _: u64) -> Option<DriverSpec> {
        Some(DriverSpec::new(NAME, Map::new()))
    }

    fn check(&self, _: &Definition<'_>, _: &mut Vec<FieldError>) {}

    fn facts(&self, _: &DriverSpec) -> Facts {
        Facts { vcpus: 1, ..Facts::default() }
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Software
    }

    fn works(&self, _: Result<&dyn Hypervisor, &str>) -> Result<(), MissingCapability> {
        Err(MissingCapability {
            what: Capability::OfDriver(CLOCK),
            why: "the wall has no room".to_owned(),
            fix: "build a larger wall".to_owned(),
        })
    }

    fn make(&self, _: Order<'_>) -> Result<Body, MachineError> {
        Err(MachineError::Unsupported { what: "make a machine" })
    }
}
