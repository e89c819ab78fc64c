//! Which driver runs the guests, and what a guest is like on it.

use std::path::Path;

use serde_json::{Value, json};

use super::args::{DemoArgs, Driver, Fill};
use super::error::DemoError;
use super::method::Method;

/// Largest working set of the workload guest; a quarter of its RAM where that is less.
const WORKING_SET_MIB: u64 = 64;

/// What all guests of a demo have in common.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) args: &'a DemoArgs,
    pub(super) driver: Driver,
    /// Why it is not the driver that it would be.
    pub(super) fallback: Option<Fallback>,
}

/// What this host lacks for the driver that would have been taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fallback {
    /// What is missing: a code of the host's `missing`.
    pub(super) code: String,
    pub(super) why: String,
    pub(super) fix: String,
}

impl Fallback {
    pub(super) fn json(&self) -> Value {
        json!({"from": Driver::Embedded.name(), "code": self.code, "why": self.why, "fix": self.fix})
    }
}

impl<'a> Setting<'a> {
    /// The driver that was asked for, or the best one that a host with these capabilities has.
    ///
    /// # Errors
    /// The host's own reason why it cannot run the driver that was asked for.
    pub(super) fn choose(args: &'a DemoArgs, can: &Value) -> Result<Self, DemoError> {
        if let Some(driver) = args.driver {
            check_driver(driver, can)?;
            return Ok(Self { args, driver, fallback: None });
        }
        let needed = if args.es { &["kvm", "sev"][..] } else { &["kvm"] };
        let fallback = needed.iter().find_map(|code| missing(can, code));
        let driver = if fallback.is_some() { Driver::Emulated } else { Driver::Embedded };
        check_driver(driver, can)?;
        Ok(Self { args, driver, fallback })
    }

    /// The driver as the API has it.
    pub(super) fn driver_body(&self, method: Method) -> Value {
        let kind = self.driver.name();
        let mut body = match self.driver {
            Driver::Embedded | Driver::Emulated => {
                let working_set = (WORKING_SET_MIB << 20).min(self.args.memory_bytes() / 4);
                json!({"kind": kind, "vcpus": 1, "workload": {
                    "fill": match self.args.fill { Fill::Random => "random", Fill::Zero => "zero" },
                    "working_set_bytes": working_set,
                    "dirty_bytes_per_second": self.args.dirty_mib_per_s << 20,
                }})
            }
            Driver::Qemu => json!({"kind": kind, "vcpus": 1,
                "kernel": absolute(self.args.kernel.as_deref()), "initrd": absolute(self.args.initrd.as_deref()),
                "append": "console=ttyS0 no_timer_check quiet panic=-1", "accel": "auto"}),
        };
        if self.args.es {
            // Registers are encrypted once and for all at the launch, the mirror's included: it is made then.
            body["sev"] =
                json!({"es": true, "mirror": {"strategy": method.body(), "workers": self.args.streams}});
        }
        body
    }

    /// What the reader should know of the driver before anything runs; nothing where it is what one would
    /// expect.
    pub(super) fn notice(&self) -> Option<String> {
        if self.driver != Driver::Emulated {
            return None;
        }
        let mut text = String::new();
        if let Some(Fallback { code, why, fix }) = &self.fallback {
            text = format!(
                "this host cannot run the guest on hardware: {code} is missing ({why}). What would help: {fix}\n\
                 the demo takes the emulated driver instead\n"
            );
        }
        text.push_str(
            "driver emulated: a software machine without KVM. Protection is modelled: memory is ciphertext under a model \
             of SEV whose keys the daemon holds; it shows what SEV does and protects nothing",
        );
        Some(text)
    }
}

