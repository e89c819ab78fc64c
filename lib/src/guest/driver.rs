//! How a guest runs: its driver with what that driver was told, and what protects the guest.
//!
//! Owns: the form of a definition's driver, the words for workloads and protection. Must not know: hosts,
//! records, requests, any particular driver (those are in [`super::drivers`]).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::attestation::AttestationSpec;
use crate::address_space::Strategy;
use crate::named::named;
use crate::sev::Policy;

/// vCPUs of a guest of a stock driver.
pub const VCPUS: RangeInclusive<u64> = 1..=16;
/// Threads of a mirror's helper.
pub const WORKERS: RangeInclusive<u64> = 1..=16;

/// Labels of a resource: at most 64, keys 1 to 63 and values 0 to 255 bytes.
pub type Labels = BTreeMap<String, String>;

/// What a driver was told, by name. A member that is null is one that is not there.
pub type Parameters = serde_json::Map<String, Value>;

/// How a guest runs: the name of a driver, and what that driver was told of the guest.
///
/// Stored and sent as one flat object, `kind` beside the driver's own members. Only the driver knows what
/// they mean: a host without it keeps such a definition and shows it, and does nothing else with it. Cheap to
/// clone, because every change of a guest makes a new record of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Flat")]
pub struct DriverSpec(Arc<Told>);

#[derive(Debug)]
struct Told {
    kind: Box<str>,
    /// A JSON object as text, its members in order: a tree of it takes six times as much, for every guest
    /// there is.
    parameters: Box<str>,
    /// See [`DriverSpec::shown_by`].
    shown: OnceLock<Arc<RawValue>>,
}

impl PartialEq for DriverSpec {
    fn eq(&self, other: &Self) -> bool {
        self.0.kind == other.0.kind && self.0.parameters == other.0.parameters
    }
}

impl Eq for DriverSpec {}

impl Serialize for DriverSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            kind: &'a str,
            #[serde(flatten)]
            parameters: Parameters,
        }
        Flat { kind: self.kind(), parameters: self.parameters() }.serialize(serializer)
    }
}

/// As it is read.
#[derive(Deserialize)]
struct Flat {
    kind: String,
    #[serde(flatten)]
    parameters: Parameters,
}

impl From<Flat> for DriverSpec {
    fn from(flat: Flat) -> Self {
        Self::new(flat.kind, flat.parameters)
    }
}

/// Parameters that are none of the driver's.
#[derive(Debug, thiserror::Error)]
#[error("these are no parameters of the driver {kind}")]
pub struct BadParameters {
    /// The driver.
    pub kind: String,
    /// What does not fit.
    #[source]
    pub source: serde_json::Error,
}

impl DriverSpec {
    /// A guest of the driver `kind`.
    pub fn new(kind: impl Into<String>, mut parameters: Parameters) -> Self {
        parameters.retain(|_, value| !value.is_null());
        // The same in memory, on disk and to peers, however somebody wrote it.
        parameters.sort_keys();
        parameters.values_mut().for_each(Value::sort_all_objects);
        let (kind, parameters) = (kind.into().into(), Value::Object(parameters).to_string().into());
        Self(Arc::new(Told { kind, parameters, shown: OnceLock::new() }))
    }

    /// A guest of the driver `kind`, with parameters of the driver's own type.
    ///
    /// # Errors
    /// Parameters that do not come to a JSON object.
    pub fn of(kind: &str, parameters: &impl Serialize) -> Result<Self, BadParameters> {
        let bad = |source| BadParameters { kind: kind.to_owned(), source };
        let value = serde_json::to_value(parameters).map_err(bad)?;
        serde_json::from_value(value).map(|map| Self::new(kind, map)).map_err(bad)
    }

    /// The driver's name.
    pub fn kind(&self) -> &str {
        &self.0.kind
    }

    /// What the driver was told.
    pub fn parameters(&self) -> Parameters {
        // What was written from an object is read as one.
        serde_json::from_str(&self.0.parameters).unwrap_or_default()
    }

