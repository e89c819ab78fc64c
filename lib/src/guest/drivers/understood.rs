//! Whether a definition that somebody else wrote, or an earlier or later build, is wholly understood here.
//!
//! Owns: the comparison. Must not know: where a definition comes from, what is done with one that is not.

use serde_json::Value;

use super::{Drivers, UnknownDriver};
use crate::guest::driver::{BadParameters, DriverSpec};

/// Why a driver's part of a definition is not understood.
#[derive(Debug, thiserror::Error)]
pub enum NotUnderstood {
    /// The driver is not here.
    #[error(transparent)]
    Driver(#[from] UnknownDriver),
    /// The driver cannot read it.
    #[error(transparent)]
    Parameters(#[from] BadParameters),
    /// A member, by its pointer within the driver's part, that the driver here does not know.
    #[error(
        "/driver{at}: the driver {kind} of this build does not know this member; run the build that wrote it"
    )]
    Unknown {
        /// The driver.
        kind: String,
        /// Which member, cut where it gets absurd.
        at: String,
    },
}

impl Drivers {
    /// A driver's part of a definition, of which the driver here understands everything: what it would drop
    /// makes another guest of it.
    ///
    /// # Errors
    /// What is not understood.
    pub fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, NotUnderstood> {
        let ours = self.of(spec)?.understood(spec)?;
        let both = (Value::Object(spec.parameters()), Value::Object(ours.parameters()));
        match lost(&both.0, &both.1) {
            None => Ok(ours),
            Some(at) => Err(NotUnderstood::Unknown { kind: spec.kind().to_owned(), at }),
        }
    }
}

/// The first part of a document that is not in what was read of it, as a pointer.
fn lost(theirs: &Value, ours: &Value) -> Option<String> {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => theirs.iter().find_map(|(key, value)| {
            let rest = match ours.get(key) {
                Some(ours) => lost(value, ours)?,
                // A member that says nothing is as good as none.
                None if value.is_null() => return None,
                None => String::new(),
            };
            let key: String = key.chars().filter(|c| !c.is_control()).take(64).collect();
            Some(format!("/{key}{rest}"))
        }),
        (Value::Array(theirs), Value::Array(ours)) => {
            let mut pairs = theirs.iter().zip(ours).enumerate();
            let within = pairs.find_map(|(at, (theirs, ours))| Some(format!("/{at}{}", lost(theirs, ours)?)));
            within.or_else(|| (theirs.len() != ours.len()).then(|| format!("/{}", ours.len())))
        }
        (theirs, ours) => (theirs != ours).then(String::new),
    }
}