/// Whether the host runs the driver, by what it says of itself.
fn check_driver(driver: Driver, can: &Value) -> Result<(), DemoError> {
    let name = driver.name();
    let has = can["drivers"].as_array().is_some_and(|all| all.iter().any(|d| d == name));
    // QEMU may do without KVM, its guest's mirror may not.
    if has && (driver == Driver::Emulated || can["kvm"]["available"] == true) {
        return Ok(());
    }
    let wanted = if has || driver == Driver::Embedded { "kvm" } else { name };
    let Fallback { why, fix, .. } = missing(can, wanted).ok_or(DemoError::Answer { field: "missing" })?;
    Err(DemoError::Driver { driver: name, why, fix })
}

/// What the host says of a thing that it lacks; `None` when it does not.
fn missing(can: &Value, code: &str) -> Option<Fallback> {
    let entry = can["missing"].as_array()?.iter().find(|m| m["code"] == code)?;
    let text = |field: &str| entry[field].as_str().unwrap_or("no reason is given").to_owned();
    Some(Fallback { code: code.to_owned(), why: text("why"), fix: text("fix") })
}

/// The daemon may be somewhere else.
fn absolute(path: Option<&Path>) -> Option<String> {
    path.map(|p| std::path::absolute(p).unwrap_or_else(|_| p.to_owned()).to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::args::parsed as args;
    use crate::demo::method::Via;

    fn host(kvm: bool) -> Value {
        let no = |code: &str| json!({"code": code, "why": format!("no {code}"), "fix": "buy one"});
        let (drivers, missing) = if kvm {
            (json!(["embedded", "emulated"]), json!([no("sev"), no("qemu")]))
        } else {
            (json!(["emulated"]), json!([no("kvm"), no("sev"), no("qemu")]))
        };
        json!({"drivers": drivers, "missing": missing, "kvm": {"available": kvm}})
    }

    #[test]
    fn the_driver_is_the_best_there_is() {
        let chosen = |line: &[&str], kvm| {
            let args = args(line);
            let setting = Setting::choose(&args, &host(kvm)).unwrap();
            (setting.driver, setting.fallback.map(|f| f.code))
        };
        assert_eq!(chosen(&[], true), (Driver::Embedded, None));
        assert_eq!(chosen(&[], false), (Driver::Emulated, Some("kvm".into())));
        assert_eq!(chosen(&["--es"], true), (Driver::Emulated, Some("sev".into())));
        assert_eq!(chosen(&["--driver", "emulated"], true), (Driver::Emulated, None));
    }

    #[test]
    fn a_fallback_says_why_and_that_protection_is_modelled() {
        let args = args(&[]);
        let setting = Setting::choose(&args, &host(false)).unwrap();
        let notice = setting.notice().unwrap();
        for part in ["kvm is missing (no kvm)", "buy one", "emulated", "modelled", "protects nothing"] {
            assert!(notice.contains(part), "{part} is not in {notice}");
        }
        assert!(Setting::choose(&args, &host(true)).unwrap().notice().is_none());
    }

    #[test]
    fn a_driver_that_was_asked_for_is_not_exchanged() {
        for (driver, why) in [("embedded", "no kvm"), ("qemu", "no qemu")] {
            let error = Setting::choose(&args(&["--driver", driver]), &host(false)).unwrap_err();
            assert!(matches!(error, DemoError::Driver { .. }) && error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn a_guest_with_encrypted_registers_names_its_mirror() {
        let args = args(&["--es", "--streams", "1"]);
        let setting = Setting::choose(&args, &host(true)).unwrap();
        let body = setting.driver_body(Method::PspCopied(Via::LaunchUpdate));
        let mirror = json!({"strategy": {"kind": "psp-copied", "via": "launch-update"}, "workers": 1});
        assert_eq!(body["sev"], json!({"es": true, "mirror": mirror}));
        assert_eq!(body["kind"], "emulated");
        let plain = self::args(&[]);
        let setting = Setting::choose(&plain, &host(true)).unwrap();
        assert_eq!(setting.driver_body(Method::Declared).get("sev"), None);
    }
}