    /// As its driver shows it to callers: `form` is called the first time and not again, because a list shows
    /// a thousand of them and each is a tree to build and to write. A process has one driver of a name.
    pub(super) fn shown_by(&self, form: impl FnOnce(&Self) -> Arc<RawValue>) -> Arc<RawValue> {
        self.0.shown.get_or_init(|| form(self)).clone()
    }

    /// What the driver was told, as the driver's own type.
    ///
    /// # Errors
    /// [`BadParameters`]: they come from somebody who has another driver of this name.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, BadParameters> {
        T::deserialize(Value::Object(self.parameters()))
            .map_err(|source| BadParameters { kind: self.kind().to_owned(), source })
    }
}

/// How a guest's memory is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SevSpec {
    /// The policy, in force for the guest's life; [`SevSpec::DEFAULT_POLICY`] when nothing else was asked
    /// for.
    pub policy: Policy,
    /// Whether vCPU registers are encrypted too (SEV-ES).
    pub es: bool,
    /// SEV-ES: the mirror that is made with the guest. Its vCPUs' save areas have to be measured before the
    /// launch ends, so that there is no other later.
    pub mirror: LaunchMirror,
    /// What the guest's owner demands of a destination; `None`: what is the default at its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attestation: Option<AttestationSpec>,
}

impl SevSpec {
    /// Policy of a guest that asks for none: not debuggable. A guest without NODBG can be read through its
    /// mirror.
    pub const DEFAULT_POLICY: u32 = Policy::NODBG;
}

/// The mirror that an SEV-ES guest is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchMirror {
    /// Layout of its address space.
    pub strategy: Strategy,
    /// Mirror vCPUs, 1 to 16.
    pub workers: u32,
}

/// What fills a workload guest's RAM before it starts to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Incompressible data.
    Random,
    /// Nothing: pages that the guest never writes stay zero.
    Zero,
}

/// What the built-in workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Initial content of RAM.
    pub fill: Fill,
    /// Bytes that are rewritten over and over, a multiple of 4 KiB; at most half of the RAM.
    pub working_set_bytes: u64,
    /// How fast they are rewritten, in bytes per second. 0: counter and console only.
    pub dirty_bytes_per_second: u64,
    /// Milliseconds after which the guest clears MSR_KVM_MIGRATION_CONTROL, as Linux does when a CPU goes
    /// offline; `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdraws_readiness_after_ms: Option<u64>,
}

/// Which accelerator a QEMU guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccelChoice {
    /// KVM where a stock guest can run under it, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

named! {
    /// What the hardware gives a guest.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub enum ProtectionLevel {
        /// Nothing: the host can read and write the guest's memory. Sealing protects the pages on the way.
        #[default]
        None = "none",
        /// A model of SEV in software: memory is ciphertext, and the host holds the keys. It shows what SEV
        /// does, and protects nothing.
        Modelled = "modelled",
        /// SEV: memory is encrypted; registers are not, and an active host can remap memory.
        Sev = "sev",
        /// SEV-ES: memory and registers are encrypted; an active host can remap memory.
        SevEs = "sev-es",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_driver_s_definition_is_one_flat_object_and_null_is_absent() {
        let stored = json!({"kind": "other", "size": 3, "none": null, "part": {"a": null}});
        let spec: DriverSpec = serde_json::from_value(stored).unwrap();
        assert_eq!(spec.kind(), "other");
        assert_eq!(spec, DriverSpec::of("other", &json!({"size": 3, "part": {"a": null}})).unwrap());
        let back = serde_json::to_value(&spec).unwrap();
        assert_eq!(back, json!({"kind": "other", "size": 3, "part": {"a": null}}));
        assert!(DriverSpec::of("other", &3).is_err());
        let wrong = spec.read::<WorkloadSpec>().unwrap_err();
        assert_eq!(wrong.to_string(), "these are no parameters of the driver other");
    }
}
