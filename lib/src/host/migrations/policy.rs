//! What a guest's policy and driver rule out for a migration, whichever way it goes.

use crate::codes::Capability;
use crate::guest::Driver;
use crate::host::inner::Inner;
use crate::host::{DriverSpec, HostError, MigrationLimits, OnTimeout};
use crate::sev::Policy;

/// Whether the guest's vCPUs can be held back, if the limits ask for it. A migration that found out only when
/// its rounds do not shrink would have moved pages for nothing.
pub(in crate::host) fn check_throttle(
    inner: &Inner,
    driver: &DriverSpec,
    limits: &MigrationLimits,
) -> Result<(), HostError> {
    check_limits(inner.drivers.of(driver).is_ok_and(Driver::can_throttle), limits)
}

/// Of a driver that can hold back its guests' vCPUs, or cannot.
fn check_limits(can_throttle: bool, limits: &MigrationLimits) -> Result<(), HostError> {
    if can_throttle {
        return Ok(());
    }
    let field = if limits.auto_throttle {
        "/limits/auto_throttle"
    } else if limits.on_timeout == OnTimeout::Throttle {
        "/limits/on_timeout"
    } else {
        return Ok(());
    };
    let why = format!("{field}: the guest's driver cannot hold back its vCPUs");
    Err(HostError::lacks(Capability::Throttling, why))
}

/// Whether a policy lets a guest leave, and have a mirror.
pub(in crate::host) fn check_policy(policy: Policy) -> Result<(), HostError> {
    if policy.has(Policy::NOSEND) {
        let why = "NOSEND: the guest must not leave its platform".to_owned();
        return Err(HostError::PolicyForbids { why });
    }
    if !policy.has(Policy::NODBG) {
        let why = "NODBG is not set: whoever has a mirror of the guest can read it (DBG_DECRYPT)".to_owned();
        return Err(HostError::PolicyForbids { why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::drivers::{EmbeddedDriver, EmulatedDriver, QemuDriver};
    use crate::qemu::{QemuUsers, Starter};

    /// What a refusal of the limits says, for a guest of a driver.
    fn refusal(driver: &dyn Driver, auto_throttle: bool, on_timeout: OnTimeout) -> Option<String> {
        let limits = MigrationLimits { auto_throttle, on_timeout, ..MigrationLimits::default() };
        match check_limits(driver.can_throttle(), &limits) {
            Ok(()) => None,
            Err(HostError::CapabilityMissing { what: Capability::Throttling, why }) => Some(why),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_driver_that_cannot_throttle_is_not_asked_to() {
        let qemu = QemuDriver::new(QemuUsers::default(), Starter::Here);
        let names =
            |why: Option<String>, field: &str| why.is_some_and(|w| w.starts_with(&format!("{field}:")));
        assert!(names(refusal(&qemu, true, OnTimeout::Cancel), "/limits/auto_throttle"));
        assert!(names(refusal(&qemu, true, OnTimeout::Throttle), "/limits/auto_throttle"));
        assert!(names(refusal(&qemu, false, OnTimeout::Throttle), "/limits/on_timeout"));
        for allowed in [OnTimeout::Cancel, OnTimeout::Force] {
            assert_eq!(refusal(&qemu, false, allowed), None);
        }
        let able: [&dyn Driver; 2] = [&EmbeddedDriver, &EmulatedDriver];
        for driver in able {
            assert_eq!(refusal(driver, true, OnTimeout::Throttle), None);
        }
    }
}
