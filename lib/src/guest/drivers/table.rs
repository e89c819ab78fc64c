//! The drivers of a host, by name.
//!
//! Owns: which drivers there are, and finding the one of a definition. Must not know: what any of them does.

use std::fmt;
use std::sync::Arc;

use serde_json::value::{RawValue, to_raw_value};

use super::{Driver, EmbeddedDriver, EmulatedDriver, Facts, QemuDriver};
use crate::guest::driver::DriverSpec;
use crate::qemu::{QemuUsers, Starter};
use crate::reading::{Errors, Fields, Node};

/// The drivers that a host has, in the order in which they are shown. Cheap to clone.
#[derive(Clone)]
pub struct Drivers(Arc<[Arc<dyn Driver>]>);

/// A driver that cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a driver cannot be called {name:?}: {why}")]
pub struct BadDriverName {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// A definition of a driver that is not here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host has no driver {kind:?}, only {}", .known.join(", "))]
pub struct UnknownDriver {
    /// The driver's name, cut where it gets absurd.
    pub kind: String,
    /// Those that are here.
    pub known: Vec<&'static str>,
}

impl Drivers {
    /// The three stock drivers: `embedded`, `emulated`, `qemu`, whose processes `starter` starts and which
    /// run as these users where this process is root.
    pub fn stock(users: QemuUsers, starter: Starter) -> Self {
        let qemu = QemuDriver::new(users, starter);
        Self(Arc::new([Arc::new(EmbeddedDriver), Arc::new(EmulatedDriver), Arc::new(qemu)]))
    }

    /// These and one more.
    ///
    /// # Errors
    /// A name that is taken, or none.
    pub fn with(self, driver: Arc<dyn Driver>) -> Result<Self, BadDriverName> {
        let name = driver.name();
        let bad = |why| Err(BadDriverName { name: name.to_owned(), why });
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=32).contains(&name.len()) || !name.bytes().all(legal) {
            return bad("a name is 1 to 32 of a-z, 0-9 and '-'");
        }
        if self.named(name).is_some() {
            return bad("there is one of that name already");
        }
        Ok(Self(self.0.iter().cloned().chain([driver]).collect()))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Driver> {
        self.0.iter().map(|driver| &**driver)
    }

    /// Their names.
    pub fn names(&self) -> Vec<&'static str> {
        self.iter().map(|driver| driver.name()).collect()
    }

    fn named(&self, name: &str) -> Option<&dyn Driver> {
        self.iter().find(|driver| driver.name() == name)
    }

    /// The driver of a definition.
    ///
    /// # Errors
    /// [`UnknownDriver`].
    pub fn of(&self, spec: &DriverSpec) -> Result<&dyn Driver, UnknownDriver> {
        let kind = spec.kind();
        let unknown = || UnknownDriver {
            kind: kind.chars().filter(|c| !c.is_control()).take(64).collect(),
            known: self.names(),
        };
        self.named(kind).ok_or_else(unknown)
    }

    /// What hosts need to know of a guest; of one whose driver is not here, what the default says.
    pub fn facts(&self, spec: &DriverSpec) -> Facts {
        self.named(spec.kind()).map(|driver| driver.facts(spec)).unwrap_or_default()
    }

    /// Reads a definition's driver as a caller wrote it: `kind` says which one reads the rest.
    pub fn read(&self, node: &Node<'_>, errors: &mut Errors, ram_bytes: u64) -> Option<DriverSpec> {
        let mut fields = Fields::open(node, errors)?;
        let driver = self.named(fields.kind(&self.names())?)?;
        let read = driver.read(&mut fields, ram_bytes);
        fields.done()?;
        read
    }

    /// A definition's driver as callers see it, `kind` among its members: a JSON object.
    pub fn shown(&self, spec: &DriverSpec) -> Arc<RawValue> {
        spec.shown_by(|spec| {
            let known = self.named(spec.kind()).map(|driver| driver.shown(spec));
            let mut shown = known.unwrap_or_else(|| spec.parameters().clone());
            shown.insert("kind".into(), spec.kind().into());
            to_raw_value(&shown).expect("a JSON object is JSON").into()
        })
    }
}

impl Default for Drivers {
    fn default() -> Self {
        Self::stock(QemuUsers::default(), Starter::Here)
    }
}

impl fmt::Debug for Drivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
